"""Clients that say what no Envoy says, in a process of their own: what they cost is not the replica's.

    python -m tests.feature.fuzzer

It reads a line of JSON: the `port` of a replica on loopback, a `seed`, and `clients`, each with `node`, `delta`, `key`,
`chain` and `roots`. Each opens one stream after the other until standard input ends; then how many of these ended how,
and what nobody has caught, is written as JSON in a line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from envoy.service.discovery.v3 import discovery_pb2

from smc.certificates import x509
from smc.xds import server
from smc.xds.snapshot import Type
from tests.feature.test_manifest_to_wire import STORE
from tests.unit.bookshop import TRUST_DOMAIN
from tests.unit.xds.replica import envoy, open_stream

MOST_OF_A_CONNECTION = 90
"""Streams. Who resets more than 100 of one connection at once is cut off, and nearly all of these are reset."""
UNTOLD = "Internal error from Core"
"""The client's own words for a message that came too late, which hide from it how the stream had ended."""

NAMES = (
    "shop/bookstore|80", "shop/bookstore-v2|80", "shop/paper|80", "passthrough", "outbound", "outbound/paper.shop|80",
    "inbound|8080", "identity", "bundle", "nowhere", "shop/", "|", "é🙂", "a\nb", "\x00", "x" * 256,
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
        message.node.CopyFrom(envoy(self._node))
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


async def fuzz(rng: random.Random, port: int, client: Mapping[str, Any], ends: Counter[str]) -> None:
    """Open one stream after the other, for ever, and now and then another connection for them."""
    tls = grpc.ssl_channel_credentials(*(client[what].encode() for what in ("roots", "key", "chain")))
    options = [
        ("grpc.ssl_target_name_override", x509.replica_host(TRUST_DOMAIN)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
    ]
    while True:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", tls, options) as opened:
            for _ in range(rng.randint(1, MOST_OF_A_CONNECTION)):
                service = rng.choice((server.AGGREGATED, server.AGGREGATED, *server.SERVICES))
                talk = Conversation(rng, client["node"], service, delta=client["delta"])
                ends[await one_stream(rng, talk, opened)] += 1


async def one_stream(rng: random.Random, talk: Conversation, opened: grpc.aio.Channel) -> str:
    """Say up to 100 things, and hear what is said meanwhile; returns how it ended, and "" if that is not known."""
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
            async with asyncio.timeout(60):
                await hearing
        else:
            call.cancel()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the replica has ended it, maybe before all was said
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
    if await call.details() == UNTOLD:
        return ""
    return str(grpc.StatusCode(await call.code()).name)


class Uncaught(logging.Handler):
    """What gRPC and asyncio tell nobody else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


async def main() -> None:
    asyncio.get_running_loop().slow_callback_duration = float("inf")  # a slow machine is no defect
    uncaught = Uncaught()
    logging.getLogger().addHandler(uncaught)
    told = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
    given = json.loads(await told.readline())
    rng = random.Random(given["seed"])
    ends: Counter[str] = Counter()
    ending = asyncio.create_task(told.read())
    fuzzing = [
        asyncio.create_task(fuzz(random.Random(rng.random()), given["port"], client, ends))
        for client in given["clients"]
    ]
    await asyncio.wait([ending, *fuzzing], return_when=asyncio.FIRST_COMPLETED)
    for task in fuzzing:
        if task.done():
            await task  # it has failed
        task.cancel()
    await asyncio.wait(fuzzing)
    sys.stdout.write(json.dumps({"ends": ends, "uncaught": uncaught.told}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
