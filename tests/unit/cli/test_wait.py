from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from cluster.kv import Put
from smc.api import waiting
from smc.api.backends import ProxyStatus
from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.cli.program import program
from smc.cli.session import Config
from smc.codec import encode
from smc.model import Identity, MeshConfig, Name
from smc.records import CertificateRecord, CrlRecord, IssuedCertificate, Nack, QuarantineRecord, RevokedCertificate
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import SERVICE, UNREACHABLE, Replica, member, running

LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
BUYER, STORE = Name("shop", "buyer-1"), Name("shop", "store-1")
HAS = [ProxyStatus(name, "", 0.0, 7, 7, "synced") for name in (BUYER, STORE)]
STALLED = replace(HAS[1], acked=0, state="stalled")


@dataclass
class Desk:
    replica: Replica
    home: Path
    shop: str
    """A file with a Service."""

    async def smc(self, *arguments: str) -> Result:
        environment = {"SMC_CREDENTIAL": str(self.home), "NO_COLOR": ""}

        def run() -> Result:
            return CliRunner().invoke(program, list(arguments), env=environment, prog_name="smc")

        return await asyncio.to_thread(run)

    async def written(self) -> None:
        """Until the Service is stored."""
        async with asyncio.timeout(60):
            key = self.replica.keys.manifest("smc.io/Service/shop/bookstore")
            while not await self.replica.kv.get(key):  # noqa: ASYNC110 - it is in another thread
                await asyncio.sleep(0.01)


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setattr("smc.api.mesh_service.SETTLE", 0.0)
    monkeypatch.setattr(waiting, "ABSENCE", 0.2)
    shop = tmp_path / "shop.yaml"
    shop.write_bytes(SERVICE)
    with capture_logs():
        async with running() as replica:
            replica.mesh = mesh(MeshConfig(), {name: proxy(name) for name in (BUYER, STORE)})
            replica.reached = 10_000
            replica.streams = list(HAS)
            credentials.write(tmp_path / "home", replica.operator)
            Config((replica.api,), "default").write(tmp_path / "home")
            yield Desk(replica, tmp_path / "home", str(shop))


async def test_apply_returns_once_every_proxy_has_it(desk: Desk) -> None:
    desk.replica.streams = [HAS[0], STALLED]
    applying = asyncio.create_task(desk.smc("apply", "-f", desk.shop, "--wait"))
    await desk.written()
    await asyncio.sleep(1)
    assert not applying.done()
    desk.replica.streams = list(HAS)
    result = await applying
    assert (result.exit_code, result.stdout) == (0, "service/bookstore created\n")
    assert result.stderr == "2 of 2 proxies have ACKed it\n", "no line that is written over: it is no terminal"


async def test_what_was_there_already_is_waited_for_as_well(desk: Desk) -> None:
    assert (await desk.smc("apply", "-f", desk.shop)).exit_code == 0
    desk.replica.streams = [HAS[0], STALLED]
    result = await desk.smc("apply", "-f", desk.shop, "--wait=1s")
    assert (result.exit_code, result.stdout) == (6, "service/bookstore unchanged\n")


async def test_after_the_time_the_laggards_are_named_and_the_exit_code_is_6(desk: Desk) -> None:
    desk.replica.streams = [HAS[0], STALLED]
    result = await desk.smc("apply", "-f", desk.shop, "--wait=500ms")
    assert (result.exit_code, result.stdout) == (6, "service/bookstore created\n")
    assert result.stderr == (
        "warning: shop/store-1 at replica-1: stalled\n"
        "error: after 0.5 s 1 of 2 proxies have ACKed it\n"
        "  what to do: it is written, and they get it once they can: see smc proxy status, or wait on in the same way\n"
    )


async def test_a_refusal_is_told_in_envoys_words(desk: Desk) -> None:
    nack = Nack(STORE, LISTENER, ("outbound",), "program size of 101", (), 10_000)
    desk.replica.streams = [HAS[0], replace(HAS[1], state="nacked", nacks=(nack,))]
    result = await desk.smc("apply", "-f", desk.shop, "--wait=500ms")
    assert result.exit_code == 6
    assert "shop/store-1 at replica-1: nacked: Listener outbound: program size of 101\n" in result.stderr


async def test_what_a_proxy_has_refused_for_good_is_not_waited_for_and_yet_no_success(desk: Desk) -> None:
    await desk.smc("apply", "-f", desk.shop)
    item = await desk.replica.kv.get(desk.replica.keys.manifest("smc.io/Service/shop/bookstore"))
    assert item is not None
    out = QuarantineRecord(STORE, "smc.io/Service/shop/bookstore", item.mod_revision, LISTENER, "outbound", "too big")
    desk.replica.mesh = mesh(MeshConfig(), {BUYER: proxy(BUYER), STORE: proxy(STORE, out)})
    async with asyncio.timeout(60):
        result = await desk.smc("apply", "-f", desk.shop, "--wait")
    assert result.exit_code == 6
    assert "shop/store-1 at replica-1: refused: smc.io/Service/shop/bookstore is left out: too big\n" in result.stderr
    assert "error: 1 of 2 proxies have ACKed it; the others have refused it\n" in result.stderr


async def test_a_proxy_that_is_not_there_is_told_and_no_failure(desk: Desk) -> None:
    desk.replica.streams = HAS[:1]
    result = await desk.smc("apply", "-f", desk.shop, "--wait")
    assert (result.exit_code, result.stderr) == (
        0,
        "1 of 1 proxies have ACKed it\nwarning: connected to no replica, and not waited for: shop/store-1\n",
    )


async def test_delete_waits_too_and_a_word_after_the_option_is_no_timeout(desk: Desk) -> None:
    await desk.smc("apply", "-f", desk.shop)
    desk.replica.streams = [HAS[0], STALLED]
    result = await desk.smc("delete", "-n", "shop", "--wait=1s", "service", "bookstore")
    assert (result.exit_code, result.stdout) == (6, "service/bookstore deleted\n")
    desk.replica.streams = list(HAS)
    await desk.smc("apply", "-f", desk.shop)
    result = await desk.smc("delete", "-n", "shop", "--wait", "service", "bookstore")
    assert (result.exit_code, result.stdout) == (0, "service/bookstore deleted\n")
    await desk.smc("apply", "-f", desk.shop)
    result = await desk.smc("delete", "-f", desk.shop, "--wait")
    assert (result.exit_code, result.stderr) == (0, "2 of 2 proxies have ACKed it\n")


async def test_a_replica_that_dies_meanwhile_is_replaced_by_another(desk: Desk) -> None:
    desk.replica.streams = [HAS[0], STALLED]
    async with running(name="replica-2", of=desk.replica) as other:
        other.mesh, other.reached = desk.replica.mesh, 10_000
        other.members = [member(desk.replica, "replica-1"), member(other, "replica-2")]
        Config((other.api, desk.replica.api), "default").write(desk.home)
        applying = asyncio.create_task(desk.smc("apply", "-f", desk.shop, "--wait"))
        # The servers of the first one asked go away with this block.
        await asyncio.sleep(1)
        assert not applying.done()
    desk.replica.streams = list(HAS)
    result = await applying
    assert (result.exit_code, result.stderr) == (0, "2 of 2 proxies have ACKed it\n")


async def test_when_no_replica_can_say_at_the_end_it_is_exit_code_5_and_told_that_it_is_written(desk: Desk) -> None:
    desk.replica.streams = [HAS[0], STALLED]
    applying = asyncio.create_task(desk.smc("apply", "-f", desk.shop, "--wait=3s"))
    await desk.written()
    await asyncio.sleep(1)
    desk.replica.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    result = await applying
    assert result.exit_code == 5
    assert "error: it is written, and which proxies have it is not known after 3 s: " in result.stderr


async def test_nothing_is_waited_for_after_a_refused_document(desk: Desk, tmp_path: Path) -> None:
    desk.replica.streams = [HAS[0], STALLED]
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(SERVICE + b"---\nkind: Nonsense\n")
    async with asyncio.timeout(60):
        assert (await desk.smc("apply", "-f", str(bad), "--wait")).exit_code == 1


@pytest.mark.parametrize("arguments", [("--wait=soon",), ("--wait", "--dry-run")])
async def test_wrong_usage(desk: Desk, arguments: tuple[str, ...]) -> None:
    assert (await desk.smc("apply", "-f", desk.shop, *arguments)).exit_code == 2


@pytest.mark.parametrize(("no_color", "live"), [("", True), ("1", False)])
async def test_a_terminal_shows_how_many_have_it_unless_it_is_to_be_plain(
    desk: Desk, no_color: str, live: bool
) -> None:
    desk.replica.streams = [HAS[0], STALLED]
    ours, theirs = os.openpty()
    environment = os.environ | {"SMC_CREDENTIAL": str(desk.home), "NO_COLOR": no_color, "TERM": "xterm"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "smc", "apply", "-f", desk.shop, "--wait=100s",
        stdout=asyncio.subprocess.DEVNULL, stderr=theirs, env=environment,
    )  # fmt: skip
    os.close(theirs)
    shown = ""
    try:
        async with asyncio.timeout(60):
            while live and "1 of 2 proxies" not in shown:
                shown += (await asyncio.to_thread(os.read, ours, 65536)).decode()
            while not desk.replica.metrics.api_calls.labels("Wait", "OK")._value.get():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        desk.replica.streams = list(HAS)
        assert await asyncio.wait_for(process.wait(), 60) == 0
        shown += os.read(ours, 65536).decode()
    finally:
        os.close(ours)
    assert ("\r\x1b[K1 of 2 proxies have ACKed it …" in shown) == live
    assert "2 of 2 proxies have ACKed it" in shown.rpartition("\x1b[K")[2]


# ------------------------------------------------------------------------------------------------------ revocations


async def _certify(desk: Desk) -> CertificateRecord:
    """The identity of the store has a certificate."""
    identity = Identity("shop", "store-1")
    made = await desk.replica.certified(identity.uri("mesh.example"), x509.new_key())
    serial = f"{x509.load(made.chain)[0].serial_number:x}"
    record = CertificateRecord(identity, made.chain, b"sealed", serial, 0.0, 9e9, 1)
    await desk.replica.kv.transact([Put(desk.replica.keys.certificate(identity), encode(record))])
    return record


async def test_revoke_waits_for_the_leader_and_says_so_when_it_has_not_done_its_part(desk: Desk) -> None:
    await _certify(desk)
    result = await desk.smc("cert", "revoke", "--proxy", "shop/store-1", "--wait=0.5s")
    assert result.exit_code == 6, result.output
    assert "proxy/shop/store-1 revoked" in result.output
    assert "after 0.5 s the leader has not listed all of its certificates yet" in result.output


async def test_revoke_returns_once_the_certificates_are_listed_and_every_proxy_has_acked_it(desk: Desk) -> None:
    record = await _certify(desk)
    waiting_ = asyncio.create_task(desk.smc("cert", "revoke", "--proxy", "shop/store-1", "--wait=10s"))
    await asyncio.sleep(0.5)
    assert not waiting_.done()
    listed = IssuedCertificate(record.serial, 1, "0a", 9e9, 1)
    crl = CrlRecord(1, (1,), ("LIST",), (RevokedCertificate(record.identity, listed, 1.0),))
    await desk.replica.kv.transact([Put(desk.replica.keys.crl, encode(crl))])
    result = await waiting_
    assert result.exit_code == 0, result.output
    assert "2 of 2 proxies have ACKed it" in result.output


@pytest.mark.parametrize(
    "given", [[], ["--proxy", "shop/a", "--identity", "shop/a"], ["--operator", "ann", "--viewer", "ann"]]
)
async def test_revoke_wants_one_of_four(desk: Desk, given: list[str]) -> None:
    result = await desk.smc("cert", "revoke", *given)
    assert result.exit_code == 2, result.output
    assert "name a --proxy, an --identity, an --operator or a --viewer, and one alone" in result.output


async def test_an_operator_is_revoked_by_name_waited_for_and_taken_back(desk: Desk) -> None:
    revoked = await desk.smc("cert", "revoke", "--operator", "ann", "--reason", "left", "--wait=10s")
    assert (revoked.exit_code, revoked.stdout) == (0, "operator/ann revoked\n"), revoked.output
    assert "to let it in again: smc token create operator/ann" in revoked.stderr
    assert "2 of 2 proxies have ACKed it" in revoked.stderr
    again = await desk.smc("cert", "revoke", "--operator", "ann")
    assert again.stdout == "operator/ann was revoked before\n"
    listed = await desk.smc("cert", "list")
    assert [line.split() for line in listed.stdout.splitlines()][-1][:2] == ["operator/ann", "revoked"]
    back = await desk.smc("cert", "revoke", "--operator", "ann", "--undo")
    assert (back.exit_code, back.stdout) == (0, "operator/ann is revoked no longer\n")


async def test_who_revokes_himself_is_told_the_way_back_and_is_not_kept_waiting_for_what_he_may_not_ask(
    desk: Desk,
) -> None:
    revoked = await desk.smc("cert", "revoke", "--operator", "admin", "--wait=10s")
    assert (revoked.exit_code, revoked.stdout) == (0, "operator/admin revoked\n"), revoked.output
    assert "that is you: another operator lets you in again with smc token create operator/admin" in revoked.stderr
    assert "if there is none, smc recover" in revoked.stderr
    assert "it is not waited for" in revoked.stderr
    back = await desk.smc("cert", "revoke", "--operator", "admin", "--undo")
    assert (back.exit_code, back.stdout) == (4, "")


@pytest.mark.parametrize(
    ("given", "code", "text"),
    [
        (["--operator", "Ann"], 1, "use operator/<name> or viewer/<name>"),
        (["--viewer", "viewer/ann"], 1, "use operator/<name> or viewer/<name>"),
        (["--operator", "ann", "--undo"], 3, "smc cert list shows who is"),
        (["--identity", "shop/buyer-1", "--undo"], 3, "smc cert list shows who is"),
    ],
)
async def test_who_cannot_be_revoked_or_was_not_is_said_with_what_to_do(
    desk: Desk, given: list[str], code: int, text: str
) -> None:
    result = await desk.smc("cert", "revoke", *given)
    assert (result.exit_code, result.stdout) == (code, "")
    assert text in result.stderr
