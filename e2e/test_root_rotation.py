"""The intermediate and the root are replaced under traffic, whoever dies: no request fails, and nothing old is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from cryptography import x509 as cx509

from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually, module_mesh
from smc import codec
from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.demo import programs
from smc.demo.local import MESH
from smc.demo.processes import ProcessFailed
from smc.demo.programs import Sidecar
from smc.keys import Keys
from smc.proxy.join import presented_chain
from smc.records import BundleRecord, IntermediateRecord, RotationRecord, TrustRecord

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = Keys(MESH)
BUYER = "bookbuyer/bookbuyer"
PATIENCE = 90.0
"""Seconds that a rotation may take here, a leader's death and a busy machine included."""


async def _stored(mesh: Mesh, key: str) -> dict[str, bytes]:
    return {found: value for found, (value, _) in (await mesh.etcd.read(key)).items()}


async def _roots(mesh: Mesh) -> tuple[cx509.Certificate, ...]:
    """Whom everybody trusts, as etcd has it."""
    bundle = codec.decode(BundleRecord, (await _stored(mesh, KEYS.bundle))[KEYS.bundle])
    return tuple(x509.load(text)[0] for text in bundle.roots)


async def _intermediates(mesh: Mesh) -> list[cx509.Certificate]:
    found = (await _stored(mesh, KEYS.ca_prefix("intermediates"))).values()
    return [x509.load(codec.decode(IntermediateRecord, value).certificate)[0] for value in found]


async def _phase(mesh: Mesh) -> str:
    value = (await _stored(mesh, KEYS.rotation)).get(KEYS.rotation)
    return codec.decode(RotationRecord, value).phase.value if value is not None else ""


async def _shown_to_peers(sidecar: Sidecar) -> list[cx509.Certificate]:
    """What an Envoy's inbound listener shows to whoever connects now: the leaf, and its intermediate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    service = sidecar.workload.partition("/")[2]
    _, writer = await asyncio.open_connection(
        sidecar.address, INBOUND_PORT, ssl=context, server_hostname=f"80.{service}.bookstore.mesh.internal"
    )
    try:
        session = writer.get_extra_info("ssl_object")
        return [
            cx509.load_pem_x509_certificate(one.public_bytes().encode())
            for one in session._sslobj.get_unverified_chain()
        ]
    finally:
        writer.transport.abort()


async def _check_wire(mesh: Mesh) -> None:
    """Every chain on every wire leads to the one root that is trusted, by the one intermediate that there is."""
    roots = await _roots(mesh)
    assert len(roots) == 1
    (intermediate,) = await _intermediates(mesh)
    servers = [mesh.sidecar(name) for name in ("bookstore-v1", "bookstore-v2")]
    shown = [await _shown_to_peers(sidecar) for sidecar in servers]
    for replica in mesh.replicas:
        shown += [list(await presented_chain(address)) for address in (replica.xds, replica.api, replica.join)]
    for chain in shown:
        x509.check_chain(chain, roots, 0.0, times=False)
        assert chain[1] == intermediate
    for sidecar in mesh.sidecars.values():
        held = credentials.read(sidecar.directory / "credential")
        assert x509.load(held.roots_pem) == roots
        assert x509.load(held.chain)[1] == intermediate
        trusted = [c for entry in await sidecar.admin.certificates() for c in entry.get("ca_cert", ())]
        assert {int(c["serial_number"], 16) for c in trusted} == {roots[0].serial_number}


async def _is_refused(mesh: Mesh, old: Credential, address: str) -> bool:
    """Whether a server closes the door on who shows a credential of the old root, trusting it or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    directory = mesh.directory / "old"
    await asyncio.to_thread(credentials.write, directory, old)
    context.load_cert_chain(directory / credentials.CERTIFICATE, directory / credentials.KEY)
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        # In TLS 1.3 a client hears what is thought of its certificate when it reads.
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        async with asyncio.timeout(5):
            return not await reader.read(1)
    except (ssl.SSLError, ConnectionError):
        return True
    finally:
        writer.transport.abort()


class _Rotation:
    """`smc cert rotate`, while it runs."""

    def __init__(self, mesh: Mesh, *arguments: str) -> None:
        self._mesh = mesh
        settings = {"SMC_MESH": MESH, "SMC_CREDENTIAL": str(mesh.credential)}
        command = programs.smc("cert", "rotate", "-o", "json", *arguments)
        self._task = asyncio.create_task(mesh.children.run("smc cert rotate", command, env=settings, timeout=PATIENCE))

    async def at(self, phase: str, timeout: float = 30) -> None:
        async def there() -> bool:
            if self._task.done():
                self._task.result()
            return await _phase(self._mesh) == phase

        await eventually(there, timeout=timeout, every=0.02, what=f"the rotation is {phase}")

    async def done(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (await self._task).splitlines()]


@contextmanager
def _asleep(sidecar: Sidecar, *, envoy: bool = True) -> Iterator[None]:
    """`smc proxy run`, and its Envoy if so said, do nothing; their connections stay."""
    pids = [sidecar.process.pid, *([sidecar.envoy_pid] if envoy else [])]
    assert all(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _phases(lines: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["phase"] for line in lines))


async def test_the_intermediate_is_replaced_under_traffic(mesh: Mesh) -> None:
    await mesh.wait_synced()
    before, roots = await _intermediates(mesh), await _roots(mesh)
    async with mesh.prober(rate=100, connections="new") as prober:
        await prober.until(100)
        lines = await _Rotation(mesh).done()
        await prober.until(1000)
    prober.assert_clean(minimum=1000)
    assert _phases(lines)[-1] == "done"
    assert lines[-1]["leftBehind"] == []
    assert await _roots(mesh) == roots
    assert await _intermediates(mesh) != before
    await _check_wire(mesh)


async def test_the_root_is_replaced_under_traffic_and_the_old_one_is_worth_nothing(mesh: Mesh) -> None:
    (old,) = await _roots(mesh)
    credential = credentials.read(mesh.sidecar(BUYER).directory / "credential")
    replica = mesh.replicas[0]
    assert not await _is_refused(mesh, credential, replica.xds)
    async with mesh.prober(rate=100, connections="new") as prober, mesh.prober(rate=50) as kept:
        await prober.until(100)
        lines = await _Rotation(mesh, "--root").done()
        await prober.until(1000)
    prober.assert_clean(minimum=1000)
    kept.assert_clean(minimum=500)
    assert _phases(lines)[-1] == "done"
    (new,) = await _roots(mesh)
    assert x509.pin(new) != x509.pin(old)
    await _check_wire(mesh)
    for one in mesh.replicas:
        assert await _is_refused(mesh, credential, one.xds)
        assert await _is_refused(mesh, credential, one.api)
    # Whoever comes now finds a mesh that is whole: a change arrives, and a proxy joins.
    await mesh.wait_synced()
    assert "synced" in await mesh.smc("proxy", "status")


@pytest.mark.parametrize("phase", ["publishing", "signing", "retiring"])
async def test_the_next_leader_goes_on_with_the_root_in_every_phase(mesh: Mesh, phase: str) -> None:
    (old,) = await _roots(mesh)
    sleeper, leader, key = mesh.sidecar("bookthief"), await mesh.leader(), await mesh.leader_key()
    async with mesh.prober(rate=100, connections="new") as prober:
        with ExitStack() as awake:
            await prober.until(100)
            if phase == "publishing":
                awake.enter_context(_asleep(sleeper))
            rotation = _Rotation(mesh, "--root")
            if phase == "signing":
                await rotation.at(phase)
                awake.enter_context(_asleep(sleeper))
            if phase == "retiring":
                # What signing waits for it has done; what comes after that it will not hear of. Its stream stays.
                await eventually(lambda: _shows_what_is_new(mesh, sleeper), timeout=30, what="it has renewed")
                awake.enter_context(_asleep(sleeper, envoy=False))
            await rotation.at(phase)
            await leader.kill()
            assert not leader.process.alive
            await eventually(lambda: _another_leads(mesh, key), timeout=10, what="another replica leads")
            assert await _phase(mesh) == phase, "it waits for who is asleep"
        lines = await rotation.done()
        await prober.until(1000)
    prober.assert_clean(minimum=1000)
    assert lines[-1]["phase"] == "done"
    assert lines[-1]["leftBehind"] == []
    await leader.start()
    await leader.until_ready()
    assert x509.pin((await _roots(mesh))[0]) != x509.pin(old)
    await _check_wire(mesh)


async def test_a_proxy_that_is_away_is_named_and_left_behind_by_force_alone(mesh: Mesh) -> None:
    away = mesh.sidecar("bookthief")
    await away.process.kill()
    async with mesh.prober(rate=100, connections="new") as prober:
        with pytest.raises(ProcessFailed, match="ended with 6:") as late:
            await _Rotation(mesh, "--root", "--timeout", "4s").done()
        assert f"{away.workload}: connected to no replica" in str(late.value)
        assert await _phase(mesh) == "publishing"
        lines = await _Rotation(mesh, "--root", "--force").done()
        assert lines[-1]["leftBehind"] == [away.workload]
        await prober.until(1000)
    prober.assert_clean(minimum=1000)

    command = programs.smc("proxy", "run", "--dir", str(away.directory))
    with pytest.raises(ProcessFailed, match="ended with 20:") as refused:
        await mesh.children.run("smc proxy run", command, env={})
    assert "the root of this proxy's credential is no longer trusted" in str(refused.value)
    assert "join again with a new token" in str(refused.value)

    token = (await mesh.smc("token", "create", f"proxy/{away.workload}")).strip()
    again = programs.sidecar(
        mesh.children,
        away.workload,
        away.address,
        token=token,
        join=[replica.join for replica in mesh.replicas],
        arguments=(),
        env={},
    )
    mesh.sidecars[away.workload] = again
    await again.process.start()
    await again.until_ready()
    await eventually(lambda: _connected(mesh), timeout=20, what="every proxy is connected")
    await _check_wire(mesh)


async def _shows_what_is_new(mesh: Mesh, sidecar: Sidecar) -> bool:
    """Whether its proxy has said that its credential is of the newest intermediate, of two that there are."""
    key = f"{KEYS.trusts}{sidecar.workload}"
    said = codec.decode(TrustRecord, (await _stored(mesh, key))[key])
    intermediates = await _intermediates(mesh)
    return len(intermediates) == 2 and said.issuer == x509.key_id(intermediates[-1])


async def _another_leads(mesh: Mesh, key: object) -> bool:
    now = await mesh.leader_key()
    return now is not None and now != key


async def _connected(mesh: Mesh) -> bool:
    return {proxy["name"] for proxy in await mesh.proxies()} == set(mesh.sidecars)
