"""A bad network on the loopback: a TCP proxy that delays, swallows or cuts what goes through it, as it is told."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

_CHUNK = 64 * 1024


class Chaos:
    """Forwards every connection from `listen` to `target` (each host:port) while it is open, and not always well.

    `delay` (seconds, each way) and `swallowing` may be set at any time, and concern open connections too.
    """

    def __init__(self, listen: str, target: str) -> None:
        self.listen, self.target = listen, target
        self.delay = 0.0
        self.swallowing = False
        """What is sent arrives nowhere, and nobody is told: the other side looks hung, or half-open."""
        self.connections = 0
        """How many were accepted so far."""
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.restore()
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        await self.cut()

    async def cut(self) -> None:
        """Break every connection, and refuse new ones until `restore`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.reset()

    async def reset(self) -> None:
        """Break every connection; new ones are welcome if they were before."""
        tasks = tuple(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def restore(self) -> None:
        """Forward again, at once and everything. A connection that lost something is broken, not mended."""
        if self.swallowing:
            await self.reset()
        self.delay, self.swallowing = 0.0, False
        if self._server is None:
            host, _, port = self.listen.rpartition(":")
            self._server = await asyncio.start_server(self._accept, host, int(port))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._forward(reader, writer), name="chaos")
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            writers.append(far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, far_writer))
                both.create_task(self._copy(far_reader, writer))
        except* OSError:
            pass  # one side broke: so does the other
        finally:
            for one in writers:
                one.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the end, which is passed on. The delay is one of latency: what follows closely arrives closely."""
        loop = asyncio.get_running_loop()
        # Bounded, so that a slow receiver slows the sender down, as it would without us.
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def deliver() -> None:
            while True:
                due, data = await line.get()
                await asyncio.sleep(due - loop.time())
                if self.swallowing:
                    continue
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as both:
            both.create_task(deliver())
            data = b"-"
            while data:
                data = await reader.read(_CHUNK)
                await line.put((loop.time() + self.delay, data))
