"""Replicas that serve xDS on loopback with real mTLS, from a store in memory, and clients that speak it like Envoy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.rpc import status_pb2

from cluster.memory import MemoryKV, MemoryStore
from cluster.mirror import Mirror
from smc import plugins
from smc.certificates import x509
from smc.certificates.authority import Authority, load_authority, load_keyring
from smc.certificates.credential import Credential
from smc.certificates.initialise import initialise
from smc.certificates.sealing import Keyring
from smc.certificates.signers.local import LocalSigner
from smc.envoy.snapshot import Generator
from smc.metrics import Metrics
from smc.model import Identity, Name
from smc.pipeline import Pipeline
from smc.readiness import Readiness
from smc.records import CertificateRecord, ReadyRecord
from smc.tls import ServerTLS
from smc.xds import delta, server
from smc.xds.snapshot import Type
from tests.unit.bookshop import KEYS, SOURCE, TRUST_DOMAIN, Shop

DAY = timedelta(hours=24)
METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
MESSAGES: Mapping[Type, Any] = {
    Type.CLUSTER: cluster_pb2.Cluster,
    Type.ENDPOINT: endpoint_pb2.ClusterLoadAssignment,
    Type.SECRET: secret_pb2.Secret,
    Type.LISTENER: listener_pb2.Listener,
    Type.ROUTE: route_pb2.RouteConfiguration,
    Type.VIRTUAL_HOST: route_components_pb2.VirtualHost,
}


class Mesh(Shop):
    """A shop with an authority of its own."""

    operator: Credential
    keyring: Keyring
    authority: Authority

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(MemoryKV(store))
        self.store = store

    @classmethod
    async def make(cls) -> Mesh:
        mesh = cls(MemoryStore())
        signer = LocalSigner(b"k" * 32)
        mesh.operator = await initialise(mesh.kv, KEYS, signer, TRUST_DOMAIN, time.time())
        mesh.keyring = await load_keyring(mesh.kv, KEYS, signer)
        mesh.authority = await load_authority(mesh.kv, KEYS, mesh.keyring, signer)
        return mesh

    async def credential(self, path: str, *, ttl: timedelta = DAY) -> Credential:
        return await self.certified(f"spiffe://{TRUST_DOMAIN}/{path}", ttl=ttl)

    async def certified(self, uri: str, *, ttl: timedelta = DAY) -> Credential:
        key = x509.new_key()
        _, chain = await self.authority.issue(key.public_key(), uri, now=time.time(), ttl=ttl)
        return Credential(uri, chain, x509.private_pem(key).decode(), self.operator.roots)

    async def certify(self, *names: str) -> None:
        """As the issuer does, and as if each proxy had been ready once."""
        for name in names:
            identity = Identity("shop", name)
            made = await self.certified(identity.uri(TRUST_DOMAIN))
            path = KEYS.certificate(identity)
            now = time.time()
            sealed = self.keyring.seal(path, made.key.encode())
            await self.put(path, CertificateRecord(identity, made.chain, sealed, "1", now, made.not_after, 1))
            await self.put(KEYS.ready(Name("shop", name)), ReadyRecord(Name("shop", name)))


class Replica:
    """All of a replica that a proxy sees."""

    def __init__(self, mesh: Mesh, name: str, max_streams: int) -> None:
        self.name = name
        self.mesh = mesh
        self.kv = MemoryKV(mesh.store)
        self.metrics = Metrics()
        keyring = mesh.keyring
        generator = Generator(lambda record: keyring.open(KEYS.certificate(record.identity), record.sealed_key))
        self.pipeline = Pipeline(
            Mirror(self.kv, KEYS.root, KEYS.feeds_mesh),
            plugins.policies(),
            generator.snapshot,
            sources=frozenset({SOURCE}),
            max_staleness=3600.0,
            metrics=self.metrics,
        )
        self.readiness = Readiness(self.kv, KEYS, lambda _: False)
        self.streams = server.Streams(
            self.pipeline,
            self.metrics,
            replica=name,
            identifier=f"{name}/1/1",
            trust_domain=TRUST_DOMAIN,
            max_streams=max_streams,
            listening=self.readiness.listening,
        )
        self.port = 0

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def refused(self, reason: str) -> float:
        return self.metric("smc_xds_refused_total", reason=reason)

    async def until(self, holds: Callable[[], object], seconds: float = 60.0) -> None:
        await until(holds, seconds)


@asynccontextmanager
async def serving(
    mesh: Mesh, name: str = "replica-1", *, max_streams: int = 1000, max_connection_age: float = 3600.0
) -> AsyncIterator[Replica]:
    replica = Replica(mesh, name, max_streams)
    own = await mesh.credential(f"replica/{name}")
    tls = ServerTLS(own.chain, own.key, own.roots_pem)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(replica.pipeline.run()), tasks.create_task(replica.readiness.run())]
        async with server.serving(
            replica.streams, lambda: tls, address="127.0.0.1:0", max_connection_age=max_connection_age
        ) as replica.port:
            yield replica
        for task in running:
            task.cancel()


async def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for is on the other side of a network
            await asyncio.sleep(0.005)


# ------------------------------------------------------------------------------------------------------------- clients


@asynccontextmanager
async def channel(
    replica: Replica, credential: Credential | None, *, narrow: bool = False
) -> AsyncIterator[grpc.aio.Channel]:
    """With `narrow` it makes room for 64 KiB of what it does not read, and no more."""
    tls = grpc.ssl_channel_credentials(
        replica.mesh.operator.roots_pem.encode(),
        credential.key.encode() if credential else None,
        credential.chain.encode() if credential else None,
    )
    options = [
        ("grpc.ssl_target_name_override", x509.replica_host(TRUST_DOMAIN)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
        *([("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)] if narrow else ()),
    ]
    async with grpc.aio.secure_channel(f"127.0.0.1:{replica.port}", tls, options) as opened:
        yield opened


def open_stream(opened: grpc.aio.Channel, method: str = METHOD) -> Any:
    """A stream of bytes, both ways."""
    return opened.stream_stream(method)()


def request(type_: Type, *names: str, node: str = "", **more: Any) -> bytes:
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=type_.value, resource_names_subscribe=names, **more)
    if node:
        message.node.CopyFrom(envoy(node))
    data: bytes = message.SerializeToString()
    return data


def envoy(node: str, version: tuple[int, int] = delta.DISCOVERS) -> Any:
    """What an Envoy says that it is; this one is new enough to discover virtual hosts."""
    found = base_pb2.Node(id=node, user_agent_name="envoy")
    said = found.user_agent_build_version.version
    said.major_number, said.minor_number = version
    return found


async def answer_to(
    replica: Replica, credential: Credential | None, *messages: bytes, method: str = METHOD
) -> tuple[grpc.StatusCode, str]:
    """Say these things on a new stream; returns how it ended."""
    async with channel(replica, credential) as opened:
        return await said_on(replica, open_stream(opened, method), *messages)


async def said_on(replica: Replica, call: Any, *messages: bytes) -> tuple[grpc.StatusCode, str]:
    # A write that meets the end of the call makes gRPC's client forget the status and say INTERNAL: who is refused
    # without having said anything says nothing. Whoever is not, is waited for to say something.
    if messages:
        refused, opening = asyncio.ensure_future(call.code()), replica.streams._opening
        await until(lambda: refused.done() or replica.streams._opening > opening)
        if refused.done():
            return refused.result(), await call.details()
    try:
        async with asyncio.timeout(30):
            for message in messages:
                await call.write(message)
            while (await call.read()) is not grpc.aio.EOF:
                pass
            return await call.code(), await call.details()
    except grpc.aio.AioRpcError as e:
        return e.code(), e.details() or ""
    except asyncio.InvalidStateError:  # the call was over before all was said
        return await call.code(), await call.details()


class Client:
    """A delta client that asks for what Envoy asks for, ACKs it, and remembers all of it, across streams."""

    def __init__(self, name: Name, credential: Credential) -> None:
        self.name = name
        self.credential = credential
        self.has: dict[Type, dict[str, Any]] = {type_: {} for type_ in Type}
        """The message of each resource."""
        self.versions: dict[Type, dict[str, str]] = {type_: {} for type_ in Type}
        self.asked: dict[Type, set[str]] = {type_: set() for type_ in Type}
        self.received: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        """(type, resources, removed) of every response with something in it."""
        self.answers = 0
        self.identifier = ""
        self.refuses: Callable[[Type, Any], bool] = lambda _type, _message: False
        self.acks = True
        self.ended: tuple[grpc.StatusCode, str] | None = None
        self._discovers = False
        """It has asked for virtual hosts, once for all."""
        self._call: Any = None

    @classmethod
    async def of(cls, mesh: Mesh, name: str) -> Client:
        return cls(Name("shop", name), await mesh.credential(f"proxy/shop/{name}"))

    def get(self, type_: Type, name: str) -> Any:
        return self.has[type_][name]

    @property
    def is_complete(self) -> bool:
        """It has everything that it asked for, and listens."""
        return (
            bool(self.has[Type.LISTENER])
            and all(self.asked[type_] <= self.has[type_].keys() for type_ in (Type.ENDPOINT, Type.SECRET, Type.ROUTE))
            and all(self.hosts(name) for name, route in self.has[Type.ROUTE].items() if route.HasField("vhds"))
        )

    def hosts(self, route: str) -> dict[str, Any]:
        """The virtual hosts of a route that discovers them, by what follows its name."""
        there = self.has[Type.VIRTUAL_HOST].items()
        return {name.removeprefix(f"{route}/"): host for name, host in there if name.startswith(f"{route}/")}

    def news(self) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        """What has come since the last time."""
        found, self.received = self.received, []
        return found

    @asynccontextmanager
    async def connected(self, replica: Replica) -> AsyncIterator[None]:
        self.ended = None
        async with channel(replica, self.credential) as opened:
            self._call = open_stream(opened)
            task = asyncio.create_task(self._run())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                self._call.cancel()

    async def say(self, type_: Type, *names: str, **more: Any) -> None:
        await self._call.write(request(type_, *names, **more))

    async def _run(self) -> None:
        try:
            first = request(Type.CLUSTER, node=str(self.name), initial_resource_versions=self.versions[Type.CLUSTER])
            await self._call.write(first)
            for type_ in (Type.ENDPOINT, Type.SECRET, Type.LISTENER, Type.ROUTE, Type.VIRTUAL_HOST):
                if type_ is Type.LISTENER or self.asked[type_] or (type_ is Type.VIRTUAL_HOST and self._discovers):
                    names = sorted(self.asked[type_])
                    await self.say(type_, *names, initial_resource_versions=self.versions[type_])
            while (data := await self._call.read()) is not grpc.aio.EOF:
                await self._hear(discovery_pb2.DeltaDiscoveryResponse.FromString(data))
        except grpc.aio.AioRpcError:
            pass
        self.ended = (await self._call.code(), await self._call.details())

    async def _hear(self, response: Any) -> None:
        type_ = Type(response.type_url)
        self.answers += 1
        self.identifier = response.control_plane.identifier
        bad: list[str] = []
        taken: list[str] = []
        for resource in response.resources:
            message = MESSAGES[type_]()
            assert resource.resource.Unpack(message)
            if self.refuses(type_, message):
                bad.append(resource.name)
                continue
            taken.append(resource.name)
            self.has[type_][resource.name] = message
            self.versions[type_][resource.name] = resource.version
        for name in response.removed_resources:
            self.has[type_].pop(name, None)
            self.versions[type_].pop(name, None)
        if taken or bad or response.removed_resources:
            short = type_.value.rpartition(".")[2]
            self.received.append((short, (*taken, *bad), tuple(response.removed_resources)))
        if not self.acks:
            return
        error = status_pb2.Status(code=3, message="\n".join(f"{name}: refused by the test" for name in bad))
        await self.say(type_, response_nonce=response.nonce, **({"error_detail": error} if bad else {}))
        for wanted, names in self._warms_on(type_, taken).items():
            if new := sorted(names - self.asked[wanted]):
                self.asked[wanted].update(new)
                await self.say(wanted, *new)
        if not self._discovers and any(route.HasField("vhds") for route in self.has[Type.ROUTE].values()):
            self._discovers = True
            await self.say(Type.VIRTUAL_HOST)

    def _warms_on(self, type_: Type, names: list[str]) -> dict[Type, set[str]]:
        found: dict[Type, set[str]] = {Type.ENDPOINT: set(), Type.SECRET: set(), Type.ROUTE: set()}
        for name in names:
            message = self.has[type_][name]
            if type_ is Type.CLUSTER and message.type == cluster_pb2.Cluster.EDS:
                found[Type.ENDPOINT].add(message.eds_cluster_config.service_name or name)
                found[Type.SECRET].update(("identity", "bundle"))
            if type_ is Type.LISTENER:
                for chain in (*message.filter_chains, message.default_filter_chain):
                    if chain.HasField("transport_socket"):
                        found[Type.SECRET].update(("identity", "bundle"))
                    for filter_ in chain.filters:
                        manager = http_connection_manager_pb2.HttpConnectionManager()
                        if filter_.typed_config.Unpack(manager) and manager.rds.route_config_name:
                            found[Type.ROUTE].add(manager.rds.route_config_name)
        return found
