"""The kinds of SMI and what each version of them may hold.

The published text leaves some cases open, and in some the common way to read it would widen access or move traffic that
nobody meant to move. Those are refused when they are written: an empty `matches`, a split whose root is one of its own
backends, weights that are all 0, and every name of another namespace.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smc.manifests import Kind, expressions, schema
from smc.manifests.findings import Unfit, shown
from smc.manifests.kinds import Metadata, Schema
from smc.manifests.schema import Field, Integer, ListOf, MapOf, Object, OneOf, Text, Within
from smc.model import Backend, HttpMatch, Identity, Name

SPLIT = "split.smi-spec.io"
ACCESS = "access.smi-spec.io"
SPECS = "specs.smi-spec.io"
GROUPS = frozenset({SPLIT, ACCESS, SPECS})

MILLI = 1000
"""A whole weight in thousandths, which is what versions with fractions of one need."""


# ------------------------------------------------------------------------------------------------------- TrafficSplit


@dataclass(frozen=True, slots=True)
class TrafficSplit:
    root: Name
    backends: tuple[Backend, ...]
    matches: tuple[str, ...] = ()
    """The route groups whose requests it is for; empty: every request."""


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
            tuple(Backend(name, weight * MILLI) for (name, _), weight in backends),
            matches or (),
        )

    return of


_BACKEND = Object(
    (Field("service", Text(_service_name), required=True), Field("weight", Integer(0, 1_000_000), required=True)),
    lambda service, weight: (service, weight),
)
_SERVICE = Field("service", Text(_service_name), required=True)
_BACKENDS = Field(
    "backends",
    ListOf(_BACKEND, least=1, most=100, unique=lambda b: b[0][0], named=lambda b: f"backend {b[0][0]}"),
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
    return Schema((spec,), lambda metadata, of: of(metadata))


_SPLIT_V1ALPHA2 = _spec(
    _SERVICE,
    _BACKENDS,
    build=_split_spec,
    strange=_NO_PORT | {"matches": "v1alpha2 has none: it came with v1alpha3"},
)
_SPLIT_V1ALPHA4 = _spec(_SERVICE, _BACKENDS, _SPLIT_MATCHES, build=_split_spec, strange=_NO_PORT)


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
    destination: Identity
    sources: tuple[Identity, ...]
    """Sorted."""
    rules: tuple[RouteReference, ...]


_NO_IDENTITY = {
    "IdentityBinding": "v1alpha3 knows ServiceAccount only",
    "Group": "only service accounts are identities of workloads",
    "User": "only service accounts are identities of workloads",
    "Service": "access is granted to identities, not to services",
}
_IDENTITY = Object(
    (
        Field("kind", Text(schema.choice({"ServiceAccount": "ServiceAccount"}, refused=_NO_IDENTITY)), required=True),
        Field("name", Text(schema.subdomain), required=True),
        Field("namespace", Text(schema.label), default=""),
    ),
    lambda _kind, name, namespace: (namespace, name),
    {"port": "since v1alpha3 ports come from the routes in spec.rules: remove it"},
)
_MATCH_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")


def _match_name(text: str) -> str:
    if not _MATCH_NAME.fullmatch(text):
        raise Unfit(f"{shown(text)} names no match: letters, digits and ._- , at most 253")
    return text


_MATCHES_OF_A_RULE = ListOf(
    Text(_match_name), least=1, unique=str, empty="leave matches out to allow every match of the group"
)
_RULE = Object(
    (
        Field(
            "kind",
            Text(schema.choice({kind: kind for kind in ("HTTPRouteGroup", "TCPRoute", "UDPRoute")})),
            required=True,
        ),
        Field("name", Text(schema.subdomain), required=True),
        Field("matches", _MATCHES_OF_A_RULE),
    ),
    RouteReference,
    {"namespace": "routes are looked for in the namespace of the TrafficTarget: remove it"},
)


def _target_spec(
    destination: tuple[str, str], rules: tuple[RouteReference, ...], sources: tuple[tuple[str, str], ...]
) -> Callable[[Metadata], TrafficTarget]:
    def of(metadata: Metadata) -> TrafficTarget:
        own = metadata.name.namespace
        namespace, name = destination
        if namespace not in ("", own):
            raise Unfit(
                f"the destination is of namespace {namespace}, the TrafficTarget of {own}",
                f"whoever owns the destination grants the access: write it in namespace {namespace}",
                field="spec.destination.namespace",
            )
        identities = {Identity(source_namespace or own, source) for source_namespace, source in sources}
        return TrafficTarget(Identity(own, name), tuple(sorted(identities)), rules)

    return of


_TARGET = _spec(
    Field("destination", _IDENTITY, required=True),
    Field("rules", ListOf(_RULE, least=1, most=100), required=True),
    Field("sources", ListOf(_IDENTITY, least=1), required=True),
    build=_target_spec,
    strange={"specs": "since v1alpha2 they are called rules"},
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


_MATCH = Object(
    (
        Field("name", Text(_match_name), required=True),
        Field("pathRegex", Text(expressions.prefix)),
        Field(
            "methods",
            ListOf(
                Text(schema.choice({method: method for method in (_ANY, *_METHODS)})),
                least=1,
                unique=str,
                empty="leave methods out, or write ['*'], to match any",
            ),
        ),
        Field("headers", _HeadersShape()),
    ),
    _match,
    {"path": "write pathRegex", "method": "write methods: [GET]"},
)
_MATCHES = ListOf(_MATCH, least=1, unique=lambda match: match[0], named=lambda match: f"match {match[0]}")
_GROUP = _spec(
    # Every replica and every proxy of the destination compiles all of its expressions.
    Field("matches", Within(_MATCHES, characters=64 * 1024), required=True),
    build=lambda matches: lambda _metadata: RouteGroup(matches),
)

KINDS: tuple[Kind, ...] = (
    Kind(SPLIT, "TrafficSplit", "trafficsplits", ("ts",), {"v1alpha2": _SPLIT_V1ALPHA2, "v1alpha4": _SPLIT_V1ALPHA4}),
    Kind(ACCESS, "TrafficTarget", "traffictargets", ("tt",), {"v1alpha3": _TARGET}),
    Kind(SPECS, "HTTPRouteGroup", "httproutegroups", ("htr",), {"v1alpha4": _GROUP}),
)
"""What `smc.manifests.read` needs to know of SMI."""
