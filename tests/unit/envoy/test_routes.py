from __future__ import annotations

from typing import Any

import pytest
import re2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.envoy import messages, names, routes
from smc.model import Destination, Egress, EgressHost, HttpMatch, MeshConfig, Mode, Name, Policy, Target
from smc.xds import virtual_hosts
from smc.xds.snapshot import Source, Type
from tests.unit.envoy import nouns
from tests.unit.envoy.rendering import message

# Short, and with dots, which no service has: so that names collide often.
_WORD = st.sampled_from(["a", "b", "svc", "local", "cluster", "a.b", "svc.cluster", "b.svc", "A"])


def _virtual_hosts(found: list[tuple[Name, int]], namespace: str, mesh_domain: str) -> list[routes.VirtualHost]:
    return [
        routes.VirtualHost.of(
            Destination(service, port, (Target(service, port, 1),)),
            mesh_domain,
            same_namespace=service.namespace == namespace,
        )
        for service, port in sorted(found)
    ]


@given(
    st.lists(st.tuples(st.builds(Name, _WORD, _WORD), st.sampled_from([80, 8080])), unique=True, max_size=12),
    _WORD,
    st.sampled_from(["mesh.internal", "svc", "svc.cluster.local", "cluster.local", "b", "mesh.internal."]),
)
@settings(max_examples=300, deadline=None)
def test_no_domain_occurs_twice_and_every_service_keeps_its_longest_name(
    found: list[tuple[Name, int]], namespace: str, mesh_domain: str
) -> None:
    hosts = _virtual_hosts(found, namespace, mesh_domain)
    made = [message(host.resource) for host in routes.disjoint(hosts)]
    domains = [domain for host in made for domain in host.domains]
    assert len(domains) == len(set(domains))
    assert all(domain == domain.lower() for domain in domains)
    assert all(host.domains for host in made)
    assert set(domains) == {domain for host in hosts for domain in message(host.resource).domains}


def test_the_longer_way_of_naming_a_service_wins() -> None:
    dotted, plain = (
        Name("b", "a.b"),
        Name("b", "a"),
    )  # `a.b` is the first one's short name, and the other's with namespace
    made = routes.disjoint(_virtual_hosts([(dotted, 80), (plain, 80)], "b", "mesh"))
    owner = {domain: host.resource.name for host in made for domain in message(host.resource).domains}
    assert owner["a.b"] == names.virtual_host("outbound", plain, 80)
    assert owner["a.b.b"] == names.virtual_host("outbound", dotted, 80)


def test_those_whose_hosts_are_all_their_own_are_as_they_were() -> None:
    hosts = _virtual_hosts([(Name("b", "a"), 80), (Name("b", "a"), 81), (Name("c", "a"), 80)], "b", "mesh")
    assert routes.disjoint(hosts) is hosts
    alike = _virtual_hosts([(Name("b", "a.b"), 80), (Name("b", "a"), 80), (Name("b", "z"), 80)], "b", "mesh")
    assert [was is now for was, now in zip(alike, routes.disjoint(alike), strict=True)] == [True, False, True]


@pytest.mark.parametrize("dialled", [False, True])
def test_one_that_lost_hosts_to_another_differs_in_nothing_else(dialled: bool) -> None:
    def host(service: str) -> routes.VirtualHost:
        to = nouns.destination(service, 80, {"b/x": 1, "b/y": 3}, nouns.SPLIT)
        if dialled:
            return routes.VirtualHost.of_dialled(to, f"240.0.0.{len(service)}", "mesh", same_namespace=True)
        return routes.VirtualHost.of(to, "mesh", same_namespace=True)

    was = host("b/a.b")
    _, now = routes.disjoint([host("b/a"), was])
    before, after = message(was.resource), message(now.resource)
    lost = {"a.b", "a.b."} if dialled else {"a.b", "a.b.", "a.b:80", "a.b.:80"}
    assert [domain for domain in before.domains if domain not in lost] == list(after.domains)
    assert list(before.routes) == list(after.routes)
    assert (now.resource.name, now.resource.sources) == (was.resource.name, was.resource.sources)
    assert now.resource.sources == (Source(nouns.SPLIT, 7),)


_LABEL = st.text("abz09-|", min_size=1, max_size=3)
"""More than a service may be called."""


@given(st.tuples(_LABEL, _LABEL, st.integers(1, 65535)), st.tuples(_LABEL, _LABEL, st.integers(1, 65535)))
@settings(max_examples=200, deadline=None)
def test_the_name_of_a_virtual_host_says_whose_it_is_after_its_only_slash(
    one: tuple[str, str, int], other: tuple[str, str, int]
) -> None:
    """Envoy takes what comes before the last slash for the name of the route."""
    named = [
        names.virtual_host(route, Name(namespace, name), port)
        for route in (names.OUTBOUND, names.outbound_route(80))
        for namespace, name, port in (one, other)
    ]
    assert [name.count("/") for name in named] == [1] * 4
    assert [name.partition("/")[0] for name in named] == ["outbound", "outbound", "outbound|80", "outbound|80"]
    assert len(set(named)) == (2 if one == other else 4)
    assert not {name.partition("/")[2] for name in named} & {virtual_hosts.OTHERS}


def test_a_service_answers_to_its_bare_name_on_port_80_and_in_its_own_namespace_only() -> None:
    def domains(port: int, namespace: str) -> set[str]:
        [host] = _virtual_hosts([(Name("books", "store"), port)], namespace, "mesh.internal")
        return set(message(host.resource).domains)

    assert {"store", "store.", "store:80", "store.:80", "store.books"} <= domains(80, "books")
    assert {"store:81", "store.:81"} <= domains(81, "books")
    assert not {"store", "store.", "store.books"} & domains(81, "books")
    assert not {"store", "store.", "store:80", "store.:80"} & domains(80, "other")


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=20))
def test_weights_keep_their_ratio_and_fit_what_envoy_takes(weights: list[int]) -> None:
    made = messages.ratio(weights)
    assert all(weight >= 1 for weight in made)
    assert sum(made) <= messages.UINT32_MAX
    for weight, given_ in zip(made, weights, strict=True):
        assert abs(weight / sum(made) - given_ / sum(weights)) < 1e-6


def test_only_ratios_of_weights_reach_the_wire() -> None:
    assert messages.ratio([50_000, 100_000]) == messages.ratio([500, 1000]) == [1, 2]


def test_a_split_is_a_weighted_choice_and_a_single_target_is_none() -> None:
    def action(targets: dict[str, int]) -> object:
        host = routes.VirtualHost.of(nouns.destination("a/b", 80, targets), "mesh", same_namespace=True)
        return message(host.resource).routes[0]

    split = action({"a/x": 1000, "a/y": 2000}).route  # type: ignore[attr-defined]
    assert [(c.name, c.weight.value) for c in split.weighted_clusters.clusters] == [("a/x|80", 1), ("a/y|80", 2)]
    assert action({"a/x": 1000}).route.cluster == "a/x|80"  # type: ignore[attr-defined]
    assert action({}).direct_response.status == 503  # type: ignore[attr-defined]


def test_branches_come_before_what_is_for_all_other_requests_and_each_match_is_a_route() -> None:
    branches = [((HttpMatch("/a"), HttpMatch(None, ("GET", "PUT"))), {"a/x": 1}), ((HttpMatch("/b"),), {"a/y": 1})]
    host = routes.VirtualHost.of(nouns.destination("a/b", 80, None, "", branches), "mesh", same_namespace=True)
    made = message(host.resource).routes
    assert [(r.match.safe_regex.regex or r.match.prefix, r.route.cluster) for r in made] == [
        ("/a", "a/x|80"),
        ("/", "a/x|80"),
        ("/b", "a/y|80"),
        ("/", "a/b|80"),
    ]
    [method] = made[1].match.headers
    assert (method.name, method.string_match.safe_regex.regex) == (":method", "GET|PUT")
    assert not any(r.match.headers for r in made[2:])


def _rules(policy: Policy) -> object:
    from envoy.extensions.filters.http.rbac.v3 import rbac_pb2

    made = routes.inbound(8080, routes.permissions(policy, "td"), routes.policy_sources(policy))
    [host] = message(made).virtual_hosts
    [route] = host.routes
    config = rbac_pb2.RBACPerRoute()
    assert route.typed_per_filter_config[routes.RBAC].Unpack(config)
    assert config.rbac.HasField("rules"), "without rules the filter is off and everything is allowed"
    assert made.type is Type.ROUTE
    return config.rbac.rules


def test_without_permissions_there_are_rules_that_allow_nothing() -> None:
    assert not _rules(Policy(())).policies  # type: ignore[attr-defined]


def test_policies_bear_the_names_of_their_manifests_even_two_of_one() -> None:
    twice = [nouns.permission("m", "a/b", ["a/c"]), nouns.permission("m", "a/b", ["a/d"])]
    assert set(_rules(Policy(tuple(twice))).policies) == {"m", "m#2"}  # type: ignore[attr-defined]


def test_an_identity_with_a_dot_is_taken_literally() -> None:
    [policy] = _rules(Policy((nouns.permission("m", "a/b", ["a/x.y"]),))).policies.values()  # type: ignore[attr-defined]
    [principal] = policy.principals
    assert principal.authenticated.principal_name.exact == "spiffe://td/ns/a/sa/x.y"


def test_a_match_on_the_host_is_a_match_on_the_authority() -> None:
    allowed = nouns.permission("m", "a/b", ["a/c"], HttpMatch(headers=(("host", "x"),)))
    [policy] = _rules(Policy((allowed,))).policies.values()  # type: ignore[attr-defined]
    assert policy.permissions[0].header.name == ":authority"


def test_sni_is_lower_case_and_without_a_trailing_dot() -> None:
    assert names.sni(Name("Books", "Store"), 80, "Mesh.Internal.") == "80.store.books.mesh.internal"


# ---------------------------------------------------------------------------------------------------------------- modes


def _filter(policy: Policy, mode: Mode) -> filter_pb2.RBAC:
    found = filter_pb2.RBACPerRoute()
    assert AnyMessage.FromString(routes.permissions(policy, nouns.TRUST_DOMAIN, mode)).Unpack(found)
    return found.rbac


@pytest.mark.parametrize("mode", [Mode.AUDIT, Mode.PERMISSIVE])
def test_what_enforcing_obeys_the_other_modes_count(mode: Mode) -> None:
    policy = Policy((nouns.permission("a", "a/b", ["a/c"], HttpMatch("/x")),))
    enforced, counted = _filter(policy, Mode.ENFORCING), _filter(policy, mode)
    assert not enforced.HasField("shadow_rules")
    assert counted.shadow_rules == enforced.rules
    (anybody,) = counted.rules.policies.values()
    assert (anybody.permissions[0].any, anybody.principals[0].any) == (True, True)


def test_without_a_permission_enforcing_denies_all_and_audit_counts_all() -> None:
    assert not _filter(Policy(()), Mode.ENFORCING).rules.policies
    counted = _filter(Policy(()), Mode.AUDIT)
    assert counted.HasField("shadow_rules")
    assert not counted.shadow_rules.policies


@pytest.mark.parametrize("mode", Mode)
def test_a_certificate_that_is_barred_is_refused_in_every_mode(mode: Mode) -> None:
    permission = nouns.permission("a", "a/b", ["a/c"])
    (rule,) = _filter(Policy((permission,), barred=("0f",)), mode).rules.policies.values()
    (principal,) = rule.principals
    assert "Hash=0f;" in str(principal.and_ids.ids[1].not_id)


def test_an_application_without_a_proxy_lets_no_certificate_in_but_those_of_workloads() -> None:
    """TLS alone takes whatever the authority has signed there, in every mode: an operator's, a proxy's."""
    rules = routes.permissions(Policy(()), nouns.TRUST_DOMAIN, Mode.AUDIT, known=True)
    (route,) = message(routes.answered(8080, rules, ())).virtual_hosts[0].routes
    config = filter_pb2.RBACPerRoute()
    route.typed_per_filter_config[routes.RBAC].Unpack(config)
    (policy,) = config.rbac.rules.policies.values()
    (principal,) = policy.principals
    assert principal.authenticated.principal_name.prefix == "spiffe://books.example/ns/"


def _plaintext(services: list[tuple[Name, int]], namespace: str) -> Any:
    rules = routes.permissions(Policy(()), nouns.TRUST_DOMAIN, Mode.PERMISSIVE)
    return message(
        routes.plaintext(
            [
                routes.VirtualHost.of_application(
                    name, port, 8080, rules, (), None, "mesh", same_namespace=name.namespace == namespace
                )
                for name, port in services
            ]
        )
    )


def test_plaintext_finds_its_port_by_every_name_of_the_services_and_else_nothing() -> None:
    made = _plaintext([(Name("shop", "store"), 80), (Name("shop", "store"), 81)], "shop")
    nothing, store, other = made.virtual_hosts
    assert list(nothing.domains) == ["*"]
    assert nothing.routes[0].direct_response.status == 404
    assert {"store", "store.", "store:80", "store.shop.mesh", "store.shop.svc.cluster.local:80"} < set(store.domains)
    assert {"store:81", "store.shop:81"} < set(other.domains)
    assert store.routes[0].route.cluster == "local|8080"


# --------------------------------------------------------------------------------------------------------------- egress


def _let_out(hosts: tuple[EgressHost, ...], authority: str) -> bool:
    """Whether a request to `authority` leaves the mesh, as a whole match of a route's header decides it."""
    made = message(routes.elsewhere(MeshConfig(egress=Egress.DENY, egress_hosts=hosts)))
    assert list(made.domains) == ["*"]
    for route in made.routes:
        (*headers,) = (h.string_match.safe_regex.regex for h in route.match.headers)
        if all(re2.fullmatch(regex, authority) for regex in headers):
            return route.route.cluster == names.PASSTHROUGH
    raise AssertionError("no route is for it")


@pytest.mark.parametrize(
    ("host", "let_out", "refused"),
    [
        (EgressHost("a.b"), ("a.b", "A.b.", "a.b:80", "a.b:8443"), ("xa.b", "x.a.b", "a.b.c", "axb", "a.b:", "a.b:x")),
        (EgressHost("a.b", 443), ("a.b:443", "a.b.:443"), ("a.b", "a.b:4430", "a.b:80")),
        (EgressHost("a.b", 80), ("a.b", "a.b:80"), ("a.b:8080",)),
        (EgressHost("*.a.b"), ("x.a.b", "y.x.a.b:1", "X.A.B"), ("a.b", ".a.b", "x@y.a.b", "x.a.b/y")),
    ],
)
def test_with_egress_denied_the_hosts_of_the_list_are_let_out(
    host: EgressHost, let_out: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    assert [authority for authority in let_out if not _let_out((host,), authority)] == []
    assert [authority for authority in refused if _let_out((host,), authority)] == []


def test_with_egress_allowed_the_list_means_nothing() -> None:
    (route,) = message(routes.elsewhere(MeshConfig(egress_hosts=(EgressHost("a.b"),)))).routes
    assert route.route.cluster == names.PASSTHROUGH
