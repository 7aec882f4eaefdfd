"""specs.smi-spec.io: HTTPRouteGroup, TCPRoute and UDPRoute."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smc.manifests import Kind, expressions, schema
from smc.manifests.findings import Unfit, shown
from smc.manifests.kinds import Metadata, Schema
from smc.manifests.schema import Field, Integer, ListOf, MapOf, Object, OneOf, Shape, Text, Within
from smc.model import HttpMatch
from smc.smi.schemas import at_top, under_spec

SPECS = "specs.smi-spec.io"

HTTP_ROUTES = "HTTPRouteGroup"
TCP_ROUTE = "TCPRoute"
UDP_ROUTE = "UDPRoute"

_MATCH_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")


def match_name(text: str) -> str:
    """What a match is called, where it is written and where it is named."""
    if not _MATCH_NAME.fullmatch(text):
        raise Unfit(f"{shown(text)} names no match: letters, digits and ._- , at most 253")
    return text


# ----------------------------------------------------------------------------------------------------- HTTPRouteGroup


@dataclass(frozen=True, slots=True)
class RouteGroup:
    matches: tuple[tuple[str, HttpMatch], ...]
    """(name, what it matches), as written."""


_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_ANY = "*"
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,200}")
_PSEUDO = {":path": "write pathRegex", ":method": "write methods"}
AUTHORITY = ":authority"


def _header(text: str) -> str:
    """The lower-case name of a header; `host` is what HTTP/2 calls :authority."""
    name = text.lower()
    if name in ("host", AUTHORITY):
        return AUTHORITY
    if not _HEADER.fullmatch(name):
        raise Unfit(f"{shown(text)} is no name of a header", _PSEUDO.get(name, ""))
    return name


Headers = tuple[tuple[str, str], ...]


def _distinct(headers: Headers) -> Headers:
    """All of them, sorted, unless one is there twice."""
    names = [name for name, _ in headers]
    for name in names:
        if names.count(name) > 1:
            raise Unfit(f"header {name} is there twice", "one expression for each header; a|b is either")
    return tuple(sorted(headers))


@dataclass(frozen=True, slots=True)
class _HeadersShape:
    """A map, as the specification's text has it, or a list of maps with one key each, as real manifests do."""

    def read(self, node: Any, field: str, findings: Any) -> Any:
        one = MapOf(_header, Text(expressions.whole), most=100)
        several = ListOf(one, least=1, most=100, empty="leave headers out to match any")
        value = OneOf({dict: one, list: several}, "map").read(node, field, findings)
        if value is schema.BAD:
            return value
        headers = tuple(pair for pairs in value for pair in pairs) if isinstance(node.value, list) else value
        if not headers:
            return findings.add(node, field, "no header is named", "leave headers out to match any")
        try:
            return _distinct(headers)
        except Unfit as e:
            return findings.unfit(node, field, e)


def _match(
    name: str, path: str | None, methods: tuple[str, ...] | None, headers: Headers | None
) -> tuple[str, HttpMatch]:
    any_method = methods is None or _ANY in methods
    return name, HttpMatch(path, () if any_method else tuple(sorted(methods or ())), headers or ())


_NAME = Field("name", Text(match_name), required=True)
_METHODS_OF_A_MATCH = ListOf(
    Text(schema.choice({method: method for method in (_ANY, *_METHODS)})),
    least=1,
    unique=str,
    empty="leave methods out, or write ['*'], to match any",
)
_MISSPELT = {"path": "write pathRegex", "method": "write methods: [GET]"}
_MATCH_V1ALPHA1 = Object(
    (
        _NAME,
        Field("pathRegex", Text(expressions.prefix), required=True),
        Field("methods", _METHODS_OF_A_MATCH, required=True),
    ),
    lambda name, path, methods: _match(name, path, methods, None),
    _MISSPELT | {"headers": "they came with v1alpha2: write that version"},
)
_MATCH = Object(
    (
        _NAME,
        Field("pathRegex", Text(expressions.prefix)),
        Field("methods", _METHODS_OF_A_MATCH),
        Field("headers", _HeadersShape()),
    ),
    _match,
    _MISSPELT,
)


def _matches(match: Shape) -> Field:
    matches = ListOf(match, least=1, unique=lambda m: m[0], named=lambda m: f"match {m[0]}")
    # Every replica and every proxy of the destination compiles all of its expressions.
    return Field("matches", Within(matches, characters=64 * 1024), required=True)


def _group(matches: tuple[tuple[str, HttpMatch], ...]) -> Callable[[Metadata], RouteGroup]:
    return lambda _metadata: RouteGroup(matches)


_GROUPS = {
    "v1alpha1": at_top(_matches(_MATCH_V1ALPHA1), build=_group),
    "v1alpha2": at_top(_matches(_MATCH), build=_group),
    "v1alpha3": under_spec(_matches(_MATCH), build=_group),
    "v1alpha4": under_spec(_matches(_MATCH), build=_group),
}


# ------------------------------------------------------------------------------------------------ TCPRoute, UDPRoute


@dataclass(frozen=True, slots=True)
class PortRoute:
    """A TCPRoute or a UDPRoute: ports of a destination."""

    kind: str
    ports: tuple[int, ...] | None
    """Sorted; None: every port."""


def _port_route(kind: str) -> Callable[..., Callable[[Metadata], PortRoute]]:
    def of(ports: tuple[int, ...] | None = None) -> Callable[[Metadata], PortRoute]:
        return lambda _metadata: PortRoute(kind, tuple(sorted(ports)) if ports else None)

    return of


def _v1alpha4(kind: str) -> Schema:
    matches = Object(
        (Field("name", Text(match_name)), Field("ports", ListOf(Integer(1, 65535), unique=int), default=())),
        lambda _name, ports: ports,
        {"port": "write ports: [8080]"},
    )
    spec = Object((Field("matches", matches, default=()),), _port_route(kind))
    return Schema((Field("spec", spec, default=_port_route(kind)()),), lambda metadata, of: of(metadata))


_PORTS_CAME = {"matches": "ports came with v1alpha4: write that version"}
_TCP_ROUTES = {
    "v1alpha1": at_top(build=_port_route(TCP_ROUTE)),
    "v1alpha2": at_top(build=_port_route(TCP_ROUTE)),
    "v1alpha3": Schema(
        (Field("spec", Object((), _port_route(TCP_ROUTE), _PORTS_CAME), default=_port_route(TCP_ROUTE)()),),
        lambda metadata, of: of(metadata),
    ),
    "v1alpha4": _v1alpha4(TCP_ROUTE),
}


KINDS: tuple[Kind, ...] = (
    Kind(SPECS, HTTP_ROUTES, "httproutegroups", ("htr",), _GROUPS),
    Kind(SPECS, TCP_ROUTE, "tcproutes", ("tr",), _TCP_ROUTES),
    Kind(SPECS, UDP_ROUTE, "udproutes", ("ur",), {"v1alpha4": _v1alpha4(UDP_ROUTE)}),
)
