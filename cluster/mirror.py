"""Follow prefixes of the store: list once, then apply every revision, for ever.

A replica acts on its mirror alone. While the store cannot be reached the mirror stays as it is: unknown, never none.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from cluster.kv import KV, View


class Mirror:
    """A copy of everything below `prefixes` (whole keys, each below `root`).

    `root` is watched as a whole, so that `revision` moves with every write below it.
    """

    revision: int
    view: View | None
    unreachable_since: float | None

    def __init__(self, kv: KV, root: str, prefixes: Sequence[str]) -> None:
        raise NotImplementedError

    def follow(self) -> AsyncGenerator[View, None]:
        """Yield the first View, then one for each revision that touched a prefix. Close it with `aclosing`."""
        raise NotImplementedError

    async def caught_up(self) -> None:
        """Return once the mirror holds everything that was committed before the call.

        Raises:
            Unavailable: the store cannot be reached, or the watch lags behind.
        """
        raise NotImplementedError
