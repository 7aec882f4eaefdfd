"""Certificates and credentials are replaced under traffic without a failure, and what is new is what peers see."""

from __future__ import annotations

import asyncio
import re
import ssl
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually, module_mesh
from smc import codec
from smc.demo import bookstore
from smc.demo.apps import XFCC, document
from smc.demo.local import MESH
from smc.demo.programs import Sidecar
from smc.demo.traffic import Caller
from smc.records import CertificateRecord

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

SHORT = "20s"
"""The life of a certificate here; it is renewed at half of that."""


async def _serials(mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """Of the workload certificate that each Envoy holds."""
    return dict((await mesh.figures()).serials)


async def _presented(sidecar: Sidecar, service: str) -> x509.Certificate:
    """What a server shows to whoever connects now. A handshake is enough: it shows itself before it asks who calls."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(
        sidecar.address, INBOUND_PORT, ssl=context, server_hostname=f"80.{service}.bookstore.mesh.internal"
    )
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    return x509.load_der_x509_certificate(der)


async def _client_hash(sidecar: Sidecar, url: str) -> str:
    """SHA-256 of the client certificate with which a request of this sidecar arrives, as the server's Envoy says."""
    caller = Caller(sidecar.outbound)
    answer = await caller.request(url)
    await caller.close()
    assert answer.status == 200, answer
    found = re.search(r"Hash=([0-9a-f]{64})", str(document(answer)[XFCC]))
    assert found
    return found[1]


async def _stored(mesh: Mesh, identity: str) -> x509.Certificate:
    """The newest workload certificate of an identity, as it is in etcd."""
    ((key, (value, _)),) = (await mesh.etcd.read(f"/smc/{MESH}/certificates/{identity}")).items()
    return x509.load_pem_x509_certificate(codec.decode(CertificateRecord, value, key=key).chain.encode())


async def test_workload_certificates_rotate_under_traffic(mesh: Mesh) -> None:
    await mesh.wait_synced()
    buyer = mesh.sidecar("bookbuyer")
    servers = {name: mesh.sidecar(name) for name in ("bookstore-v1", "bookstore-v2")}
    # A caller has connections of its own for each service that it asks: this one for bookstore-v1 stays open.
    first_hash = await _client_hash(buyer, "http://bookstore-v1.bookstore/books")
    assert first_hash == (await _stored(mesh, "bookbuyer/bookbuyer")).fingerprint(hashes.SHA256()).hex()
    held = [await _serials(mesh)]
    async with mesh.prober(rate=150) as prober:
        await prober.until(300)
        await mesh.apply(bookstore.mesh_config(SHORT))
        for _ in range(2):

            async def rotated() -> bool:
                now = await _serials(mesh)
                return all(now[name] and not set(now[name]) & set(held[-1][name]) for name in mesh.sidecars)

            await eventually(rotated, timeout=40, what="every Envoy presents another certificate", every=0.1)
            held.append(await _serials(mesh))
        await mesh.apply(bookstore.mesh_config("24h"))
        for name, sidecar in servers.items():
            shown = (await _presented(sidecar, name)).serial_number
            assert [shown] == [int(serial, 16) for serial in await sidecar.admin.serials()], "on a new connection"
            assert shown not in {int(serial, 16) for serial in held[0][sidecar.workload]}
        second_hash = await _client_hash(buyer, "http://bookstore-v2.bookstore/books")
        newest = await _stored(mesh, "bookbuyer/bookbuyer")
        assert second_hash == newest.fingerprint(hashes.SHA256()).hex(), "on a new connection"
        assert [newest.serial_number] == [int(serial, 16) for serial in await buyer.admin.serials()]
        assert second_hash != first_hash
        await prober.until(3000)
    prober.assert_clean(minimum=3000)
    for name in mesh.sidecars:
        assert len({serial for at in held for serial in at[name]}) == 3, "three certificates one after the other"


CREDENTIALS = f"""
apiVersion: smc.io/v1alpha1
kind: MeshConfig
metadata:
  name: default
spec:
  certificates:
    credentialTTL: {SHORT}
"""


async def test_a_proxys_own_credential_is_renewed_while_its_stream_goes_on(mesh: Mesh) -> None:
    async with mesh.prober(rate=150) as prober:
        await prober.until(300)
        # A credential that was made before lives as long as it was told then: only a newcomer has a short one.
        await mesh.apply(CREDENTIALS)
        newcomer = await mesh.add(bookstore.store("v2", 1))
        admin = newcomer.admin
        (first,) = await admin.serials("/proxy/")
        chain = (newcomer.directory / "credential" / "certificate.pem").read_bytes()
        expires = x509.load_pem_x509_certificate(chain).not_valid_after_utc.timestamp()
        assert expires - time.time() < 20

        streams = [await admin.stat("cluster.xds.upstream_rq_total")]

        async def renewed() -> bool:
            streams.append(await admin.stat("cluster.xds.upstream_rq_total"))
            return first not in await admin.serials("/proxy/")

        await eventually(renewed, timeout=20, what="Envoy presents another credential")
        assert time.time() < expires, "renewed before it had to be"
        assert await admin.stat("cluster.xds.upstream_rq_total") == streams[-2], "on the stream that was open before"
        assert await admin.stat("control_plane.connected_state") == 1

        # The stream that was opened with the first one ends with it, and the next one is opened with what is new.
        await asyncio.sleep(expires - time.time() + 1)

        async def another() -> bool:
            opened = await admin.stat("cluster.xds.upstream_rq_total")
            return opened > streams[-1] and await admin.stat("control_plane.connected_state") == 1

        await eventually(another, timeout=20, what="the proxy has another stream once its first credential has expired")
        arrived = await admin.stat("http.inbound.rds.inbound|8080.update_success")
        await mesh.apply(bookstore.policy().replace("[0-9]+", "[0-9]{1,4}"))

        async def heard() -> bool:
            return await admin.stat("http.inbound.rds.inbound|8080.update_success") > arrived

        await eventually(heard, timeout=5, what="it hears of changes")
        await prober.until(3000)
    prober.assert_clean(minimum=3000)
