"""split.smi-spec.io: TrafficSplit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from smc.manifests import Kind, schema
from smc.manifests.findings import Unfit, shown
from smc.manifests.kinds import Metadata, Schema
from smc.manifests.schema import Field, Integer, ListOf, Object, OneOf, Shape, Text
from smc.model import Backend, Name
from smc.smi.schemas import under_spec
from smc.smi.specs import HTTP_ROUTES, SPECS, TCP_ROUTE, UDP_ROUTE

SPLIT = "split.smi-spec.io"

MILLI = 1000
"""A whole weight in thousandths, which is what v1alpha1 needs: its weights are quantities, such as `500m`."""
MOST = 1_000_000
"""The largest weight, in wholes."""


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


_NO_MATCHES = dict.fromkeys((TCP_ROUTE, UDP_ROUTE), "a split tells HTTP requests apart")
_ROUTE_GROUP_REFERENCE = Object(
    (
        Field("apiGroup", Text(schema.choice({SPECS: SPECS}))),
        Field("kind", Text(schema.choice({HTTP_ROUTES: HTTP_ROUTES}, refused=_NO_MATCHES)), required=True),
        Field("name", Text(schema.subdomain), required=True),
    ),
    lambda _group, _kind, name: name,
)
_SPLIT_MATCHES = Field(
    "matches",
    ListOf(_ROUTE_GROUP_REFERENCE, least=1, most=100, unique=str, empty="leave matches out to split every request"),
)
_NO_PORT = {"port": "a split is for every port of its root: remove it"}


def _split(weight: Shape, *more: Field, strange: dict[str, str]) -> Schema:
    return under_spec(_SERVICE, _backends(weight), *more, build=_split_spec, strange=_NO_PORT | strange)


_MATCHES_CAME = {"matches": "it came with v1alpha3: write that version"}
_SPLITS = {
    "v1alpha1": _split(_Quantity(), strange=_MATCHES_CAME),
    "v1alpha2": _split(_Whole(), strange=_MATCHES_CAME),
    "v1alpha3": _split(_Whole(), _SPLIT_MATCHES, strange={}),
    "v1alpha4": _split(_Whole(), _SPLIT_MATCHES, strange={}),
}

KINDS: tuple[Kind, ...] = (Kind(SPLIT, "TrafficSplit", "trafficsplits", ("ts",), _SPLITS),)
