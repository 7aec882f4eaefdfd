"""Why a request is allowed or denied, and where it goes: the rules of a Mesh, evaluated as the proxies evaluate them.

What is evaluated are the compiled nouns that Envoy's configuration is made from, so the answer is that of the wire,
with every quarantine that holds at the two proxies. Pure: a Mesh and a Request in, an Explanation out.

The verdict is about rules. What a TrafficPolicy does to some of the requests that pass is told beside it, as Effects:
faults, timeouts and limits, but not what is tried again. Certificates that are revoked one by one, and endpoints that a
health check has put out, are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum

from smc.envoy import names, requests
from smc.envoy.requests import BadRequest, Request
from smc.errors import NotFound
from smc.manifests.traffic import WHOLE
from smc.mesh import Mesh, Proxy
from smc.model import (
    Destination,
    HttpMatch,
    Identity,
    Inbound,
    Mode,
    Name,
    Permission,
    Protocol,
    Sidecar,
    Target,
)

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
class Effect:
    """What a TrafficPolicy does to requests, whatever the verdict says of them."""

    source: Source
    kind: str
    """Its field: `fault.delay`, `fault.abort`, `timeout`, `limits` or `rateLimit`."""
    share: float
    """Of the requests that it may happen to, above 0, at most 1."""
    what: str
    """For people: what becomes of them."""


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
    effects: tuple[Effect, ...] = ()
    """At its proxy, after policy."""

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
    effects: tuple[Effect, ...] = ()
    """Between the caller's proxy and whoever answers."""


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
    effects: tuple[Effect, ...] = ()
    """At the caller's proxy, before it goes any way."""
    unanswered: str = ""
    """What the application meets where nobody is ready."""


def explain(mesh: Mesh, caller: Name, service: Name, request: Request, port: int | None = None) -> Explanation:
    """Say what becomes of `request` from the application of the workload `caller` to a service.

    Args:
        request: with a `host` only if it is to be another one of the service's names than `<service>.<namespace>`; with
            a method of "" it is gRPC's or GET.
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
    unanswered = _unanswered(proxy, protocol)

    of = (caller, proxy.workload.identity, service, destination.port, protocol, asked)
    try:
        sent = requests.called(asked) if _is_grpc(proxy) else requests.outgoing(asked)
    except BadRequest as e:
        who = "it does not leave the program" if _is_grpc(proxy) else "the caller's own proxy answers 400"
        return Explanation(Verdict.REFUSED, *of, f"{e.message}: {who}")
    branch, targets, split_by = _route(destination, requests.routed(sent) if _is_grpc(proxy) else sent)
    whole = sum(target.weight for target in targets)
    ways = tuple(
        Way(t, t.weight / whole, _servers(mesh, proxy, t, sent, protocol), tuple(_limits(proxy, t, protocol)))
        for t in targets
    )
    verdict, reason = _verdict(ways, unanswered)
    effects = tuple(_of_requests(proxy, destination)) if targets else ()
    return Explanation(verdict, *of, reason, branch, split_by, ways, effects, unanswered)


def _is_grpc(proxy: Proxy) -> bool:
    """Whether there is no proxy: the application itself is told, and judges."""
    return proxy.workload.sidecar is Sidecar.GRPC


def _unanswered(caller: Proxy, protocol: Protocol) -> str:
    if _is_grpc(caller):
        return "the call ends with UNAVAILABLE"
    if protocol is not Protocol.TCP:
        return "the caller's proxy answers 503"
    asks = caller.workload.sidecar is Sidecar.EXPLICIT
    return f"the caller's proxy {'answers CONNECT with 503' if asks else 'closes the connection'}"


def _verdict(ways: tuple[Way, ...], unanswered: str) -> tuple[Verdict, str]:
    """And the reason, where no rule is one."""
    servers = [server for way in ways for server in way.servers]
    if not ways:
        return Verdict.NOWHERE, f"no backend has a weight above 0: {unanswered}"
    if not servers:
        return Verdict.NOWHERE, f"no workload serves it: {unanswered}"
    if all(server.refused for server in servers):
        return Verdict.REFUSED, servers[0].refused
    passing = [server.passes for server in servers]
    if any(passing) and not all(passing):
        return Verdict.SOME, ""
    return (Verdict.ALLOWED if all(passing) else Verdict.DENIED), ""


def _destination(proxy: Proxy, service: Name, port: int | None) -> Destination:
    every = [d for d in proxy.outbound.destinations if d.service == service]
    found = [d for d in every if not (_is_grpc(proxy) and d.protocol is Protocol.TCP)]
    if every and not found:
        raise NotFound(
            f"the program {proxy.workload.name} is told of no port of {service}",
            hint="its ports are TCP, and a gRPC program without a proxy calls by gRPC alone",
        )
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
    """With a host and a method, if it has none.

    Raises:
        NotFound: the host that it has is not one of the service.
    """
    service, port = destination.service, destination.port
    given = [value for name, value in request.headers if name.lower() == "host"]
    by_grpc = _is_grpc(proxy) or destination.protocol is Protocol.GRPC
    method = request.method or (requests.GRPC_METHOD if by_grpc else "GET")
    if not given:
        host = f"{service.name}.{service.namespace}" + (f":{port}" if port != 80 else "")
        return Request(method, request.path, (("host", host), *request.headers))
    near = service.namespace == proxy.workload.name.namespace
    known = [
        d for h in names.hosts(service, mesh.config.mesh_domain, same_namespace=near) for d in names.domains(h, port)
    ]
    if len(given) > 1 or given[0].lower() not in known:
        raise NotFound(f"{', '.join(given)[:200]} does not lead to {service} port {port}", hint=f"{known[0]} does")
    return replace(request, method=method)


def _route(
    destination: Destination, sent: Request
) -> tuple[tuple[HttpMatch, ...] | None, tuple[Target, ...], tuple[Source, ...]]:
    """The branch, its targets, and the manifests that made it so."""
    for branch in destination.branches:
        if any(not requests.unmet(match, sent) for match in branch.matches):
            return branch.matches, branch.targets, branch.sources
    others = {source for branch in destination.branches for source in branch.sources}
    return None, destination.targets, tuple(s for s in destination.sources if s not in others)


def _of_requests(caller: Proxy, destination: Destination) -> Iterable[Effect]:
    """What is done to requests before they are sent, or while they are answered; connections have none."""
    treatment = destination.treatment
    if treatment is None or destination.protocol is Protocol.TCP:
        return
    policy, source = treatment.policy, treatment.source
    fault = policy.fault
    if fault is not None and fault.delay is not None:
        yield Effect(
            source, "fault.delay", fault.delay_share / WHOLE, f"wait {_time(fault.delay)} before they are sent"
        )
    if fault is not None and fault.abort_status:
        status = f"{fault.abort_status}"
        if _is_grpc(caller):
            status = f"{requests.GRPC_STATUSES.get(fault.abort_status, 'UNKNOWN')} ({status})"
        yield Effect(source, "fault.abort", fault.abort_share / WHOLE, f"are answered {status}, and not sent")
    if policy.timeout is not None and not _is_grpc(caller):
        yield Effect(source, "timeout", 1.0, f"are answered 504 if they take longer than {_time(policy.timeout)}")


def _limits(caller: Proxy, target: Target, protocol: Protocol) -> Iterable[Effect]:
    """What the caller's proxy may have open there."""
    treatment = next(
        (u.treatment for u in caller.outbound.upstreams if (u.service, u.port) == (target.service, target.port)), None
    )
    if treatment is None or treatment.policy.limits is None:
        return
    limits = treatment.policy.limits
    http = protocol is not Protocol.TCP
    most = [
        (limits.connections, "connections", not _is_grpc(caller)),
        (limits.pending_requests, "that wait for a connection", not _is_grpc(caller)),
        (limits.requests, "requests", http),
    ]
    said = ", ".join(f"{number} {what}" for number, what, known in most if number is not None and known)
    if said:
        beyond = _unanswered(caller, protocol)
        yield Effect(treatment.source, "limits", 1.0, f"may be at most {said} at a time; beyond it {beyond}")


def _rate_limit(inbound: Inbound) -> Iterable[Effect]:
    if (limit := inbound.rate_limit) is not None:
        often = f"{limit.requests} each {_time(limit.per)}, {limit.burst} at once"
        for source in inbound.sources:
            yield Effect(source, "rateLimit", 1.0, f"may be at most {often}, of all callers; beyond it 429")


def _time(value: timedelta) -> str:
    return f"{value.total_seconds():g} s" if value >= timedelta(seconds=1) else f"{value.total_seconds() * 1000:g} ms"


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
            if _is_grpc(proxy):
                request = requests.answered(sent)
            else:
                request = requests.incoming(sent, source.uri(mesh.trust_domain), identity.uri(mesh.trust_domain))
        except BadRequest as e:
            who = "the server refuses it" if _is_grpc(proxy) else "the server's proxy answers 400"
            return Server(*of, allowed=False, mode=mode, refused=f"{e.message}: {who}")
        if request.path == names.HEALTH_PATH and not _is_grpc(proxy):
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
    passes = bool(by) or mode is not Mode.ENFORCING
    effects = tuple(_rate_limit(inbound)) if passes and request is not None and not _is_grpc(proxy) else ()
    if by:
        return Server(*of, allowed=True, mode=mode, by=tuple(by), left_out=left_out, effects=effects)
    closest = sorted(misses, key=lambda miss: (miss.of_others, len(miss.why), miss.permission.manifest))
    misses = closest[:MOST_MISSES]
    return Server(*of, allowed=False, mode=mode, misses=tuple(misses), left_out=left_out, effects=effects)


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
