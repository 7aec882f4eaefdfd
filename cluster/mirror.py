"""Follow prefixes of the store: list once, then apply every revision, for ever.

A replica acts on its mirror alone. While the store cannot be reached the mirror stays as it is: unknown, never none.

Three things run while a mirror is followed. One lists and watches. One probes: a watch that is cut off shows nothing
but a pause, so only a read can tell that the store is lost, or that it is another one than before. And one answers
`caught_up`, however many ask, with one read at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol, TypeVar

import structlog

from cluster.backoff import Backoff
from cluster.kv import (
    KV,
    Batch,
    ClusterChanged,
    Compacted,
    HistoryChanged,
    KeyValue,
    Listing,
    Refused,
    RevisionRegressed,
    Status,
    Survey,
    Unavailable,
    View,
)
from cluster.overlay import Overlay, is_much, merged

PROBE_EVERY = 2.0
"""Seconds between two reads that only ask whether the store is there, and the same."""
PROBE_DEADLINE = 3.0
"""Seconds for one of them."""
PATIENCE = 5.0
"""Seconds that `caught_up` waits at most."""
CALM = 10.0
"""Seconds after which a history counts as settled: the next change of it is answered at once again."""
STRIDE = 5_000
"""Keys of a listing that are looked at before others may run."""

log = structlog.get_logger(__name__)


class _Read(Protocol):
    """What every linearizable read says beside its answer."""

    @property
    def cluster_id(self) -> int: ...
    @property
    def revision(self) -> int: ...


_R = TypeVar("_R", bound=_Read)


class Mirror:
    """A copy of everything that `prefixes` name, each below `root`: one that ends with a slash all keys that begin
    with it, any other that one key.

    `root` is watched as a whole, so that `revision` moves with every write below it; of what is not followed the keys
    are kept and nothing else. Belongs to one event loop.
    """

    def __init__(self, kv: KV, root: str, prefixes: Sequence[str]) -> None:
        if strays := [prefix for prefix in prefixes if not prefix.startswith(root)]:
            raise ValueError(f"cannot follow {', '.join(strays)}: not below {root}")
        self.revision = 0
        """Everything that was committed below `root` up to here is known. Goes back only with a new generation."""
        self.generation = 0
        """Of the newest View; 0 before the first."""
        self.unreachable_since: float | None = None
        """When the first read was sent that the store has not answered, by the loop's clock; None while it answers."""
        self._kv = kv
        self._root = root
        self._followed = frozenset(prefix for prefix in prefixes if not prefix.endswith("/"))
        self._prefixes = tuple(prefix for prefix in prefixes if prefix.endswith("/"))
        self._cluster_id = 0
        self._doubted = True
        """Nothing that is held may be compared with what the store says next: it may be of another history."""
        self._table = _Table({})
        self._others: set[str] = set()
        self._touched = 0
        """The last revision that changed something that is followed."""
        self._changed: set[str] = set()
        """Since the View that was yielded last."""
        self._view: View | None = None
        self._arrived = asyncio.Event()
        self._moved = asyncio.Event()
        self._started = False
        self._waiting: set[asyncio.Future[str]] = set()
        self._asked = asyncio.Event()

    @property
    def view(self) -> View | None:
        """The newest View, whether `follow` has yielded it yet or not; None before the first."""
        if self._view is None and self.generation:
            self._view = View(
                self._cluster_id, self.generation, self._touched, self._table.frozen(), frozenset(self._changed)
            )
        return self._view

    # ------------------------------------------------------------------------------------------------------ following

    async def follow(self) -> AsyncGenerator[View, None]:
        """Yield the first View, then one whenever a followed key changed. Close it with `aclosing`; follow once.

        Revisions that come faster than Views are taken share one: no View is older than the mirror when it is yielded.
        After a compaction the next View has what changed meanwhile, deletions included. A store that turns out to have
        another history begins a new generation.
        """
        if self._started:
            raise RuntimeError("a mirror is followed once: make another one")
        self._started = True
        running = asyncio.create_task(self._run(), name=f"mirror of {self._root}")
        running.add_done_callback(lambda _: self._arrived.set())
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                if running.done():
                    # It ends with a fault only.
                    await running
                if (view := self.view) is not None:
                    self._changed.clear()
                    yield view
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            self._answer(self._waiting, "the store is not followed any more")

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        retry = Backoff()
        while True:
            began = loop.time()
            # A task of its own: a group that fails while it is cancelled forgets that it was cancelled.
            history = asyncio.create_task(self._history(), name="mirror: history")
            try:
                await asyncio.wait([history])
            finally:
                history.cancel()
                await asyncio.gather(history, return_exceptions=True)
            try:
                history.result()
            except* HistoryChanged as changed:
                self._doubted = True
                log.warning("the store has another history; all of it is read again", reason=str(changed.exceptions[0]))
            if loop.time() - began > CALM:
                retry.reset()
            await retry.wait()

    async def _history(self) -> None:
        """Copy the store until it turns out to be another one."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._copy(), name="mirror: copy")
            tasks.create_task(self._probe(), name="mirror: probe")
            tasks.create_task(self._serve(), name="mirror: caught up")

    async def _copy(self) -> None:
        retry = Backoff()
        while True:
            try:
                # A big store takes its time, and its client has a deadline.
                listing = await self._read(partial(self._kv.list, self._root), deadline=None)
                await self._load(listing)
                after = Status(listing.cluster_id, listing.revision)
                async with aclosing(self._kv.watch(self._root, after)) as batches:
                    async for batch in batches:
                        self._absorb(batch)
                        retry.reset()
            except Compacted as e:
                log.info("the watch fell behind what the store keeps; listing again", reason=str(e))
            except (Unavailable, Refused) as e:
                log.debug("listing again", reason=str(e))
            await retry.wait()

    async def _load(self, listing: Listing) -> None:
        """Replace what is held by a listing, and note the difference."""
        items: dict[str, KeyValue] = {}
        others: set[str] = set()
        before = self._table.frozen()
        changed = set(before)
        for number, item in enumerate(listing.items, 1):
            if not self._follows(item.key):
                others.add(item.key)
            else:
                items[item.key] = item
                if self._doubted or _differ(before.get(item.key), item):
                    changed.add(item.key)
                else:
                    changed.discard(item.key)
            if number % STRIDE == 0:
                await asyncio.sleep(0)
        self._table = _Table(items)
        self._others = others
        self._cluster_id = listing.cluster_id
        self.revision = listing.revision
        if self._doubted:
            self._doubted = False
            self.generation += 1
            self._note(changed)
        elif changed:
            self._note(changed)
        self._moved.set()

    def _absorb(self, batch: Batch) -> None:
        changed = []
        for item in batch.puts:
            if self._follows(item.key):
                self._table.put(item)
                changed.append(item.key)
            else:
                self._others.add(item.key)
        for key in batch.deletes:
            if self._follows(key):
                self._table.discard(key)
                changed.append(key)
            else:
                self._others.discard(key)
        self.revision = batch.revision
        if changed:
            self._note(changed)
        self._moved.set()

    def _note(self, changed: set[str] | list[str]) -> None:
        self._changed.update(changed)
        self._touched = self.revision
        self._view = None
        self._arrived.set()

    def _follows(self, key: str) -> bool:
        return key in self._followed or key.startswith(self._prefixes)

    # --------------------------------------------------------------------------------------------------------- asking

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY)
            try:
                await self._read(self._kv.status)
            except Unavailable:
                # Noted where it was found out.
                continue

    async def _read(self, read: Callable[[], Awaitable[_R]], deadline: float | None = PROBE_DEADLINE) -> _R:
        """Read linearizably, and note whether the store answers.

        Raises:
            Unavailable: it does not, or it refuses.
            HistoryChanged: the answer cannot follow what the mirror holds.
        """
        loop = asyncio.get_running_loop()
        asked, seen = loop.time(), 0 if self._doubted else self.revision
        try:
            async with asyncio.timeout(deadline):
                answer = await read()
        except (TimeoutError, Unavailable, Refused) as e:
            reason = str(e) or f"no answer within {deadline:g} s"
            if self.unreachable_since is None:
                self.unreachable_since = asked
                log.warning("the store cannot be read; what was read before stays", reason=reason)
            raise Unavailable(reason) from e
        if self.unreachable_since is not None:
            log.info("the store can be read again", seconds=round(loop.time() - self.unreachable_since, 1))
            self.unreachable_since = None
        if not self._doubted:
            if answer.cluster_id != self._cluster_id:
                raise ClusterChanged(self._cluster_id, answer.cluster_id)
            if answer.revision < seen:
                raise RevisionRegressed(seen, answer.revision)
        return answer

    async def caught_up(self) -> None:
        """Return once the mirror holds everything that was committed before the call.

        All that call it share reads: whoever comes while one is under way needs, and gets, the one after it.

        Raises:
            Unavailable: the store cannot be reached, or the watch lags behind, for PATIENCE seconds.
        """
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.add(answer)
        self._asked.set()
        try:
            async with asyncio.timeout(PATIENCE):
                refusal = await answer
        except TimeoutError:
            raise Unavailable(f"whether the mirror is up to date was not known within {PATIENCE:g} s") from None
        finally:
            self._waiting.discard(answer)
        if refusal:
            raise Unavailable(refusal)

    async def _serve(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            waiting, self._waiting = self._waiting, set()
            try:
                self._answer(waiting, await self._catch_up() if waiting else "")
            finally:
                # The next history answers those that this one could not.
                self._waiting |= {answer for answer in waiting if not answer.done()}
                if self._waiting:
                    self._asked.set()

    async def _catch_up(self) -> str:
        """Wait until the mirror holds what the store holds now; returns why that could not be, or ""."""
        try:
            async with asyncio.timeout(PATIENCE):
                survey = await self._read(partial(self._kv.survey, self._root))
                while not self._holds(survey):
                    self._moved.clear()
                    await self._moved.wait()
        except Unavailable as e:
            return str(e)
        except TimeoutError:
            return f"the mirror lags behind: it is at revision {self.revision}, the store at {survey.revision}"
        return ""

    def _holds(self, survey: Survey) -> bool:
        if self._doubted or survey.cluster_id != self._cluster_id:
            return False
        if self.revision >= survey.revision:
            return True
        # Others may write outside of `root`, which no watch of it shows: see `Survey`.
        return survey.mod_revision <= self.revision and survey.count == len(self._table) + len(self._others)

    @staticmethod
    def _answer(waiting: set[asyncio.Future[str]], refusal: str) -> None:
        for answer in waiting:
            if not answer.done():
                answer.set_result(refusal)


def _differ(before: KeyValue | None, now: KeyValue) -> bool:
    return before is None or before.mod_revision != now.mod_revision or before.value != now.value


class _Table:
    """Items that change, and copies of them that do not.

    A copy shares the base, which is never changed, and has the few changes since then for itself. So it costs about
    the square root of the number of items, and nothing is copied that nobody asked for.
    """

    def __init__(self, base: dict[str, KeyValue]) -> None:
        self._base = base
        self._delta: dict[str, KeyValue | None] = {}
        """What differs from the base; None: it is not there any more."""
        self._length = len(base)

    def __len__(self) -> int:
        return self._length

    def put(self, item: KeyValue) -> None:
        self._length += not self._has(item.key)
        self._delta[item.key] = item

    def discard(self, key: str) -> None:
        self._length -= self._has(key)
        if key in self._base:
            self._delta[key] = None
        else:
            self._delta.pop(key, None)

    def _has(self, key: str) -> bool:
        return self._delta[key] is not None if key in self._delta else key in self._base

    def frozen(self) -> Mapping[str, KeyValue]:
        """All of them. Any thread may read it. The order of its keys means nothing."""
        if is_much(len(self._delta), len(self._base)):
            self._base, self._delta = merged(self._base, self._delta), {}
        return Overlay(self._base, dict(self._delta))
