"""Bidirectional gRPC streams over HTTP/2 and mTLS: a server for many connections with little on each.

HTTP/2 itself (frames, HPACK, windows, what a peer may not do) is libnghttp2's, through `ngh2`. TLS is OpenSSL's, on
bytes in memory: so a connection costs no buffer of its own, and each new one sees the certificate and roots of that
moment. What is here joins the two to a socket, and bounds what a peer can make the server hold:

- who is silent in the middle of the handshake is cut off, and so is who takes HANDSHAKE seconds for it, opens no stream
  in IDLE, answers no PING, or does not read the last that it is told;
- what a call does not read is not acknowledged, so a peer can send one window more and waits then;
- of what a peer does not read, nothing is turned into frames beyond a small buffer. What was to be written stays the
  caller's own bytes, shared by all calls that were given the same.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import cast

import ngh2
import structlog

from smc.errors import Unavailable
from smc.tls import ServerTLS, server_context
from smc.xds import framing
from smc.xds.framing import Malformed, Status

SWEEP = 5.0
"""Seconds between two looks at every connection. A peer that has said nothing in two of them is asked whether it is
there; what has not answered two later is gone. Between two looks everybody is heard who has said something: however
slow a storm makes this server, nobody is cut off for that."""
HANDSHAKE = 60.0
"""Seconds that a new connection has until TLS is up; but it must not be silent for two sweeps."""
IDLE = 60.0
"""Seconds after which a connection without a stream is ended."""
GRACE = 1.0
"""Seconds that the streams of a connection which is to end have to end by themselves."""
BACKLOG = 4_096
"""Connections that wait to be accepted: a storm of reconnects stands in line."""
MOST_OF_ONE = 32
"""Connections of one certificate."""
MOST_STREAMS = 10
"""Of one connection, at the same time."""
LONGEST = 4 * 1024 * 1024
"""Bytes of one message of a client."""

_FRAMED = 8 * 1024
"""Bytes that are framed and encrypted at a time. What OpenSSL writes to keeps the size of the largest: no larger."""
_JOINED = 4 * 1024
"""Bytes of a message up to which it is handed over in one piece, for a copy costs less than a call then."""
_BUFFERED = 64 * 1024
"""Bytes that wait for the socket before no more are framed."""
_RECORD = 16 * 1024
"""Bytes of the longest TLS record."""
_CONFIGURATION = ngh2.Configuration(
    auto_window_update=False,
    max_inbound_header_list_size=16 * 1024,
    max_inbound_header_count=128,
    # Who opens streams only to reset them is cut off.
    stream_reset_rate_limit=(100, 10),
)
_SETTINGS = {
    ngh2.Setting.MAX_CONCURRENT_STREAMS: MOST_STREAMS,
    ngh2.Setting.MAX_HEADER_LIST_SIZE: 16 * 1024,
    ngh2.Setting.NO_RFC7540_PRIORITIES: 1,
}
_WINDOW = (MOST_STREAMS + 1) * 65_535
"""Of a whole connection: a stream that is read slowly leaves the others theirs."""

log = structlog.get_logger(__name__)


class Call:
    """One stream. Belongs to the task that serves it, which is cancelled once the client is gone."""

    def __init__(self, connection: _Connection, number: int, path: str) -> None:
        self.path = path
        """`/<service>/<method>`."""
        self._connection = connection
        self._number = number
        self._task: asyncio.Task[None] | None = None
        self._inbound = framing.Messages(LONGEST)
        self._messages: deque[bytes] = deque()
        self._unread = 0
        """Bytes that have come and are not acknowledged."""
        self._finished = False
        """The client says no more."""
        self._malformed: Malformed | None = None
        self._reader: asyncio.Future[None] | None = None
        self._receiver: Callable[[bytes | None], None] | None = None
        self._reading_paused = False
        self._writer: asyncio.Future[None] | None = None
        self._started = False
        self._ended = False
        """How it ended is on its way."""
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._connection.peer

    @property
    def certificate(self) -> str:
        """The client's own, in PEM. TLS has followed it to the roots."""
        return self._connection.certificate

    async def read(self) -> bytes | None:
        """The next message; None once the client says no more. Cancelling it loses nothing.

        Raises:
            Malformed: what comes is no message.
        """
        if not self._messages:
            if self._unread:
                self._acknowledge()
                self._connection.flush()
            if not (self._finished or self._malformed):
                self._reader = asyncio.get_running_loop().create_future()
                try:
                    await self._reader
                finally:
                    self._reader = None
        if self._messages:
            return self._messages.popleft()
        if self._malformed is not None:
            raise self._malformed
        return None

    def deliver(self, receiver: Callable[[bytes | None], None]) -> None:
        """Give `receiver` from now on what `read` would return, as soon as it is there.

        It must not raise. What comes that is no message ends the call, and cancels its task.
        """
        self._receiver = receiver
        self.resume_reading()

    def pause_reading(self) -> None:
        """Give the receiver nothing until `resume_reading`; the client can send one window more, and waits then."""
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._deliver()
        self._connection.flush()  # so that the client hears of the room that this has made

    def _deliver(self) -> None:
        receiver = self._receiver
        if receiver is None:
            return
        while self._messages and not self._reading_paused:
            receiver(self._messages.popleft())
        if self._reading_paused:
            return
        self._acknowledge()
        if self._malformed is not None:
            self.cut(self._malformed.status, str(self._malformed))
        elif self._finished:
            self._receiver = None
            receiver(None)

    def start(self) -> None:
        """Tell the client, before there is anything to write, that the call is served."""
        if not (self._started or self._closed):
            self._started = True
            self._connection.http2.send_response(self._number, framing.RESPONSE)
            self._connection.flush()

    def write(self, *parts: bytes) -> int:
        """Write one message, the parts of which may be shared with other calls; returns its length in bytes.

        It never waits: `drained` says when there is room for the next. After the end of the call nothing is written.
        """
        length = sum(map(len, parts))
        if not (self._closed or self._ended):
            http2 = self._connection.http2
            if not self._started:
                self._started = True
                http2.send_response(self._number, framing.RESPONSE)
            message = framing.prefix(length), *parts
            if length <= _JOINED:
                http2.send_data(self._number, b"".join(message))
            else:
                for part in message:
                    http2.send_data(self._number, part)
            self._connection.flush()
        return length

    def drained(self) -> asyncio.Future[None] | None:
        """What to wait for until the client has made room for all that was written; None: it has."""
        if self._closed or self._connection.sent(self._number):
            return None
        if self._writer is None or self._writer.done():  # whoever gives up waiting cancels it
            self._writer = asyncio.get_running_loop().create_future()
            self._connection.waiting.add(self)
        return self._writer

    async def end(self, status: Status, text: str = "") -> None:
        """End the call; returns once the client has made room for it. After that nothing can be said."""
        self.finish(status, text)
        while (sent := self.drained()) is not None:
            await sent

    # --------------------------------------------------------------------------------------- what the connection says

    def finish(self, status: Status, text: str = "") -> None:
        """As `end`, but without waiting."""
        if self._closed or self._ended:
            return
        self._ended = True
        self._stop_timer()
        http2, trailers = self._connection.http2, framing.trailers(status, text)
        if self._started:
            http2.send_trailers(self._number, trailers)
        else:
            http2.send_response(self._number, (*framing.RESPONSE, *trailers), end_stream=True)
        self._messages.clear()
        self._acknowledge()
        self._connection.ended(self._number)

    def run(self, task: asyncio.Task[None]) -> None:
        """`task` serves it."""
        self._task = task

    def limit(self, seconds: float) -> None:
        """End it after so many seconds: the client does not wait any longer."""
        self._timer = asyncio.get_running_loop().call_later(
            seconds, self.cut, Status.DEADLINE_EXCEEDED, "the client's deadline has passed"
        )

    def cut(self, status: Status, text: str) -> None:
        """End it, whatever its task is doing."""
        if not self._ended:
            self.finish(status, text)
            if self._task is not None:
                self._task.cancel()

    async def serve(self, served: Callable[[Call], Awaitable[None]]) -> None:
        """Let `served` serve it, and see to it that the client is told how it ended."""
        try:
            await served(self)
            await self.end(Status.OK)
        except Malformed as e:
            await self.end(e.status, str(e))
        except Exception:
            # A defect ends the one stream that met it.
            log.exception("serving a stream failed", path=self.path, peer=self.peer)
            await self.end(Status.UNKNOWN, "the server failed: its log says how")

    def received(self, data: bytes, *, last: bool) -> None:
        self._unread += len(data)
        self._finished = self._finished or last
        if self._ended or self._malformed:
            self._acknowledge()
            return
        try:
            self._messages.extend(self._inbound.feed(data))
        except Malformed as e:
            self._malformed = e
        if last and not (self._malformed or self._inbound.complete):
            self._malformed = Malformed(Status.INTERNAL, "the stream ends in the middle of a message")
        if self._receiver is not None:
            self._deliver()
        elif self._reader is not None:
            self._acknowledge()
            if (self._messages or self._finished or self._malformed) and not self._reader.done():
                self._reader.set_result(None)

    def made_room(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.done():
            writer.set_result(None)

    def close(self) -> None:
        """The client is gone, or has been told how it ended."""
        self._closed = True
        self._acknowledge()
        self._connection.waiting.discard(self)
        self.made_room()
        self._stop_timer()
        if self._task is not None and not self._ended:
            self._task.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _acknowledge(self) -> None:
        if self._unread:
            self._connection.acknowledge(self._unread, self._number)
            self._unread = 0


class _Connection(asyncio.Protocol):
    """One client's socket, TLS and HTTP/2."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls: ssl.SSLObject
        self._transport: asyncio.Transport
        self._up = False
        """TLS is."""
        self._paused = False
        self._closing = False
        self._last = False
        """The connection ends with the calls that it has."""
        self._timer: asyncio.TimerHandle | None = None
        """Ends whatever has its time now: the connection's life, or its grace."""
        self._quiet = 0
        """Sweeps since the peer said anything, or since this end is closed."""
        self._idle = 0
        """Sweeps without a call."""
        self._calls: dict[int, Call] = {}
        self._ending: set[int] = set()
        """The streams that were ended here, and not by the client yet."""
        self.http2 = ngh2.Connection(ngh2.Role.SERVER, _CONFIGURATION)
        self.waiting: set[Call] = set()
        """Those that wait until there is room."""
        self.peer = ""
        self.certificate = ""

    # ------------------------------------------------------------------------------------------------------ the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        address = transport.get_extra_info("peername")  # None: it is gone already
        if address is None or not self._server.entered(self):
            self._closing = True
            self._transport.abort()
            return
        host, port = address[:2]
        self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._transport.set_write_buffer_limits(high=_BUFFERED)
        self._tls = self._server.context().wrap_bio(self._incoming, self._outgoing, server_side=True)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._quiet = 0
        self._incoming.write(data)
        try:
            if not self._up:
                self._shake_hands()
            while self._incoming.pending and not self._closing:
                if data := self._tls.read(_RECORD):
                    self.http2.receive_data(data)
                    self._take()
                else:
                    self._close()  # the peer has said goodbye; what follows on that is never read
        except ssl.SSLWantReadError:
            pass  # a record, or a part of the handshake, whose rest is yet to come
        except (ssl.SSLError, ngh2.NGH2Error) as e:
            self._fail(str(e))
        self.flush()

    def eof_received(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.flush()

    def connection_lost(self, _error: Exception | None) -> None:
        self._end()
        self._server.left(self)

    def flush(self) -> None:
        """Let what can go out go out, and tell whom that concerns."""
        if self._closing or not self._up:
            return
        try:
            self._send()
            self._take()
            if self._ending:
                self._reset_ended()
        except (ssl.SSLError, ngh2.NGH2Error) as e:
            self._fail(str(e))
        if self.waiting:
            for call in [call for call in self.waiting if call.drained() is None]:
                self.waiting.discard(call)
                call.made_room()
        if self._last and not self._calls and not self._paused:
            self._close()

    def _send(self) -> None:
        encrypted: list[bytes] = []
        while not self._paused:
            data = self.http2.data_to_send(_FRAMED)
            if data:
                self._tls.write(data)
                encrypted.append(self._outgoing.read())
            last = len(data) < _FRAMED
            if encrypted and (last or len(encrypted) * _FRAMED >= _BUFFERED):
                self._transport.write(b"".join(encrypted))
                encrypted = []
            if last:
                return

    # ----------------------------------------------------------------------------------------------------- the two ends

    def _shake_hands(self) -> None:
        """Raises SSLWantReadError while it is not done."""
        try:
            self._tls.do_handshake()
        finally:
            self._send_encrypted()
        self._up = True
        self._idle = 0
        self.certificate = ssl.DER_cert_to_PEM_cert(self._tls.getpeercert(binary_form=True) or b"")
        self.http2.initiate_connection(_SETTINGS)
        self.http2.set_local_window_size(_WINDOW)
        if not self._server.authenticated(self):
            self._fail("too many connections of one certificate")
            return
        age = self._server.max_age * random.uniform(0.9, 1.1)  # noqa: S311 - so that not all come back at once
        self._timer = self._loop.call_later(age, self.retire, "this connection is old enough: open another one")

    def retire(self, why: str) -> None:
        """Ask the client to take its next streams elsewhere, end those that are open after GRACE, and then this."""
        self._stop_timer()
        if not self._up or self._closing:
            self._transport.abort()
        elif not self._calls:
            self._close()
        else:
            self.http2.send_shutdown_notice()
            self.flush()
            self._timer = self._loop.call_later(GRACE, self._cut, why)

    def _cut(self, why: str) -> None:
        self._timer = self._loop.call_later(GRACE, self._transport.abort)
        self._last = True
        for call in tuple(self._calls.values()):
            call.cut(Status.UNAVAILABLE, why)
        self.flush()

    def sweep(self) -> None:
        """Look after it; every SWEEP seconds."""
        self._quiet += 1
        if self._closing:
            if self._quiet > 2:
                self._transport.abort()  # who does not read the last that was said to him, and so would never go
            return
        self._idle = 0 if self._calls else self._idle + 1
        if not self._up:
            if self._quiet > 2 or self._idle * SWEEP >= HANDSHAKE:
                self._fail("the TLS handshake took too long")
        elif self._quiet >= 4:
            self._transport.abort()
        elif self._idle * SWEEP >= IDLE:
            self.retire("it has no stream")
        elif self._quiet == 2:
            self.http2.ping()
            self.flush()

    def _close(self) -> None:
        """Say that this is the end, and end it."""
        if self._closing:
            return
        try:
            if self._up:
                self.http2.terminate_connection()
                self._send()
            self._tls.unwrap()
        except (ssl.SSLError, ngh2.NGH2Error):
            pass  # the other's goodbye is not waited for, nor is there anything to say where the protocol has ended
        self._send_encrypted()
        self._transport.close()
        self._end()

    def _fail(self, why: str) -> None:
        log.debug("connection ended", peer=self.peer, error=why)
        self._send_encrypted()  # the alert, if there is one
        self._transport.close()
        self._end()

    def _end(self) -> None:
        self._closing = True
        self._quiet = 0
        self._stop_timer()
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        if self._paused:
            self._transport.abort()  # there is nobody who reads what is left

    def _send_encrypted(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # ---------------------------------------------------------------------------------------------------------- HTTP/2

    def sent(self, number: int) -> bool:
        """All that was written on the stream went out, and there is room for more."""
        return not self._paused and self.http2.queued_body_size(number) == 0

    def acknowledge(self, size: int, number: int) -> None:
        """So many bytes of a stream were read: make room for as many."""
        if not self._closing:
            self.http2.acknowledge_received_data(size, number)

    def _take(self) -> None:
        for event in self.http2.events():
            match event:
                case ngh2.DataReceived(number, data, last):
                    if call := self._calls.get(number):
                        call.received(data, last=last)
                    else:
                        self.acknowledge(len(data), number)
                case ngh2.RequestReceived(number, headers, last):
                    self._open(number, dict(headers), last=last)
                case ngh2.TrailersReceived(number, _):
                    if call := self._calls.get(number):
                        call.received(b"", last=True)
                case ngh2.StreamClosed(number, _, _):
                    self._ending.discard(number)
                    if call := self._calls.pop(number, None):
                        call.close()
                case ngh2.ConnectionClosed():
                    self._close()
                case _:
                    pass

    def _open(self, number: int, headers: Mapping[bytes, bytes], *, last: bool) -> None:
        if headers[b":method"] != b"POST" or not headers.get(b"content-type", b"").startswith(b"application/grpc"):
            self.http2.send_response(number, ((b":status", b"415"),), end_stream=True)
            self._ending.add(number)
            return
        call = self._calls[number] = Call(self, number, headers[b":path"].decode("latin-1"))
        self._idle = 0
        served = self._server.routes.get(call.path)
        if served is None:
            call.finish(Status.UNIMPLEMENTED, f"there is no method {call.path}")
            return
        if value := headers.get(b"grpc-timeout"):
            try:
                call.limit(framing.timeout(value))
            except Malformed as e:
                call.finish(e.status, str(e))
                return
        call.run(self._server.tasks.create_task(call.serve(served)))
        if last:
            call.received(b"", last=True)

    def ended(self, number: int) -> None:
        """A stream has got its last bytes."""
        self._ending.add(number)
        self.flush()

    def _reset_ended(self) -> None:
        """What a client would still say on a stream that was ended here is of no use: let it know."""
        told = [number for number in self._ending if self.sent(number)]
        for number in told:
            self._ending.discard(number)
            self.http2.reset_stream(number, ngh2.ErrorCode.NO_ERROR)
        if told:
            self._send()
            self._take()


class _Server:
    """All connections, and the tasks that serve their calls."""

    def __init__(
        self,
        routes: Mapping[str, Callable[[Call], Awaitable[None]]],
        tls: Callable[[], ServerTLS],
        tasks: asyncio.TaskGroup,
        *,
        max_age: float,
        most: int,
    ) -> None:
        self.routes = routes
        self.tasks = tasks
        self.max_age = max_age
        self._tls = tls
        self._most = most
        self._presented: tuple[ServerTLS, ssl.SSLContext] | None = None
        self._connections: dict[_Connection, None] = {}
        self._of_one: Counter[str] = Counter()
        self._empty = asyncio.Event()

    def context(self) -> ssl.SSLContext:
        """What new connections are met with."""
        newest = self._tls()
        if self._presented is None or self._presented[0] is not newest:
            self._presented = newest, server_context(newest)
        return self._presented[1]

    def entered(self, connection: _Connection) -> bool:
        """False: there is no room for it."""
        if len(self._connections) >= self._most:
            return False
        self._connections[connection] = None
        return True

    def authenticated(self, connection: _Connection) -> bool:
        """False: there are enough of this client."""
        self._of_one[connection.certificate] += 1
        return self._of_one[connection.certificate] <= MOST_OF_ONE

    def left(self, connection: _Connection) -> None:
        if connection.certificate:
            self._of_one[connection.certificate] -= 1
            if not self._of_one[connection.certificate]:
                del self._of_one[connection.certificate]
        self._connections.pop(connection, None)
        if not self._connections:
            self._empty.set()

    async def look_after(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            for connection in tuple(self._connections):
                connection.sweep()

    async def stop(self) -> None:
        """End all connections; returns when they are gone."""
        for connection in tuple(self._connections):
            connection.retire("this server shuts down")
        self._empty.clear()
        if self._connections:
            await self._empty.wait()


@asynccontextmanager
async def serving(
    routes: Mapping[str, Callable[[Call], Awaitable[None]]],
    tls: Callable[[], ServerTLS],
    *,
    address: str,
    max_connection_age: float,
    max_connections: int,
) -> AsyncIterator[int]:
    """Serve at `address` (host:port, port 0 for any) for as long as the block runs; yields the port.

    Args:
        routes: what serves a call, by its path; it returns when the call is to end.
        tls: asked at each new connection; the same object until something changed. Clients must have a certificate
            that leads to its roots.
        max_connection_age: seconds, give or take a tenth.

    Raises:
        Unavailable: the address cannot be bound.
    """
    bound = _bound(address)
    async with asyncio.TaskGroup() as tasks:
        server = _Server(routes, tls, tasks, max_age=max_connection_age, most=max_connections)
        looking_after = tasks.create_task(server.look_after())
        listener = await asyncio.get_running_loop().create_server(lambda: _Connection(server), sock=bound)
        try:
            yield bound.getsockname()[1]
        finally:
            listener.close()
            await server.stop()
            looking_after.cancel()


def _bound(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as e:
        raise Unavailable(
            f"{address} cannot be bound: {e}", hint="is another process there, or is it no address of this machine?"
        ) from None
