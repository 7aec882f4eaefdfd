"""What every store must do: one class, run on the store in memory, on a real etcd, and on one over mutual TLS."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest

from cluster.kv import (
    KV,
    MOST_BYTES,
    MOST_OPERATIONS,
    OVERHEAD,
    Batch,
    ClusterChanged,
    Committed,
    Compacted,
    Delete,
    Guard,
    KeyValue,
    LeaseLost,
    Listing,
    Operation,
    Put,
    Refused,
    Rejected,
    RevisionRegressed,
    Status,
    Survey,
    Unavailable,
)
from cluster.memory import MemoryKV
from tests.contract.etcd_server import EtcdServer, certificates, etcds


async def committed(kv: KV, *operations: Operation) -> int:
    outcome = await kv.transact(operations)
    assert isinstance(outcome, Committed)
    return outcome.revision


async def put(kv: KV, key: str, value: bytes = b"v", lease: int = 0) -> int:
    return await committed(kv, Put(key, value, lease))


async def take(kv: KV, prefix: str, after: Status, number: int) -> list[Batch]:
    """The next batches of a watch."""
    taken: list[Batch] = []
    async with asyncio.timeout(30), aclosing(kv.watch(prefix, after)) as batches:
        async for batch in batches:
            taken.append(batch)
            if len(taken) == number:
                break
    return taken


class KVContract:
    @pytest.fixture
    @abstractmethod
    def kv(self) -> KV:
        """A client of a store that others may use as well."""

    @pytest.fixture
    @abstractmethod
    def other(self, kv: KV) -> KV:
        """Another client of the same store."""

    @pytest.fixture
    def root(self) -> str:
        """Below it nobody else has keys."""
        return f"/{uuid.uuid4()}/"

    # -------------------------------------------------------------------------------------------------------- reading

    async def test_a_key_that_is_not_there_is_none(self, kv: KV, root: str) -> None:
        assert await kv.get(root) is None

    @pytest.mark.parametrize("value", [b"", b"text", bytes(range(256)), b"x" * 1_000_000], ids=len)
    async def test_a_value_is_any_bytes(self, kv: KV, other: KV, root: str, value: bytes) -> None:
        await put(kv, root, value)
        item = await other.get(root)
        assert item is not None
        assert item.value == value

    async def test_a_key_is_any_text_that_is_not_empty(self, kv: KV, root: str) -> None:
        key = f"{root}ключ/名前/🔑 with spaces\n"
        revision = await put(kv, key)
        assert await kv.get(key) == KeyValue(key, b"v", revision, revision)
        with pytest.raises(Refused):
            await kv.get("")
        with pytest.raises(Refused):
            await kv.transact([Put("", b"v")])
        with pytest.raises(Refused):
            await kv.transact([], [Guard("", mod_revision=0)])

    async def test_a_key_remembers_when_it_was_made_and_last_written(self, kv: KV, root: str) -> None:
        made = await put(kv, root, b"1")
        written = await put(kv, root, b"2")
        assert await kv.get(root) == KeyValue(root, b"2", made, written)

    async def test_a_key_that_was_deleted_is_made_anew(self, kv: KV, root: str) -> None:
        await put(kv, root)
        await committed(kv, Delete(root))
        assert await kv.get(root) is None
        again = await put(kv, root)
        assert await kv.get(root) == KeyValue(root, b"v", again, again)

    async def test_each_change_raises_the_revision_by_one(self, kv: KV, other: KV, root: str) -> None:
        before = await kv.status()
        assert await put(kv, f"{root}a") == before.revision + 1
        assert await committed(other, Put(f"{root}b", b""), Delete(f"{root}a")) == before.revision + 2
        assert await kv.status() == await other.status() == Status(before.cluster_id, before.revision + 2)

    async def test_a_listing_has_what_begins_with_the_prefix_in_order(self, kv: KV, root: str) -> None:
        keys = [f"{root}a/", f"{root}a/1", f"{root}a/10", f"{root}a/2", f"{root}a/é"]
        beside = [f"{root}a", f"{root}a0", f"{root}b", root]
        revision = await committed(kv, *(Put(key, key.encode()) for key in reversed(keys + beside)))
        at = await kv.status()
        assert await kv.list(f"{root}a/") == Listing(
            at.cluster_id, at.revision, tuple(KeyValue(key, key.encode(), revision, revision) for key in keys)
        )
        assert (await kv.list(f"{root}c")).items == ()

    async def test_the_empty_prefix_lists_everything(self, kv: KV, root: str) -> None:
        await put(kv, f"{root}a")
        assert [item.key for item in (await kv.list("")).items if item.key.startswith(root)] == [f"{root}a"]

    async def test_a_listing_is_of_one_revision_however_long_it_is(self, kv: KV, other: KV, root: str) -> None:
        keys = [f"{root}{number:04}" for number in range(1100)]
        for start in range(0, len(keys), 100):
            await committed(kv, *(Put(key, b"old") for key in keys[start : start + 100]))

        async def write() -> None:
            for number in itertools.count():
                await committed(other, *(Put(key, b"%d" % number) for key in keys[::10]))

        writing = asyncio.create_task(write())
        for _ in range(5):
            listing = await kv.list(root)
            assert [item.key for item in listing.items] == keys
            assert len({item.value for item in listing.items[::10]}) == 1
            assert max(item.mod_revision for item in listing.items) <= listing.revision
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    async def test_the_past_can_be_listed(self, kv: KV, root: str) -> None:
        first = await committed(kv, Put(f"{root}a", b"1"), Put(f"{root}b", b"1"))
        second = await committed(kv, Put(f"{root}a", b"2"), Delete(f"{root}b"), Put(f"{root}c", b"2"))
        await put(kv, f"{root}a", b"3")
        then = await kv.list(root, revision=first)
        assert then.revision == first
        assert {item.key: item.value for item in then.items} == {f"{root}a": b"1", f"{root}b": b"1"}
        then = await kv.list(root, revision=second)
        assert {item.key: item.value for item in then.items} == {f"{root}a": b"2", f"{root}c": b"2"}
        assert then.items[0] == KeyValue(f"{root}a", b"2", first, second)

    async def test_the_future_cannot_be_listed(self, kv: KV, root: str) -> None:
        now = (await kv.status()).revision
        with pytest.raises(RevisionRegressed) as regressed:
            await kv.list(root, revision=now + 1000)
        assert (regressed.value.seen, regressed.value.found) == (now + 1000, now)

    async def test_a_survey_counts_and_tells_the_newest(self, kv: KV, root: str) -> None:
        at = await kv.status()
        assert await kv.survey(root) == Survey(at.cluster_id, at.revision, 0, 0)
        revision = await committed(kv, Put(f"{root}a", b""), Put(f"{root}b", b""))
        await put(kv, f"{root}a/x")
        beside = await put(kv, f"{root[:-1]}0")
        assert await kv.survey(root) == Survey(at.cluster_id, beside, 3, revision + 1)
        gone = await committed(kv, Delete(f"{root}a/x"))
        assert await kv.survey(root) == Survey(at.cluster_id, gone, 2, revision)

    # --------------------------------------------------------------------------------------------------- transactions

    async def test_a_transaction_happens_at_one_revision(self, kv: KV, root: str) -> None:
        made = await committed(kv, Put(f"{root}a", b"1"), Put(f"{root}b", b"1"))
        changed = await committed(kv, Put(f"{root}a", b"2"), Delete(f"{root}b"), Put(f"{root}c", b"2"))
        assert changed == made + 1
        assert (await kv.list(root)).items == (
            KeyValue(f"{root}a", b"2", made, changed),
            KeyValue(f"{root}c", b"2", changed, changed),
        )

    async def test_guards_hold_as_they_say(self, kv: KV, root: str) -> None:
        made = await put(kv, f"{root}there", b"value")
        written = await put(kv, f"{root}there", b"value")
        for key in (f"{root}there", f"{root}absent"):
            item = await kv.get(key)
            for create, mod, value in itertools.product(
                (None, 0, made, written), (None, 0, made, written), (None, b"", b"value", b"other")
            ):
                if (create, mod, value) == (None, None, None):
                    continue
                guard = Guard(key, create, mod, value)
                outcome = await kv.transact([], [guard])
                assert isinstance(outcome, Committed) == guard.holds(item), guard
                assert outcome.revision == written

    async def test_a_guarded_write_happens_if_its_guards_hold(self, kv: KV, root: str) -> None:
        made = await put(kv, f"{root}a", b"1")
        guards = [Guard(f"{root}a", create_revision=made, value=b"1"), Guard(f"{root}b", create_revision=0)]
        assert await kv.transact([Put(f"{root}b", b"2")], guards) == Committed(made + 1)
        assert await kv.get(f"{root}b") == KeyValue(f"{root}b", b"2", made + 1, made + 1)

    async def test_one_guard_that_does_not_hold_stops_everything(self, kv: KV, root: str) -> None:
        a, b = await put(kv, f"{root}a", b"1"), await put(kv, f"{root}b", b"2")
        guards = [
            Guard(f"{root}a", mod_revision=a),
            Guard(f"{root}b", mod_revision=a),
            Guard(f"{root}c", create_revision=0),
            Guard(f"{root}a", value=b"1"),
        ]
        outcome = await kv.transact([Put(f"{root}a", b"3"), Delete(f"{root}b")], guards)
        assert outcome == Rejected(
            b,
            {
                f"{root}a": KeyValue(f"{root}a", b"1", a, a),
                f"{root}b": KeyValue(f"{root}b", b"2", b, b),
                f"{root}c": None,
            },
        )
        assert [item.value for item in (await kv.list(root)).items] == [b"1", b"2"]
        assert (await kv.status()).revision == b

    async def test_of_many_that_create_a_key_one_wins(self, kv: KV, other: KV, root: str) -> None:
        outcomes = await asyncio.gather(
            *(
                client.transact([Put(root, b"%d" % number)], [Guard(root, create_revision=0)])
                for number, client in enumerate([kv, other] * 10)
            )
        )
        [winner] = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Committed)]
        item = await kv.get(root)
        assert item is not None
        assert item.value == b"%d" % winner
        assert all(outcome.found == {root: item} for outcome in outcomes if isinstance(outcome, Rejected))

    async def test_deleting_what_is_not_there_changes_nothing(self, kv: KV, root: str) -> None:
        before = await put(kv, f"{root}a")
        assert await committed(kv, Delete(f"{root}b")) == before
        assert (await kv.status()).revision == before

    async def test_a_transaction_of_nothing_reads_the_revision(self, kv: KV, root: str) -> None:
        before = await put(kv, root)
        assert await kv.transact([]) == Committed(before)
        outcome = await kv.transact([], [Guard(root, create_revision=0)])
        assert outcome == Rejected(before, {root: KeyValue(root, b"v", before, before)})

    @pytest.mark.parametrize("second", [Put("k", b"2"), Delete("k")])
    async def test_a_key_twice_is_refused(self, kv: KV, root: str, second: Operation) -> None:
        before = await kv.status()
        with pytest.raises(Refused, match="k twice"):
            await kv.transact([Put("k", b"1"), Put(root, b""), second])
        assert await kv.status() == before

    async def test_128_operations_are_accepted_and_129_refused(self, kv: KV, root: str) -> None:
        puts = [Put(f"{root}{number:03}", b"") for number in range(MOST_OPERATIONS + 1)]
        with pytest.raises(Refused, match="129 operations"):
            await kv.transact(puts)
        assert (await kv.survey(root)).count == 0
        revision = await committed(kv, *puts[:-1])
        assert await kv.survey(root) == Survey((await kv.status()).cluster_id, revision, MOST_OPERATIONS, revision)

    async def test_128_conditions_are_accepted_and_129_refused(self, kv: KV, root: str) -> None:
        guards = [Guard(f"{root}{number:03}", create_revision=0) for number in range(MOST_OPERATIONS + 1)]
        with pytest.raises(Refused, match="129 guards"):
            await kv.transact([Put(root, b"")], guards)
        with pytest.raises(Refused, match="130 guards"):
            await kv.transact([Put(root, b"")], [Guard(g.key, 0, 0) for g in guards[:65]])
        revision = await put(kv, guards[0].key)
        outcome = await kv.transact([Put(root, b"")], guards[:-1])
        assert isinstance(outcome, Rejected)
        assert list(outcome.found) == [guard.key for guard in guards[:-1]]
        assert [item for item in outcome.found.values() if item] == [KeyValue(guards[0].key, b"v", revision, revision)]
        assert isinstance(await kv.transact([Put(root, b"")], guards[1:]), Committed)

    @pytest.mark.parametrize("number", [1, MOST_OPERATIONS])
    async def test_what_is_just_not_too_large_is_accepted(self, kv: KV, root: str, number: int) -> None:
        keys = [f"{root}{n:03}" for n in range(number)]
        guards = [Guard(key, create_revision=0) for key in keys]
        room = MOST_BYTES - sum(3 * len(key) + 2 * OVERHEAD for key in keys)
        values = [b"x" * (room // number)] * (number - 1)
        values.append(b"x" * (room - sum(map(len, values))))
        with pytest.raises(Refused, match="too large"):
            await kv.transact([Put(keys[0], values[0] + b"x"), *map(Put, keys[1:], values[1:])], guards)
        assert (await kv.survey(root)).count == 0
        assert isinstance(await kv.transact(list(map(Put, keys, values)), guards), Committed)

    # ------------------------------------------------------------------------------------------------------- watching

    async def test_a_watch_yields_whole_revisions_in_order(self, kv: KV, other: KV, root: str) -> None:
        after = await kv.status()
        watching = asyncio.create_task(take(kv, root, after, 3))
        await asyncio.sleep(0.1)
        first = await committed(other, Put(f"{root}a", b"1"), Put(f"{root}b", b"1"))
        await put(other, f"{root[:-1]}0")
        await committed(other, Put(f"{root}a", b"2"), Delete(f"{root}b"), Delete(f"{root}nothing"))
        await committed(other, Delete(f"{root}nothing"))
        await committed(other, Delete(f"{root}a"))
        a, b = f"{root}a", f"{root}b"
        assert await watching == [
            Batch(first, (KeyValue(a, b"1", first, first), KeyValue(b, b"1", first, first)), ()),
            Batch(first + 2, (KeyValue(a, b"2", first, first + 2),), (b,)),
            Batch(first + 3, (), (a,)),
        ]

    async def test_a_watch_begins_right_after_the_given_revision(self, kv: KV, root: str) -> None:
        cluster_id = (await kv.status()).cluster_id
        revisions = [await put(kv, f"{root}a", b"%d" % number) for number in range(10)]
        for start in (0, 4, 8):
            taken = await take(kv, root, Status(cluster_id, revisions[start]), 9 - start)
            assert [batch.revision for batch in taken] == revisions[start + 1 :]

    async def test_a_watch_may_be_of_one_key_or_of_everything(self, kv: KV, root: str) -> None:
        after = await kv.status()
        revision = await put(kv, root)
        for prefix in (root, "", root[:-1]):
            assert await take(kv, prefix, after, 1) == [
                Batch(revision, (KeyValue(root, b"v", revision, revision),), ())
            ]

    async def test_a_watch_misses_nothing_that_is_written_meanwhile(self, kv: KV, other: KV, root: str) -> None:
        after = await kv.status()
        watching = [asyncio.create_task(take(client, root, after, 200)) for client in (kv, other, kv)]
        revisions = [
            await committed(other, Put(f"{root}{number}", b""), Put(f"{root}same", b"%d" % number))
            for number in range(200)
        ]
        for taken in await asyncio.gather(*watching):
            assert [batch.revision for batch in taken] == revisions
            assert [sorted(item.key for item in batch.puts) for batch in taken] == [
                [f"{root}{number}", f"{root}same"] for number in range(200)
            ]

    async def test_a_watch_that_was_cancelled_can_be_taken_up_again(self, kv: KV, root: str) -> None:
        after = await kv.status()
        watching = asyncio.create_task(take(kv, root, after, 1))
        await asyncio.sleep(0.1)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        revision = await put(kv, root)
        assert [batch.revision for batch in await take(kv, root, after, 1)] == [revision]

    async def test_a_watch_tells_the_lease_of_a_key(self, kv: KV, root: str) -> None:
        after, lease = await kv.status(), await kv.grant(60)
        revision = await put(kv, root, lease=lease)
        [batch] = await take(kv, root, after, 1)
        assert batch.puts == (KeyValue(root, b"v", revision, revision, lease),)
        await kv.revoke(lease)

    async def test_a_watch_from_a_compacted_revision_says_so(self, kv: KV, root: str) -> None:
        before = await kv.status()
        revisions = [await put(kv, f"{root}a", b"%d" % number) for number in range(5)]
        await kv.compact(revisions[3])
        for after in (before.revision, revisions[0], revisions[2]):
            with pytest.raises(Compacted) as compacted:
                await take(kv, root, Status(before.cluster_id, after), 1)
            assert compacted.value.revision == revisions[3]
        [batch] = await take(kv, root, Status(before.cluster_id, revisions[3]), 1)
        assert batch.revision == revisions[4]

    async def test_a_deletion_that_was_compacted_away_is_not_passed_over(self, kv: KV, root: str) -> None:
        cluster_id = (await kv.status()).cluster_id
        seen = await put(kv, f"{root}a")
        deleted = await committed(kv, Delete(f"{root}a"))
        await put(kv, f"{root}b")
        await kv.compact(deleted)
        with pytest.raises(Compacted):
            await take(kv, root, Status(cluster_id, seen), 1)

    async def test_a_watch_after_a_revision_that_is_still_to_come_tells_of_a_restore(self, kv: KV, root: str) -> None:
        now = await kv.status()
        with pytest.raises(RevisionRegressed) as regressed:
            await take(kv, root, Status(now.cluster_id, now.revision + 100), 1)
        assert (regressed.value.seen, regressed.value.found) == (now.revision + 100, now.revision)

    async def test_a_watch_after_another_clusters_revision_says_so(self, kv: KV, root: str) -> None:
        now = await kv.status()
        with pytest.raises(ClusterChanged) as changed:
            await take(kv, root, Status(now.cluster_id + 1, now.revision), 1)
        assert (changed.value.seen, changed.value.found) == (now.cluster_id + 1, now.cluster_id)

    # --------------------------------------------------------------------------------------------------------- leases

    async def test_a_lease_lives_for_whole_seconds(self, kv: KV) -> None:
        lease = await kv.grant(29.2)
        assert lease != 0
        assert await kv.renew(lease) == 30
        await kv.revoke(lease)

    async def test_the_keys_of_a_revoked_lease_go_at_one_revision(self, kv: KV, other: KV, root: str) -> None:
        lease, another = await kv.grant(60), await kv.grant(60)
        await committed(kv, Put(f"{root}a", b"", lease), Put(f"{root}b", b"", lease), Put(f"{root}c", b"", another))
        await put(other, f"{root}d", lease=lease)
        await put(kv, f"{root}e", lease=lease)
        await put(kv, f"{root}e")
        after = await kv.status()
        await other.revoke(lease)
        [batch] = await take(kv, root, after, 1)
        assert batch.revision == after.revision + 1
        assert (batch.puts, sorted(batch.deletes)) == ((), [f"{root}a", f"{root}b", f"{root}d"])
        assert [(item.key, item.lease) for item in (await kv.list(root)).items] == [
            (f"{root}c", another),
            (f"{root}e", 0),
        ]
        await kv.revoke(another)

    async def test_a_lease_that_is_not_renewed_expires_with_its_keys(self, kv: KV, root: str) -> None:
        kept, lost = await kv.grant(2), await kv.grant(2)
        await committed(kv, Put(f"{root}kept", b"", kept), Put(f"{root}lost", b"", lost))
        after = await kv.status()

        async def renew() -> None:
            while True:
                await kv.renew(kept)
                await asyncio.sleep(0.5)

        renewing = asyncio.create_task(renew())
        [batch] = await take(kv, root, after, 1)
        assert batch.deletes == (f"{root}lost",)
        with pytest.raises(LeaseLost):
            await kv.renew(lost)
        with pytest.raises(LeaseLost):
            await put(kv, f"{root}lost", lease=lost)
        assert [item.key for item in (await kv.list(root)).items] == [f"{root}kept"]
        renewing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await renewing
        await kv.revoke(kept)

    async def test_a_lease_that_is_gone_is_lost_to_all_but_its_revoker(self, kv: KV, root: str) -> None:
        lease = await kv.grant(60)
        await kv.revoke(lease)
        await kv.revoke(lease)
        with pytest.raises(LeaseLost, match=f"{lease:x}"):
            await kv.renew(lease)
        with pytest.raises(LeaseLost, match=f"{lease:x}"):
            await kv.transact([Put(f"{root}a", b""), Put(f"{root}b", b"", lease)])
        assert (await kv.survey(root)).count == 0

    # ------------------------------------------------------------------------------------------------------ compaction

    async def test_compaction_forgets_the_past_and_keeps_the_present(self, kv: KV, root: str) -> None:
        revisions = [await put(kv, f"{root}{number % 2}", b"%d" % number) for number in range(6)]
        await kv.compact(revisions[4])
        await kv.compact(revisions[4])
        await kv.compact(revisions[1])
        with pytest.raises(Compacted):
            await kv.list(root, revision=revisions[3])
        then = await kv.list(root, revision=revisions[4])
        assert [item.value for item in then.items] == [b"4", b"3"]
        assert [item.value for item in (await kv.list(root)).items] == [b"4", b"5"]
        assert (await kv.status()).revision == revisions[5]

    async def test_the_future_cannot_be_compacted(self, kv: KV) -> None:
        now = await kv.status()
        with pytest.raises(Refused):
            await kv.compact(now.revision + 1000)
        assert await kv.status() == now

    # --------------------------------------------------------------------------------------------------------- closing

    async def test_what_was_closed_is_unavailable(self, kv: KV, other: KV, root: str) -> None:
        after = await kv.status()
        watching = asyncio.create_task(take(kv, root, after, 1))
        await asyncio.sleep(0.1)
        await kv.close()
        await kv.close()
        with pytest.raises(Unavailable, match="closed"):
            await watching
        for call in (
            kv.status(),
            kv.get(root),
            kv.list(root),
            kv.survey(root),
            kv.transact([Put(root, b"")]),
            kv.grant(60),
            kv.renew(1),
            kv.revoke(1),
            kv.compact(1),
            take(kv, root, after, 1),
        ):
            with pytest.raises(Unavailable, match="closed"):
                await call
        assert await other.status() == after


@pytest.mark.looptime
class TestMemoryKV(KVContract):
    @pytest.fixture
    def kv(self) -> KV:
        return MemoryKV()

    @pytest.fixture
    def other(self, kv: MemoryKV) -> KV:
        return MemoryKV(kv.store)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcds(tmp_path_factory.mktemp("etcd")) as factory:
        yield factory.one()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    directory = tmp_path_factory.mktemp("etcd")
    with etcds(directory) as factory:
        yield factory.one(tls=certificates(directory))


class TestEtcdKV(KVContract):
    @pytest.fixture
    def server(self, plain: EtcdServer) -> EtcdServer:
        return plain

    @pytest.fixture
    async def kv(self, server: EtcdServer) -> AsyncIterator[KV]:
        await server.until_ready()
        async with server.client(timeout=20) as kv:
            yield kv

    @pytest.fixture
    async def other(self, server: EtcdServer) -> AsyncIterator[KV]:
        async with server.client(timeout=20) as kv:
            yield kv


class TestEtcdKVOverTLS(TestEtcdKV):
    @pytest.fixture
    def server(self, encrypted: EtcdServer) -> EtcdServer:
        return encrypted
