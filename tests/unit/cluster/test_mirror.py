"""The mirror holds what the store holds: after every change, through every loss, and across every history."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv import Delete, KeyValue, Put, Unavailable, View
from cluster.memory import MemoryKV, MemoryStore
from cluster.mirror import PATIENCE, PROBE_DEADLINE, PROBE_EVERY, Mirror, _Table
from tests.unit.cluster.hostile import HostileKV

pytestmark = pytest.mark.looptime

ROOT = "/m/"
FOLLOWED = (ROOT + "mesh", ROOT + "a/", ROOT + "b/")


class Followed:
    """A mirror of a store that others write to, and the Views that it has yielded."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.writer = MemoryKV(store)
        self.kv = HostileKV(store)
        self.mirror = Mirror(self.kv, ROOT, FOLLOWED)
        self.views: list[View] = []
        self.busy = asyncio.Event()
        self.busy.set()

    async def follow(self) -> None:
        async with aclosing(self.mirror.follow()) as views:
            async for view in views:
                self.views.append(view)
                await self.busy.wait()

    async def put(self, *keys: str, value: bytes = b"") -> int:
        return (await self.writer.transact([Put(ROOT + key, value) for key in keys])).revision

    async def delete(self, *keys: str) -> int:
        return (await self.writer.transact([Delete(ROOT + key) for key in keys])).revision

    def there(self) -> dict[str, KeyValue]:
        """What the store has of what is followed."""
        items = self.store.list(ROOT, 0)
        return {i.key: i for i in items if i.key == FOLLOWED[0] or i.key.startswith(FOLLOWED[1:])}

    @property
    def last(self) -> View:
        return self.views[-1]


@asynccontextmanager
async def following(*keys: str) -> AsyncIterator[Followed]:
    followed = Followed(MemoryStore())
    if keys:
        await followed.put(*keys)
    task = asyncio.create_task(followed.follow())
    await asyncio.sleep(0.1)
    yield followed
    task.cancel()
    await asyncio.wait([task])


def keys(*names: str) -> set[str]:
    return {ROOT + name for name in names}


# ------------------------------------------------------------------------------------------------------------ following


async def test_the_first_view_holds_whole_keys_and_everything_below_the_prefixes() -> None:
    async with following("mesh", "mesh2", "mesh/x", "a/1", "b/1", "c/1", "ab") as mesh:
        assert len(mesh.views) == 1
        assert mesh.last.items == mesh.there()
        assert mesh.last.changed == mesh.last.items.keys() == keys("mesh", "a/1", "b/1")
        assert (mesh.last.revision, mesh.last.generation, mesh.last.cluster_id) == (mesh.store.revision, 1, 1)


async def test_the_first_view_of_an_empty_store_is_empty_and_not_missing() -> None:
    async with following() as mesh:
        assert [dict(view.items) for view in mesh.views] == [{}]


async def test_each_later_view_says_what_changed_and_no_earlier_one_changes_with_it() -> None:
    async with following("a/1", "a/2", "b/1") as mesh:
        before = dict(mesh.last.items)
        await mesh.writer.transact([Put(ROOT + "a/1", b"new"), Put(ROOT + "a/3", b""), Delete(ROOT + "b/1")])
        await asyncio.sleep(0.1)
        assert mesh.last.changed == keys("a/1", "a/3", "b/1")
        assert mesh.last.items == mesh.there()
        assert mesh.last.items.keys() == keys("a/1", "a/2", "a/3")
        assert len(mesh.last.items) == 3
        assert mesh.views[0].items == before
        assert mesh.views[0].changed == before.keys()


async def test_revisions_that_come_while_nobody_takes_a_view_share_the_next_one() -> None:
    async with following("a/0") as mesh:
        mesh.busy.clear()
        for number in range(50):
            await mesh.put(f"a/{number}")
        await mesh.delete("a/7")
        await asyncio.sleep(1)
        assert len(mesh.views) == 2
        newest = mesh.mirror.view
        assert newest is not None
        assert newest.items == mesh.there()
        mesh.busy.set()
        await asyncio.sleep(0.1)
        assert len(mesh.views) == 3
        assert mesh.views[1].changed | mesh.views[2].changed == keys(*(f"a/{number}" for number in range(50)))
        assert mesh.last.items == mesh.there()


async def test_what_is_not_followed_moves_the_revision_and_makes_no_view() -> None:
    async with following("a/1") as mesh:
        revision = await mesh.put("c/1")
        await asyncio.sleep(0.1)
        assert mesh.mirror.revision == revision
        assert len(mesh.views) == 1
        assert mesh.mirror.view is mesh.last


async def test_one_change_among_many_keys_copies_none_of_them() -> None:
    async with following("a/1") as mesh:
        for start in range(0, 3000, 100):
            await mesh.put(*(f"b/{number}" for number in range(start, start + 100)))
        await asyncio.sleep(0.1)
        await mesh.put("a/1")
        await asyncio.sleep(0.1)
        assert mesh.views[-1].items._base is mesh.views[-2].items._base  # type: ignore[attr-defined]
        assert len(mesh.last.items._base) > 2900  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), max_size=400), st.integers(0, 300))
def test_a_table_equals_a_dictionary_and_its_copies_stay_as_they_were(steps: list[tuple[bool, int]], size: int) -> None:
    model = {f"{number}": KeyValue(f"{number}", b"", 1, 1) for number in range(size)}
    table = _Table(dict(model))
    copies = []
    for revision, (puts, number) in enumerate(steps):
        key = f"{number}"
        if puts:
            model[key] = KeyValue(key, b"", 1, revision)
            table.put(model[key])
        else:
            model.pop(key, None)
            table.discard(key)
        assert len(table) == len(model)
        if revision % 7 == 0:
            copies.append((table.frozen(), dict(model)))
    for frozen, expected in copies:
        assert dict(frozen) == expected
        assert len(frozen) == len(expected)
        assert all((f"{number}" in frozen) == (f"{number}" in expected) for number in range(301))


async def test_a_mirror_is_followed_once() -> None:
    async with following() as mesh:
        with pytest.raises(RuntimeError, match="make another"):
            await anext(mesh.mirror.follow())


def test_only_what_is_below_the_root_can_be_followed() -> None:
    with pytest.raises(ValueError, match="/other/"):
        Mirror(MemoryKV(), ROOT, ["/other/"])


# ------------------------------------------------------------------------------------------- compaction and restoration


async def test_what_was_deleted_behind_a_compaction_is_gone_from_the_next_view() -> None:
    async with following("a/kept", "a/deleted", "a/changed", "a/remade", "c/1") as mesh:
        mesh.kv.disconnect()
        await mesh.delete("a/deleted", "a/remade", "c/1")
        await mesh.put("a/changed", "a/new", "a/remade", value=b"new")
        await mesh.writer.compact(mesh.store.revision)
        await asyncio.sleep(10)
        assert len(mesh.views) == 1
        mesh.kv.reconnect()
        await asyncio.sleep(5)
        assert mesh.last.items == mesh.there()
        assert mesh.last.items.keys() == keys("a/kept", "a/changed", "a/remade", "a/new")
        assert mesh.last.changed == keys("a/deleted", "a/changed", "a/remade", "a/new")
        assert mesh.last.generation == 1
        await mesh.mirror.caught_up()


async def test_a_compaction_that_hides_no_change_makes_no_view() -> None:
    async with following("a/1") as mesh:
        mesh.kv.disconnect()
        await mesh.put("c/1")
        await mesh.writer.compact(mesh.store.revision)
        mesh.kv.reconnect()
        await asyncio.sleep(5)
        assert mesh.mirror.revision == mesh.store.revision
        assert len(mesh.views) == 1


@pytest.mark.parametrize("cluster_id", [1, 2])
async def test_a_restored_store_begins_a_generation_that_names_what_is_gone(cluster_id: int) -> None:
    async with following("a/old") as mesh:
        snapshot = mesh.store.snapshot()
        await mesh.put("a/lost")
        await asyncio.sleep(0.1)
        mesh.store.restore(snapshot, cluster_id=cluster_id)
        await asyncio.sleep(5)
        assert (mesh.last.generation, mesh.last.cluster_id) == (2, cluster_id)
        assert mesh.last.items == mesh.there()
        assert mesh.last.changed == keys("a/old", "a/lost")
        assert mesh.last.revision == mesh.mirror.revision == mesh.store.revision
        await mesh.put("a/next")
        await mesh.mirror.caught_up()
        await asyncio.sleep(0.1)
        assert mesh.last.items == mesh.there()
        assert (mesh.last.generation, mesh.last.changed) == (2, keys("a/next"))


@pytest.mark.parametrize("cluster_id", [1, 2])
async def test_another_history_is_noticed_though_the_watch_shows_nothing(cluster_id: int) -> None:
    async with following("a/old") as mesh:
        snapshot = mesh.store.snapshot()
        await mesh.put("a/lost")
        await asyncio.sleep(0.1)
        mesh.store.watches.clear()
        mesh.store.restore(snapshot, cluster_id=cluster_id)
        await asyncio.sleep(PROBE_EVERY + 1)
        assert mesh.last.generation == 2
        assert mesh.last.items == mesh.there()


async def test_a_generation_that_nobody_saw_is_part_of_the_next_ones_change() -> None:
    async with following("a/old") as mesh:
        first = mesh.store.snapshot()
        mesh.busy.clear()
        await mesh.put("a/1")
        await asyncio.sleep(0.1)
        for key in ("a/2", "a/3"):
            mesh.store.restore(first)
            await mesh.put(key)
            await asyncio.sleep(5)
        mesh.busy.set()
        await asyncio.sleep(0.1)
        assert mesh.last.generation == 3
        assert mesh.last.items.keys() == keys("a/old", "a/3")
        assert mesh.last.changed >= keys("a/old", "a/1", "a/3")


# ------------------------------------------------------------------------------------------------------- a lost store


@pytest.mark.parametrize("how", ["gone", "silent", "refusing"])
async def test_a_lost_store_is_known_within_seconds_and_changes_nothing(how: str) -> None:
    async with following("a/1") as mesh:
        lost = asyncio.get_running_loop().time()
        reads = {"status", "list", "survey"}
        if how == "gone":
            mesh.kv.disconnect()
        elif how == "silent":
            mesh.kv.hangs = reads
        else:
            mesh.kv.refuses = reads
        assert mesh.mirror.unreachable_since is None
        await asyncio.sleep(PROBE_EVERY + PROBE_DEADLINE + 0.1)
        since = mesh.mirror.unreachable_since
        assert since is not None
        assert lost <= since <= lost + PROBE_EVERY
        await asyncio.sleep(600)
        assert mesh.mirror.unreachable_since == since
        assert len(mesh.views) == 1
        mesh.kv.reconnect()
        mesh.kv.hangs = mesh.kv.refuses = set()
        await mesh.put("a/2")
        await asyncio.sleep(PROBE_EVERY + PROBE_DEADLINE)
        assert mesh.mirror.unreachable_since is None
        assert mesh.last.items == mesh.there()


async def test_a_store_that_is_lost_from_the_start_is_unknown_and_not_empty() -> None:
    mesh = Followed(MemoryStore())
    await mesh.put("a/1")
    mesh.kv.disconnect()
    task = asyncio.create_task(mesh.follow())
    await asyncio.sleep(60)
    assert mesh.views == []
    assert mesh.mirror.view is None
    assert mesh.mirror.unreachable_since == 0
    assert mesh.kv.calls["list"] < 60
    mesh.kv.reconnect()
    await asyncio.sleep(2.1)
    assert mesh.last.items == mesh.there()
    task.cancel()
    await asyncio.wait([task])


# ----------------------------------------------------------------------------------------------------------- caught up


async def test_caught_up_waits_for_what_was_committed_before_the_call() -> None:
    async with following("a/1") as mesh:
        mesh.kv.flowing.clear()
        await mesh.put("a/2")
        caught_up = asyncio.create_task(mesh.mirror.caught_up())
        await asyncio.sleep(PATIENCE / 2)
        assert not caught_up.done()
        mesh.kv.flowing.set()
        await caught_up
        assert mesh.mirror.view is not None
        assert mesh.mirror.view.items == mesh.there()


@pytest.mark.parametrize("key", ["a/1", "c/1"])
async def test_caught_up_waits_for_a_deletion(key: str) -> None:
    async with following("a/1", "c/1") as mesh:
        mesh.kv.flowing.clear()
        revision = await mesh.delete(key)
        caught_up = asyncio.create_task(mesh.mirror.caught_up())
        await asyncio.sleep(1)
        assert not caught_up.done()
        mesh.kv.flowing.set()
        await caught_up
        assert mesh.mirror.revision == revision


async def test_what_others_write_beside_the_root_keeps_nobody_waiting() -> None:
    async with following("a/1", "c/1") as mesh:
        loop = asyncio.get_running_loop()
        for _ in range(5):
            await mesh.writer.transact([Put("/other/1", b"")])
            began = loop.time()
            await mesh.mirror.caught_up()
            assert loop.time() - began < 0.1
            await mesh.put("c/1", "a/2")
            await mesh.delete("c/1", "a/2")
            await mesh.writer.transact([Put("/other/1", b"")])
            await mesh.mirror.caught_up()
        assert mesh.mirror.revision < mesh.store.revision


async def test_whoever_comes_while_a_read_is_under_way_shares_the_one_after_it() -> None:
    async with following("a/1") as mesh:
        mesh.kv.delay = 1.0
        first = asyncio.create_task(mesh.mirror.caught_up())
        await asyncio.sleep(0.5)
        mesh.kv.flowing.clear()
        others = [asyncio.create_task(mesh.mirror.caught_up()) for _ in range(100)]
        await asyncio.sleep(0.7)
        await first
        # Committed after `first` was answered, and before the read that the others share reached the store.
        await mesh.put("a/2")
        await asyncio.sleep(2)
        assert not any(other.done() for other in others)
        mesh.kv.flowing.set()
        await asyncio.gather(*others)
        assert mesh.kv.calls["survey"] == 2
        assert mesh.mirror.revision == mesh.store.revision


async def test_caught_up_gives_up_on_a_watch_that_lags() -> None:
    async with following("a/1") as mesh:
        mesh.kv.flowing.clear()
        await mesh.put("a/2")
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            await mesh.mirror.caught_up()
        assert asyncio.get_running_loop().time() - began == pytest.approx(PATIENCE, abs=0.1)


async def test_caught_up_gives_up_on_a_lost_store() -> None:
    async with following("a/1") as mesh:
        mesh.kv.disconnect()
        with pytest.raises(Unavailable):
            await mesh.mirror.caught_up()
        assert mesh.mirror.unreachable_since is not None
        mesh.kv.reconnect()
        await mesh.mirror.caught_up()
        assert mesh.mirror.unreachable_since is None


async def test_caught_up_never_trusts_a_revision_of_another_history() -> None:
    async with following("a/old") as mesh:
        snapshot = mesh.store.snapshot()
        await mesh.put("a/lost")
        await asyncio.sleep(0.1)
        mesh.store.watches.clear()
        mesh.store.restore(snapshot)
        await mesh.mirror.caught_up()
        assert mesh.mirror.generation == 2
        assert mesh.mirror.view is not None
        assert mesh.mirror.view.items == mesh.there()


async def test_one_that_stops_waiting_takes_nothing_from_the_others() -> None:
    async with following("a/1") as mesh:
        mesh.kv.delay = 1.0
        leaving, staying = (asyncio.create_task(mesh.mirror.caught_up()) for _ in range(2))
        await asyncio.sleep(0.5)
        leaving.cancel()
        await staying
        assert leaving.cancelled()


async def test_those_that_wait_are_told_when_the_mirror_ends() -> None:
    async with following("a/1") as mesh:
        mesh.kv.delay = 2.0
        waiting = asyncio.create_task(mesh.mirror.caught_up())
        await asyncio.sleep(1)
    with pytest.raises(Unavailable, match="not followed any more"):
        await waiting


# ----------------------------------------------------------------------------------------------------------- all of it


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_each_view_is_the_store_at_its_revision(seed: int) -> None:
    chance = random.Random(seed)
    names = [f"{prefix}/{number}" for prefix in "abc" for number in range(6)]
    history: dict[tuple[int, int], dict[str, KeyValue]] = {}
    async with following("mesh", "a/1") as mesh:
        snapshot = mesh.store.snapshot()
        restores = 0
        for _ in range(300):
            match chance.choices(
                ["put", "delete", "away", "back", "compact", "snapshot", "restore", "wait"],
                [40, 20, 4, 8, 4, 2, 1, 20],
            )[0]:
                case "put":
                    await mesh.put(*chance.sample(names, 2))
                case "delete":
                    await mesh.delete(*chance.sample(names, 2))
                case "away":
                    mesh.kv.disconnect()
                case "back":
                    mesh.kv.reconnect()
                case "compact":
                    await mesh.writer.compact(max(1, mesh.store.revision - chance.randrange(5)))
                case "snapshot":
                    snapshot = mesh.store.snapshot()
                case "restore":
                    restores += 1
                    mesh.store.restore(snapshot, cluster_id=mesh.store.cluster_id + 1)
                case _:
                    await asyncio.sleep(chance.choice((0, 0.1, 3)))
            history[mesh.store.cluster_id, mesh.store.revision] = mesh.there()
        mesh.kv.reconnect()
        await asyncio.sleep(10)
        await mesh.mirror.caught_up()
        assert mesh.last.items == mesh.there()
        assert mesh.last is mesh.mirror.view
        assert len(mesh.views) > 20
        held: dict[str, KeyValue] = {}
        for view in mesh.views:
            assert view.items == history.get((view.cluster_id, view.revision), view.items)
            # Whoever applies only what changed holds the same.
            for key in view.changed:
                held.pop(key, None)
                if key in view.items:
                    held[key] = view.items[key]
            assert MappingProxyType(held) == view.items
        assert mesh.last.generation <= restores + 1
