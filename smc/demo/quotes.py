"""A gRPC program that has no Envoy: it is told by xDS itself. It serves quotes, or asks for them at a steady rate.

    GRPC_XDS_BOOTSTRAP=… python -m smc.demo.quotes serve --address 127.0.10.3 --version v1
    GRPC_XDS_BOOTSTRAP=… python -m smc.demo.quotes ask --address 127.0.10.4 --target xds:///quotes.quotes:8080

The bootstrap is what `smc proxy run --grpc` writes. Both serve their counters as the programs of `smc.demo.apps` do,
and in the same words. `ask` writes one JSON object for each call to standard output, in the order of the answers; no
call is made again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent import futures
from functools import partial
from typing import Any

import grpc
import grpc.aio

from smc.demo.apps import APP_PORT, CONTROL_PORT, Reply, Visitor, asked_to_stop, control
from smc.demo.apps import serve as serve_http
from smc.demo.traffic import open_loop

GET = "/quotes.Quotes/Get"
THREADS = 8
TIMEOUT = 10.0
"""Seconds that one call may take."""
GRACE = 2.0
"""Seconds for the calls under way when the program is asked to end."""


class Quotes(grpc.GenericRpcHandler):
    """Answers every call with who was asked and who asks, and counts them. Called from the server's threads."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._lock = threading.Lock()
        self._calls: Counter[tuple[str, str]] = Counter()

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(partial(self._answer, handler_call_details.method))

    def counters(self) -> dict[str, Any]:
        with self._lock:
            calls = sorted(self._calls.items())
        return {
            "version": self._version,
            "total": sum(count for _, count in calls),
            "requests": [{"path": path, "client": client, "count": count} for (path, client), count in calls],
        }

    def _answer(self, method: str, _request: bytes, context: grpc.ServicerContext) -> bytes:
        known: Mapping[str, Any] = context.auth_context()
        names = known.get("x509_subject_alternative_name", ())
        caller = names[0].decode() if names else ""
        with self._lock:
            self._calls[method, caller] += 1
        return json.dumps({"version": self._version, "method": method, "caller": caller}).encode()


async def serve(address: str, port: int, control_port: int, version: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asked_to_stop()
    quotes = Quotes(version)
    server = grpc.server(futures.ThreadPoolExecutor(THREADS), xds=True, handlers=[quotes])
    # What is there without xDS is nothing: a program that is not told whom to trust trusts nobody.
    fallback = grpc.ssl_server_credentials([(b"", b"")])
    server.add_secure_port(f"{address}:{port}", grpc.xds_server_credentials(fallback))
    server.start()
    runner = await serve_http(control(quotes.counters), address, control_port)
    await stop.wait()
    await runner.cleanup()
    await asyncio.to_thread(server.stop(GRACE).wait)


async def ask(address: str, control_port: int, target: str, method: str, rate: float) -> None:
    """Call `rate` times a second until SIGTERM or SIGINT."""
    stop = asked_to_stop()
    credentials = grpc.xds_channel_credentials(grpc.local_channel_credentials())
    async with grpc.aio.secure_channel(target, credentials) as channel:
        visitor = Visitor(target, partial(_call, channel.unary_unary(method)))
        runner = await serve_http(control(visitor.counters), address, control_port)
        await open_loop(rate, visitor.visit, stop)
        await runner.cleanup()


async def _call(call: Any) -> Reply:
    said: dict[str, Any]
    try:
        said = json.loads(await call(b"", timeout=TIMEOUT, wait_for_ready=False))
        status = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as e:
        status, said = e.code(), {"error": e.details()}
    sys.stdout.write(json.dumps({"status": status.name, **said}) + "\n")
    sys.stdout.flush()
    return Reply(status.name, str(said.get("version", "")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m smc.demo.quotes", description=__doc__)
    does = parser.add_subparsers(dest="does", required=True)
    serving, asking = does.add_parser("serve"), does.add_parser("ask")
    for program in (serving, asking):
        program.add_argument("--address", required=True, help="the IP address to bind")
        program.add_argument("--control-port", type=int, default=CONTROL_PORT)
    serving.add_argument("--port", type=int, default=APP_PORT)
    serving.add_argument("--version", default="v1")
    asking.add_argument("--target", required=True, help="xds:///<service>.<namespace>:<port>")
    asking.add_argument("--method", default=GET)
    asking.add_argument("--rate", type=float, default=50.0, help="calls a second")
    given = vars(parser.parse_args(arguments))
    programs: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"serve": serve, "ask": ask}
    asyncio.run(programs[given.pop("does")](**given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
