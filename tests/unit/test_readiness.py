"""That a proxy was ready is written once, outlives everything but its workload, and comes back with no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import structlog

from cluster.election import Deposed
from cluster.kv import Guard, Operation, Outcome, Put, Rejected
from cluster.memory import MemoryKV, MemoryStore
from smc import readiness
from smc.codec import decode, encode
from smc.keys import Keys
from smc.mesh import Mesh
from smc.model import MeshConfig, Name
from smc.readiness import Readiness
from smc.records import ReadyRecord
from tests.unit.api.meshes import mesh, proxy
from tests.unit.leadership import elect
from tests.unit.tasks import at_work

pytestmark = pytest.mark.looptime

KEYS = Keys("default")
A, B, C = (Name("shop", name) for name in "abc")


class Watched(MemoryKV):
    """Counts the transactions that it is asked for."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.asked: list[tuple[Sequence[Operation], Sequence[Guard]]] = []
        self.outcomes: list[Outcome] = []

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        self.asked.append((operations, guards))
        outcome = await super().transact(operations, guards)
        self.outcomes.append(outcome)
        return outcome


@asynccontextmanager
async def writing(
    store: MemoryStore, known: set[Name] | None = None, listening: Sequence[Name] = ()
) -> AsyncIterator[tuple[Readiness, Watched]]:
    kv = Watched(store)
    of = Readiness(kv, KEYS, (set() if known is None else known).__contains__, lambda: listening)
    async with at_work(of.run()) as task:
        yield of, kv
        assert not task.done()


def ready(store: MemoryStore) -> list[Name]:
    return [decode(ReadyRecord, item.value).workload for item in store.list(KEYS.readiness, 0)]


# ------------------------------------------------------------------------------------------------------------ written


async def test_a_record_that_a_restore_took_back_is_written_again_for_a_stream_that_is_open() -> None:
    store, known = MemoryStore(), {A, B}
    async with writing(store, known, listening=[A]):
        await asyncio.sleep(60)
        assert ready(store) == []
        known.clear()
        await asyncio.sleep(readiness.LOOK_AGAIN + 1)
        assert ready(store) == [A]


async def test_a_proxy_that_listens_is_written_under_its_name() -> None:
    store = MemoryStore()
    async with writing(store) as (of, _):
        of.listening(B)
        of.listening(A)
        await asyncio.sleep(1)
    assert ready(store) == [A, B]
    assert store.get("/smc/default/ready/shop/a") is not None


async def test_what_is_known_is_not_written() -> None:
    store = MemoryStore()
    async with writing(store, known={A}) as (of, kv):
        of.listening(A)
        await asyncio.sleep(60)
        assert kv.asked == []


async def test_what_another_replica_has_written_meanwhile_is_left_as_it_is() -> None:
    store = MemoryStore()
    await MemoryKV(store).transact([Put(KEYS.ready(A), encode(ReadyRecord(A)))])
    before = store.get(KEYS.ready(A))
    async with writing(store) as (of, kv):
        with structlog.testing.capture_logs() as logs:
            of.listening(A)
            await asyncio.sleep(60)
        (outcome,) = kv.outcomes
        assert isinstance(outcome, Rejected)
    assert store.get(KEYS.ready(A)) == before
    assert logs == []


async def test_it_is_written_once() -> None:
    store = MemoryStore()
    async with writing(store) as (of, kv):
        for _ in range(5):
            of.listening(A)
        await asyncio.sleep(60)
        assert len(kv.asked) == 1


async def test_many_that_become_ready_at_once_are_all_written() -> None:
    store = MemoryStore()
    names = [Name("shop", f"w{number}") for number in range(300)]
    async with writing(store) as (of, _):
        for name in names:
            of.listening(name)
        await asyncio.sleep(1)
    assert set(ready(store)) == set(names)


async def test_while_the_store_is_lost_it_is_tried_again_and_nothing_is_forgotten() -> None:
    store = MemoryStore()
    async with writing(store) as (of, kv):
        kv.disconnect()
        of.listening(A)
        await asyncio.sleep(600)
        of.listening(B)
        assert ready(store) == []
        assert len(kv.asked) <= 601, "a lost store is not hammered"
        kv.reconnect()
        await asyncio.sleep(2)
        assert ready(store) == [A, B]


# ---------------------------------------------------------------------------------------------------------- forgotten


class Meshes:
    """What the leader's pipeline yields, as the test says."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Mesh] = asyncio.Queue()
        self._departed: dict[Name, bool] = {}

    def have(self, *names: Name) -> None:
        departed = {name: True for name in (A, B, C) if name not in names}
        self._departed = self._departed if self._departed == departed else departed
        found = mesh(MeshConfig(), {name: proxy(name) for name in names})
        self._queue.put_nowait(replace(found, synced=frozenset({"files"}), departed=self._departed))

    async def all(self) -> AsyncGenerator[Mesh, None]:
        while True:
            yield await self._queue.get()


@asynccontextmanager
async def forgetting(
    store: MemoryStore, kv: MemoryKV | None = None
) -> AsyncIterator[tuple[Meshes, asyncio.Task[None]]]:
    kv = kv or MemoryKV(store)
    for name in (A, B, C):
        await MemoryKV(store).transact([Put(KEYS.ready(name), encode(ReadyRecord(name)))])
    meshes = Meshes()
    async with at_work(readiness.forget(await elect(kv, KEYS), kv, KEYS, meshes.all())) as task:
        yield meshes, task


async def test_nothing_is_forgotten_before_every_source_was_observed() -> None:
    store = MemoryStore()
    async with forgetting(store):
        await asyncio.sleep(3600)
        assert ready(store) == [A, B, C]


async def test_a_workload_that_is_gone_loses_its_record_and_no_other_does() -> None:
    store = MemoryStore()
    async with forgetting(store) as (meshes, _):
        meshes.have(A, B, C)
        await asyncio.sleep(1)
        assert ready(store) == [A, B, C]
        meshes.have(A, C)
        await asyncio.sleep(1)
        assert ready(store) == [A, C]


async def test_what_the_proxy_of_a_workload_that_is_gone_said_of_its_trust_goes_with_it() -> None:
    store = MemoryStore()
    async with forgetting(store) as (meshes, _):
        store.transact([Put(KEYS.trust(name), b"") for name in (A, B)], ())
        meshes.have(A, C)
        await asyncio.sleep(1)
        assert [item.key for item in store.list(KEYS.trusts, 0)] == [KEYS.trust(A)]


async def test_what_went_while_nobody_led_is_forgotten_by_the_next_leader() -> None:
    store = MemoryStore()
    async with forgetting(store) as (meshes, _):
        meshes.have(B)
        await asyncio.sleep(1)
        assert ready(store) == [B]


async def test_a_mesh_in_which_nothing_is_gone_costs_the_store_nothing() -> None:
    store = MemoryStore()
    kv = Watched(store)
    async with forgetting(store, kv) as (meshes, _):
        before = len(kv.asked)
        for _ in range(10):
            meshes.have(A, B, C)
        await asyncio.sleep(1)
        assert len(kv.asked) == before


@pytest.mark.parametrize("key", [KEYS.workload("files", B), KEYS.manifest("smc.io/Workload/shop/b")])
async def test_a_workload_that_came_back_meanwhile_keeps_its_record(key: str) -> None:
    store = MemoryStore()
    async with forgetting(store) as (meshes, _):
        meshes.have(A, B, C)
        await asyncio.sleep(1)
        await MemoryKV(store).transact([Put(key, b"it is there again")])
        meshes.have(A)
        await asyncio.sleep(1)
        assert ready(store) == [A, B], "B is back, and C is gone"
        meshes.have(A, B)
        await asyncio.sleep(1)
        assert ready(store) == [A, B]


async def test_a_record_that_was_written_anew_is_of_a_workload_that_came_back() -> None:
    store = MemoryStore()
    kv = Watched(store)
    async with forgetting(store, kv) as (meshes, _):
        meshes.have(A, B, C)
        await asyncio.sleep(1)
        meshes.have(A, C)
        await asyncio.sleep(1)
        assert any(guard.mod_revision for guard in kv.asked[-1][1] if guard.key == KEYS.ready(B))


async def test_while_the_store_is_lost_nothing_is_forgotten_and_afterwards_it_is() -> None:
    store = MemoryStore()
    kv = MemoryKV(store)
    async with forgetting(store, kv) as (meshes, task):
        meshes.have(A, B, C)
        await asyncio.sleep(1)
        kv.disconnect()
        meshes.have(A)
        await asyncio.sleep(600)
        assert ready(store) == [A, B, C]
        assert not task.done()
        kv.reconnect()
        await asyncio.sleep(2)
        assert ready(store) == [A], "no newer mesh had to come for it"


async def test_a_deposed_leader_takes_nothing_back_and_says_so() -> None:
    store = MemoryStore()
    async with forgetting(store) as (meshes, task):
        meshes.have(A, B, C)
        await asyncio.sleep(1)
        await elect(MemoryKV(store), KEYS)
        meshes.have(A)
        with pytest.raises(Deposed):
            await asyncio.wait_for(task, 5)
        assert ready(store) == [A, B, C]
