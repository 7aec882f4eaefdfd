from __future__ import annotations

from typing import Any

import pytest

from smc.envoy.requests import Request
from smc.errors import NotFound
from smc.explaining import Effect, Explanation, Server, Verdict, explain
from smc.mesh import Mesh
from smc.model import Identity, Sidecar
from tests.unit.mesh.store import (
    Store,
    group_text,
    name,
    namespace_text,
    ports_text,
    service_text,
    split_text,
    target_text,
    traffic_text,
    workload_text,
)

GROUP = """\
apiVersion: specs.smi-spec.io/v1alpha4
kind: HTTPRouteGroup
metadata: {name: books, namespace: shop}
spec:
  matches:
  - {name: read, pathRegex: /books/.*, methods: [GET, HEAD]}
  - {name: beta, pathRegex: /beta, methods: ['*'], headers: {x-team: 'a,b', host: 'store\\..*'}}
"""
CANARY = """\
apiVersion: specs.smi-spec.io/v1alpha4
kind: HTTPRouteGroup
metadata: {name: canary, namespace: shop}
spec:
  matches: [{name: firefox, headers: {user-agent: '.*Firefox.*'}}]
"""


@pytest.fixture
def store() -> Store:
    store = Store()
    store.apply(service_text("shop/store", 80))
    store.apply(service_text("shop/store-v2", 80))
    store.apply(workload_text("shop/buyer", "buyer"))
    store.apply(workload_text("shop/thief", "thief"))
    store.apply(workload_text("shop/store", "store", "store"))
    store.apply(workload_text("shop/store-v2", "store-v2", "store-v2"))
    store.certify("shop/store", "shop/store-v2")
    store.ready("shop/store", "shop/store-v2")
    store.apply(GROUP)
    store.apply(target_text("shop/reading", "store", "shop/buyer", group="books"))
    return store


def explained(
    store: Store, path: str = "/", method: str = "GET", caller: str = "buyer", **more: Any
) -> tuple[Explanation, Server]:
    """And the only server."""
    headers = tuple((key.replace("_", "-"), value) for key, value in more.items())
    found = explain(store.build(), name(f"shop/{caller}"), name("shop/store"), Request(method, path, headers))
    ((server,),) = (way.servers for way in found.ways)
    return found, server


@pytest.mark.parametrize(
    ("method", "path", "headers", "allowed"),
    [
        ("GET", "/books/1", {}, True),
        ("HEAD", "/books/1", {}, True),
        ("get", "/books/1", {}, False),
        ("POST", "/books/1", {}, False),
        ("GET", "/books", {}, False),
        ("GET", "/books/1?/../", {}, True),
        ("GET", "/other?/books/1", {}, False),
        ("GET", "/x/..//books//1", {}, True),
        ("GET", "/books/../x", {}, False),
        ("GET", "/books/..;v=1/x", {}, False),
        ("GET", "/%62ooks/1", {}, True),
        ("PUT", "/beta", {"x_team": "a,b"}, True),
        ("PUT", "/beta", {"X_Team": " a,b "}, True),
        ("PUT", "/beta", {"x_team": "a, b"}, False),
        ("PUT", "/beta", {}, False),
        ("PUT", "/beta", {"x_team": "a,b", "host": "store.shop.svc"}, True),
        ("PUT", "/beta", {"x_team": "a,b", "host": "store"}, False),
        ("GET", "/.smc/health", {}, True),
    ],
)
def test_a_request_is_judged_as_envoy_judges_it(
    store: Store, method: str, path: str, headers: dict[str, str], allowed: bool
) -> None:
    found, server = explained(store, path, method, **headers)
    assert found.verdict is (Verdict.ALLOWED if allowed else Verdict.DENIED)
    assert server.allowed is server.passes is allowed


@pytest.mark.parametrize(
    ("values", "verdict"), [(("a", "b"), Verdict.DENIED), (("c", "a,b"), Verdict.ALLOWED), ((), Verdict.DENIED)]
)
def test_one_value_of_a_header_has_to_match(store: Store, values: tuple[str, ...], verdict: Verdict) -> None:
    request = Request("GET", "/beta", tuple(("x-team", value) for value in values))
    assert explain(store.build(), name("shop/buyer"), name("shop/store"), request).verdict is verdict


def test_what_allows_is_named_with_everything_that_it_was_compiled_from(store: Store) -> None:
    _, server = explained(store, "/books/1")
    (by,) = server.by
    assert (by.manifest, [manifest for manifest, _ in by.also]) == (
        "access.smi-spec.io/TrafficTarget/shop/reading",
        ["specs.smi-spec.io/HTTPRouteGroup/shop/books"],
    )


def test_a_denial_says_what_came_close_and_what_is_missing(store: Store) -> None:
    _, server = explained(store, "/books/1", "POST")
    (miss,) = server.misses
    assert miss.why == ("the method POST is not GET or HEAD",)
    _, server = explained(store, "/beta", x_team="c")
    assert server.misses[0].why == ("the header x-team is c, which does not match a,b",)
    _, server = explained(store, "/beta")
    assert server.misses[0].why == ("there is no header x-team, which has to match a,b",)


def test_a_permission_of_others_is_told_last(store: Store) -> None:
    store.apply(group_text("shop/all"))
    store.apply(target_text("shop/a-theft", "store", "shop/thief"))
    _, server = explained(store, "/x")
    assert [(miss.of_others, miss.permission.manifest.rpartition("/")[2]) for miss in server.misses] == [
        (False, "reading"),
        (True, "a-theft"),
    ]
    assert server.misses[1].why == ("it is for shop/thief, and not for shop/buyer",)


def test_nobody_may_what_nobody_allows(store: Store) -> None:
    found, server = explained(store, "/x", caller="thief")
    assert (found.verdict, server.misses) == (Verdict.DENIED, ())


@pytest.mark.parametrize(
    ("path", "who"),
    [("/a%2Fb", "the server's proxy"), ("/a#b", "the caller's own proxy"), ("a", "the caller's own proxy")],
)
def test_a_request_that_no_rule_is_asked_about_is_refused(store: Store, path: str, who: str) -> None:
    found = explain(store.build(), name("shop/buyer"), name("shop/store"), Request("GET", path))
    assert found.verdict is Verdict.REFUSED
    assert who in found.reason


def test_a_port_that_a_permission_is_not_for_is_told(store: Store) -> None:
    store.apply(ports_text("shop/admin", 9))
    store.apply(
        target_text("shop/reading", "store", "shop/buyer", group="books").replace(
            "rules: [", "rules: [{kind: TCPRoute, name: admin}, "
        )
    )
    _, server = explained(store, "/books/1")
    assert server.misses[0].why == ("it is for port 9, and this is port 80, 8080",)


# --------------------------------------------------------------------------------------------------------------- splits


def test_a_split_shows_every_way_and_its_share(store: Store) -> None:
    store.apply(split_text("shop/half", "store", store_v2=3))
    found = explain(store.build(), name("shop/buyer"), name("shop/store"), Request("GET", "/books/1"))
    assert [(str(way.target.service), way.share) for way in found.ways] == [("shop/store-v2", 1.0)]
    assert [manifest for manifest, _ in found.split_by] == ["split.smi-spec.io/TrafficSplit/shop/half"]
    assert found.verdict is Verdict.DENIED, "what may be asked is for the one who answers to say"


def test_a_branch_takes_what_it_matches_and_is_named(store: Store) -> None:
    store.apply(CANARY)
    store.apply(split_text("shop/beta", "store", "canary", store_v2=1))
    found = explain(
        store.build(), name("shop/buyer"), name("shop/store"), Request(headers=(("User-Agent", "A Firefox B"),))
    )
    assert found.branch is not None
    assert [str(way.target.service) for way in found.ways] == ["shop/store-v2"]
    assert [manifest.rpartition("/")[2] for manifest, _ in found.split_by] == ["beta", "canary"]
    others = explain(store.build(), name("shop/buyer"), name("shop/store"), Request())
    assert (others.branch, others.split_by) == (None, ())
    assert [str(way.target.service) for way in others.ways] == ["shop/store"]


def test_some_may_allow_what_others_deny(store: Store) -> None:
    store.apply(workload_text("shop/other", "other", "store", address="10.0.0.9"))
    found = explain(store.build(), name("shop/buyer"), name("shop/store"), Request("GET", "/books/1"))
    ((one, two),) = (way.servers for way in found.ways)
    assert found.verdict is Verdict.SOME
    assert [(s.identity, s.ready, s.allowed) for s in (one, two)] == [
        (Identity("shop", "other"), False, False),
        (Identity("shop", "store"), True, True),
    ]


def test_a_service_that_nobody_serves_is_nowhere(store: Store) -> None:
    store.apply(service_text("shop/empty", 80))
    found = explain(store.build(), name("shop/buyer"), name("shop/empty"), Request())
    assert found.verdict is Verdict.NOWHERE


# ------------------------------------------------------------------------------------------ modes, quarantines, TCP


@pytest.mark.parametrize("mode", ["audit", "permissive"])
def test_where_denials_are_only_counted_the_request_passes(store: Store, mode: str) -> None:
    store.apply(namespace_text("shop", mode))
    found, server = explained(store, "/x")
    assert (found.verdict, server.allowed, server.mode.value) == (Verdict.ALLOWED, False, mode)
    assert server.misses


def test_an_identity_that_is_revoked_is_denied_in_every_mode(store: Store) -> None:
    store.apply(namespace_text("shop", "audit"))
    store.revoke_identity("shop/buyer")
    assert explained(store, "/books/1")[0].verdict is Verdict.DENIED


def test_a_permission_that_the_servers_proxy_goes_without_allows_nothing(store: Store) -> None:
    target = "access.smi-spec.io/TrafficTarget/shop/reading"
    store.quarantine("shop/store", target, store.build().manifests[target].mod_revision)
    found, server = explained(store, "/books/1")
    assert (found.verdict, server.left_out) == (Verdict.DENIED, (target,))


def test_a_connection_is_judged_by_who_and_where_alone(store: Store) -> None:
    store.apply(service_text("shop/store", 80, protocol="tcp"))
    found, server = explained(store)
    assert (found.verdict, server.misses[0].why) == (
        Verdict.DENIED,
        ("it has HTTP rules, and this port speaks TCP",),
    )
    store.apply(ports_text("shop/ours", 80))
    store.apply(
        target_text("shop/connecting", "store", "shop/buyer", group="ours").replace("HTTPRouteGroup", "TCPRoute")
    )
    assert explained(store)[0].verdict is Verdict.ALLOWED


# ------------------------------------------------------------------------------------------------------ TrafficPolicies


def told(effects: tuple[Effect, ...]) -> list[tuple[str, float, str]]:
    assert all(source.startswith("smc.io/TrafficPolicy/shop/") for source, _ in (e.source for e in effects))
    return [(effect.kind, effect.share, effect.what) for effect in effects]


FAULTS = "fault: {delay: {duration: 1500ms, percent: 0.1}, abort: {status: 429, percent: 20}}"


def test_faults_and_the_timeout_are_of_the_service_that_is_called_wherever_its_requests_go(store: Store) -> None:
    store.apply(split_text("shop/half", "store", store_v2=1))
    store.apply(traffic_text("shop/ill", "store", f"{FAULTS}, timeout: 250ms"))
    store.apply(traffic_text("shop/other", "store-v2", "fault: {abort: {status: 503}}"))
    found, _ = explained(store, "/books/1")
    assert told(found.effects) == [
        ("fault.delay", 0.001, "wait 1.5 s before they are sent"),
        ("fault.abort", 0.2, "are answered 429, and not sent"),
        ("timeout", 1.0, "are answered 504 if they take longer than 250 ms"),
    ]
    assert found.verdict is Verdict.DENIED, "what a TrafficPolicy does is no part of the verdict"


def test_limits_are_of_whoever_the_request_is_sent_to(store: Store) -> None:
    store.apply(split_text("shop/half", "store", store_v2=1))
    store.apply(traffic_text("shop/one", "store", "limits: {maxConnections: 1}"))
    store.apply(traffic_text("shop/two", "store-v2", "limits: {maxConnections: 2, maxRequests: 3}"))
    found, _ = explained(store, "/books/1")
    assert [told(way.effects) for way in found.ways] == [
        [
            (
                "limits",
                1.0,
                "may be at most 2 connections, 3 requests at a time; beyond it the caller's proxy answers 503",
            )
        ]
    ]


def test_a_rate_limit_counts_what_policy_lets_through(store: Store) -> None:
    store.apply(traffic_text("shop/slow", "store", "rateLimit: {requests: 10, per: 1m, burst: 30}"))
    _, server = explained(store, "/books/1")
    limited = [("rateLimit", 1.0, "may be at most 10 each 60 s, 30 at once, of all callers; beyond it 429")]
    assert told(server.effects) == limited
    assert explained(store, "/x")[1].effects == ()
    store.apply(namespace_text("shop", "audit"))
    assert told(explained(store, "/x")[1].effects) == limited
    assert explained(store, "/.smc/health")[1].effects == ()


def test_of_connections_only_limits_are_told(store: Store) -> None:
    store.apply(service_text("shop/store", 80, protocol="tcp"))
    settings = f"{FAULTS}, timeout: 1s, limits: {{maxConnections: 1, maxRequests: 2}}, rateLimit: {{requests: 1}}"
    store.apply(traffic_text("shop/all", "store", settings))
    found, server = explained(store)
    assert (found.effects, server.effects) == ((), ())
    most = "may be at most 1 connections at a time; beyond it the caller's proxy"
    assert [told(way.effects) for way in found.ways] == [[("limits", 1.0, f"{most} answers CONNECT with 503")]]
    store.apply(workload_text("shop/buyer", "buyer", sidecar=Sidecar.INTERCEPTED))
    found, _ = explained(store)
    assert [told(way.effects) for way in found.ways] == [[("limits", 1.0, f"{most} closes the connection")]]


def test_a_policy_that_the_callers_proxy_goes_without_does_nothing(store: Store) -> None:
    store.apply(traffic_text("shop/ill", "store", FAULTS))
    policy = "smc.io/TrafficPolicy/shop/ill"
    store.quarantine("shop/buyer", policy, store.build().manifests[policy].mod_revision)
    assert explained(store, "/books/1")[0].effects == ()


# ---------------------------------------------------------------------------------------- gRPC programs without a proxy


@pytest.fixture
def programs(store: Store) -> Store:
    """The buyer and the store speak gRPC themselves."""
    store.apply(workload_text("shop/buyer", "buyer", sidecar=Sidecar.GRPC))
    store.apply(workload_text("shop/store", "store", "store", sidecar=Sidecar.GRPC))
    store.apply(GROUP.replace("[GET, HEAD]", "[POST]"))
    return store


@pytest.mark.parametrize(
    ("path", "headers", "allowed"),
    [
        ("/books/1", {}, True),
        ("/x/../books/1", {}, False),
        ("//books/1", {}, False),
        ("/.smc/health", {}, False),
        ("/beta", {"x_team": "a,b", "host": "store.shop.svc"}, True),
    ],
)
def test_a_program_judges_paths_as_they_are(programs: Store, path: str, headers: dict[str, str], allowed: bool) -> None:
    found, server = explained(programs, path, "", **headers)
    assert found.request.method == "POST"
    assert server.allowed is allowed


@pytest.mark.parametrize("caller", ["buyer", "envoys"])
def test_the_values_of_a_header_are_one_to_a_program(programs: Store, caller: str) -> None:
    programs.apply(workload_text("shop/envoys", "buyer", address="10.0.0.9"))
    for values, verdict in ((("a", "b"), Verdict.ALLOWED), (("c", "a,b"), Verdict.DENIED)):
        request = Request("POST", "/beta", tuple(("x-team", value) for value in values))
        assert explain(programs.build(), name(f"shop/{caller}"), name("shop/store"), request).verdict is verdict


def test_a_call_by_anything_but_post_is_refused(programs: Store) -> None:
    programs.apply(workload_text("shop/envoys", "buyer", address="10.0.0.9"))
    for caller, who in (("buyer", "it does not leave the program"), ("envoys", "the server refuses it")):
        request = Request("GET", "/books/1")
        found = explain(programs.build(), name(f"shop/{caller}"), name("shop/store"), request)
        assert found.verdict is Verdict.REFUSED
        assert found.reason.endswith(who)


def test_a_condition_of_a_split_does_not_see_to_whom_a_program_speaks(programs: Store) -> None:
    programs.apply(CANARY.replace("user-agent: '.*Firefox.*'", "x-team: a, host: '.*'"))
    programs.apply(split_text("shop/beta", "store", "canary", store_v2=1))
    request = Request("", "/books/1", (("x-team", "a"),))
    found = explain(programs.build(), name("shop/buyer"), name("shop/store"), request)
    assert found.branch is None
    programs.apply(CANARY.replace("user-agent: '.*Firefox.*'", "x-team: a"))
    assert explain(programs.build(), name("shop/buyer"), name("shop/store"), request).branch is not None


def test_a_program_aborts_in_its_own_words_and_has_no_rate_limit(programs: Store) -> None:
    settings = f"{FAULTS}, timeout: 1s, limits: {{maxConnections: 1, maxRequests: 2}}, rateLimit: {{requests: 1}}"
    programs.apply(traffic_text("shop/ill", "store", settings))
    found, server = explained(programs, "/books/1", "")
    assert told(found.effects)[1:] == [("fault.abort", 0.2, "are answered UNAVAILABLE (429), and not sent")]
    assert [told(way.effects) for way in found.ways] == [
        [("limits", 1.0, "may be at most 2 requests at a time; beyond it the call ends with UNAVAILABLE")]
    ]
    assert server.effects == ()


def test_a_program_is_told_of_no_tcp(programs: Store) -> None:
    programs.apply(service_text("shop/cache", 6379, protocol="tcp"))
    assert "no port of shop/cache" in _failing(programs.build(), name("shop/buyer"), name("shop/cache"), Request())


# ----------------------------------------------------------------------------------------------------------- questions


def _failing(mesh: Mesh, *arguments: Any, **more: Any) -> str:
    with pytest.raises(NotFound) as e:
        explain(mesh, *arguments, **more)
    return str(e.value)


def test_what_is_not_there_is_said(store: Store) -> None:
    store.apply(service_text("shop/store", 80, 81))
    mesh = store.build()
    buyer, shop, request = name("shop/buyer"), name("shop/store"), Request()
    assert "no workload shop/nobody" in _failing(mesh, name("shop/nobody"), shop, request)
    assert "no service shop/none" in _failing(mesh, buyer, name("shop/none"), request)
    assert "the ports 80, 81" in _failing(mesh, buyer, shop, request)
    assert "no port 9" in _failing(mesh, buyer, shop, request, port=9)
    strange = Request(headers=(("Host", "example.com"),))
    assert "does not lead to shop/store port 80" in _failing(mesh, buyer, shop, strange, port=80)
