"""What the leader does beside observing: it has certificates issued, and keeps the store small. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
import structlog

from cluster.election import Deposed
from cluster.kv import Delete, Put, Refused
from cluster.memory import MemoryKV, MemoryStore
from smc.certificates import x509
from smc.certificates.authority import load_keyring
from smc.certificates.initialise import initialise
from smc.certificates.issuing import Issuer
from smc.certificates.rotating import Acks
from smc.certificates.signers.local import LocalSigner
from smc.codec import decode, encode
from smc.keys import Keys
from smc.leading import COMPACT_EVERY, KEEP_HISTORY, LAST_RETRY, Duties, _wanted, compact
from smc.mesh import Mesh
from smc.mesh.reading import Revoked
from smc.model import Identity, MeshConfig, Name, Observation, Service
from smc.records import CertificateRecord, QuarantineRecord, ReadyRecord, SyncedRecord
from smc.registry import Registry
from tests.unit.api.meshes import mesh, proxy
from tests.unit.leadership import elect
from tests.unit.tasks import at_work

pytestmark = pytest.mark.looptime

KEYS = Keys("default")
BUYER, STORE = Identity("shop", "buyer"), Identity("shop", "store")
START = 1_900_000_000.0


def now() -> float:
    return START + asyncio.get_running_loop().time()


# --------------------------------------------------------------------------------------------------------- compaction


class Compacting(MemoryKV):
    """Remembers when it was compacted and how far, and can be made to refuse."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.compacted: list[tuple[float, int]] = []
        self.refuses = False

    async def compact(self, revision: int) -> None:
        if self.refuses:
            raise Refused("out of space")
        await super().compact(revision)
        self.compacted.append((asyncio.get_running_loop().time(), revision))


@asynccontextmanager
async def busy(kv: Compacting) -> AsyncIterator[dict[int, float]]:
    """A store that is compacted, and written to every ten seconds; yields when each revision was made."""
    loop = asyncio.get_running_loop()
    made: dict[int, float] = {kv.store.revision: loop.time()}

    async def write() -> None:
        writer = MemoryKV(kv.store)
        while True:
            outcome = await writer.transact([Put("key", str(loop.time()).encode())])
            made[outcome.revision] = loop.time()
            await asyncio.sleep(10)

    tasks = [asyncio.create_task(write()), asyncio.create_task(compact(kv))]
    try:
        yield made
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_ten_minutes_of_history_are_kept_and_hardly_more() -> None:
    kv = Compacting(MemoryStore())
    async with busy(kv) as made:
        await asyncio.sleep(3600)
    assert len(kv.compacted) > 3600 / COMPACT_EVERY - 4
    for at, revision in kv.compacted:
        age = at - made[revision]
        assert KEEP_HISTORY - 10 <= age <= KEEP_HISTORY + COMPACT_EVERY


async def test_a_new_leader_compacts_nothing_that_it_has_not_seen_grow_old() -> None:
    kv = Compacting(MemoryStore())
    async with busy(kv):
        await asyncio.sleep(KEEP_HISTORY - 1)
        assert kv.compacted == []


@pytest.mark.parametrize("how", ["lost", "refuses"])
async def test_what_cannot_be_compacted_now_is_compacted_later(how: str) -> None:
    kv = Compacting(MemoryStore())
    async with busy(kv) as made:
        await asyncio.sleep(1000)
        before = len(kv.compacted)
        if how == "lost":
            kv.disconnect()
        kv.refuses = True
        await asyncio.sleep(3600)
        assert len(kv.compacted) == before
        kv.refuses = False
        kv.reconnect()
        await asyncio.sleep(2 * COMPACT_EVERY + KEEP_HISTORY)
        at, revision = kv.compacted[-1]
        assert at - made[revision] <= KEEP_HISTORY + COMPACT_EVERY


# ------------------------------------------------------------------------------------------------------------- duties


class Told:
    """An informer that says one thing."""

    name = "files"

    async def observe(self) -> AsyncGenerator[Observation, None]:
        yield Observation(services=(Service(Name("shop", "bookstore"), ()),))
        await asyncio.Event().wait()


async def nobody(_revision: int) -> Acks:
    return Acks(frozenset())


class Led:
    """A mesh with an authority, and what its leader does in it."""

    def __init__(self, store: MemoryStore, *, compacts: bool = True) -> None:
        self.kv = Compacting(store)
        self.compacts = compacts
        self._ready = asyncio.Event()
        self._mesh: Mesh | None = None

    def have(self, *identities: Identity, ttl: timedelta = timedelta(hours=24)) -> None:
        """From now on the replica is ready and knows these."""
        names = {Name(i.namespace, i.service_account): proxy(Name(i.namespace, i.service_account)) for i in identities}
        found = mesh(MeshConfig(workload_certificate_ttl=ttl), names)
        revision = self.kv.store.revision
        ready = (item.key.removeprefix(KEYS.readiness) for item in self.kv.store.list(KEYS.readiness, 0))
        self._mesh = replace(
            found,
            revision=revision,
            identities=frozenset(identities),
            synced=frozenset({"files"}),
            departed={name: True for name in map(Name.parse, ready) if name not in names},
        )
        self._ready.set()

    async def meshes(self) -> AsyncGenerator[Mesh, None]:
        last = None
        while True:
            await self._ready.wait()
            if self._mesh is not None and self._mesh is not last:
                last = self._mesh
                yield last
            await asyncio.sleep(1)

    async def certificate(self, identity: Identity) -> CertificateRecord | None:
        item = await self.kv.get(KEYS.certificate(identity))
        return decode(CertificateRecord, item.value) if item is not None else None

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[asyncio.Task[None]]:
        signer = LocalSigner(b"k" * 32)
        await initialise(self.kv, KEYS, signer, "mesh.example", now())
        keyring = await load_keyring(self.kv, KEYS, signer)
        duties = Duties(
            kv=self.kv,
            keys=KEYS,
            registry=Registry(self.kv, KEYS),
            informers=[Told()],
            issuer=Issuer(self.kv, KEYS, keyring, signer, now, nobody),
            meshes=self.meshes,
            compacts=self.compacts,
        )
        async with at_work(duties.run(await elect(self.kv, KEYS))) as task:
            yield task


async def test_what_is_observed_is_written_before_anything_else_is_known() -> None:
    led = Led(MemoryStore())
    async with led.leading():
        await asyncio.sleep(5)
        item = led.kv.store.get(KEYS.synced("files"))
        assert item is not None
        assert decode(SyncedRecord, item.value).source == "files"
        assert led.kv.store.get(KEYS.service("files", Name("shop", "bookstore"))) is not None


async def test_nothing_is_issued_and_nothing_is_forgotten_before_the_replica_is_ready() -> None:
    led = Led(MemoryStore())
    gone = Name("shop", "gone")
    async with led.leading():
        await led.kv.transact([Put(KEYS.ready(gone), encode(ReadyRecord(gone)))])
        refused = QuarantineRecord(gone, "g/k/shop/m", 1, "", "", "refused")
        await led.kv.transact([Put(KEYS.quarantine(gone, "g/k/shop/m", 1), encode(refused))])
        await asyncio.sleep(3600)
        assert led.kv.store.list(KEYS.certificates, 0) == ()
        assert led.kv.store.get(KEYS.ready(gone)) is not None
        assert len(led.kv.store.list(KEYS.quarantines, 0)) == 1
        led.have(BUYER, STORE)
        await asyncio.sleep(10)
        assert len(led.kv.store.list(KEYS.certificates, 0)) == 2
        assert led.kv.store.get(KEYS.ready(gone)) is None
        assert led.kv.store.list(KEYS.quarantines, 0) == ()


async def test_the_issuer_hears_of_new_identities_and_of_another_life() -> None:
    led = Led(MemoryStore())
    async with led.leading():
        led.have(BUYER)
        await asyncio.sleep(10)
        assert await led.certificate(STORE) is None
        led.have(BUYER, STORE, ttl=timedelta(hours=1))
        await asyncio.sleep(10)
        record = await led.certificate(STORE)
        assert record is not None
        assert record.not_after - x509.issued(record.not_before, record.not_after) <= 3600


async def test_an_authority_that_cannot_be_loaded_is_tried_again_and_stops_nothing_else() -> None:
    led = Led(MemoryStore())
    with structlog.testing.capture_logs() as logs:
        async with led.leading() as task:
            key = KEYS.ca("intermediates", 1)
            authority = led.kv.store.get(key)
            assert authority is not None
            led.kv.store.transact([Delete(key)], ())
            led.have(BUYER)
            await asyncio.sleep(3 * LAST_RETRY)
            assert not task.done()
            assert led.kv.store.get(KEYS.synced("files")) is not None
            assert await led.certificate(BUYER) is None
            await led.kv.transact([Put(key, authority.value)])
            await asyncio.sleep(LAST_RETRY + 1)
            assert await led.certificate(BUYER) is not None
    refused = [line for line in logs if line["event"] == "no certificate can be issued; trying on"]
    assert 4 <= len(refused) <= 12, "each pause is longer than the one before"
    assert {(line["log_level"], "exc_info" in line) for line in refused} == {("warning", False)}
    assert "has no authority" in refused[0]["error"]


@pytest.mark.parametrize("compacts", [True, False])
async def test_a_store_that_is_shared_is_not_compacted(compacts: bool) -> None:
    led = Led(MemoryStore(), compacts=compacts)
    async with led.leading():
        await asyncio.sleep(2 * KEEP_HISTORY)
        assert bool(led.kv.compacted) == compacts


async def test_all_of_it_ends_with_the_leadership() -> None:
    led = Led(MemoryStore())
    before = asyncio.all_tasks()
    async with led.leading() as task:
        led.have(BUYER)
        await asyncio.sleep(10)
        await elect(MemoryKV(led.kv.store), KEYS)
        led.have(BUYER, STORE)
        with pytest.raises(ExceptionGroup) as ended:
            await asyncio.wait_for(task, 60)
        assert ended.group_contains(Deposed)
        assert await led.certificate(STORE) is None
    assert asyncio.all_tasks() == before


async def test_cancelling_leaves_no_task_behind() -> None:
    led = Led(MemoryStore())
    before = asyncio.all_tasks()
    async with led.leading():
        led.have(BUYER)
        await asyncio.sleep(10)
    assert asyncio.all_tasks() == before


# ---------------------------------------------------------------------------------------------------- who is revoked


async def test_the_issuer_is_told_who_is_revoked_who_shares_their_key_and_whom_nothing_is_signed_for() -> None:
    bad, good, out = (Name("shop", name) for name in ("bad", "good", "out"))
    proxies = {name: proxy(name) for name in (bad, good, out)}
    for name in (bad, good):
        proxies[name] = proxies[name]._replace(workload=replace(proxies[name].workload, identity=STORE))
    revoked = replace(
        mesh(MeshConfig(), proxies),
        identities=frozenset({STORE, Identity("shop", "out")}),
        revoked_proxies={bad: Revoked(7, STORE), Name("shop", "gone"): Revoked(5, STORE), good: Revoked(3, None)},
        revoked_identities={Identity("shop", "out"): True},
        admitted={bad: (), Name("shop", "gone"): (), good: ("a1",)},
    )

    async def meshes() -> AsyncGenerator[Mesh, None]:
        yield revoked

    (wanted,) = [one async for one in _wanted(meshes())]
    assert wanted.identities == {STORE}
    assert wanted.revoked.since == {STORE: 7}
    assert wanted.revoked.others == {STORE: {good}}
    assert (wanted.revoked.identities, wanted.revoked.banned) == (
        {Identity("shop", "out")},
        {out: Identity("shop", "out")},
    )
