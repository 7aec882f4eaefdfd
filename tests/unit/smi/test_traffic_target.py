# ruff: noqa: N802 - the identifiers of the rules are in capitals
"""TrafficTarget, TCPRoute and UDPRoute, rule by rule.

That a proxy enforces what is compiled here is shown with real Envoys.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from smc import smi
from smc.manifests import Manifest
from smc.model import Binding, HttpMatch, Identity, Name, Permission, PolicyOptions, Severity
from tests.unit.smi.writing import compiled, group, manifest, ports, problem, reasons, refused, target

ANY_PATH = HttpMatch("(?:/.*).*")
STORE = Identity("shop", "store")
BUYER = Identity("buyers", "buyer")

ROUTES = """[
  {name: read, pathRegex: /books, methods: [GET]},
  {name: buy, pathRegex: /buy, methods: [POST]},
  {name: admin, pathRegex: /admin, methods: [GET]}]"""
READ = HttpMatch("(?:/books).*", ("GET",))
BUY = HttpMatch("(?:/buy).*", ("POST",))
ADMIN = HttpMatch("(?:/admin).*", ("GET",))


def granted(*texts: str) -> tuple[Permission, ...]:
    return compiled(*map(manifest, texts)).permissions


def test_a_target_grants_its_sources_the_matches_of_its_rules() -> None:
    access = replace(manifest(target()), mod_revision=5)
    routes = replace(manifest(group()), mod_revision=4)
    assert compiled(routes, access).permissions == (
        Permission(
            manifest="access.smi-spec.io/TrafficTarget/shop/buyers",
            mod_revision=5,
            destination=STORE,
            sources=(BUYER,),
            http=(ANY_PATH,),
            also=(("specs.smi-spec.io/HTTPRouteGroup/shop/routes", 4),),
        ),
    )


def test_ACCESS_1_without_a_target_nothing_is_allowed() -> None:
    assert granted(group()) == ()


def test_ACCESS_1_targets_add_up_and_none_takes_anything_away() -> None:
    both = [target(name="a"), target(name="b", sources="[{kind: ServiceAccount, name: other}]"), group()]
    assert granted(*both) == granted(both[0], group()) + granted(both[1], group())


def test_ACCESS_1_overlapping_rules_grant_each_match_once() -> None:
    rules = "[{kind: HTTPRouteGroup, name: routes}, {kind: HTTPRouteGroup, name: routes, matches: [read]}]"
    (permission,) = granted(target(rules), group(ROUTES))
    assert permission.http == (ADMIN, READ, BUY)


def test_ACCESS_2_a_permission_is_the_destinations_and_names_no_client_side_rule() -> None:
    """That the server's proxy alone decides is seen in the generated listeners and end to end."""
    (permission,) = granted(target(), group())
    assert permission.destination == STORE
    assert permission.sources == (BUYER,)


def test_ACCESS_3_identities_are_service_accounts() -> None:
    sources = "[{kind: ServiceAccount, name: b}, {kind: ServiceAccount, name: a.b, namespace: z}]"
    (permission,) = granted(target(sources=sources), group())
    assert permission.sources == (Identity("shop", "b"), Identity("z", "a.b"))


@pytest.mark.parametrize("kind", ["Group", "User", "Service", "IdentityBinding", "serviceaccount"])
def test_ACCESS_3_nothing_else_is_an_identity(kind: str) -> None:
    assert refused(target(sources=f"[{{kind: {kind}, name: x}}]")).startswith(f'spec.sources[0].kind: "{kind}" is not')
    assert refused(target(destination=f"{{kind: {kind}, name: x}}")).startswith(f'spec.destination.kind: "{kind}" is')


def test_ACCESS_4_a_rule_without_matches_grants_every_match_of_the_group() -> None:
    (permission,) = granted(target(), group(ROUTES))
    assert permission.http == (ADMIN, READ, BUY)


def test_ACCESS_4_an_empty_list_of_matches_is_refused_since_it_could_mean_all_or_none() -> None:
    assert refused(target("[{kind: HTTPRouteGroup, name: routes, matches: []}]")) == (
        "spec.rules[0].matches: the list is empty, and at least one is needed "
        "(leave matches out to allow every match of the group)"
    )
    assert refused(target("[{kind: HTTPRouteGroup, name: routes, matches: }]")).startswith(
        "spec.rules[0].matches: must be a list, and is empty"
    )


def test_ACCESS_5_a_match_that_is_not_listed_is_not_granted() -> None:
    (permission,) = granted(target("[{kind: HTTPRouteGroup, name: routes, matches: [read, buy]}]"), group(ROUTES))
    assert permission.http == (READ, BUY)


def test_ACCESS_5_a_source_that_is_not_listed_is_not_granted() -> None:
    (permission,) = granted(target(), group())
    assert permission.sources == (BUYER,)


def test_ACCESS_6_without_routes_that_name_ports_every_port_of_the_destination_is_meant() -> None:
    (permission,) = granted(target(), group())
    assert permission.ports is None


@pytest.mark.parametrize("spec", ["{matches: {ports: []}}", "{matches: {name: x}}", "{matches: {}}", "{}"])
def test_ACCESS_6_a_route_without_ports_means_every_port(spec: str) -> None:
    route = ports().replace("{matches: {ports: []}}", spec)
    (permission,) = granted(target(BOTH), group(), route)
    assert permission.ports is None


@pytest.mark.parametrize(
    ("version", "spec"), [("v1alpha1", ""), ("v1alpha2", ""), ("v1alpha3", "spec: {}"), ("v1alpha4", "spec: {}")]
)
def test_ACCESS_6_a_tcp_route_has_ports_since_v1alpha4_only(version: str, spec: str) -> None:
    route = f"apiVersion: specs.smi-spec.io/{version}\nkind: TCPRoute\nmetadata: {{name: ports}}\n{spec}\n"
    (permission,) = granted(target(BOTH), group(), route)
    assert permission.ports is None
    if version != "v1alpha4":
        later = ports(80).replace("v1alpha4", version)
        assert "unknown field" in refused(later)


BOTH = "[{kind: HTTPRouteGroup, name: routes}, {kind: TCPRoute, name: ports}]"


def test_ACCESS_7_a_tcp_route_restricts_the_ports_of_the_http_rules() -> None:
    (permission,) = granted(target(BOTH), group(ROUTES), ports(8081, 8080))
    assert permission.http == (ADMIN, READ, BUY)
    assert permission.ports == (8080, 8081)
    assert [m for m, _ in permission.also] == [
        "specs.smi-spec.io/HTTPRouteGroup/shop/routes",
        "specs.smi-spec.io/TCPRoute/shop/ports",
    ]


def test_ACCESS_7_ports_of_several_routes_are_alternatives() -> None:
    rules = "[{kind: TCPRoute, name: ports}, {kind: HTTPRouteGroup, name: routes}, {kind: TCPRoute, name: more}]"
    (permission,) = granted(target(rules), group(), ports(80), ports(81, name="more"))
    assert permission.ports == (80, 81)
    (permission,) = granted(target(rules), group(), ports(80), ports(name="more"))
    assert permission.ports is None


def test_ACCESS_7_tcp_without_http_rules_is_every_connection_and_every_request_on_its_ports() -> None:
    (permission,) = granted(target("[{kind: TCPRoute, name: ports}]"), ports(8080))
    assert (permission.http, permission.ports, permission.tcp) == ((HttpMatch(),), (8080,), True)


@pytest.mark.parametrize("rules", ["[{kind: HTTPRouteGroup, name: routes}]", BOTH])
def test_ACCESS_7_http_rules_grant_no_connection_even_if_they_allow_every_request(rules: str) -> None:
    everything = "[{name: all, methods: ['*'], pathRegex: '.*'}, {name: any, methods: ['*']}]"
    (permission,) = granted(target(rules), group(everything), ports(8080))
    assert not permission.tcp


def test_ACCESS_7_a_tcp_route_grants_no_request_that_the_http_rules_do_not() -> None:
    result = compiled(manifest(target(BOTH)), manifest(ports(8080)))
    assert result.permissions == ()
    assert reasons(result) == [("buyers", "GrantsNothing"), ("buyers", "RouteGroupNotFound")]


def test_ACCESS_7_a_tcp_route_that_is_missing_leaves_no_port_rather_than_every_port() -> None:
    result = compiled(manifest(target(BOTH)), manifest(group()))
    assert result.permissions == ()
    assert [(p.reason, p.field) for p in result.problems] == [
        ("GrantsNothing", "spec.rules"),
        ("RouteNotFound", "spec.rules[1].name"),
    ]
    rules = "[{kind: HTTPRouteGroup, name: routes}, {kind: TCPRoute, name: gone}, {kind: TCPRoute, name: ports}]"
    (permission,) = granted(target(rules), group(), ports(80))
    assert permission.ports == (80,)


def test_ACCESS_7_udp_is_taken_and_not_enforced_and_restricts_no_http() -> None:
    rules = "[{kind: HTTPRouteGroup, name: routes}, {kind: UDPRoute, name: ports}]"
    result = compiled(manifest(target(rules)), manifest(group()), manifest(ports(53, kind="UDPRoute")))
    assert [(p.http, p.ports) for p in result.permissions] == [((ANY_PATH,), None)]
    found = problem(result)
    assert (found.reason, found.field, found.severity) == (
        "UDPNotEnforced",
        "spec.rules[1].kind",
        Severity.WARNING.value,
    )


def test_ACCESS_7_udp_alone_grants_no_http() -> None:
    rules = "[{kind: UDPRoute, name: ports}]"
    result = compiled(manifest(target(rules)), manifest(ports(53, kind="UDPRoute")))
    assert result.permissions == ()
    assert reasons(result) == [("buyers", "UDPNotEnforced")]


def test_ACCESS_7_a_route_of_ports_has_no_matches_to_choose_from() -> None:
    assert refused(target("[{kind: TCPRoute, name: ports, matches: [a]}]")) == (
        "spec.rules[0].matches: a TCPRoute has no matches to choose from (remove it)"
    )


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ("0", "spec.matches.ports[0]: 0 is not from 1 to 65535"),
        ("80, 80", "spec.matches.ports[1]: 80 is in the list twice (it is at spec.matches.ports[0] too)"),
        ("http", 'spec.matches.ports[0]: must be an integer, not the string "http"'),
    ],
)
def test_ACCESS_7_ports_are_numbers(numbers: str, reason: str) -> None:
    assert refused(ports().replace("[]", f"[{numbers}]")) == reason


@pytest.mark.parametrize("version", ["v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"])
def test_ACCESS_12_a_target_says_the_same_in_every_version(version: str) -> None:
    """The first version has no spec, and calls the rules specs."""
    (permission,) = granted(
        target("[{kind: HTTPRouteGroup, name: routes, matches: [buy]}]", version=version), group(ROUTES)
    )
    assert (permission.destination, permission.sources, permission.http) == (STORE, (BUYER,), (BUY,))
    assert permission.ports is None


ON_8080 = "{kind: ServiceAccount, name: store, port: 8080}"


@pytest.mark.parametrize("version", ["v1alpha1", "v1alpha2"])
def test_ACCESS_12_the_port_of_a_destination_is_never_dropped(version: str) -> None:
    """To leave it out would widen access to every port."""
    (permission,) = granted(target(destination=ON_8080, version=version), group())
    assert permission.ports == (8080,)
    (permission,) = granted(target(BOTH, destination=ON_8080, version=version), group(), ports(8080, 8081))
    assert permission.ports == (8080,)
    assert granted(target(BOTH, destination=ON_8080, version=version), group(), ports(8081)) == ()


@pytest.mark.parametrize("version", ["v1alpha3", "v1alpha4"])
def test_ACCESS_12_since_v1alpha3_a_destination_has_no_port(version: str) -> None:
    assert refused(target(destination=ON_8080, version=version)) == (
        "spec.destination.port: unknown field "
        "(since v1alpha3 ports come from a TCPRoute in spec.rules: name one instead)"
    )


@pytest.mark.parametrize(("version", "field"), [("v1alpha1", "specs"), ("v1alpha2", "spec.rules")])
def test_ACCESS_12_a_problem_names_the_field_as_the_version_does(version: str, field: str) -> None:
    result = compiled(manifest(target(version=version)))
    assert [p.field for p in result.problems] == [field, f"{field}[0].name"]
    assert '"UDPRoute" is not taken: it came with v1alpha3' in refused(
        target("[{kind: UDPRoute, name: x}]", version=version)
    )
    other = {"v1alpha1": "v1alpha2", "v1alpha2": "v1alpha1"}[version]
    assert "unknown field" in refused(target(version=version).replace(version, other))


def test_ACCESS_7_rules_are_alternatives() -> None:
    rules = "[{kind: HTTPRouteGroup, name: routes, matches: [buy]}, {kind: HTTPRouteGroup, name: more}]"
    (permission,) = granted(target(rules), group(ROUTES), group("[{name: x, pathRegex: /x}]", name="more"))
    assert permission.http == (BUY, HttpMatch("(?:/x).*"))
    assert [m for m, _ in permission.also] == [
        "specs.smi-spec.io/HTTPRouteGroup/shop/more",
        "specs.smi-spec.io/HTTPRouteGroup/shop/routes",
    ]


BINDING = """\
apiVersion: access.smi-spec.io/v1alpha4
kind: IdentityBinding
metadata: {name: tills, namespace: shop}
spec: {schemes: %s}
"""


def test_ACCESS_8_a_binding_is_compiled_to_its_schemes_for_the_mesh_to_resolve() -> None:
    schemes = """{
      podLabelSelector: {matchLabels: {b: '2', app: till}},
      spiffeIdentities: [books.example/ns/shop/sa/x, 'spiffe://far.example/host/7'],
      serviceAccount: till}"""
    (binding,) = compiled(replace(manifest(BINDING % schemes), mod_revision=4)).bindings
    assert binding == Binding(
        Name("shop", "tills"),
        "access.smi-spec.io/IdentityBinding/shop/tills",
        4,
        "till",
        (("app", "till"), ("b", "2")),
        ("spiffe://books.example/ns/shop/sa/x", "spiffe://far.example/host/7"),
    )


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [
        (
            "{spiffeIdentities: [books.example/ns/bank/sa/vault]}",
            "spec.schemes.spiffeIdentities[0]: an identity of namespace bank in a binding of namespace shop "
            "(a binding is for identities of its own namespace: write one in namespace bank)",
        ),
        (
            "{spiffeIdentities: ['http://x']}",
            'spec.schemes.spiffeIdentities[0]: "http://x" is no SPIFFE ID '
            "(write <trust domain>/ns/<namespace>/sa/<service account>)",
        ),
        (
            "{podLabelSelector: {matchLabels: {}}}",
            "spec.schemes.podLabelSelector.matchLabels: no label is given, so every workload would be meant (name one)",
        ),
        (
            "{}",
            "spec.schemes: no scheme is given, so nobody would be meant "
            "(write podLabelSelector, spiffeIdentities or serviceAccount)",
        ),
    ],
)
def test_ACCESS_8_a_binding_is_for_some_of_its_own_namespace(schemes: str, reason: str) -> None:
    assert refused(BINDING % schemes) == reason


TILLS = "{kind: IdentityBinding, name: tills, group: access.smi-spec.io}"


def test_ACCESS_8_a_target_that_names_bindings_is_a_grant_and_no_permission_yet() -> None:
    sources = f"[{TILLS}, {{kind: IdentityBinding, name: a, namespace: z}}, {{kind: ServiceAccount, name: b}}]"
    rules = compiled(manifest(target(sources=sources, version="v1alpha4")), manifest(group()))
    assert rules.permissions == ()
    (grant,) = rules.grants
    assert (grant.destination, grant.sources) == (STORE, (Identity("shop", "b"),))
    assert grant.bindings == (Name("shop", "tills"), Name("z", "a"))
    (grant,) = compiled(manifest(target(destination=TILLS, version="v1alpha4")), manifest(group())).grants
    assert (grant.destination, grant.sources, grant.bindings) == (Name("shop", "tills"), (BUYER,), ())


def test_ACCESS_8_bindings_came_with_v1alpha4() -> None:
    assert refused(target(sources="[{kind: IdentityBinding, name: tills}]")) == (
        'spec.sources[0].kind: "IdentityBinding" is not taken: it came with v1alpha4: write that version '
        "(only ServiceAccount is known)"
    )


def test_ACCESS_11_a_destination_by_a_binding_of_another_namespace_grants_nothing_too() -> None:
    elsewhere = "{kind: IdentityBinding, name: vaults, namespace: bank}"
    result = compiled(manifest(target(destination=elsewhere, version="v1alpha4")), manifest(group()))
    assert result.grants == ()
    assert (problem(result).reason, problem(result).field) == ("OtherNamespace", "spec.destination.namespace")


def test_ACCESS_9_routes_are_looked_for_in_the_namespace_of_the_target_only() -> None:
    elsewhere = manifest(group().replace("{name: routes}", "{name: routes, namespace: buyers}"))
    result = smi.compile("shop", [manifest(target()), elsewhere])
    assert result.permissions == ()
    assert ("buyers", "RouteGroupNotFound") in reasons(result)


def test_ACCESS_9_a_rule_cannot_name_a_namespace() -> None:
    assert refused(target("[{kind: HTTPRouteGroup, name: routes, namespace: buyers}]")) == (
        "spec.rules[0].namespace: unknown field "
        "(routes are looked for in the namespace of the TrafficTarget: remove it)"
    )


VAULT = "{kind: ServiceAccount, name: vault, namespace: bank}"


@pytest.mark.parametrize("version", ["v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"])
def test_ACCESS_11_a_destination_in_another_namespace_grants_nothing(version: str) -> None:
    """Otherwise a client's team could grant itself access."""
    result = compiled(manifest(target(destination=VAULT, version=version)), manifest(group()))
    assert result.permissions == ()
    assert problem(result).reason == "OtherNamespace"
    assert problem(result).message == (
        "the destination is of namespace bank, the TrafficTarget of shop, so it has no effect: "
        "whoever owns the destination grants the access, write it in namespace bank"
    )


def test_ACCESS_11_a_mesh_may_let_targets_grant_access_to_other_namespaces() -> None:
    manifests = [manifest(target(destination=VAULT)), manifest(group())]
    result = smi.compile("shop", manifests, PolicyOptions(cross_namespace=True))
    (permission,) = result.permissions
    assert permission.destination == Identity("bank", "vault")
    assert result.problems == ()


def test_ACCESS_11_a_manifest_that_is_stored_under_the_name_of_another_grants_nothing() -> None:
    record = manifest(target(namespace="bank")).record
    moved = Manifest(replace(record, name=Name("shop", "buyers")), 1)
    result = compiled(moved, manifest(group()))
    assert result.permissions == ()
    assert reasons(result) == [("buyers", "InvalidManifest")]


def test_ACCESS_11_without_a_namespace_the_destination_and_the_sources_are_of_the_targets() -> None:
    text = target(destination="{kind: ServiceAccount, name: store}", sources="[{kind: ServiceAccount, name: a}]")
    (permission,) = granted(text, group())
    assert (permission.destination, permission.sources) == (STORE, (Identity("shop", "a"),))


def test_ACCESS_13_ports_are_kept_as_written_since_only_the_mesh_knows_which_of_them_are_service_ports() -> None:
    (permission,) = granted(target(BOTH), group(), ports(80, 8080))
    assert permission.ports == (80, 8080)


def test_a_rule_whose_group_is_missing_grants_nothing_and_the_others_still_do() -> None:
    rules = "[{kind: HTTPRouteGroup, name: gone}, {kind: HTTPRouteGroup, name: routes}]"
    result = compiled(manifest(target(rules)), manifest(group()))
    assert [p.http for p in result.permissions] == [(ANY_PATH,)]
    assert (problem(result).reason, problem(result).field) == ("RouteGroupNotFound", "spec.rules[0].name")
    assert "there is no HTTPRouteGroup shop/gone" in problem(result).message


def test_a_match_that_the_group_does_not_have_grants_nothing_and_the_others_still_do() -> None:
    text = target("[{kind: HTTPRouteGroup, name: routes, matches: [read, bye]}]")
    result = compiled(manifest(text), manifest(group(ROUTES)))
    assert [p.http for p in result.permissions] == [(READ,)]
    assert (problem(result).reason, problem(result).field) == ("MatchNotFound", "spec.rules[0].matches[1]")
    assert "has no match bye" in problem(result).message


def test_a_target_that_grants_nothing_at_all_makes_no_permission_and_says_so() -> None:
    """An empty list of matches must not reach a generator that could take it for any request."""
    result = compiled(manifest(target("[{kind: HTTPRouteGroup, name: routes, matches: [bye]}]")), manifest(group()))
    assert result.permissions == ()
    assert reasons(result) == [("buyers", "GrantsNothing"), ("buyers", "MatchNotFound")]


@pytest.mark.parametrize("missing", ["destination", "rules", "sources"])
def test_destination_rules_and_sources_are_required(missing: str) -> None:
    text = "\n".join(line for line in target().splitlines() if not line.startswith(f"  {missing}:"))
    assert refused(text) == f"spec.{missing}: is missing (add {missing})"


@pytest.mark.parametrize("empty", ["rules", "sources"])
def test_at_least_one_rule_and_one_source_are_required(empty: str) -> None:
    lists = {"rules": target(rules="[]"), "sources": target(sources="[]")}
    assert refused(lists[empty]) == f"spec.{empty}: the list is empty, and at least one is needed"


def test_what_is_compiled_does_not_depend_on_the_order_of_the_manifests() -> None:
    sources = "[{kind: ServiceAccount, name: b}, {kind: ServiceAccount, name: a}, {kind: ServiceAccount, name: b}]"
    manifests = [manifest(t) for t in (target(name="b"), target(name="a", sources=sources), group(ROUTES))]
    (rules,) = {compiled(*order) for order in itertools.permutations(manifests)}
    assert [p.manifest.rpartition("/")[2] for p in rules.permissions] == ["a", "b"]
    assert rules.permissions[0].sources == (Identity("shop", "a"), Identity("shop", "b"))


def test_an_invalid_manifest_hurts_only_itself() -> None:
    good = [manifest(target(name="good")), manifest(group())]
    broken = manifest(target(name="broken")).record
    stored = Manifest(replace(broken, object={**broken.object, "spec": {"sources": 1}}), 1)
    result = compiled(stored, *good)
    assert result.permissions == compiled(*good).permissions
    assert {m for m, _ in reasons(result)} == {"broken"}


def test_a_version_that_is_not_read_grants_nothing_and_says_so() -> None:
    record = manifest(target()).record
    newer = {**record.object, "apiVersion": "access.smi-spec.io/v1alpha9"}
    result = compiled(Manifest(replace(record, version="v1alpha9", object=newer), 1), manifest(group()))
    assert result.permissions == ()
    assert "v1alpha9" in problem(result).message


def test_what_was_read_before_is_never_taken_for_what_was_written_since() -> None:
    routes, access = manifest(group(ROUTES)), manifest(target())
    before = compiled(routes, access)
    newer = Manifest(manifest(group("[{name: x, pathRegex: /x}]")).record, 2)
    assert compiled(newer, access).permissions[0].http == (HttpMatch("(?:/x).*"),)
    assert compiled(routes, access) == before
