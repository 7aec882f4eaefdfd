"""Why a request is allowed or denied, and where it goes: the rules of a Mesh, evaluated as the proxies evaluate them.

What is evaluated are the compiled nouns that Envoy's configuration is made from, so the answer is that of the wire,
with every quarantine that holds at the two proxies. Pure: a Mesh and a Request in, an Explanation out.

It is about rules. What a TrafficPolicy does on the way (faults, limits, retries), certificates that are revoked one by
one, and endpoints that a health check has put out, are not looked at. Applications without a proxy are explained as if
they had one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from smc.envoy import names, requests
from smc.envoy.requests import BadRequest, Request
from smc.errors import NotFound
from smc.mesh import Mesh, Proxy
from smc.model import Destination, HttpMatch, Identity, Inbound, Mode, Name, Permission, Protocol, Target

MOST_MISSES = 10
"""Permissions that are told of one server that denies."""

MOST_NAMED = 3
"""Callers of one of them."""

Source = tuple[str, int]
"""(manifest, mod_revision)"""


class Verdict(Enum):
    ALLOWED = "allowed"
    """By every server that it may reach."""
    DENIED = "denied"
    """By every one of them."""
    SOME = "allowed by some"
    """Which, is for the split and the choice of an endpoint to decide."""
    REFUSED = "refused"
    """By a proxy, because of its form: no rule is asked."""
    NOWHERE = "nowhere to go"
    """No workload serves what it is sent to, or a split sends it to nobody."""


@dataclass(frozen=True, slots=True)
class Miss:
    """A Permission that does not cover the request, and why."""

    permission: Permission
    why: tuple[str, ...]
    """Of the alternative that came closest."""
    of_others: bool = False
    """It would, were the caller among its sources."""


@dataclass(frozen=True, slots=True)
class Server:
    """One workload that may get the request, and what its proxy says to it."""

    workload: Name
    identity: Identity
    app_port: int
    ready: bool
    """It is among the endpoints that get traffic."""
    allowed: bool
    """By policy, or by the proxy itself."""
    mode: Mode = Mode.ENFORCING
    """What its proxy does about a request of this caller that is not allowed."""
    by: tuple[Permission, ...] = ()
    """Each of which allows it; empty although it is allowed: the proxy answers itself, to anyone."""
    misses: tuple[Miss, ...] = ()
    """If it is denied; the closest first."""
    left_out: tuple[str, ...] = ()
    """The manifests that its proxy goes without, because it refused them."""
    refused: str = ""
    """Why the proxy refuses the request itself, whatever policy says."""

    @property
    def passes(self) -> bool:
        """Whether the request reaches the application: also one that policy would deny, where that is only counted."""
        return self.allowed or (self.mode is not Mode.ENFORCING and not self.refused)


@dataclass(frozen=True, slots=True)
class Way:
    """One Target that the request may be sent to."""

    target: Target
    share: float
    """Of all such requests, above 0, at most 1."""
    servers: tuple[Server, ...]
    """Sorted by workload."""


@dataclass(frozen=True, slots=True)
class Explanation:
    verdict: Verdict
    caller: Name
    identity: Identity
    service: Name
    port: int
    protocol: Protocol
    request: Request
    """As it is sent, with everything that was left to say."""
    reason: str = ""
    """Of REFUSED and NOWHERE."""
    branch: tuple[HttpMatch, ...] | None = None
    """The matches of the split whose branch it takes; None: it takes what is for all other requests."""
    split_by: tuple[Source, ...] = ()
    """What made it go where it goes, sorted; empty: no split does."""
    ways: tuple[Way, ...] = ()


def explain(mesh: Mesh, caller: Name, service: Name, request: Request, port: int | None = None) -> Explanation:
    """Say what becomes of `request` from the application of the workload `caller` to a service.

    Args:
        request: with a `host` only if it is to be another one of the service's names than `<service>.<namespace>`.
        port: of the service; None: its only one.

    Raises:
        NotFound: there is no such caller, or its proxy is told of no such service or port.
    """
    proxy = mesh.proxies.get(caller)
    if proxy is None:
        raise NotFound(f"there is no workload {caller}", hint="smc get workloads -A lists those that were applied")
    destination = _destination(proxy, service, port)
    protocol = destination.protocol
    asked = _addressed(mesh, proxy, destination, request)

    of = (caller, proxy.workload.identity, service, destination.port, protocol, asked)
    try:
        sent = requests.outgoing(asked)
    except BadRequest as e:
        return Explanation(Verdict.REFUSED, *of, f"{e.message}: the caller's own proxy answers 400")
    branch, targets, split_by = _route(destination, sent)
    whole = sum(target.weight for target in targets)
    ways = tuple(Way(t, t.weight / whole, _servers(mesh, proxy, t, sent, protocol)) for t in targets)
    verdict, reason = _verdict(ways)
    return Explanation(verdict, *of, reason, branch, split_by, ways)


def _verdict(ways: tuple[Way, ...]) -> tuple[Verdict, str]:
    """And the reason, where no rule is one."""
    servers = [server for way in ways for server in way.servers]
    if not ways:
        return Verdict.NOWHERE, "no backend has a weight above 0: the caller's proxy answers 503"
    if not servers:
        return Verdict.NOWHERE, "no workload serves it: the caller's proxy answers 503"
    if all(server.refused for server in servers):
        return Verdict.REFUSED, f"{servers[0].refused}: the server's proxy answers 400"
    passing = [server.passes for server in servers]
    if any(passing) and not all(passing):
        return Verdict.SOME, ""
    return (Verdict.ALLOWED if all(passing) else Verdict.DENIED), ""


def _destination(proxy: Proxy, service: Name, port: int | None) -> Destination:
    found = [d for d in proxy.outbound.destinations if d.service == service]
    if not found:
        limited = " (spec.reachableServices of its Workload does not name it)" if proxy.workload.reachable else ""
        raise NotFound(
            f"the proxy of {proxy.workload.name} is told of no service {service}{limited}",
            hint="smc get services -A lists those that were applied",
        )
    ports = ", ".join(str(d.port) for d in found)
    if port is None and len(found) > 1:
        raise NotFound(f"service {service} has the ports {ports}", hint="say which by --port")
    for destination in found:
        if port in (None, destination.port):
            return destination
    raise NotFound(f"service {service} has no port {port}", hint=f"it has {ports}")


def _addressed(mesh: Mesh, proxy: Proxy, destination: Destination, request: Request) -> Request:
    """With a host, if it has none.

    Raises:
        NotFound: the host that it has is not one of the service.
    """
    service, port = destination.service, destination.port
    given = [value for name, value in request.headers if name.lower() == "host"]
    if not given:
        host = f"{service.name}.{service.namespace}" + (f":{port}" if port != 80 else "")
        return Request(request.method, request.path, (("host", host), *request.headers))
    near = service.namespace == proxy.workload.name.namespace
    known = [
        d for h in names.hosts(service, mesh.config.mesh_domain, same_namespace=near) for d in names.domains(h, port)
    ]
    if len(given) > 1 or given[0].lower() not in known:
        raise NotFound(f"{', '.join(given)[:200]} does not lead to {service} port {port}", hint=f"{known[0]} does")
    return request


def _route(
    destination: Destination, sent: Request
) -> tuple[tuple[HttpMatch, ...] | None, tuple[Target, ...], tuple[Source, ...]]:
    """The branch, its targets, and the manifests that made it so."""
    for branch in destination.branches:
        if any(not requests.unmet(match, sent) for match in branch.matches):
            return branch.matches, branch.targets, branch.sources
    others = {source for branch in destination.branches for source in branch.sources}
    return None, destination.targets, tuple(s for s in destination.sources if s not in others)


def _servers(mesh: Mesh, caller: Proxy, target: Target, sent: Request, protocol: Protocol) -> tuple[Server, ...]:
    wanted = (target.service, target.port)
    ready = {
        endpoint.workload
        for assignment in caller.outbound.assignments
        if (assignment.service, assignment.port) == wanted
        for endpoint in assignment.endpoints
    }
    return tuple(
        _server(mesh, proxy, inbound, caller.workload.identity, name in ready, sent, protocol)
        for name, proxy in sorted(mesh.proxies.items())
        for inbound in proxy.inbound
        if wanted in inbound.services
    )


def _server(
    mesh: Mesh, proxy: Proxy, inbound: Inbound, source: Identity, ready: bool, sent: Request, protocol: Protocol
) -> Server:
    identity = proxy.workload.identity
    of = (proxy.workload.name, identity, inbound.port, ready)
    # Who is revoked may nothing in any mode, and is among nobody's sources.
    mode = Mode.ENFORCING if source in proxy.policy.banned else proxy.mode
    left_out = tuple(sorted({record.manifest for record in proxy.quarantined}))
    request = None
    if protocol is not Protocol.TCP:
        try:
            request = requests.incoming(sent, source.uri(mesh.trust_domain), identity.uri(mesh.trust_domain))
        except BadRequest as e:
            return Server(*of, allowed=False, mode=mode, refused=e.message)
        if request.path == names.HEALTH_PATH:
            return Server(*of, allowed=True, mode=mode)
    by = []
    misses = []
    for permission in proxy.policy.permissions:
        why = _unmet(permission, inbound, request)
        if source in permission.sources:
            if why:
                misses.append(Miss(permission, why))
            else:
                by.append(permission)
        elif not why:
            sources = [str(identity) for identity in permission.sources]
            allowed = ", ".join(sources if len(sources) <= MOST_NAMED else [*sources[:MOST_NAMED], "others"])
            misses.append(Miss(permission, (f"it is for {allowed}, and not for {source}",), of_others=True))
    if by:
        return Server(*of, allowed=True, mode=mode, by=tuple(by), left_out=left_out)
    closest = sorted(misses, key=lambda miss: (miss.of_others, len(miss.why), miss.permission.manifest))
    return Server(*of, allowed=False, mode=mode, misses=tuple(closest[:MOST_MISSES]), left_out=left_out)


def _unmet(permission: Permission, inbound: Inbound, request: Request | None) -> tuple[str, ...]:
    """Why a Permission does not cover a request at a port, whoever sends it; empty: it does.

    `request` is as `incoming` gives it; None: there is none to look at, and only the port counts.
    """
    if permission.ports is not None and set(permission.ports).isdisjoint(inbound.numbers):
        return (f"it is for port {_list(permission.ports)}, and this is port {_list(inbound.numbers)}",)
    if request is None:
        return () if permission.tcp else ("it has HTTP rules, and this port speaks TCP",)
    alternatives = [requests.unmet(match, request) for match in permission.http]
    return tuple(min(alternatives, key=lambda unmet: (len(unmet), "path" in unmet)).values())


def _list(ports: Iterable[int]) -> str:
    return ", ".join(map(str, ports))
