"""The bookstore and its visitors: ordinary HTTP programs that know nothing of a mesh, and count what they see.

    python -m smc.demo.apps bookstore --address 127.0.10.3 --port 8080 --version v1
    http_proxy=http://127.0.10.1:15001 python -m smc.demo.apps bookbuyer --address 127.0.10.1

Each serves its counters as JSON at `http://<address>:<control port>/_counters`, which no proxy and no policy is in
front of. What the demo and the end-to-end tests claim about traffic is read there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from aiohttp import web

from smc.demo.traffic import Answer, Caller, open_loop

APP_PORT = 8080
CONTROL_PORT = 8081
XFCC = "x-forwarded-client-cert"
MAX_COUNTERS = 1000
"""Different requests that are counted apart; whatever comes after that is counted as one."""
BOOKS = ("The Design of Everyday Things", "Structure and Interpretation", "The Mythical Man-Month")


def identities(xfcc: str) -> tuple[str, str]:
    """(source, destination): the SPIFFE IDs in the last element of an x-forwarded-client-cert header; "" if missing."""
    fields = dict(part.partition("=")[::2] for part in xfcc.rpartition(",")[2].split(";"))
    return fields.get("URI", ""), fields.get("By", "")


class Bookstore:
    """Sells books to whoever asks, under any name, and writes down who it was."""

    def __init__(self, version: str, access_log: TextIO | None) -> None:
        self._version = version
        self._access_log = access_log
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._sold = 0

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        return app

    def counters(self) -> dict[str, Any]:
        return {
            "version": self._version,
            "total": self._requests.total(),
            "sold": self._sold,
            "requests": [
                {"method": method, "path": path, "client": client, "count": count}
                for (method, path, client), count in sorted(self._requests.items())
            ],
        }

    async def _serve(self, request: web.Request) -> web.Response:
        xfcc = request.headers.get(XFCC, "")
        client, _ = identities(xfcc)
        key = (request.method, request.path, client)
        if key not in self._requests and len(self._requests) >= MAX_COUNTERS:
            key = ("*", "*", "*")
        self._requests[key] += 1
        status, said = self._answer(request.method, request.path)
        if self._access_log is not None:
            line = {"time": time.time(), "method": request.method, "path": request.path, "client": client}
            self._access_log.write(json.dumps(line | {"status": status}) + "\n")
        body = {"version": self._version, "method": request.method, "path": request.path, XFCC: xfcc} | said
        return web.json_response(body, status=status)

    def _answer(self, method: str, path: str) -> tuple[int, dict[str, Any]]:
        match method, path.split("/")[1:]:
            case "GET", ["books"]:
                return 200, {"books": BOOKS}
            case "GET", ["books", number] if number.isdecimal() and int(number) < len(BOOKS):
                return 200, {"book": BOOKS[int(number)]}
            case "POST", ["buy"]:
                self._sold += 1
                return 200, {"sold": self._sold}
            case "GET", ["admin"]:
                return 200, {"admin": "what only the owner should see"}
        return 404, {"error": "there is nothing here"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back to a visitor."""

    status: int | str
    """As the protocol writes it: 200, or `PERMISSION_DENIED`; 0: there was no answer."""
    version: str = ""
    """Of the server that answered; "" if none did."""
    error: str = ""
    """Why there was no answer."""


class Visitor:
    """Asks for the same thing for ever, and counts what comes back."""

    def __init__(self, name: str, ask: Callable[[], Awaitable[Reply]]) -> None:
        self._name = name
        self._ask = ask
        self._sent = 0
        self._answers: Counter[tuple[int | str, str]] = Counter()
        self._errors: Counter[str] = Counter()

    def counters(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "sent": self._sent,
            "answered": self._answers.total(),
            "failed": self._errors.total(),
            "answers": [
                {"status": status, "version": version, "count": count}
                for (status, version), count in sorted(self._answers.items())
            ],
            "errors": [{"error": error, "count": count} for error, count in sorted(self._errors.items())],
        }

    async def visit(self) -> None:
        self._sent += 1
        reply = await self._ask()
        if reply.status == 0:
            self._errors[reply.error if len(self._errors) < MAX_COUNTERS else "*"] += 1
        else:
            self._answers[reply.status, reply.version] += 1


async def page(caller: Caller, url: str) -> Reply:
    """Ask for a page of the bookstore."""
    answer = await caller.request(url)
    return Reply(answer.status, version(answer), answer.error)


def version(answer: Answer) -> str:
    """Which bookstore answered; "" if none did."""
    return str(document(answer).get("version", ""))


def document(answer: Answer) -> dict[str, Any]:
    """What the bookstore said; empty if it was somebody else who answered."""
    try:
        found = json.loads(answer.body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


async def serve(app: web.Application, address: str, port: int) -> web.AppRunner:
    """Start serving; `cleanup()` on what is returned ends it, after the requests under way."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    await web.TCPSite(runner, address, port, backlog=1024).start()
    return runner


def control(counters: Callable[[], dict[str, Any]]) -> web.Application:
    """What serves a program's counters."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(counters())

    app = web.Application()
    app.router.add_get("/_counters", answer)
    return app


def asked_to_stop() -> asyncio.Event:
    """Set on SIGTERM and SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def run(options: argparse.Namespace) -> None:
    """Run one program until SIGTERM or SIGINT."""
    stop = asked_to_stop()
    runners: list[web.AppRunner] = []
    try:
        if options.program == "bookstore":
            log = Path(options.access_log).open("a", buffering=1) if options.access_log else None  # noqa: ASYNC230, SIM115
            store = Bookstore(options.version, log)
            runners.append(await serve(store.application(), options.address, options.port))
            runners.append(await serve(control(store.counters), options.address, options.control_port))
            await stop.wait()
            if log is not None:
                log.close()
        else:
            caller = Caller(os.environ.get("http_proxy"), keep_alive=True)
            visitor = Visitor(options.program, partial(page, caller, options.url))
            runners.append(await serve(control(visitor.counters), options.address, options.control_port))
            await open_loop(options.rate, visitor.visit, stop)
            await caller.close()
    finally:
        for runner in runners:
            await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m smc.demo.apps", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    for name in ("bookstore", "bookbuyer", "bookthief"):
        program = programs.add_parser(name)
        program.add_argument("--address", required=True, help="the IP address to bind")
        program.add_argument("--control-port", type=int, default=CONTROL_PORT)
        if name == "bookstore":
            program.add_argument("--port", type=int, default=APP_PORT)
            program.add_argument("--version", default="v1")
            program.add_argument("--access-log", default="", help="a file: one line of JSON a request")
        else:
            program.add_argument("--url", default="http://bookstore.bookstore/books")
            program.add_argument("--rate", type=float, default=20.0, help="requests a second")
    asyncio.run(run(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
