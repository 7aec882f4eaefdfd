"""Who is revoked is out within seconds, on what is open too, proxy or operator; and nobody else loses anything."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

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
from smc.channels import channel_to
from smc.demo.bookstore import Placement
from smc.demo.local import TRUST_DOMAIN
from smc.demo.processes import ProcessFailed
from smc.demo.programs import Replica, Sidecar
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub
from smc.xds.snapshot import Type

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE = 5.0
"""Seconds from the return of `smc cert revoke`."""
BUYERS = tuple(Placement("bookbuyer", f"bookbuyer-{n}", "bookbuyer") for n in (2, 3))
GOOD, BAD = BUYERS
"""With the bookbuyer of the demo they are three proxies of one identity."""
SECRETS = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets"
SERVICES = pb.ListRequest(group="smc.io", kind="Service")
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
    first = discovery_pb2.DeltaDiscoveryRequest(type_url=Type.SECRET.value, resource_names_subscribe=["identity"])
    first.node.id = sidecar.workload
    async with asyncio.timeout(20), channel_to(mesh.replicas[0].xds, credential) as channel:
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
    return {one.get("proxy") or one.get("credential") or f"identity {one['identity']}": one for one in found}


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
        await asyncio.sleep(1.0)
        await buyer.fresh(100)
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
            return {p.status for p in await mesh.send(40, source=GOOD.name)} == {200}

        await eventually(back, timeout=20, what="it may call again", every=0.1)
        assert not await _is_taken(server, "bookstore-v2", had)
        assert {found.status for found in await buyer.fresh(100)} == {200}


async def test_the_next_leader_carries_out_what_the_dead_one_could_not(mesh: Mesh) -> None:
    await mesh.wait_synced()
    bad, server = mesh.sidecar(BAD.name), mesh.sidecar("bookstore-v1")
    had = await _stolen(mesh, bad)
    admin = Holder(mesh, await asyncio.to_thread(credentials.read, mesh.credential))
    leader, key = await mesh.leader(), await mesh.leader_key()
    others = [replica for replica in mesh.replicas if replica is not leader]
    async with mesh.prober("bookbuyer/bookbuyer", rate=100) as good:
        await good.until(200)
        leader.process.pause()
        # Its lease does not live for long: a program that has to start first might come too late.
        revoked = await admin.ask(others[0], "Revoke", pb.RevokeRequest(proxy=BAD.workload))
        assert revoked is grpc.StatusCode.OK
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


async def test_what_was_never_revoked_cannot_be_taken_back_and_a_name_that_is_none_is_told_what_would_be(
    mesh: Mesh,
) -> None:
    before = await _revocations(mesh)
    for subject, text in (
        (("--identity", "bookbuyer/bookbuyer"), "identity bookbuyer/bookbuyer is not revoked"),
        (("--proxy", "bookstore/bookstore-v1"), "proxy bookstore/bookstore-v1 is not revoked"),
        (("--operator", "admin"), "operator admin is not revoked"),
    ):
        ended = await mesh.ended("cert", "revoke", *subject, "--undo")
        assert (ended.code, ended.output) == (3, "")
        assert text in ended.errors
        assert "smc cert list shows who is" in ended.errors
    wrong = await mesh.ended("cert", "revoke", "--operator", f"spiffe://{TRUST_DOMAIN}/operator/ann")
    assert (wrong.code, wrong.output) == (1, "")
    assert "names no operator and no viewer" in wrong.errors
    assert "use operator/<name> or viewer/<name>" in wrong.errors
    assert await _revocations(mesh) == before


# ------------------------------------------------------------------------------------------------ operators and viewers


async def _login(mesh: Mesh, path: str, place: str) -> Path:
    """The directory of a new credential."""
    token = (await mesh.smc("token", "create", path)).strip()
    return await _use(mesh, token, place)


async def _use(mesh: Mesh, token: str, place: str) -> Path:
    directory = mesh.directory / place
    join = [part for replica in mesh.replicas if replica.process.alive for part in ("--join", replica.join)]
    await mesh.smc("login", *join, "--token", token, "--credential", str(directory))
    return directory


class Holder:
    """Has somebody's credential, or a copy of it; while it is entered it asks every replica, on a connection that stays
    open, and never stops.
    """

    def __init__(self, mesh: Mesh, credential: Credential) -> None:
        self.credential = credential
        self.last: dict[str, float] = {}
        """By replica: when it let it in last, by the loop's clock."""
        self.told: dict[str, grpc.StatusCode] = {}
        """By replica: what it said last."""
        self._replicas = mesh.replicas
        self._tasks: list[asyncio.Task[None]] = []

    async def ask(self, replica: Replica, method: str, request: Any) -> grpc.StatusCode:
        async with channel_to(replica.api, self.credential) as channel:
            return await _status(channel, method, request)

    async def renew(self, replica: Replica) -> None:
        """Go over to another credential of the same name."""
        key = x509.new_key()
        async with channel_to(replica.api, self.credential) as channel:
            answer = await MeshStub(channel).Renew(pb.RenewRequest(csr=x509.request(key)), timeout=20)  # type: ignore[no-untyped-call]
        own = self.credential
        self.credential = Credential(own.uri, answer.chain, x509.private_pem(key).decode(), tuple(answer.roots))

    async def _go_on(self, replica: Replica) -> None:
        async with channel_to(replica.api, self.credential) as channel:
            while True:
                asked = asyncio.get_running_loop().time()
                self.told[replica.name] = found = await _status(channel, "List", SERVICES)
                if found is grpc.StatusCode.OK:
                    self.last[replica.name] = asked
                await asyncio.sleep(0.02)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._go_on(replica)) for replica in self._replicas]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _status(channel: grpc.aio.Channel, method: str, request: Any) -> grpc.StatusCode:
    try:
        await getattr(MeshStub(channel), method)(request, timeout=20)  # type: ignore[no-untyped-call]
    except grpc.aio.AioRpcError as e:
        return e.code()
    return grpc.StatusCode.OK


async def _everywhere(mesh: Mesh, thief: Holder, *, within: float) -> float:
    """Seconds until every replica that is alive refuses the thief."""
    alive = [replica.name for replica in mesh.replicas if replica.process.alive]

    def refused() -> bool:
        return {thief.told.get(name) for name in alive} == {grpc.StatusCode.PERMISSION_DENIED}

    return await eventually(refused, timeout=within, what=f"refused by all: {thief.told}")


async def test_a_stolen_operators_credential_is_refused_by_every_replica_and_stays_so_when_the_leader_dies(
    mesh: Mesh,
) -> None:
    loop = asyncio.get_running_loop()
    await mesh.wait_synced()
    stolen = await asyncio.to_thread(credentials.read, await _login(mesh, "operator/ann", "ann"))
    ben = await asyncio.to_thread(credentials.read, await _login(mesh, "viewer/ben", "ben"))
    early, renewed = Holder(mesh, stolen), Holder(mesh, stolen)
    await renewed.renew(mesh.replicas[1])
    accomplice = (
        await mesh.smc("token", "create", "operator/eve", "--credential", str(mesh.directory / "ann"))
    ).strip()
    watching = asyncio.create_task(
        mesh.ended("get", "traffictargets", "-A", "--watch", "--credential", str(mesh.directory / "ann"))
    )
    async with (
        mesh.prober("bookbuyer/bookbuyer", rate=100) as prober,
        early,
        renewed,
        Holder(mesh, ben) as other,
    ):
        await eventually(
            lambda: all(len(one.last) == 3 for one in (early, renewed, other)), timeout=20, what="all are let in"
        )
        await prober.until(200)
        # What is open for eight seconds, in each replica: it waits for a revision that there will not be.
        never = pb.WaitRequest(resource_versions=[2**40], seconds=8)
        waits = [asyncio.create_task(early.ask(replica, "Wait", never)) for replica in mesh.replicas]
        await asyncio.sleep(0.5)
        assert not any(wait.done() for wait in waits)
        assert not watching.done()

        told = await mesh.smc("cert", "revoke", "--operator", "ann", "--reason", "lost the laptop")
        moment = loop.time()
        assert told == "operator/ann revoked\n"
        calls = max([await _everywhere(mesh, thief, within=DEADLINE) for thief in (early, renewed)])
        assert set(await asyncio.gather(*waits)) == {grpc.StatusCode.PERMISSION_DENIED}
        open_ = loop.time() - moment
        ended = await watching
        watch = loop.time() - moment
        _tell(
            f"after the revocation of an operator: no call {calls:.2f} s, none open {open_:.2f}, no watch {watch:.2f}"
        )
        assert open_ < DEADLINE
        assert watch < DEADLINE
        assert (ended.code, "the credential of operator/ann is revoked" in ended.errors) == (4, True)

        for thief in (early, renewed):
            for replica in mesh.replicas:
                for method, request in (
                    ("Renew", pb.RenewRequest(csr=x509.request(x509.new_key()))),
                    ("CreateToken", pb.CreateTokenRequest(credential="operator/eve")),
                    ("Revoke", pb.RevokeRequest(credential="operator/ann", undo=True)),
                ):
                    assert await thief.ask(replica, method, request) is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(ProcessFailed, match="operator/ann was revoked after this token was made"):
            await _use(mesh, accomplice, "eve")

        leader, key = await mesh.leader(), await mesh.leader_key()
        await leader.kill()

        async def another_leads() -> bool:
            return await mesh.leader_key() not in (None, key)

        await eventually(another_leads, timeout=30, what="another replica leads", every=0.1)
        died = loop.time()
        await leader.start()
        await leader.until_ready()
        for thief in (early, renewed):
            await _everywhere(mesh, thief, within=20)
            last = max(thief.last.values())
            assert last < min(moment + DEADLINE, died), "nobody lets it in again, also when it starts"

        one = (await _revocations(mesh))["operator/ann"]
        assert (one["state"], one["reason"], one["author"]) == (
            "revoked", "lost the laptop", f"spiffe://{TRUST_DOMAIN}/operator/admin"
        )  # fmt: skip
        anew = await _login(mesh, "operator/ann", "ann-again")
        for replica in mesh.replicas:
            await mesh.smc("get", "traffictargets", "-A", "--server", replica.api, "--credential", str(anew))
        assert (await _revocations(mesh))["operator/ann"]["state"] == "let in again"
        for thief in (early, renewed):
            await _everywhere(mesh, thief, within=DEADLINE)
        assert min(other.last.values()) > died, "nobody else lost anything"
        await prober.until(1000)
    prober.assert_clean(minimum=1000)


async def test_a_viewer_is_revoked_while_nobody_leads_and_as_it_was_once_that_is_taken_back(mesh: Mesh) -> None:
    await mesh.wait_synced()
    stolen = await asyncio.to_thread(credentials.read, await _login(mesh, "viewer/carl", "carl"))
    admin = Holder(mesh, await asyncio.to_thread(credentials.read, mesh.credential))
    leader, key = await mesh.leader(), await mesh.leader_key()
    others = [replica for replica in mesh.replicas if replica is not leader]
    async with Holder(mesh, stolen) as thief:
        await eventually(lambda: len(thief.last) == 3, timeout=20, what="it is let in")
        await leader.kill()
        revoked = await admin.ask(others[0], "Revoke", pb.RevokeRequest(credential="viewer/carl"))
        assert revoked is grpc.StatusCode.OK
        took = await _everywhere(mesh, thief, within=DEADLINE)
        assert await mesh.leader_key() in (None, key), "nobody has begun to lead meanwhile"
        _tell(f"after the revocation of a viewer while nobody leads: no call {took:.2f} s")
        await leader.start()
        await leader.until_ready()
        await _everywhere(mesh, thief, within=20)
        assert await mesh.smc("cert", "revoke", "--viewer", "carl", "--undo") == "viewer/carl is revoked no longer\n"

        def back() -> bool:
            return set(thief.told.values()) == {grpc.StatusCode.OK}

        await eventually(back, timeout=DEADLINE, what="it is as it was")
        assert "viewer/carl" not in await _revocations(mesh)


async def test_an_operator_that_revokes_itself_is_told_the_way_back_and_the_key_encryption_key_is_one(
    mesh: Mesh,
) -> None:
    dora = await _login(mesh, "operator/dora", "dora")
    ended = await mesh.ended("cert", "revoke", "--operator", "dora", "--wait", "--credential", str(dora))
    assert (ended.code, ended.output) == (0, "operator/dora revoked\n")
    assert "that is you: another operator lets you in again with smc token create operator/dora" in ended.errors

    async def out() -> bool:
        found = await mesh.ended("cert", "revoke", "--operator", "dora", "--undo", "--credential", str(dora))
        assert found.code == 4, "it cannot take that back itself, on no replica"
        return "smc recover" in found.errors

    assert await out()
    etcd = ",".join(mesh.etcd.endpoints)
    recover = ("recover", "--etcd", etcd, "--kek-file", str(mesh.directory / "kek"), "--operator", "dora")
    servers = [part for replica in mesh.replicas for part in ("--server", replica.api)]
    await mesh.smc(*recover, *servers, "--credential", str(mesh.directory / "recovered"))
    for replica in mesh.replicas:
        where = ("--server", replica.api, "--credential", str(mesh.directory / "recovered"))
        await mesh.smc("get", "traffictargets", "-A", *where)
    assert (await _revocations(mesh))["operator/dora"]["state"] == "let in again"
