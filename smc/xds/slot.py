"""Where a stream finds what its proxy should have: one place, and the newest Snapshot wins.

Whoever puts never waits, whoever takes never sees what was replaced meanwhile: a slow proxy costs one Snapshot.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, Protocol

from opentelemetry.trace import SpanContext

from smc.xds.snapshot import Snapshot


class NotAdmitted(Exception):
    """This replica cannot answer a new stream now; another one may. The text says why."""


class Offer(NamedTuple):
    """Why a Snapshot is there: the same for all proxies that a Mesh concerns."""

    revision: int
    """Of the Mesh that it was made from."""
    at: float
    """Since when it is offered, on the loop's clock."""
    build: SpanContext | None = None
    """The span of the build that made it; None: nobody records it."""


class Taker(Protocol):
    """Whom a Slot tells. Neither raises, nor waits."""

    def decide(self) -> None:
        """Take what there is, and find out what goes out for it."""

    def write(self) -> None:
        """Let it go out, as far as there is room."""


class Slot:
    """Belongs to one event loop, that which it is made in."""

    def __init__(self, serial: str = "") -> None:
        self._loop = asyncio.get_running_loop()
        self.serial = serial
        """Of the credential that the stream was opened with, in hexadecimal."""
        self.ended = ""
        """Why the stream must end; empty while it need not."""
        self.stale = False
        """The proxy should have something newer than what was put last, and that could not be made."""
        self._newest: tuple[Snapshot, Offer] | None = None
        self._taker: Taker | None = None
        self._told = False
        """The taker will be called, and nobody need ask for it."""

    @property
    def waiting(self) -> bool:
        """There is an offer that was not taken yet."""
        return self._newest is not None

    def put(self, snapshot: Snapshot, offer: Offer) -> None:
        """Let the taker decide at once what goes out for it, which waits for `write`."""
        self._newest = snapshot, offer
        self.stale = False
        if self._taker is not None:
            self._taker.decide()

    def write(self) -> None:
        """Let go out what the last `put` came to."""
        if self._taker is not None:
            self._taker.write()

    def take(self) -> tuple[Snapshot, Offer] | None:
        """What was put last, once; None when it was taken already."""
        newest, self._newest = self._newest, None
        return newest

    def end(self, reason: str) -> None:
        """Ask the stream to end. The first reason stays."""
        self.ended = self.ended or reason
        self.wake()

    def wake(self) -> None:
        """Let the taker decide and write soon, once for all that happens until then."""
        if not self._told:
            self._told = True
            self._loop.call_soon(self._tell)

    def listen(self, taker: Taker) -> None:
        """Let `taker` decide and write soon; and then in each `put` and `write`, and soon after `end` and `wake`."""
        self._taker = taker
        self.wake()

    def _tell(self) -> None:
        self._told = False
        if self._taker is not None:
            self._taker.decide()
            self._taker.write()
