"""One gRPC stream on a mTLS connection of its own, from the client's side, for as little CPU as Python can do it.

As in the server, TLS is OpenSSL's on bytes in memory, and HTTP/2 libnghttp2's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Self, cast

import ngh2

from smc import tls
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.xds.framing import Messages, Status, prefix

_HANDSHAKE = 120.0
"""Seconds for it: a thousand others shake hands on the same cores."""
_WINDOW = 16 * 1024 * 1024
"""As Envoy's: a response never waits for it."""
_LONGEST = 1024 * 1024 * 1024
_RECORD = 16 * 1024
"""Bytes of the longest TLS record."""


class Client(asyncio.Protocol):
    """Belongs to one event loop. `ended` says how the stream ended: a status, and the server's words."""

    def __init__(self, credential: Credential, method: str, received: Callable[[Client, bytes], None]) -> None:
        """`received` is told of each message."""
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[tuple[int, str]] = loop.create_future()
        self.secured: asyncio.Future[None] = loop.create_future()
        self._method = method
        self._received = received
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        host = x509.replica_host(credential.trust_domain)
        self._tls = _context(credential).wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._http2 = ngh2.Connection(ngh2.Role.CLIENT)
        self._messages = Messages(_LONGEST)
        self._stream = 0
        self._transport: asyncio.Transport

    @classmethod
    async def connect(
        cls, target: str, credential: Credential, method: str, received: Callable[[Client, bytes], None]
    ) -> Self:
        """Open a connection to `target` (host:port) and the stream on it.

        Raises:
            OSError: nobody listens there, or TLS refuses.
        """
        host, _, port = target.rpartition(":")
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(credential, method, received), host, int(port))
        try:
            async with asyncio.timeout(_HANDSHAKE):
                await client.secured
        except BaseException:
            client.close()
            raise
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._shake_hands()

    def write(self, messages: bytes) -> None:
        """Send them now; each is framed."""
        if not self.ended.done():
            self._http2.send_data(self._stream, messages)
            self._flush()

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        if not self.secured.done():
            self._shake_hands()
            if not self.secured.done():
                return
        try:
            while self._incoming.pending:
                self._http2.receive_data(self._tls.read(_RECORD))
        except ssl.SSLWantReadError:
            pass  # the rest of a record is yet to come
        except ssl.SSLError as e:
            self._end(Status.UNAVAILABLE, f"the connection was lost: {e}")
        for event in self._http2.events():
            if isinstance(event, ngh2.DataReceived):
                for message in self._messages.feed(event.data):
                    self._received(self, message)
            else:
                self._take(event)
        if self._http2.want_write:  # nearly always there is nothing; to ask costs a fifth of taking it
            self._flush()

    def _take(self, event: ngh2.Event) -> None:
        match event:
            case ngh2.TrailersReceived(_, headers) | ngh2.ResponseReceived(_, headers, True):
                said = dict(headers)
                self._end(int(said.get(b"grpc-status", Status.UNKNOWN)), said.get(b"grpc-message", b"").decode())
            case ngh2.StreamClosed() | ngh2.ConnectionClosed():
                self._end(Status.UNAVAILABLE, "the stream was cut")
            case _:
                pass

    def connection_lost(self, error: Exception | None) -> None:
        lost = f"the connection was lost: {error or 'closed'}"
        if not self.secured.done():
            self.secured.set_exception(ConnectionError(lost))
        self._end(Status.UNAVAILABLE, lost)

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as e:
            self.secured.set_exception(e)
        else:
            self.secured.set_result(None)
            self._open()
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def _open(self) -> None:
        self._http2.initiate_connection({ngh2.Setting.INITIAL_WINDOW_SIZE: _WINDOW})
        self._http2.set_local_window_size(_WINDOW)
        self._stream = self._http2.send_request(
            [
                (b":method", b"POST"),
                (b":scheme", b"https"),
                (b":path", self._method.encode()),
                (b":authority", b"smc"),
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
            ]
        )
        self._flush()

    def _end(self, status: int, text: str) -> None:
        if not self.ended.done():
            self.ended.set_result((status, text))
            self._transport.close()

    def _flush(self) -> None:
        if (data := self._http2.data_to_send()) and not self._transport.is_closing():
            self._tls.write(data)
            self._transport.write(self._outgoing.read())


def framed(message: bytes) -> bytes:
    """As it is on the stream."""
    return prefix(len(message)) + message


def _context(credential: Credential) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=credential.roots_pem)
    context.set_alpn_protocols(["h2"])
    tls.present(context, credential.chain, credential.key)
    return context
