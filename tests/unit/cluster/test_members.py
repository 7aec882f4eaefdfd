"""Each live replica is a member under its own name, and nobody else is. All in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from cluster.kv import Delete, Put
from cluster.members import GRACE, Members, NameTaken
from cluster.memory import MemoryKV, MemoryStore
from tests.unit.cluster.hostile import HostileKV

pytestmark = pytest.mark.looptime

PREFIX = "/m/members/"
TTL = 6.0


def now() -> float:
    return asyncio.get_running_loop().time()


class Replica:
    def __init__(self, store: MemoryStore, name: str, value: bytes = b"") -> None:
        self.kv = HostileKV(store)
        self.members = Members(self.kv, PREFIX)
        self.value = value
        self.task = asyncio.create_task(self.members.announce(name, lambda: self.value, ttl=TTL, interval=1.0))

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    async def crash(self) -> None:
        """End without a word to the store."""
        self.kv.disconnect()
        await self.leave()


class Cluster:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.kv = HostileKV(self.store)
        self.members = Members(self.kv, PREFIX)
        self.replicas: list[Replica] = []

    async def add(self, name: str, value: bytes = b"") -> Replica:
        self.replicas.append(Replica(self.store, name, value))
        await asyncio.sleep(0.1)
        return self.replicas[-1]

    def writes(self, name: str) -> int:
        return sum(item.key == PREFIX + name for batch in self.store._state.log for item in batch.puts)

    def expire(self, name: str) -> None:
        item = self.store.get(PREFIX + name)
        assert item is not None
        self.store.revoke(item.lease)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    for replica in made.replicas:
        await replica.leave()


def test_the_prefix_ends_with_a_slash() -> None:
    with pytest.raises(ValueError, match="slash"):
        Members(MemoryKV(), "/m/members")


# ------------------------------------------------------------------------------------------------------- being a member


async def test_who_is_announced_is_alive_for_as_long_as_it_is(cluster: Cluster) -> None:
    one = await cluster.add("one", b"1")
    await cluster.add("two", b"2")
    await asyncio.sleep(10 * TTL)
    assert await cluster.members.alive() == {"one": b"1", "two": b"2"}
    assert cluster.writes("one") == 1
    await one.leave()
    assert await cluster.members.alive() == {"two": b"2"}


async def test_a_replica_that_crashed_is_alive_no_longer_than_its_ttl(cluster: Cluster) -> None:
    one = await cluster.add("one")
    await asyncio.sleep(17)
    await one.crash()
    await asyncio.sleep(TTL + 0.1)
    assert await cluster.members.alive() == {}


async def test_what_a_replica_says_is_rewritten_at_most_once_an_interval(cluster: Cluster) -> None:
    one = await cluster.add("one")
    for number in range(100):
        one.value = f"{number}".encode()
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.1)
    assert await cluster.members.alive() == {"one": b"99"}
    assert 9 <= cluster.writes("one") <= 13


async def test_a_lost_lease_is_replaced(cluster: Cluster) -> None:
    await cluster.add("one", b"1")
    cluster.expire("one")
    await asyncio.sleep(TTL / 4 + 1.2)
    assert await cluster.members.alive() == {"one": b"1"}


@pytest.mark.parametrize("changes", [False, True])
async def test_a_lease_that_is_only_said_to_live_is_replaced(cluster: Cluster, changes: bool) -> None:
    one = await cluster.add("one", b"1")
    one.kv.renewals_lie = True
    cluster.expire("one")
    if changes:
        one.value = b"2"
    await asyncio.sleep(1.3 if changes else TTL / 4 + 1.2)
    assert await cluster.members.alive() == {"one": one.value}


async def test_a_replica_is_announced_again_when_the_store_is_found_again(cluster: Cluster) -> None:
    one = await cluster.add("one", b"1")
    one.kv.disconnect()
    await asyncio.sleep(60)
    assert await cluster.members.alive() == {}
    assert not one.task.done()
    one.kv.reconnect()
    await asyncio.sleep(2.5)
    assert await cluster.members.alive() == {"one": b"1"}


async def test_a_short_loss_of_the_store_writes_nothing(cluster: Cluster) -> None:
    one = await cluster.add("one", b"1")
    one.kv.disconnect()
    await asyncio.sleep(TTL / 2)
    one.kv.reconnect()
    await asyncio.sleep(5 * TTL)
    assert cluster.writes("one") == 1


async def test_a_full_store_keeps_its_members(cluster: Cluster) -> None:
    one = await cluster.add("one", b"1")
    one.kv.refuses = {"transact", "grant"}
    one.value = b"2"
    await asyncio.sleep(10 * TTL)
    assert await cluster.members.alive() == {"one": b"1"}
    one.kv.refuses = set()
    await asyncio.sleep(1.1)
    assert await cluster.members.alive() == {"one": b"2"}


@pytest.mark.parametrize("lost", ["answers_lost", "requests_lost"])
async def test_a_lost_answer_costs_a_replica_a_moment_and_not_its_name(cluster: Cluster, lost: str) -> None:
    one = Replica(cluster.store, "one", b"1")
    cluster.replicas.append(one)
    setattr(one.kv, lost, 1)
    await asyncio.sleep(0.5)
    assert await cluster.members.alive() == {"one": b"1"}
    one.value = b"2"
    setattr(one.kv, lost, 1)
    await asyncio.sleep(TTL)
    assert await cluster.members.alive() == {"one": b"2"}
    assert not one.task.done()


async def test_a_replica_whose_store_hangs_while_it_leaves_does_not_hang_with_it(cluster: Cluster) -> None:
    one = await cluster.add("one")
    one.kv.hangs = {"revoke"}
    began = now()
    await one.leave()
    assert now() - began <= 2.1


# ------------------------------------------------------------------------------------------------------- having a name


@pytest.mark.parametrize("says_something_new", [False, True])
async def test_a_second_replica_of_a_name_is_refused_and_the_first_unharmed(
    cluster: Cluster, says_something_new: bool
) -> None:
    one = await cluster.add("same", b"0")
    two = await cluster.add("same", b"two")
    began = now()
    while not two.task.done():
        if says_something_new:
            one.value += b"0"
        await asyncio.sleep(0.5)
        assert now() - began < 2 * TTL + GRACE + 1
    with pytest.raises(NameTaken, match="another name"):
        two.task.result()
    assert says_something_new == (now() - began < TTL / 2)
    assert await cluster.members.alive() == {"same": one.value}
    assert not one.task.done()
    assert all(item.value != b"two" for batch in cluster.store._state.log for item in batch.puts)


async def test_of_two_replicas_of_a_name_that_start_together_one_is_refused(cluster: Cluster) -> None:
    both = [Replica(cluster.store, "same", value) for value in (b"1", b"2")]
    cluster.replicas += both
    await asyncio.sleep(2 * TTL + GRACE + 1)
    assert [replica.task.done() for replica in both].count(True) == 1
    assert cluster.writes("same") == 1


async def test_a_replica_whose_key_another_took_overwrites_nothing(cluster: Cluster) -> None:
    one = await cluster.add("same", b"1")
    writer = MemoryKV(cluster.store)
    await writer.transact([Delete(PREFIX + "same")])
    await writer.transact([Put(PREFIX + "same", b"another's")])
    one.value = b"2"
    await asyncio.sleep(3 * TTL + GRACE)
    assert await cluster.members.alive() == {"same": b"another's"}
    with pytest.raises(NameTaken):
        one.task.result()


async def test_a_replica_that_was_killed_and_starts_again_gets_its_own_name_back(cluster: Cluster) -> None:
    await (await cluster.add("one", b"old")).crash()
    began = now()
    one = await cluster.add("one", b"new")
    async with asyncio.timeout(TTL + 2):
        while await cluster.members.alive() != {"one": b"new"}:  # noqa: ASYNC110 - only the store can tell
            await asyncio.sleep(0.1)
    assert now() - began > TTL / 2
    await asyncio.sleep(5 * TTL)
    assert not one.task.done()


async def test_a_name_is_given_back_also_when_the_store_gave_every_lease_its_whole_life_anew(cluster: Cluster) -> None:
    """As etcd does when its leader changes: that renews the leases of the dead, and proves nobody alive."""
    await (await cluster.add("one", b"old")).crash()
    one = await cluster.add("one", b"new")
    await asyncio.sleep(TTL * 0.8)
    item = cluster.store.get(PREFIX + "one")
    assert item is not None
    cluster.store.renew(item.lease)
    await asyncio.sleep(TTL + 2)
    assert not one.task.done()
    assert await cluster.members.alive() == {"one": b"new"}


async def test_a_time_without_the_store_proves_nothing_about_who_has_the_name(cluster: Cluster) -> None:
    await (await cluster.add("one", b"old")).crash()
    one = await cluster.add("one", b"new")
    one.kv.disconnect()
    # As long as the store has no quorum it ends no lease either.
    item = cluster.store.get(PREFIX + "one")
    assert item is not None
    for _ in range(10):
        cluster.store.renew(item.lease)
        await asyncio.sleep(TTL / 2)
    one.kv.reconnect()
    await asyncio.sleep(TTL + 2)
    assert not one.task.done()
    assert await cluster.members.alive() == {"one": b"new"}


# ------------------------------------------------------------------------------------------------------- watching them


async def test_who_watches_sees_each_come_change_and_go(cluster: Cluster) -> None:
    async with aclosing(cluster.members.watch()) as changes:
        assert await anext(changes) == {}
        one = await cluster.add("one", b"1")
        assert await anext(changes) == {"one": b"1"}
        one.value = b"2"
        assert await anext(changes) == {"one": b"2"}
        await cluster.add("two", b"2")
        assert await anext(changes) == {"one": b"2", "two": b"2"}
        await one.crash()
        began = now()
        assert await anext(changes) == {"two": b"2"}
        assert now() - began <= TTL + 1


async def test_a_lost_store_takes_no_member_away_and_a_compaction_hides_none_that_left(cluster: Cluster) -> None:
    one = await cluster.add("one", b"1")
    await cluster.add("two", b"2")
    seen: list[dict[str, bytes]] = []

    async def watch() -> None:
        async with aclosing(cluster.members.watch()) as changes:
            async for change in changes:
                seen.append(dict(change))  # noqa: PERF401 - it never ends

    watching = asyncio.create_task(watch())
    await asyncio.sleep(1)
    cluster.kv.disconnect()
    await one.leave()
    writer = MemoryKV(cluster.store)
    await writer.transact([Put("/other", b"")])
    await writer.compact(cluster.store.revision)
    await asyncio.sleep(10 * TTL)
    assert seen == [{"one": b"1", "two": b"2"}]
    cluster.kv.reconnect()
    await asyncio.sleep(3)
    assert seen == [{"one": b"1", "two": b"2"}, {"two": b"2"}]
    snapshot = cluster.store.snapshot()
    cluster.store.restore(snapshot, cluster_id=2)
    await asyncio.sleep(3)
    assert len(seen) == 2
    watching.cancel()
    await asyncio.wait([watching])
