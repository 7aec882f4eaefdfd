"""RDS: where an application's requests go, and who may ask what of it.

Policy is here and not in listeners, because a changed RouteConfiguration applies to open connections within
milliseconds and a changed listener only once they have drained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.type.matcher.v3 import path_pb2, regex_pb2, string_pb2

from smc.envoy import messages, names
from smc.model import Destination, Egress, HttpMatch, Permission, Policy, Target
from smc.xds.snapshot import Resource, Type

RBAC = "envoy.filters.http.rbac"


@dataclass(frozen=True, slots=True, eq=False)
class VirtualHost:
    """A Destination as callers of one namespace see it, ready to be joined with others.

    It does not hold the Destination: it is remembered for as long as that lives.
    """

    name: str
    port: int
    hosts: tuple[str, ...]
    """The most specific first."""
    domains: tuple[str, ...]
    sources: tuple[tuple[str, int], ...]
    routes: tuple[Any, ...]
    """A request takes the first that matches."""
    body: bytes
    """A serialised RouteConfiguration with this one virtual host and nothing else."""

    @classmethod
    def of(cls, destination: Destination, mesh_domain: str, *, same_namespace: bool) -> VirtualHost:
        name = names.cluster(destination.service, destination.port)
        hosts = names.hosts(destination.service, mesh_domain, same_namespace=same_namespace)
        return cls._of(name, destination.port, hosts, destination.sources, tuple(_to(destination)))

    def owning(self, owners: Mapping[tuple[str, int], VirtualHost]) -> VirtualHost | None:
        """The same with only the hosts that are its own in `owners` (by host and port); None when none is."""
        left = tuple(host for host in self.hosts if owners[host, self.port] is self)
        if left == self.hosts:
            return self
        return self._of(self.name, self.port, left, self.sources, self.routes) if left else None

    @classmethod
    def _of(
        cls, name: str, port: int, hosts: tuple[str, ...], sources: tuple[tuple[str, int], ...], routes: tuple[Any, ...]
    ) -> VirtualHost:
        domains = tuple(domain for host in hosts for domain in names.domains(host, port))
        message = route_components_pb2.VirtualHost(name=name, domains=domains, routes=routes)
        body = messages.serialised(route_pb2.RouteConfiguration(virtual_hosts=[message]))
        return cls(name, port, hosts, domains, sources, routes, body)


def outbound(virtual_hosts: Sequence[VirtualHost], egress: Egress) -> Resource:
    """The one RouteConfiguration of an explicit proxy: every service by every name, then the world outside."""
    joined = b"".join(host.body for host in _disjoint(virtual_hosts))
    message = route_pb2.RouteConfiguration(
        name=names.OUTBOUND,
        virtual_hosts=[
            route_components_pb2.VirtualHost(name=names.PASSTHROUGH, domains=["*"], routes=[_elsewhere(egress)])
        ],
        validate_clusters=messages.FALSE,
    )
    return messages.resource(
        Type.ROUTE,
        names.OUTBOUND,
        messages.serialised(message) + joined,
        sources=(source for host in virtual_hosts for source in host.sources),
    )


def inbound(app_port: int, rules: bytes, sources: Iterable[tuple[str, int]]) -> Resource:
    """Everything that reaches one port of the application: one route, and the union of all permissions on it.

    One route for each permission, taken by first match, would deny what another permission allows.
    """
    name = names.inbound_route(app_port)
    route = route_components_pb2.Route(
        match=route_components_pb2.RouteMatch(prefix="/"),
        route=_patiently(route_components_pb2.RouteAction(cluster=names.local(app_port))),
    )
    route.typed_per_filter_config[RBAC].MergeFromString(rules)
    message = route_pb2.RouteConfiguration(
        name=name,
        virtual_hosts=[route_components_pb2.VirtualHost(name=names.INBOUND, domains=["*"], routes=[route])],
        validate_clusters=messages.FALSE,
    )
    return messages.resource(Type.ROUTE, name, message, sources=sources)


def permissions(policy: Policy, trust_domain: str) -> bytes:
    """The union of all Permissions as an RBACPerRoute in a serialised Any; without any, everything is denied."""
    # `rules` must be present whatever it holds: an RBACPerRoute without rules switches the filter off.
    rules = rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW)
    seen: Counter[str] = Counter()
    for permission in policy.permissions:
        seen[permission.manifest] += 1
        nth = seen[permission.manifest]
        name = permission.manifest if nth == 1 else f"{permission.manifest}#{nth}"
        rules.policies[name].CopyFrom(_policy(permission, trust_domain))
    config = filter_pb2.RBACPerRoute(rbac=filter_pb2.RBAC(rules=rules))
    return messages.serialised(messages.packed(config))


def policy_sources(policy: Policy) -> list[tuple[str, int]]:
    """Every manifest that the Permissions were compiled from."""
    return [
        source
        for permission in policy.permissions
        for source in ((permission.manifest, permission.mod_revision), *permission.also)
    ]


def _policy(permission: Permission, trust_domain: str) -> Any:
    return rbac_pb2.Policy(
        permissions=[_request(match) for match in permission.http],
        principals=[
            rbac_pb2.Principal(
                authenticated=rbac_pb2.Principal.Authenticated(
                    principal_name=string_pb2.StringMatcher(exact=identity.uri(trust_domain))
                )
            )
            for identity in permission.sources
        ],
    )


def _request(match: HttpMatch) -> Any:
    parts = []
    if match.path is not None:
        path = path_pb2.PathMatcher(path=_whole(match.path))
        parts.append(rbac_pb2.Permission(url_path=path))
    if match.methods:
        methods = [_header(":method", string_pb2.StringMatcher(exact=method)) for method in match.methods]
        parts.append(_one_of(methods))
    parts.extend(_header(name, _whole(expression)) for name, expression in match.headers)
    if not parts:
        return rbac_pb2.Permission(any=True)
    if len(parts) == 1:
        return parts[0]
    return rbac_pb2.Permission(and_rules=rbac_pb2.Permission.Set(rules=parts))


def _one_of(rules: list[Any]) -> Any:
    return rules[0] if len(rules) == 1 else rbac_pb2.Permission(or_rules=rbac_pb2.Permission.Set(rules=rules))


def _header(name: str, matcher: Any) -> Any:
    return rbac_pb2.Permission(header=_header_matcher(name, matcher))


def _header_matcher(name: str, matcher: Any) -> Any:
    return route_components_pb2.HeaderMatcher(name=":authority" if name == "host" else name, string_match=matcher)


def _whole(expression: str) -> Any:
    """Envoy's safe_regex matches the whole value."""
    return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=expression))


def _disjoint(virtual_hosts: Sequence[VirtualHost]) -> Sequence[VirtualHost]:
    """Envoy refuses a whole RouteConfiguration in which a domain occurs twice, so none does.

    Where two services spell a host alike, the longer way of naming a service wins, then the order of the services.
    """
    if len(set().union(*(host.domains for host in virtual_hosts))) == sum(len(h.domains) for h in virtual_hosts):
        return virtual_hosts
    owners: dict[tuple[str, int], VirtualHost] = {}
    for rank in range(max(len(host.hosts) for host in virtual_hosts)):
        for host in virtual_hosts:
            if rank < len(host.hosts):
                owners.setdefault((host.hosts[rank], host.port), host)
    kept = (host.owning(owners) for host in virtual_hosts)
    return [host for host in kept if host is not None]


def _to(destination: Destination) -> Iterator[Any]:
    for branch in destination.branches:
        for match in branch.matches:
            yield route_components_pb2.Route(match=_matching(match), route=_share(branch.targets))
    everything = route_components_pb2.RouteMatch(prefix="/")
    if destination.targets:
        yield route_components_pb2.Route(match=everything, route=_share(destination.targets))
    else:
        text = f"no backend of {destination.service} port {destination.port} has a weight above 0"
        yield route_components_pb2.Route(match=everything, direct_response=_response(503, text))


def _share(targets: Sequence[Target]) -> Any:
    if len(targets) == 1:
        return _patiently(route_components_pb2.RouteAction(cluster=names.cluster(targets[0].service, targets[0].port)))
    shares = zip(targets, messages.ratio([target.weight for target in targets]), strict=True)
    clusters = [
        route_components_pb2.WeightedCluster.ClusterWeight(
            name=names.cluster(target.service, target.port), weight=messages.uint32(weight)
        )
        for target, weight in shares
    ]
    return _patiently(
        route_components_pb2.RouteAction(weighted_clusters=route_components_pb2.WeightedCluster(clusters=clusters))
    )


def _matching(match: HttpMatch) -> Any:
    """The same requests as `_request` has them, for a route."""
    headers = [_header_matcher(name, _whole(expression)) for name, expression in match.headers]
    if match.methods:
        headers.append(_header_matcher(":method", _whole("|".join(match.methods))))
    if match.path is None:
        return route_components_pb2.RouteMatch(prefix="/", headers=headers)
    return route_components_pb2.RouteMatch(safe_regex=regex_pb2.RegexMatcher(regex=match.path), headers=headers)


def _elsewhere(egress: Egress) -> Any:
    match = route_components_pb2.RouteMatch(prefix="/")
    if egress is Egress.DENY:
        text = "no service of the mesh answers to this host and port, and the mesh lets no request out (egress: deny)"
        return route_components_pb2.Route(match=match, direct_response=_response(502, text))
    action = route_components_pb2.RouteAction(cluster=names.PASSTHROUGH)
    return route_components_pb2.Route(match=match, route=_patiently(action))


def _patiently(action: Any) -> Any:
    """No timeout: how long a request may take is for the application to say."""
    action.timeout.SetInParent()
    return action


def _response(status: int, text: str) -> Any:
    return route_components_pb2.DirectResponseAction(
        status=status, body=base_pb2.DataSource(inline_string=f"smc: {text}\n")
    )
