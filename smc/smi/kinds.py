"""The kinds of SMI and what each version of them may hold.

The published text leaves some cases open, and in some the common way to read it would widen access or move traffic that
nobody meant to move. Those are refused when they are written: an empty `matches`, a split whose root is one of its own
backends, weights that are all 0, and every name of another namespace.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from smc.manifests import Kind, expressions, kinds, schema
from smc.manifests.findings import Unfit, shown
from smc.manifests.kinds import Metadata, Schema
from smc.manifests.schema import Field, Integer, ListOf, MapOf, Object, OneOf, Shape, Text, Within
from smc.model import Backend, HttpMatch, Identity, Name

SPLIT = "split.smi-spec.io"
ACCESS = "access.smi-spec.io"
SPECS = "specs.smi-spec.io"
GROUPS = frozenset({SPLIT, ACCESS, SPECS})

HTTP_ROUTES = "HTTPRouteGroup"
TCP_ROUTE = "TCPRoute"
UDP_ROUTE = "UDPRoute"

MILLI = 1000
"""A whole weight in thousandths, which is what v1alpha1 needs: its weights are quantities, such as `500m`."""
MOST = 1_000_000
"""The largest weight, in wholes."""


# ------------------------------------------------------------------------------------------------------- TrafficSplit


@dataclass(frozen=True, slots=True)
class TrafficSplit:
    root: Name
    backends: tuple[Backend, ...]
    matches: tuple[str, ...] = ()
    """The route groups whose requests it is for, as one group; empty: every request."""


_DOTTED = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?){0,20}")


def _service_name(text: str) -> tuple[str, str]:
    """(name, namespace or "") of `name`, `name.namespace` and `name.namespace.<any domain>`."""
    if len(text) > 253 or not _DOTTED.fullmatch(text):
        raise Unfit(f"{shown(text)} names no service", "write <name>, <name>.<namespace> or its full domain name")
    name, _, rest = text.partition(".")
    return schema.label(name), schema.label(rest.partition(".")[0]) if rest else ""


def _split_spec(
    service: tuple[str, str],
    backends: tuple[tuple[tuple[str, str], int], ...],
    matches: tuple[str, ...] | None = None,
) -> Callable[[Metadata], TrafficSplit]:
    def of(metadata: Metadata) -> TrafficSplit:
        own = metadata.name.namespace
        for field, (name, namespace) in (
            ("spec.service", service),
            *((f"spec.backends[{i}].service", backend) for i, (backend, _) in enumerate(backends)),
        ):
            if namespace not in ("", own):
                raise Unfit(
                    f"{name} of namespace {namespace} in a split of namespace {own}",
                    "a split is written in the namespace of its root, and its backends are there too",
                    field=field,
                )
        for i, ((name, _), _weight) in enumerate(backends):
            if name == service[0]:
                raise Unfit(
                    f"{name} is the root of this split, and cannot be its own backend",
                    "give the endpoints that are meant a service of their own",
                    field=f"spec.backends[{i}].service",
                )
        if not any(weight for _, weight in backends):
            raise Unfit(
                "every weight is 0, so nobody would get the traffic",
                "raise one of them, or delete the split to send it to the root",
                field="spec.backends",
            )
        return TrafficSplit(
            Name(own, service[0]),
            tuple(Backend(name, weight) for (name, _), weight in backends),
            matches or (),
        )

    return of


_QUANTITY = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:e([+-]?[0-9]{1,2})|([numkMGTPE]|[KMGTPE]i)?)", re.IGNORECASE
)
_SUFFIXES = {
    "": Fraction(1),
    **{suffix: Fraction(1, 1000**n) for n, suffix in enumerate("mun", 1)},
    **{suffix: Fraction(1000**n) for n, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Fraction(1024**n) for n, suffix in enumerate("KMGTPE", 1)},
}


@dataclass(frozen=True, slots=True)
class _Whole:
    """A weight that is a whole number, read in thousandths."""

    def read(self, node: Any, field: str, findings: Any) -> Any:
        value = Integer(0, MOST).read(node, field, findings)
        return value if value is schema.BAD else value * MILLI


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A weight as Kubernetes writes resources, `1`, `0.5` or `"500m"`, read in thousandths: 1 is 1000m."""

    def read(self, node: Any, field: str, findings: Any) -> Any:
        wholes = _Whole()
        text = Text(_thousandths)
        if isinstance(node.value, float):  # a stored object has no raw text, and both must read alike
            try:
                return _thousandths(repr(node.value))
            except Unfit as e:
                return findings.unfit(node, field, e)
        return OneOf({int: wholes, str: text}, "quantity").read(node, field, findings)


def _thousandths(text: str) -> int:
    match = _QUANTITY.fullmatch(text) if len(text) <= 40 else None
    number, exponent, suffix = match.groups() if match else ("", None, "?")
    if (suffix or "") not in _SUFFIXES:
        raise Unfit(f"{shown(text)} is no quantity", 'write one such as 1, 0.5 or "500m"')
    weight = Fraction(number) * _SUFFIXES[suffix or ""] * Fraction(10) ** int(exponent or 0) * MILLI
    if not 0 <= weight <= MOST * MILLI:
        raise Unfit(f"{text} is not from 0 to {MOST}")
    if weight.denominator != 1:
        raise Unfit(
            f"{text} is no whole number of thousandths", "multiply every weight of the split: only ratios count"
        )
    return int(weight)


_SERVICE = Field("service", Text(_service_name), required=True)


def _backends(weight: Shape) -> Field:
    backend = Object((_SERVICE, Field("weight", weight, required=True)), lambda service, weight: (service, weight))
    return Field(
        "backends",
        ListOf(backend, least=1, most=100, unique=lambda b: b[0][0], named=lambda b: f"backend {b[0][0]}"),
        required=True,
    )


_NO_MATCHES = dict.fromkeys(("TCPRoute", "UDPRoute"), "a split tells HTTP requests apart")
_ROUTE_GROUP_REFERENCE = Object(
    (
        Field("apiGroup", Text(schema.choice({SPECS: SPECS}))),
        Field("kind", Text(schema.choice({"HTTPRouteGroup": "HTTPRouteGroup"}, refused=_NO_MATCHES)), required=True),
        Field("name", Text(schema.subdomain), required=True),
    ),
    lambda _group, _kind, name: name,
)
_SPLIT_MATCHES = Field(
    "matches",
    ListOf(_ROUTE_GROUP_REFERENCE, least=1, most=100, unique=str, empty="leave matches out to split every request"),
)
_NO_PORT = {"port": "a split is for every port of its root: remove it"}


def _spec(*fields: Field, build: Callable[..., Any], strange: dict[str, str] | None = None) -> Schema:
    """A schema whose fields are all under `spec`; `build` makes of them a function of the metadata."""
    spec = Field("spec", Object(fields, build, strange or {}), required=True)
    moved = dict.fromkeys((f.name for f in fields), "in this version it is under spec")
    return Schema((spec,), lambda metadata, of: of(metadata), moved)


def _top(*fields: Field, build: Callable[..., Any], strange: dict[str, str] | None = None) -> Schema:
    """A schema of the versions that have no `spec`; `build` makes of the fields a function of the metadata."""
    hints = {"spec": "this version has none: its fields are at the top"}
    return Schema(fields, lambda metadata, *values: build(*values)(metadata), hints | (strange or {}))


def _split(weight: Shape, *more: Field, strange: dict[str, str]) -> Schema:
    return _spec(_SERVICE, _backends(weight), *more, build=_split_spec, strange=_NO_PORT | strange)


_MATCHES_CAME = {"matches": "it came with v1alpha3: write that version"}
_SPLITS = {
    "v1alpha1": _split(_Quantity(), strange=_MATCHES_CAME),
    "v1alpha2": _split(_Whole(), strange=_MATCHES_CAME),
    "v1alpha3": _split(_Whole(), _SPLIT_MATCHES, strange={}),
    "v1alpha4": _split(_Whole(), _SPLIT_MATCHES, strange={}),
}


# ------------------------------------------------------------------------------------------------------ TrafficTarget


@dataclass(frozen=True, slots=True)
class RouteReference:
    kind: str
    name: str
    """In the namespace of the TrafficTarget."""
    matches: tuple[str, ...] | None
    """Names of matches; None: all of them."""


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    destination: Identity | Name
    """An identity, or the name of an IdentityBinding."""
    sources: tuple[Identity, ...]
    """Sorted."""
    rules: tuple[RouteReference, ...]
    port: int | None = None
    """The one port of the destination that it is for; None: it says nothing of ports, and the rules may."""
    rules_field: str = "spec.rules"
    """Where the version has the rules."""
    bindings: tuple[Name, ...] = ()
    """IdentityBindings that are sources too; sorted."""


SERVICE_ACCOUNT = "ServiceAccount"
IDENTITY_BINDING = "IdentityBinding"
_NO_IDENTITY = {
    "Group": "only service accounts are identities of workloads",
    "User": "only service accounts are identities of workloads",
    "Service": "access is granted to identities, not to services",
}


def _identity_fields(*kinds: str, refused: dict[str, str]) -> tuple[Field, ...]:
    return (
        Field("kind", Text(schema.choice({kind: kind for kind in kinds}, refused=refused)), required=True),
        Field("name", Text(schema.subdomain), required=True),
        Field("namespace", Text(schema.label), default=""),
    )


_ACCOUNT = _identity_fields(
    SERVICE_ACCOUNT, refused=_NO_IDENTITY | {IDENTITY_BINDING: "it came with v1alpha4: write that version"}
)
_EITHER = (
    *_identity_fields(SERVICE_ACCOUNT, IDENTITY_BINDING, refused=_NO_IDENTITY),
    Field("group", Text(schema.choice({ACCESS: ACCESS, "": ""})), default=""),
)
_NO_PORT_HERE = {"port": "since v1alpha3 ports come from a TCPRoute in spec.rules: name one instead"}
_IDENTITY = Object(_ACCOUNT, lambda kind, name, namespace: (kind, namespace, name))
_IDENTITY_V1ALPHA4 = Object(_EITHER, lambda kind, name, namespace, _group: (kind, namespace, name))
_DESTINATION_WITH_PORT = Object(
    (*_ACCOUNT, Field("port", Integer(1, 65535))),
    lambda kind, name, namespace, port: (kind, namespace, name, port),
)
_DESTINATION = Object(_ACCOUNT, lambda kind, name, namespace: (kind, namespace, name, None), _NO_PORT_HERE)
_DESTINATION_V1ALPHA4 = Object(
    _EITHER, lambda kind, name, namespace, _group: (kind, namespace, name, None), _NO_PORT_HERE
)
_MATCH_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")


def _match_name(text: str) -> str:
    if not _MATCH_NAME.fullmatch(text):
        raise Unfit(f"{shown(text)} names no match: letters, digits and ._- , at most 253")
    return text


_MATCHES_OF_A_RULE = ListOf(
    Text(_match_name), least=1, unique=str, empty="leave matches out to allow every match of the group"
)


def _route_reference(kind: str, name: str, matches: tuple[str, ...] | None) -> RouteReference:
    if matches is not None and kind != HTTP_ROUTES:
        raise Unfit(f"a {kind} has no matches to choose from", "remove it", field="matches")
    return RouteReference(kind, name, matches)


def _rules(name: str, *kinds: str, refused: dict[str, str] | None = None) -> Field:
    rule = Object(
        (
            Field("kind", Text(schema.choice({kind: kind for kind in kinds}, refused=refused)), required=True),
            Field("name", Text(schema.subdomain), required=True),
            Field("matches", _MATCHES_OF_A_RULE),
        ),
        _route_reference,
        {"namespace": "routes are looked for in the namespace of the TrafficTarget: remove it"},
    )
    return Field(name, ListOf(rule, least=1, most=100), required=True)


def _target(top: str, rules_name: str) -> Callable[..., Callable[[Metadata], TrafficTarget]]:
    """Makes the noun of a version that has its fields below `top`, and calls the rules `rules_name`."""

    def fields(
        destination: tuple[str, str, str, int | None],
        rules: tuple[RouteReference, ...],
        sources: tuple[tuple[str, str, str], ...],
    ) -> Callable[[Metadata], TrafficTarget]:
        def of(metadata: Metadata) -> TrafficTarget:
            own = metadata.name.namespace
            kind, namespace, name, port = destination
            where = namespace or own
            named = [(kind_, namespace_ or own, source) for kind_, namespace_, source in sources]
            return TrafficTarget(
                Name(where, name) if kind == IDENTITY_BINDING else Identity(where, name),
                tuple(sorted({Identity(*who) for kind_, *who in named if kind_ == SERVICE_ACCOUNT})),
                rules,
                port,
                f"{top}{rules_name}",
                tuple(sorted({Name(*who) for kind_, *who in named if kind_ == IDENTITY_BINDING})),
            )

        return of

    return fields


def _sources(identity: Shape) -> Field:
    return Field("sources", ListOf(identity, least=1), required=True)


_SOURCES = _sources(_IDENTITY)
_NO_UDP = {UDP_ROUTE: "it came with v1alpha3: write that version"}
_RENAMED = {"specs": "since v1alpha2 they are called rules"}
_TARGETS = {
    "v1alpha1": _top(
        Field("destination", _DESTINATION_WITH_PORT, required=True),
        _rules("specs", HTTP_ROUTES, TCP_ROUTE, refused=_NO_UDP),
        _SOURCES,
        build=_target("", "specs"),
        strange={"rules": "in v1alpha1 they are called specs"},
    ),
    "v1alpha2": _spec(
        Field("destination", _DESTINATION_WITH_PORT, required=True),
        _rules("rules", HTTP_ROUTES, TCP_ROUTE, refused=_NO_UDP),
        _SOURCES,
        build=_target("spec.", "rules"),
        strange=_RENAMED,
    ),
    "v1alpha3": _spec(
        Field("destination", _DESTINATION, required=True),
        _rules("rules", HTTP_ROUTES, TCP_ROUTE, UDP_ROUTE),
        _SOURCES,
        build=_target("spec.", "rules"),
        strange=_RENAMED,
    ),
    "v1alpha4": _spec(
        Field("destination", _DESTINATION_V1ALPHA4, required=True),
        _rules("rules", HTTP_ROUTES, TCP_ROUTE, UDP_ROUTE),
        _sources(_IDENTITY_V1ALPHA4),
        build=_target("spec.", "rules"),
        strange=_RENAMED,
    ),
}


# ---------------------------------------------------------------------------------------------------- IdentityBinding


@dataclass(frozen=True, slots=True)
class IdentityBinding:
    """Alternatives, all within its own namespace."""

    labels: tuple[tuple[str, str], ...]
    """Sorted; empty: none so."""
    uris: tuple[str, ...]
    service_account: str


_SPIFFE = re.compile(r"(?:spiffe://)?([a-z0-9._-]{1,255}(?:/[A-Za-z0-9._-]+)+)")
_WORKLOAD = re.compile(r"spiffe://[^/]+/ns/([^/]+)/sa/[^/]+")


def _spiffe_id(text: str) -> str:
    match = _SPIFFE.fullmatch(text) if len(text) <= 2048 else None
    if match is None:
        raise Unfit(f"{shown(text)} is no SPIFFE ID", "write <trust domain>/ns/<namespace>/sa/<service account>")
    return f"spiffe://{match[1]}"


def _some_label(labels: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    if not labels:
        raise Unfit("no label is given, so every workload would be meant", "name one", field="matchLabels")
    return labels


def _binding(
    labels: tuple[tuple[str, str], ...] | None, uris: tuple[str, ...] | None, account: str | None
) -> Callable[[Metadata], IdentityBinding]:
    def of(metadata: Metadata) -> IdentityBinding:
        own = metadata.name.namespace
        for index, uri in enumerate(uris or ()):
            workload = _WORKLOAD.fullmatch(uri)
            if workload is not None and workload[1] != own:
                raise Unfit(
                    f"an identity of namespace {workload[1]} in a binding of namespace {own}",
                    f"a binding is for identities of its own namespace: write one in namespace {workload[1]}",
                    field=f"spec.schemes.spiffeIdentities[{index}]",
                )
        if not (labels or uris or account):
            raise Unfit(
                "no scheme is given, so nobody would be meant",
                "write podLabelSelector, spiffeIdentities or serviceAccount",
                field="spec.schemes",
            )
        return IdentityBinding(labels or (), uris or (), account or "")

    return of


_SELECTOR = Object(
    (Field("matchLabels", MapOf(kinds.label_key, Text(kinds.label_value), most=100), required=True),),
    _some_label,
    {"matchExpressions": "only matchLabels is read"},
)
_BINDING = _spec(
    Field(
        "schemes",
        Object(
            (
                Field("podLabelSelector", _SELECTOR),
                Field("spiffeIdentities", ListOf(Text(_spiffe_id), unique=str)),
                Field("serviceAccount", Text(schema.subdomain)),
            ),
            _binding,
        ),
        required=True,
    ),
    build=lambda of: of,
)


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


_NAME = Field("name", Text(_match_name), required=True)
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
    "v1alpha1": _top(_matches(_MATCH_V1ALPHA1), build=_group),
    "v1alpha2": _top(_matches(_MATCH), build=_group),
    "v1alpha3": _spec(_matches(_MATCH), build=_group),
    "v1alpha4": _spec(_matches(_MATCH), build=_group),
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
        (Field("name", Text(_match_name)), Field("ports", ListOf(Integer(1, 65535), unique=int), default=())),
        lambda _name, ports: ports,
        {"port": "write ports: [8080]"},
    )
    spec = Object((Field("matches", matches, default=()),), _port_route(kind))
    return Schema((Field("spec", spec, default=_port_route(kind)()),), lambda metadata, of: of(metadata))


_PORTS_CAME = {"matches": "ports came with v1alpha4: write that version"}
_TCP_ROUTES = {
    "v1alpha1": _top(build=_port_route(TCP_ROUTE)),
    "v1alpha2": _top(build=_port_route(TCP_ROUTE)),
    "v1alpha3": Schema(
        (Field("spec", Object((), _port_route(TCP_ROUTE), _PORTS_CAME), default=_port_route(TCP_ROUTE)()),),
        lambda metadata, of: of(metadata),
    ),
    "v1alpha4": _v1alpha4(TCP_ROUTE),
}

KINDS: tuple[Kind, ...] = (
    Kind(SPLIT, "TrafficSplit", "trafficsplits", ("ts",), _SPLITS),
    Kind(ACCESS, "TrafficTarget", "traffictargets", ("tt",), _TARGETS),
    Kind(ACCESS, IDENTITY_BINDING, "identitybindings", ("ib",), {"v1alpha4": _BINDING}),
    Kind(SPECS, HTTP_ROUTES, "httproutegroups", ("htr",), _GROUPS),
    Kind(SPECS, TCP_ROUTE, "tcproutes", ("tr",), _TCP_ROUTES),
    Kind(SPECS, UDP_ROUTE, "udproutes", ("ur",), {"v1alpha4": _v1alpha4(UDP_ROUTE)}),
)
"""What `smc.manifests.read` needs to know of SMI."""
