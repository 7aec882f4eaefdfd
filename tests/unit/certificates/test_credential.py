"""A credential on disk is replaced by one rename, and is believed only if all of it belongs together."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.errors import Expired, Invalid, NotFound
from tests.unit.certificates.authority import NOW, TestAuthority

CA = TestAuthority.make()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    one = CA.credential("proxy/n/w")
    credentials.write(tmp_path / "c", one)
    assert credentials.read(tmp_path / "c") == one
    assert (one.path, one.trust_domain) == ("proxy/n/w", "mesh.example")


def test_the_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    credentials.write(directory, CA.credential("proxy/n/w"))
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "key.pem").stat().st_mode & 0o777 == 0o600
    (directory / "key.pem").chmod(0o640)
    with pytest.raises(Invalid, match="mode 0640"):
        credentials.read(directory)


def test_key_certificate_and_roots_change_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = CA.credential("proxy/n/w"), CA.credential("proxy/n/w")
    credentials.write(tmp_path, old)
    seen = []
    really = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append(credentials.read(tmp_path))
        result = really(self, target)
        seen.append(credentials.read(tmp_path))
        return result

    monkeypatch.setattr(Path, "replace", watched)
    credentials.write(tmp_path, new)
    assert seen == [old, new]
    assert (tmp_path / "key.pem").read_text() == new.key
    assert (tmp_path / "certificate.pem").read_text() == new.chain


def test_two_that_write_at_once_lose_nothing_and_whoever_reads_meanwhile_finds_one(tmp_path: Path) -> None:
    both = CA.credential("operator/a"), CA.credential("operator/a")
    credentials.write(tmp_path, both[0])
    with ThreadPoolExecutor() as threads:
        writing = [
            threads.submit(lambda one=one: [credentials.write(tmp_path, one) for _ in range(50)]) for one in both
        ]
        while not all(one.done() for one in writing):
            assert credentials.read(tmp_path) in both
        for one in writing:
            one.result()
    assert credentials.read(tmp_path) in both
    assert len([p for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink()]) == 2


@pytest.mark.parametrize("step", range(3))
def test_a_crash_while_writing_leaves_the_old_one_and_the_next_write_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    old, new = CA.credential("proxy/n/w"), CA.credential("proxy/n/w")
    credentials.write(tmp_path, old)
    calls = 0
    really = os.fsync

    def crash(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > step:
            raise OSError("the power went")
        really(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="power"):
            credentials.write(tmp_path, new)
    assert credentials.read(tmp_path) == old
    credentials.write(tmp_path, new)
    assert credentials.read(tmp_path) == new


def test_old_ones_do_not_pile_up(tmp_path: Path) -> None:
    for _ in range(6):
        credentials.write(tmp_path, CA.credential("proxy/n/w"))
    assert len([p for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink()]) == 2


def test_an_empty_or_broken_directory_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no credential"):
        credentials.read(tmp_path)
    credentials.write(tmp_path, CA.credential("proxy/n/w"))
    (tmp_path / "certificate.pem").resolve().write_text("garbage")
    with pytest.raises(Invalid, match="cannot be read"):
        credentials.read(tmp_path)


def test_only_what_belongs_together_is_accepted() -> None:
    one, two = CA.credential("proxy/n/w"), CA.credential("proxy/n/w")
    one.check(NOW)
    for bad in (
        replace(one, key=two.key),
        replace(one, chain=two.chain),
        replace(one, uri="spiffe://mesh.example/operator/admin"),
        replace(one, roots=(x509.pem(TestAuthority.make().root),)),
        replace(one, key="garbage"),
    ):
        with pytest.raises(Invalid):
            bad.check(NOW)


def test_a_credential_knows_its_times() -> None:
    one = CA.credential("proxy/n/w")
    assert one.not_after == NOW + 86400
    assert NOW + 0.4 * 86400 <= one.renew_at <= NOW + 0.6 * 86400
    with pytest.raises(Expired):
        one.check(NOW + 86401)
    with pytest.raises(Expired):
        one.check(NOW - 121)


def test_the_presented_chain_ends_with_the_root() -> None:
    chain = x509.load(CA.credential("replica/a").chain_with_root())
    assert len(chain) == 3
    assert chain[-1] == CA.root


def test_no_key_is_in_its_text() -> None:
    one = CA.credential("proxy/n/w")
    assert "PRIVATE" not in repr(one)
    assert one.key.splitlines()[1] not in repr(one)
