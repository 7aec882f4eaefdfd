"""Who leads, and the proof of it that etcd checks with every write: the fence.

A leader holds a leased key. The fence says that the key is still the one that this term created, and that the pinned
keys are as they were when it was won. Clocks and renewals only decide when a leader stops of its own accord, which
spares the next one a wait; what keeps two leaders from writing is the fence alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from cluster.backoff import Backoff
from cluster.kv import (
    KV,
    MOST_OPERATIONS,
    Ambiguous,
    ClusterChanged,
    Committed,
    Guard,
    HistoryChanged,
    KeyValue,
    LeaseLost,
    Operation,
    Outcome,
    Put,
    Refused,
    Rejected,
    RevisionRegressed,
    Status,
    StoreError,
    Unavailable,
)

RESIGN_DEADLINE = 2.0
"""Seconds for giving back a lease; after that it ends by itself."""
CALM = 60.0
"""Seconds of leading after which earlier failures of the work are forgotten."""

log = structlog.get_logger(__name__)


class Deposed(StoreError):
    """This leadership is over: its fence did not hold, or its time ran out. Nothing was written."""


class Leadership:
    """The right to write, as one term of leadership has it."""

    def __init__(
        self,
        kv: KV,
        name: str,
        fence: Sequence[Guard],
        revision: int,
        *,
        until: float = math.inf,
        on_fenced: Callable[[], None] = lambda: None,
    ) -> None:
        """`until` is the time by the loop's clock at which it ends unless it is extended."""
        self.name = name
        self.fence = tuple(fence)
        self.revision = revision
        """At which it was won."""
        self.until = until
        self.reason = ""
        """Why it ended; "" while it lasts."""
        self._kv = kv
        self._on_fenced = on_fenced

    @property
    def over(self) -> bool:
        """Whether it ended, as far as can be known here. One that is not over may still be fenced."""
        if not self.reason and asyncio.get_running_loop().time() >= self.until:
            self.end("the lease was not renewed in time")
        return bool(self.reason)

    def end(self, reason: str) -> Deposed:
        """End it for good; returns what to raise. The first reason stays."""
        self.reason = self.reason or reason
        return Deposed(f"{self.name} leads no longer: {self.reason}")

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        """As `KV.transact`, with the fence added. Rejected means that only the caller's guards did not hold.

        Raises:
            Deposed: the fence did not hold; the leadership ends. Or it was over before, and the store was not asked.
            Ambiguous: as from `KV.transact`. If it is applied late, then as this leader or not at all.
            Refused: as from `KV.transact`; also for more guards than the fence leaves room for.
        """
        if self.over:
            self._on_fenced()
            raise self.end(self.reason)
        if len(guards) > (room := MOST_OPERATIONS - len(self.fence)):
            raise Refused(f"a leader's transaction of {len(guards)} guards is too large: at most {room}, split it")
        outcome = await self._kv.transact(operations, (*self.fence, *guards))
        if isinstance(outcome, Committed):
            return outcome
        if broken := [guard.key for guard in self.fence if not guard.holds(outcome.found.get(guard.key))]:
            self._on_fenced()
            log.warning("a write was fenced", leader=self.name, keys=[operation.key for operation in operations][:10])
            raise self.end(f"{', '.join(broken)} changed since revision {self.revision}")
        return Rejected(outcome.revision, {guard.key: outcome.found.get(guard.key) for guard in guards})


@dataclass(slots=True)
class _Term:
    leadership: Leadership
    lease: int
    asked: float
    """When the last good renewal was sent, by the loop's clock."""
    at: Status
    """The last that is known of the store, to tell another history by."""


class Election:
    """One candidate for the leadership that `key` stands for.

    `name` should be unique among the candidates; two with the same name still exclude each other. A term ends if a key
    of `pinned` changes. `on_fenced` hears of each write that was refused because it came from a deposed leader: by the
    store, or here because the time was up.
    """

    def __init__(
        self,
        kv: KV,
        key: str,
        name: str,
        *,
        ttl: float = 10.0,
        pinned: Sequence[str] = (),
        on_fenced: Callable[[], None] = lambda: None,
    ) -> None:
        """`ttl`: seconds after which the store takes a leader for dead that does not renew its lease."""
        self._kv = kv
        self._key = key
        self._name = name
        self._ttl = ttl
        self._pinned = tuple(pinned)
        self._on_fenced = on_fenced
        self._value = json.dumps({"id": secrets.token_hex(8), "name": name}, sort_keys=True).encode()
        """Nobody else writes this: so a transaction whose answer was lost can be told from another's."""
        self._leadership: Leadership | None = None

    @property
    def leading(self) -> bool:
        """Whether this candidate leads, as far as it can know without asking. Any thread may read it."""
        leadership = self._leadership
        return leadership is not None and not leadership.reason

    async def leader(self) -> str | None:
        """The name that leads, read linearizably; None while nobody does.

        Raises:
            Unavailable, Refused: the store could not be read.
        """
        item = await self._kv.get(self._key)
        return _name(item) if item is not None else None

    async def run(self, work: Callable[[Leadership], Awaitable[None]]) -> None:
        """Campaign and lead for ever; cancel it to resign.

        While it leads `work` runs. It is cancelled when the leadership ends, and has ended before the next campaign
        begins: two of them never overlap. If it fails or returns, or the lease could not be renewed, this candidate
        resigns and pauses before it stands again, so that another may do better. Cancelling waits for `work` to end
        and gives the lease back, so that the next leader takes over at once.
        """
        loop = asyncio.get_running_loop()
        unreachable, failing = Backoff(), Backoff(first=1.0, most=30.0)
        while True:
            try:
                term = await self._campaign()
            except StoreError as e:
                if unreachable.fresh:
                    log.warning("standing for election failed; trying on", candidate=self._name, reason=str(e))
                await unreachable.wait()
                continue
            unreachable.reset()
            began = loop.time()
            worked = await self._lead(term, work)
            if loop.time() - began > CALM:
                failing.reset()
            if not worked:
                await failing.wait()

    # ---------------------------------------------------------------------------------------------------- campaigning

    async def _campaign(self) -> _Term:
        """Win the key, however long it takes."""
        loop = asyncio.get_running_loop()
        while True:
            holder, at = await self._holder()
            if holder is not None and holder.value == self._value and holder.lease:
                # It is left from an attempt whose fate was unknown, or came back with a snapshot of the store.
                await self._kv.revoke(holder.lease)
                continue
            if holder is not None:
                await self._until_free(at)
                continue
            asked = loop.time()
            lease = await self._kv.grant(self._ttl)
            fence = None
            try:
                fence = await self._stand(lease)
            finally:
                if fence is None:
                    await self._give_back(lease)
            if fence is not None:
                revision = fence[0].create_revision or 0
                leadership = Leadership(
                    self._kv,
                    self._name,
                    fence,
                    revision,
                    until=asked + self._ttl * 2 / 3,
                    on_fenced=self._on_fenced,
                )
                return _Term(leadership, lease, asked, Status(at.cluster_id, revision))

    async def _holder(self) -> tuple[KeyValue | None, Status]:
        listing = await self._kv.list(self._key)
        found = next((item for item in listing.items if item.key == self._key), None)
        return found, Status(listing.cluster_id, listing.revision)

    async def _stand(self, lease: int) -> tuple[Guard, ...] | None:
        """Make the key unless it is there; returns the fence, its first guard that of the key, or None."""
        pins = []
        for key in self._pinned:
            item = await self._kv.get(key)
            pins.append(Guard(key, mod_revision=item.mod_revision if item is not None else 0))
        try:
            outcome = await self._kv.transact(
                [Put(self._key, self._value, lease)], [Guard(self._key, create_revision=0), *pins]
            )
            revision = outcome.revision if isinstance(outcome, Committed) else 0
        except Ambiguous:
            # If it is applied later than this read, it fails: the lease will have been given back.
            item = await self._kv.get(self._key)
            ours = item is not None and item.value == self._value and item.lease == lease
            revision = item.create_revision if item is not None and ours else 0
        return (Guard(self._key, create_revision=revision), *pins) if revision else None

    async def _until_free(self, at: Status) -> None:
        """Return when the key was deleted after `at`, or after a TTL: looking again costs little."""
        try:
            async with asyncio.timeout(self._ttl), aclosing(self._kv.watch(self._key, at)) as batches:
                async for batch in batches:
                    if self._key in batch.deletes:
                        return
        except TimeoutError:
            return

    async def _give_back(self, lease: int) -> None:
        try:
            async with asyncio.timeout(RESIGN_DEADLINE):
                await self._kv.revoke(lease)
        except (StoreError, TimeoutError) as e:
            log.info(
                "a lease could not be given back and will expire", candidate=self._name, reason=str(e) or "no answer"
            )

    # -------------------------------------------------------------------------------------------------------- leading

    async def _lead(self, term: _Term, work: Callable[[Leadership], Awaitable[None]]) -> bool:
        """Work until the term ends; returns False if others should have the next one."""
        leadership = self._leadership = term.leadership
        log.info("leading", leader=self._name, revision=leadership.revision)
        # A task of its own: a group that fails while it is cancelled forgets that it was cancelled.
        serving = asyncio.create_task(self._serve(term, work), name=f"election: term {leadership.revision}")
        try:
            await asyncio.wait([serving])
        finally:
            serving.cancel()
            await asyncio.wait([serving])
            worked = self._judge(leadership, serving)
            leadership.end("it resigned")
            self._leadership = None
            await self._give_back(term.lease)
            log.info("leading no longer", leader=self._name, reason=leadership.reason)
        return worked

    async def _serve(self, term: _Term, work: Callable[[Leadership], Awaitable[None]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(self._keep(term), name="election: lease")
            await work(term.leadership)
            keeping.cancel()

    def _judge(self, leadership: Leadership, serving: asyncio.Task[None]) -> bool:
        """Log how a term ended; returns False if others should have the next one."""
        if serving.cancelled():
            return leadership.over
        worked = leadership.over
        try:
            serving.result()
        except* Deposed as deposed:
            leadership.end(_reasons(deposed))
            # Whoever could not renew would take the key again from those who can.
            worked = asyncio.get_running_loop().time() < leadership.until
        except* StoreError as failed:
            worked = False
            log.warning("the leader's work failed; resigning", leader=self._name, reason=_reasons(failed))
        except* Exception:
            worked = False
            log.exception("the leader's work failed; resigning", leader=self._name)
        return worked

    async def _keep(self, term: _Term) -> None:
        """Renew the lease for as long as that works.

        Raises:
            Deposed: the leadership has ended.
        """
        loop = asyncio.get_running_loop()
        leadership = term.leadership
        try:
            while True:
                async with asyncio.timeout_at(leadership.until):
                    await asyncio.sleep(max(0.0, term.asked + self._ttl / 5 - loop.time()))
                    until = await self._renew(term)
                if leadership.over:
                    raise leadership.end(leadership.reason)
                leadership.until = until
        except TimeoutError:
            raise leadership.end("the lease was not renewed in time") from None
        except (LeaseLost, HistoryChanged) as e:
            raise leadership.end(str(e)) from e

    async def _renew(self, term: _Term) -> float:
        """Try until it succeeds; returns until when the leadership lasts then: counted from the request."""
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            try:
                async with asyncio.timeout(self._ttl / 3):
                    granted = await self._kv.renew(term.lease)
                    await self._verify(term)
                term.asked = asked
                return asked + min(granted, self._ttl) * 2 / 3
            except (Unavailable, Refused, TimeoutError) as e:
                log.warning("the leader's lease was not renewed", leader=self._name, reason=str(e) or "no answer")
            await asyncio.sleep(self._ttl / 20)

    async def _verify(self, term: _Term) -> None:
        """Read that the fence holds: a renewal that was confirmed proves nothing.

        Raises:
            Deposed, HistoryChanged: it does not.
        """
        item, at = await self._holder()
        if at.cluster_id != term.at.cluster_id:
            raise ClusterChanged(term.at.cluster_id, at.cluster_id)
        if at.revision < term.at.revision:
            raise RevisionRegressed(term.at.revision, at.revision)
        term.at = at
        found = {self._key: item}
        for key in self._pinned:
            found[key] = await self._kv.get(key)
        if broken := [guard.key for guard in term.leadership.fence if not guard.holds(found[guard.key])]:
            raise term.leadership.end(f"{', '.join(broken)} changed since revision {term.leadership.revision}")


def _name(item: KeyValue) -> str:
    try:
        return str(json.loads(item.value)["name"])
    except (ValueError, KeyError, TypeError):
        # Somebody else's hand wrote it; whoever it is, it is not nobody.
        return item.value.decode(errors="replace")


def _reasons(failed: BaseExceptionGroup[BaseException]) -> str:
    """What is at the leaves of a group, in one line."""
    return "; ".join(
        _reasons(error) if isinstance(error, BaseExceptionGroup) else str(error) for error in failed.exceptions
    )
