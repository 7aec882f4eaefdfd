"""Every service that needs one has a virtual address to itself, for as long as it is there. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.election import Deposed
from cluster.kv import Put
from cluster.memory import MemoryKV, MemoryStore
from smc import addresses
from smc.addresses import KEEP, RETRY, assign, candidates
from smc.codec import decode, encode
from smc.envoy import names
from smc.keys import Keys
from smc.mesh import Mesh
from smc.model import MeshConfig, Name
from smc.records import AddressRecord
from tests.unit.api.meshes import mesh
from tests.unit.cluster.hostile import HostileKV
from tests.unit.leadership import elect
from tests.unit.tasks import at_work

pytestmark = pytest.mark.looptime

KEYS = Keys("default")
A, B, C = (Name("shop", name) for name in "abc")
SETTLED = 5 * RETRY


class Meshes:
    """What the leader's pipeline yields, as the test says."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Mesh] = asyncio.Queue()

    def have(self, *services: Name, intercepts: bool = True, own: Mapping[Name, str] | None = None) -> None:
        found = {name: (own or {}).get(name, "") for name in services}
        self._queue.put_nowait(
            replace(mesh(MeshConfig(), {}), own_addresses=found, intercepts=intercepts, synced=frozenset({"files"}))
        )

    async def all(self) -> AsyncGenerator[Mesh, None]:
        while True:
            yield await self._queue.get()


@asynccontextmanager
async def leading(store: MemoryStore, kv: MemoryKV | None = None) -> AsyncIterator[Meshes]:
    """A leader, which is not deposed as long as this lasts."""
    kv = kv or MemoryKV(store)
    meshes = Meshes()
    async with at_work(addresses.run(await elect(kv, KEYS), kv, KEYS, meshes.all())) as task:
        yield meshes
        assert not task.done()


def stored(store: MemoryStore) -> dict[Name, str]:
    records = [decode(AddressRecord, item.value) for item in store.list(KEYS.addresses, 0)]
    return {record.service: record.address for record in records}


def first(service: Name) -> str:
    return next(candidates(service))


# ------------------------------------------------------------------------------------------------------------ the rule


def test_a_service_tries_the_same_addresses_everywhere_and_all_of_them_are_virtual() -> None:
    tried = list(islice(candidates(A), 1000))
    assert tried == list(islice(candidates(A), 1000))
    assert len(set(tried)) == 1000
    assert all(ip_address(address) in ip_network(names.VIRTUAL_ADDRESSES) for address in tried)
    assert first(A) == "250.58.171.164", "another way to begin would give every service of every mesh another address"


def test_neither_the_first_nor_the_last_address_of_the_network_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ip_network(names.VIRTUAL_ADDRESSES)
    monkeypatch.setattr(
        addresses.hashlib, "blake2b", lambda *_, **__: Digest((addresses._COUNT - 1).to_bytes(8, "big"))
    )
    assert list(islice(candidates(A), 2)) == [str(network[-2]), str(network[1])]


class Digest:
    def __init__(self, value: bytes) -> None:
        self.digest = lambda: value


def test_an_address_that_is_taken_is_passed_over() -> None:
    one, two = islice(candidates(A), 2)
    assert dict(assign({A}, {B: one}, [])) == {A: two}
    assert dict(assign({A}, {}, [one])) == {A: two}, "by a service that has it of its own, too"


def test_who_has_an_address_keeps_it_wherever_it_would_begin_now() -> None:
    assert dict(assign({A, B}, {A: "240.0.0.7", B: first(A)}, [])) == {}


def test_of_two_that_were_written_the_same_the_first_by_name_keeps_it() -> None:
    assert dict(assign({A, B}, {A: "240.0.0.7", B: "240.0.0.7"}, [])) == {B: first(B)}


# ---------------------------------------------------------------------------------------------------------- the leader


async def test_a_mesh_without_interception_has_no_addresses() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        before = store.revision
        meshes.have(A, B, intercepts=False)
        await asyncio.sleep(3600)
        assert store.revision == before


async def test_every_service_gets_an_address_with_the_first_workload_that_is_intercepted() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        meshes.have(A, B, intercepts=False)
        await asyncio.sleep(SETTLED)
        before = store.revision
        meshes.have(A, B)
        await asyncio.sleep(SETTLED)
        assert stored(store) == {A: first(A), B: first(B)}
        assert store.revision == before + 1, "many in one transaction"
        meshes.have(A, B, C)
        await asyncio.sleep(SETTLED)
        assert stored(store) == {A: first(A), B: first(B), C: first(C)}


async def test_a_service_with_an_address_of_its_own_gets_none() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        meshes.have(A, B, own={A: "10.0.0.7"})
        await asyncio.sleep(SETTLED)
        assert stored(store) == {B: first(B)}


async def test_more_services_than_go_into_one_transaction_all_get_one() -> None:
    store = MemoryStore()
    many = [Name("shop", f"s{number}") for number in range(250)]
    async with leading(store) as meshes:
        meshes.have(*many)
        await asyncio.sleep(SETTLED)
    assert stored(store) == {name: first(name) for name in many}


async def test_what_was_given_stays_when_the_last_intercepted_workload_goes() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        meshes.have(A)
        await asyncio.sleep(SETTLED)
        meshes.have(A, intercepts=False)
        await asyncio.sleep(2 * KEEP)
        assert stored(store) == {A: first(A)}


async def test_an_address_is_kept_for_a_while_after_its_service_is_gone_and_then_released() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        meshes.have(A, B)
        await asyncio.sleep(SETTLED)
        meshes.have(B)
        await asyncio.sleep(KEEP - 1)
        assert A in stored(store)
        await asyncio.sleep(2)
        assert stored(store) == {B: first(B)}, "nothing else had to happen for it"


async def test_a_service_that_comes_back_in_time_has_the_address_that_it_had() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        await MemoryKV(store).transact([Put(KEYS.address(A), encode(AddressRecord(A, "240.0.0.7")))])
        for services in ((A, B), (B,)):
            meshes.have(*services)
            await asyncio.sleep(KEEP - 1)
        meshes.have(A, B)
        await asyncio.sleep(2 * KEEP)
        assert stored(store)[A] == "240.0.0.7"


@pytest.mark.parametrize("key", [KEYS.manifest(f"smc.io/Service/{A}"), KEYS.service("files", A)])
async def test_a_service_that_a_newer_mesh_will_have_again_keeps_its_address(key: str) -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        meshes.have(A, B)
        await asyncio.sleep(SETTLED)
        meshes.have(B)
        await asyncio.sleep(KEEP - 1)
        await MemoryKV(store).transact([Put(key, b"it is there again")])
        await asyncio.sleep(SETTLED)
        assert A in stored(store)


async def test_a_virtual_address_that_another_service_gets_as_its_own_is_replaced() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        meshes.have(A, B)
        await asyncio.sleep(SETTLED)
        meshes.have(A, B, own={B: first(A)})
        await asyncio.sleep(SETTLED)
        assert stored(store)[A] == list(islice(candidates(A), 2))[1]


@pytest.mark.parametrize("value", [b"{}", encode(AddressRecord(A, "10.0.0.1")), encode(AddressRecord(A, "nonsense"))])
async def test_an_address_that_cannot_be_one_is_replaced(value: bytes) -> None:
    store = MemoryStore()
    await MemoryKV(store).transact([Put(KEYS.address(A), value)])
    async with leading(store) as meshes:
        meshes.have(A)
        await asyncio.sleep(SETTLED)
        assert stored(store) == {A: first(A)}


async def test_a_lost_answer_costs_a_retry_and_no_second_address() -> None:
    store = MemoryStore()
    kv = HostileKV(store)
    async with leading(store, kv) as meshes:
        kv.answers_lost, kv.requests_lost = 1, 2
        meshes.have(A, B)
        await asyncio.sleep(SETTLED)
        assert stored(store) == {A: first(A), B: first(B)}


async def test_while_the_store_is_lost_nothing_is_given_and_afterwards_it_is() -> None:
    store = MemoryStore()
    kv = HostileKV(store)
    async with leading(store, kv) as meshes:
        kv.disconnect()
        meshes.have(A)
        await asyncio.sleep(600)
        assert stored(store) == {}
        kv.reconnect()
        await asyncio.sleep(SETTLED)
        assert stored(store) == {A: first(A)}


async def test_what_somebody_else_wrote_meanwhile_is_read_again() -> None:
    store = MemoryStore()
    async with leading(store) as meshes:
        meshes.have(A)
        await asyncio.sleep(SETTLED)
        await MemoryKV(store).transact([Put(KEYS.address(B), encode(AddressRecord(B, "240.0.0.7")))])
        meshes.have(A, B)
        await asyncio.sleep(SETTLED)
        assert stored(store) == {A: first(A), B: "240.0.0.7"}


async def test_a_deposed_leader_gives_nothing_and_says_so() -> None:
    store = MemoryStore()
    meshes = Meshes()
    leadership = await elect(MemoryKV(store), KEYS)
    task = asyncio.create_task(addresses.run(leadership, MemoryKV(store), KEYS, meshes.all()))
    await elect(MemoryKV(store), KEYS)
    meshes.have(A)
    with pytest.RaisesGroup(Deposed):
        await asyncio.wait_for(task, 5)
    assert stored(store) == {}


# -------------------------------------------------------------------------------------------------------- any history

FEW = 12
"""Addresses, so that services get in each other's way; enough for all names."""
NAMES = tuple(Name("shop", f"s{number}") for number in range(8))
OWN = ("", "", "", "240.0.0.1", "240.0.0.2", "10.0.0.1")

STEPS = st.one_of(
    st.tuples(st.just("come"), st.sampled_from(NAMES), st.sampled_from(OWN)),
    st.tuples(st.just("go"), st.sampled_from(NAMES)),
    st.tuples(st.just("wait"), st.sampled_from((SETTLED, KEEP / 2, KEEP + 1))),
    st.tuples(st.just("lead")),
    st.tuples(st.just("lose"), st.integers(0, 2), st.integers(0, 2)),
)


def check(held: Mapping[Name, str], before: Mapping[Name, str], there: Mapping[Name, str]) -> None:
    """What holds whenever the leader has had time: `there` has each service and the address that it has of its own."""
    needing = {name for name, own in there.items() if not own}
    assert needing <= held.keys(), "everyone who needs one has one"
    assert len(set(held.values())) == len(held), "nobody has another's"
    assert not {held[name] for name in needing} & set(there.values()), "nor what another has of its own"
    for name in needing & before.keys():
        if before[name] not in there.values():
            assert held[name] == before[name], "and it stays as it is"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=25))
async def test_in_any_history_no_two_services_have_one_address_and_each_keeps_its_own(
    steps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_COUNT", FEW)
    store = MemoryStore()
    there: dict[Name, str] = {}
    before: dict[Name, str] = {}
    async with AsyncExitStack() as leaders:
        kv = HostileKV(store)
        meshes = await leaders.enter_async_context(leading(store, kv))
        for step in steps:
            match step:
                case ("come", name, own):
                    there[name] = own
                case ("go", name):
                    there.pop(name, None)
                case ("wait", seconds):
                    await asyncio.sleep(seconds)
                case ("lose", answers, requests):
                    kv.answers_lost, kv.requests_lost = answers, requests
                case ("lead",):
                    await leaders.aclose()
                    kv = HostileKV(store)
                    meshes = await leaders.enter_async_context(leading(store, kv))
            meshes.have(*there, own=there)
            await asyncio.sleep(SETTLED)
            held = stored(store)
            check(held, before, there)
            before = held
        await asyncio.sleep(2 * KEEP)
        assert stored(store).keys() <= there.keys(), "what is gone is released"
