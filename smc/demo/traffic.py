"""Requests as an application sends them through its sidecar: at a steady rate whatever the answers do, and never twice.

Written on asyncio's streams, because the usual clients send a request again when a kept connection turns out to be
closed. Here one call is one request on the wire, so that what is counted is what happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

MAX_IDLE = 512
"""Connections that are kept for the next requests: of more than a machine that stood still has to catch up with."""
MAX_BODY = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    sent: float
    """When it was sent: seconds on the monotonic clock, as `asyncio`'s loop has it."""
    latency: float
    """Seconds until the whole answer, or the failure."""
    status: int
    """0: there was no answer."""
    body: bytes = b""
    error: str = ""
    """Why there was no answer."""


class Caller:
    """An HTTP/1.1 client behind an explicit proxy; without one it goes straight to the host.

    With `keep_alive` a connection is used again as long as the other side lets it, else each request has its own.
    Close it when done.
    """

    def __init__(self, proxy: str | None, *, keep_alive: bool = False, timeout: float = 10.0) -> None:
        """`proxy` is host:port, with or without `http://`; `timeout` is in seconds, for connection and answer."""
        self._proxy = proxy.removeprefix("http://").rstrip("/") if proxy else None
        self._keep_alive = keep_alive
        self._timeout = timeout
        self._idle: dict[str, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self._closed = False

    async def request(
        self, url: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Send one request, once. A failure is an Answer with status 0, not an exception. Cancelling is safe."""
        loop = asyncio.get_running_loop()
        sent = loop.time()
        try:
            async with asyncio.timeout(self._timeout):
                status, content = await self._exchange(url, method, headers or {}, body)
        except TimeoutError:
            return Answer(sent, loop.time() - sent, 0, error=f"no answer within {self._timeout:g} s")
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as e:
            return Answer(sent, loop.time() - sent, 0, error=f"{type(e).__name__}: {e}")
        return Answer(sent, loop.time() - sent, status, content)

    async def close(self) -> None:
        self._closed = True
        for connections in self._idle.values():
            for _, writer in connections:
                await _close(writer)
        self._idle.clear()

    async def _exchange(self, url: str, method: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(url)
        origin = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = f"http://{parts.netloc}{origin}" if self._proxy else origin
        lines = [f"{method} {target} HTTP/1.1", f"host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body or method not in ("GET", "HEAD", "DELETE"):
            lines.append(f"content-length: {len(body)}")
        if not self._keep_alive:
            lines.append("connection: close")
        request = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
        authority = self._proxy or parts.netloc
        reader, writer = await self._connection(authority)
        reusable = False
        try:
            writer.write(request)
            status, content, reusable = await _read(reader, method)
        finally:
            if reusable and self._keep_alive and not self._closed:
                idle = self._idle.setdefault(authority, [])
                if len(idle) < MAX_IDLE:
                    idle.append((reader, writer))
                else:
                    await _close(writer)
            else:
                await _close(writer)
        return status, content

    async def _connection(self, authority: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        idle = self._idle.get(authority, [])
        while idle:
            reader, writer = idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            await _close(writer)
        host, _, port = authority.rpartition(":") if ":" in authority else (authority, "", "80")
        return await asyncio.open_connection(host, int(port))


async def _read(reader: asyncio.StreamReader, method: str) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection may be used again."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, _, rest = head[0].partition(" ")
    status = int(rest[:3])
    if not version.startswith("HTTP/1.") or not 200 <= status < 600:
        raise ValueError(f"{head[0][:80]!r} is no final HTTP/1.1 answer")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    lasting = headers.get("connection", "").lower() != "close"
    if method == "HEAD" or status in (204, 304):
        return status, b"", lasting
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return status, await _read_chunks(reader), lasting
    if "content-length" in headers:
        length = int(headers["content-length"])
        if not 0 <= length <= MAX_BODY:
            raise ValueError(f"a body of {length} bytes")
        return status, await reader.readexactly(length), lasting
    content = await reader.read(MAX_BODY)
    return status, content, False


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    content = bytearray()
    while True:
        length = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if not 0 <= length <= MAX_BODY - len(content):
            raise ValueError("a chunked body that is too long")
        chunk = await reader.readexactly(length + 2)
        if length == 0:
            return bytes(content)
        content += chunk[:-2]


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        return  # it was broken already: there is nothing left to close


async def open_loop(rate: float, send: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event) -> None:
    """Call `send` `rate` times a second until `stop` is set, then wait for the calls under way.

    A call that is late or slow delays no other: what was missed while the loop was busy is made up for at once. So
    there are as many under way as `rate` times how long one can take. When cancelled, the calls under way are too.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    calls = 0
    async with asyncio.TaskGroup() as tasks:
        while not stop.is_set():
            early = start + calls / rate - loop.time()
            if early > 0:
                await asyncio.sleep(early)
                continue
            tasks.create_task(send())
            calls += 1
            if calls % 100 == 0:
                await asyncio.sleep(0)  # also while catching up, let the answers in
