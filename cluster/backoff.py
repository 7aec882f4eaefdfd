"""How long to leave a store alone that did not answer."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Pauses that double from `first` to `most` seconds, each shortened at random by up to a half.

    Chance keeps replicas that lost the store together from asking it again in step.
    """

    def __init__(self, first: float = 0.1, most: float = 2.0) -> None:
        self._first = first
        self._most = most
        self._next = first

    @property
    def fresh(self) -> bool:
        """Whether nothing has failed since the start or the last `reset`."""
        return self._next == self._first

    def reset(self) -> None:
        self._next = self._first

    async def wait(self) -> None:
        """Pause. Cancelling is safe."""
        pause = self._next * (1 - random.random() / 2)  # noqa: S311
        self._next = min(self._next * 2, self._most)
        await asyncio.sleep(pause)
