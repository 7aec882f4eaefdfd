"""Leaderships for tests of what is written with one: as many terms as a test likes, each with its fence."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.election import Deposed, Leadership
from cluster.kv import KV, Delete, Guard, Operation, Outcome, Put, Rejected
from smc.records import Keys


class Fenced(Leadership):
    """Every write carries the guard that the leader's key is still the one that it made."""

    def __init__(self, kv: KV, fence: Guard, revision: int) -> None:
        super().__init__(kv, "test", [fence], revision)
        self._store = kv
        self._guard = fence

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        outcome = await self._store.transact(operations, [*guards, self._guard])
        if isinstance(outcome, Rejected) and not self._guard.holds(outcome.found[self._guard.key]):
            raise Deposed("another replica leads")
        return outcome


async def elect(kv: KV, keys: Keys) -> Fenced:
    """Take the leadership from whoever has it."""
    await kv.transact([Delete(keys.leader)])
    outcome = await kv.transact([Put(keys.leader, b"test")], [Guard(keys.leader, create_revision=0)])
    return Fenced(kv, Guard(keys.leader, create_revision=outcome.revision), outcome.revision)
