"""access.smi-spec.io: TrafficTarget and IdentityBinding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from smc.manifests import Kind, kinds, schema
from smc.manifests.findings import Unfit, shown
from smc.manifests.kinds import Metadata
from smc.manifests.schema import Field, Integer, ListOf, MapOf, Object, Shape, Text
from smc.model import Identity, Name
from smc.smi.schemas import at_top, under_spec
from smc.smi.specs import HTTP_ROUTES, TCP_ROUTE, UDP_ROUTE, match_name

ACCESS = "access.smi-spec.io"


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
_MATCHES_OF_A_RULE = ListOf(
    Text(match_name), least=1, unique=str, empty="leave matches out to allow every match of the group"
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
    "v1alpha1": at_top(
        Field("destination", _DESTINATION_WITH_PORT, required=True),
        _rules("specs", HTTP_ROUTES, TCP_ROUTE, refused=_NO_UDP),
        _SOURCES,
        build=_target("", "specs"),
        strange={"rules": "in v1alpha1 they are called specs"},
    ),
    "v1alpha2": under_spec(
        Field("destination", _DESTINATION_WITH_PORT, required=True),
        _rules("rules", HTTP_ROUTES, TCP_ROUTE, refused=_NO_UDP),
        _SOURCES,
        build=_target("spec.", "rules"),
        strange=_RENAMED,
    ),
    "v1alpha3": under_spec(
        Field("destination", _DESTINATION, required=True),
        _rules("rules", HTTP_ROUTES, TCP_ROUTE, UDP_ROUTE),
        _SOURCES,
        build=_target("spec.", "rules"),
        strange=_RENAMED,
    ),
    "v1alpha4": under_spec(
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
_BINDING = under_spec(
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


KINDS: tuple[Kind, ...] = (
    Kind(ACCESS, "TrafficTarget", "traffictargets", ("tt",), _TARGETS),
    Kind(ACCESS, IDENTITY_BINDING, "identitybindings", ("ib",), {"v1alpha4": _BINDING}),
)
