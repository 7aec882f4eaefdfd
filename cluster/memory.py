"""The store in this process, for tests and for a replica that is alone.

It keeps every promise of `kv.KV` that etcd keeps, on one event loop: revisions, guards, leases on the loop's clock,
whole revisions in watches, compaction and the limits of a transaction. Several clients share one `MemoryStore`, and
each can lose it and find it again:

    store = MemoryStore()
    mine, theirs = MemoryKV(store), MemoryKV(store)
    mine.disconnect()
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from cluster.kv import (
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
    Outcome,
    Put,
    Refused,
    Rejected,
    RevisionRegressed,
    Status,
    Survey,
    Unavailable,
    check_transaction,
)


@dataclass(slots=True)
class _State:
    """All that a snapshot of the store holds."""

    revision: int = 1
    compacted: int = 0
    items: dict[str, KeyValue] = field(default_factory=dict)
    log: list[Batch] = field(default_factory=list)
    """What each revision above the first changed; what is compacted is gone."""
    base: dict[str, KeyValue] = field(default_factory=dict)
    """What there was just before the log begins."""
    leases: dict[int, float] = field(default_factory=dict)
    """Seconds that each was granted."""


class MemoryStore:
    """What several `MemoryKV` share. Belongs to the event loop on which its leases were granted."""

    def __init__(self, cluster_id: int = 1) -> None:
        self.cluster_id = cluster_id
        self._state = _State()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._last_lease = 1000
        self.restored = 0
        """How many times."""
        self.watches: set[asyncio.Event] = set()
        """Each is set whenever something changed."""

    @property
    def revision(self) -> int:
        return self._state.revision

    def snapshot(self) -> object:
        """All of it as it is now, for `restore`."""
        return copy.deepcopy(self._state)

    def restore(self, snapshot: object, *, cluster_id: int | None = None) -> None:
        """Go back to a snapshot, leases included, as the same cluster or as another one. Watches end with an error."""
        if not isinstance(snapshot, _State):
            raise TypeError("only what `snapshot` returned can be restored")
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._state = copy.deepcopy(snapshot)
        self.cluster_id = self.cluster_id if cluster_id is None else cluster_id
        self.restored += 1
        for lease in self._state.leases:
            self.renew(lease)
        self.wake()

    def wake(self) -> None:
        for event in self.watches:
            event.set()

    # ----------------------------------------------------------------------------------------------------------- keys

    def get(self, key: str) -> KeyValue | None:
        return self._state.items.get(key)

    def list(self, prefix: str, revision: int) -> tuple[KeyValue, ...]:
        items = self._state.items if revision in (0, self._state.revision) else self._at(revision)
        return tuple(items[key] for key in sorted(items) if key.startswith(prefix))

    def _at(self, revision: int) -> dict[str, KeyValue]:
        state = self._state
        if revision > state.revision:
            raise RevisionRegressed(revision, state.revision)
        if revision < state.compacted:
            raise Compacted(revision)
        items = dict(state.base)
        for batch in state.log:
            if batch.revision > revision:
                break
            _apply(items, batch)
        return items

    def transact(self, operations: Sequence[Operation], guards: Sequence[Guard]) -> Outcome:
        state = self._state
        if not all(guard.holds(state.items.get(guard.key)) for guard in guards):
            return Rejected(state.revision, {guard.key: state.items.get(guard.key) for guard in guards})
        puts = [operation for operation in operations if isinstance(operation, Put)]
        for put in puts:
            if put.lease and put.lease not in state.leases:
                raise LeaseLost(f"{put.key} was not written: its lease {put.lease:x} does not exist")
        deletes = tuple(o.key for o in operations if isinstance(o, Delete) and o.key in state.items)
        if puts or deletes:
            self._commit(puts, deletes)
        return Committed(state.revision)

    def _commit(self, puts: Sequence[Put], deletes: tuple[str, ...]) -> None:
        state = self._state
        revision = state.revision + 1
        written = []
        for put in puts:
            old = state.items.get(put.key)
            created = old.create_revision if old else revision
            written.append(KeyValue(put.key, bytes(put.value), created, revision, put.lease))
        batch = Batch(revision, tuple(written), deletes)
        _apply(state.items, batch)
        state.log.append(batch)
        state.revision = revision
        self.wake()

    def next_batch(self, prefix: str, after: int) -> tuple[int, Batch | None]:
        """The first change below `prefix` later than `after`, and up to which revision that is known."""
        state = self._state
        if after < state.compacted:
            raise Compacted(state.compacted)
        first = state.log[0].revision if state.log else state.revision + 1
        for batch in islice(state.log, max(0, after + 1 - first), None):
            puts = tuple(item for item in batch.puts if item.key.startswith(prefix))
            deletes = tuple(key for key in batch.deletes if key.startswith(prefix))
            if puts or deletes:
                return batch.revision, Batch(batch.revision, puts, deletes)
        return max(after, state.revision), None

    def compact(self, revision: int) -> None:
        state = self._state
        if revision > state.revision:
            raise Refused(f"cannot compact to revision {revision}: the store is at {state.revision}")
        if revision <= state.compacted:
            return
        kept = []
        for batch in state.log:
            if batch.revision <= revision:
                _apply(state.base, batch)
            else:
                kept.append(batch)
        state.log = kept
        state.compacted = revision

    # --------------------------------------------------------------------------------------------------------- leases

    def grant(self, ttl: float) -> int:
        self._last_lease += 1
        self._state.leases[self._last_lease] = math.ceil(ttl)
        self.renew(self._last_lease)
        return self._last_lease

    def renew(self, lease: int) -> float:
        ttl = self._state.leases.get(lease)
        if ttl is None:
            raise LeaseLost(f"the lease {lease:x} does not exist")
        if timer := self._timers.pop(lease, None):
            timer.cancel()
        self._timers[lease] = asyncio.get_running_loop().call_later(ttl, self.revoke, lease)
        return ttl

    def revoke(self, lease: int) -> None:
        if timer := self._timers.pop(lease, None):
            timer.cancel()
        if self._state.leases.pop(lease, None) is None:
            return
        keys = tuple(key for key, item in sorted(self._state.items.items()) if item.lease == lease)
        if keys:
            self._commit((), keys)


class MemoryKV:
    """A client of a `MemoryStore`: `kv.KV`."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store or MemoryStore()
        self._connected = True
        self._closed = False

    def disconnect(self) -> None:
        """From now on every call raises Unavailable and watches pause."""
        self._connected = False

    def reconnect(self) -> None:
        """Find the store again; watches go on where they were."""
        self._connected = True
        self.store.wake()

    async def _reach(self) -> MemoryStore:
        # A real store lets others run meanwhile.
        await asyncio.sleep(0)
        self._check_open()
        if not self._connected:
            raise Unavailable("the store in memory is disconnected")
        return self.store

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("this client of the store in memory was closed")

    async def status(self) -> Status:
        store = await self._reach()
        return Status(store.cluster_id, store.revision)

    async def get(self, key: str) -> KeyValue | None:
        if not key:
            raise Refused("a read of an empty key: no key is empty")
        return (await self._reach()).get(key)

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        store = await self._reach()
        return Listing(store.cluster_id, revision or store.revision, store.list(prefix, revision))

    async def survey(self, prefix: str) -> Survey:
        store = await self._reach()
        items = store.list(prefix, 0)
        newest = max((item.mod_revision for item in items), default=0)
        return Survey(store.cluster_id, store.revision, len(items), newest)

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        check_transaction(operations, guards)
        return (await self._reach()).transact(operations, guards)

    async def watch(self, prefix: str, after: Status) -> AsyncGenerator[Batch, None]:
        store, seen, restored = self.store, after.revision, self.store.restored
        changed = asyncio.Event()
        store.watches.add(changed)
        try:
            while True:
                changed.clear()
                self._check_open()
                batch = None
                if self._connected:
                    if store.cluster_id != after.cluster_id:
                        raise ClusterChanged(after.cluster_id, store.cluster_id)
                    if store.revision < seen or store.restored != restored:
                        raise RevisionRegressed(seen, store.revision)
                    seen, batch = store.next_batch(prefix, seen)
                if batch is None:
                    await changed.wait()
                else:
                    # Each batch costs a turn of the loop, so that a long catch-up starves nobody.
                    await asyncio.sleep(0)
                    yield batch
        finally:
            store.watches.discard(changed)

    async def grant(self, ttl: float) -> int:
        return (await self._reach()).grant(ttl)

    async def renew(self, lease: int) -> float:
        return (await self._reach()).renew(lease)

    async def revoke(self, lease: int) -> None:
        (await self._reach()).revoke(lease)

    async def compact(self, revision: int) -> None:
        (await self._reach()).compact(revision)

    async def close(self) -> None:
        self._closed = True
        self.store.wake()


def _apply(items: dict[str, KeyValue], batch: Batch) -> None:
    for item in batch.puts:
        items[item.key] = item
    for key in batch.deletes:
        items.pop(key, None)
