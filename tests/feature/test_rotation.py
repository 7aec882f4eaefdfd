"""A rotation as the leader carries it out, and what proxies are sent of it, over real mTLS.

At no moment does a proxy show what another one does not trust, or what another one has no list of revoked certificates
for: that is looked at with each secret that arrives anywhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509 as cx509

from smc.certificates import rotating, x509
from smc.certificates.authority import follow_trust, load_stored, pins
from smc.certificates.issuing import Issuer, Wanted
from smc.certificates.rotating import Acks
from smc.certificates.signers.local import LocalSigner
from smc.model import Identity
from smc.records import MemberRecord, Phase, Rotates, RotationRecord, TrustRecord
from smc.xds.snapshot import Type
from tests.feature.test_manifest_to_wire import BUYER, STORE, STORE_2, THIEF, bookshop
from tests.unit.bookshop import KEYS
from tests.unit.leadership import elect
from tests.unit.xds.replica import Client, Mesh, Replica

EVERYBODY = (BUYER, THIEF, STORE, STORE_2, "paper", "paper-v2")
DAY = timedelta(hours=24)
OPERATOR = "spiffe://mesh.example/operator/admin"


class Wires:
    """What each proxy holds at each moment."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.shown: dict[str, tuple[cx509.Certificate, ...]] = {}
        """The leaf and its intermediate."""
        self.trusted: dict[str, Any] = {}
        self.looks = 0
        for client in clients:
            for name in ("identity", "bundle"):
                self._take(client.name.name, client.get(Type.SECRET, name))
            client.refuses = lambda type_, message, who=client.name.name: self._hears(who, type_, message)  # type: ignore[misc]

    def _take(self, who: str, secret: Any) -> None:
        if secret.name == "identity":
            self.shown[who] = x509.load(secret.tls_certificate.certificate_chain.inline_bytes.decode())
        else:
            self.trusted[who] = secret.validation_context

    def _hears(self, who: str, type_: Type, message: Any) -> bool:
        if type_ is Type.SECRET:
            self._take(who, message)
            self.check()
        return False

    def roots(self, who: str) -> tuple[cx509.Certificate, ...]:
        return x509.load(self.trusted[who].trusted_ca.inline_bytes.decode())

    def check(self) -> None:
        """Everybody takes what everybody shows."""
        for server, bundle in self.trusted.items():
            roots = self.roots(server)
            lists = bundle.crl.inline_bytes
            listed = {_issuer(one) for one in _lists(lists)}
            for chain in self.shown.values():
                x509.check_chain(chain, roots, 0.0, times=False)
                assert not lists or x509.issuer_id(chain[0]) in listed
                self.looks += 1


def _lists(pem: bytes) -> list[cx509.CertificateRevocationList]:
    end = b"-----END X509 CRL-----\n"
    return [cx509.load_pem_x509_crl(part + end) for part in pem.split(end) if part.strip()]


def _issuer(crl: cx509.CertificateRevocationList) -> str:
    found = crl.extensions.get_extension_for_class(cx509.AuthorityKeyIdentifier).value.key_identifier
    assert found is not None
    return found.hex()


async def _follow(mesh: Mesh, replica: Replica, clients: Sequence[Client]) -> None:
    """What the replica says of itself, and each `smc proxy run` of the credential on its disk."""
    async with aclosing(follow_trust(mesh.kv, KEYS)) as changes:
        async for trust in changes:
            known = pins(trust.roots)
            member = MemberRecord(replica.name, "", "", "", (1,), True, 0, "0.1.0", known, trust.signer)
            await mesh.put(KEYS.members + replica.name, member)
            for client in clients:
                told = TrustRecord(client.name, known, trust.signer, time.time() + DAY.total_seconds())
                await mesh.put(KEYS.trust(client.name), told)


@asynccontextmanager
async def leading(mesh: Mesh, replica: Replica, clients: Sequence[Client]) -> AsyncIterator[None]:
    async def survey(revision: int) -> Acks:
        await replica.pipeline.admit(resumed=True)
        report = replica.streams.report()
        lagging = {str(one.proxy): one.reason for one in report.laggards if one.revision < revision}
        return Acks(frozenset(str(session.proxy) for session in replica.streams.sessions), lagging)

    async def wanted() -> AsyncIterator[Wanted]:
        yield Wanted(frozenset(Identity("shop", name) for name in EVERYBODY), DAY, DAY)
        await asyncio.Event().wait()

    issuer = Issuer(mesh.kv, KEYS, mesh.keyring, LocalSigner(b"k" * 32), time.time, survey)
    leadership = await elect(mesh.kv, KEYS)
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(issuer.run(leadership, wanted())),
            tasks.create_task(_follow(mesh, replica, clients)),
        ]
        yield
        for task in running:
            task.cancel()


async def rotate(mesh: Mesh, of: Rotates) -> None:
    asked = await rotating.request(mesh.kv, KEYS, of, OPERATOR, force=False, now=time.time())

    async def rotation() -> RotationRecord:
        found = (await load_stored(mesh.kv, KEYS)).rotation
        assert found is not None
        return found

    async with asyncio.timeout(60):
        while (found := await rotation()).phase is not Phase.DONE:
            assert found.id == asked.id
            await asyncio.sleep(0.05)
    assert found.left_behind == ()


@pytest.mark.parametrize("of", list(Rotates))
async def test_everybody_takes_what_everybody_shows_at_every_moment_and_nothing_but_secrets_is_sent(
    of: Rotates,
) -> None:
    async with bookshop(*EVERYBODY) as (mesh, replica, clients):
        wires = Wires(clients)
        before = wires.roots(BUYER), wires.shown[BUYER]
        async with leading(mesh, replica, clients):
            await rotate(mesh, of)
            await replica.pipeline.admit(resumed=True)
            await replica.until(lambda: not replica.streams.report().laggards)
        wires.check()
        assert wires.looks > len(EVERYBODY) ** 2
        assert {kind for client in clients for kind, _, _ in client.news()} == {"Secret"}
        stored = await load_stored(mesh.kv, KEYS)
        (intermediate,) = x509.load(stored.intermediates[stored.signing].certificate)
        for name in EVERYBODY:
            assert wires.shown[name][1] == intermediate != before[1][1]
            assert wires.roots(name) == tuple(x509.load(stored.bundle.roots[0]))
            assert (wires.roots(name) == before[0]) == (of is Rotates.INTERMEDIATE)
            assert {_issuer(one) for one in _lists(wires.trusted[name].crl.inline_bytes)} >= {x509.key_id(intermediate)}


async def test_a_proxy_that_does_not_ack_the_new_root_holds_up_whatever_it_would_not_trust() -> None:
    async with bookshop(*EVERYBODY) as (mesh, replica, clients):
        deaf, *others = clients
        wires = Wires(clients)
        before = dict(wires.shown)
        async with leading(mesh, replica, clients):
            await replica.until(lambda: any(kind == "Secret" for kind, _, _ in deaf.news()))  # the first lists
            await replica.until(lambda: not replica.streams.report().laggards)
            deaf.acks = False
            asked = asyncio.create_task(rotate(mesh, Rotates.ROOT))
            await replica.until(lambda: all(len(wires.roots(client.name.name)) == 2 for client in others))
            await asyncio.sleep(3 * rotating.LOOK_AGAIN)
            stored = await load_stored(mesh.kv, KEYS)
            assert stored.rotation is not None
            assert stored.rotation.phase is Phase.PUBLISHING
            assert wires.shown == before
            # On another stream it hears all of it, and says so.
            deaf.acks = True
            async with deaf.connected(replica):
                await asked
                await replica.until(lambda: len(wires.roots(deaf.name.name)) == 1)
        assert wires.shown.keys() == before.keys()
        assert all(wires.shown[name] != before[name] for name in EVERYBODY)
