"""What an intercepted proxy is told changes with what it is about, and with nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from smc.envoy.snapshot import Generator
from smc.mesh import Mesh
from smc.model import Destination, Egress, EgressHost, Frontend, MeshConfig, Outbound, Protocol, Workload
from smc.xds.snapshot import Snapshot, Type
from tests.unit.envoy import nouns
from tests.unit.envoy.rendering import message
from tests.unit.envoy.test_snapshot import changed

WEB = nouns.intercepted(nouns.workload("shop/web", "127.0.3.2"))
ALSO = nouns.intercepted(nouns.workload("shop/also", "127.0.3.3"))
EXPLICIT = nouns.workload("shop/explicit", "127.0.3.4")
CACHE = nouns.workload("shop/cache", "127.0.3.1")
VIRTUAL = {"shop/cache": "240.0.0.7", "shop/one": "240.0.0.1", "shop/two": "240.0.0.2"}


def destination(service: str, port: int = 80, *targets: str) -> Destination:
    protocol = Protocol.TCP if service == "shop/cache" else Protocol.HTTP
    return nouns.destination(
        service, port, dict.fromkeys(targets, 1000) or None, nouns.SPLIT if targets else "", protocol=protocol
    )


def calling(*destinations: Destination, frontends: Sequence[Frontend] | None = None) -> Outbound:
    """Of the services that have an address, unless `frontends` say otherwise."""
    services = sorted({str(d.service) for d in destinations})
    ports = sorted({(str(d.service), d.port) for d in destinations})
    found = [nouns.frontend(s, VIRTUAL[s]) for s in services if s in VIRTUAL] if frontends is None else frontends
    return Outbound(
        "shop",
        tuple(nouns.upstream(s, port, "shop/cache") for s, port in ports),
        tuple(nouns.assignment(s, port, nouns.endpoint(CACHE, port, port)) for s, port in ports),
        tuple(destinations),
        tuple(found),
    )


def mesh(outbound: Outbound, *workloads: Workload, config: MeshConfig | None = None) -> Mesh:
    return nouns.mesh(*(nouns.proxy(of, outbound=outbound) for of in workloads or (WEB,)), config=config)


def told(outbound: Outbound, config: MeshConfig | None = None) -> Snapshot:
    return Generator(nouns.open_key).snapshot(mesh(outbound, config=config), WEB.name)


def chains(snapshot: Snapshot) -> dict[str, Any]:
    return {chain.name: chain for chain in message(snapshot.of_type(Type.LISTENER)["outbound"]).filter_chains}


ONE = destination("shop/one")


# ------------------------------------------------------------------------------------------------------- how dull it is


def test_one_more_http_service_at_a_port_changes_no_byte_of_what_is_listened_to() -> None:
    before, after = told(calling(ONE)), told(calling(ONE, destination("shop/two")))
    assert changed(before, after) == {
        "CLUSTER shop/two|80",
        "ENDPOINT shop/two|80",
        "LISTENER dns",
        "VIRTUAL_HOST outbound|80/two.shop|80",
    }


def test_a_changed_endpoint_changes_its_assignment_and_nothing_else_is_even_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = Generator(nouns.open_key)
    outbound = calling(ONE, destination("shop/cache", 6379))
    before = generator.snapshot(mesh(outbound), WEB.name)
    for name in ("interception.outbound", "interception.dns", "routes.disjoint", "routes.nowhere"):
        monkeypatch.delattr(f"smc.envoy.{name}")
    moved = replace(outbound, assignments=(nouns.assignment("shop/cache", 6379), outbound.assignments[1]))
    after = generator.snapshot(mesh(moved), WEB.name)
    assert changed(before, after) == {"ENDPOINT shop/cache|6379"}
    for type_ in (Type.LISTENER, Type.ROUTE, Type.VIRTUAL_HOST):
        assert after.of_type(type_) is before.of_type(type_)


def test_a_split_of_requests_changes_the_virtual_host_of_its_service_and_no_other_at_its_port() -> None:
    before = told(calling(destination("shop/one", 81), destination("shop/two", 81)))
    after = told(calling(destination("shop/one", 81), destination("shop/two", 81, "shop/one")))
    assert changed(before, after) == {"VIRTUAL_HOST outbound|81/two.shop|81"}


def test_a_split_of_connections_changes_the_chain_of_its_port_and_no_other() -> None:
    before = told(calling(destination("shop/cache", 6379), destination("shop/cache", 6380), ONE))
    after = told(calling(destination("shop/cache", 6379, "shop/one"), destination("shop/cache", 6380), ONE))
    assert changed(before, after) == {"LISTENER outbound"}
    was, now = chains(before), chains(after)
    assert was.keys() == now.keys()
    assert {name for name in was if was[name] != now[name]} == {"shop/cache|6379"}
    (source,) = after.of_type(Type.LISTENER)["outbound"].sources
    assert source.manifest == nouns.SPLIT, "whom to suspect when an Envoy refuses it"


def test_a_service_with_an_address_of_its_own_changes_its_own_chain_and_no_other() -> None:
    own = (nouns.frontend("shop/one", "240.0.0.1"), nouns.frontend("shop/two", "10.96.0.7"))
    before = told(calling(ONE))
    after = told(calling(ONE, destination("shop/two"), frontends=own))
    was, now = chains(before), chains(after)
    assert now.keys() - was.keys() == {"shop/two|80"}
    assert all(was[name] == now[name] for name in was)
    split = told(calling(ONE, destination("shop/two", 80, "shop/one"), frontends=own))
    assert changed(after, split) == {"VIRTUAL_HOST outbound|80/two.shop|80"}


def test_a_service_that_has_no_address_yet_is_called_once_it_has_one() -> None:
    waiting = told(calling(ONE, destination("shop/two"), frontends=[nouns.frontend("shop/one", "240.0.0.1")]))
    assert changed(waiting, told(calling(ONE, destination("shop/two")))) == {
        "LISTENER dns",
        "VIRTUAL_HOST outbound|80/two.shop|80",
    }


# ----------------------------------------------------------------------------------------------------------- who has it


def test_proxies_that_call_the_same_share_what_they_listen_to_and_their_routes() -> None:
    generator = Generator(nouns.open_key)
    both = mesh(calling(ONE), WEB, ALSO)
    web, also = (generator.snapshot(both, of.name) for of in (WEB, ALSO))
    assert web is also, "there is no address of theirs in it"


def test_an_explicit_proxy_has_none_of_it() -> None:
    generator = Generator(nouns.open_key)
    outbound = replace(calling(ONE), frontends=None)
    found = generator.snapshot(mesh(outbound, EXPLICIT), EXPLICIT.name)
    assert list(found.of_type(Type.LISTENER)) == ["outbound"]
    assert list(found.of_type(Type.ROUTE)) == ["outbound"]
    assert list(found.of_type(Type.VIRTUAL_HOST)) == ["outbound/one.shop|80", "outbound/others"]
    assert "original" not in found.of_type(Type.CLUSTER)


def test_a_workload_that_becomes_intercepted_listens_otherwise_and_back() -> None:
    generator = Generator(nouns.open_key)
    explicit = mesh(replace(calling(ONE), frontends=None), replace(WEB, sidecar=EXPLICIT.sidecar))
    intercepted = mesh(calling(ONE), WEB)
    before = generator.snapshot(explicit, WEB.name)
    now = generator.snapshot(intercepted, WEB.name)
    address = message(now.of_type(Type.LISTENER)["outbound"]).address.socket_address
    assert (address.address, address.port_value) == ("127.0.0.1", 15001)
    assert set(now.of_type(Type.LISTENER)) == {"outbound", "dns"}
    assert generator.snapshot(explicit, WEB.name).sets == before.sets


# ------------------------------------------------------------------------------------------------------- what leaves it


@pytest.mark.parametrize(
    ("config", "clusters", "routes"),
    [
        (MeshConfig(), {"original"}, {"outbound|80"}),
        (MeshConfig(egress=Egress.DENY), set(), {"outbound|80", "outbound"}),
        (
            MeshConfig(egress=Egress.DENY, egress_hosts=(EgressHost("far.example", 443),)),
            {"original", "passthrough"},
            {"outbound|80", "outbound"},
        ),
    ],
    ids=["allowed", "denied", "some"],
)
def test_where_else_requests_may_go_is_what_egress_says(
    config: MeshConfig, clusters: set[str], routes: set[str]
) -> None:
    found = told(calling(ONE), config)
    assert found.of_type(Type.CLUSTER).keys() - {"shop/one|80"} == clusters
    assert set(found.of_type(Type.ROUTE)) == routes
    default = message(found.of_type(Type.LISTENER)["outbound"]).HasField("default_filter_chain")
    assert default == (config.egress is Egress.ALLOW), "what no chain is for is closed, unless it may leave"


def test_a_host_that_is_let_out_changes_only_what_is_about_it() -> None:
    """HTTP hosts are in a virtual host, so that only TLS is named in a chain."""
    before = told(calling(ONE), MeshConfig(egress=Egress.DENY, egress_hosts=(EgressHost("a.example"),)))
    after = told(
        calling(ONE), MeshConfig(egress=Egress.DENY, egress_hosts=(EgressHost("a.example"), EgressHost("b.example")))
    )
    assert changed(before, after) == {"LISTENER outbound", "VIRTUAL_HOST outbound/others"}
    was, now = chains(before), chains(after)
    assert {name for name in now if was.get(name) != now[name]} == {"tls", "tls|80"}


@pytest.mark.parametrize("host", ["1.2.3", "300.1.2.3", "1234"])
def test_a_host_of_digits_that_is_no_address_is_a_host(host: str) -> None:
    found = told(calling(ONE), MeshConfig(egress=Egress.DENY, egress_hosts=(EgressHost(host),)))
    assert list(chains(found)["tls"].filter_chain_match.server_names) == [host]


def test_the_ports_of_tcp_services_are_not_looked_into() -> None:
    """The server may be who speaks first, and the inspectors would wait for the caller."""
    found = told(
        calling(destination("shop/cache", 6379), destination("shop/cache", 6380), ONE), MeshConfig(egress=Egress.DENY)
    )
    listener = message(found.of_type(Type.LISTENER)["outbound"])
    inspector = listener.listener_filters[-1]
    assert inspector.name == "envoy.filters.listener.http_inspector"
    ranges = [rule.destination_port_range for rule in inspector.filter_disabled.or_match.rules]
    assert [(r.start, r.end) for r in ranges] == [(6379, 6380), (6380, 6381)]


def test_names_are_in_the_table_for_callers_of_the_namespace_and_of_others() -> None:
    def table(namespace: str) -> list[str]:
        found = told(replace(calling(ONE), namespace=namespace))
        body = found.of_type(Type.LISTENER)["dns"].body
        return [name for name in ("shop.mesh.internal", "one.shop.svc.cluster.local") if name.encode() in body] + (
            ["one"] if b"\n\x03one" in body else []
        )

    assert table("shop") == ["shop.mesh.internal", "one.shop.svc.cluster.local", "one"]
    assert table("far") == ["shop.mesh.internal", "one.shop.svc.cluster.local"]
