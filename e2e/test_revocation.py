"""A revoked proxy is out within seconds, on open connections too, and who shares its identity loses nothing."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import tempfile
import time
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2

from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually, module_mesh
from e2e.kit.prober import Prober
from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.demo.bookstore import Placement
from smc.demo.local import TRUST_DOMAIN
from smc.demo.programs import Sidecar
from smc.proxy.join import channel_options
from smc.xds.snapshot import Type

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE = 5.0
"""Seconds from the return of `smc cert revoke`."""
BUYERS = tuple(Placement("bookbuyer", f"bookbuyer-{n}", "bookbuyer") for n in (2, 3))
GOOD, BAD = BUYERS
"""With the bookbuyer of the demo they are three proxies of one identity."""
SECRETS = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""With which a client of HTTP/2 begins: whoever takes its certificate answers."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def three(mesh: Mesh) -> None:
    for placement in BUYERS:
        await mesh.add(placement)
    await mesh.wait_synced()


def _credential(sidecar: Sidecar) -> Credential:
    return credentials.read(sidecar.directory / "credential")


async def _stolen(mesh: Mesh, sidecar: Sidecar) -> Credential:
    """The key of its identity, as whoever has broken into the proxy would get it."""
    credential = _credential(sidecar)
    tls = grpc.ssl_channel_credentials(
        credential.roots_pem.encode(), credential.key.encode(), credential.chain.encode()
    )
    first = discovery_pb2.DeltaDiscoveryRequest(type_url=Type.SECRET.value, resource_names_subscribe=["identity"])
    first.node.id = sidecar.workload
    options = channel_options(x509.replica_host(TRUST_DOMAIN))
    async with asyncio.timeout(20), grpc.aio.secure_channel(mesh.replicas[0].xds, tls, options=options) as channel:
        call = channel.stream_stream(SECRETS)()
        await call.write(first.SerializeToString())
        data = await call.read()
        assert data is not grpc.aio.EOF, await call.details()
        (resource,) = discovery_pb2.DeltaDiscoveryResponse.FromString(data).resources
        secret = secret_pb2.Secret()
        assert resource.resource.Unpack(secret)
        call.cancel()
    chain, key = secret.tls_certificate.certificate_chain, secret.tls_certificate.private_key
    text = chain.inline_bytes.decode()
    return Credential(x509.uri(x509.load(text)[0]), text, key.inline_bytes.decode(), credential.roots)


def _serial(credential: Credential) -> str:
    return f"{x509.load(credential.chain)[0].serial_number:x}"


async def _is_taken(server: Sidecar, service: str, own: Credential) -> bool:
    """Whether a server's Envoy takes a new connection with this certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(own.key + own.chain)
        file.flush()
        context.load_cert_chain(file.name)
    try:
        reader, writer = await asyncio.open_connection(
            server.address, INBOUND_PORT, ssl=context, server_hostname=f"80.{service}.bookstore.mesh.internal"
        )
        try:
            writer.write(PREFACE)
            async with asyncio.timeout(5):
                return bool(await reader.read(1))
        finally:
            writer.transport.abort()
    except OSError:
        return False


def _tell(figures: str) -> None:
    sys.stdout.write(f"{figures}\n")


async def _revocations(mesh: Mesh) -> dict[str, dict[str, Any]]:
    found = json.loads(await mesh.smc("cert", "list", "-o", "json"))["revocations"]
    return {one.get("proxy") or f"identity {one['identity']}": one for one in found}


def _after(prober: Prober, moment: float) -> list[int]:
    """What became of the requests that were sent after a moment of the loop's clock."""
    return [found.status for found in prober.probes if found.sent >= moment]


def _out_after(prober: Prober, moment: float) -> float:
    """Seconds after a moment until no request was let through any more."""
    return max((found.sent - moment for found in prober.probes if found.status == 200), default=0.0)


async def test_one_of_three_proxies_of_an_identity_is_revoked_and_let_in_again(mesh: Mesh) -> None:
    loop = asyncio.get_running_loop()
    bad, server = mesh.sidecar(BAD.name), mesh.sidecar("bookstore-v1")
    had = await _stolen(mesh, bad)
    assert had.uri.endswith("/ns/bookbuyer/sa/bookbuyer")
    assert await _is_taken(server, "bookstore-v1", had)
    async with (
        mesh.prober("bookbuyer/bookbuyer", rate=100) as first,
        mesh.prober(GOOD.name, rate=100) as second,
        mesh.prober(BAD.name, rate=100) as revoked,
    ):
        await revoked.until(300)
        assert not revoked.failures

        told = await mesh.smc("cert", "revoke", "--proxy", BAD.workload, "--reason", "it was stolen")
        moment = loop.time()
        assert told == f"proxy/{BAD.workload} revoked\n"

        async def cut_off() -> bool:
            return await bad.admin.stat("control_plane.connected_state") == 0

        stream = await eventually(cut_off, timeout=DEADLINE, what="it has no stream")

        async def refused() -> bool:
            return not await _is_taken(server, "bookstore-v1", had)

        await eventually(refused, timeout=DEADLINE, what="its certificate is refused")
        handshake = loop.time() - moment

        async def closed() -> bool:
            return 200 not in _after(revoked, loop.time() - 0.3)

        await eventually(closed, timeout=DEADLINE, what="its open connections are of no use", every=0.05)
        await revoked.more(300)
        opened = _out_after(revoked, moment)
        _tell(f"after the revocation: no stream {stream:.2f} s, no handshake {handshake:.2f}, no request {opened:.2f}")
        assert opened < DEADLINE
        # Nobody takes it at any other server, in any new connection of its Envoy's own, or at the control plane.
        for name in ("bookstore-v1", "bookstore-v2"):
            assert not await _is_taken(mesh.sidecar(name), name, had)
            assert {p.status for p in await mesh.send(5, source=BAD.name, host=f"{name}.bookstore")} <= {403, 503}
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await _stolen(mesh, bad)
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert await bad.admin.stat("control_plane.connected_state") == 0
        (one,) = (await _revocations(mesh)).values()
        assert (one["proxy"], one["state"], one["reason"], one["outstanding"]) == (
            BAD.workload, "revoked", "it was stolen", []
        )  # fmt: skip
        assert one["author"] == f"spiffe://{TRUST_DOMAIN}/operator/admin"

        # The others have gone over to another key, on connections that are new.
        for name in ("bookbuyer/bookbuyer", GOOD.workload):
            (serial,) = await mesh.sidecar(name).admin.serials()
            assert serial != _serial(had)
        await first.until(2000)
        await second.until(2000)
        assert set(_after(revoked, moment + opened + 0.01)) <= {403, 503, 0}

        await _rejoin(mesh, bad)
        assert (await _revocations(mesh))[BAD.workload]["state"] == "let in again"
        assert {p.status for p in await mesh.send(20, source=BAD.name)} == {200}
        assert not await _is_taken(server, "bookstore-v1", had), "what it had before stays refused"
    first.assert_clean(minimum=2000)
    second.assert_clean(minimum=2000)


async def _rejoin(mesh: Mesh, bad: Sidecar) -> None:
    """A new token, in the directory where the revoked credential still lies."""
    before = _credential(bad)
    token = (await mesh.smc("token", "create", f"proxy/{BAD.workload}")).strip()
    await bad.process.stop()
    bad.process.env["SMC_TOKEN"] = token
    await bad.process.start()
    await bad.until_ready()
    await mesh.wait_synced([BAD.workload])
    assert _serial(_credential(bad)) != _serial(before)


async def test_a_revoked_identity_is_denied_at_once_until_that_is_taken_back(mesh: Mesh) -> None:
    loop = asyncio.get_running_loop()
    await mesh.wait_synced()
    had = await _stolen(mesh, mesh.sidecar(GOOD.name))
    server = mesh.sidecar("bookstore-v2")
    assert await _is_taken(server, "bookstore-v2", had)
    async with mesh.prober(GOOD.name, rate=100) as buyer:
        await buyer.until(200)
        assert not buyer.failures
        await mesh.smc("cert", "revoke", "--identity", "bookbuyer/bookbuyer")
        moment = loop.time()
        await buyer.more(200)
        _tell(f"after the revocation of an identity: no request {_out_after(buyer, moment):.2f} s")
        assert set(_after(buyer, moment + 1.0)) <= {403, 503}

        async def out() -> bool:
            if await _is_taken(server, "bookstore-v2", had):
                return False
            connected = {str(proxy["name"]) for proxy in await mesh.proxies()}
            return not connected & {"bookbuyer/bookbuyer", GOOD.workload, BAD.workload}

        await eventually(out, timeout=DEADLINE, what="no stream and no handshake", every=0.1)
        found = json.loads(await mesh.smc("cert", "list", "-n", "bookbuyer", "-o", "json"))
        assert {one["state"] for one in found["certificates"]} == {"revoked"}

        await mesh.smc("cert", "revoke", "--identity", "bookbuyer/bookbuyer", "--undo")
        await mesh.wait_synced()

        async def back() -> bool:
            return {p.status for p in await mesh.send(5, source=GOOD.name)} == {200}

        await eventually(back, timeout=10, what="it may call again", every=0.1)
        assert not await _is_taken(server, "bookstore-v2", had)
        moment = loop.time()
        await buyer.more(200)
        assert set(_after(buyer, moment + 0.1)) == {200}


async def test_the_next_leader_carries_out_what_the_dead_one_could_not(mesh: Mesh) -> None:
    await mesh.wait_synced()
    bad, server = mesh.sidecar(BAD.name), mesh.sidecar("bookstore-v1")
    had = await _stolen(mesh, bad)
    leader, key = await mesh.leader(), await mesh.leader_key()
    others = [replica for replica in mesh.replicas if replica is not leader]
    async with mesh.prober("bookbuyer/bookbuyer", rate=100) as good:
        await good.until(200)
        leader.process.pause()
        servers = [part for replica in others for part in ("--server", replica.api)]
        await mesh.smc("cert", "revoke", "--proxy", BAD.workload, *servers)
        await leader.kill()
        began = time.monotonic()
        assert await mesh.leader_key() == key, "nobody has done anything about it yet"
        assert await _is_taken(server, "bookstore-v1", had)

        async def refused() -> bool:
            return not await _is_taken(server, "bookstore-v1", had)

        await eventually(refused, timeout=30, what="its certificate is refused", every=0.1)
        _tell(f"after the leader's death: no handshake {time.monotonic() - began:.2f} s")
        assert await mesh.leader_key() != key
        await leader.start()
        await leader.until_ready()
        told = await mesh.smc("cert", "revoke", "--proxy", BAD.workload, "--wait=20s")
        assert told == f"proxy/{BAD.workload} was revoked before\n"
        await good.until(2000)
    good.assert_clean(minimum=2000)
    await _rejoin(mesh, bad)
