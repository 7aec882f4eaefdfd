# ruff: noqa: N802 - the identifiers of the rules are in capitals
"""Who may ask what of whom, and what a quarantine takes from one proxy alone."""

from __future__ import annotations

from smc.mesh import Mesh
from smc.model import Protocol, Service, ServicePort, Severity
from tests.unit.mesh.store import (
    KEYS,
    Store,
    config_text,
    endpoint,
    group_text,
    identity,
    name,
    ports_text,
    target_text,
)

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


def test_ACCESS_10_a_target_says_nothing_of_what_its_sources_may_send_out_of_the_mesh() -> None:
    """Who may write a target is for whoever guards the namespace of its destination."""
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    before = store.build()
    store.apply(target_text("shop/target", "store", "shop/buyer"))
    after = store.build(before)
    assert after.affected == {name("shop/store-1"), name("shop/store-2")}
    assert after.proxies[name("shop/buyer")] is before.proxies[name("shop/buyer")]


def _elsewhere() -> Store:
    """A target that grants access to an identity of another namespace."""
    store = mesh_of(Store())
    store.apply(group_text("shop/all"))
    store.apply(target_text("shop/target", "store, namespace: bank", "shop/buyer"))
    store.offer_workload("bank/vault", "store")
    return store


def test_ACCESS_11_targets_grant_access_to_other_namespaces_only_while_the_mesh_lets_them() -> None:
    store = _elsewhere()
    mesh = store.build()
    assert allowed(mesh, "bank/vault") == []
    assert [problem.reason for problem in mesh.problems[TARGET]] == ["OtherNamespace"]
    store.apply(config_text("allow", smi="{crossNamespaceTargets: true}"))
    mesh = store.build(mesh)
    assert allowed(mesh, "bank/vault") == [TARGET]
    assert TARGET not in mesh.problems
    store.put(KEYS.manifest("smc.io/MeshConfig/-/default"), b"{}")
    assert allowed(store.build(mesh), "bank/vault") == [], "what cannot be read opens nothing"


def test_ROUTE_2_a_mesh_chooses_how_much_of_a_path_its_expressions_match() -> None:
    store = mesh_of(Store())
    store.apply(group_text("shop/all", "/a"))
    store.apply(target_text("shop/target", "store", "shop/buyer"))

    def path(mesh: Mesh) -> str | None:
        (permission,) = mesh.proxies[name("shop/store-1")].policy.permissions
        return permission.http[0].path

    mesh = store.build()
    assert path(mesh) == "(?:/a).*"
    store.apply(config_text("allow", smi="{pathRegexAnchor: full}"))
    mesh = store.build(mesh)
    assert path(mesh) == "/a"
    store.delete(KEYS.manifest("smc.io/MeshConfig/-/default"))
    mesh = store.build(mesh)
    assert path(mesh) == "(?:/a).*"
    store.put(KEYS.manifest("smc.io/MeshConfig/-/default"), b"{}")
    assert path(store.build(mesh)) == "/a", "what cannot be read opens nothing"


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


def test_http_rules_for_a_port_that_speaks_tcp_are_a_warning() -> None:
    store = mesh_of(Store())
    store.put(
        KEYS.service("files", name("shop/store")),
        Service(name("shop/store"), (ServicePort(80, Protocol.HTTP, "8080"), ServicePort(6379, Protocol.TCP, "6379"))),
    )
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (80, 8080), (6379, 6379)))
    store.apply(group_text("shop/all"))
    store.apply(ports_text("shop/port", 6379))
    target = target_text("shop/target", "store", "shop/buyer")
    store.apply(target)
    mesh = store.build()
    assert TARGET not in mesh.problems, "it means the other port"
    store.apply(target.replace("rules: [", "rules: [{kind: TCPRoute, name: port}, "))
    mesh = store.build(mesh)
    (problem,) = mesh.problems[TARGET]
    assert (problem.reason, problem.severity) == ("HTTPRulesOnTCP", Severity.WARNING.value)
    assert problem.message.startswith("port 6379 of a workload of shop/store speaks TCP")
    store.apply(target.replace("HTTPRouteGroup, name: all", "TCPRoute, name: port"))
    mesh = store.build(mesh)
    assert TARGET not in mesh.problems
    (permission,) = mesh.proxies[name("shop/store-1")].policy.at((6379,)).of_connections.permissions
    assert permission.sources == (identity("shop/buyer"),)
    store.apply(target)
    store.offer_service("shop/store", (6379, "6379"), protocol=Protocol.TCP)
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (6379, 6379)))
    (problem,) = store.build(mesh).problems[TARGET]
    assert problem.reason == "HTTPRulesOnTCP", "there is no other port that it could mean"


def test_ACCESS_13_what_a_port_is_called_follows_the_services() -> None:
    store = mesh_of(Store())
    store.offer_service("shop/store", (80, "8080"))
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (80, 8080)))
    before = store.build()
    store.offer_service("shop/store", (81, "8080"))
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (81, 8080)))
    (inbound,) = store.build(before).proxies[name("shop/store-1")].inbound
    assert inbound.numbers == (81, 8080)
