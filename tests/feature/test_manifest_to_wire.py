"""From a manifest as an operator applies it to what a proxy reads, over real mTLS and through all of a replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2

from cluster.election import Election
from cluster.kv import Delete, Put
from cluster.members import Members
from smc import quarantine
from smc.codec import decode, encode
from smc.model import Identity, Name, Service, Workload
from smc.records import QuarantineRecord
from smc.xds.snapshot import Type
from tests.unit.bookshop import KEYS, TRUST_DOMAIN, service, workload
from tests.unit.xds.replica import Client, Mesh, Replica, serving, until

BUYER, THIEF, STORE, STORE_2 = "buyer", "thief", "bookstore", "bookstore-v2"
MODE = "smc.io/NamespaceConfig/shop/default"
NOTHING: tuple[Name, ...] = ()

SHOP: tuple[Service | Workload, ...] = (
    service("bookstore"),
    service("bookstore-v2"),
    service("paper"),
    service("paper-v2"),
    workload("buyer"),
    workload("thief"),
    workload("bookstore", "bookstore", reachable=NOTHING),
    workload("bookstore-v2", "bookstore-v2", reachable=NOTHING),
    workload("paper", "paper", reachable=NOTHING),
    workload("paper-v2", "paper-v2", reachable=NOTHING),
)


@asynccontextmanager
async def bookshop(*clients: str) -> AsyncIterator[tuple[Mesh, Replica, list[Client]]]:
    """The shop, a replica that is ready, and these proxies with all of their configuration."""
    mesh = await Mesh.make()
    await mesh.observe(*SHOP)
    await mesh.certify(*(found.name.name for found in SHOP if isinstance(found, Workload)))
    async with serving(mesh) as replica, AsyncExitStack() as stack:
        await until(lambda: replica.pipeline.ready)
        found = [await Client.of(mesh, name) for name in clients]
        for client in found:
            await stack.enter_async_context(client.connected(replica))
        await until(lambda: all(client.is_complete for client in found))
        await acked(mesh, replica)
        for client in found:
            client.news()
        yield mesh, replica, found


async def acked(mesh: Mesh, replica: Replica, revision: int = 0) -> None:
    """Return once every proxy has ACKed what was written up to now, as `smc apply --wait` does."""
    await replica.pipeline.admit(resumed=True)
    await until(lambda: replica.streams.report().revision >= revision and not replica.streams.report().laggards)


def shares(client: Client, name: str) -> dict[str, int]:
    """Where the requests of a proxy's application to one service go: cluster -> weight."""
    action = client.hosts("outbound")[f"{name}.shop|80"].routes[0].route
    if action.HasField("weighted_clusters"):
        return {c.name.removeprefix("shop/"): c.weight.value for c in action.weighted_clusters.clusters}
    return {action.cluster.removeprefix("shop/"): 1}


def permissions(client: Client) -> dict[str, set[str]]:
    """Who may call a proxy's application: policy -> the exact SPIFFE IDs."""
    (host,) = client.get(Type.ROUTE, "inbound|8080").virtual_hosts
    config = rbac_pb2.RBACPerRoute()
    assert host.routes[0].typed_per_filter_config["envoy.filters.http.rbac"].Unpack(config)
    assert config.rbac.HasField("rules"), "an RBACPerRoute without rules lets everybody in"
    return {
        name: {principal.authenticated.principal_name.exact for principal in policy.principals}
        for name, policy in config.rbac.rules.policies.items()
    }


def believed(client: Client, name: str) -> set[str]:
    """Whom a proxy takes for a service: the exact SPIFFE IDs that its Cluster checks."""
    context = tls_pb2.UpstreamTlsContext()
    assert client.get(Type.CLUSTER, f"shop/{name}|80").transport_socket.typed_config.Unpack(context)
    validation = context.common_tls_context.combined_validation_context.default_validation_context
    return {found.matcher.exact for found in validation.match_typed_subject_alt_names}


def uri(name: str) -> str:
    return Identity("shop", name).uri(TRUST_DOMAIN)


def target(name: str) -> str:
    return f"access.smi-spec.io/TrafficTarget/shop/{name}"


# ------------------------------------------------------------------------------------------------------------- policy


async def test_what_nobody_allows_is_denied_and_an_applied_permission_is_on_the_wire() -> None:
    async with bookshop(STORE) as (mesh, replica, (store,)):
        assert permissions(store) == {}, "deny by default: rules, and no policy in them"
        await mesh.routes()
        revision = await mesh.allow(BUYER, STORE)
        await acked(mesh, replica, revision)
        assert permissions(store) == {target("buyer-to-bookstore"): {uri(BUYER)}}
        assert store.news() == [("RouteConfiguration", ("inbound|8080",), ())], "that and nothing else was sent"


async def test_a_permission_that_is_deleted_is_denied_again() -> None:
    async with bookshop(STORE) as (mesh, replica, (store,)):
        await mesh.routes()
        await acked(mesh, replica, await mesh.allow(BUYER, STORE))
        revision = await mesh.registry.delete_manifest(target("buyer-to-bookstore"), expected=None)
        await acked(mesh, replica, revision)
        assert permissions(store) == {}


async def test_a_permission_reaches_its_destination_and_no_other_proxy() -> None:
    async with bookshop(STORE, STORE_2, BUYER) as (mesh, replica, (store, other, buyer)):
        await mesh.routes()
        await acked(mesh, replica, await mesh.allow(BUYER, STORE))
        assert store.news()
        assert other.news() == []
        assert buyer.news() == []
        assert permissions(other) == {}


def verdict(client: Client) -> str:
    """What becomes of a request that no permission allows: "denied", or "counted"."""
    (host,) = client.get(Type.ROUTE, "inbound|8080").virtual_hosts
    config = rbac_pb2.RBACPerRoute()
    assert host.routes[0].typed_per_filter_config["envoy.filters.http.rbac"].Unpack(config)
    assert config.rbac.HasField("rules"), "an RBACPerRoute without rules lets everybody in"
    everybody = any(p.any for policy in config.rbac.rules.policies.values() for p in policy.principals)
    assert everybody == config.rbac.HasField("shadow_rules")
    return "counted" if everybody else "denied"


async def mode(mesh: Mesh, mode: str, namespace: str = "shop") -> int:
    return await mesh.apply(
        f"""\
        apiVersion: smc.io/v1alpha1
        kind: NamespaceConfig
        metadata: {{name: default, namespace: {namespace}}}
        spec: {{mode: {mode}}}
        """
    )


async def test_a_mode_reaches_the_proxies_of_its_namespace_as_routes_alone_and_its_deletion_too() -> None:
    async with bookshop(STORE, BUYER) as (mesh, replica, (store, buyer)):
        assert verdict(store) == "denied"
        await acked(mesh, replica, await mode(mesh, "audit", "elsewhere"))
        assert (store.news(), buyer.news()) == ([], [])
        await acked(mesh, replica, await mode(mesh, "audit"))
        assert verdict(store) == "counted"
        assert store.news() == [("RouteConfiguration", ("inbound|8080",), ())], "no listener"
        await acked(mesh, replica, await mesh.registry.delete_manifest(MODE, expected=None))
        assert verdict(store) == "denied"


async def test_plaintext_comes_and_goes_with_permissive_and_is_routed_nowhere_as_soon_as_it_ends() -> None:
    async with bookshop(STORE) as (mesh, replica, (store,)):
        chains = len(store.get(Type.LISTENER, "inbound").filter_chains)
        await acked(mesh, replica, await mode(mesh, "permissive"))
        listener = store.get(Type.LISTENER, "inbound")
        assert [c.name for c in listener.filter_chains[chains:]] == ["plaintext"]
        assert len(store.get(Type.ROUTE, "inbound|plaintext").virtual_hosts) > 1
        await acked(mesh, replica, await mode(mesh, "audit"))
        assert len(store.get(Type.LISTENER, "inbound").filter_chains) == chains
        assert not store.get(Type.ROUTE, "inbound|plaintext").virtual_hosts, "what is open gets nothing more"


async def test_a_mode_that_can_no_longer_be_read_is_enforcing_on_the_wire() -> None:
    async with bookshop(STORE) as (mesh, replica, (store,)):
        await acked(mesh, replica, await mode(mesh, "permissive"))
        assert verdict(store) == "counted"
        broken = await mesh.kv.transact([Put(KEYS.manifest(MODE), b"{}")])
        await acked(mesh, replica, broken.revision)
        assert verdict(store) == "denied"


async def test_a_changed_path_is_sent_and_the_listeners_are_left_alone() -> None:
    async with bookshop(STORE) as (mesh, replica, (store,)):
        await mesh.routes("/books/.*")
        await acked(mesh, replica, await mesh.allow(BUYER, STORE))
        store.news()
        await acked(mesh, replica, await mesh.routes("/paper/.*"))
        assert store.news() == [("RouteConfiguration", ("inbound|8080",), ())]
        assert b"/paper/" in store.get(Type.ROUTE, "inbound|8080").SerializeToString()
        assert b"/books/" not in store.get(Type.ROUTE, "inbound|8080").SerializeToString()


# -------------------------------------------------------------------------------------------------------------- splits


async def test_a_split_moves_traffic_by_its_weights_and_back() -> None:
    async with bookshop(BUYER) as (mesh, replica, (buyer,)):
        assert shares(buyer, "bookstore") == {"bookstore|80": 1}
        await acked(mesh, replica, await mesh.split("bookstore", bookstore_v2=90, paper=10))
        assert shares(buyer, "bookstore") == {"bookstore-v2|80": 9, "paper|80": 1}
        sent = ("VirtualHost", ("outbound/bookstore.shop|80",), ())
        assert buyer.news() == [sent], "no cluster, no listener, no endpoint, and no other host"
        revision = await mesh.registry.delete_manifest("split.smi-spec.io/TrafficSplit/shop/bookstore", expected=None)
        await acked(mesh, replica, revision)
        assert shares(buyer, "bookstore") == {"bookstore|80": 1}


async def test_an_upstream_is_exactly_the_identities_that_may_serve_it() -> None:
    async with bookshop(BUYER) as (mesh, replica, (buyer,)):
        assert believed(buyer, "bookstore") == {uri("bookstore")}
        assert believed(buyer, "paper-v2") == {uri("paper-v2")}
        await mesh.observe(*SHOP, workload("second", "bookstore"))
        await acked(mesh, replica)
        assert believed(buyer, "bookstore") == {uri("bookstore"), uri("second")}


async def test_an_endpoint_gets_no_traffic_before_it_can_prove_who_it_is() -> None:
    async with bookshop(BUYER) as (mesh, replica, (buyer,)):

        def endpoints() -> int:
            localities = buyer.get(Type.ENDPOINT, "shop/bookstore|80").endpoints
            return sum(len(locality.lb_endpoints) for locality in localities)

        assert endpoints() == 1
        await mesh.observe(*SHOP, workload("second", "bookstore"))
        await acked(mesh, replica)
        assert endpoints() == 1
        buyer.news()
        await mesh.certify("second")
        await acked(mesh, replica)
        assert endpoints() == 2
        assert {type_ for type_, _, _ in buyer.news()} == {"ClusterLoadAssignment"}


async def test_a_service_that_comes_and_goes_is_sent_and_removed() -> None:
    async with bookshop(BUYER) as (mesh, replica, (buyer,)):
        await mesh.observe(*SHOP, service("magazine"), workload("magazine", "magazine"))
        await mesh.certify("magazine")
        await acked(mesh, replica)
        assert shares(buyer, "magazine") == {"magazine|80": 1}
        buyer.news()
        await mesh.observe(*SHOP)
        await acked(mesh, replica)
        assert "shop/magazine|80" not in buyer.has[Type.CLUSTER]
        news = buyer.news()
        assert news[0] == ("VirtualHost", (), ("outbound/magazine.shop|80",)), (
            "the route first, and then what it led to"
        )
        assert ("Cluster", (), ("shop/magazine|80",)) in news[1:]


async def test_a_renewed_certificate_is_the_only_thing_that_is_sent() -> None:
    async with bookshop(BUYER, STORE) as (mesh, replica, (buyer, store)):
        before = buyer.get(Type.SECRET, "identity").SerializeToString()
        await mesh.certify(BUYER)
        await acked(mesh, replica)
        assert buyer.get(Type.SECRET, "identity").SerializeToString() != before
        assert buyer.news() == [("Secret", ("identity",), ())]
        assert store.news() == []


async def test_a_bad_manifest_hurts_only_itself() -> None:
    async with bookshop(BUYER, STORE) as (mesh, replica, (buyer, store)):
        await mesh.split("bookstore", nowhere=100)
        await mesh.routes()
        await acked(mesh, replica, await mesh.allow(BUYER, STORE))
        assert permissions(store) == {target("buyer-to-bookstore"): {uri(BUYER)}}
        assert shares(buyer, "bookstore") == {"bookstore|80": 1}
        assert replica.pipeline.mesh is not None
        problems = replica.pipeline.mesh.problems["split.smi-spec.io/TrafficSplit/shop/bookstore"]
        assert "BackendNotFound" in {problem.reason for problem in problems}


# ---------------------------------------------------------------------------------------------------- another replica


async def test_a_proxy_that_moves_to_another_replica_is_sent_nothing_that_it_has() -> None:
    async with bookshop(STORE) as (mesh, replica, _), serving(mesh, "replica-2") as second:
        await mesh.routes()
        await mesh.allow(BUYER, STORE)
        await acked(mesh, replica, await mesh.split("bookstore", bookstore_v2=50, paper=50))
        await until(lambda: second.pipeline.ready)
        buyer = await Client.of(mesh, BUYER)
        async with buyer.connected(replica):
            await until(lambda: buyer.is_complete)
            await acked(mesh, replica)
        assert buyer.identifier == "replica-1/1/1"
        buyer.news()
        before = buyer.answers
        async with buyer.connected(second):
            await until(lambda: buyer.answers >= before + 2)
            await acked(mesh, second)
            assert buyer.identifier == "replica-2/1/1"
            assert buyer.news() == []
            assert buyer.answers == before + 2, "one empty answer for clusters, and one for listeners"


async def test_a_proxy_that_was_away_is_sent_what_changed_meanwhile_and_nothing_else() -> None:
    async with bookshop() as (mesh, replica, _), serving(mesh, "replica-2") as second:
        await until(lambda: second.pipeline.ready)
        buyer = await Client.of(mesh, BUYER)
        async with buyer.connected(replica):
            await until(lambda: buyer.is_complete)
            await acked(mesh, replica)
        buyer.news()
        gone = [found for found in SHOP if found.name.name != "paper-v2"]
        await mesh.observe(*gone)
        await mesh.split("bookstore", bookstore_v2=100)
        async with buyer.connected(second):
            await until(lambda: shares(buyer, "bookstore") == {"bookstore-v2|80": 1})
            await acked(mesh, second)
            assert sorted(buyer.news()) == [
                ("Cluster", (), ("shop/paper-v2|80",)),
                ("ClusterLoadAssignment", (), ("shop/paper-v2|80",)),
                ("VirtualHost", ("outbound/bookstore.shop|80",), ("outbound/paper-v2.shop|80",)),
            ]


async def test_two_replicas_send_equal_versions_of_equal_bytes() -> None:
    async with bookshop() as (mesh, replica, _), serving(mesh, "replica-2") as second:
        await mesh.routes()
        await mesh.allow(BUYER, STORE)
        await mesh.split("bookstore", bookstore_v2=50, paper=50)
        await until(lambda: second.pipeline.ready)
        found: list[dict[Type, dict[str, Any]]] = []
        for one in (replica, second):
            client = await Client.of(mesh, BUYER)
            async with client.connected(one):
                await until(lambda: client.is_complete)  # noqa: B023 - awaited here
                await acked(mesh, one)
            found += [
                client.versions,
                {t: {n: m.SerializeToString() for n, m in h.items()} for t, h in client.has.items()},
            ]
        assert found[0] == found[2]
        assert found[1] == found[3]


# ---------------------------------------------------------------------------------------------------------- quarantine


@asynccontextmanager
async def judged(mesh: Mesh, replica: Replica) -> AsyncIterator[None]:
    """A leader that judges NACKs, and a replica that reports them."""
    await mesh.kv.transact([Delete(KEYS.leader)])  # who observed is no candidate
    election = Election(mesh.kv, KEYS.leader, "replica-1")
    reports = Members(replica.kv, KEYS.acks)
    tasks = [
        asyncio.create_task(election.run(lambda leadership: quarantine.run(leadership, mesh.kv, KEYS))),
        asyncio.create_task(
            reports.announce(replica.name, lambda: encode(replica.streams.report()), ttl=10.0, interval=0.05)
        ),
    ]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def left_out(mesh: Mesh) -> list[tuple[str, str]]:
    """(proxy, manifest), in the order in which they were left out."""
    items = sorted(mesh.store.list(KEYS.quarantines, 0), key=lambda item: item.create_revision)
    found = [decode(QuarantineRecord, item.value) for item in items]
    return [(record.proxy.name, record.manifest.rpartition("/")[2]) for record in found]


def refusing(name: str, target: str) -> Callable[[Type, Any], bool]:
    """What refuses that requests to one service go to another."""

    def refuses(type_: Type, message: Any) -> bool:
        of_it = type_ is Type.VIRTUAL_HOST and message.name == f"outbound/{name}.shop|80"
        return of_it and f"shop/{target}|80".encode() in message.SerializeToString()

    return refuses


async def test_a_refused_split_is_left_out_for_who_refuses_it_until_it_is_written_anew() -> None:
    async with bookshop(BUYER, THIEF) as (mesh, replica, (odd, other)), judged(mesh, replica):
        odd.refuses = refusing("paper", "paper-v2")
        await mesh.split("paper", paper_v2=100)
        await mesh.split("bookstore", bookstore_v2=100)
        await until(lambda: left_out(mesh) and not replica.streams.report().nacks)
        assert left_out(mesh)[-1] == ("buyer", "paper")
        assert shares(odd, "paper") == {"paper|80": 1}, "its own endpoints, as without the split"
        assert shares(other, "paper") == {"paper-v2|80": 1}, "nobody else loses it"
        assert shares(other, "bookstore") == {"bookstore-v2|80": 1}
        mesh_now = replica.pipeline.mesh
        assert mesh_now is not None
        (problem,) = mesh_now.problems["split.smi-spec.io/TrafficSplit/shop/paper"]
        assert problem.reason == "Quarantined"
        assert (
            "left out for proxy shop/buyer, which refuses it: outbound/paper.shop|80: refused by the test"
            in problem.message
        )
        await mesh.split("paper", bookstore=100)
        await until(lambda: shares(odd, "paper") == {"bookstore|80": 1})
        await acked(mesh, replica)
        assert shares(odd, "paper") == shares(other, "paper") == {"bookstore|80": 1}


async def test_of_splits_only_that_of_the_refused_host_is_suspected() -> None:
    async with bookshop() as (mesh, replica, _), judged(mesh, replica):
        await mesh.split("paper", bookstore=100)
        for name in ("bookstore", "bookstore-v2", "paper-v2"):
            await mesh.split(name, paper=100)
        odd = await Client.of(mesh, BUYER)
        odd.refuses = refusing("paper", "bookstore")
        async with odd.connected(replica):
            await until(lambda: bool(left_out(mesh)))
            await until(lambda: odd.is_complete)
            await acked(mesh, replica)
            assert left_out(mesh) == [("buyer", "paper")]
            assert shares(odd, "paper") == {"paper|80": 1}
            assert shares(odd, "bookstore") == {"paper|80": 1}


@pytest.mark.parametrize("innocents", [0, 1, 3])
async def test_the_newest_suspects_are_left_out_first_and_the_culprit_ends_it(innocents: int) -> None:
    """The culprit is the oldest, which is the worst case."""
    async with bookshop() as (mesh, replica, _), judged(mesh, replica):
        await mesh.routes()
        names = [f"innocent-{nth}" for nth in range(innocents)]
        for name in ("culprit", *names):
            await mesh.allow(BUYER, STORE, name=name)
        odd = await Client.of(mesh, STORE)
        odd.refuses = lambda type_, message: (
            type_ is Type.ROUTE and b"TrafficTarget/shop/culprit" in message.SerializeToString()
        )
        async with odd.connected(replica):
            await until(lambda: len(left_out(mesh)) > innocents)
            await until(lambda: odd.is_complete)
            await acked(mesh, replica)
            assert left_out(mesh) == [(STORE, name) for name in [*reversed(names), "culprit"]]
            assert b"TrafficTarget" not in odd.get(Type.ROUTE, "inbound|8080").SerializeToString(), "nobody is let in"
