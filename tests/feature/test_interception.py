"""From a manifest that says `sidecar: intercepted` to what its proxy reads, through a leader and all of a replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from ipaddress import ip_address, ip_network
from typing import Any

from smc import addresses
from smc.codec import decode
from smc.envoy import names
from smc.model import Name, Service, Workload
from smc.records import AddressRecord
from smc.xds.snapshot import Type
from tests.unit.bookshop import KEYS, service, workload
from tests.unit.leadership import elect
from tests.unit.tasks import at_work
from tests.unit.xds.replica import Client, Mesh, Replica, serving, until

SHOP: tuple[Service | Workload, ...] = (
    service("bookstore"),
    service("paper"),
    workload("bookstore", "bookstore", reachable=()),
    workload("paper", "paper", reachable=()),
    workload("thief"),
)


@asynccontextmanager
async def bookshop() -> AsyncIterator[tuple[Mesh, Replica]]:
    mesh = await Mesh.make()
    await mesh.observe(*SHOP)
    await mesh.certify("bookstore", "paper", "thief", "buyer")
    async with serving(mesh) as replica:
        await until(lambda: replica.pipeline.ready)
        yield mesh, replica


@asynccontextmanager
async def leader(mesh: Mesh, replica: Replica) -> AsyncIterator[None]:
    """A new term in which addresses are given."""
    leadership = await elect(mesh.kv, KEYS)
    async with (
        aclosing(replica.pipeline.meshes()) as meshes,
        at_work(addresses.run(leadership, mesh.kv, KEYS, meshes)) as task,
    ):
        yield
        assert not task.done()


async def intercept(mesh: Mesh, sidecar: str = "intercepted") -> int:
    return await mesh.apply(
        f"""\
        apiVersion: smc.io/v1alpha1
        kind: Workload
        metadata: {{name: buyer, namespace: shop}}
        spec: {{address: 127.0.1.9, serviceAccount: buyer, sidecar: {sidecar}}}
        """
    )


@asynccontextmanager
async def intercepted(mesh: Mesh, replica: Replica, *, services: int) -> AsyncIterator[Client]:
    """The buyer, intercepted and connected, where so many services have been given an address."""
    await intercept(mesh)
    async with leader(mesh, replica):
        await until_given(mesh, services)
        buyer = await Client.of(mesh, "buyer")
        async with buyer.connected(replica):
            yield buyer


async def given(mesh: Mesh) -> dict[str, str]:
    records = [decode(AddressRecord, item.value) for item in (await mesh.kv.list(KEYS.addresses)).items]
    return {record.service.name: record.address for record in records}


def domains(client: Client, port: int) -> dict[str, set[str]]:
    """By service port; nothing while the proxy has no routes for that port."""
    return {name: set(host.domains) for name, host in client.hosts(names.outbound_route(port)).items()}


def chains(client: Client) -> dict[str, Any]:
    return {chain.name: chain for chain in client.get(Type.LISTENER, "outbound").filter_chains}


async def test_the_first_intercepted_workload_gives_every_service_an_address_and_its_proxy_routes_to_them() -> None:
    async with bookshop() as (mesh, replica), AsyncExitStack() as stack:
        thief = await Client.of(mesh, "thief")
        await stack.enter_async_context(leader(mesh, replica))
        await stack.enter_async_context(thief.connected(replica))
        await until(lambda: thief.is_complete and not replica.streams.report().laggards)
        assert await given(mesh) == {}, "who is explicit dials nobody"
        thief.news()

        await intercept(mesh)
        await until(lambda: Name("shop", "buyer") in (replica.pipeline.mesh.proxies if replica.pipeline.mesh else {}))
        buyer = await Client.of(mesh, "buyer")
        await stack.enter_async_context(buyer.connected(replica))
        await until(lambda: set(domains(buyer, 80)) == {"others", "bookstore.shop|80", "paper.shop|80"})

        virtual = await given(mesh)
        assert virtual.keys() == {"bookstore", "paper"}
        assert all(ip_address(address) in ip_network(names.VIRTUAL_ADDRESSES) for address in virtual.values())
        assert {"bookstore", "bookstore.shop.svc", virtual["bookstore"]} <= domains(buyer, 80)["bookstore.shop|80"]
        assert "outbound|80" in chains(buyer)
        table = buyer.get(Type.LISTENER, "dns").listener_filters[0].typed_config.value
        assert b"bookstore.shop.svc.cluster.local" in table
        assert virtual["bookstore"].encode() in table
        assert thief.news() == [], "and no explicit proxy is sent anything for it"


async def test_another_leader_and_a_restarted_replica_find_the_same_addresses() -> None:
    async with bookshop() as (mesh, replica):
        await intercept(mesh)
        async with leader(mesh, replica):
            await until_given(mesh, 2)
        before = await given(mesh)
        await mesh.observe(*SHOP, service("another"))
        async with serving(mesh, "replica-2") as other:
            await until(lambda: other.pipeline.ready)
            async with leader(mesh, other):
                await until_given(mesh, 3)
        after = await given(mesh)
        assert {name: after[name] for name in before} == before


async def until_given(mesh: Mesh, number: int) -> None:
    async with asyncio.timeout(10):
        while len(await given(mesh)) < number:  # noqa: ASYNC110 - what is waited for is in a store
            await asyncio.sleep(0.01)


async def test_a_service_says_an_address_of_its_own_and_that_is_where_it_is_dialled() -> None:
    async with bookshop() as (mesh, replica):
        await mesh.apply(
            """\
            apiVersion: smc.io/v1alpha1
            kind: Service
            metadata: {name: bookstore, namespace: shop}
            spec: {ports: [{port: 80, targetPort: 8080}], address: 10.96.0.7}
            """
        )
        async with intercepted(mesh, replica, services=1) as buyer:
            await until(lambda: buyer.is_complete and "shop/bookstore|80" in chains(buyer))
            match = chains(buyer)["shop/bookstore|80"].filter_chain_match
        assert [r.address_prefix for r in match.prefix_ranges] == ["10.96.0.7"]
        assert (await given(mesh)).keys() == {"paper"}


async def test_a_split_reaches_an_intercepted_proxy_and_its_listeners_are_left_alone() -> None:
    async with bookshop() as (mesh, replica), intercepted(mesh, replica, services=2) as buyer:
        await until(lambda: buyer.is_complete and "bookstore.shop|80" in domains(buyer, 80))
        await until(lambda: not replica.streams.report().laggards)
        buyer.news()
        await mesh.split("bookstore", paper=1)
        await until(lambda: bool(buyer.received))
        assert buyer.news() == [("VirtualHost", ("outbound|80/bookstore.shop|80",), ())]


async def test_a_workload_that_is_intercepted_no_longer_is_told_what_an_explicit_one_is() -> None:
    async with bookshop() as (mesh, replica), intercepted(mesh, replica, services=2) as buyer:
        await until(lambda: buyer.is_complete and "dns" in buyer.has[Type.LISTENER])
        await intercept(mesh, "explicit")
        await until(lambda: set(buyer.has[Type.LISTENER]) == {"outbound"})
        assert buyer.get(Type.LISTENER, "outbound").address.socket_address.address == "127.0.1.9"
        assert len(await given(mesh)) == 2, "the addresses stay with their services"
