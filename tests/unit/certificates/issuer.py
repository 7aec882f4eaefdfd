"""A mesh on a store in memory, with virtual time and as many leaders as a test likes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from cluster.kv import KV, Delete, Guard, Operation, Outcome, Put, Rejected, Status
from cluster.memory import MemoryKV
from smc.certificates import x509
from smc.certificates.authority import load_keyring
from smc.certificates.credential import Credential
from smc.certificates.initialise import initialise
from smc.certificates.issuing import Issuer, Wanted
from smc.certificates.rotating import Acks
from smc.certificates.sealing import Keyring
from smc.certificates.signers.local import LocalSigner
from smc.codec import decode
from smc.errors import Unavailable
from smc.keys import Keys
from smc.model import Identity
from smc.records import CertificateRecord
from tests.unit.tasks import at_work

START = 1_900_000_000.0
DAY = timedelta(hours=24)
BUYER, STORE = Identity("shop", "buyer"), Identity("shop", "store")


class Deposed(Exception):
    """The fence did not hold."""


@dataclass
class Fenced:
    """A leadership: every write carries the guard that the leader key is still the one that it made."""

    kv: KV
    key: str
    create_revision: int

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        outcome = await self.kv.transact(operations, [*guards, Guard(self.key, create_revision=self.create_revision)])
        if isinstance(outcome, Rejected):
            found = outcome.found[self.key]
            if found is None or found.create_revision != self.create_revision:
                raise Deposed
        return outcome


class FlakySigner(LocalSigner):
    """Fails to sign as long as it is told to."""

    __slots__ = ("attempts", "broken")

    def __init__(self, kek: bytes) -> None:
        super().__init__(kek)
        object.__setattr__(self, "broken", False)
        object.__setattr__(self, "attempts", [])

    def breaks(self, broken: bool) -> None:
        object.__setattr__(self, "broken", broken)

    async def sign(self, handle: bytes, data: bytes) -> bytes:
        self.attempts.append(now())
        if self.broken:
            raise Unavailable("the key service does not answer")
        return await super().sign(handle, data)


def now() -> float:
    """The wall clock: it goes with the loop's."""
    return START + asyncio.get_running_loop().time()


@dataclass
class Mesh:
    kv: KV
    keys: Keys
    signer: FlakySigner
    keyring: Keyring
    operator: Credential
    wanted: Wanted = field(default_factory=lambda: Wanted(frozenset(), DAY, DAY))
    issued: list[str] = field(default_factory=list)
    connected: set[str] = field(default_factory=set)
    """The proxies that have a stream; the tests of rotation say what they do."""
    lagging: dict[str, str] = field(default_factory=dict)
    out: set[str] = field(default_factory=set)
    """Who is revoked."""
    gone: set[str] = field(default_factory=set)
    """Whose workload is deleted."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def make(cls, kv: KV | None = None) -> Mesh:
        kv = kv or MemoryKV()
        keys, signer = Keys("default"), FlakySigner(b"k" * 32)
        operator = await initialise(kv, keys, signer, "mesh.example", now())
        return cls(kv, keys, signer, await load_keyring(kv, keys, signer), operator)

    def want(self, *identities: Identity, ttl: timedelta = DAY) -> None:
        self.wanted = Wanted(frozenset(identities), ttl, DAY)
        self.changed.set()

    async def stream(self) -> AsyncIterator[Wanted]:
        while True:
            self.changed.clear()
            yield self.wanted
            await self.changed.wait()

    async def survey(self, _revision: int) -> Acks:
        out, gone = frozenset(self.out), frozenset(self.gone)
        return Acks(frozenset(self.connected), dict(self.lagging), out=out, gone=lambda proxy, _: proxy in gone)

    async def elect(self) -> Fenced:
        """Take the leadership from whoever has it."""
        await self.kv.transact([Put(self.keys.leader, b"")])
        await self.kv.transact([Delete(self.keys.leader)])
        await self.kv.transact([Put(self.keys.leader, b"")], [Guard(self.keys.leader, create_revision=0)])
        item = await self.kv.get(self.keys.leader)
        assert item is not None
        return Fenced(self.kv, self.keys.leader, item.create_revision)

    @asynccontextmanager
    async def leading(self, *, kv: KV | None = None, fenced: Fenced | None = None) -> AsyncIterator[asyncio.Task[None]]:
        """A leader at work; it dies at the end of the block."""
        fenced = fenced or await self.elect()
        issuer = Issuer(kv or self.kv, self.keys, self.keyring, self.signer, now, self.survey, self.issued.append)
        async with at_work(issuer.run(fenced, self.stream())) as task:
            yield task

    async def record(self, identity: Identity) -> CertificateRecord | None:
        item = await self.kv.get(self.keys.certificate(identity))
        return decode(CertificateRecord, item.value) if item is not None else None

    async def certified(self, identity: Identity) -> CertificateRecord:
        """The identity's record, once there is one."""
        return await self._next(identity, "")

    async def renewed(self, before: CertificateRecord) -> CertificateRecord:
        """The identity's record, once it is another one."""
        return await self._next(before.identity, before.serial)

    async def _next(self, identity: Identity, serial: str) -> CertificateRecord:
        key = self.keys.certificate(identity)
        listing = await self.kv.list(key)
        for item in listing.items:
            if item.key == key and (record := decode(CertificateRecord, item.value)).serial != serial:
                return record
        async with aclosing(self.kv.watch(key, Status(listing.cluster_id, listing.revision))) as batches:
            async for batch in batches:
                for item in batch.puts:
                    if item.key == key:
                        return decode(CertificateRecord, item.value)
        raise AssertionError("the watch ended")


def half_life(record: CertificateRecord) -> float:
    return x509.renew_at(record.not_before, record.not_after, record.serial)
