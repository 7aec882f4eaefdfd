"""The floor: the transport alone. It writes bytes which are ready to all of its streams, and does nothing else.

It shows what HTTP/2 and TLS cost with the same clients, connections and messages. Run as a process:
`python -m bench.floor <host:port> <directory of a credential> <file with the message>`.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from pathlib import Path

import uvloop

from bench.streams import DELTA
from smc.certificates import credential
from smc.serve import GC_THRESHOLDS
from smc.tls import ServerTLS
from smc.xds import transport
from smc.xds.transport import Call

PUSH = "/bench.Floor/Push"
"""Writes the message to every stream; the answer comes when all are written."""


class Floor:
    def __init__(self, message: bytes) -> None:
        self._message = message
        self._calls: dict[Call, None] = {}

    async def stream(self, call: Call) -> None:
        """Answer the first request with the message, and read what comes after it."""
        await call.read()
        call.write(self._message)
        self._calls[call] = None
        try:
            while await call.read() is not None:
                pass
        finally:
            del self._calls[call]

    async def push(self, asked: Call) -> None:
        while await asked.read() is not None:
            for call in self._calls:
                call.write(self._message)
            asked.write(b"")


async def serve(address: str, directory: Path, message: bytes) -> None:
    """Until SIGTERM."""
    own = credential.read(directory)
    tls = ServerTLS(own.chain, own.key, own.roots_pem)
    floor = Floor(message)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with transport.serving(
        {DELTA.method: floor.stream, PUSH: floor.push},
        lambda: tls,
        address=address,
        max_connection_age=3600,
        max_connections=100_000,
    ):
        await stop.wait()


if __name__ == "__main__":
    gc.set_threshold(*GC_THRESHOLDS)
    uvloop.run(serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]).read_bytes()))
