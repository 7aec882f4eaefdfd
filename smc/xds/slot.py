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
        self._happened = False
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        """Set to the deadline or to an earlier one: they come and go far more often than one passes."""

    @property
    def waiting(self) -> bool:
        """There is an offer that was not taken yet."""
        return self._newest is not None

    def put(self, snapshot: Snapshot, revision: int, build: SpanContext | None = None) -> None:
        self._newest = Offer(snapshot, revision, asyncio.get_running_loop().time(), build)
        self.stale = False
        self.wake()

    def take(self) -> Offer | None:
        """The newest offer, once; None when it was taken already."""
        newest, self._newest = self._newest, None
        return newest

    def end(self, reason: str) -> None:
        """Ask the stream to end. The first reason stays."""
        self.ended = self.ended or reason
        self.wake()

    def wake(self) -> None:
        """Let `changed` return: something else happened that the stream waits for."""
        self._happened = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changed(self, deadline: float | None) -> None:
        """Return after the next `put`, `end` or `wake` since it last returned, or at `deadline` on the loop's clock."""
        if not self._happened:
            self._deadline = deadline
            self._set_timer()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = self._deadline = None
        self._happened = False

    def _set_timer(self) -> None:
        if self._deadline is not None and (self._timer is None or self._timer.when() > self._deadline):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(self._deadline, self._passed, self._deadline)

    def _passed(self, time: float) -> None:
        self._timer = None
        if self._deadline is not None and self._deadline <= time:
            self.wake()
        else:
            self._set_timer()
