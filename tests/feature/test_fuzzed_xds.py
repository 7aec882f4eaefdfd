"""Whatever a proxy says on its streams, it costs a bounded amount, breaks nothing, and nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from resource import getpagesize
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from envoy.service.discovery.v3 import discovery_pb2

from smc.xds import server
from smc.xds.snapshot import Type
from smc.xds.stream import Request
from smc.xds.subscription import LONGEST_TEXT
from tests.feature.test_manifest_to_wire import BUYER, STORE, THIEF, bookshop
from tests.unit.xds.replica import Client, Mesh, Replica, channel, open_stream, until

FUZZED = 10_000
"""Requests that the replica has read, most of which it has taken in."""
WARM = 1_000
"""Requests after which the process has what it needs for good: pools of gRPC and of the allocator."""
SEED = 20_26
MOST_GROWTH, MOST_KEPT = 128 * 2**20, 64 * 2**20
"""Bytes that the process, the clients of the test with it, may grow by at any time after the first requests, when some
messages are of megabytes, and until the end."""
CONVERGES = 1.0
"""Seconds from a change to the proxy whose streams are in order."""

Code = grpc.StatusCode
EXPECTED = {None, Code.OK, Code.CANCELLED, Code.INVALID_ARGUMENT, Code.PERMISSION_DENIED, Code.RESOURCE_EXHAUSTED}
"""How a stream may end that somebody speaks nonsense on. A defect of the replica is UNKNOWN or INTERNAL."""
UNTOLD = "Internal error from Core"
"""The client's own words for a message that came too late, which hide from it how the stream had ended."""

NAMES = (
    "shop/bookstore|80", "shop/bookstore-v2|80", "shop/paper|80", "passthrough", "outbound", "inbound|8080", "identity",
    "bundle", "nowhere", "shop/", "|", "é🙂", "a\nb", "\x00", "x" * 256,
)  # fmt: skip
URLS = (*(type_.value for type_ in Type), *(type_.value for type_ in Type), "", "type.googleapis.com/a.B", "?" * 5_000)


class Conversation:
    """One stream from the side of the client: what an Envoy would say next, and then something else instead."""

    def __init__(self, rng: random.Random, node: str, service: server.Service, *, delta: bool) -> None:
        self._rng = rng
        self._node = node
        self._delta = delta
        self._message: Any = discovery_pb2.DeltaDiscoveryRequest if delta else discovery_pb2.DiscoveryRequest
        self._heard: Any = discovery_pb2.DeltaDiscoveryResponse if delta else discovery_pb2.DiscoveryResponse
        self._types = service.types
        self._nonces: dict[str, list[str]] = {}
        self.method = f"/{service.name}/{'Delta' if delta else 'Stream'}{service.resources}"

    def hear(self, data: bytes) -> None:
        response = self._heard.FromString(data)
        self._nonces.setdefault(response.type_url, []).append(response.nonce)

    def first(self) -> bytes:
        """Who does not say who he is gets no further: most say it."""
        message = self._asking(self._types[0])
        message.node.id = self._node
        return self._said(message, damaged=self._rng.random() < 0.1)

    def next(self) -> bytes:
        type_ = self._rng.choice(self._types)
        message = self._answer(type_) if self._rng.random() < 0.6 else self._asking(type_)
        return self._said(message, damaged=self._rng.random() < 0.7)

    # What an Envoy says.

    def _asking(self, type_: Type) -> Any:
        message = self._message(type_url=type_.value)
        names = self._names(type_)
        if not self._delta:
            message.resource_names.extend(names)
            return message
        if self._rng.random() < 0.3:
            message.resource_names_unsubscribe.extend(names)
        else:
            message.resource_names_subscribe.extend(names)
            if self._rng.random() < 0.3:
                message.initial_resource_versions.update(dict.fromkeys(names, "1"))
        return message

    def _answer(self, type_: Type) -> Any:
        nonces = self._nonces.get(type_.value) or [""]
        message = self._message(type_url=type_.value, response_nonce=nonces[-1])
        if not self._delta:
            message.resource_names.extend(self._names(type_))
        if self._rng.random() < 0.3:
            message.error_detail.code = 3
            message.error_detail.message = f"{self._rng.choice(NAMES)}: it is bad"
        return message

    def _names(self, type_: Type) -> list[str]:
        if type_ is Type.SECRET:
            return self._rng.sample(server.OWN_SECRETS, self._rng.randint(1, 2))
        return self._rng.sample(NAMES, self._rng.choice((0, 1, 1, 2, 5)))

    # And what it does not.

    def _said(self, message: Any, *, damaged: bool) -> bytes:
        if damaged and self._rng.random() < 0.8:
            for _ in range(self._rng.randint(1, 2)):
                self._rng.choice(self._mutations)(self, message)
            damaged = False
        data: bytes = message.SerializeToString()
        return self._flipped(data) if damaged else data

    def _flipped(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        at = self._rng.randrange(len(damaged) + 1)
        match self._rng.randrange(4):
            case 0:
                del damaged[at:]
            case 1:
                damaged[at:at] = self._rng.randbytes(self._rng.randint(1, 20))
            case 2:
                damaged += damaged[at:]
            case _:
                for _ in range(self._rng.randint(1, 4) if damaged else 0):
                    damaged[self._rng.randrange(len(damaged))] ^= 1 << self._rng.randrange(8)
        return bytes(damaged)

    def _asked(self, message: Any) -> Any:
        return message.resource_names_subscribe if self._delta else message.resource_names

    def _wrong_type(self, message: Any) -> None:
        message.type_url = self._rng.choice(URLS)

    def _wrong_nonce(self, message: Any) -> None:
        others = [nonce for nonces in self._nonces.values() for nonce in nonces]
        message.response_nonce = self._rng.choice([*others, "0", "-1", "9" * 1_000, "\x00"])

    def _huge_name(self, message: Any) -> None:
        self._asked(message).append("x" * self._rng.choice((255, 256, 257, 10_000, 1_000_000)))

    def _many_names(self, message: Any) -> None:
        self._asked(message).extend(f"n{self._rng.randrange(10**6)}" for _ in range(self._rng.choice((10, 100, 2_000))))

    def _wildcard(self, message: Any) -> None:
        if self._delta and self._rng.random() < 0.5:
            message.resource_names_unsubscribe.append("*")
        else:
            self._asked(message).append("*")

    def _no_names(self, message: Any) -> None:
        self._asked(message).clear()

    def _empty_name(self, message: Any) -> None:
        self._asked(message).append("")

    def _big_text(self, message: Any) -> None:
        message.error_detail.code = self._rng.choice((0, 3, -1))
        words = " ".join(self._rng.choices(NAMES, k=20))
        message.error_detail.message = words * self._rng.choice((1, 10, 1_000))

    def _no_text(self, message: Any) -> None:
        message.error_detail.SetInParent()

    def _swapped(self, message: Any) -> None:
        if not self._delta:
            message.version_info, message.response_nonce = message.response_nonce, message.version_info
            return
        asked, given_up = list(message.resource_names_subscribe), list(message.resource_names_unsubscribe)
        message.ClearField("resource_names_subscribe")
        message.ClearField("resource_names_unsubscribe")
        message.resource_names_subscribe.extend(given_up)
        message.resource_names_unsubscribe.extend(asked)

    def _versions(self, message: Any) -> None:
        if self._delta:
            message.initial_resource_versions.update({f"n{number}": "v" * 500 for number in range(200)})
        else:
            message.version_info = "v" * 100_000

    def _another(self, message: Any) -> None:
        message.node.id = self._rng.choice((f"shop/{STORE}", "", "x" * 10_000))

    def _foreign_secret(self, message: Any) -> None:
        message.type_url = Type.SECRET.value
        self._asked(message).append(f"shop/{STORE}")

    def _locator(self, message: Any) -> None:
        field = message.resource_locators_subscribe if self._delta else message.resource_locators
        field.add(name="shop/bookstore|80")

    def _too_big(self, message: Any) -> None:
        if self._rng.random() < 0.1:
            message.node.cluster = "x" * (4 * 2**20 + 1)

    _mutations: tuple[Callable[[Conversation, Any], None], ...] = (
        _wrong_type, _wrong_nonce, _wrong_nonce, _wrong_nonce, _huge_name, _many_names, _many_names, _wildcard,
        _wildcard, _wildcard, _no_names, _no_names, _empty_name, _big_text, _big_text, _no_text, _swapped, _swapped,
        _versions, _another, _foreign_secret, _locator, _too_big,
    )  # fmt: skip


class Tally:
    """What the replica was made to do."""

    def __init__(self) -> None:
        self.read = 0
        self.taken = 0
        self.ends: Counter[Code | None] = Counter()
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
        def __call__(self, data: Any) -> Request | None:
            tally.read += data is not grpc.aio.EOF
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


async def fuzz(rng: random.Random, client: Client, replica: Replica, tally: Tally, *, delta: bool) -> None:
    """Open one stream after the other, for ever."""
    async with channel(replica, client.credential) as opened:
        while True:
            service = rng.choice((server.AGGREGATED, server.AGGREGATED, *server.SERVICES))
            talk = Conversation(rng, str(client.name), service, delta=delta)
            tally.ends[await one_stream(rng, talk, opened)] += 1


async def one_stream(rng: random.Random, talk: Conversation, opened: grpc.aio.Channel) -> Code | None:
    """Say up to 100 things, and hear what is said meanwhile; returns how it ended, None if that is not known."""
    call = open_stream(opened, talk.method)

    async def hear() -> None:
        while (data := await call.read()) is not grpc.aio.EOF:
            talk.hear(data)

    hearing = asyncio.create_task(hear())
    try:
        await call.write(talk.first())
        for _ in range(rng.randrange(100)):
            await call.write(talk.next())
            if rng.random() < 0.1:
                await asyncio.sleep(0.001)
        if rng.random() < 0.5:
            await call.done_writing()
            async with asyncio.timeout(10):
                await hearing
        else:
            call.cancel()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the replica has ended it, maybe before all was said
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
    if await call.details() == UNTOLD:
        return None
    return Code(await call.code())


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * getpagesize()


async def change(mesh: Mesh, store: Client, number: int) -> float:
    """Write what concerns all proxies; returns the seconds until the one whose streams are in order has it."""
    await mesh.split("paper", paper_v2=number % 99 + 1, bookstore=100)
    path = f"/books/{number}/"
    await mesh.routes(path)
    written = time.monotonic()
    await until(lambda: path.encode() in store.get(Type.ROUTE, "inbound|8080").SerializeToString())
    return time.monotonic() - written


async def test_ten_thousand_fuzzed_requests_break_nothing_cost_little_and_delay_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sys.stdout.write(f"seed {SEED}\n")
    rng = random.Random(SEED)
    caplog.set_level(logging.WARNING)  # gRPC and asyncio tell here what nobody has caught
    delays: list[float] = []
    with counted(monkeypatch) as tally:
        async with bookshop(STORE) as (mesh, replica, (store,)):
            await mesh.allow(BUYER, STORE)
            odd = [await Client.of(mesh, BUYER), await Client.of(mesh, THIEF)]
            fuzzing = [
                asyncio.create_task(fuzz(random.Random(rng.random()), client, replica, tally, delta=delta))
                for client, delta in zip(odd, (True, False), strict=True)
            ]
            before = peak = 0
            while tally.read < WARM + FUZZED and not any(task.done() for task in fuzzing):
                delays.append(await change(mesh, store, len(delays)))
                if tally.read >= WARM:
                    before = before or resident()
                    peak = max(peak, resident())
                await asyncio.sleep(0.05)
            for task in fuzzing:
                task.cancel()
            await asyncio.wait(fuzzing)
            for task in fuzzing:
                assert task.cancelled(), task.exception()
            await until(lambda: len(replica.streams.sessions) == 1 and len(replica.streams._calls) == 1)
            gc.collect()
            after = resident()
            assert store.ended is None
            for client in odd:
                async with client.connected(replica):
                    await until(lambda: client.is_complete)  # noqa: B023 - awaited here
    sys.stdout.write(
        f"{tally.read} requests read, {tally.taken} taken in, {sum(tally.ends.values())} streams; "
        f"slowest of {len(delays)} changes {max(delays) * 1000:.0f} ms; "
        f"MiB resident {before >> 20}, at most {peak >> 20}, in the end {after >> 20}\n"
    )
    assert tally.taken > FUZZED / 2, "what is turned away at the door tests the door alone"
    assert not tally.ends.keys() - EXPECTED
    assert not caplog.records
    assert {level for level, _ in tally.logged} <= {"info", "warning"}
    assert tally.longest <= LONGEST_TEXT + 1_000
    assert peak - before <= MOST_GROWTH
    assert after - before <= MOST_KEPT
    assert max(delays) < CONVERGES
