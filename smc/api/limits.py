"""How much anybody may ask for: token buckets, one for each peer and one for all together; and at one time."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from smc.errors import Exhausted

MOST_PEERS = 4096
"""Peers that are remembered. Whoever is forgotten starts afresh; the bucket of all together still holds."""


@dataclass(frozen=True, slots=True)
class Rate:
    per_second: float
    burst: float


@dataclass(frozen=True, slots=True)
class Limits:
    peer: Rate
    overall: Rate


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


class Limiter:
    """Counts calls against `limits`. `clock` is in seconds and never goes back."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._overall = _Bucket(limits.overall.burst, clock())
        self._peers: OrderedDict[str, _Bucket] = OrderedDict()

    def admit(self, peer: str) -> float:
        """Take one call; returns 0, or after how many seconds to try again when there is none to take.

        What one peer is refused costs the others nothing.
        """
        now = self._clock()
        bucket = self._peers.get(peer)
        if bucket is None:
            bucket = self._peers[peer] = _Bucket(self._limits.peer.burst, now)
            if len(self._peers) > MOST_PEERS:
                self._peers.popitem(last=False)
        self._peers.move_to_end(peer)
        wait = max(_refill(bucket, self._limits.peer, now), _refill(self._overall, self._limits.overall, now))
        if wait == 0:
            bucket.level -= 1
            self._overall.level -= 1
        return wait


class Places:
    """Bounds how many calls of one peer are open at one time: a call may last, and the places for all are bounded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def one_of(self, peer: str) -> Iterator[None]:
        """A place for as long as the block runs.

        Raises:
            Exhausted: the peer has all of its own.
        """
        if self._open[peer] >= self._most:
            raise Exhausted(f"{peer} has {self._most} calls open here already", hint="try again once one has ended")
        self._open[peer] += 1
        try:
            yield
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


def _refill(bucket: _Bucket, rate: Rate, now: float) -> float:
    """Bring the bucket to `now`; returns in how many seconds it will have one to take, 0 for now."""
    bucket.level = min(rate.burst, bucket.level + (now - bucket.at) * rate.per_second)
    bucket.at = now
    return 0.0 if bucket.level >= 1 else (1 - bucket.level) / rate.per_second
