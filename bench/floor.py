"""The floor: a gRPC server that writes bytes which are ready to all of its streams, and does nothing else.

It shows what grpc.aio and TLS cost with the same clients, connections and messages. Run as a process:
`python -m bench.floor <host:port> <directory of a credential> <file with the message>`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.streams import METHOD
from smc.certificates import credential
from smc.tls import ServerTLS, server_credentials

PUSH = "/bench.Floor/Push"
"""Writes the message to every stream; the answer comes when all are written."""


class Floor:
    def __init__(self, message: bytes) -> None:
        self._message = message
        self._calls: dict[Any, None] = {}

    async def stream(self, _requests: Any, call: Any) -> None:
        """Answer the first request with the message, and read what comes after it."""
        await call.read()
        await call.write(self._message)
        self._calls[call] = None
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        finally:
            del self._calls[call]

    async def push(self, _request: bytes, _call: Any) -> bytes:
        await asyncio.gather(*(call.write(self._message) for call in self._calls))
        return b""


async def serve(address: str, directory: Path, message: bytes) -> None:
    """Until SIGTERM."""
    own = credential.read(directory)
    tls = ServerTLS(own.chain, own.key, own.roots_pem)
    floor = Floor(message)
    service, _, method = METHOD[1:].partition("/")
    push_service, _, push_method = PUSH[1:].partition("/")
    server = grpc.aio.server(
        options=[("grpc.server.max_pending_requests", 20_000), ("grpc.server.max_pending_requests_hard_limit", 40_000)]
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                service, {method: grpc.stream_stream_rpc_method_handler(floor.stream)}
            ),
            grpc.method_handlers_generic_handler(
                push_service, {push_method: grpc.unary_unary_rpc_method_handler(floor.push)}
            ),
        )
    )
    server.add_secure_port(address, server_credentials(lambda: tls, require_client=True))
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]).read_bytes()))
