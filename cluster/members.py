"""Which replicas are alive: each keeps one leased key."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping

from cluster.kv import KV, StoreError


class NameTaken(StoreError):
    """Another live replica has this name."""


class Members:
    """The leased keys `<prefix><name>`; `prefix` ends with a slash."""

    def __init__(self, kv: KV, prefix: str) -> None:
        raise NotImplementedError

    async def announce(
        self, name: str, value: Callable[[], bytes], *, ttl: float = 10.0, interval: float = 1.0
    ) -> None:
        """Keep this replica's key for ever, rewriting it at most once an `interval` (seconds) when `value` changed.

        Raises:
            NameTaken: another live replica has the name.
        """
        raise NotImplementedError

    async def alive(self) -> Mapping[str, bytes]:
        """What each live member says, by name, read linearizably."""
        raise NotImplementedError

    def watch(self) -> AsyncGenerator[Mapping[str, bytes], None]:
        """Yield `alive` now and after each change. Close it with `aclosing`."""
        raise NotImplementedError
