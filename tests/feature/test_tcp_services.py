"""TCP ports, from the manifest as an operator applies it to what a proxy reads."""

from __future__ import annotations

from dataclasses import replace

from envoy.extensions.transport_sockets.tls.v3 import tls_pb2

from smc.model import Name, Protocol, Service, ServicePort, Workload
from smc.xds.snapshot import Type
from tests.feature.test_manifest_to_wire import BUYER, SHOP, STORE, THIEF, acked, bookshop, uri
from tests.unit.xds.replica import Client

NOBODY = {"spiffe://mesh.example/nobody"}
CACHE = Service(Name("shop", "cache"), (ServicePort(6379, Protocol.TCP, "6379"),))
ROUTE = """\
apiVersion: specs.smi-spec.io/v1alpha4
kind: TCPRoute
metadata: {name: cache, namespace: shop}
spec: {matches: {ports: [6379]}}
"""


def _target(source: str, rules: str) -> str:
    return f"""\
apiVersion: access.smi-spec.io/v1alpha3
kind: TrafficTarget
metadata: {{name: to-the-cache, namespace: shop}}
spec:
  destination: {{kind: ServiceAccount, name: {STORE}}}
  rules: [{rules}]
  sources: [{{kind: ServiceAccount, name: {source}}}]
"""


def _with_cache() -> tuple[Service | Workload, ...]:
    """The shop, in which the bookstore's workload has a cache too."""
    found = [
        replace(one, services=("bookstore", "cache")) if isinstance(one, Workload) and one.name.name == STORE else one
        for one in SHOP
    ]
    return (*found, CACHE)


def _accepted(client: Client, name: str = "shop/cache|6379") -> set[str]:
    """Whom a filter chain lets in: exact SPIFFE IDs."""
    (chain,) = [c for c in client.get(Type.LISTENER, "inbound").filter_chains if c.name == name]
    context = tls_pb2.DownstreamTlsContext()
    assert chain.transport_socket.typed_config.Unpack(context)
    validation = context.common_tls_context.combined_validation_context.default_validation_context
    return {found.matcher.exact for found in validation.match_typed_subject_alt_names}


async def test_an_applied_permission_to_connect_is_in_the_chain_of_its_port_and_a_deleted_one_is_not() -> None:
    async with bookshop(STORE, THIEF) as (mesh, replica, (store, thief)):
        await mesh.observe(*_with_cache())
        await acked(mesh, replica, await mesh.apply(ROUTE))
        assert _accepted(store) == NOBODY
        store.news()
        thief.news()
        await acked(mesh, replica, await mesh.apply(_target(BUYER, "{kind: TCPRoute, name: cache}")))
        assert _accepted(store) == {uri(BUYER)}
        assert store.news() == [("Listener", ("inbound",), ())], "that and nothing else was sent"
        assert thief.news() == []
        await acked(mesh, replica, await mesh.apply(_target(THIEF, "{kind: TCPRoute, name: cache}")))
        assert _accepted(store) == {uri(THIEF)}
        target = "access.smi-spec.io/TrafficTarget/shop/to-the-cache"
        await acked(mesh, replica, await mesh.registry.delete_manifest(target, expected=None))
        assert _accepted(store) == NOBODY


async def test_http_rules_open_no_tcp_port_even_if_they_allow_everything_on_it() -> None:
    async with bookshop(STORE) as (mesh, replica, (store,)):
        await mesh.observe(*_with_cache())
        await mesh.routes()
        await mesh.apply(ROUTE)
        rules = "{kind: HTTPRouteGroup, name: all}, {kind: TCPRoute, name: cache}"
        await acked(mesh, replica, await mesh.apply(_target(BUYER, rules)))
        assert _accepted(store) == NOBODY
        await acked(mesh, replica, await mesh.allow(BUYER, STORE))
        assert _accepted(store) == NOBODY


async def test_callers_dial_a_tcp_port_as_what_it_is() -> None:
    async with bookshop(BUYER) as (mesh, replica, (buyer,)):
        await mesh.observe(*_with_cache())
        await acked(mesh, replica)
        cluster = buyer.get(Type.CLUSTER, "shop/cache|6379")
        assert not cluster.typed_extension_protocol_options
        assert cluster.upstream_connection_options.tcp_keepalive.keepalive_time.value
        context = tls_pb2.UpstreamTlsContext()
        assert cluster.transport_socket.typed_config.Unpack(context)
        assert context.sni == "6379.cache.shop.mesh.internal"
        assert not context.common_tls_context.alpn_protocols, "by that the server tells connections from checks"
        (check,) = cluster.health_checks
        assert [*check.tls_options.alpn_protocols] == ["h2"]
