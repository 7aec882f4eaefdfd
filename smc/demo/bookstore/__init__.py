"""The bookstore and its quotes as manifests: what `smc demo` applies, and what the end-to-end tests start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template


@dataclass(frozen=True, slots=True)
class Placement:
    """One workload of the demo, before it has an address."""

    namespace: str
    name: str
    service_account: str
    services: tuple[str, ...] = ()
    """The services of its namespace that it backs."""
    version: str = ""
    """What its application calls itself; "": it only calls others."""
    sidecar: str = "explicit"
    """As the Workload has it; `grpc`: its application is a gRPC program that is told by xDS itself."""

    @property
    def workload(self) -> str:
        return f"{self.namespace}/{self.name}"


def store(version: str, number: int = 0) -> Placement:
    """A bookstore of a version; further ones of it are numbered, and share its service account."""
    name = f"bookstore-{version}"
    return Placement(
        "bookstore", f"{name}-{number}" if number else name, name, tuple(sorted({"bookstore", name})), version
    )


def quotes(version: str) -> Placement:
    """A server of quotes of a version; both have one identity."""
    name = f"quotes-{version}"
    return Placement("quotes", name, "quotes", ("quotes", name), version, sidecar="grpc")


READER, EAVESDROPPER = (Placement("quotes", name, name, sidecar="grpc") for name in ("reader", "eavesdropper"))
SNI = "80.bookstore.bookstore.mesh.internal"
"""By which a caller's Envoy asks for port 80 of the bookstore."""
QUOTES_TARGET = "xds:///quotes.quotes:8080"
QUOTES = (quotes("v1"), quotes("v2"), READER, EAVESDROPPER)
BOOKBUYER = Placement("bookbuyer", "bookbuyer", "bookbuyer")
BOOKTHIEF = Placement("bookthief", "bookthief", "bookthief")
BOOKSTORE = (BOOKBUYER, BOOKTHIEF, store("v1"), store("v2"))


def services() -> str:
    return _text("services.yaml")


def policy() -> str:
    """Who may do what: the bookbuyer may read and, with a membership, buy."""
    return _text("policy.yaml")


def quotes_services() -> str:
    return _text("quotes-services.yaml")


def quotes_policy() -> str:
    """The reader alone may ask."""
    return _text("quotes-policy.yaml")


def split(v1: int, v2: int, service: str = "bookstore") -> str:
    """Traffic by weight of the bookstore, or of `quotes`: `split(100, 0)`, `split(50, 50)` …"""
    return Template(_text("split.yaml")).substitute(service=service, v1=v1, v2=v2)


def mesh_config(workload_ttl: str) -> str:
    """The MeshConfig with which workload certificates live for `20s`, `24h` …"""
    return Template(_text("mesh-config.yaml")).substitute(workload_ttl=workload_ttl)


def workload(placement: Placement, address: str) -> str:
    """The Workload of a placement whose proxy and application have `address`."""
    return Template(_text("workload.yaml")).substitute(
        name=placement.name,
        namespace=placement.namespace,
        address=address,
        service_account=placement.service_account,
        services=_list(placement.services),
        sidecar=placement.sidecar,
    )


def _list(names: Sequence[str]) -> str:
    return json.dumps(list(names))


def _text(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text()
