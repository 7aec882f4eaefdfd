"""From a write in the store to the streams that it concerns, and to no others. In virtual time, on real parts."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.kv import Put, View
from cluster.memory import MemoryKV, MemoryStore
from cluster.mirror import Mirror
from smc import pipeline as module
from smc import plugins
from smc.envoy.snapshot import Generator
from smc.errors import Denied, NotFound
from smc.manifests import PolicyApi
from smc.mesh import Mesh, build
from smc.metrics import Metrics
from smc.model import Name
from smc.pipeline import COLD_REFUSAL, Pipeline
from smc.records import AdmissionRecord, ReadyRecord, RevocationRecord
from smc.xds.slot import NotAdmitted, Slot
from smc.xds.snapshot import Snapshot, Type
from tests.unit.bookshop import KEYS, SOURCE, Shop, service, workload

pytestmark = pytest.mark.looptime

BUYER, STORE, THIEF = Name("shop", "buyer"), Name("shop", "store"), Name("shop", "thief")
MAX_STALENESS = 1000.0
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Replica:
    """A pipeline with a connection to the store of its own."""

    def __init__(self, store: MemoryStore, *, sources: Sequence[str] = (SOURCE,)) -> None:
        self.kv = MemoryKV(store)
        self.metrics = Metrics()
        self.generator = Generator(lambda record: b"KEY of " + str(record.identity).encode())
        self.broken: set[Name] = set()
        self.pipeline = Pipeline(
            Mirror(self.kv, KEYS.root, KEYS.feeds_mesh),
            plugins.policies(),
            self.generate,
            sources=frozenset(sources),
            max_staleness=MAX_STALENESS,
            metrics=self.metrics,
        )

    def generate(self, mesh: Mesh, proxy: Name) -> Snapshot:
        if proxy in self.broken:
            raise RuntimeError("no snapshot of this one")
        return self.generator.snapshot(mesh, proxy)

    async def reaches(self, revision: int) -> Mesh:
        """Its Mesh, once it is at least at this revision."""
        for _ in range(10_000):
            await asyncio.sleep(0.001)
            if (mesh := self.pipeline.mesh) is not None and mesh.revision >= revision:
                return mesh
        raise AssertionError(f"revision {revision} was not reached")

    async def settles(self) -> None:
        """Let everything through that was written."""
        await self.pipeline.admit(resumed=True)

    def metric(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(name) or 0.0


@asynccontextmanager
async def running(*, sources: Sequence[str] = (SOURCE,), ready: bool = True) -> AsyncIterator[tuple[Shop, Replica]]:
    store = MemoryStore()
    shop = Shop(MemoryKV(store))
    await shop.found()
    if ready:
        await shop.observe(service("store"), workload("buyer"), workload("store", "store"), workload("thief"))
        await shop.certify("buyer", "store", "thief")
    replica = Replica(store, sources=sources)
    task = asyncio.create_task(replica.pipeline.run())
    try:
        if ready:
            await replica.reaches(store.revision)
        yield shop, replica
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Telling:
    """Calls `tell` whenever there is something to decide."""

    def __init__(self, tell: Callable[[], object]) -> None:
        self.decide = tell

    def write(self) -> None:
        pass


def taken(slot: Slot) -> Snapshot:
    found = slot.take()
    assert found is not None, "nothing was offered"
    snapshot, _ = found
    return snapshot


def body(snapshot: Snapshot, type_: Type, name: str) -> bytes:
    return snapshot.of_type(type_)[name].body


async def refused(waiting: asyncio.Task[None]) -> str:
    with pytest.raises(NotAdmitted) as error:
        await waiting
    return str(error.value)


def builds(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Mesh | None, View], None]) -> list[tuple[bool, int]]:
    """Have `wrap` called before each build, on its thread; returns (from nothing?, revision) of each that was begun."""
    begun: list[tuple[bool, int]] = []

    def wrapped(previous: Mesh | None, view: View, policies: Sequence[PolicyApi]) -> Mesh:
        begun.append((previous is None, view.revision))
        wrap(previous, view)
        return build(previous, view, policies)

    monkeypatch.setattr(module, "build", wrapped)
    return begun


# ------------------------------------------------------------------------------------------------- builds and snapshots


async def test_a_write_reaches_the_proxies_that_it_concerns_and_no_others() -> None:
    async with running() as (shop, replica):
        slots = {name: await replica.pipeline.subscribe(name) for name in (BUYER, STORE, THIEF)}
        before = {name: taken(slot) for name, slot in slots.items()}
        await shop.routes()
        await shop.allow("buyer", "store")
        await replica.settles()
        assert [name for name, slot in slots.items() if slot.waiting] == [STORE]
        after = taken(slots[STORE])
        assert body(after, Type.ROUTE, "inbound|8080") != body(before[STORE], Type.ROUTE, "inbound|8080")
        assert after.of_type(Type.CLUSTER) is before[STORE].of_type(Type.CLUSTER)


async def test_everybody_is_written_to_who_was_offered_something_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOGETHER", 2)
    happened: list[str] = []

    class Listening:
        def decide(self) -> None:
            happened.append("decided")

        def write(self) -> None:
            happened.append("written")

    async with running() as (shop, replica):
        for name in (BUYER, STORE, THIEF):
            (await replica.pipeline.subscribe(name)).listen(Listening())
        await asyncio.sleep(1)
        happened.clear()
        there = service("store"), workload("buyer"), workload("store", "store"), workload("thief")
        await shop.observe(*there, service("another"))
        await replica.settles()
        assert happened[:6] == ["decided", "decided", "written", "written", "decided", "written"]


async def test_a_proxy_that_was_not_concerned_has_the_very_same_snapshot() -> None:
    async with running() as (shop, replica):
        before = taken(await replica.pipeline.subscribe(BUYER))
        await shop.routes()
        await shop.allow("buyer", "store")
        await replica.settles()
        assert taken(await replica.pipeline.subscribe(BUYER)) is before


async def test_whoever_is_revoked_is_ended_at_once_and_gets_nothing_of_the_mesh_that_says_so() -> None:
    async with running() as (shop, replica):
        slots = {
            serial: await replica.pipeline.subscribe(BUYER, f"service {serial}", serial) for serial in ("a1", "a2")
        }
        other = await replica.pipeline.subscribe(STORE, serial="b1")
        for slot in (*slots.values(), other):
            taken(slot)
        revision = await shop.put(KEYS.revoked_proxy(BUYER), RevocationRecord(BUYER, None, "", "", 1.0))
        await replica.reaches(revision)
        assert [slot.ended for slot in slots.values()] == 2 * [
            "the credential of shop/buyer is revoked: ask for a new token"
        ]
        assert [slot.take() for slot in slots.values()] == [None, None]
        assert not other.ended
        with pytest.raises(Denied):
            await replica.pipeline.subscribe(BUYER, serial="a1")
        await replica.reaches(await shop.put(KEYS.admission(BUYER), AdmissionRecord(BUYER, revision, (("a3", 9.0),))))
        assert taken(await replica.pipeline.subscribe(BUYER, serial="a3"))
        with pytest.raises(Denied):
            await replica.pipeline.subscribe(BUYER, serial="a1")


@pytest.mark.parametrize("recorded", [True, False])
async def test_an_offer_says_of_which_mesh_it_is_and_who_built_it_if_that_is_recorded(
    monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    if recorded:
        monkeypatch.setattr(module, "tracer", TracerProvider().get_tracer("test"))
    async with running() as (shop, replica):
        slot = await replica.pipeline.subscribe(STORE)
        slot.take()
        await shop.routes()
        revision = await shop.allow("buyer", "store")
        await replica.settles()
        found = slot.take()
        assert found is not None
        _, offer = found
        assert offer.revision == revision == replica.metric("smc_mesh_revision")
        assert (offer.build is not None) == recorded


async def test_builds_coalesce_one_in_flight_and_the_newest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    running_now, most, goes_on = 0, 0, threading.Event()

    def slow(_previous: Mesh | None, _view: View) -> None:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        goes_on.wait(10)
        running_now -= 1

    async with running() as (shop, replica):
        slot = await replica.pipeline.subscribe(STORE)
        slot.take()
        begun = builds(monkeypatch, slow)
        await shop.routes()
        last = 0
        for number in range(20):
            last = await shop.allow("buyer", "store", name=f"target-{number}")
            await asyncio.sleep(0)
        goes_on.set()
        mesh = await replica.reaches(last)
        assert most == 1
        assert len(begun) <= 3, begun
        assert not any(from_nothing for from_nothing, _ in begun)
        assert mesh.revision == last
        sources = [source.manifest for source in taken(slot).of_type(Type.ROUTE)["inbound|8080"].sources]
        assert any("target-19" in manifest for manifest in sources)
        assert sum("target-" in manifest for manifest in mesh.manifests) == 20


@pytest.mark.parametrize("fault", [False, True])
async def test_the_collector_is_off_until_all_have_been_told_and_on_afterwards(
    fault: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(_previous: Mesh | None, _view: View) -> None:
        seen.append(gc.isenabled())
        if fault:
            raise RuntimeError("a fault of ours")

    async with running() as (shop, replica):
        await replica.reaches(await shop.routes())
        slot = await replica.pipeline.subscribe(STORE)
        slot.listen(Telling(lambda: seen.append(gc.isenabled())))
        await asyncio.sleep(0.01)
        seen.clear()
        builds(monkeypatch, note)
        await shop.allow("buyer", "store")
        for _ in range(10_000):
            await asyncio.sleep(0.001)
            if len(seen) == (1 if fault else 2) and gc.isenabled():
                break
        assert gc.isenabled()
        assert seen == ([False] if fault else [False, False])


async def test_a_collector_that_was_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "isenabled", lambda: False)
    enabled = []
    monkeypatch.setattr(gc, "enable", lambda: enabled.append(True))
    async with running() as (shop, replica):
        await replica.reaches(await shop.routes())
    assert not enabled


async def test_a_build_that_fails_keeps_the_last_mesh_and_the_next_is_from_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_previous: Mesh | None, view: View) -> None:
        if view.revision == poison:
            raise RuntimeError("a fault of ours")

    async with running() as (shop, replica):
        slot = await replica.pipeline.subscribe(STORE)
        slot.take()
        poison = 0
        await shop.routes()
        await replica.settles()
        begun = builds(monkeypatch, fails)
        poison = shop.kv.store.revision + 1  # type: ignore[attr-defined]
        with structlog.testing.capture_logs() as logs:
            await shop.allow("buyer", "store")
            await asyncio.sleep(1)
        assert [line["log_level"] for line in logs if "building the mesh failed" in line["event"]] == ["error"]
        assert replica.pipeline.mesh is not None
        assert replica.pipeline.mesh.revision == poison - 1
        assert replica.pipeline.ready
        await shop.allow("thief", "store")
        await replica.settles()
        assert [from_nothing for from_nothing, _ in begun] == [False, True]
        sources = [s.manifest for s in taken(slot).of_type(Type.ROUTE)["inbound|8080"].sources]
        assert any("buyer-to-store" in s for s in sources), "what the failed build was for is not lost"


async def test_whoever_is_revoked_while_no_mesh_can_be_built_is_refused_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_previous: Mesh | None, _view: View) -> None:
        raise RuntimeError("a fault of ours")

    async with running() as (shop, replica):
        stolen, other = [await replica.pipeline.subscribe(name, serial="a1") for name in (BUYER, STORE)]
        for slot in (stolen, other):
            taken(slot)
        builds(monkeypatch, fails)
        before = replica.pipeline.mesh
        await shop.routes()
        await asyncio.sleep(1)
        assert replica.pipeline.mesh is before, "it revokes nobody"
        revision = await shop.put(KEYS.revoked_proxy(BUYER), RevocationRecord(BUYER, None, "", "", 1.0))
        path = "operator/ann"
        await shop.put(KEYS.revoked_credential(path), RevocationRecord(None, None, "", "", 1.0, path))
        await asyncio.sleep(1)
        mesh = replica.pipeline.mesh
        assert before is not None
        assert mesh is not None
        assert mesh.revision == before.revision < revision, "the last Mesh stays, but for who is revoked"
        assert mesh.refuses_credential(path, "b1")
        assert stolen.ended == "the credential of shop/buyer is revoked: ask for a new token"
        assert not other.ended
        assert [slot.take() for slot in (stolen, other)] == [None, None]
        with pytest.raises(Denied):
            await replica.pipeline.subscribe(BUYER, serial="a1")
        monkeypatch.undo()
        await replica.reaches(await shop.put(KEYS.admission(BUYER), AdmissionRecord(BUYER, revision, (("a3", 9.0),))))
        assert taken(await replica.pipeline.subscribe(BUYER, serial="a3"))
        with pytest.raises(Denied):
            await replica.pipeline.subscribe(BUYER, serial="a1")


async def test_a_stream_is_refused_at_once_rather_than_answered_with_what_was_before_a_build_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_previous: Mesh | None, _view: View) -> None:
        raise RuntimeError("a fault of ours")

    async with running() as (shop, replica):
        builds(monkeypatch, fails)
        revision = await shop.routes()
        asked = asyncio.get_running_loop().time()
        reason = await refused(asyncio.ensure_future(replica.pipeline.admit(resumed=False)))
        assert reason == f"the mesh at revision {revision} cannot be built: a fault of ours"
        assert asyncio.get_running_loop().time() - asked < 1.0


async def test_one_snapshot_that_cannot_be_made_costs_nobody_else_and_is_made_when_it_can_be() -> None:
    async with running() as (shop, replica):
        slots = {name: await replica.pipeline.subscribe(name) for name in (BUYER, STORE)}
        for slot in slots.values():
            slot.take()
        replica.broken = {STORE}
        with structlog.testing.capture_logs() as logs:
            await shop.observe(
                service("store"), service("paper"), workload("buyer"), workload("store", "store"), workload("thief")
            )
            await replica.settles()
        assert [line["smc.proxy"] for line in logs if "generating a snapshot failed" in line["event"]] == [str(STORE)]
        assert "shop/paper|80" in taken(slots[BUYER]).of_type(Type.CLUSTER)
        assert slots[STORE].take() is None
        assert slots[STORE].stale
        replica.broken = set()
        await shop.put(KEYS.ready(Name("shop", "nobody")), ReadyRecord(Name("shop", "nobody")))
        await replica.settles()
        assert "shop/paper|80" in taken(slots[STORE]).of_type(Type.CLUSTER)
        assert not slots[STORE].stale


async def test_the_event_loop_runs_while_a_mesh_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.get_ident()
    threads: set[int] = set()
    async with running() as (shop, replica):
        builds(monkeypatch, lambda _previous, _view: threads.add(threading.get_ident()))
        await shop.routes()
        await replica.settles()
    assert threads
    assert here not in threads


async def test_a_store_with_another_history_is_built_from_nothing_and_told_to_everyone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as (shop, replica):
        store = replica.kv.store
        snapshot = store.snapshot()
        await shop.routes()
        await shop.allow("buyer", "store")
        await shop.allow("thief", "store")
        await replica.settles()
        slots = {name: await replica.pipeline.subscribe(name) for name in (BUYER, STORE)}
        for slot in slots.values():
            slot.take()
        begun = builds(monkeypatch, lambda _previous, _view: None)
        store.restore(snapshot)
        await replica.pipeline.admit(resumed=False)
        assert begun[0][0]
        mesh = replica.pipeline.mesh
        assert mesh is not None
        assert not mesh.manifests, "admitted with what the store said before it was restored"
        assert all(slot.waiting for slot in slots.values())


# -------------------------------------------------------------------------------------------------------------- ready


async def test_a_replica_is_ready_once_every_source_was_observed_whole() -> None:
    async with running(sources=("files", "cloud"), ready=False) as (shop, replica):
        assert not replica.pipeline.ready
        assert replica.pipeline.unready_reason == "the mesh has not been read from etcd yet"
        await replica.reaches(shop.kv.store.revision)  # type: ignore[attr-defined]
        assert replica.pipeline.unready_reason == "these sources have not been observed yet: cloud, files"
        await shop.observe(workload("buyer"))
        await asyncio.sleep(1)
        assert replica.pipeline.unready_reason == "these sources have not been observed yet: cloud"
        assert not replica.pipeline.ready
        await shop.observe(source="cloud")
        await asyncio.sleep(1)
        assert replica.pipeline.ready
        assert replica.pipeline.unready_reason == ""


async def test_meshes_are_yielded_only_once_ready_and_the_newest_wins() -> None:
    async with running(ready=False) as (shop, replica), aclosing(replica.pipeline.meshes()) as meshes:
        first = asyncio.ensure_future(anext(meshes))
        await shop.routes()
        await asyncio.sleep(5)
        assert not first.done(), "an unready replica does not know what is not there"
        await shop.observe(workload("buyer"))
        mesh = await first
        assert mesh.synced == {SOURCE}
        last = 0
        for number in range(10):
            last = await shop.allow("buyer", "store", name=f"target-{number}")
            await replica.settles()
        assert (await anext(meshes)).revision == last, "who is slow is spared those between"
        nothing_new = asyncio.ensure_future(anext(meshes))
        await asyncio.sleep(5)
        assert not nothing_new.done()
        nothing_new.cancel()
        await asyncio.gather(nothing_new, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------- admission


async def test_a_stream_is_never_answered_with_what_was_before_a_committed_write() -> None:
    async with running() as (shop, replica):
        for number in range(20):
            revision = await shop.allow("buyer", "store", name=f"target-{number}")
            await replica.pipeline.admit(resumed=bool(number % 2))
            assert replica.pipeline.mesh is not None
            assert replica.pipeline.mesh.revision >= revision


async def test_a_stream_waits_for_the_build_of_what_was_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (shop, replica):
        builds(monkeypatch, lambda _previous, _view: time.sleep(0.05))
        revision = await shop.routes()
        await asyncio.gather(*(replica.pipeline.admit(resumed=False) for _ in range(50)))
        assert replica.pipeline.mesh is not None
        assert replica.pipeline.mesh.revision == revision


async def test_a_replica_that_is_not_ready_admits_nobody() -> None:
    async with running(ready=False) as (_, replica):
        for resumed in (False, True):
            with pytest.raises(NotAdmitted, match="the mesh has not been read"):
                await replica.pipeline.admit(resumed=resumed)


async def test_without_the_store_a_cold_proxy_is_refused_then_gets_the_last_mesh_and_then_is_refused() -> None:
    loop = asyncio.get_running_loop()
    async with running() as (_, replica):
        lost = loop.time()
        replica.kv.disconnect()

        async def admitted() -> bool:
            try:
                await replica.pipeline.admit(resumed=False)
            except NotAdmitted:
                return False
            return True

        found: dict[float, bool] = {}
        for at in (0, 5, COLD_REFUSAL - 1, COLD_REFUSAL + 3, 600, MAX_STALENESS - 10, MAX_STALENESS + 10, 9999):
            await asyncio.sleep(max(0.0, lost + at - loop.time()))
            found[at] = await admitted()
        assert list(found.values()) == [False, False, False, True, True, True, False, False]
        replica.kv.reconnect()
        await asyncio.sleep(10)
        assert await admitted()


async def test_without_the_store_a_resumed_stream_waits_and_is_admitted_with_what_was_written_meanwhile() -> None:
    async with running() as (shop, replica):
        replica.kv.disconnect()
        waiting = asyncio.ensure_future(replica.pipeline.admit(resumed=True))
        revision = await shop.routes()
        await asyncio.sleep(600)
        assert not waiting.done()
        replica.kv.reconnect()
        await asyncio.wait_for(waiting, 10)
        assert replica.pipeline.mesh is not None
        assert replica.pipeline.mesh.revision == revision


async def test_a_lost_store_changes_nothing_for_who_is_connected() -> None:
    async with running() as (_, replica):
        slot = await replica.pipeline.subscribe(BUYER)
        slot.take()
        replica.kv.disconnect()
        await asyncio.sleep(600)
        assert replica.pipeline.ready
        assert not slot.ended
        assert not slot.waiting


# -------------------------------------------------------------------------------------------------------------- slots


async def test_whoever_is_no_workload_is_not_found() -> None:
    async with running() as (_, replica):
        with pytest.raises(NotFound, match="no workload shop/stranger in the mesh"):
            await replica.pipeline.subscribe(Name("shop", "stranger"))


async def test_a_newer_stream_of_a_proxy_takes_the_place_of_the_older() -> None:
    async with running() as (shop, replica):
        older = await replica.pipeline.subscribe(STORE)
        newer = await replica.pipeline.subscribe(STORE)
        assert older.ended == "a newer stream of shop/store took its place"
        assert not newer.ended
        replica.pipeline.unsubscribe(STORE, older)
        newer.take()
        await shop.routes()
        await shop.allow("buyer", "store")
        await replica.settles()
        assert newer.waiting, "the older one's end took the newer one's place away"


async def test_the_stream_of_a_workload_that_was_removed_ends() -> None:
    async with running() as (shop, replica):
        slots = {name: await replica.pipeline.subscribe(name) for name in (BUYER, STORE)}
        await shop.observe(service("store"), workload("buyer"), workload("thief"))
        await replica.settles()
        assert slots[STORE].ended == "workload shop/store was removed from the mesh"
        assert not slots[BUYER].ended


async def test_nothing_is_made_for_who_has_left() -> None:
    async with running() as (shop, replica):
        slot = await replica.pipeline.subscribe(STORE)
        slot.take()
        replica.pipeline.unsubscribe(STORE, slot)
        await shop.routes()
        await shop.allow("buyer", "store")
        await replica.settles()
        assert not slot.waiting


async def test_a_caller_that_gives_up_lets_nobody_into_the_generator_beside_its_thread() -> None:
    inside, most = 0, 0
    async with running() as (_, replica):
        generate = replica.generate

        def slow(mesh: Mesh, proxy: Name) -> Snapshot:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.1)
            inside -= 1
            return generate(mesh, proxy)

        replica.pipeline._generate = slow
        given_up = asyncio.ensure_future(replica.pipeline.subscribe(BUYER))
        await asyncio.sleep(0.01)
        given_up.cancel()
        await replica.pipeline.subscribe(STORE)
        assert most == 1


# -------------------------------------------------------------------------------------------------------------- traces


async def test_the_build_links_to_the_trace_of_who_wrote_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(module, "tracer", provider.get_tracer("test"))
    async with running() as (shop, replica):
        exporter.clear()
        revision = await shop.apply(
            """\
            apiVersion: smc.io/v1alpha1
            kind: Service
            metadata: {name: paper, namespace: shop}
            spec: {ports: [{port: 80}]}
            """,
            traceparent=TRACEPARENT,
        )
        await replica.settles()
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.parent) == ("smc.build", None)
    (link,) = span.links
    assert f"{link.context.trace_id:032x}" == TRACEPARENT.split("-")[1]
    assert f"{link.context.span_id:016x}" == TRACEPARENT.split("-")[2]
    assert dict(span.attributes or {})["smc.revision"] == revision


async def test_a_trace_that_cannot_be_read_costs_the_link_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (shop, replica):
        await shop.kv.transact([Put(KEYS.ready(Name("shop", "odd")), b"{")])
        revision = await shop.routes()
        await replica.settles()
        assert replica.pipeline.mesh is not None
        assert replica.pipeline.mesh.revision == revision
