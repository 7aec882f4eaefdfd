"""Delta xDS streams as many Envoys would have them: one mTLS connection each, everything ACKed, nothing looked into.

A push costs this side one read, a look at two fields, and one write of an ACK that is put together from bytes. Streams
that remember what they are sent look at each resource too.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack, suppress
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2

from bench.shape import APP_PORT
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.envoy import names
from smc.errors import Unavailable
from smc.model import Name
from smc.xds.snapshot import Type

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
FOLLOWS: Mapping[Type, tuple[Type, ...]] = {
    Type.CLUSTER: (Type.ENDPOINT, Type.SECRET),
    Type.ENDPOINT: (Type.LISTENER,),
    Type.LISTENER: (Type.ROUTE,),
}
"""What a cold Envoy asks for next, after the first response of a type."""
_NAMES: Mapping[Type, tuple[str, ...]] = {
    Type.CLUSTER: (),
    Type.LISTENER: (),
    Type.SECRET: (names.IDENTITY, names.BUNDLE),
    Type.ROUTE: (names.OUTBOUND, names.inbound_route(APP_PORT)),
}
_BY_URL = {type_.value.encode(): type_ for type_ in Type}
_RESOURCE, _TYPE_URL, _NONCE, _REMOVED = 2, 4, 5, 6
"""The fields of a DeltaDiscoveryResponse that are looked at."""
_VERSION, _NAME = 1, 3
"""The same of one of its resources."""
_ACK = {
    type_: discovery_pb2.DeltaDiscoveryRequest(type_url=type_.value).SerializeToString() + b"\x32" for type_ in Type
}
"""A request up to the length of its response_nonce, which is field 6."""
_RESUMED = (Type.CLUSTER, Type.ENDPOINT, Type.SECRET, Type.ROUTE, Type.LISTENER)
"""In which order a stream that resumes asks. The answer to the last one says that the server has read them all."""
_WILDCARDS = frozenset((Type.CLUSTER, Type.LISTENER))
"""The types of which a stream that resumes is answered although it has everything: with an empty response."""
RETRY = 0.1, 1.0
"""Seconds, from and to, after which a stream that a server did not take is opened again: chance says which."""

Known = MutableMapping[Name, dict[Type, dict[str, str]]]
"""What each proxy holds: by type, the version of each resource by name."""


class Tally:
    """What all streams together got since some moment. Times are seconds of `time.monotonic`."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._reached = asyncio.Event()
        self.received: list[float] = []
        self.acked: list[float] = []
        """When the ACK of each push was handed to gRPC."""
        self.bytes = 0
        """Of messages, before TLS and HTTP/2 framing."""
        self.asked = 0
        """Bytes of the requests that are no ACKs, those of streams that were refused included."""
        self.last = b""

    def note(self, received: float, message: bytes) -> None:
        self.received.append(received)
        self.acked.append(time.monotonic())
        self.bytes += len(message)
        self.last = message
        if len(self.acked) >= self._wanted:
            self._reached.set()

    async def reached(self, timeout: float) -> None:
        """Until as many pushes as were wanted are there, and their ACKs sent.

        Raises:
            Unavailable: not within `timeout` seconds.
        """
        if self._wanted:
            try:
                async with asyncio.timeout(timeout):
                    await self._reached.wait()
            except TimeoutError:
                raise Unavailable(
                    f"{len(self.acked)} of {self._wanted} pushes came within {timeout:g} s",
                    hint="is the mesh what the benchmark wrote, and does the replica's log say why?",
                ) from None


class Streams:
    """Many streams to one server. They are open while this is entered."""

    def __init__(
        self,
        target: str,
        credentials: Mapping[Name, Credential],
        *,
        first: Type = Type.CLUSTER,
        follows: Mapping[Type, tuple[Type, ...]] = FOLLOWS,
        known: Known | None = None,
        retry: bool = False,
    ) -> None:
        """Each credential's proxy gets a stream. It asks for `first`, and then for what `follows`.

        Args:
            known: is kept up to date. A proxy that holds something says so (`initial_resource_versions`), and asks for
                everything at once. None: nobody holds anything, and nobody remembers.
            retry: a stream that the server does not take, or ends before it is in sync, is opened again.
        """
        self._target = target
        self._credentials = credentials
        self._first = first
        self._follows = follows
        self._known = known
        self._retry = retry
        self._resumptions = {
            proxy: _resumption(proxy, known[proxy]) for proxy in credentials if known and known.get(proxy)
        }
        self._tally = Tally(0)
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all streams, and their connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._stack.aclose()
        gc.collect()  # a connection ends with the last call on it, and some calls are part of a cycle

    async def open(self, timeout: float) -> Tally:
        """Open all at once; returns when each has been answered all that it asked for.

        Raises:
            Unavailable: not within `timeout` seconds, or a stream was refused; with the server's words.
        """
        tally = self.tally(0)
        synced = [asyncio.Event() for _ in self._credentials]
        for (proxy, credential), event in zip(self._credentials.items(), synced, strict=True):
            opened = await self._stack.enter_async_context(channel(self._target, credential))
            self._tasks.append(asyncio.create_task(self._run(opened, proxy, event)))
        waiting = asyncio.gather(*(event.wait() for event in synced))
        first_of: list[asyncio.Future[Any]] = [waiting, *self._tasks]
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wait(first_of, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            done = sum(event.is_set() for event in synced)
            raise Unavailable(f"{done} of {len(synced)} streams were in sync within {timeout:g} s") from None
        finally:
            waiting.cancel()
        self.check()
        return tally

    def tally(self, wanted: int) -> Tally:
        """Count every push from now on, in place of the tally before."""
        self._tally = Tally(wanted)
        return self._tally

    @property
    def alive(self) -> int:
        """How many streams have not ended."""
        return sum(not task.done() for task in self._tasks)

    def check(self) -> None:
        """Raise what ended a stream, if one has ended."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def quiet(self, seconds: float) -> None:
        """Until nothing came for so long."""
        before = -1
        while len(self._tally.received) != before:
            before = len(self._tally.received)
            await asyncio.sleep(seconds)
        self.check()

    async def _run(self, opened: grpc.aio.Channel, proxy: Name, synced: asyncio.Event) -> None:
        while True:
            call: Any = opened.stream_stream(METHOD)()
            # The call itself knows why it ended; InvalidStateError is what a write after that raises.
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._follow(call, proxy, synced)
            code = await call.code()
            if not self._retry or synced.is_set() or code is not grpc.StatusCode.UNAVAILABLE:
                raise Unavailable(f"the stream of {proxy} ended: {code.name}: {await call.details()}")
            await asyncio.sleep(random.uniform(*RETRY))

    async def _follow(self, call: Any, proxy: Name, synced: asyncio.Event) -> None:
        """ACK whatever comes, until the stream ends."""

        async def ask(request: bytes) -> None:
            self._tally.asked += len(request)
            await call.write(request)

        follows, unanswered = self._follows, {self._first}
        if resumption := self._resumptions.get(proxy):
            follows, unanswered = {}, set(_WILDCARDS)
            for request in resumption:
                await ask(request)
        else:
            await ask(_request(self._first, _NAMES.get(self._first, ()), node=str(proxy)))
        heard: set[Type] = set()
        while (message := await call.read()) is not grpc.aio.EOF:
            received = time.monotonic()
            type_, nonce = _head(message)
            await call.write(b"".join((_ACK[type_], bytes((len(nonce),)), nonce)))
            self._tally.note(received, message)
            if self._known is not None:
                _remember(self._known.setdefault(proxy, {}).setdefault(type_, {}), message)
            if synced.is_set():
                continue
            unanswered.discard(type_)
            if type_ not in heard:
                heard.add(type_)
                for next_ in follows.get(type_, ()):
                    asked = _NAMES[next_] if next_ is not Type.ENDPOINT else _clusters(message)
                    await ask(_request(next_, asked))
                    unanswered.add(next_)
            if not unanswered:
                synced.set()


def channel(target: str, credential: Credential) -> grpc.aio.Channel:
    """A connection of its own, shared with no other channel."""
    tls = grpc.ssl_channel_credentials(
        credential.roots_pem.encode(), credential.key.encode(), credential.chain.encode()
    )
    options = [
        ("grpc.ssl_target_name_override", x509.replica_host(credential.trust_domain)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", int(RETRY[0] * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(RETRY[0] * 1000)),
    ]
    return grpc.aio.secure_channel(target, tls, options)


@lru_cache
def _request(type_: Type, asked: tuple[str, ...], node: str = "") -> bytes:
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=type_.value, resource_names_subscribe=asked)
    if node:
        message.node.CopyFrom(base_pb2.Node(id=node, user_agent_name="bench"))
    data: bytes = message.SerializeToString()
    return data


def _resumption(proxy: Name, held: Mapping[Type, Mapping[str, str]]) -> tuple[bytes, ...]:
    """The first request for each type, of a proxy that comes with what it holds."""
    requests = [
        discovery_pb2.DeltaDiscoveryRequest(
            type_url=type_.value,
            resource_names_subscribe=() if type_ in _WILDCARDS else sorted(held.get(type_, ())),
            initial_resource_versions=held.get(type_, {}),
        )
        for type_ in _RESUMED
    ]
    requests[0].node.CopyFrom(base_pb2.Node(id=str(proxy), user_agent_name="bench"))
    return tuple(request.SerializeToString() for request in requests)


def _remember(held: dict[str, str], message: bytes) -> None:
    for number, value in _fields(message):
        if number == _RESOURCE:
            name, version = _name_and_version(value)
            held[name] = version
        elif number == _REMOVED:
            held.pop(value.decode(), None)


@lru_cache(maxsize=4096)
def _name_and_version(resource: bytes) -> tuple[str, str]:
    fields = dict(_fields(resource))
    return fields[_NAME].decode(), fields[_VERSION].decode()


def _clusters(message: bytes) -> tuple[str, ...]:
    """The Clusters of a response that have a load assignment: those that are called `<namespace>/<service>|<port>`."""
    response = discovery_pb2.DeltaDiscoveryResponse.FromString(message)
    return tuple(resource.name for resource in response.resources if "/" in resource.name)


def _head(message: bytes) -> tuple[Type, bytes]:
    """The type and the nonce of a response."""
    type_ = nonce = None
    for number, value in _fields(message):
        if number == _TYPE_URL:
            type_ = _BY_URL[value]
        elif number == _NONCE:
            nonce = value
        if type_ is not None and nonce is not None:
            return type_, nonce
    raise Unavailable("the server sent a response without a type or a nonce")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that has none but length-delimited ones."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        length, at = _varint(message, at)
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := message[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1
