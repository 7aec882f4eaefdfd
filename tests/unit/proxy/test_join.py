"""Joining with a token: whom the proxy believes, and what it says for each way in which it fails."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import structlog

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.tokens import Token
from smc.proxy import enrolment
from smc.proxy import join as joining
from smc.proxy.join import join
from smc.proxy.settings import Exit, ProxyFailed
from tests.unit.certificates.authority import TestAuthority
from tests.unit.proxy.control_plane import ControlPlane, serving

CA = TestAuthority.make(now=time.time() - 3600)
REPLICA = CA.credential("replica/a", now=time.time())
TOKEN = Token(secrets.token_bytes(32), (x509.pin(CA.root),))
Status = grpc.StatusCode


async def refused(directory: Path, *addresses: str, token: Token = TOKEN, timeout: float = 10) -> ProxyFailed:
    """The error of a join that must fail; nothing that it says or logs may hold the token."""
    with structlog.testing.capture_logs() as logs, pytest.raises(ProxyFailed) as failed:
        await join(directory, token, addresses, timeout=timeout)
    said = f"{failed.value!r} {failed.value} {logs}"
    assert token.text()[4:47] not in said
    assert "PRIVATE KEY" not in said
    assert not (directory / enrolment.CREDENTIAL).exists()
    return failed.value


async def test_a_token_becomes_a_credential_for_a_key_that_was_made_here(tmp_path: Path) -> None:
    plane = ControlPlane(CA)
    async with serving(plane, REPLICA) as address:
        credential, enrolled = await join(tmp_path, TOKEN, (address,), timeout=10)
    credential.check(time.time())
    assert credential.uri == "spiffe://mesh.example/proxy/shop/buyer"
    assert credentials.read(tmp_path / enrolment.CREDENTIAL) == credential
    assert enrolment.read(tmp_path) == enrolled
    assert (enrolled.proxy, enrolled.mesh, enrolled.xds_addresses) == ("shop/buyer", "default", ("127.0.0.1:15128",))
    assert [request.token for request in plane.joins] == [TOKEN.text()]
    key = credential.key.splitlines()[1].encode()
    assert key not in plane.joins[0].SerializeToString()
    assert not (tmp_path / "pending.pem").exists()


async def test_a_server_with_another_root_gets_no_token(tmp_path: Path) -> None:
    other = TestAuthority.make(now=time.time())
    plane = ControlPlane(other)
    async with serving(plane, other.credential("replica/a", now=time.time())) as address:
        error = await refused(tmp_path, address)
    assert error.exit == Exit.WRONG_PIN
    assert error.message == (
        f"{address} is not the mesh that the token is for: the root that it has now is {x509.pin(other.root)[:16]}…, "
        f"and the one in the token is {TOKEN.pins[0][:16]}…"
    )
    assert error.hint == (
        "if the root was rotated after the token was made (smc cert rotate --root), nobody takes the token any more: "
        "ask for a new one, smc token create. If it was not, check the address; if it is right, somebody may be in "
        "between. The token was not sent"
    )
    assert plane.joins == []


async def test_a_server_that_is_no_replica_of_any_mesh_is_not_taken_for_one_with_another_root(tmp_path: Path) -> None:
    other = TestAuthority.make(now=time.time())
    async with serving(ControlPlane(other), other.credential("operator/admin", now=time.time())) as address:
        error = await refused(tmp_path, address)
    assert error.exit == Exit.WRONG_PIN
    assert "none of the certificates that it presents has the pinned key" in error.message
    assert error.hint.startswith("check the address")


async def test_a_server_that_shows_the_right_root_without_a_chain_to_it_gets_no_token(tmp_path: Path) -> None:
    other = TestAuthority.make(now=time.time())
    replica = other.credential("replica/a", now=time.time())
    plane = ControlPlane(other)
    async with serving(plane, replica, replica.chain + x509.pem(CA.root)) as address:
        error = await refused(tmp_path, address)
    assert error.exit == Exit.WRONG_PIN
    assert plane.joins == []


@pytest.mark.parametrize("path", ["proxy/shop/other", "operator/admin", "ns/shop/sa/buyer"])
async def test_another_member_of_the_mesh_cannot_pose_as_a_replica(tmp_path: Path, path: str) -> None:
    plane = ControlPlane(CA)
    async with serving(plane, CA.credential(path, now=time.time())) as address:
        error = await refused(tmp_path, address)
    assert error.exit == Exit.WRONG_PIN
    assert plane.joins == []


async def test_a_server_that_does_not_present_its_root_is_not_believed(tmp_path: Path) -> None:
    async with serving(ControlPlane(CA), REPLICA, REPLICA.chain) as address:
        assert (await refused(tmp_path, address)).exit == Exit.WRONG_PIN


@pytest.mark.parametrize(
    ("failure", "exit_"),
    [
        ((Status.UNAUTHENTICATED, "there is no such token, or it has expired", "Unauthenticated"), Exit.NO_SUCH_TOKEN),
        ((Status.UNAUTHENTICATED, "the token has expired", "Expired"), Exit.TOKEN_EXPIRED),
        ((Status.PERMISSION_DENIED, "the token was used by another key", "Denied"), Exit.TOKEN_USED),
        ((Status.INVALID_ARGUMENT, "a bad key", "Invalid"), Exit.REFUSED),
        ((Status.UNAUTHENTICATED, f"{TOKEN.text()} is unknown", ""), Exit.NO_SUCH_TOKEN),
    ],
)
async def test_each_refusal_has_its_own_exit_code(
    tmp_path: Path, failure: tuple[grpc.StatusCode, str, str], exit_: Exit
) -> None:
    plane = ControlPlane(CA, failures=[failure])
    async with serving(plane, REPLICA) as address:
        error = await refused(tmp_path, address)
    assert error.exit == exit_
    assert len(plane.joins) == 1
    if exit_ in (Exit.NO_SUCH_TOKEN, Exit.TOKEN_EXPIRED, Exit.TOKEN_USED):
        assert "smc token create" in error.hint


async def test_when_nothing_answers_it_says_who_did_not(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        error = await refused(tmp_path, address, timeout=0.3)
    assert error.exit == Exit.UNREACHABLE
    assert address in str(error)


async def test_a_mesh_without_a_leader_is_asked_again_with_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "FIRST_RETRY", 0.01)
    plane = ControlPlane(CA, failures=[(Status.UNAVAILABLE, "no leader", "Unavailable")] * 2)
    async with serving(plane, REPLICA) as address:
        await join(tmp_path, TOKEN, (address,), timeout=10)
    keys = {x509.fingerprint(x509.requested_key(request.csr)) for request in plane.joins}
    assert (len(plane.joins), len(keys)) == (3, 1)


async def test_the_next_address_is_tried_when_one_is_dead(tmp_path: Path) -> None:
    async with serving(ControlPlane(CA), REPLICA) as address:
        credential, _ = await join(tmp_path, TOKEN, ("127.0.0.1:1", address), timeout=10)
    assert credential.path == "proxy/shop/buyer"


async def test_after_a_crash_the_same_key_asks_again(tmp_path: Path) -> None:
    plane = ControlPlane(CA, failures=[(Status.INTERNAL, "the answer was lost", "")])
    async with serving(plane, REPLICA) as address:
        await refused(tmp_path, address)
        assert (tmp_path / "pending.pem").stat().st_mode & 0o777 == 0o600
        await join(tmp_path, TOKEN, (address,), timeout=10)
    first, second = (x509.fingerprint(x509.requested_key(request.csr)) for request in plane.joins)
    assert first == second


async def test_a_clock_that_is_an_hour_off_is_named_and_ninety_seconds_do_no_harm(tmp_path: Path) -> None:
    plane = ControlPlane(CA)
    async with serving(plane, REPLICA) as address:
        for hours, said in ((-2, "this one is behind"), (25, "set the clock")):
            with pytest.raises(ProxyFailed, match=said) as failed:
                await join(tmp_path, TOKEN, (address,), timeout=10, now=lambda h=hours: time.time() + 3600 * h)
            assert failed.value.exit == Exit.CLOCK_SKEW
        assert plane.joins == []
        for seconds in (-90, 90):
            await join(tmp_path / str(seconds), TOKEN, (address,), timeout=10, now=lambda s=seconds: time.time() + s)


async def test_an_answer_for_another_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = ControlPlane(CA)
    other = x509.request(x509.new_key())
    really = plane._answer
    monkeypatch.setattr(plane, "_answer", lambda _csr, context: really(other, context))
    async with serving(plane, REPLICA) as address:
        error = await refused(tmp_path, address)
    assert error.exit == Exit.REFUSED
    assert "another key" in str(error)


async def test_a_token_for_an_operator_makes_no_proxy(tmp_path: Path) -> None:
    async with serving(ControlPlane(CA, path="operator/admin"), REPLICA) as address:
        error = await refused(tmp_path, address)
    assert (error.exit, "no proxy's credential" in str(error)) == (Exit.REFUSED, True)


async def test_a_server_that_accepts_and_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "CONNECT_TIMEOUT", 0.1)
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        error = await refused(tmp_path, f"127.0.0.1:{port}", timeout=0.5)
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
    assert error.exit == Exit.UNREACHABLE


async def test_an_expired_replica_certificate_is_a_matter_of_clocks(tmp_path: Path) -> None:
    old = CA.credential("replica/a", now=time.time() - 600, ttl=timedelta(seconds=60))
    plane = ControlPlane(CA)
    async with serving(plane, old) as address:
        error = await refused(tmp_path, address)
    assert (error.exit, plane.joins) == (Exit.CLOCK_SKEW, [])
