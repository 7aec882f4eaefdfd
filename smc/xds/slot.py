"""Where a stream finds what its proxy should have: one place, and the newest Snapshot wins.

Whoever puts never waits, whoever takes never sees what was replaced meanwhile: a slow proxy costs one Snapshot.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from opentelemetry.trace import SpanContext

from smc.xds.snapshot import Snapshot


class NotAdmitted(Exception):
    """This replica cannot answer a new stream now; another one may. The text says why."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a proxy should have from now on."""

    snapshot: Snapshot
    revision: int
    """Of the Mesh that it was made from."""
    at: float
    """When it was offered, on the loop's clock."""
    build: SpanContext | None = None
    """The span of the build that made it."""


class Slot:
    """Belongs to one event loop."""

    def __init__(self, serial: str = "") -> None:
        self.serial = serial
        """Of the credential that the stream was opened with, in hexadecimal."""
        self.ended = ""
        """Why the stream must end; empty while it need not."""
        self.stale = False
        """The proxy should have something newer than what was put last, and that could not be made."""
        self._newest: Offer | None = None
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> bool:
        """There is an offer that was not taken yet."""
        return self._newest is not None

    def put(self, snapshot: Snapshot, revision: int, build: SpanContext | None = None) -> None:
        self._newest = Offer(snapshot, revision, asyncio.get_running_loop().time(), build)
        self.stale = False
        self._changed.set()

    def take(self) -> Offer | None:
        """The newest offer, once; None when it was taken already."""
        newest, self._newest = self._newest, None
        return newest

    def end(self, reason: str) -> None:
        """Ask the stream to end. The first reason stays."""
        self.ended = self.ended or reason
        self._changed.set()

    def wake(self) -> None:
        """Let `changed` return: something else happened that the stream waits for."""
        self._changed.set()

    async def changed(self, deadline: float | None) -> None:
        """Return after the next `put`, `end` or `wake` since it last returned, or at `deadline` on the loop's clock."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()
