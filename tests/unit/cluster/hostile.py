"""A client of the store in memory that can be made to hang, to lie, and to lose answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence

from cluster.kv import (
    Ambiguous,
    Batch,
    Guard,
    KeyValue,
    LeaseLost,
    Listing,
    Operation,
    Outcome,
    Refused,
    Status,
    Survey,
    Unavailable,
)
from cluster.memory import MemoryKV, MemoryStore

DEADLINE = 5.0
"""Seconds until a client gives a call up."""


class HostileKV(MemoryKV):
    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.calls: Counter[str] = Counter()
        self.delay = 0.0
        """Seconds that each call is on its way."""
        self.hangs: set[str] = set()
        """Calls that are not answered before their deadline, as over a connection that is half open."""
        self.refuses: set[str] = set()
        self.renewals_lie = False
        """Every renewal is confirmed, whatever became of the lease: etcd's bug 20813."""
        self.answers_lost = 0
        """So many transactions from now on are applied, and their answers lost."""
        self.requests_lost = 0
        """So many transactions from now on are not applied, and that is not known."""
        self.late: asyncio.Event | None = None
        """Transactions wait for it on their way, whether whoever sent them still waits or not."""
        self.flowing = asyncio.Event()
        """Watches are quiet while it is not set."""
        self.flowing.set()

    async def _call(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.hangs:
            await asyncio.sleep(DEADLINE)
            raise Ambiguous("no answer") if name == "transact" else Unavailable("no answer")
        if self.delay:
            await asyncio.sleep(self.delay)
        if name in self.refuses:
            raise Refused(f"{name}: the store is full")

    async def status(self) -> Status:
        await self._call("status")
        return await super().status()

    async def get(self, key: str) -> KeyValue | None:
        await self._call("get")
        return await super().get(key)

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        await self._call("list")
        return await super().list(prefix, revision=revision)

    async def survey(self, prefix: str) -> Survey:
        await self._call("survey")
        return await super().survey(prefix)

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        await self._call("transact")
        if self.late is not None:
            return await asyncio.shield(asyncio.create_task(self._transact_late(self.late, operations, guards)))
        if self.requests_lost:
            self.requests_lost -= 1
            raise Ambiguous("the answer was lost")
        outcome = await super().transact(operations, guards)
        if self.answers_lost:
            self.answers_lost -= 1
            raise Ambiguous("the answer was lost")
        return outcome

    async def _transact_late(
        self, late: asyncio.Event, operations: Sequence[Operation], guards: Sequence[Guard]
    ) -> Outcome:
        await late.wait()
        return await super().transact(operations, guards)

    async def watch(self, prefix: str, after: Status) -> AsyncGenerator[Batch, None]:
        self.calls["watch"] += 1
        async for batch in super().watch(prefix, after):
            await self.flowing.wait()
            yield batch

    async def grant(self, ttl: float) -> int:
        await self._call("grant")
        return await super().grant(ttl)

    async def renew(self, lease: int) -> float:
        await self._call("renew")
        try:
            return await super().renew(lease)
        except LeaseLost:
            if self.renewals_lie:
                return 10.0
            raise

    async def revoke(self, lease: int) -> None:
        await self._call("revoke")
        await super().revoke(lease)
