"""RouteConfigurations whose virtual hosts are discovered, and the same for clients that cannot discover any."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
from envoy.config.route.v3 import route_components_pb2, route_pb2

from smc.xds.snapshot import EMPTY, Layer, Resource, ResourceSet, Snapshot, Type
from smc.xds.virtual_hosts import OTHERS, is_route, name, of_route, route, whole
from tests.unit.xds import resources
from tests.unit.xds.resources import ROUTE, VIRTUAL_HOST, assignment, cluster, layered, listener, source, virtual_host

ONE, TWO = virtual_host("outbound", "one", "a", "b"), virtual_host("outbound", "two", "b")
REST = virtual_host("outbound", OTHERS, domain="*")
AT_80, REST_AT_80 = virtual_host("outbound|80", "one", "a"), virtual_host("outbound|80", OTHERS, domain="*")
HOSTS = (ONE, TWO, REST, AT_80, REST_AT_80)
INBOUND = resources.route("inbound|80", "local")
ROUTES = (route("outbound"), route("outbound|80"), INBOUND)


def shop(*found: Resource) -> Snapshot:
    return layered([cluster("a"), assignment("a"), listener("outbound"), *ROUTES, *(found or HOSTS)])


def parsed(resource: Resource) -> Any:
    assert resource.type is ROUTE
    return route_pb2.RouteConfiguration.FromString(resource.body)


def union(*hosts: Resource) -> list[Any]:
    return [route_components_pb2.VirtualHost.FromString(host.body) for host in sorted(hosts, key=lambda h: h.name)]


# --------------------------------------------------------------------------------------------------------- by discovery


def test_a_route_says_only_where_its_virtual_hosts_are_from() -> None:
    message = parsed(route("outbound"))
    assert message.name == "outbound"
    assert not message.virtual_hosts
    assert message.vhds.config_source.HasField("ads")
    assert message.HasField("validate_clusters")
    assert not message.validate_clusters.value, "a cluster may come later"


def test_it_waits_for_the_virtual_host_that_each_has() -> None:
    assert route("outbound|80").warms == ((VIRTUAL_HOST, "outbound|80/others"),)


@pytest.mark.parametrize(
    ("named", "ignores"),
    [("outbound", False), ("outbound|80", True), ("outbound|65535", True), ("80", False), ("out-80", False)],
)
def test_ports_in_hosts_are_ignored_exactly_by_a_route_that_is_named_after_a_port(named: str, ignores: bool) -> None:
    assert parsed(route(named)).ignore_port_in_host_matching is ignores
    hosts = virtual_host(named, OTHERS, domain="*")
    inline = whole(Snapshot.of([route(named), hosts])).of_type(ROUTE)[named]
    assert parsed(inline).ignore_port_in_host_matching is ignores, (
        "and so it is for who is told the virtual hosts in it"
    )


def test_only_such_routes_are_known_as_such() -> None:
    assert is_route(route("outbound"))
    assert not is_route(INBOUND)
    assert not any(is_route(found) for found in whole(shop()).of_type(ROUTE).values())


def test_a_virtual_host_is_a_part_of_the_route_before_its_slash_and_of_none_that_begins_alike() -> None:
    there = shop().of_type(VIRTUAL_HOST)
    assert set(of_route("outbound", there)) == {ONE.name, TWO.name, REST.name}
    assert set(of_route("outbound|80", there)) == {AT_80.name, REST_AT_80.name}
    assert set(of_route("outbound|8", there)) == set()
    assert name("outbound", "one") == ONE.name


# ------------------------------------------------------------------------------------------------------- without it


def test_who_cannot_discover_has_each_virtual_host_in_its_own_route() -> None:
    found = whole(shop()).of_type(ROUTE)
    assert found.keys() == {"outbound", "outbound|80", "inbound|80"}
    assert list(parsed(found["outbound"]).virtual_hosts) == union(ONE, TWO, REST)
    assert list(parsed(found["outbound|80"]).virtual_hosts) == union(AT_80, REST_AT_80)


def test_it_is_not_told_to_discover_any_and_waits_for_none() -> None:
    made = whole(shop())
    assert not made.of_type(VIRTUAL_HOST)
    for found in made.of_type(ROUTE).values():
        assert found.warms == ()
    assert not parsed(made.of_type(ROUTE)["outbound"]).HasField("vhds")
    assert not parsed(made.of_type(ROUTE)["outbound"]).validate_clusters.value


def test_everything_else_is_the_same_object() -> None:
    before = shop()
    made = whole(before)
    assert made.of_type(ROUTE)["inbound|80"] is INBOUND
    for type_ in Type:
        if type_ not in (ROUTE, VIRTUAL_HOST):
            assert made.of_type(type_) is before.of_type(type_)


def test_whom_to_suspect_is_everybody_who_made_one_of_its_virtual_hosts() -> None:
    first, second, third = source("a", 1), source("b", 2), source("c", 3)
    made = whole(
        shop(
            replace(ONE, sources=(first, third)),
            replace(TWO, sources=(second, third)),
            REST,
            replace(AT_80, sources=(second,)),
            REST_AT_80,
        )
    ).of_type(ROUTE)
    assert made["outbound"].sources == (first, second, third)
    assert made["outbound|80"].sources == (second,)


def test_it_is_made_once_for_a_snapshot() -> None:
    snapshot = shop()
    assert whole(snapshot) is whole(snapshot)


def test_its_routes_are_made_once_for_all_who_have_the_same_virtual_hosts() -> None:
    one = shop()
    other = Snapshot(Layer({**one.sets, Type.CLUSTER: ResourceSet.of([cluster("b")])}))
    assert whole(one) is not whole(other)
    for named in ("outbound", "outbound|80"):
        assert whole(one).of_type(ROUTE)[named] is whole(other).of_type(ROUTE)[named]


def test_a_snapshot_without_virtual_hosts_is_itself() -> None:
    for snapshot in (Snapshot(), Snapshot.of([cluster("a"), INBOUND]), Snapshot(Layer({VIRTUAL_HOST: EMPTY}))):
        assert whole(snapshot) is snapshot


def test_what_was_made_is_gone_with_what_it_was_made_from() -> None:
    snapshot = shop()
    made = whole(snapshot)
    gone: list[weakref.ref[Any]] = [
        weakref.ref(snapshot),
        weakref.ref(snapshot.sets[VIRTUAL_HOST]),
        weakref.ref(made),
        weakref.ref(made.of_type(ROUTE)["outbound"]),
    ]
    del snapshot, made
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
