"""The bookstore as manifests: what `smc demo` applies, and what the end-to-end tests start from."""

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
    """What its bookstore calls itself; "": it only calls others."""

    @property
    def workload(self) -> str:
        return f"{self.namespace}/{self.name}"


def store(version: str, number: int = 0) -> Placement:
    """A bookstore of a version; further ones of it are numbered, and share its service account."""
    name = f"bookstore-{version}"
    return Placement(
        "bookstore", f"{name}-{number}" if number else name, name, tuple(sorted({"bookstore", name})), version
    )


BOOKBUYER = Placement("bookbuyer", "bookbuyer", "bookbuyer")
BOOKTHIEF = Placement("bookthief", "bookthief", "bookthief")
BOOKSTORE = (BOOKBUYER, BOOKTHIEF, store("v1"), store("v2"))


def services() -> str:
    return _text("services.yaml")


def policy() -> str:
    """Who may do what: the bookbuyer may read and, with a membership, buy."""
    return _text("policy.yaml")


def split(v1: int, v2: int) -> str:
    """The bookstore's traffic by weight: `split(100, 0)`, `split(50, 50)` …"""
    return Template(_text("split.yaml")).substitute(v1=v1, v2=v2)


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
    )


def _list(names: Sequence[str]) -> str:
    return json.dumps(list(names))


def _text(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text()
