"""What the Service Registry promises: acknowledged is durable, a write replaces what it was meant to, and the leader's
observations are written as the difference, with the fence.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.election import Deposed, Leadership
from cluster.kv import (
    MOST_OPERATIONS,
    Ambiguous,
    Batch,
    Delete,
    Guard,
    Listing,
    Operation,
    Put,
    Status,
    Unavailable,
)
from cluster.kv import (
    Outcome as Transacted,
)
from cluster.memory import MemoryKV, MemoryStore
from smc import registry as module
from smc.codec import decode, encode, traceparent
from smc.errors import Conflict, Invalid, NotFound
from smc.keys import Keys
from smc.manifests import OWN_KINDS, read_all
from smc.model import (
    Endpoint,
    Endpoints,
    Identity,
    Name,
    Observation,
    Problem,
    Protocol,
    Service,
    ServicePort,
    Workload,
)
from smc.records import ManifestRecord, SyncedRecord
from smc.registry import CHUNK_OPERATIONS, LEAVING, LIST_AGAIN, Outcome, Registry, Replaced, Written
from tests.unit.leadership import elect

KEYS = Keys("default")
ID = "smc.io/Service/shop/store"
KEY = KEYS.manifest(ID)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER_TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record(port: int = 80, *, created: float = 1.0, author: str = "spiffe://m/operator/a") -> ManifestRecord:
    return ManifestRecord(
        group="smc.io",
        version="v1alpha1",
        kind="Service",
        name=Name("shop", "store"),
        object={"spec": {"ports": [{"port": port}]}},
        text=f"port: {port}\n",
        file="shop.yaml",
        line=3,
        created=created,
        author=author,
    )


class Lossy(MemoryKV):
    """A store whose answers to the next transactions are lost, or that others write to just before them.

    `fates`: "applied" and "lost" lose the answer of a transaction that was or was not applied, "late" of one that is
    applied only after the next one; an exception is raised, an operation is somebody else's and is applied before it.
    """

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(store)
        self.fates: deque[str | BaseException | Operation] = deque()
        self.transactions: list[Sequence[Operation]] = []
        self.listed = 0
        self._late: list[tuple[Sequence[Operation], Sequence[Guard]]] = []

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        self.listed += 1
        return await super().list(prefix, revision=revision)

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Transacted:
        self.transactions.append(operations)
        fate = self.fates.popleft() if self.fates else ""
        late, self._late = self._late, []
        try:
            match fate:
                case BaseException():
                    raise fate
                case "applied":
                    await super().transact(operations, guards)
                    raise Ambiguous("the answer was lost")
                case "lost":
                    raise Ambiguous("the answer was lost")
                case "late":
                    late.append((operations, guards))
                    raise Ambiguous("the answer was lost")
                case Put() | Delete():
                    await super().transact([fate])
            return await super().transact(operations, guards)
        finally:
            if fate == "late":
                self._late = late
            else:
                for held in late:
                    await super().transact(*held)


@pytest.fixture
def kv() -> Lossy:
    return Lossy()


@pytest.fixture
def registry(kv: Lossy) -> Registry:
    return Registry(kv, KEYS)


async def put(
    registry: Registry, what: ManifestRecord, *, expected: int | None = None, trace: str = "", dry_run: bool = False
) -> Written:
    return await registry.put_manifest(what, expected=expected, traceparent=trace, dry_run=dry_run)


async def stored(kv: MemoryKV) -> ManifestRecord | None:
    item = await kv.get(KEY)
    return decode(ManifestRecord, item.value) if item else None


# ----------------------------------------------------------------------------------------------------------- manifests


async def test_a_manifest_is_created_then_unchanged_then_configured(registry: Registry, kv: Lossy) -> None:
    written = [await put(registry, what) for what in (record(80), record(80), record(81))]
    assert [w.outcome for w in written] == [Outcome.CREATED, Outcome.UNCHANGED, Outcome.CONFIGURED]
    assert [w.revision for w in written] == [2, 2, 3]
    assert await stored(kv) == record(81)


async def test_what_is_confirmed_is_in_the_store_with_its_trace(registry: Registry, kv: Lossy) -> None:
    written = await put(registry, record(), trace=TRACE)
    item = await kv.get(KEY)
    assert item is not None
    assert (item.mod_revision, traceparent(item.value)) == (written.revision, TRACE)


async def test_the_same_manifest_by_somebody_else_and_later_writes_nothing(registry: Registry, kv: Lossy) -> None:
    await put(registry, record(created=1.0, author="a"))
    assert (await put(registry, record(created=2.0, author="b"))).outcome is Outcome.UNCHANGED
    assert await stored(kv) == record(created=1.0, author="a")
    assert kv.store.revision == 2


@pytest.mark.parametrize("moved", [{"file": "other.yaml"}, {"line": 4}, {"text": "# why\nport: 80\n"}])
async def test_the_same_manifest_written_down_otherwise_writes_nothing(
    registry: Registry, kv: Lossy, moved: dict[str, object]
) -> None:
    await put(registry, record())
    new = replace(record(), **moved)  # type: ignore[arg-type]
    assert (await put(registry, new)).outcome is Outcome.UNCHANGED
    assert await stored(kv) == record()


async def test_the_same_fields_under_another_version_are_another_manifest(registry: Registry, kv: Lossy) -> None:
    await put(registry, record())
    new = replace(record(), version="v2")
    assert (await put(registry, new)).outcome is Outcome.CONFIGURED
    assert await stored(kv) == new


async def test_the_first_write_says_when_a_manifest_was_created(registry: Registry, kv: Lossy) -> None:
    await put(registry, record(80, created=1.0, author="a"))
    await put(registry, record(81, created=2.0, author="b"))
    assert await stored(kv) == record(81, created=1.0, author="b")
    await registry.delete_manifest(ID, expected=None)
    await put(registry, record(82, created=3.0))
    assert await stored(kv) == record(82, created=3.0)


async def test_a_dry_run_says_what_would_happen_and_writes_nothing(registry: Registry, kv: Lossy) -> None:
    assert await put(registry, record(80), dry_run=True) == Written(Outcome.CREATED, 0)
    written = await put(registry, record(80))
    assert await put(registry, record(80), dry_run=True) == Written(Outcome.UNCHANGED, written.revision)
    assert await put(registry, record(81), dry_run=True) == Written(Outcome.CONFIGURED, written.revision)
    with pytest.raises(Conflict):
        await put(registry, record(81), expected=99, dry_run=True)
    assert len(kv.transactions) == 1


async def test_a_write_over_another_version_than_the_expected_one_conflicts_and_says_which_is_there(
    registry: Registry, kv: Lossy
) -> None:
    with pytest.raises(Conflict, match=f"{ID} does not exist, expected was version 7"):
        await put(registry, record(), expected=7)
    first = (await put(registry, record(80), expected=0)).revision
    second = (await put(registry, record(81), expected=first)).revision
    with pytest.raises(Conflict, match=f"{ID} is at version {second}, expected was version {first}"):
        await put(registry, record(82), expected=first)
    with pytest.raises(Conflict, match=f"{ID} is at version {second}, expected was none"):
        await put(registry, record(82), expected=0)
    with pytest.raises(Conflict, match=f"is at version {second}"):
        await registry.delete_manifest(ID, expected=first)
    assert await stored(kv) == record(81)


async def test_two_that_write_at_once_without_a_version_both_succeed(registry: Registry, kv: Lossy) -> None:
    await asyncio.gather(*(put(registry, record(port)) for port in (80, 81, 82)))
    assert kv.store.revision == 4


async def test_of_two_that_write_at_once_over_one_version_one_conflicts(registry: Registry, kv: Lossy) -> None:
    first = (await put(registry, record(80))).revision
    results = await asyncio.gather(
        *(put(registry, record(port), expected=first) for port in (81, 82)), return_exceptions=True
    )
    assert sorted(type(r).__name__ for r in results) == ["Conflict", "Written"]


async def test_who_loses_every_race_is_told_so_in_the_end(registry: Registry, kv: Lossy) -> None:
    kv.fates.extend(Put(KEY, encode(record(port))) for port in range(1, 20))
    with pytest.raises(Conflict, match="changed by others 5 times"):
        await put(registry, record(80))


async def test_a_deleted_manifest_is_gone_at_the_revision_that_is_returned(registry: Registry, kv: Lossy) -> None:
    first = (await put(registry, record())).revision
    revision = await registry.delete_manifest(ID, expected=first)
    assert await kv.get(KEY) is None
    assert (await kv.list(KEY, revision=revision)).items == ()
    for expected in (None, first):
        with pytest.raises(NotFound, match=f"there is no {ID}"):
            await registry.delete_manifest(ID, expected=expected)


async def test_a_manifest_that_cannot_be_read_is_mended_by_writing_it_anew(registry: Registry, kv: Lossy) -> None:
    await kv.transact([Put(KEY, b"garbage")])
    assert (await put(registry, record())).outcome is Outcome.CONFIGURED
    assert await stored(kv) == record()
    await kv.transact([Put(KEY, b"garbage")])
    await registry.delete_manifest(ID, expected=None)
    assert await kv.get(KEY) is None


# --------------------------------------------------------------------------------------------------------- lost answers


@pytest.mark.parametrize("fates", [["applied"], ["lost"], ["late"], ["lost", "applied"], ["late", "lost"]])
async def test_a_lost_answer_is_settled_and_the_manifest_is_written_once(
    registry: Registry, kv: Lossy, fates: list[str]
) -> None:
    await put(registry, record(80))
    kv.fates.extend(fates)
    written = await put(registry, record(81))
    item = await kv.get(KEY)
    assert item is not None
    assert written == Written(Outcome.CONFIGURED, item.mod_revision)
    assert kv.store.revision == 3


@pytest.mark.parametrize("fates", [["applied"], ["lost"], ["late"]])
async def test_a_lost_answer_to_a_deletion_is_settled(registry: Registry, kv: Lossy, fates: list[str]) -> None:
    await put(registry, record())
    kv.fates.extend(fates)
    revision = await registry.delete_manifest(ID, expected=None)
    assert await kv.get(KEY) is None
    assert revision == kv.store.revision


async def test_a_late_transaction_never_undoes_what_came_after_it(registry: Registry, kv: Lossy) -> None:
    await put(registry, record(80))
    kv.fates.extend(["late", Put(KEY, encode(record(90)))])
    with pytest.raises(Ambiguous):
        await put(registry, record(81))
    assert await stored(kv) == record(90)


async def test_what_was_written_over_by_somebody_else_meanwhile_is_not_written_again(
    registry: Registry, kv: Lossy
) -> None:
    kv.fates.extend(["applied", Put(KEY, encode(record(90)))])
    with pytest.raises(Ambiguous):
        await put(registry, record(80))
    assert await stored(kv) == record(90)


async def test_while_no_answer_comes_the_fate_stays_unknown(registry: Registry, kv: Lossy) -> None:
    kv.fates.extend(["lost"] * 20)
    with pytest.raises(Ambiguous):
        await put(registry, record())
    kv.fates.clear()
    kv.fates.extend(["applied", Unavailable("no endpoint")])
    with pytest.raises(Ambiguous):
        await put(registry, record())


async def test_a_store_that_cannot_be_reached_took_nothing(registry: Registry, kv: Lossy) -> None:
    kv.fates.append(Unavailable("no endpoint"))
    with pytest.raises(Unavailable):
        await put(registry, record())
    assert await stored(kv) is None


# -------------------------------------------------------------------------------------------------- what was observed


def service(name: str, port: int = 80) -> Service:
    return Service(Name("shop", name), (ServicePort(port, Protocol.HTTP, "8080"),))


def workload(name: str, address: str = "127.0.0.9") -> Workload:
    return Workload(Name("shop", name), address, Identity("shop", name))


def endpoints(name: str, *workloads: str, port: int = 80) -> Endpoints:
    found = (Endpoint(Name("shop", w), "127.0.0.9", Identity("shop", w), ((port, 8080),)) for w in sorted(workloads))
    return Endpoints(Name("shop", name), tuple(found))


def observation(*names: str, port: int = 80, problems: tuple[Problem, ...] = ()) -> Observation:
    """A service and a workload by each name."""
    names = tuple(sorted(names))
    return Observation(
        tuple(service(name, port) for name in names),
        tuple(endpoints(name, name, port=port) for name in names),
        tuple(workload(name) for name in names),
        problems,
    )


async def below(kv: MemoryKV, source: str = "files") -> dict[str, object]:
    """Everything that the registry has of a source, decoded."""
    kinds = {"services": Service, "endpoints": Endpoints, "workloads": Workload, "synced": SyncedRecord}
    prefix = KEYS.source(source)
    return {
        item.key.removeprefix(prefix): decode(kinds[item.key.removeprefix(prefix).partition("/")[0]], item.value)
        for item in (await kv.list(prefix)).items
    }


def said(observed: Observation, source: str = "files") -> dict[str, object]:
    """What the registry has to have of it."""
    return {
        "synced": SyncedRecord(source, observed.problems),
        **{f"services/{s.name}": s for s in observed.services},
        **{f"endpoints/{e.service}": e for e in observed.endpoints},
        **{f"workloads/{w.name}": w for w in observed.workloads},
    }


@pytest.fixture
async def leading(kv: Lossy) -> Leadership:
    leading = await elect(kv, KEYS)
    kv.transactions.clear()
    return leading


async def test_the_registry_says_exactly_what_was_observed(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    problem = Problem("files:a.yaml", "Duplicate", "twice")
    steps = [observation("a", "b", "c"), observation("b", "d", problems=(problem,)), observation("b", "d", port=81)]
    for observed in [*steps, Observation()]:
        await registry.replace(leading, "files", observed)
        assert await below(kv) == said(observed)


async def test_only_what_changed_is_written(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    assert await registry.replace(leading, "files", observation("a", "b", "c")) == Replaced(written=9)
    before = kv.store.revision
    assert await registry.replace(leading, "files", observation("a", "b", "c")) == Replaced(unchanged=9)
    assert kv.store.revision == before
    changed = Observation((service("a"),), (endpoints("a", "a"),), (workload("a", "127.0.0.10"),))
    assert await registry.replace(leading, "files", changed) == Replaced(written=1, deleted=6, unchanged=2)


async def test_what_did_not_change_is_not_read_again(
    registry: Registry, kv: Lossy, leading: Leadership, monkeypatch: pytest.MonkeyPatch
) -> None:
    await registry.replace(leading, "files", observation("a", "b", "c"))
    read: list[object] = []
    real = module.equal
    monkeypatch.setattr(module, "equal", lambda value, record: read.append(record) or real(value, record))
    await registry.replace(leading, "files", observation("a", "b", "c", "d"))
    assert [record for record in read if not isinstance(record, SyncedRecord)] == []
    await Registry(kv, KEYS).replace(leading, "files", observation("a", "b", "c", "d"))
    assert len(read) > 12


async def test_a_changed_endpoint_costs_no_listing_of_its_source(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    many = [f"s{n}" for n in range(50)]
    for source in ("files", "kubernetes"):
        await registry.replace(leading, source, observation(*many))
    assert kv.listed == 2
    before = observation(*many)
    for address in ("127.0.0.10", "127.0.0.11"):
        observed = replace(before, workloads=(workload(many[0], address), *before.workloads[1:]))
        for _ in range(2):
            await registry.replace(leading, "files", observed)
    fewer = observation(*many[1:], problems=(Problem("files:a", "R", "m"),))
    for observed in (fewer, replace(before, unknown=("a.yaml",)), fewer, before):
        await registry.replace(leading, "files", observed)
    assert kv.listed == 2, "what it wrote last is what is there"
    assert await below(kv) == said(before)


async def test_every_term_reads_what_is_there_once(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    await registry.replace(leading, "files", observation("a"))
    await Registry(kv, KEYS).replace(await elect(kv, KEYS), "files", observation("b"))
    again = await elect(kv, KEYS)
    kv.listed = 0
    for _ in range(3):
        await registry.replace(again, "files", observation("a"))
    assert kv.listed == 1
    assert await below(kv) == said(observation("a"))


@pytest.mark.parametrize(
    "fate", ["applied", "lost", Unavailable("no endpoint"), Put(KEYS.service("files", Name("shop", "a")), b"x")]
)
async def test_after_whatever_failed_it_is_read_again(
    registry: Registry, kv: Lossy, leading: Leadership, fate: str | Exception | Operation
) -> None:
    await registry.replace(leading, "files", observation("a"))
    kv.listed = 0
    kv.fates.append(fate)
    for _ in range(3):
        with suppress(Unavailable):
            await registry.replace(leading, "files", observation("a", port=81))
    assert kv.listed == 1
    assert await below(kv) == said(observation("a", port=81))


async def test_a_write_that_was_cancelled_half_way_is_read_again(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    kv.fates.extend(["", asyncio.CancelledError()])
    with pytest.raises(asyncio.CancelledError):
        await registry.replace(leading, "files", observation(*(f"w{n}" for n in range(70))))
    await registry.replace(leading, "files", observation("w1"))
    assert kv.listed == 2
    assert await below(kv) == said(observation("w1"))


@pytest.mark.looptime
async def test_what_an_operator_wrote_by_hand_is_corrected_in_the_end(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    await registry.replace(leading, "files", observation("a"))
    await kv.transact([Put(KEYS.service("files", Name("shop", "a")), encode(service("a", 9)))])
    await asyncio.sleep(LIST_AGAIN)
    await registry.replace(leading, "files", observation("a"))
    assert await below(kv) == said(observation("a"))


async def test_the_event_loop_goes_on_while_a_large_observation_is_put_in_order(
    registry: Registry, leading: Leadership, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, int] = {}

    def seen(name: str) -> Callable[..., object]:
        real = getattr(module, name)

        def called(*args: object) -> object:
            threads[name] = threading.get_ident()
            return real(*args)

        return called

    for name in ("_wanted", "_recognised", "_difference"):
        monkeypatch.setattr(module, name, seen(name))
    await registry.replace(leading, "files", observation("a"))
    assert len(threads) == 3
    assert threading.get_ident() not in threads.values()


async def test_what_was_read_before_the_store_was_restored_is_not_believed(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    await registry.replace(leading, "files", observation("a", port=80))
    snapshot = kv.store.snapshot()
    for port in (81, 80, 81):
        await registry.replace(leading, "files", observation("a", port=port))
        kv.store.restore(snapshot)
        leading = await elect(kv, KEYS)
        await registry.replace(leading, "files", observation("a", port=port))
        assert await below(kv) == said(observation("a", port=port))


async def test_who_observed_it_is_no_change(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    await registry.replace(leading, "files", observation("a"), traceparent=TRACE)
    before = kv.store.revision
    await registry.replace(leading, "files", observation("a"), traceparent=OTHER_TRACE)
    assert kv.store.revision == before
    items = (await kv.list(KEYS.source("files"))).items
    assert {traceparent(item.value) for item in items} == {TRACE}


async def test_one_source_leaves_the_others_alone(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    await registry.replace(leading, "files", observation("a"))
    await registry.replace(leading, "files2", observation("b"))
    await registry.replace(leading, "files", Observation())
    assert await below(kv, "files2") == said(observation("b"), "files2")


async def test_workloads_that_are_gone_come_first_then_what_is_new_then_what_is_gone_and_synced_last(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    many = [f"w{n}" for n in range(70)]
    await registry.replace(leading, "files", observation("old"))
    kv.transactions.clear()
    await registry.replace(leading, "files", observation(*many, problems=(Problem("files:a", "R", "m"),)))
    phases = [
        "synced" if operation.key == KEYS.synced("files") else type(operation).__name__
        for transaction in kv.transactions
        for operation in transaction
    ]
    assert phases == ["Delete"] + ["Put"] * 210 + ["Delete"] * 2 + ["synced"]
    assert kv.transactions[0][0].key == KEYS.workload("files", Name("shop", "old"))


async def test_of_many_that_go_no_workload_is_there_without_its_endpoints(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    names = [f"w{n:03d}" for n in range(150)]
    workloads = tuple(workload(name) for name in names)
    services = tuple(service(f"s{n}") for n in range(3))
    await registry.replace(
        leading, "files", Observation(services, tuple(endpoints(s.name.name, *names) for s in services), workloads)
    )
    before = await kv.status()
    stays = names[:10]
    await registry.replace(
        leading,
        "files",
        Observation(services, tuple(endpoints(s.name.name, *stays) for s in services), workloads[:10]),
    )
    gone: set[str] = set()
    many = await batches(kv, before)
    assert len(many) > 1
    for batch in many:
        gone.update(key.rpartition("/")[2] for key in batch.deletes)
        for item in batch.puts:
            left = {e.workload.name for e in decode(Endpoints, item.value).endpoints}
            assert gone >= set(names) - left


async def left(kv: MemoryKV) -> list[Workload]:
    return [decode(Workload, item.value) for item in (await kv.list(KEYS.leavings)).items]


@pytest.mark.looptime
async def test_what_a_workload_leaves_is_kept_beside_what_it_is_for_a_while(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    both, other = (replace(workload("a"), services=services) for services in (("s", "t"), ("t",)))
    services, backed = (service("s"), service("t")), (endpoints("s", "a"), endpoints("t", "a"))
    await registry.replace(leading, "files", Observation(services, backed, (both,)))
    kv.transactions.clear()
    leaves = Observation(services, (endpoints("s"), endpoints("t", "a")), (other,))
    await registry.replace(leading, "files", leaves)
    assert await left(kv) == [both]
    keys = [operation.key for operation in kv.transactions[0]]
    assert KEYS.workload("files", both.name) in keys, "it was left in the transaction that says so, or in one before"
    assert KEYS.leavings in keys[1]
    await registry.replace(leading, "files", leaves)
    assert await left(kv) == [both], "it is nothing of the source's"
    await registry.replace(leading, "files", Observation(services, backed, (both,)))
    assert await left(kv) == [both], "what comes back leaves nothing"
    await asyncio.sleep(LEAVING + 1)
    assert await left(kv) == []
    await registry.replace(leading, "files", Observation(services, (endpoints("s"), endpoints("t"))))
    assert await left(kv) == [], "what is gone as a whole has nobody who is told that it serves less"


@pytest.mark.looptime
async def test_what_an_applied_workload_leaves_is_kept_as_well(registry: Registry, kv: Lossy) -> None:
    def applied(*services: str, ports: str = "[]") -> ManifestRecord:
        text = f"""
            apiVersion: smc.io/v1alpha1
            kind: Workload
            metadata: {{name: a, namespace: shop}}
            spec: {{address: 127.0.0.9, serviceAccount: a, services: [{", ".join(services)}], ports: {ports}}}
        """
        (found,) = read_all(dedent(text), OWN_KINDS, file="shop.yaml")
        return found

    await put(registry, applied("s"))
    await put(registry, applied("s", "t"))
    assert await left(kv) == []
    kv.fates.append("lost")
    await put(registry, applied("t"))
    assert [one.services for one in await left(kv)] == [("s", "t")]
    await put(registry, applied("t", ports="[{name: web, port: 8080}]"))
    assert [one.services for one in await left(kv)] == [("s", "t"), ("t",)], "what has other ports may have lost one"
    await put(registry, applied(), dry_run=True)
    assert len(await left(kv)) == 2
    await asyncio.sleep(LEAVING + 1)
    assert await left(kv) == []


async def test_no_transaction_is_larger_than_a_store_takes(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    labels = tuple((f"l{n}", "x" * 60) for n in range(250))
    many = tuple(replace(workload(f"w{n:04d}"), labels=labels) for n in range(300))
    await registry.replace(leading, "files", Observation(workloads=many))
    assert len(kv.transactions) > 3
    for operations in kv.transactions:
        assert len(operations) <= CHUNK_OPERATIONS < MOST_OPERATIONS
        assert sum(len(o.value) for o in operations if isinstance(o, Put)) <= module.CHUNK_BYTES
    kv.transactions.clear()
    await registry.replace(leading, "files", Observation())
    assert [len(operations) for operations in kv.transactions] == [100, 100, 100]


async def test_a_service_changes_with_its_endpoints_at_one_revision(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    many = [f"s{n:03d}" for n in range(151)]
    for observed in (observation(*many), observation(*many, port=81), Observation()):
        before = await kv.status()
        await registry.replace(leading, "files", observed)
        for batch in await batches(kv, before):
            keys = [*(item.key for item in batch.puts), *batch.deletes]
            services, ends = ({k.rpartition("/")[2] for k in keys if f"/{t}/" in k} for t in ("services", "endpoints"))
            assert services == ends


async def test_a_workload_that_goes_goes_with_its_endpoints_at_one_revision(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    both = Observation((service("s"),), (endpoints("s", "a", "b"),), (workload("a"), workload("b")))
    one = Observation((service("s"),), (endpoints("s", "a"),), (workload("a"),), (Problem("files:b", "R", "m"),))
    await registry.replace(leading, "files", both)
    before = await kv.status()
    await registry.replace(leading, "files", one)
    (batch,) = await batches(kv, before)
    assert [item.key.removeprefix(KEYS.source("files")) for item in batch.puts] == ["endpoints/shop/s", "synced"]
    assert list(batch.deletes) == [KEYS.source("files") + "workloads/shop/b"]
    assert await below(kv) == said(one)


async def batches(kv: MemoryKV, after: Status) -> list[Batch]:
    found: list[Batch] = []
    last = (await kv.status()).revision
    async for batch in kv.watch(KEYS.registry, after):
        found.append(batch)
        if batch.revision >= last:
            break
    return found


async def test_a_source_is_not_synced_before_all_of_it_is_written(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    kv.fates.extend(["", Unavailable("no endpoint")])
    with pytest.raises(Unavailable):
        await registry.replace(leading, "files", observation(*(f"w{n}" for n in range(70))))
    assert KEYS.synced("files") not in {item.key for item in (await kv.list(KEYS.registry)).items}
    await registry.replace(leading, "files", observation("w1"))
    assert await below(kv) == said(observation("w1"))


async def test_a_deposed_leader_writes_nothing(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    await registry.replace(leading, "files", observation("a"))
    await elect(kv, KEYS)
    with pytest.raises(Deposed):
        await registry.replace(leading, "files", observation("b"))
    assert await below(kv) == said(observation("a"))


async def test_a_leader_that_is_deposed_half_way_stops_there(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    kv.fates.extend(["", Delete(KEYS.leader)])
    with pytest.raises(Deposed):
        await registry.replace(leading, "files", observation(*(f"w{n}" for n in range(70))))
    assert len(await below(kv)) == CHUNK_OPERATIONS


@pytest.mark.parametrize("fates", [["applied"], ["lost"], ["late"], ["", "late"], ["lost", "", "applied", "late"]])
async def test_after_a_lost_answer_it_reads_again_and_goes_on(
    registry: Registry, kv: Lossy, leading: Leadership, fates: list[str]
) -> None:
    await registry.replace(leading, "files", observation("old"))
    observed = observation(*(f"w{n}" for n in range(70)))
    kv.fates.extend(fates)
    await registry.replace(leading, "files", observed)
    assert await below(kv) == said(observed)
    assert not kv.fates


async def test_a_store_that_never_answers_is_not_tried_for_ever(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    kv.fates.extend(["lost"] * 100)
    with pytest.raises(Ambiguous):
        await registry.replace(leading, "files", observation("a"))


async def test_what_somebody_else_wrote_meanwhile_is_seen_and_corrected(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    key = KEYS.service("files", Name("shop", "a"))
    kv.fates.append(Put(key, encode(service("a", 9))))
    await registry.replace(leading, "files", observation("a"))
    assert await below(kv) == said(observation("a"))
    kv.fates.extend(Put(key, encode(service("a", port))) for port in range(1, 30))
    with pytest.raises(Conflict, match="only the leader writes below /smc/default/registry/files/"):
        await registry.replace(leading, "files", observation("a", port=81))


async def test_what_cannot_be_read_is_written_anew(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    await registry.replace(leading, "files", observation("a"))
    await kv.transact([Put(KEYS.service("files", Name("shop", "a")), b"x"), Put(KEYS.source("files") + "odd", b"x")])
    await registry.replace(await elect(kv, KEYS), "files", observation("a"))
    assert await below(kv) == said(observation("a"))


async def test_one_record_that_is_too_large_hurts_only_itself(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    await registry.replace(leading, "files", observation("a", "b"))
    huge = endpoints("a", *(f"w{n:05d}-{'x' * 50}" for n in range(6000)))
    after = observation("a", "b", port=81)
    await registry.replace(leading, "files", replace(after, endpoints=(huge, after.endpoints[1])))
    found = await below(kv)
    (problem,) = found["synced"].problems  # type: ignore[attr-defined]
    assert (problem.manifest, problem.reason) == ("files:endpoints/shop/a", "TooLarge")
    before = said(observation("a", "b"))
    assert found["endpoints/shop/a"] == before["endpoints/shop/a"]
    assert found["services/shop/b"] == service("b", 81)


async def test_problems_are_bounded(registry: Registry, kv: Lossy, leading: Leadership) -> None:
    problems = tuple(Problem(f"files:{n:03d}.yaml", "InvalidManifest", "m") for n in range(300))
    await registry.replace(leading, "files", Observation(problems=problems))
    assert (await below(kv))["synced"] == SyncedRecord("files", problems[:100])


async def test_an_observation_that_names_something_twice_is_refused(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    with pytest.raises(Invalid, match="2 objects under 1 names"):
        await registry.replace(leading, "files", Observation(services=(service("a", 80), service("a", 81))))
    assert kv.transactions == []


async def test_while_something_is_unknown_nothing_is_taken_away(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    await registry.replace(leading, "files", observation("a", "b", "c"))
    some = replace(observation("a", "d", port=81), unknown=("b.yaml",))
    # Of a new leader, which has read nothing before.
    assert await Registry(kv, KEYS).replace(leading, "files", some) == Replaced(written=5, unchanged=1)
    before, now = said(observation("a", "b", "c")), await below(kv)
    assert now == {**before, **said(some)}
    assert await registry.replace(leading, "files", some) == Replaced(unchanged=6)
    known = observation("a", "d", port=81)
    assert await registry.replace(leading, "files", known) == Replaced(deleted=6, unchanged=6)
    assert await below(kv) == said(known)


async def test_while_something_is_unknown_a_service_keeps_the_endpoints_of_workloads_that_were_not_observed(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    three = Observation((service("a"),), (endpoints("a", "w1", "w2", "w3"),), tuple(map(workload, ("w1", "w2", "w3"))))
    await registry.replace(leading, "files", three)
    # w1 backs it no more, which is known; w2 and w3 are unknown; w0 is new.
    some = Observation((service("a"),), (endpoints("a", "w0"),), (workload("w0"), workload("w1")), unknown=("w.yaml",))
    for _ in range(2):
        await Registry(kv, KEYS).replace(leading, "files", some)
        assert (await below(kv))["endpoints/shop/a"] == endpoints("a", "w0", "w2", "w3")
    await kv.transact([Put(KEYS.endpoints("files", Name("shop", "a")), b"garbage")])
    await registry.replace(leading, "files", some)
    assert (await below(kv))["endpoints/shop/a"] == endpoints("a", "w0")
    await registry.replace(leading, "files", replace(some, unknown=()))
    assert await below(kv) == said(replace(some, unknown=()))


async def test_a_mesh_that_never_had_more_than_is_known_can_begin(
    registry: Registry, kv: Lossy, leading: Leadership
) -> None:
    some = replace(observation("a", problems=(Problem("files:b.yaml", "R", "m"),)), unknown=("b.yaml",))
    await registry.replace(leading, "files", some)
    assert await below(kv) == said(some)


NAMES = st.sets(st.sampled_from([f"s{n}" for n in range(8)]))
FATES = st.lists(st.sampled_from(["", "", "applied", "lost", "late"]), max_size=4)


@given(st.lists(st.tuples(NAMES, st.integers(80, 82), FATES), min_size=1, max_size=6))
def test_whatever_is_lost_on_the_way_the_last_observation_stands(steps: list[tuple[set[str], int, list[str]]]) -> None:
    async def story() -> None:
        kv = Lossy()
        leading, registry = await elect(kv, KEYS), Registry(kv, KEYS)
        for names, port, fates in steps:
            observed = observation(*names, port=port)
            kv.fates.extend(fates)
            await registry.replace(leading, "files", observed)
            kv.fates.clear()
            assert await below(kv) == said(observed)

    asyncio.run(story())
