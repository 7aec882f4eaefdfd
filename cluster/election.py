"""Who leads, and the proof of it that etcd checks with every write: the fence."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from cluster.kv import KV, Guard, Operation, Outcome, StoreError


class Deposed(StoreError):
    """This leadership is over: its fence did not hold, or its time ran out. Nothing was written."""


class Leadership:
    """The right to write, as one term of leadership has it."""

    def __init__(self, kv: KV, name: str, fence: Sequence[Guard], revision: int) -> None:
        self.name = name
        self.fence = tuple(fence)
        self.revision = revision

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        """As `KV.transact`, with the fence added. Rejected means that only the caller's guards did not hold.

        Raises:
            Deposed: the fence did not hold; the leadership ends.
            Ambiguous: as from `KV.transact`.
        """
        raise NotImplementedError


class Election:
    def __init__(self, kv: KV, key: str, name: str, *, ttl: float = 10.0, pinned: Sequence[str] = ()) -> None:
        raise NotImplementedError

    async def run(self, work: Callable[[Leadership], Awaitable[None]]) -> None:
        """Campaign and lead for ever; cancel it to resign."""
        raise NotImplementedError

    async def leader(self) -> str | None:
        """The name that leads, read linearizably."""
        raise NotImplementedError
