"""Every service in both variants, over real mTLS on loopback; and what the streams of a proxy are to each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_pb2
from envoy.service.discovery.v3 import discovery_pb2

from cluster.kv import Delete
from smc.model import Name
from smc.xds import delta, server
from smc.xds.server import AGGREGATED, SERVICES, Service
from smc.xds.snapshot import Type
from tests.unit.bookshop import KEYS, service, workload
from tests.unit.xds.replica import (
    MESSAGES,
    Client,
    Mesh,
    Replica,
    answer_to,
    channel,
    envoy,
    open_stream,
    request,
    serving,
    until,
)

Code = grpc.StatusCode
OF = {served.types[0]: served for served in SERVICES if served is not AGGREGATED}
NAMES = {Type.ENDPOINT: ("shop/store|80",), Type.SECRET: ("identity", "bundle"), Type.ROUTE: ("outbound",)}


@asynccontextmanager
async def world() -> AsyncIterator[tuple[Mesh, Replica]]:
    """A bookstore with a buyer, and one replica that is ready."""
    mesh = await Mesh.make()
    await mesh.observe(service("store"), workload("buyer"), workload("store", "store"))
    await mesh.certify("buyer", "store")
    async with serving(mesh) as replica:
        await until(lambda: replica.pipeline.ready)
        yield mesh, replica


def method(of: Service, variant: str = "Stream") -> str:
    return f"/{of.name}/{variant}{of.resources}"


def asking(type_: Type | None, *names: str, node: str = "shop/buyer", **more: Any) -> bytes:
    message = discovery_pb2.DiscoveryRequest(resource_names=names, type_url=type_.value if type_ else "", **more)
    if node:
        message.node.id = node
    data: bytes = message.SerializeToString()
    return data


class Watch:
    """One state-of-the-world stream of one type, which ACKs everything."""

    def __init__(self, call: Any, type_: Type) -> None:
        self.type = type_
        self.has: dict[str, Any] = {}
        self.versions: list[str] = []
        self.identifier = ""
        self.ended: tuple[grpc.StatusCode, str] | None = None
        self._call = call

    async def run(self, *, version: str = "") -> None:
        names = NAMES.get(self.type, ())
        try:
            await self._call.write(asking(self.type, *names, version_info=version))
            while (data := await self._call.read()) is not grpc.aio.EOF:
                message = discovery_pb2.DiscoveryResponse.FromString(data)
                assert message.type_url == self.type.value
                if self.type in (Type.CLUSTER, Type.LISTENER):
                    self.has.clear()
                for packed in message.resources:
                    found = MESSAGES[self.type]()
                    assert packed.Unpack(found)
                    self.has[found.cluster_name if self.type is Type.ENDPOINT else found.name] = found
                self.identifier = message.control_plane.identifier
                self.versions.append(message.version_info)
                ack = asking(
                    self.type, *names, node="", version_info=message.version_info, response_nonce=message.nonce
                )
                await self._call.write(ack)
        except grpc.aio.AioRpcError:
            pass
        self.ended = (await self._call.code(), await self._call.details())


@asynccontextmanager
async def watching(replica: Replica, mesh: Mesh, *types: Type, version: str = "") -> AsyncIterator[dict[Type, Watch]]:
    """The buyer's streams of these types, each on the service of its own, all over one connection."""
    async with channel(replica, await mesh.credential("proxy/shop/buyer")) as opened:
        watches = {type_: Watch(open_stream(opened, method(OF[type_])), type_) for type_ in types}
        tasks = [asyncio.create_task(watch.run(version=version)) for watch in watches.values()]
        try:
            yield watches
        finally:
            for task in tasks:
                task.cancel()
            failures = [found for found in await asyncio.gather(*tasks, return_exceptions=True) if found]
            assert not [found for found in failures if not isinstance(found, asyncio.CancelledError)]


# ------------------------------------------------------------------------------------------------------------- services


@pytest.mark.parametrize("variant", ["Delta", "Stream"])
@pytest.mark.parametrize("type_", OF)
async def test_each_type_is_served_by_its_own_service_and_by_the_aggregated_one(type_: Type, variant: str) -> None:
    async with world() as (mesh, replica), channel(replica, await mesh.credential("proxy/shop/buyer")) as opened:
        for served in (OF[type_], AGGREGATED):
            call = open_stream(opened, method(served, variant))
            names = NAMES.get(type_, ())
            if variant == "Delta":
                await call.write(request(type_, *names, node="shop/buyer"))
                answer = discovery_pb2.DeltaDiscoveryResponse.FromString(await call.read())
            else:
                await call.write(asking(type_, *names))
                answer = discovery_pb2.DiscoveryResponse.FromString(await call.read())
            assert (answer.type_url, answer.nonce) == (type_.value, "1")
            assert answer.control_plane.identifier == "replica-1/1/1"
            assert len(answer.resources) == max(len(names), {Type.CLUSTER: 2}.get(type_, 1))
            call.cancel()


@pytest.mark.parametrize(("version", "discovers"), [((1, 36), False), ((1, 37), True), ((1, 40), True), ((2, 0), True)])
async def test_an_envoy_discovers_virtual_hosts_if_it_is_new_enough_and_else_has_them_in_its_routes(
    version: tuple[int, int], discovers: bool
) -> None:
    async with world() as (mesh, replica), channel(replica, await mesh.credential("proxy/shop/buyer")) as opened:
        call = open_stream(opened, method(AGGREGATED, "Delta"))
        first = discovery_pb2.DeltaDiscoveryRequest(type_url=Type.ROUTE.value, resource_names_subscribe=["outbound"])
        first.node.CopyFrom(envoy("shop/buyer", version))
        await call.write(first.SerializeToString())
        (found,) = discovery_pb2.DeltaDiscoveryResponse.FromString(await call.read()).resources
        route = route_pb2.RouteConfiguration.FromString(found.resource.value)
        assert route.HasField("vhds") is discovers
        told = {host.name for host in route.virtual_hosts}
        assert told == (set() if discovers else {"outbound/others", "outbound/store.shop|80"})


async def test_who_is_no_envoy_has_virtual_hosts_in_its_routes() -> None:
    node = base_pb2.Node(id="shop/buyer", user_agent_name="gRPC C-core")
    assert Type.VIRTUAL_HOST not in delta.types(node)
    assert Type.VIRTUAL_HOST not in delta.types(base_pb2.Node(user_agent_name="envoy")), "who does not say which"


async def test_a_service_refuses_what_belongs_to_another() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        code, text = await answer_to(replica, credential, asking(Type.CLUSTER), method=method(OF[Type.ENDPOINT]))
        assert code is Code.INVALID_ARGUMENT
        assert text.startswith("a stream of ENDPOINT is asked for a CLUSTER")
        first = request(Type.LISTENER, node="shop/buyer")
        code, _ = await answer_to(
            replica, credential, first, request(Type.ROUTE), method=method(OF[Type.LISTENER], "Delta")
        )
        assert code is Code.INVALID_ARGUMENT
        assert not replica.streams.sessions


async def test_a_type_goes_without_saying_where_there_is_one() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        async with channel(replica, credential) as opened:
            call = open_stream(opened, method(OF[Type.CLUSTER]))
            await call.write(asking(None))
            answer = discovery_pb2.DiscoveryResponse.FromString(await call.read())
            assert answer.type_url == Type.CLUSTER.value
            call.cancel()
        code, _ = await answer_to(replica, credential, asking(None), method=method(AGGREGATED))
        assert code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("served", SERVICES, ids=lambda served: served.resources)
async def test_who_may_ask_is_the_same_everywhere(served: Service) -> None:
    type_ = served.types[0]
    async with world() as (mesh, replica):
        buyer, operator = await mesh.credential("proxy/shop/buyer"), await mesh.credential("operator/ann")
        for credential, message, code in (
            (buyer, asking(type_, "x", node="shop/store"), Code.PERMISSION_DENIED),
            (buyer, asking(type_, "x", node=""), Code.PERMISSION_DENIED),
            (buyer, b"\xff\xff\xff garbage", Code.INVALID_ARGUMENT),
            (operator, asking(type_, "x"), Code.PERMISSION_DENIED),
        ):
            assert (await answer_to(replica, credential, message, method=method(served)))[0] is code


@pytest.mark.parametrize("served", [AGGREGATED, OF[Type.SECRET]], ids=lambda served: served.resources)
async def test_a_secret_of_another_is_refused_whenever_it_is_asked_for(served: Service) -> None:
    async with world() as (mesh, replica):
        buyer = await mesh.credential("proxy/shop/buyer")
        own, theirs = asking(Type.SECRET, "identity"), asking(Type.SECRET, "identity", "shop/store", node="")
        code, text = await answer_to(replica, buyer, own, theirs, method=method(served))
        assert code is Code.PERMISSION_DENIED
        assert text == "shop/buyer asks for the secret 'shop/store': a proxy has identity and bundle"


# ------------------------------------------------------------------------------------------- several streams of a proxy


async def test_five_streams_of_a_proxy_live_side_by_side_and_each_gets_every_change() -> None:
    async with world() as (mesh, replica), watching(replica, mesh, *OF) as watches:
        await until(lambda: all(watch.has for watch in watches.values()))
        assert set(watches[Type.CLUSTER].has) == {"shop/store|80", "passthrough"}
        assert set(watches[Type.SECRET].has) == {"identity", "bundle"}
        assert set(watches[Type.LISTENER].has) == {"outbound"}
        assert len(replica.streams.sessions) == 5
        await until(lambda: replica.streams.report().laggards == ())
        assert replica.streams.report().revision == replica.pipeline.mesh.revision  # type: ignore[union-attr]

        await mesh.observe(service("store"), service("new"), workload("buyer"), workload("store", "store"))
        await until(lambda: "shop/new|80" in watches[Type.CLUSTER].has)
        await until(lambda: len(watches[Type.ROUTE].versions) == 2)
        await mesh.observe(service("store"), workload("buyer"), workload("store", "store"))
        await until(lambda: set(watches[Type.CLUSTER].has) == {"shop/store|80", "passthrough"})
        first, _, last = watches[Type.CLUSTER].versions
        assert first == last, "the version is that of the set"
        assert not any(watch.ended for watch in watches.values())


async def test_a_newer_stream_takes_the_place_of_the_older_of_its_service_alone() -> None:
    async with world() as (mesh, replica):
        delta = await Client.of(mesh, "buyer")
        async with delta.connected(replica), watching(replica, mesh, Type.CLUSTER, Type.ROUTE) as older:
            await until(lambda: delta.is_complete and all(watch.has for watch in older.values()))
            async with watching(replica, mesh, Type.CLUSTER) as newer:
                await until(lambda: newer[Type.CLUSTER].has and older[Type.CLUSTER].ended)
                assert older[Type.CLUSTER].ended == (
                    Code.UNAVAILABLE,
                    "a newer stream of shop/buyer took its place",
                )
                assert older[Type.ROUTE].ended is None
                assert delta.ended is None
                assert len(replica.streams.sessions) == 3


async def test_all_streams_of_a_workload_that_is_removed_end() -> None:
    async with world() as (mesh, replica), watching(replica, mesh, *OF) as watches:
        await until(lambda: all(watch.has for watch in watches.values()))
        await mesh.observe(service("store"), workload("store", "store"))
        await until(lambda: all(watch.ended for watch in watches.values()))
        assert {watch.ended for watch in watches.values()} == {
            (Code.UNAVAILABLE, "workload shop/buyer was removed from the mesh")
        }
        await until(lambda: not replica.pipeline._slots)


async def test_a_proxy_can_hold_so_many_streams_of_each_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_OF_ONE", 1)
    async with world() as (mesh, replica), watching(replica, mesh, *OF) as watches:
        await until(lambda: all(watch.has for watch in watches.values()))
        buyer = await mesh.credential("proxy/shop/buyer")
        code, _ = await answer_to(replica, buyer, asking(Type.ROUTE), method=method(OF[Type.ROUTE]))
        assert code is Code.RESOURCE_EXHAUSTED
        assert not any(watch.ended for watch in watches.values())


async def test_a_proxy_that_acks_its_listeners_on_a_stream_of_their_own_is_written_as_ready() -> None:
    async with world() as (mesh, replica):
        await mesh.kv.transact([Delete(KEYS.ready(Name("shop", "buyer")))])
        async with watching(replica, mesh, Type.CLUSTER, Type.SECRET, Type.ROUTE, Type.ENDPOINT) as watches:
            await until(lambda: all(watch.has for watch in watches.values()))
            assert mesh.store.get(KEYS.ready(Name("shop", "buyer"))) is None
            async with watching(replica, mesh, Type.LISTENER):
                await until(lambda: mesh.store.get(KEYS.ready(Name("shop", "buyer"))) is not None)


# ------------------------------------------------------------------------------------------------------------ admission


async def test_without_the_store_who_has_something_waits_and_who_has_nothing_is_sent_away() -> None:
    async with world() as (mesh, replica):
        replica.kv.disconnect()
        async with watching(replica, mesh, Type.CLUSTER) as cold:
            await until(lambda: cold[Type.CLUSTER].ended)
            assert cold[Type.CLUSTER].ended[0] is Code.UNAVAILABLE  # type: ignore[index]
        async with watching(replica, mesh, Type.CLUSTER, version="accepted before") as resumed:
            await until(lambda: replica.streams._opening == 1)
            await asyncio.sleep(0.2)
            assert resumed[Type.CLUSTER].ended is None
            assert not resumed[Type.CLUSTER].has, "nothing is sent, and nothing is lost"
