"""The xDS server of a replica: who may open a stream, when it is answered, and when it must move on.

The order is fixed, so that a stranger or a storm costs as little as possible: is this replica ready, has it room, who
asks, may he, and only then the work. What fails ends as a status; it opens nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.message import DecodeError

from smc import telemetry
from smc.certificates import x509
from smc.envoy import names
from smc.errors import Denied, NotFound, Unauthenticated
from smc.metrics import Metrics
from smc.model import Name
from smc.pipeline import Pipeline
from smc.records import AckRecord
from smc.tls import ServerTLS, credential_path
from smc.xds import balance, delta, sotw, transport
from smc.xds.framing import Status
from smc.xds.session import Ended, Session, Watch
from smc.xds.slot import NotAdmitted
from smc.xds.snapshot import Type
from smc.xds.stream import ProtocolError, Request, Stream
from smc.xds.subscription import Response
from smc.xds.transport import Call

FIRST_REQUEST = 10.0
"""Seconds that a new stream has to say what it wants."""
MOST_OF_ONE = 3
"""Streams of one proxy on one service: the one that is served, one that takes its place, and one that it has not read
to the end."""
MOST_OF_A_PROGRAM = 100
"""The same of a gRPC program, which has one for each service that it calls, and one to be called."""
MOST_REPORTED = 100
"""Laggards and NACKs in one report."""
BALANCE_EVERY = 1.0
"""Seconds between two looks at how many streams every replica has."""
SETTLED = 2.0
"""Seconds for which a new stream is left where it is."""
OWN_SECRETS = (names.IDENTITY, names.BUNDLE)
SPARE = 1_000
"""Connections beyond twice as many as there may be streams: for those that come while others go."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """What is served under one name: a method for each variant, and the types that one stream of it carries.

    The streams that a proxy has on several services know nothing of each other, and may end at several replicas. So
    nothing on one waits for an ACK on another: make before break holds on each by itself, and over all types on the
    aggregated service alone. Nor is a load assignment sent again on one because its Cluster changed on another: Envoy
    uses the old Cluster for another 15 s then.
    """

    name: str
    resources: str
    """What the methods are called after."""
    types: tuple[Type, ...]


AGGREGATED = Service("envoy.service.discovery.v3.AggregatedDiscoveryService", "AggregatedResources", tuple(Type))
SERVICES = (
    AGGREGATED,
    Service("envoy.service.cluster.v3.ClusterDiscoveryService", "Clusters", (Type.CLUSTER,)),
    Service("envoy.service.endpoint.v3.EndpointDiscoveryService", "Endpoints", (Type.ENDPOINT,)),
    Service("envoy.service.listener.v3.ListenerDiscoveryService", "Listeners", (Type.LISTENER,)),
    Service("envoy.service.route.v3.RouteDiscoveryService", "Routes", (Type.ROUTE,)),
    Service("envoy.service.secret.v3.SecretDiscoveryService", "Secrets", (Type.SECRET,)),
)


@dataclass(frozen=True, slots=True)
class _Variant:
    """How the protocol is spoken."""

    request: Any
    """The class of what clients say."""
    acknowledgement: Callable[[bytes], Request | None]
    """Reads a request that is nothing but an ACK; what it does not know is read by what `decoder` makes."""
    decoder: Callable[[], Callable[[Any], Request]]
    """Makes what reads the requests of one stream."""
    encoder: Callable[[Stream], Callable[[Response], Sequence[bytes]]]
    """Makes what writes the responses of one stream: messages in parts, some of which are shared between streams."""
    types: Callable[[Any], Collection[Type]]
    """Those that it has a way to speak of to a client that is such a node."""


class Refused(Exception):
    """A stream is not served, or no longer. `reason` is one word, for the metric."""

    def __init__(self, status: Status, reason: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason


class Streams:
    """Every open stream of this replica. Belongs to one event loop."""

    def __init__(
        self,
        pipeline: Pipeline,
        metrics: Metrics,
        *,
        replica: str,
        identifier: str,
        trust_domain: str,
        max_streams: int,
        listening: Callable[[Name], None],
    ) -> None:
        """
        Args:
            identifier: what proxies see as `control_plane.identifier`: which replica of which store has answered.
            listening: is told of each proxy that has ACKed its listeners, once a stream.
        """
        self._pipeline = pipeline
        self._metrics = metrics
        self._replica = replica
        self._trust_domain = trust_domain
        self.most = max_streams
        """Streams at the same time."""
        self._listening = listening
        self._sessions: dict[Session, None] = {}
        self._watch = Watch()
        self._opening = 0
        self._calls: Counter[tuple[Name, str]] = Counter()
        self._draining = False
        changes, states = delta.Encoder(identifier), sotw.Encoder(identifier)
        self._delta = _Variant(
            discovery_pb2.DeltaDiscoveryRequest,
            delta.acknowledgement,
            lambda: delta.request,
            lambda _: changes.encode,
            delta.types,
        )
        self._sotw = _Variant(
            discovery_pb2.DiscoveryRequest,
            lambda _: None,
            lambda: sotw.Decoder().request,
            lambda stream: lambda response: (states.encode(response, stream.whole),),
            lambda _: sotw.TYPES,
        )

    @property
    def sessions(self) -> Collection[Session]:
        """In the order in which they were opened."""
        return self._sessions.keys()

    def report(self) -> AckRecord:
        """What this replica's proxies have made of what they were sent."""
        mesh = self._pipeline.mesh
        newest = mesh.revision if mesh is not None else 0
        laggards = [found for session in self._sessions if (found := session.laggard())]
        nacks = [nack for session in self._sessions for nack in session.nacks]
        return AckRecord(
            self._replica,
            min((session.revision(newest) for session in self._sessions), default=newest),
            len(self._sessions),
            tuple(sorted(laggards, key=lambda found: found.proxy))[:MOST_REPORTED],
            tuple(sorted(nacks, key=lambda nack: (nack.proxy, nack.type_url, nack.resources)))[:MOST_REPORTED],
        )

    # -------------------------------------------------------------------------------------------------- the way in

    def methods(self, service: Service) -> Mapping[str, Callable[[Call], Awaitable[None]]]:
        """What serves one stream, from its first request to its end, by the method's path."""
        return {
            f"/{service.name}/Delta{service.resources}": partial(self._serve, service, self._delta),
            f"/{service.name}/Stream{service.resources}": partial(self._serve, service, self._sotw),
        }

    async def _serve(self, service: Service, variant: _Variant, call: Call) -> None:
        with ExitStack() as held:
            try:
                await self._serve_one(service, variant, call, held)
            except Refused as refused:
                self._metrics.refused.labels(refused.reason).inc()
                log.info("stream refused", peer=call.peer, reason=refused.reason, error=str(refused))
                await call.end(refused.status, str(refused))
            except Ended as ended:
                await call.end(Status.UNAVAILABLE, str(ended))
            except ProtocolError as broken:
                log.warning("stream ended", peer=call.peer, error=str(broken))
                await call.end(Status.INVALID_ARGUMENT, str(broken))

    async def _serve_one(self, service: Service, variant: _Variant, call: Call, held: ExitStack) -> None:
        """What is put on `held` lasts until the proxy has read how the stream ended."""
        self._check_room()
        proxy, expires, serial = self._authenticate(call)
        held.enter_context(self._one_of(proxy, service))
        read = _Reader(variant, service, proxy)
        self._opening += 1
        try:
            first = await self._first_request(call, read)
            try:
                await self._pipeline.admit(resumed=first.resumed)
                slot = await self._pipeline.subscribe(proxy, service.name, serial)
            except NotAdmitted as e:
                raise Refused(Status.UNAVAILABLE, "not_admitted", str(e)) from None
            except NotFound as e:
                raise Refused(Status.NOT_FOUND, "unknown_workload", str(e)) from None
            except Denied as e:
                raise Refused(Status.PERMISSION_DENIED, "revoked", str(e)) from None
        finally:
            self._opening -= 1

        stream = Stream(type_ for type_ in service.types if type_ in read.types)
        peer = _Peer(call, read, variant.encoder(stream))
        session = Session(proxy, stream, slot, self._metrics, peer, self._watch, listening=self._listening)
        ending = asyncio.get_running_loop().call_later(
            max(0.0, expires - time.time()), slot.end, f"the credential of {proxy} has expired"
        )
        self._sessions[session] = None
        self._metrics.streams.set(len(self._sessions))
        log.info("stream opened", **{telemetry.PROXY: str(proxy)}, service=service.name, resumed=first.resumed)
        try:
            call.start()
            if self._draining:
                slot.end("this replica shuts down")
            await session.run(first)
        except Ended as ended:
            log.info("stream ended", **{telemetry.PROXY: str(proxy)}, reason=str(ended))
            raise
        finally:
            ending.cancel()
            del self._sessions[session]
            self._metrics.streams.set(len(self._sessions))
            self._pipeline.unsubscribe(proxy, slot, service.name)

    def _check_room(self) -> None:
        if self._draining:
            raise Refused(Status.UNAVAILABLE, "draining", "this replica shuts down")
        if not self._pipeline.ready:
            raise Refused(Status.UNAVAILABLE, "not_ready", self._pipeline.unready_reason)
        if len(self._sessions) + self._opening >= self.most:
            text = f"this replica serves at most {self.most} streams: try another one, or raise --max-streams"
            raise Refused(Status.RESOURCE_EXHAUSTED, "full", text)

    @contextmanager
    def _one_of(self, proxy: Name, service: Service) -> Iterator[None]:
        """Bound what one proxy can hold: what it does not read is kept, also after the end of the stream."""
        key = proxy, service.name
        if self._calls[key] >= (MOST_OF_A_PROGRAM if self._pipeline.is_program(proxy) else MOST_OF_ONE):
            text = f"{proxy} has {self._calls[key]} streams here already, open or with an end that it has not read"
            raise Refused(Status.RESOURCE_EXHAUSTED, "too_many_of_one", text)
        self._calls[key] += 1
        try:
            yield
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key]

    def _authenticate(self, call: Call) -> tuple[Name, float, str]:
        """Whose proxy calls, when its credential expires, in seconds since 1970, and its serial in hexadecimal."""
        try:
            path = credential_path(call.certificate, self._trust_domain, time.time())
        except Unauthenticated as e:
            raise Refused(Status.UNAUTHENTICATED, "unauthenticated", str(e)) from None
        except Denied as e:
            raise Refused(Status.PERMISSION_DENIED, "denied", str(e)) from None
        kind, _, name = path.partition("/")
        if kind != "proxy":
            text = f"{path} is no proxy's credential: only a proxy's may open a stream"
            raise Refused(Status.PERMISSION_DENIED, "denied", text)
        (leaf,) = x509.load(call.certificate)
        proxy, serial = Name.parse(name), f"{leaf.serial_number:x}"
        # Later it is asked again, of a Mesh that is not older than the stream. But a credential that is known to be
        # revoked must not even take up the room of the one that took its place.
        if self._pipeline.mesh is not None and (why := self._pipeline.mesh.refuses(proxy, serial)):
            raise Refused(Status.PERMISSION_DENIED, "revoked", why)
        return proxy, leaf.not_valid_after_utc.timestamp(), serial

    async def _first_request(self, call: Call, read: _Reader) -> Request:
        try:
            async with asyncio.timeout(FIRST_REQUEST):
                request = read(await call.read())
        except TimeoutError:
            text = f"the stream said nothing for {FIRST_REQUEST:.0f} s"
            raise Refused(Status.DEADLINE_EXCEEDED, "silent", text) from None
        if request is None:
            raise Refused(Status.CANCELLED, "closed", "the stream was closed before it said anything")
        return request

    # ------------------------------------------------------------------------------------------------- the way out

    async def balance(self, others: Callable[[], Sequence[int]]) -> None:
        """Send streams elsewhere, a few at a time, whenever this replica has too many; for ever.

        `others` are the numbers of streams of the other replicas that are ready.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(BALANCE_EVERY)
            # One that was asked to end may take a while, and is not here any more.
            staying = [session for session in self._sessions if not session.slot.ended]
            excess = balance.surplus(len(staying), others())
            # What the others say is up to a second old: a third of it, and then look again.
            most = -(-excess // 3)
            settled = [session for session in staying if session.opened + SETTLED <= loop.time()]
            for session in settled[-most:] if most else ():
                session.slot.end("another replica has fewer streams")

    async def drain(self, seconds: float) -> None:
        """Take no new stream, and end those that are open, spread over so many seconds."""
        self._draining = True
        left = list(self._sessions)
        for session in left:
            session.slot.end("this replica shuts down")
            await asyncio.sleep(seconds / len(left))


class _Peer:
    """A Session's way to a Call."""

    def __init__(self, call: Call, read: _Reader, encode: Callable[[Response], Sequence[bytes]]) -> None:
        self._call = call
        self._read = read
        self._encode = encode

    def deliver(self, receive: Callable[[Request | None], None], fail: Callable[[Exception], None]) -> None:
        read = self._read

        def received(data: bytes | None) -> None:
            try:
                receive(read(data))
            except Exception as e:  # noqa: BLE001 - `fail` tells it
                fail(e)

        self._call.deliver(received)

    def pause_reading(self) -> None:
        self._call.pause_reading()

    def resume_reading(self) -> None:
        self._call.resume_reading()

    def write(self, response: Response) -> int:
        return self._call.write(*self._encode(response))

    def drained(self) -> asyncio.Future[None] | None:
        return self._call.drained()


class _Reader:
    """Reads the messages of one stream, and sees to it that they are the proxy's own."""

    def __init__(self, variant: _Variant, service: Service, proxy: Name) -> None:
        self._message = variant.request
        self._acknowledgement = variant.acknowledgement
        self._decode = variant.decoder()
        self._service = service
        self._proxy = proxy
        self._first = True
        self._types = variant.types
        self.types: Collection[Type] = ()
        """Those that the client can be told of, as its first request says."""

    def __call__(self, data: bytes | None) -> Request | None:
        """What one message says; None at the end of the stream."""
        if data is None:
            return None
        if not self._first and (ack := self._acknowledgement(data)) is not None:
            return ack
        try:
            message = self._message.FromString(data)
        except DecodeError:
            raise ProtocolError(f"a message that is no {self._message.DESCRIPTOR.name}") from None
        if (self._first or message.HasField("node")) and message.node.id != str(self._proxy):
            text = f"node.id is {message.node.id[:300]!r}, and the credential is of {self._proxy}: they must be equal"
            raise Refused(Status.PERMISSION_DENIED, "impostor", text)
        if self._first:
            self.types = self._types(message.node)
            self._first = False
        if not message.type_url and self._service is not AGGREGATED:
            message.type_url = self._service.types[0].value  # there it goes without saying
        request = self._decode(message)
        if request.type is Type.SECRET:
            self._check_secrets((*request.subscribe, *request.initial))
        return request

    def _check_secrets(self, asked: Sequence[str]) -> None:
        foreign = [name for name in asked if name not in OWN_SECRETS]
        if foreign:
            text = f"{self._proxy} asks for the secret {foreign[0][:300]!r}: a proxy has {' and '.join(OWN_SECRETS)}"
            log.warning(
                "a proxy asks for a secret that is not its own", **{telemetry.PROXY: str(self._proxy)}, error=text
            )
            raise Refused(Status.PERMISSION_DENIED, "foreign_secret", text)


def serving(
    streams: Streams, tls: Callable[[], ServerTLS], *, address: str, max_connection_age: float
) -> AbstractAsyncContextManager[int]:
    """Serve at `address` (host:port, port 0 for any) for as long as it is entered, which gives the port.

    Raises:
        Unavailable: the address cannot be bound.
    """
    return transport.serving(
        {path: serve for service in SERVICES for path, serve in streams.methods(service).items()},
        tls,
        address=address,
        # A new connection shows the credential of then, and is where chance put it.
        max_connection_age=max_connection_age,
        max_connections=2 * streams.most + SPARE,
    )
