"""Random meshes as users would write them, and requests that probe their edges."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.oracle import Request

SHOP, BANK = "shop", "bank"
TRUST_DOMAIN = "demo.smc.internal"
APP_PORTS = (8080, 9090)
_SERVICES = {SHOP: ("web", "one", "two"), BANK: ("vault",)}
_PORTS = (80, 8080, 7000)
_PATHS = ("/", "/books", "/books/7", "/bookshelf", "/admin", "/a.b", "/axb", "/books?as=admin")
_EXPRESSIONS = ("/books", "/books/[0-9]+", "/(admin|books)$", "/a\\.b", ".*", "/", "/book.*", "")
_METHODS = ("GET", "POST", "DELETE")
_HEADERS = {"x-role": ("gold", "silver", "gold,silver", ""), "x-team": ("red", "blue")}
_VALUES = {"x-role": ("gold", "gold|silver", "g.*", ".*", ".+"), "x-team": ("red", "[a-z]+")}


@dataclass(frozen=True)
class Place:
    """A workload that stays where it is, whatever mesh is drawn around it."""

    namespace: str
    name: str
    account: str
    address: str


PLACES = (
    ("shop", "ant", "alpha"),
    ("shop", "bee", "beta"),
    ("shop", "cat", "beta"),
    ("bank", "dog", "gamma"),
)
"""Two share an identity, and one lives elsewhere."""


class Drawn:
    """One mesh. Names of policy end in `-<number>`, so that no two meshes have any in common."""

    def __init__(self, choice: random.Random, number: int, places: tuple[Place, ...]) -> None:
        self._choice = choice
        self._number = number
        self._places = places
        self._groups: dict[str, list[tuple[str, list[str]]]] = {SHOP: [], BANK: []}
        self._routes: dict[str, list[str]] = {SHOP: [], BANK: []}
        self._bindings: dict[str, list[str]] = {SHOP: [], BANK: []}
        self.documents: list[dict[str, Any]] = [
            *self._drawn_services(),
            *self._drawn_workloads(),
            *self._drawn_groups(),
            *self._drawn_routes(),
            *self._drawn_bindings(),
            *self._drawn_splits(),
            *self._drawn_targets(),
        ]

    def request(self) -> Request:
        choose = self._choice.choice
        source = choose(self._places)
        known = [d for d in self.documents if d["kind"] == "Service"]
        if self._chance(0.95) and known:
            service = choose(known)
            namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
            port = choose(service["spec"]["ports"])["port"]
        else:
            namespace, name, port = choose(((SHOP, "web", 81), (SHOP, "nothing", 80), (BANK, "web", 80)))
        spellings = [f"{name}.{namespace}", f"{name}.{namespace}.svc", f"{name}.{namespace}.svc.cluster.local"]
        spellings += [f"{name}.{namespace}.mesh.internal", f"{name}.{namespace}."]
        spellings += [name] if namespace == source.namespace else []
        host = choose(spellings)
        headers = {key: choose(values) for key, values in _HEADERS.items() if self._chance(0.5)}
        headers["host"] = host if port == 80 and self._chance(0.5) else f"{host}:{port}"
        path, method = choose(_PATHS), choose(_METHODS)
        return Request((source.namespace, source.name), (namespace, name), port, path, method, headers)

    # -------------------------------------------------------------------------------------------------- what runs

    def _drawn_services(self) -> Iterator[dict[str, Any]]:
        for namespace, names in _SERVICES.items():
            for name in names:
                if self._chance(0.9):
                    ports = self._some(_PORTS, 2)
                    spec = {"ports": [{"port": p, "targetPort": _app_port(name, p)} for p in ports]}
                    yield _own("Service", namespace, name, spec)

    def _drawn_workloads(self) -> Iterator[dict[str, Any]]:
        for place in self._places:
            services = self._some(_SERVICES[place.namespace], 2)
            yield self.workload(place, services=services, team=self._choice.choice(("red", "blue")))

    @staticmethod
    def workload(place: Place, *, services: list[str], team: str) -> dict[str, Any]:
        spec = {
            "address": place.address,
            "appAddress": place.address,
            "serviceAccount": place.account,
            "services": services,
        }
        document = _own("Workload", place.namespace, place.name, spec)
        document["metadata"]["labels"] = {"team": team}
        return document

    # ----------------------------------------------------------------------------------------------------- policy

    def _drawn_groups(self) -> Iterator[dict[str, Any]]:
        for namespace in (SHOP, BANK):
            for index in range(self._choice.randint(1, 3)):
                matches = [self._match(f"m{n}") for n in range(self._choice.randint(1, 3))]
                version = self._choice.choice(("v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"))
                if version == "v1alpha1":
                    matches = [{k: v for k, v in m.items() if k != "headers"} for m in matches]
                if version in ("v1alpha1", "v1alpha2"):
                    matches = [{"pathRegex": ".*", "methods": ["*"]} | m for m in matches]
                name = self._name(f"group{index}")
                self._groups[namespace].append((name, [m["name"] for m in matches]))
                body = {"matches": matches}
                early = version in ("v1alpha1", "v1alpha2")
                yield _smi("specs", version, "HTTPRouteGroup", namespace, name, body, early=early)

    def _match(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"name": name}
        if self._chance(0.7):
            found["pathRegex"] = self._choice.choice(_EXPRESSIONS[:-1])
        if self._chance(0.5):
            found["methods"] = self._choice.choice((["*"], self._some(_METHODS, 2)))
        if self._chance(0.4):
            headers = {key: self._choice.choice(_VALUES[key]) for key in self._some(tuple(_VALUES), 2)}
            found["headers"] = headers if self._chance(0.5) else [{key: value} for key, value in headers.items()]
        if len(found) == 1:
            found["methods"] = ["*"]
        return found

    def _drawn_routes(self) -> Iterator[dict[str, Any]]:
        for namespace in (SHOP, BANK):
            for index in range(self._choice.randint(0, 2)):
                name = self._name(f"ports{index}")
                self._routes[namespace].append(name)
                ports = self._some((80, 7000, *APP_PORTS), 2) if self._chance(0.8) else []
                spec = {"matches": {"ports": ports}}
                yield _smi("specs", "v1alpha4", "TCPRoute", namespace, name, spec)

    def _drawn_bindings(self) -> Iterator[dict[str, Any]]:
        for namespace in (SHOP, BANK):
            for index in range(self._choice.randint(0, 2)):
                schemes: dict[str, Any] = {}
                if self._chance(0.6):
                    schemes["podLabelSelector"] = {"matchLabels": {"team": self._choice.choice(("red", "blue"))}}
                if self._chance(0.3):
                    account = self._choice.choice(("alpha", "beta", "gamma"))
                    schemes["spiffeIdentities"] = [f"spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{account}"]
                if self._chance(0.3) or not schemes:
                    schemes["serviceAccount"] = self._choice.choice(("alpha", "beta", "gamma"))
                name = self._name(f"binding{index}")
                self._bindings[namespace].append(name)
                yield _smi("access", "v1alpha4", "IdentityBinding", namespace, name, {"schemes": schemes})

    def _drawn_splits(self) -> Iterator[dict[str, Any]]:
        for index in range(self._choice.randint(0, 3)):
            version = self._choice.choice(("v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"))
            root = self._choice.choice(("web", "web", "one"))
            others = self._some(tuple(name for name in ("one", "two", "missing") if name != root), 2)
            weights = ["1", "500m", 0] if version == "v1alpha1" else [1, 3, 0]
            backends = [{"service": other, "weight": self._choice.choice(weights)} for other in others]
            if all(backend["weight"] == 0 for backend in backends):
                backends[0]["weight"] = weights[0]
            spec: dict[str, Any] = {
                "service": self._choice.choice((root, f"{root}.{SHOP}", f"{root}.{SHOP}.svc.cluster.local")),
                "backends": backends,
            }
            if version in ("v1alpha3", "v1alpha4") and self._chance(0.7):
                names = [name for name, _ in self._groups[SHOP]]
                spec["matches"] = [{"kind": "HTTPRouteGroup", "name": name} for name in self._some(tuple(names), 2)]
            yield _smi("split", version, "TrafficSplit", SHOP, self._name(f"split{index}"), spec)

    def _drawn_targets(self) -> Iterator[dict[str, Any]]:
        for index in range(self._choice.randint(4, 9)):
            namespace = self._choice.choice((SHOP, SHOP, SHOP, BANK))
            version = self._choice.choice(("v1alpha1", "v1alpha2", "v1alpha3", "v1alpha4"))
            early = version in ("v1alpha1", "v1alpha2")
            bindings = version == "v1alpha4"
            own = ("alpha", "beta") if namespace == SHOP else ("gamma",)
            destination = self._subject(namespace, own, bindings=bindings)
            if early and self._chance(0.3):
                destination["port"] = self._choice.choice(_PORTS)
            body = {
                "destination": destination,
                "sources": [
                    self._subject(
                        *self._choice.choice(((SHOP, ("alpha", "beta")), (BANK, ("gamma",)))), bindings=bindings
                    )
                    for _ in range(self._choice.randint(1, 2))
                ],
                "specs" if version == "v1alpha1" else "rules": self._rules(namespace, ports=not early),
            }
            name = self._name(f"target{index}")
            yield _smi("access", version, "TrafficTarget", namespace, name, body, early=version == "v1alpha1")

    def _subject(self, namespace: str, accounts: tuple[str, ...], *, bindings: bool) -> dict[str, Any]:
        if bindings and self._bindings[namespace] and self._chance(0.5):
            name = self._choice.choice(self._bindings[namespace])
            group = {"group": "access.smi-spec.io"}
            return {"kind": "IdentityBinding", "name": name, "namespace": namespace} | group
        return {"kind": "ServiceAccount", "name": self._choice.choice(accounts), "namespace": namespace}

    def _rules(self, namespace: str, *, ports: bool) -> list[dict[str, Any]]:
        rules = []
        for name, matches in self._some(tuple(self._groups[namespace]), 2):
            rule: dict[str, Any] = {"kind": "HTTPRouteGroup", "name": name}
            if self._chance(0.4):
                rule["matches"] = self._some((*matches,), 2)
            rules.append(rule)
        if ports and self._routes[namespace] and self._chance(0.5):
            rules += [{"kind": "TCPRoute", "name": name} for name in self._some(tuple(self._routes[namespace]), 2)]
            if self._chance(0.3):
                rules = [rule for rule in rules if rule["kind"] == "TCPRoute"]
        if self._chance(0.1):
            rules.append({"kind": "HTTPRouteGroup", "name": "missing"})
        return rules

    # ------------------------------------------------------------------------------------------------------ chances

    def _chance(self, probability: float) -> bool:
        return self._choice.random() < probability

    def _some(self, values: tuple[Any, ...], most: int) -> list[Any]:
        """At least one, in any order."""
        return self._choice.sample(values, self._choice.randint(1, min(most, len(values))))

    def _name(self, stem: str) -> str:
        return f"{stem}-{self._number}"


def _app_port(service: str, port: int) -> int:
    """The same in every mesh: a connection that is open when it changes carries one more request to the old one."""
    return APP_PORTS[(len(service) + port // 1000) % len(APP_PORTS)]


def _own(kind: str, namespace: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "smc.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def _smi(
    api: str, version: str, kind: str, namespace: str, name: str, body: dict[str, Any], *, early: bool = False
) -> dict[str, Any]:
    """The early versions have no `spec`."""
    metadata = {"name": name, "namespace": namespace}
    head = {"apiVersion": f"{api}.smi-spec.io/{version}", "kind": kind, "metadata": metadata}
    return head | body if early else head | {"spec": body}
