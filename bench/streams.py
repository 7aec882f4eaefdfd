"""xDS streams as many Envoys would have them: one mTLS connection each, everything decoded, and ACKed.

A push costs this side one read, the parser, which is C, and one write of an ACK that is put together from bytes.
Streams that remember what they are sent look at each resource too.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from sys import intern
from types import TracebackType
from typing import Any, Self

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2

from bench.client import Client, framed
from bench.shape import APP_PORT
from smc.certificates.credential import Credential
from smc.envoy import names
from smc.errors import Unavailable
from smc.model import Name
from smc.xds import delta, sotw
from smc.xds.framing import Status, prefix
from smc.xds.snapshot import Type
from smc.xds.stream import WILDCARDS

FOLLOWS: Mapping[Type, tuple[Type, ...]] = {
    Type.CLUSTER: (Type.ENDPOINT, Type.SECRET),
    Type.ENDPOINT: (Type.LISTENER,),
    Type.LISTENER: (Type.ROUTE,),
    Type.ROUTE: (Type.VIRTUAL_HOST,),
}
"""What a cold Envoy asks for next, after the first response of a type."""
_NAMES: Mapping[Type, tuple[str, ...]] = {
    Type.CLUSTER: (),
    Type.LISTENER: (),
    Type.SECRET: (names.IDENTITY, names.BUNDLE),
    Type.ROUTE: (names.OUTBOUND, names.inbound_route(APP_PORT)),
    Type.VIRTUAL_HOST: (),
}
_BY_URL = {type_.value: type_ for type_ in Type}
_RESUMED = (Type.CLUSTER, Type.ENDPOINT, Type.SECRET, Type.ROUTE, Type.VIRTUAL_HOST, Type.LISTENER)
"""In which order a stream that resumes asks. The answer to the last one says that the server has read them all."""
_GREETED = frozenset((Type.CLUSTER, Type.LISTENER))
"""The types of which a stream that resumes is answered although it has everything: with an empty response."""
RETRY = 0.1, 1.0
"""Seconds, from and to, after which a stream that a server did not take is opened again: chance says which."""

HANDSHAKES = 100
"""TLS handshakes at the same time: proxies on machines of their own would not have to wait for each other here."""

Known = MutableMapping[Name, dict[Type, dict[str, str]]]
"""What each proxy holds: by type, the version of each resource by name."""


class Tally:
    """What all streams together got since some moment. Times are seconds of `time.monotonic`."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._reached = asyncio.Event()
        self._due: list[tuple[Client, bytes]] = []
        """The ACKs that are to be sent in this turn of the loop."""
        self._acked = 0
        self.received: list[float] = []
        self.last_acked = 0.0
        """When the last ACK was handed to TLS."""
        self.bytes = 0
        """Of messages, before TLS and HTTP/2 framing."""
        self.asked = 0
        """Bytes of the requests that are no ACKs, those of streams that were refused included."""
        self.last = b""

    def note(self, received: float, message: bytes) -> None:
        self.received.append(received)
        self.bytes += len(message)
        self.last = message

    def acknowledge(self, client: Client, ack: bytes) -> None:
        """Let `client` send `ack` once all was read that has come: the pushes to others do not wait for it."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._acknowledge)
        self._due.append((client, ack))

    def _acknowledge(self) -> None:
        due, self._due = self._due, []
        for client, ack in due:
            client.write(ack)
        self.note_acks(len(due))

    def note_acks(self, number: int) -> None:
        """So many were handed to TLS just now."""
        self._acked += number
        self.last_acked = time.monotonic()
        if self._acked >= self._wanted:
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
                    f"{len(self.received)} of {self._wanted} pushes came within {timeout:g} s",
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
        variant: Variant | None = None,
        known: Known | None = None,
        retry: bool = False,
    ) -> None:
        """Each credential's proxy gets a stream. It asks for `first`, and then for what `follows`.

        Args:
            variant: None: delta.
            known: is kept up to date, by delta streams. A proxy that holds something says so
                (`initial_resource_versions`), and asks for everything at once. None: nobody holds anything, and nobody
                remembers.
            retry: a stream that the server does not take, or ends before it is in sync, is opened again.
        """
        self._target = target
        self._credentials = credentials
        self.first = first
        self.follows = follows
        self.variant = variant or DELTA
        self.known = known
        self._retry = retry
        self.resumptions = {
            proxy: _resumption(proxy, known[proxy]) for proxy in credentials if known and known.get(proxy)
        }
        self.counted = Tally(0)
        self._tasks: list[asyncio.Task[None]] = []
        self._shaking = asyncio.Semaphore(HANDSHAKES)

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

    async def open(self, timeout: float) -> Tally:
        """Open all at once; returns when each has been answered all that it asked for.

        Raises:
            Unavailable: not within `timeout` seconds, or a stream was refused; with the server's words.
        """
        tally = self.tally(0)
        synced = [asyncio.Event() for _ in self._credentials]
        for (proxy, credential), event in zip(self._credentials.items(), synced, strict=True):
            self._tasks.append(asyncio.create_task(self._run(proxy, credential, event)))
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
        self.counted = Tally(wanted)
        return self.counted

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
        while len(self.counted.received) != before:
            before = len(self.counted.received)
            await asyncio.sleep(seconds)
        self.check()

    async def _run(self, proxy: Name, credential: Credential, synced: asyncio.Event) -> None:
        while True:
            conversation = _Conversation(self, proxy, synced)
            status: int
            try:
                async with self._shaking:
                    client = await Client.connect(self._target, credential, self.variant.method, conversation.hear)
            except OSError as e:
                status, text = Status.UNAVAILABLE, str(e)
            else:
                try:
                    conversation.begin(client)
                    status, text = await client.ended
                finally:
                    client.close()
            if not self._retry or synced.is_set() or status != Status.UNAVAILABLE:
                raise Unavailable(f"the stream of {proxy} ended with status {status}: {text}")
            await asyncio.sleep(random.uniform(*RETRY))


class _Conversation:
    """What one client says on one stream: it asks for what follows, and ACKs whatever comes."""

    def __init__(self, streams: Streams, proxy: Name, synced: asyncio.Event) -> None:
        self._streams = streams
        self._proxy = proxy
        self._synced = synced
        self._resumption = streams.resumptions.get(proxy, ())
        self._unanswered = set(_GREETED) if self._resumption else {streams.first}
        self._heard: set[Type] = set()
        self._asked: dict[Type, tuple[str, ...]] = {}

    def begin(self, client: Client) -> None:
        first = self._streams.first
        self._say(client, *(self._resumption or (self._ask(first, _NAMES.get(first, ()), node=str(self._proxy)),)))

    def hear(self, client: Client, message: bytes) -> None:
        received = time.monotonic()
        streams, known = self._streams, self._streams.known
        response = streams.variant.response.FromString(message)
        type_ = _BY_URL[response.type_url]
        streams.counted.note(received, message)
        if known is not None:
            _remember(known.setdefault(self._proxy, {}).setdefault(type_, {}), response)
        ack = streams.variant.ack(response, self._asked.get(type_, ()))
        if self._synced.is_set():
            streams.counted.acknowledge(client, ack)
            return
        client.write(ack)
        streams.counted.note_acks(1)
        self._unanswered.discard(type_)
        if type_ not in self._heard and not self._resumption:
            self._heard.add(type_)
            for next_ in filter(streams.variant.types.__contains__, streams.follows.get(type_, ())):
                names_ = _NAMES[next_] if next_ is not Type.ENDPOINT else streams.variant.clusters(response)
                self._say(client, self._ask(next_, names_))
                self._unanswered.add(next_)
        if not self._unanswered:
            self._synced.set()

    def _ask(self, type_: Type, asked: tuple[str, ...], node: str = "") -> bytes:
        self._asked[type_] = asked
        return self._streams.variant.request(type_, asked, node)

    def _say(self, client: Client, *requests: bytes) -> None:
        self._streams.counted.asked += sum(map(len, requests))
        client.write(b"".join(map(framed, requests)))


# ------------------------------------------------------------------------------------------------------- what is said


@dataclass(frozen=True, slots=True)
class Variant:
    """Of the protocol."""

    method: str
    request: Callable[[Type, tuple[str, ...], str], bytes]
    """Asks for these names; with the node's id in the first of a stream."""
    response: Any
    """The class of what the server says."""
    ack: Callable[[Any, tuple[str, ...]], bytes]
    """Of a response, when these names of its type were asked for; framed."""
    clusters: Callable[[Any], tuple[str, ...]]
    """The Clusters of a response that have a load assignment: those that are called `<namespace>/<service>|<port>`."""
    types: tuple[Type, ...] = tuple(Type)
    """Those that it has a way to speak of."""


@lru_cache
def _delta_request(type_: Type, asked: tuple[str, ...], node: str) -> bytes:
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=type_.value, resource_names_subscribe=asked)
    return _signed(message, node)


@lru_cache
def _sotw_request(type_: Type, asked: tuple[str, ...], node: str = "") -> bytes:
    return _signed(discovery_pb2.DiscoveryRequest(type_url=type_.value, resource_names=asked), node)


def _node(id_: str) -> Any:
    """Of an Envoy that is new enough to discover virtual hosts."""
    node = base_pb2.Node(id=id_, user_agent_name="envoy")
    version = node.user_agent_build_version.version
    version.major_number, version.minor_number = delta.DISCOVERS
    return node


def _signed(message: Any, node: str) -> bytes:
    if node:
        message.node.CopyFrom(_node(node))
    data: bytes = message.SerializeToString()
    return data


def _delta_ack(response: Any, _asked: tuple[str, ...]) -> bytes:
    nonce: bytes = response.nonce.encode()
    return _delta_ack_head(response.type_url, len(nonce)) + nonce


@lru_cache
def _delta_ack_head(type_url: str, length: int) -> bytes:
    """The ACK up to a nonce of so many bytes, which is response_nonce, field 6."""
    message: bytes = discovery_pb2.DeltaDiscoveryRequest(type_url=type_url).SerializeToString()
    return b"".join((prefix(len(message) + 2 + length), message, b"\x32", bytes((length,))))


def _sotw_ack(response: Any, asked: tuple[str, ...]) -> bytes:
    """The request again, with version_info, which is field 1, and response_nonce, which is field 5."""
    asking = _sotw_request(_BY_URL[response.type_url], asked)
    version, nonce = response.version_info.encode(), response.nonce.encode()
    return framed(b"".join((asking, b"\x0a", bytes((len(version),)), version, b"\x2a", bytes((len(nonce),)), nonce)))


def _delta_clusters(response: Any) -> tuple[str, ...]:
    return tuple(resource.name for resource in response.resources if "/" in resource.name)


def _sotw_clusters(response: Any) -> tuple[str, ...]:
    found = (cluster_pb2.Cluster.FromString(resource.value).name for resource in response.resources)
    return tuple(name for name in found if "/" in name)


_SERVICE = "/envoy.service.discovery.v3.AggregatedDiscoveryService"
DELTA = Variant(
    f"{_SERVICE}/DeltaAggregatedResources",
    _delta_request,
    discovery_pb2.DeltaDiscoveryResponse,
    _delta_ack,
    _delta_clusters,
)
SOTW = Variant(
    f"{_SERVICE}/StreamAggregatedResources",
    _sotw_request,
    discovery_pb2.DiscoveryResponse,
    _sotw_ack,
    _sotw_clusters,
    sotw.TYPES,
)


def _resumption(proxy: Name, held: Mapping[Type, Mapping[str, str]]) -> tuple[bytes, ...]:
    """The first request for each type, of a proxy that comes with what it holds."""
    requests = [
        discovery_pb2.DeltaDiscoveryRequest(
            type_url=type_.value,
            resource_names_subscribe=() if type_ in WILDCARDS else sorted(held.get(type_, ())),
            initial_resource_versions=held.get(type_, {}),
        )
        for type_ in _RESUMED
    ]
    requests[0].node.CopyFrom(_node(str(proxy)))
    return tuple(request.SerializeToString() for request in requests)


def _remember(held: dict[str, str], response: Any) -> None:
    """`response` is a delta one."""
    for resource in response.resources:
        held[intern(resource.name)] = intern(resource.version)  # one string for all streams
    for name in response.removed_resources:
        held.pop(name, None)
