"""Services, endpoints and workloads: from wherever they come to what callers and servers are told."""

from __future__ import annotations

import pytest

from smc.mesh import Mesh
from smc.model import Assignment, Destination, Inbound, Protocol, Upstream
from tests.unit.mesh.store import KEYS, Store, endpoint, identity, name, service_text, workload_text


def caller(store: Store, *, reachable: tuple[str, ...] | None = None) -> None:
    store.offer_workload("shop/caller", "caller", reachable=reachable)


def upstreams(mesh: Mesh, proxy: str = "shop/caller") -> dict[str, Upstream]:
    return {f"{u.service}|{u.port}": u for u in mesh.proxies[name(proxy)].outbound.upstreams}


def assignments(mesh: Mesh, proxy: str = "shop/caller") -> dict[str, Assignment]:
    return {f"{a.service}|{a.port}": a for a in mesh.proxies[name(proxy)].outbound.assignments}


def destinations(mesh: Mesh, proxy: str = "shop/caller") -> dict[str, Destination]:
    return {f"{d.service}|{d.port}": d for d in mesh.proxies[name(proxy)].outbound.destinations}


def behind(mesh: Mesh, upstream: str) -> list[str]:
    return [str(e.workload) for e in assignments(mesh)[upstream].endpoints]


def inbound(mesh: Mesh, proxy: str) -> list[tuple[int, Protocol, list[str]]]:
    found: tuple[Inbound, ...] = mesh.proxies[name(proxy)].inbound
    return [(i.port, i.protocol, [f"{service}|{port}" for service, port in i.services]) for i in found]


def reasons(mesh: Mesh) -> dict[str, list[str]]:
    return {manifest: [p.reason for p in problems] for manifest, problems in mesh.problems.items()}


def served_by(store: Store, *workloads: str, service: str = "shop/store", account: str = "store") -> None:
    """Ready workloads with certificates behind port 80 of a service."""
    store.offer_service(service, (80, "8080"))
    store.offer_endpoints(service, *(endpoint(w, account, (80, 8080)) for w in workloads))
    for workload in workloads:
        store.offer_workload(workload, account)
    store.ready(*workloads)
    store.certify(f"shop/{account}")


def test_a_caller_knows_each_service_port_who_may_serve_it_and_where() -> None:
    store = Store()
    caller(store)
    served_by(store, "shop/store-1", "shop/store-2")
    mesh = store.build()
    (upstream,) = upstreams(mesh).values()
    assert (upstream.service, upstream.port, upstream.protocol) == (name("shop/store"), 80, Protocol.HTTP)
    assert upstream.identities == (identity("shop/store"),)
    assert behind(mesh, "shop/store|80") == ["shop/store-1", "shop/store-2"]
    (destination,) = destinations(mesh).values()
    assert [(str(t.service), t.port) for t in destination.targets] == [("shop/store", 80)]
    assert destination.sources == ()
    assert mesh.problems == {}


def test_a_service_that_nobody_backs_may_be_served_by_nobody() -> None:
    store = Store()
    caller(store)
    store.offer_service("shop/store", (80, "8080"))
    mesh = store.build()
    assert upstreams(mesh)["shop/store|80"].identities == ()
    assert behind(mesh, "shop/store|80") == []


def test_an_endpoint_gets_traffic_once_its_proxy_is_ready_and_its_identity_has_a_certificate() -> None:
    store = Store()
    caller(store)
    store.offer_service("shop/store", (80, "8080"))
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (80, 8080)))
    store.offer_workload("shop/store-1", "store")
    mesh = store.build()
    assert behind(mesh, "shop/store|80") == []
    assert upstreams(mesh)["shop/store|80"].identities == (identity("shop/store"),)
    assert reasons(mesh) == {"files:workloads/shop/store-1": ["NotReady"]}

    store.certify("shop/store")
    mesh = store.build(mesh)
    assert behind(mesh, "shop/store|80") == []
    assert "has not taken its configuration" in mesh.problems["files:workloads/shop/store-1"][0].message

    store.ready("shop/store-1")
    mesh = store.build(mesh)
    assert behind(mesh, "shop/store|80") == ["shop/store-1"]
    assert mesh.problems == {}


def test_a_workload_that_backs_no_service_need_not_be_ready() -> None:
    store = Store()
    caller(store)
    assert store.build().problems == {}


def test_an_endpoint_is_only_behind_the_ports_that_it_has() -> None:
    store = Store()
    caller(store)
    served_by(store, "shop/store-1")
    store.certify("shop/other")
    store.ready("shop/store-2")
    store.offer_service("shop/store", (80, "8080"), (81, "admin"))
    ones = endpoint("shop/store-1", "store", (80, 8080), (81, 9090)), endpoint("shop/store-2", "other", (80, 8080))
    store.offer_endpoints("shop/store", *ones)
    mesh = store.build()
    assert behind(mesh, "shop/store|80") == ["shop/store-1", "shop/store-2"]
    assert behind(mesh, "shop/store|81") == ["shop/store-1"]
    assert upstreams(mesh)["shop/store|80"].identities == (identity("shop/other"), identity("shop/store"))
    assert upstreams(mesh)["shop/store|81"].identities == (identity("shop/store"),)


def test_applied_workloads_back_the_services_that_they_name_whatever_source_those_come_from() -> None:
    store = Store()
    caller(store)
    store.apply(service_text("shop/store", 80))
    store.offer_service("shop/pods", (80, "8080"), source="pods")
    store.apply(workload_text("shop/vm", "store", "store", "pods"))
    store.certify("shop/store")
    store.ready("shop/vm")
    mesh = store.build()
    assert behind(mesh, "shop/store|80") == ["shop/vm"]
    assert behind(mesh, "shop/pods|80") == ["shop/vm"]
    assert inbound(mesh, "shop/vm") == [(8080, Protocol.HTTP, ["shop/pods|80", "shop/store|80"])]


def test_a_workload_that_names_a_service_which_is_not_there_has_a_problem_until_it_is() -> None:
    store = Store()
    caller(store)
    store.apply(workload_text("shop/vm", "store", "store"))
    mesh = store.build()
    assert reasons(mesh) == {"smc.io/Workload/shop/vm": ["ServiceNotFound"]}
    store.apply(service_text("shop/store", 80, target="admin"))
    mesh = store.build(mesh)
    assert reasons(mesh) == {"smc.io/Workload/shop/vm": ["PortNotFound"]}
    store.apply(service_text("shop/store", 80))
    store.ready("shop/vm")
    store.certify("shop/store")
    mesh = store.build(mesh)
    assert reasons(mesh) == {}
    assert behind(mesh, "shop/store|80") == ["shop/vm"]


def test_endpoints_of_one_service_are_the_union_of_what_its_sources_say() -> None:
    store = Store()
    caller(store)
    served_by(store, "shop/store-1", "shop/store-2")
    store.offer_endpoints("shop/store", endpoint("shop/pod", "store", (80, 8080)), source="pods")
    store.ready("shop/pod")
    mesh = store.build()
    assert behind(mesh, "shop/store|80") == ["shop/pod", "shop/store-1", "shop/store-2"]


def test_of_one_name_from_two_sources_manifests_come_first_then_the_sources_by_name() -> None:
    store = Store()
    store.offer_service("shop/store", (82, "8080"), source="pods")
    store.offer_service("shop/store", (81, "8080"), source="files")
    store.offer_workload("shop/caller", "pod", source="pods")
    store.offer_workload("shop/caller", "file", source="files")
    mesh = store.build()
    assert [*upstreams(mesh)] == ["shop/store|81"]
    assert mesh.proxies[name("shop/caller")].workload.identity == identity("shop/file")
    assert reasons(mesh) == {"pods:services/shop/store": ["Duplicate"], "pods:workloads/shop/caller": ["Duplicate"]}

    store.apply(service_text("shop/store", 80))
    store.apply(workload_text("shop/caller", "manifest"))
    mesh = store.build(mesh)
    assert [*upstreams(mesh)] == ["shop/store|80"]
    assert mesh.identities == {identity("shop/manifest")}
    assert reasons(mesh) == {
        "files:services/shop/store": ["Duplicate"],
        "files:workloads/shop/caller": ["Duplicate"],
        "pods:services/shop/store": ["Duplicate"],
        "pods:workloads/shop/caller": ["Duplicate"],
    }


def test_problems_of_a_workload_are_told_where_the_record_that_counts_comes_from() -> None:
    store = Store()
    for source in ("files", "pods"):
        store.offer_workload("shop/store-1", "store", source=source)
    store.offer_service("shop/a", (80, "8080"))
    store.offer_service("shop/b", (80, "8080"), protocol=Protocol.GRPC)
    for service in ("shop/a", "shop/b"):
        store.offer_endpoints(service, endpoint("shop/store-1", "store", (80, 8080)))
    mesh = store.build()
    assert reasons(mesh) == {
        "files:workloads/shop/store-1": ["NotReady", "ProtocolConflict"],
        "pods:workloads/shop/store-1": ["Duplicate"],
    }
    store.delete(KEYS.workload("files", name("shop/store-1")))
    assert reasons(store.build(mesh)) == {"pods:workloads/shop/store-1": ["NotReady", "ProtocolConflict"]}


def test_who_may_serve_a_service_is_in_the_order_of_the_identities() -> None:
    store = Store()
    caller(store)
    store.offer_service("shop/store", (80, "8080"))
    accounts = [f"account-{number}" for number in range(9)]
    store.offer_endpoints("shop/store", *(endpoint(f"shop/{a}", a, (80, 8080)) for a in reversed(accounts)))
    found = upstreams(store.build())["shop/store|80"].identities
    assert found == tuple(identity(f"shop/{account}") for account in accounts)


def test_an_endpoint_that_two_sources_offer_counts_once_as_the_first_of_them_says() -> None:
    store = Store()
    caller(store)
    served_by(store, "shop/store-1")
    for source in ("pods", "files"):
        weighed = endpoint("shop/store-1", "store", (80, 8080), weight=len(source))
        store.offer_endpoints("shop/store", weighed, source=source)
    (found,) = assignments(store.build())["shop/store|80"].endpoints
    assert found.weight == len("files")


def test_a_proxy_listens_for_every_service_port_that_leads_to_its_application() -> None:
    store = Store()
    for service in ("shop/store", "shop/store-v1"):
        served_by(store, "shop/store-1", service=service)
    mesh = store.build()
    assert inbound(mesh, "shop/store-1") == [(8080, Protocol.HTTP, ["shop/store|80", "shop/store-v1|80"])]


def test_where_two_services_differ_about_a_ports_protocol_the_first_by_name_counts() -> None:
    store = Store()
    served_by(store, "shop/store-1", service="shop/b")
    served_by(store, "shop/store-1", service="shop/a")
    store.offer_service("shop/b", (80, "8080"), protocol=Protocol.GRPC)
    mesh = store.build()
    assert inbound(mesh, "shop/store-1") == [(8080, Protocol.HTTP, ["shop/a|80", "shop/b|80"])]
    assert reasons(mesh) == {"files:workloads/shop/store-1": ["ProtocolConflict"]}


@pytest.mark.parametrize(("first", "other"), [(Protocol.TCP, Protocol.HTTP), (Protocol.GRPC, Protocol.TCP)])
def test_what_speaks_tcp_by_one_service_and_http_by_another_is_reached_by_the_first_alone(
    first: Protocol, other: Protocol
) -> None:
    store = Store()
    for service, number, protocol in (("shop/a", 80, first), ("shop/b", 81, other)):
        served_by(store, "shop/store-1", service=service)
        store.offer_service(service, (number, "8080"), protocol=protocol)
        store.offer_endpoints(service, endpoint("shop/store-1", "store", (number, 8080)))
    mesh = store.build()
    (found,) = mesh.proxies[name("shop/store-1")].inbound
    assert (found.protocol, [str(n) for n, _ in found.services], found.numbers) == (first, ["shop/a"], (80, 8080))
    (problem,) = mesh.problems["files:workloads/shop/store-1"]
    assert problem.message.endswith("the first counts, and nothing gets there by the other; make them equal")


def test_a_workload_serves_what_it_has_left_for_as_long_as_that_is_said_and_nobody_is_sent_there() -> None:
    store = Store()
    caller(store)
    for service in ("shop/a", "shop/b"):
        served_by(store, "shop/store-1", service=service)
    before = store.build()
    store.leaves("shop/store-1", "store", "a", "b", "gone", revision=7)
    store.offer_endpoints("shop/a")
    mesh = store.build(before)
    assert mesh.proxies[name("shop/store-1")].inbound is before.proxies[name("shop/store-1")].inbound
    assert (behind(mesh, "shop/a|80"), behind(mesh, "shop/b|80")) == ([], ["shop/store-1"])
    store.offer_endpoints("shop/b")
    mesh = store.build(mesh)
    assert inbound(mesh, "shop/store-1") == [(8080, Protocol.HTTP, ["shop/a|80", "shop/b|80"])]
    store.leaves("shop/store-1", "store", "b", revision=12)
    store.delete(KEYS.leaving(name("shop/store-1"), 7))
    mesh = store.build(mesh)
    assert inbound(mesh, "shop/store-1") == [(8080, Protocol.HTTP, ["shop/b|80"])]
    store.delete(KEYS.leaving(name("shop/store-1"), 12))
    assert inbound(store.build(mesh), "shop/store-1") == []


@pytest.mark.parametrize(("left", "serves"), [("a", ["shop/c|80"]), ("b", ["shop/b|80", "shop/c|80"])])
def test_what_a_workload_serves_now_counts_before_what_it_has_left(left: str, serves: list[str]) -> None:
    store = Store()
    for service, protocol in (("shop/a", Protocol.TCP), ("shop/b", Protocol.HTTP), ("shop/c", Protocol.HTTP)):
        store.offer_service(service, (80, "8080"), protocol=protocol)
    store.offer_workload("shop/store-1", "store")
    store.offer_endpoints("shop/c", endpoint("shop/store-1", "store", (80, 8080)))
    store.leaves("shop/store-1", "store", left, "c")
    mesh = store.build()
    assert inbound(mesh, "shop/store-1") == [(8080, Protocol.HTTP, serves)]
    assert "ProtocolConflict" not in str(reasons(mesh))


def test_a_port_that_was_left_is_called_as_it_was_and_by_no_other_number() -> None:
    store = Store()
    store.offer_service("shop/a", (80, "8080"), (8080, "9090"))
    store.offer_workload("shop/store-1", "store")
    store.offer_endpoints("shop/a", endpoint("shop/store-1", "store", (80, 8080), (8080, 9090)))
    before = store.build().proxies[name("shop/store-1")].inbound
    assert [(i.port, i.numbers) for i in before] == [(8080, (80,)), (9090, (8080, 9090))]
    store.leaves("shop/store-1", "store", "a")
    store.offer_endpoints("shop/a")
    now = store.build().proxies[name("shop/store-1")].inbound
    assert [(i.port, i.numbers) for i in now] == [(i.port, i.numbers) for i in before]


def test_a_port_that_is_served_is_called_by_no_number_of_a_service_that_was_left() -> None:
    """A permission for port 80 alone would else let in by port 8080 whoever it names."""
    store = Store()
    store.offer_service("shop/a", (80, "9090"))
    store.offer_service("shop/b", (8080, "9090"))
    store.offer_workload("shop/store-1", "store")
    store.offer_endpoints("shop/b", endpoint("shop/store-1", "store", (8080, 9090)))
    store.leaves("shop/store-1", "store", "a", "b")
    (found,) = store.build().proxies[name("shop/store-1")].inbound
    assert [str(service) for service, _ in found.services] == ["shop/a", "shop/b"]
    assert found.numbers == (8080, 9090)


def test_a_workload_of_another_identity_serves_nothing_of_what_it_was() -> None:
    store = Store()
    store.offer_service("shop/a", (80, "8080"))
    store.offer_workload("shop/store-1", "store")
    store.leaves("shop/store-1", "till", "a")
    assert inbound(store.build(), "shop/store-1") == []


def test_a_proxy_is_told_of_its_reachable_services_only_if_its_workload_bounds_them() -> None:
    store = Store()
    for service in ("shop/a", "shop/b"):
        served_by(store, "shop/store-1", service=service)
    caller(store, reachable=("shop/b", "shop/c"))
    mesh = store.build()
    assert [*upstreams(mesh)] == [*assignments(mesh)] == [*destinations(mesh)] == ["shop/b|80"]
    served_by(store, "shop/store-1", service="shop/c")
    mesh = store.build(mesh)
    assert [*upstreams(mesh)] == ["shop/b|80", "shop/c|80"]
    caller(store, reachable=())
    assert upstreams(store.build(mesh)) == {}


def test_services_are_in_the_order_of_their_names_and_ports_however_they_came() -> None:
    store = Store()
    caller(store)
    mesh = store.build()
    for service in ("shop/b", "shop-2/a", "shop/a", "shop.x/a"):
        store.offer_service(service, (81, "8080"), (80, "8080"))
        mesh = store.build(mesh)
    order = [(u.service, u.port) for u in mesh.proxies[name("shop/caller")].outbound.upstreams]
    assert order == sorted(order)
    assert len(order) == 8


def test_a_service_port_that_a_record_has_twice_counts_once() -> None:
    """Two clusters of one name would cost every caller all its configuration."""
    store = Store()
    caller(store)
    store.offer_service("shop/a", (80, "8080"), (80, "9090"))
    assert [*upstreams(store.build())] == ["shop/a|80"]
