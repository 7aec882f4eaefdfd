"""One proxy's stream while it is open: requests and offers go into the state machine, and its responses out.

Nothing here decides what is sent: `stream.py` does. The transport, the slot and timers call in, and each call does what
there is to do and returns: a change that concerns all streams is written to them without one switch of tasks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext

from smc import telemetry
from smc.metrics import Metrics
from smc.model import Name
from smc.records import Laggard, Nack
from smc.xds.slot import Offer, Slot
from smc.xds.snapshot import Snapshot, Type, short
from smc.xds.stream import Refusal, Request, Stream
from smc.xds.subscription import LONGEST_TEXT, Response

WRITE_DEADLINE = 15.0
"""Seconds that a proxy may take to make room for a response; longer, and the stream ends."""

MOST_TOLD, LONGEST_TOLD = 5, 1_024
"""Refusals of one proxy, names and suspects of one refusal, and characters of its text that others are told.

A report of many proxies has to fit into one transaction, or nothing would be known of any.
"""

SOON = 1.0
"""Seconds after which a stream that was written to is asked for its deadline, or at most twice as many: no deadline is
nearer than that. Most of them have been ACKed by then, and have none.
"""

RATE, BURST = 200.0, 2_000
"""Requests a second that are read of one stream, and how many at once before that counts.

An Envoy that starts, or sees its whole mesh change, says some hundreds of things at once, and then little.
"""

LINES_RATE, LINES_BURST = 0.1, 10
"""The same for the refusals of one stream that are logged. All are counted in the metric."""

log = structlog.get_logger(__name__)
tracer = telemetry.tracer(__name__)


class Ended(Exception):
    """The stream must end; the text says why. The proxy may come again at once."""


class Peer(Protocol):
    """The proxy's end of the stream."""

    def deliver(self, receive: Callable[[Request | None], None], fail: Callable[[Exception], None]) -> None:
        """Call `receive` from now on with what the proxy says, and with None once it has closed its side.

        `fail` is told what that raises, and what else is wrong with what it says.
        """

    def write(self, response: Response) -> int:
        """Write it, without waiting; returns its size in bytes."""

    def drained(self) -> asyncio.Future[None] | None:
        """What is done once the proxy has made room for all that was written; None: it has."""

    def pause_reading(self) -> None:
        """Pass no request on, until `resume_reading`; the proxy waits then."""

    def resume_reading(self) -> None: ...


class _Awaited(NamedTuple):
    """An offer that is not ACKed yet, and those before it that it replaced."""

    oldest: Offer
    newest: Offer
    span: Span | None


class _Bucket:
    """Fills with `rate` tokens a second, up to `burst`."""

    def __init__(self, rate: float, burst: int, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._at = now

    def left(self, now: float) -> float:
        """How many there are; below 0, so many were taken that are yet to come."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        return self._tokens

    def take(self, now: float) -> float:
        """Take one in any case; returns the seconds until it is there."""
        self._tokens = self.left(now) - 1
        return max(0.0, -self._tokens / self._rate)


class Watch:
    """Has the streams that were written to look at their deadlines SOON, with one timer for all of an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._recent: dict[Callable[[], None], None] = {}
        self._due: dict[Callable[[], None], None] = {}
        """Those that were recent when the timer went off last."""
        self._ticks = False

    def soon(self, look: Callable[[], None]) -> None:
        """Call `look` when SOON has passed, or twice that at most. It is held until then, or until it is forgotten."""
        if not self._ticks:
            self._ticks = True
            self._loop.call_later(SOON, self._tick)
        self._recent[look] = None

    def forget(self, look: Callable[[], None]) -> None:
        """Do not call it, if that was asked for."""
        self._recent.pop(look, None)
        self._due.pop(look, None)

    def _tick(self) -> None:
        due, self._due, self._recent = self._due, self._recent, {}
        self._ticks = bool(self._due)
        if self._ticks:
            self._loop.call_later(SOON, self._tick)
        for look in due:
            look()


class Session:
    """Belongs to one event loop. `run` is its lifetime."""

    def __init__(
        self,
        proxy: Name,
        stream: Stream,
        slot: Slot,
        metrics: Metrics,
        peer: Peer,
        watch: Watch,
        *,
        listening: Callable[[Name], None],
    ) -> None:
        """
        Args:
            watch: that of all sessions.
            listening: is told once, as soon as the proxy has ACKed all its listeners.
        """
        self._loop = asyncio.get_running_loop()
        self.proxy = proxy
        self.slot = slot
        self.stream = stream
        self.connected = time.time()
        self.opened = self._loop.time()
        self._metrics = metrics
        self._peer = peer
        self._watch = watch
        self._watched = False
        """It will look at the stream's deadline."""
        self._listening: Callable[[Name], None] | None = listening
        self._awaited: list[_Awaited] = []
        """What the stream works on, and what it will work on next: two at most, as there."""
        self._unsent: list[Response] = []
        """What waits until the proxy has made room for what was written before."""
        self._room: asyncio.Future[None] | None = None
        """Done once it has; None: there is room."""
        self._stalled = False
        self._requests = _Bucket(RATE, BURST, self.opened)
        self._lines = _Bucket(LINES_RATE, LINES_BURST, self.opened)
        self._unlogged = 0
        """Refusals since the last that was logged."""
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._alarm: asyncio.TimerHandle | None = None
        """Set to the stream's deadline as it was when that was looked at: they come and go, and hardly ever pass."""
        self._overdue = False
        """It has passed since the stream was asked whether it is stalled."""
        self._late: asyncio.TimerHandle | None = None
        """Ends the stream when the proxy makes no room."""
        self._reading: asyncio.TimerHandle | None = None
        """Goes on reading what a proxy says that has said too much."""

    # ---------------------------------------------------------------------------------------------- what others see

    @property
    def state(self) -> str:
        """One of "synced", "pending", "stalled" and "nacked"."""
        if self.stream.refusals:
            return "nacked"
        if self.stream.stalled:
            return "stalled"
        return "pending" if self._is_behind else "synced"

    def revision(self, newest: int) -> int:
        """Up to which Mesh revision it has ACKed everything, when the Mesh is at `newest`.

        What does not concern a proxy is not offered to it: once it has ACKed all that was, it has all there is, and
        until then all that was there before the first offer that is open.
        """
        if not self._is_behind:
            return newest
        if not (self._awaited and self.stream.acked):
            return self.stream.acked
        return self._awaited[0].oldest.revision - 1

    @property
    def _is_behind(self) -> bool:
        """There is something that it has not ACKed, whether that was offered yet or not."""
        return bool(self._awaited) or self.slot.waiting or self.slot.stale

    @property
    def versions(self) -> Mapping[str, str]:
        """What it has ACKed of each type, by `short` name."""
        return {short(type_): version for type_, version in self.stream.versions.items()}

    @property
    def nacks(self) -> tuple[Nack, ...]:
        """What it refuses: a few of it, those that have a suspect first, so that one proxy cannot fill a report."""
        refusals = sorted(self.stream.refusals, key=lambda refusal: not refusal.suspects)
        return tuple(self._nack(refusal) for refusal in refusals[:MOST_TOLD])

    def laggard(self) -> Laggard | None:
        """Why it has not ACKed all it should have; None if it has."""
        if refusals := self.stream.refusals:
            first = refusals[0]
            others = f" and {len(first.names) - MOST_TOLD} more" if len(first.names) > MOST_TOLD else ""
            names = ", ".join(first.names[:MOST_TOLD])
            return Laggard(self.proxy, f"NACKed {short(first.type)} {names}{others}", self.stream.acked)
        if not self._is_behind:
            return None
        if self.slot.stale:
            return Laggard(self.proxy, "its configuration cannot be made: see this replica's log", self.stream.acked)
        return Laggard(self.proxy, "stalled" if self.stream.stalled else "pending", self.stream.acked)

    def _nack(self, refusal: Refusal) -> Nack:
        # One suspect is left out at a time, and is none any more: the next ones move up.
        suspects = tuple((source.manifest, source.mod_revision) for source in refusal.suspects[:MOST_TOLD])
        names, text = refusal.names[:MOST_TOLD], refusal.text[:LONGEST_TOLD]
        return Nack(self.proxy, refusal.type.value, names, text, suspects, refusal.revision)

    # ------------------------------------------------------------------------------------------------------- the life

    async def run(self, first: Request) -> None:
        """Serve the proxy until it closes the stream; `first` is the request that was read before it was admitted.

        Raises:
            Ended: this replica wants it to end.
            ProtocolError: the proxy said what no correct client says.
            Exception: what the peer failed with.
        """
        try:
            self._take(first, self._loop.time())
            self._peer.deliver(self._receive, self._fail)
            self.slot.listen(self)
            await self._over
        finally:
            if not self._over.cancel() and not self._over.cancelled():
                self._over.exception()  # where the task was cancelled first, nobody else asks for it
            self._watch.forget(self._look)  # megabytes may be in flight that nobody needs any more
            for timer in (self._alarm, self._late, self._reading):
                if timer is not None:
                    timer.cancel()
            for awaited in self._awaited:
                _end(awaited.span)

    def _receive(self, request: Request | None) -> None:
        """Who says more than RATE is read more slowly: the transport makes room for little more, and so he waits."""
        if self._over.done():
            return
        if request is None:
            self._over.set_result(None)
            return
        now = self._loop.time()
        self._take(request, now)
        if wait := self._requests.take(now):
            self._peer.pause_reading()
            self._reading = self._loop.call_later(wait, self._peer.resume_reading)

    def _fail(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    def _take(self, request: Request, now: float) -> None:
        if request.error is not None:
            self._metrics.nacks.labels(short(request.type)).inc()
            self._tell(request.type, request.error, now)
        self.stream.receive(request, now)
        self._settle(now)
        if not self.stream.rests:
            self.slot.wake()

    def _tell(self, type_: Type, refusal: str, now: float) -> None:
        if self._lines.left(now) < 1:
            self._unlogged += 1
            return
        self._lines.take(now)
        log.warning(
            "a proxy refuses what it was sent",
            **{telemetry.PROXY: str(self.proxy), telemetry.TYPE: short(type_)},
            reason=refusal[:LONGEST_TEXT],
            **({"unlogged": self._unlogged} if self._unlogged else {}),
        )
        self._unlogged = 0

    def _go_on(self) -> None:
        """Do what has come due, whatever that is."""
        self.decide()
        self.write()

    def decide(self) -> None:
        """Take what was offered, and find out what goes out next."""
        if self._over.done():
            return
        if self.slot.ended:
            self._fail(Ended(self.slot.ended))
        elif self._room is None:
            try:
                if not self._unsent or self._flush():
                    now = self._loop.time()
                    if (taken := self.slot.take()) is not None:
                        self._offer(*taken, now)
                    acked = self.stream.acked
                    sent = self.stream.to_send(now)
                    self._unsent.extend(sent)
                    if not sent or self._overdue or self.stream.acked != acked:
                        self._settle(now)
            except Exception as e:  # noqa: BLE001 - `run` raises it
                self._fail(e)

    def write(self) -> None:
        """Let go out what was decided."""
        if self._over.done() or self._room is not None:
            return
        try:
            if (not self._unsent or self._flush()) and not self._watched:
                self._watched = True
                self._watch.soon(self._look)
        except Exception as e:  # noqa: BLE001 - `run` raises it
            self._fail(e)

    def _flush(self) -> bool:
        """False: the proxy must make room before there is more to do."""
        while self._unsent:
            self._push(self._unsent.pop(0))
            if (room := self._peer.drained()) is not None:
                self._wait_for(room)
                return False
        return True

    def _look(self) -> None:
        self._watched = False
        if self._alarm is not None:
            self._alarm.cancel()
        deadline = self.stream.deadline
        self._alarm = None if deadline is None else self._loop.call_at(deadline, self._passed)

    def _passed(self) -> None:
        self._alarm = None
        self._overdue = True
        self._go_on()

    def _wait_for(self, room: asyncio.Future[None]) -> None:
        self._room = room
        late = Ended(f"the proxy did not read for {WRITE_DEADLINE:.0f} s")
        self._late = self._loop.call_later(WRITE_DEADLINE, self._fail, late)
        room.add_done_callback(self._made_room)

    def _made_room(self, _: asyncio.Future[None]) -> None:
        self._room = None
        if self._late is not None:
            self._late.cancel()
        self._go_on()

    def _offer(self, snapshot: Snapshot, offer: Offer, now: float) -> None:
        self._confirm(now)
        self.stream.offer(snapshot, offer.revision)
        oldest = offer
        if len(self._awaited) > 1:
            replaced = self._awaited.pop()
            oldest = replaced.oldest
            _end(replaced.span)
        # The span ends with the ACK. What nobody records costs nothing.
        span = None
        if offer.build is not None:
            span = tracer.start_span("smc.ack", context=_child_of(offer.build), attributes=self._attributes(offer))
        self._awaited.append(_Awaited(oldest, offer, span))

    def _attributes(self, offer: Offer) -> dict[str, str | int]:
        return {telemetry.PROXY: str(self.proxy), telemetry.REVISION: offer.revision}

    def _push(self, response: Response) -> None:
        build = self._awaited[0].newest.build if self._awaited else None
        if build is None:
            size = self._peer.write(response)
        else:
            with tracer.start_as_current_span("smc.push", context=_child_of(build)) as span:
                span.set_attribute(telemetry.PROXY, str(self.proxy))
                span.set_attribute(telemetry.TYPE, short(response.type))
                span.set_attribute(telemetry.RESOURCES, len(response.resources))
                size = self._peer.write(response)
        sent = self._metrics.sent[short(response.type)]
        sent.pushes += 1
        sent.bytes += size
        sent.resources += len(response.resources)

    def _settle(self, now: float) -> None:
        """Tell what the last requests and the passing time have changed."""
        self._confirm(now)
        if self._stalled or self._overdue:  # it begins to be when the alarm goes off, and not before
            self._overdue = False
            stalled = self.stream.stalled
            if stalled and not self._stalled:
                self._metrics.stalled.inc()
                log.warning("a proxy does not acknowledge what it was sent", **{telemetry.PROXY: str(self.proxy)})
            self._stalled = stalled
        if self._listening is not None and self.stream.listening:
            self._listening(self.proxy)
            self._listening = None

    def _confirm(self, now: float) -> None:
        """Forget what has been ACKed. A store that was restored counts again from a lower revision."""
        awaited, acked = self._awaited, self.stream.acked
        while awaited and acked in (awaited[0].newest.revision, awaited[-1].newest.revision):
            done = awaited.pop(0)
            self._metrics.convergence_time.observe(now - done.oldest.at)
            _end(done.span)


def _child_of(context: SpanContext) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(context))


def _end(span: Span | None) -> None:
    if span is not None:
        span.end()
