"""Whatever a proxy says on its streams, it costs a bounded amount, breaks nothing, and nobody else notices."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import ssl
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from resource import getpagesize
from typing import Any

import ngh2
import pytest
import structlog

from smc.xds import delta, server, session, slot, stream, subscription, transport
from smc.xds.snapshot import Type
from smc.xds.stream import Request
from smc.xds.subscription import LONGEST_TEXT
from tests.feature.test_manifest_to_wire import BUYER, STORE, THIEF, bookshop
from tests.unit.xds.replica import Client, Mesh, Replica, until

FUZZED = 10_000
"""Requests that the replica has read, most of which it has taken in."""
WARM = 1_000
"""Requests after which the process has what it needs for good."""
SEED = 20_26
SHARED = 2**20
"""Bytes of memory for shared responses, so few that they are full after the first requests and take no more later."""
MOST_GROWTH, MOST_KEPT = 128 * 2**20, 24 * 2**20
"""Bytes that the process may grow by at any time after the first requests, when some messages are of megabytes, and
until the end, when all that is free has been given back. Of that it took 5 to 8 MiB, after 30,000 requests as well."""
CONVERGES = 1.0
"""Seconds from a change to the proxy whose streams are in order: that the replica computes at most, and that half of
the changes take at most. A machine with other work to do may take any time for one of them."""
EXPECTED = {"", "OK", "CANCELLED", "INVALID_ARGUMENT", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"}
"""How a stream may end that somebody speaks nonsense on. A defect of the replica is UNKNOWN or INTERNAL."""
OWN = (
    transport._Connection, transport.Call, ngh2.Connection, ssl.SSLObject, session.Session, slot.Slot, stream.Stream,
    subscription.Subscription,
)  # fmt: skip
"""What each connection, or each stream, has for itself, and what holds all the rest of it."""


class Tally:
    """What the replica was made to do."""

    def __init__(self) -> None:
        self.read = 0
        self.taken = 0
        self.logged: Counter[tuple[str, str]] = Counter()
        """(level, event)"""
        self.longest = 0
        """Characters of a line."""

    def count(self, _logger: object, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Forgets the line: all of them would be what the memory is full of."""
        self.logged[level, event["event"]] += 1
        self.longest = max(self.longest, sum(len(str(value)) for value in event.values()))
        raise structlog.DropEvent


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tally]:
    tally = Tally()

    class Counted(server._Reader):
        def __call__(self, data: bytes | None) -> Request | None:
            tally.read += data is not None
            request = super().__call__(data)
            tally.taken += request is not None
            return request

    monkeypatch.setattr(server, "_Reader", Counted)
    processors = structlog.get_config()["processors"]  # loggers that are bound already share the list
    before = processors.copy()
    processors[:] = [tally.count]
    try:
        yield tally
    finally:
        processors[:] = before


class Fuzzer:
    """The process of those who speak nonsense."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def report(self) -> dict[str, Any]:
        """Let it end; returns what it says."""
        async with asyncio.timeout(60):
            output, _ = await self._process.communicate(b"")
        assert self._process.returncode == 0, "why is on standard error"
        found: dict[str, Any] = json.loads(output)
        return found


@asynccontextmanager
async def fuzzing(replica: Replica, *clients: tuple[Client, bool]) -> AsyncIterator[Fuzzer]:
    """While these say to the replica what they should not. True: in the incremental variant of the protocol."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.feature.fuzzer"),
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        said = [
            {
                "node": str(client.name),
                "delta": delta,
                "key": client.credential.key,
                "chain": client.credential.chain,
                "roots": client.credential.roots_pem,
            }
            for client, delta in clients
        ]
        assert process.stdin is not None
        process.stdin.write(json.dumps({"port": replica.port, "seed": SEED, "clients": said}).encode() + b"\n")
        yield Fuzzer(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * getpagesize()


def held() -> int:
    """The same without what nobody needs: what the allocator has kept for later says nothing."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def alive() -> Counter[str]:
    """How many there are of OWN."""
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects() if isinstance(found, OWN))


async def change(mesh: Mesh, store: Client, number: int) -> tuple[float, float]:
    """Write what concerns all proxies.

    Returns the seconds until the one whose streams are in order has it, and how many of these were spent on it and on
    whatever came between, by this process.
    """
    await mesh.split("paper", paper_v2=number % 99 + 1, bookstore=100)
    path = f"/books/{number}/"
    await mesh.routes(path)
    written, used = time.monotonic(), time.process_time()
    await until(lambda: path.encode() in store.get(Type.ROUTE, "inbound|8080").SerializeToString())
    took = time.monotonic() - written, time.process_time() - used
    await mesh.kv.compact(mesh.store.revision)  # what the store and the client remember of it is not the replica's
    store.news()
    return took


async def test_ten_thousand_fuzzed_requests_break_nothing_cost_little_and_delay_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sys.stdout.write(f"seed {SEED}\n")
    caplog.set_level(logging.WARNING)  # gRPC and asyncio tell here what nobody has caught
    asyncio.get_running_loop().slow_callback_duration = float("inf")  # a slow machine is no defect
    monkeypatch.setattr(delta, "MOST_SHARED", SHARED)
    delays: list[tuple[float, float]] = []
    with counted(monkeypatch) as tally:
        async with bookshop(STORE) as (mesh, replica, (store,)):
            await mesh.allow(BUYER, STORE)
            odd = [await Client.of(mesh, BUYER), await Client.of(mesh, THIEF)]
            own = alive()
            async with fuzzing(replica, *zip(odd, (True, False), strict=True)) as fuzzer:
                before = peak = 0
                while tally.read < WARM + FUZZED and fuzzer.is_running:
                    delays.append(await change(mesh, store, len(delays)))
                    if tally.read >= WARM:
                        before = before or held()
                        peak = max(peak, resident())
                    await asyncio.sleep(0.05)
                report = await fuzzer.report()
            await until(lambda: len(replica.streams.sessions) == 1 and len(replica.streams._calls) == 1)
            with suppress(TimeoutError):  # a connection ends soon after its client
                await until(lambda: alive() == own)
            left, after = alive(), held()
            assert store.ended is None
            for client in odd:
                async with client.connected(replica):
                    await until(lambda: client.is_complete)  # noqa: B023 - awaited here
    ends, (seconds, computed) = Counter(report["ends"]), zip(*delays, strict=True)
    sys.stdout.write(
        f"{tally.read} requests read, {tally.taken} taken in, {ends.total()} streams: {dict(ends)}; "
        f"{len(delays)} changes in {statistics.median(seconds) * 1000:.0f} ms, at most {max(seconds) * 1000:.0f} ms, "
        f"with at most {max(computed) * 1000:.0f} ms of CPU; "
        f"MiB held {before >> 20}, resident at most {peak >> 20}, held in the end {after >> 20}\n"
    )
    assert tally.taken > FUZZED / 2, "what is turned away at the door tests the door alone"
    assert not ends.keys() - EXPECTED
    assert not report["uncaught"]
    assert not caplog.records
    assert {level for level, _ in tally.logged} <= {"info", "warning"}
    assert tally.longest <= LONGEST_TEXT + 1_000
    assert left == own, "what a stream or a connection had is gone with it"
    assert peak - before <= MOST_GROWTH
    assert after - before <= MOST_KEPT
    assert max(computed) < CONVERGES
    assert statistics.median(seconds) < CONVERGES
