"""What becomes of a request, read from the manifests alone: a second opinion that shares nothing with SMC.

Written from the SMI specification, and from what SMC says where that is silent. It is slow, and it knows plain HTTP
services only; `e2e/test_oracle.py` holds it against real Envoys, `tests/feature/test_oracle.py` against `smc explain`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Document = Mapping[str, Any]
Account = tuple[str, str]
"""(namespace, service account)"""

ANYTHING: Document = {}


@dataclass(frozen=True)
class Request:
    source: tuple[str, str]
    """(namespace, workload)"""
    service: tuple[str, str]
    """(namespace, service)"""
    port: int
    path: str = "/"
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    """With `host` as it is sent."""


@dataclass(frozen=True, order=True)
class Outcome:
    status: int
    """200; 403: policy; 502: no such service; 503: nobody serves it."""
    workload: tuple[str, str] = ("", "")
    """Who answered, with 200."""
    app_port: int = 0


NOWHERE, NOBODY, DENIED = Outcome(502), Outcome(503), Outcome(403)


class Oracle:
    """`documents` are manifests as users write them, in the order of their creation; every workload is ready."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents

    def outcomes(self, request: Request) -> frozenset[Outcome]:
        """Everything that may become of it: more than one if the weights of a split leave a choice."""
        if self._app_port(request.service, request.port) is None:
            return frozenset({NOWHERE})
        return frozenset(
            Outcome(200, workload, app_port) if self._allows(workload, app_port, request) else DENIED
            for service in self._targets(request)
            for workload, app_port in self.endpoints(service, request.port)
        ) or frozenset({NOBODY})

    def endpoints(self, service: tuple[str, str], port: int) -> list[tuple[tuple[str, str], int]]:
        """(workload, app port) of each workload that serves it."""
        app_port = self._app_port(service, port)
        if app_port is None:
            return []
        namespace, name = service
        return [
            (_name(workload), app_port)
            for workload in self._of("Workload", namespace)
            if name in workload["spec"].get("services", ())
        ]

    def service_ports(self) -> Iterator[tuple[tuple[str, str], int]]:
        for service in self._of("Service"):
            for port in service["spec"]["ports"]:
                yield _name(service), port["port"]

    # ------------------------------------------------------------------------------------------------------- splits

    def _targets(self, request: Request) -> Iterable[tuple[str, str]]:
        namespace, root = request.service
        splits = [s for s in self._of("TrafficSplit", namespace) if _root(s) == root]
        conditional = [s for s in splits if s["spec"].get("matches")]
        whole = [s for s in splits if not s["spec"].get("matches")][:1]
        for split in (*conditional, *whole):
            groups = [self._find("HTTPRouteGroup", namespace, m["name"]) for m in split["spec"].get("matches") or ()]
            matches = [match for group in groups if group for match in _body(group)["matches"]]
            if groups and not any(_matches(match, request) for match in matches):
                continue
            usable = {
                (namespace, backend["service"])
                for backend in split["spec"]["backends"]
                if backend["service"] != root
                and _milli(backend["weight"]) > 0
                and self.endpoints((namespace, backend["service"]), request.port)
            }
            if usable:
                return usable
        return [request.service]

    # ------------------------------------------------------------------------------------------------------- access

    def _allows(self, workload: tuple[str, str], app_port: int, request: Request) -> bool:
        caller, server = self._account(request.source), self._account(workload)
        called = self._called(workload, app_port)
        for target in self._of("TrafficTarget"):
            namespace = target["metadata"]["namespace"]
            body = _body(target)
            destination = body["destination"]
            if destination.get("namespace", namespace) != namespace:
                continue  # Whoever writes it does not own whom it is about.
            if server not in self._accounts(destination, namespace):
                continue
            if not any(caller in self._accounts(source, namespace) for source in body["sources"]):
                continue
            ports = [destination["port"]] if destination.get("port") else None
            if self._rules_allow(body.get("rules") or body.get("specs") or (), namespace, called, ports, request):
                return True
        return False

    def _rules_allow(
        self,
        rules: Sequence[Document],
        namespace: str,
        called: set[int],
        ports: Sequence[int] | None,
        request: Request,
    ) -> bool:
        http = [rule for rule in rules if rule["kind"] == "HTTPRouteGroup"]
        tcp = [rule for rule in rules if rule["kind"] == "TCPRoute"]
        on_port = ports is None or not called.isdisjoint(ports)
        by_tcp = not tcp or any(self._tcp_allows(rule, namespace, called) for rule in tcp)
        by_http = any(self._http_allows(rule, namespace, request) for rule in http) if http else bool(tcp)
        return on_port and by_tcp and by_http

    def _tcp_allows(self, rule: Document, namespace: str, called: set[int]) -> bool:
        route = self._find("TCPRoute", namespace, rule["name"])
        if route is None:
            return False
        ports = ((route.get("spec") or {}).get("matches") or {}).get("ports") or ()
        return not ports or not called.isdisjoint(ports)

    def _http_allows(self, rule: Document, namespace: str, request: Request) -> bool:
        group = self._find("HTTPRouteGroup", namespace, rule["name"])
        if group is None:
            return False
        named = rule.get("matches")
        return any(
            _matches(match, request) for match in _body(group)["matches"] if named is None or match["name"] in named
        )

    def _called(self, workload: tuple[str, str], app_port: int) -> set[int]:
        """What numbers mean that port of the application: its service ports; its own, if no service port is alike."""
        leading: dict[int, set[int]] = {}
        for service in self._find("Workload", *workload)["spec"].get("services", ()):
            found = self._find("Service", workload[0], service)
            for port in found["spec"]["ports"] if found else ():
                leading.setdefault(port["targetPort"], set()).add(port["port"])
        every = set().union(*leading.values())
        return leading[app_port] | ({app_port} - every)

    def _accounts(self, subject: Document, namespace: str) -> set[Account]:
        """Whom a source or a destination means."""
        namespace = subject.get("namespace", namespace)
        if subject["kind"] == "ServiceAccount":
            return {(namespace, subject["name"])}
        binding = self._find("IdentityBinding", namespace, subject["name"])
        return self._bound(namespace, binding["spec"]["schemes"]) if binding else set()

    def _bound(self, namespace: str, schemes: Document) -> set[Account]:
        there = {self._account(_name(workload)) for workload in self._of("Workload", namespace)}
        found = {account for account in there if account[1] == schemes.get("serviceAccount")}
        wanted = schemes.get("podLabelSelector", {}).get("matchLabels", {})
        for account in there if wanted else ():
            labels = [
                workload["metadata"].get("labels", {})
                for workload in self._of("Workload", namespace)
                if self._account(_name(workload)) == account
            ]
            if all(wanted.items() <= of_one.items() for of_one in labels):
                found.add(account)
        for uri in schemes.get("spiffeIdentities", ()):
            _, _, path = uri.removeprefix("spiffe://").partition("/")
            _, of, _, account = path.split("/")
            if of == namespace:
                found.add((of, account))
        return found

    # ---------------------------------------------------------------------------------------------------- documents

    def _of(self, kind: str, namespace: str | None = None) -> Iterator[Document]:
        for document in self._documents:
            if document["kind"] == kind and namespace in (None, document["metadata"]["namespace"]):
                yield document

    def _find(self, kind: str, namespace: str, name: str) -> Any:
        return next((d for d in self._of(kind, namespace) if d["metadata"]["name"] == name), None)

    def _account(self, workload: tuple[str, str]) -> Account:
        return workload[0], self._find("Workload", *workload)["spec"]["serviceAccount"]

    def _app_port(self, service: tuple[str, str], port: int) -> int | None:
        found = self._find("Service", *service)
        ports = {p["port"]: p["targetPort"] for p in found["spec"]["ports"]} if found else {}
        return ports.get(port)


def _name(document: Document) -> tuple[str, str]:
    return document["metadata"]["namespace"], document["metadata"]["name"]


def _body(document: Document) -> Any:
    """The early versions have no `spec`."""
    return document.get("spec") or document


def _root(split: Document) -> str:
    """Of `web`, `web.shop`, `web.shop.svc.cluster.local`."""
    return str(split["spec"]["service"]).partition(".")[0]


def _milli(weight: Any) -> float:
    """`1` and `1000m` are the same quantity."""
    text = str(weight)
    return float(text[:-1]) if text.endswith("m") else float(text) * 1000


def _matches(match: Document, request: Request) -> bool:
    methods = match.get("methods") or ["*"]
    if "*" not in methods and request.method not in methods:
        return False
    path = match.get("pathRegex")
    if path is not None and not re.match(path, request.path.partition("?")[0]):
        return False
    headers = match.get("headers") or {}
    pairs = headers.items() if isinstance(headers, Mapping) else [pair for one in headers for pair in one.items()]
    sent = {name.lower(): value for name, value in request.headers.items()}
    return all(name.lower() in sent and re.fullmatch(value, sent[name.lower()]) for name, value in pairs)
