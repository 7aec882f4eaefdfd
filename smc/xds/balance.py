"""How many streams a replica should give up, so that all replicas carry alike."""

from __future__ import annotations

from collections.abc import Iterable


def surplus(own: int, others: Iterable[int]) -> int:
    """How many of its `own` streams a replica has too many; `others` are those of the other ready replicas.

    One more than the even share is allowed, rounded up: proxies choose a replica by chance, and would be sent to and
    fro for ever.
    """
    counts = [own, *others]
    share = -(-sum(counts) // len(counts))
    return max(0, own - share - 1)
