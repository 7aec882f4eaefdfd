# ruff: noqa: N802 - the identifiers of the rules are in capitals
"""What a split does in the mesh: the rules that need services and endpoints to be seen."""

from __future__ import annotations

import pytest

from smc.manifests import PolicyApi, Rules
from smc.mesh import Mesh, build
from smc.model import Backend, Problem, Protocol, Service, ServicePort, Split
from smc.records import ManifestRecord
from tests.unit.mesh.store import KEYS, POLICIES, Store, endpoint, group_text, name, split_text
from tests.unit.mesh.test_services import assignments, caller, destinations, served_by, upstreams

SPLIT = "split.smi-spec.io/TrafficSplit/shop/split"
INNER = "split.smi-spec.io/TrafficSplit/shop/inner"


@pytest.fixture
def store() -> Store:
    """A root and two versions of it, each with somebody behind."""
    made = Store()
    caller(made)
    served_by(made, "shop/store-1", "shop/store-2", service="shop/store")
    served_by(made, "shop/store-1", service="shop/store-v1")
    served_by(made, "shop/store-2", service="shop/store-v2")
    return made


def shares(mesh: Mesh, port: int = 80, root: str = "shop/store", proxy: str = "shop/caller") -> dict[str, int]:
    return {str(t.service): t.weight for t in destinations(mesh, proxy)[f"{root}|{port}"].targets}


def problems(mesh: Mesh) -> list[Problem]:
    return [*mesh.problems.get(SPLIT, ())]


def reasons(mesh: Mesh) -> list[tuple[str, str]]:
    return [(problem.reason, problem.field) for problem in problems(mesh)]


def test_traffic_to_the_root_goes_to_the_backends_by_weight(store: Store) -> None:
    revision = store.apply(split_text("shop/split", "store", store_v1=90, store_v2=10))
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v1": 90_000, "shop/store-v2": 10_000}
    assert destinations(mesh)["shop/store|80"].sources == ((SPLIT, revision),)
    assert destinations(mesh)["shop/store-v1|80"].sources == ()
    assert problems(mesh) == []


def test_SPLIT_12_a_root_that_nobody_backs_is_split_all_the_same(store: Store) -> None:
    store.offer_service("shop/name", (80, "8080"))
    store.apply(split_text("shop/split", "name", store_v1=90, store_v2=10))
    mesh = store.build()
    assert shares(mesh, root="shop/name") == {"shop/store-v1": 90_000, "shop/store-v2": 10_000}
    assert problems(mesh) == []


def test_SPLIT_3_a_weight_of_0_gets_nothing(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v1=1, store_v2=0))
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v1": 1000}
    assert problems(mesh) == []


def test_a_backend_with_the_weight_0_may_be_idle(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v1=1, store_v2=0))
    store.delete(KEYS.ready(name("shop/store-2")))
    assert problems(store.build()) == []


def test_SPLIT_4_a_backend_gets_the_traffic_of_those_ports_of_the_root_that_it_has(store: Store) -> None:
    store.offer_service("shop/store", (80, "8080"), (81, "8080"))
    store.apply(split_text("shop/split", "store", store_v1=1, store_v2=1))
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v1": 1000, "shop/store-v2": 1000}
    assert shares(mesh, 81) == {"shop/store": 1000}
    assert reasons(mesh) == [
        ("BackendPortNotFound", "spec.backends[0].service"),
        ("BackendPortNotFound", "spec.backends[1].service"),
        ("NoBackend", "spec.backends"),
    ]
    assert "shop/store-v1 has no port 81" in problems(mesh)[0].message


def test_SPLIT_5_a_backend_that_is_not_there_yet_gets_nothing_and_a_problem_says_so(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v1=1, store_v3=3))
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v1": 1000}
    assert reasons(mesh) == [("BackendNotFound", "spec.backends[1].service")]
    served_by(store, "shop/store-3", service="shop/store-v3")
    mesh = store.build(mesh)
    assert shares(mesh) == {"shop/store-v1": 1000, "shop/store-v3": 3000}
    assert problems(mesh) == []


def test_SPLIT_6_a_backend_that_is_split_itself_is_not_followed(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v1=1))
    store.apply(split_text("shop/inner", "store-v1", store_v2=1))
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v1": 1000}
    assert shares(mesh, root="shop/store-v1") == {"shop/store-v2": 1000}
    assert [(p.reason, p.severity) for p in problems(mesh)] == [("NotFollowed", "warning")]
    store.delete(KEYS.manifest(INNER))
    assert problems(store.build(mesh)) == []


GROUP = "specs.smi-spec.io/HTTPRouteGroup/shop/beta"


def ways(mesh: Mesh, proxy: str = "shop/caller") -> list[tuple[list[str | None], dict[str, int]]]:
    """(paths, shares) of every branch, then of all other requests."""
    found = destinations(mesh, proxy)["shop/store|80"]
    branches = [([m.path for m in b.matches], b.targets) for b in found.branches]
    return [(paths, {str(t.service): t.weight for t in to}) for paths, to in (*branches, ([], found.targets))]


def test_SPLIT_7_requests_that_no_match_is_for_stay_with_the_root(store: Store) -> None:
    group = store.apply(group_text("shop/beta", "/beta"))
    revision = store.apply(split_text("shop/split", "store", "beta", store_v1=1, store_v2=3))
    mesh = store.build()
    assert ways(mesh) == [
        (["(?:/beta).*"], {"shop/store-v1": 1000, "shop/store-v2": 3000}),
        ([], {"shop/store": 1000}),
    ]
    assert destinations(mesh)["shop/store|80"].sources == ((GROUP, group), (SPLIT, revision))
    assert problems(mesh) == []
    store.apply(group_text("shop/beta", "/gamma"))
    assert ways(store.build(mesh))[0][0] == ["(?:/gamma).*"]


def test_SPLIT_7_who_may_reach_the_root_is_told_of_the_backends_of_its_branches(store: Store) -> None:
    caller(store, reachable=("shop/store",))
    store.apply(group_text("shop/beta", "/beta"))
    store.apply(split_text("shop/split", "store", "beta", store_v1=1))
    assert [*upstreams(store.build())] == ["shop/store|80", "shop/store-v1|80"]


def test_SPLIT_9_a_request_tries_the_splits_with_matches_and_then_the_one_without(store: Store) -> None:
    store.apply(group_text("shop/beta", "/beta"))
    store.apply(split_text("shop/inner", "store", store_v1=1), created=1)
    mesh = store.build()
    store.apply(split_text("shop/split", "store", "beta", store_v2=1), created=2)
    mesh = store.build(mesh)
    assert ways(mesh) == [(["(?:/beta).*"], {"shop/store-v2": 1000}), ([], {"shop/store-v1": 1000})]
    store.delete(KEYS.ready(name("shop/store-2")))
    mesh = store.build(mesh)
    assert ways(mesh) == [([], {"shop/store-v1": 1000})]
    assert reasons(mesh) == [("BackendNotReady", "spec.backends[0].service"), ("NoBackend", "spec.backends")]
    assert "where other requests go" in problems(mesh)[1].message


@pytest.mark.parametrize("refused", [SPLIT, GROUP])
def test_SPLIT_9_a_proxy_that_refuses_one_split_of_a_root_gets_none_of_it(store: Store, refused: str) -> None:
    """Otherwise what was for one of them would go where the next one says, and not to the root."""
    store.offer_workload("shop/odd", "odd")
    revisions = {GROUP: store.apply(group_text("shop/beta", "/beta"))}
    store.apply(split_text("shop/inner", "store", store_v1=1), created=1)
    revisions[SPLIT] = store.apply(split_text("shop/split", "store", "beta", store_v2=1), created=2)
    before = store.build()
    store.quarantine("shop/odd", refused, revisions[refused])
    mesh = store.build(before)
    assert ways(mesh, "shop/odd") == [([], {"shop/store": 1000})]
    assert ways(mesh) == ways(before)
    assert mesh.affected == {name("shop/odd")}
    store.apply(group_text("shop/beta", "/gamma"))
    store.apply(split_text("shop/split", "store", "beta", store_v2=1), created=2)
    assert len(ways(store.build(mesh), "shop/odd")) == 2


def test_SPLIT_8_without_the_split_the_roots_own_endpoints_get_the_traffic(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v1=1))
    mesh = store.build()
    store.delete(KEYS.manifest(SPLIT))
    mesh = store.build(mesh)
    assert shares(mesh) == {"shop/store": 1000}
    assert destinations(mesh)["shop/store|80"].sources == ()


def test_SPLIT_11_the_share_of_a_backend_with_nobody_ready_goes_to_the_others(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v1=1, store_v2=9))
    mesh = store.build()
    store.delete(KEYS.ready(name("shop/store-2")))
    mesh = store.build(mesh)
    assert shares(mesh) == {"shop/store-v1": 1000}
    assert reasons(mesh) == [("BackendNotReady", "spec.backends[1].service")]
    store.ready("shop/store-2")
    mesh = store.build(mesh)
    assert shares(mesh) == {"shop/store-v1": 1000, "shop/store-v2": 9000}
    assert problems(mesh) == []


def test_if_no_backend_can_take_it_the_root_keeps_the_traffic(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v3=1))
    mesh = store.build()
    assert shares(mesh) == {"shop/store": 1000}
    assert reasons(mesh) == [("BackendNotFound", "spec.backends[0].service"), ("NoBackend", "spec.backends")]


def test_a_split_of_a_service_that_is_not_there_waits_for_it(store: Store) -> None:
    store.apply(split_text("shop/split", "later", store_v1=1))
    mesh = store.build()
    assert reasons(mesh) == [("ServiceNotFound", "spec.service")]
    served_by(store, "shop/store-1", service="shop/later")
    mesh = store.build(mesh)
    assert shares(mesh, root="shop/later") == {"shop/store-v1": 1000}
    assert problems(mesh) == []


def test_who_may_reach_the_root_is_told_of_its_backends_too(store: Store) -> None:
    caller(store, reachable=("shop/store",))
    store.apply(split_text("shop/split", "store", store_v1=1, store_v2=1))
    mesh = store.build()
    assert [*destinations(mesh)] == ["shop/store|80"]
    assert [*upstreams(mesh)] == [*assignments(mesh)] == ["shop/store-v1|80", "shop/store-v2|80"]
    served_by(store, "shop/store-2", "shop/store-3", service="shop/store-v2")
    mesh = store.build(mesh)
    assert len(assignments(mesh)["shop/store-v2|80"].endpoints) == 2


def test_a_quarantined_split_is_left_out_for_that_proxy_and_that_version_only(store: Store) -> None:
    store.offer_workload("shop/odd", "odd")
    revision = store.apply(split_text("shop/split", "store", store_v1=1))
    store.quarantine("shop/odd", SPLIT, revision, "no such thing")
    mesh = store.build()
    assert shares(mesh, proxy="shop/odd") == {"shop/store": 1000}
    assert shares(mesh) == {"shop/store-v1": 1000}
    assert [q.mod_revision for q in mesh.proxies[name("shop/odd")].quarantined] == [revision]
    (problem,) = problems(mesh)
    assert problem.reason == "Quarantined"
    assert "shop/odd" in problem.message
    assert "no such thing" in problem.message

    store.apply(split_text("shop/split", "store", store_v1=1))  # written anew
    mesh = store.build(mesh)
    assert shares(mesh, proxy="shop/odd") == {"shop/store-v1": 1000}
    assert mesh.proxies[name("shop/odd")].quarantined == ()
    assert problems(mesh) == []


def test_a_quarantined_split_is_left_out_for_a_proxy_with_few_reachable_services_too(store: Store) -> None:
    revision = store.apply(split_text("shop/split", "store", store_v1=1))
    caller(store, reachable=("shop/store",))
    mesh = store.build()
    assert [*upstreams(mesh)] == ["shop/store-v1|80"]
    store.quarantine("shop/caller", SPLIT, revision)
    mesh = store.build(mesh)
    assert shares(mesh) == {"shop/store": 1000}
    assert [*upstreams(mesh)] == ["shop/store|80"]


def test_a_quarantined_split_that_comes_to_count_when_an_older_one_goes_is_left_out(store: Store) -> None:
    store.apply(split_text("shop/inner", "store", store_v2=1), created=1)
    revision = store.apply(split_text("shop/split", "store", store_v1=1), created=2)
    store.quarantine("shop/caller", SPLIT, revision)
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v2": 1000}
    store.delete(KEYS.manifest(INNER))
    assert shares(store.build(mesh)) == {"shop/store": 1000}


def written_elsewhere(store: Store, *splits: Split) -> Mesh:
    """The Mesh with another policy API beside SMI, which may say what SMI refuses."""
    other = ManifestRecord("other.example", "v1", "Split", name("shop/split"), {}, "", "a.yaml", 1, 0.0, "")
    store.put(KEYS.manifest(other.id), other)
    api = PolicyApi(frozenset({"other.example"}), lambda _namespace, _manifests, _options: Rules(splits=splits))
    return build(None, store.whole(), (*POLICIES, api))


def split_elsewhere(*backends: Backend) -> Split:
    return Split("other.example/Split/shop/split", 7, name("shop/store"), backends)


def test_SPLIT_6_a_root_among_its_own_backends_gets_nothing_as_one(store: Store) -> None:
    mesh = written_elsewhere(store, split_elsewhere(Backend("store", 1), Backend("store-v1", 1)))
    assert shares(mesh) == {"shop/store-v1": 1}
    assert [p.reason for p in mesh.problems["other.example/Split/shop/split"]] == ["SelfReference"]


def test_SPLIT_10_if_every_weight_is_0_the_root_keeps_the_traffic(store: Store) -> None:
    mesh = written_elsewhere(store, split_elsewhere(Backend("store-v1", 0), Backend("store-v2", 0)))
    assert shares(mesh) == {"shop/store": 1000}
    assert [p.reason for p in mesh.problems["other.example/Split/shop/split"]] == ["NoWeight"]


def test_of_two_policy_apis_that_split_one_root_the_first_counts(store: Store) -> None:
    store.apply(split_text("shop/split", "store", store_v1=1))
    mesh = written_elsewhere(store, split_elsewhere(Backend("store-v2", 1)))
    assert shares(mesh) == {"shop/store-v1": 1000}
    (problem,) = mesh.problems["other.example/Split/shop/split"]
    assert problem.reason == "Conflict"
    assert SPLIT in problem.message


def tcp_too(store: Store, *services: str) -> None:
    """Give these services a port that speaks TCP, beside the one of HTTP."""
    for service in services:
        ports = (ServicePort(80, Protocol.HTTP, "8080"), ServicePort(6379, Protocol.TCP, "6379"))
        store.put(KEYS.service("files", name(service)), Service(name(service), ports))
        found = [n for n in (1, 2) if service == "shop/store" or service.endswith(f"v{n}")]
        ends = [endpoint(f"shop/store-{n}", "store", (80, 8080), (6379, 6379)) for n in found]
        store.offer_endpoints(service, *ends)


def test_a_tcp_port_is_split_like_any_other(store: Store) -> None:
    tcp_too(store, "shop/store", "shop/store-v1", "shop/store-v2")
    store.apply(split_text("shop/split", "store", store_v1=90, store_v2=10))
    mesh = store.build()
    assert shares(mesh, 6379) == {"shop/store-v1": 90_000, "shop/store-v2": 10_000}
    assert destinations(mesh)["shop/store|6379"].protocol is Protocol.TCP
    assert problems(mesh) == []


def test_conditions_on_requests_do_not_count_where_there_are_none(store: Store) -> None:
    tcp_too(store, "shop/store", "shop/store-v1", "shop/store-v2")
    store.apply(group_text("shop/some"))
    store.apply(split_text("shop/split", "store", "some", store_v2=1))
    mesh = store.build()
    tcp, http = destinations(mesh)["shop/store|6379"], destinations(mesh)["shop/store|80"]
    assert (tcp.branches, tcp.sources, shares(mesh, 6379)) == ((), (), {"shop/store": 1000})
    assert len(http.branches) == 1
    (problem,) = problems(mesh)
    assert (problem.reason, problem.field, problem.severity) == ("MatchesOfTCP", "spec.matches", "warning")
    assert "shop/store port 6379 speaks TCP" in problem.message
    store.offer_service("shop/store", (6379, "6379"), protocol=Protocol.TCP)
    (problem,) = problems(store.build(mesh))
    assert (problem.reason, problem.severity) == ("MatchesOfTCP", "error")


@pytest.mark.parametrize(("of_root", "of_backend"), [(Protocol.TCP, Protocol.HTTP), (Protocol.GRPC, Protocol.TCP)])
def test_no_connection_lands_where_requests_are_expected_nor_the_other_way_round(
    store: Store, of_root: Protocol, of_backend: Protocol
) -> None:
    store.offer_service("shop/store", (80, "8080"), protocol=of_root)
    store.offer_service("shop/store-v1", (80, "8080"), protocol=of_root)
    store.offer_service("shop/store-v2", (80, "8080"), protocol=of_backend)
    store.apply(split_text("shop/split", "store", store_v1=1, store_v2=1))
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v1": 1000}
    (problem,) = problems(mesh)
    assert (problem.reason, problem.field) == ("BackendProtocolConflict", "spec.backends[1].service")
    assert problem.message == (
        f"shop/store-v2 port 80 speaks {of_backend.value}, and shop/store's {of_root.value}, "
        "so it gets no traffic of it: make them equal"
    )


def test_requests_may_move_to_another_version_of_http(store: Store) -> None:
    store.offer_service("shop/store-v2", (80, "8080"), protocol=Protocol.HTTP2)
    store.apply(split_text("shop/split", "store", store_v2=1))
    mesh = store.build()
    assert shares(mesh) == {"shop/store-v2": 1000}
    assert problems(mesh) == []
