# ruff: noqa: N802 - the identifiers of the rules are in capitals
"""TrafficSplit in every version, rule by rule.

What needs the mesh to be seen, such as which ports and endpoints a backend has, is tested where the mesh is built; what
needs traffic, end to end.
"""

from __future__ import annotations

import itertools

import pytest

from smc.codec import decode, encode
from smc.manifests import Manifest
from smc.model import Backend, HttpMatch, Name, Split
from smc.records import ManifestRecord
from tests.unit.smi.writing import compiled, group, manifest, problem, reasons, refused, split, split_text

ROOT = Name("shop", "store")


VERSIONS = ["v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_split_says_which_backends_get_the_traffic_of_its_root(version: str) -> None:
    written = split(backends="[{service: a, weight: 90}, {service: b, weight: 10}]", version=version, mod_revision=7)
    rules = compiled(written)
    id_ = "split.smi-spec.io/TrafficSplit/shop/store"
    assert rules.splits == (Split(id_, 7, ROOT, (Backend("a", 90_000), Backend("b", 10_000))),)
    assert rules.problems == ()
    assert rules.permissions == ()


@pytest.mark.parametrize(
    "service", ["store", "store.shop", "store.shop.svc", "store.shop.svc.cluster.local", "store.shop.mesh.internal"]
)
def test_SPLIT_1_the_root_is_named_short_by_namespace_or_by_its_full_name(service: str) -> None:
    assert [s.root for s in compiled(split(service)).splits] == [ROOT]


@pytest.mark.parametrize(
    "service", ["store.", ".shop", "store..shop", "Store", "store/shop", "''", "'-'", "'*'", "a" * 64]
)
def test_SPLIT_1_what_names_no_service_is_refused(service: str) -> None:
    assert refused(split_text(service)).startswith("spec.service: ")


def test_SPLIT_2_a_root_in_another_namespace_is_refused() -> None:
    """Otherwise whoever may write in one namespace could move the traffic of every other."""
    assert refused(split_text("store.bank.svc.cluster.local")) == (
        "spec.service: store of namespace bank in a split of namespace shop "
        "(a split is written in the namespace of its root, and its backends are there too)"
    )


def test_SPLIT_2_a_backend_in_another_namespace_is_refused() -> None:
    text = split_text(backends="[{service: v1.shop, weight: 1}, {service: v2.bank, weight: 1}]")
    assert refused(text).startswith("spec.backends[1].service: v2 of namespace bank")


def test_SPLIT_3_weights_are_relative_and_kept_in_thousandths() -> None:
    (one,) = compiled(split(backends="[{service: a, weight: 1000}, {service: b, weight: 500}]")).splits
    assert [b.weight for b in one.backends] == [1_000_000, 500_000]


def test_SPLIT_3_a_weight_of_0_is_kept_so_that_nothing_goes_there() -> None:
    (one,) = compiled(split(backends="[{service: a, weight: 1}, {service: b, weight: 0}]")).splits
    assert one.backends == (Backend("a", 1000), Backend("b", 0))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        ("0.5", "0.5 is not a whole number (write an integer from 0 to 1000000)"),
        ("-1", "-1 is not from 0 to 1000000"),
        ("500m", 'must be an integer, not the string "500m"'),
        ("'50'", 'must be an integer, not the string "50" (remove the quotes: 50)'),
        ("true", "must be an integer, not the boolean true"),
        ("1000001", "1000001 is not from 0 to 1000000"),
        (
            "99999999999999999999999",
            "99999999999999999999999 is not a whole number (write an integer from 0 to 1000000)",
        ),
        ("010", "010 begins with 0, which some readers take for octal (write 10)"),
        ("", "must be an integer, and is empty (give it a value, or remove the line)"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS[1:])
def test_SPLIT_3_since_v1alpha2_weights_are_whole_numbers(version: str, weight: str, reason: str) -> None:
    text = split_text(backends=f"[{{service: a, weight: {weight}}}]", version=version)
    assert refused(text) == f"spec.backends[0].weight: {reason}"


def test_SPLIT_3_the_same_backend_twice_is_refused() -> None:
    text = split_text(backends="[{service: a, weight: 1}, {service: a.shop, weight: 2}]")
    assert refused(text) == "spec.backends[1]: backend a is in the list twice (it is at spec.backends[0] too)"


def test_SPLIT_4_a_split_has_no_ports_of_its_own() -> None:
    """Which ports a backend must have, and the Problem if it lacks one, is for the mesh to say: it knows services."""
    text = split_text(more="port: 80")
    assert refused(text) == "spec.port: unknown field (a split is for every port of its root: remove it)"


def test_SPLIT_5_a_backend_that_does_not_exist_yet_is_no_problem_here() -> None:
    """The mesh tells that nobody is behind it, as soon as it is built."""
    rules = compiled(split(backends="[{service: not-there-yet, weight: 1}]"))
    assert len(rules.splits) == 1
    assert rules.problems == ()


def test_SPLIT_6_a_root_among_its_own_backends_is_refused() -> None:
    text = split_text("store", "[{service: v1, weight: 1}, {service: store.shop.svc, weight: 1}]")
    assert refused(text) == (
        "spec.backends[1].service: store is the root of this split, and cannot be its own backend "
        "(give the endpoints that are meant a service of their own)"
    )


def test_SPLIT_6_a_backend_that_is_a_root_too_is_not_followed() -> None:
    rules = compiled(
        split("store", "[{service: v1, weight: 1}]", name="one"), split("v1", "[{service: v2, weight: 1}]", name="two")
    )
    assert [(s.root.name, s.backends) for s in rules.splits] == [
        ("store", (Backend("v1", 1000),)),
        ("v1", (Backend("v2", 1000),)),
    ]


MATCHES = "matches: [{kind: HTTPRouteGroup, name: firefox, apiGroup: specs.smi-spec.io}]"


FIREFOX = HttpMatch(headers=(("user-agent", ".*Firefox.*"),))
ROUTES = "[{name: browser, headers: {user-agent: '.*Firefox.*'}}, {name: beta, pathRegex: /beta, methods: [GET]}]"
BETA = HttpMatch("(?:/beta).*", ("GET",))


@pytest.mark.parametrize("version", VERSIONS[2:])
def test_SPLIT_7_a_split_with_matches_is_for_the_requests_that_one_of_them_matches(version: str) -> None:
    rules = compiled(split(more=MATCHES, version=version, mod_revision=7), manifest(group(ROUTES, name="firefox")))
    (one,) = rules.splits
    assert one.matches == (FIREFOX, BETA)
    assert one.also == (("specs.smi-spec.io/HTTPRouteGroup/shop/firefox", 1),)
    assert rules.problems == ()


def test_SPLIT_7_several_groups_are_one() -> None:
    both = "matches: [{kind: HTTPRouteGroup, name: b}, {kind: HTTPRouteGroup, name: a}]"
    one_of_each = [group("[{name: x, pathRegex: /beta, methods: [GET]}]", name="a")]
    one_of_each.append(group("[{name: x, headers: {user-agent: '.*Firefox.*'}}]", name="b"))
    (one,) = compiled(split(more=both), *map(manifest, one_of_each)).splits
    assert one.matches == (FIREFOX, BETA)
    assert [m.rpartition("/")[2] for m, _ in one.also] == ["a", "b"]


def test_SPLIT_7_a_group_that_is_missing_matches_nothing_and_the_others_still_do() -> None:
    both = "matches: [{kind: HTTPRouteGroup, name: gone}, {kind: HTTPRouteGroup, name: a}]"
    rules = compiled(split(more=both), manifest(group(ROUTES, name="a")))
    assert [s.matches for s in rules.splits] == [(FIREFOX, BETA)]
    assert (problem(rules).reason, problem(rules).field) == ("RouteGroupNotFound", "spec.matches[0].name")


def test_SPLIT_7_a_split_whose_groups_are_all_missing_moves_no_request_rather_than_every_request() -> None:
    rules = compiled(split(more=MATCHES), split(name="other"))
    assert [s.manifest for s in rules.splits] == ["split.smi-spec.io/TrafficSplit/shop/other"]
    assert reasons(rules) == [("store", "MatchesNothing"), ("store", "RouteGroupNotFound")]


def test_SPLIT_7_a_group_that_matches_any_request_is_still_a_match() -> None:
    (one,) = compiled(
        split(more=MATCHES), manifest(group("[{name: any}, {name: a, pathRegex: /a}]", name="firefox"))
    ).splits
    assert one.matches == (HttpMatch(),)


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_SPLIT_7_the_first_two_versions_have_no_matches(version: str) -> None:
    text = split_text(version=version, more=MATCHES)
    assert refused(text) == "spec.matches: unknown field (it came with v1alpha3: write that version)"


@pytest.mark.parametrize(
    ("matches", "reason"),
    [
        (
            "[]",
            "spec.matches: the list is empty, and at least one is needed (leave matches out to split every request)",
        ),
        (
            "[{kind: TCPRoute, name: x}]",
            'spec.matches[0].kind: "TCPRoute" is not taken: a split tells HTTP requests apart '
            "(only HTTPRouteGroup is known)",
        ),
        ("[{name: x}]", "spec.matches[0].kind: is missing (add kind)"),
    ],
)
def test_SPLIT_7_matches_name_route_groups(matches: str, reason: str) -> None:
    assert refused(split_text(more=f"matches: {matches}")) == reason


def test_SPLIT_8_without_the_split_nothing_is_left_of_it() -> None:
    """That the root's own endpoints then get the traffic is seen in the mesh."""
    assert compiled().splits == ()


def test_SPLIT_9_of_two_splits_of_one_root_the_older_one_counts() -> None:
    older = split("store.shop", name="z-older", created=1.0)
    younger = split("store", name="a-younger", created=2.0)
    for order in ((older, younger), (younger, older)):
        rules = compiled(*order)
        assert [s.manifest.rpartition("/")[2] for s in rules.splits] == ["z-older"]
        assert reasons(rules) == [("a-younger", "Conflict")]
        assert "shop/store is split by shop/z-older" in problem(rules).message


def test_SPLIT_9_of_two_splits_of_the_same_moment_the_first_by_name_counts() -> None:
    rules = compiled(split(name="b"), split(name="a"))
    assert [s.manifest.rpartition("/")[2] for s in rules.splits] == ["a"]
    assert reasons(rules) == [("b", "Conflict")]


def test_SPLIT_9_of_one_root_those_with_matches_come_first_then_the_oldest_then_the_first_by_name() -> None:
    written = [
        split(name="d", created=0),
        split(name="a", created=2, more=MATCHES),
        split(name="c", created=1, more=MATCHES),
        split(name="b", created=1, more=MATCHES),
        manifest(group(ROUTES, name="firefox")),
    ]
    for order in itertools.permutations(written):
        rules = compiled(*order)
        assert [s.manifest.rpartition("/")[2] for s in rules.splits] == ["b", "c", "a", "d"]
        assert rules.problems == ()


def test_SPLIT_9_only_splits_for_every_request_are_in_each_others_way() -> None:
    rules = compiled(
        split(name="old", created=1), split(name="young", created=2), split(name="some", created=3, more=MATCHES),
        manifest(group(ROUTES, name="firefox")),
    )  # fmt: skip
    assert [s.manifest.rpartition("/")[2] for s in rules.splits] == ["some", "old"]
    assert reasons(rules) == [("young", "Conflict")]


def test_SPLIT_10_weights_that_are_all_0_are_refused() -> None:
    text = split_text(backends="[{service: a, weight: 0}, {service: b, weight: 0}]")
    assert refused(text) == (
        "spec.backends: every weight is 0, so nobody would get the traffic "
        "(raise one of them, or delete the split to send it to the root)"
    )


def test_SPLIT_13_there_is_nothing_in_a_split_that_could_rewrite_the_host() -> None:
    """That Envoy leaves the Host header as it is can be seen in the golden routes."""
    assert set(Split.__slots__) == {"manifest", "mod_revision", "root", "backends", "matches", "also"}
    assert refused(split_text(more="hostRewrite: x")).startswith("spec.hostRewrite: unknown field")


@pytest.mark.parametrize(
    ("weight", "thousandths"),
    [
        ("1", 1000),
        ("500m", 500),
        ("'1'", 1000),
        ("0.5", 500),
        ("'.5'", 500),
        ("1.", 1000),
        ("1e2", 100_000),
        ("'1e-3'", 1),
        ("1k", 1_000_000),
        ("1Ki", 1_024_000),
        ("1000000u", 1000),
        ("1M", 1_000_000_000),
        ("0.1", 100),
    ],
)
def test_SPLIT_14_weights_of_v1alpha1_are_quantities_and_none_is_a_thousand_times_another(
    weight: str, thousandths: int
) -> None:
    """1 is 1000m. To take the digits alone would make 500m five hundred times as heavy as 1."""
    written = split(backends=f"[{{service: a, weight: {weight}}}]", version="v1alpha1")
    (one,) = compiled(written).splits
    assert one.backends == (Backend("a", thousandths),)


def test_SPLIT_14_a_stored_weight_reads_as_the_written_one() -> None:
    written = split(backends="[{service: a, weight: 1}, {service: b, weight: 500m}]", version="v1alpha1")
    assert [b.weight for b in compiled(written).splits[0].backends] == [1000, 500]
    assert compiled(written) == compiled(Manifest(decode(ManifestRecord, encode(written.record)), 1))


def test_SPLIT_14_0m_is_a_weight_that_gets_nothing() -> None:
    written = split(backends="[{service: a, weight: 1}, {service: b, weight: 0m}]", version="v1alpha1")
    assert compiled(written).splits[0].backends == (Backend("a", 1000), Backend("b", 0))
    all_of_them = split_text(backends="[{service: a, weight: 0m}, {service: b, weight: 0.0}]", version="v1alpha1")
    assert refused(all_of_them).startswith("spec.backends: every weight is 0")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        ("-1", "-1 is not from 0 to 1000000"),
        ("-500m", "-500m is not from 0 to 1000000"),
        ("-0.5", "-0.5 is not from 0 to 1000000"),
        ("1000001", "1000001 is not from 0 to 1000000"),
        ("1G", "1G is not from 0 to 1000000"),
        ("'1e99'", "1e99 is not from 0 to 1000000"),
        ("500u", "500u is no whole number of thousandths (multiply every weight of the split: only ratios count)"),
        ("1K", '"1K" is no quantity (write one such as 1, 0.5 or "500m")'),
        ("50%", '"50%" is no quantity (write one such as 1, 0.5 or "500m")'),
        ("''", '"" is no quantity (write one such as 1, 0.5 or "500m")'),
        (".nan", '".nan" is no quantity (write one such as 1, 0.5 or "500m")'),
        ("true", "must be a quantity, not the boolean true"),
        ("010", "010 begins with 0, which some readers take for octal (write 10)"),
    ],
)
def test_SPLIT_14_what_is_no_weight_is_refused_in_v1alpha1_too(weight: str, reason: str) -> None:
    text = split_text(backends=f"[{{service: a, weight: {weight}}}]", version="v1alpha1")
    assert refused(text) == f"spec.backends[0].weight: {reason}"


def test_splits_are_sorted_by_root_however_they_come() -> None:
    splits = [split(root, name=name) for root, name in (("c", "x"), ("a", "z"), ("b", "y"))]
    results = {compiled(*order) for order in itertools.permutations(splits)}
    assert [[s.root.name for s in rules.splits] for rules in results] == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("backends", "reason"),
    [
        ("[]", "spec.backends: the list is empty, and at least one is needed"),
        ("[{service: a}]", "spec.backends[0].weight: is missing (add weight)"),
        ("[{weight: 1}]", "spec.backends[0].service: is missing (add service)"),
        ("{service: a, weight: 1}", "spec.backends: must be a list, not a map (begin each item with '- ')"),
    ],
)
def test_service_backends_and_weights_are_required(backends: str, reason: str) -> None:
    assert refused(split_text(backends=backends)) == reason


def test_a_manifest_of_another_namespace_has_no_effect() -> None:
    elsewhere = manifest(split_text().replace("{name: store}", "{name: store, namespace: bank}"))
    rules = compiled(elsewhere)
    assert rules.splits == ()
    assert reasons(rules) == [("store", "OtherNamespace")]
