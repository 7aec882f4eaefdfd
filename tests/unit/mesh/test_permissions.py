# ruff: noqa: N802 - the identifiers of the rules are in capitals
"""Who may ask what of whom, and what a quarantine takes from one proxy alone."""

from __future__ import annotations

from smc.mesh import Mesh
from smc.model import Severity
from tests.unit.mesh.store import KEYS, Store, endpoint, group_text, identity, name, ports_text, target_text

TARGET = "access.smi-spec.io/TrafficTarget/shop/target"
OTHER = "access.smi-spec.io/TrafficTarget/shop/other"
GROUP = "specs.smi-spec.io/HTTPRouteGroup/shop/all"


def mesh_of(store: Store) -> Store:
    store.offer_workload("shop/store-1", "store")
    store.offer_workload("shop/store-2", "store")
    store.offer_workload("shop/buyer", "buyer")
    return store


def allowed(mesh: Mesh, proxy: str) -> list[str]:
    return [permission.manifest for permission in mesh.proxies[name(proxy)].policy.permissions]


def test_nobody_may_call_what_no_permission_names() -> None:
    mesh = mesh_of(Store()).build()
    assert allowed(mesh, "shop/store-1") == []


def test_all_permissions_to_an_identity_are_one_policy_that_its_proxies_share() -> None:
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    store.apply(target_text("shop/target", "store", "shop/buyer"))
    store.apply(target_text("shop/other", "store", "shop/store"))
    mesh = store.build()
    assert allowed(mesh, "shop/store-1") == [OTHER, TARGET]
    assert mesh.proxies[name("shop/store-1")].policy is mesh.proxies[name("shop/store-2")].policy
    assert allowed(mesh, "shop/buyer") == []
    assert mesh.problems == {}
    store.delete(KEYS.manifest(TARGET))
    store.delete(KEYS.manifest(OTHER))
    assert allowed(store.build(mesh), "shop/store-1") == []


def test_an_identity_that_no_workload_has_is_a_warning_until_one_has_it() -> None:
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    store.apply(target_text("shop/target", "later", "shop/nobody", "shop/buyer"))
    mesh = store.build()
    found = mesh.problems[TARGET]
    assert [(p.reason, p.severity) for p in found] == [
        ("DestinationNotFound", Severity.WARNING.value),
        ("SourceNotFound", Severity.WARNING.value),
    ]
    assert "shop/nobody" in found[1].message
    store.offer_workload("shop/later", "later")
    store.offer_workload("shop/nobody", "nobody")
    mesh = store.build(mesh)
    assert mesh.problems == {}
    assert allowed(mesh, "shop/later") == [TARGET]


def test_a_quarantined_permission_is_denied_by_that_proxy_alone() -> None:
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    revision = store.apply(target_text("shop/target", "store", "shop/buyer"))
    store.apply(target_text("shop/other", "store", "shop/store"))
    before = store.build()
    store.quarantine("shop/store-1", TARGET, revision, "it is too long")
    mesh = store.build(before)
    assert allowed(mesh, "shop/store-1") == [OTHER]
    assert mesh.proxies[name("shop/store-2")] is before.proxies[name("shop/store-2")]
    assert mesh.affected == {name("shop/store-1")}
    assert [p.reason for p in mesh.problems[TARGET]] == ["Quarantined"]
    assert "it is too long" in mesh.problems[TARGET][0].message


def test_a_quarantined_route_group_takes_the_permissions_compiled_from_that_version_of_it() -> None:
    store = mesh_of(Store())
    revision = store.apply(group_text("shop/all"))
    store.apply(group_text("shop/some"))
    store.apply(target_text("shop/target", "store", "shop/buyer"))
    store.apply(target_text("shop/other", "store", "shop/buyer", group="some"))
    store.quarantine("shop/store-1", GROUP, revision)
    mesh = store.build()
    assert allowed(mesh, "shop/store-1") == [OTHER]
    assert allowed(mesh, "shop/store-2") == [OTHER, TARGET]
    store.apply(group_text("shop/all", "/x"))
    mesh = store.build(mesh)
    assert allowed(mesh, "shop/store-1") == [OTHER, TARGET]
    assert mesh.problems == {}


def test_a_quarantine_counts_only_for_the_version_that_the_manifest_has() -> None:
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    revision = store.apply(target_text("shop/target", "store", "shop/buyer"))
    store.quarantine("shop/store-1", TARGET, revision - 1)
    mesh = store.build()
    assert allowed(mesh, "shop/store-1") == [TARGET]
    assert mesh.proxies[name("shop/store-1")].quarantined == ()
    assert mesh.problems == {}


def test_one_problem_tells_of_all_proxies_that_refuse_a_manifest() -> None:
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    revision = store.apply(target_text("shop/target", "store", "shop/buyer"))
    store.quarantine("shop/store-2", TARGET, revision, "second")
    store.quarantine("shop/store-1", TARGET, revision, "first")
    store.quarantine("shop/gone", TARGET, revision, "not there")
    (problem,) = store.build().problems[TARGET]
    assert problem.message == "it is left out for proxy shop/store-1 and 1 more, which refuses it: first"


def test_a_policy_that_is_written_anew_leaves_the_others_alone() -> None:
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    store.apply(target_text("shop/target", "store", "shop/buyer"))
    store.apply(target_text("shop/other", "buyer", "shop/store"))
    before = store.build()
    store.apply(target_text("shop/other", "buyer", "shop/buyer"))
    mesh = store.build(before)
    assert mesh.affected == {name("shop/buyer")}
    (permission,) = mesh.proxies[name("shop/buyer")].policy.permissions
    assert permission.sources == (identity("shop/buyer"),)


def reached(store: Store, port: int) -> list[int]:
    """The application ports of store-1 on which a target with a TCPRoute of `port` allows anything."""
    store.apply(ports_text("shop/port", port))
    target = target_text("shop/target", "store", "shop/buyer")
    store.apply(target.replace("HTTPRouteGroup, name: all", "TCPRoute, name: port"))
    proxy = store.build().proxies[name("shop/store-1")]
    return [inbound.port for inbound in proxy.inbound if proxy.policy.at(inbound.numbers).permissions]


def test_ACCESS_13_a_port_is_a_service_port_first_and_then_one_of_the_application() -> None:
    store = mesh_of(Store())
    store.offer_service("shop/store", (80, "8080"), (8081, "9000"), (82, "8081"))
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (80, 8080), (8081, 9000), (82, 8081)))
    assert reached(store, 80) == [8080]
    assert reached(store, 8080) == [8080]
    assert reached(store, 8081) == [9000]  # which is what the service calls 8081, and not the application's 8081
    assert reached(store, 82) == [8081]
    assert reached(store, 9000) == [9000]
    assert reached(store, 1) == []


def test_ACCESS_13_a_port_that_workloads_of_the_destination_do_not_have_is_a_warning() -> None:
    store = mesh_of(Store())
    store.offer_service("shop/store", (80, "8080"))
    of_both = [endpoint(f"shop/store-{n}", "store", (80, 8080)) for n in (1, 2)]
    store.offer_endpoints("shop/store", *of_both)
    assert reached(store, 81) == []
    mesh = store.build()
    (problem,) = mesh.problems[TARGET]
    assert (problem.reason, problem.severity) == ("PortNotFound", Severity.WARNING.value)
    assert "a workload of shop/store has no port 81" in problem.message
    store.offer_service("shop/store", (81, "8080"))
    store.offer_endpoints("shop/store", *[endpoint(f"shop/store-{n}", "store", (81, 8080)) for n in (1, 2)])
    assert TARGET not in store.build(mesh).problems


def test_ACCESS_13_what_a_port_is_called_follows_the_services() -> None:
    store = mesh_of(Store())
    store.offer_service("shop/store", (80, "8080"))
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (80, 8080)))
    before = store.build()
    store.offer_service("shop/store", (81, "8080"))
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (81, 8080)))
    (inbound,) = store.build(before).proxies[name("shop/store-1")].inbound
    assert inbound.numbers == (81, 8080)
