"""RDS and VHDS: where an application's requests go, and who may ask what of it.

Policy is here and not in listeners, because a changed RouteConfiguration applies to open connections within
milliseconds and a changed listener only once they have drained.

A TCP port has a virtual host too, where an application names its proxy. A request to it is told why it goes nowhere;
CONNECT, by which programs with a proxy setting ask for a connection, goes where the connections of that port go.
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

from smc.envoy import messages, names, tls, traffic
from smc.model import (
    Destination,
    Egress,
    EgressHost,
    HttpMatch,
    Identity,
    MeshConfig,
    Mode,
    Name,
    Permission,
    Policy,
    Protocol,
    RateLimit,
    Target,
)
from smc.xds import virtual_hosts
from smc.xds.snapshot import Resource, Type

RBAC = "envoy.filters.http.rbac"
CONNECT = "CONNECT"
"""The upgrade that a route has to allow, and its listener to know of."""


@dataclass(frozen=True, slots=True, eq=False)
class VirtualHost:
    """A Destination as callers of one namespace see it.

    It does not hold the Destination: it is remembered for as long as that lives.
    """

    port: int
    hosts: tuple[str, ...]
    """The most specific first."""
    routes: tuple[Any, ...]
    """A request takes the first that matches."""
    dialled: bool
    """Whether the connection says which port is meant, and not the request."""
    resource: Resource

    @classmethod
    def of(cls, destination: Destination, mesh_domain: str, *, same_namespace: bool) -> VirtualHost:
        """As applications that name each service in their requests see it."""
        name = names.virtual_host(names.OUTBOUND, destination.service, destination.port)
        hosts = names.hosts(destination.service, mesh_domain, same_namespace=same_namespace)
        return cls._of(name, destination.port, hosts, destination.versions, tuple(_to(destination)))

    @classmethod
    def of_dialled(
        cls, destination: Destination, address: str, mesh_domain: str, *, same_namespace: bool
    ) -> VirtualHost:
        """As intercepted callers see it, who dial `address`."""
        name = names.virtual_host(names.outbound_route(destination.port), destination.service, destination.port)
        hosts = (address, *names.hosts(destination.service, mesh_domain, same_namespace=same_namespace))
        return cls._of(name, destination.port, hosts, destination.versions, tuple(_to(destination)), dialled=True)

    @classmethod
    def of_application(
        cls,
        service: Name,
        port: int,
        app_port: int,
        rules: bytes,
        sources: Iterable[tuple[str, int]],
        limit: RateLimit | None,
        mesh_domain: str,
        *,
        same_namespace: bool,
    ) -> VirtualHost:
        """The port of the proxy's own application that a service port leads to, under `rules` as `inbound` has them."""
        hosts = names.hosts(service, mesh_domain, same_namespace=same_namespace)
        name = names.virtual_host(names.PLAINTEXT_ROUTE, service, port)
        return cls._of(name, port, hosts, sources, (_judged(app_port, rules, limit),))

    def owning(self, owners: Mapping[tuple[str, int], VirtualHost]) -> VirtualHost | None:
        """The same with only the hosts that are its own in `owners` (by host and port); None when none is."""
        left = tuple(host for host in self.hosts if owners[host, self.port] is self)
        if left == self.hosts:
            return self
        if not left:
            return None
        sources = [(source.manifest, source.mod_revision) for source in self.resource.sources]
        return self._of(self.resource.name, self.port, left, sources, self.routes, dialled=self.dialled)

    @classmethod
    def _of(
        cls,
        name: str,
        port: int,
        hosts: tuple[str, ...],
        sources: Iterable[tuple[str, int]],
        routes: tuple[Any, ...],
        *,
        dialled: bool = False,
    ) -> VirtualHost:
        domains = tuple(domain for host in hosts for domain in names.domains(host, None if dialled else port))
        return cls(port, hosts, routes, dialled, _host(name, domains, routes, sources))


def elsewhere(config: MeshConfig) -> Resource:
    """The virtual host of an explicit proxy for all that is no service: the world outside."""
    return _host(virtual_hosts.name(names.OUTBOUND, virtual_hosts.OTHERS), ["*"], _elsewhere(config))


def nowhere(port: int) -> Resource:
    """The virtual host of an intercepted proxy for what was sent to a service's address, and names none.

    Whoever else may be meant lives elsewhere.
    """
    text = f"no service of the mesh answers to this host at port {port}, and this is where a service was dialled"
    refused = route_components_pb2.Route(
        match=route_components_pb2.RouteMatch(prefix="/"), direct_response=_response(502, text)
    )
    return _host(virtual_hosts.name(names.outbound_route(port), virtual_hosts.OTHERS), ["*"], [refused])


def _host(
    name: str, domains: Iterable[str], routes: Iterable[Any], sources: Iterable[tuple[str, int]] = ()
) -> Resource:
    message = route_components_pb2.VirtualHost(name=name, domains=domains, routes=routes)
    return messages.resource(Type.VIRTUAL_HOST, name, message, sources=sources)


def inbound(
    app_port: int, rules: bytes, sources: Iterable[tuple[str, int]], limit: RateLimit | None = None
) -> Resource:
    """Everything that reaches one port of the application: one route, and the union of all permissions on it.

    One route for each permission, taken by first match, would deny what another permission allows.
    """
    name = names.inbound_route(app_port)
    host = route_components_pb2.VirtualHost(name=names.INBOUND, domains=["*"], routes=[_judged(app_port, rules, limit)])
    message = route_pb2.RouteConfiguration(name=name, virtual_hosts=[host], validate_clusters=messages.FALSE)
    return messages.resource(Type.ROUTE, name, message, sources=sources)


def plaintext(hosts: Sequence[VirtualHost]) -> Resource:
    """What reaches an explicit proxy without TLS, where that is let in: the host says for which port it is."""
    text = "no service of this workload answers to this host and port"
    route = route_components_pb2.Route(
        match=route_components_pb2.RouteMatch(prefix="/"), direct_response=_response(404, text)
    )
    # Nothing is called, so there is nothing to judge: without this the filter would say that policy denies it.
    route.typed_per_filter_config[RBAC].CopyFrom(messages.packed(filter_pb2.RBACPerRoute()))
    message = route_pb2.RouteConfiguration(
        name=names.PLAINTEXT_ROUTE,
        virtual_hosts=[route_components_pb2.VirtualHost(name=names.PLAINTEXT, domains=["*"], routes=[route])],
        validate_clusters=messages.FALSE,
    )
    for host in disjoint(hosts):
        message.virtual_hosts.add().MergeFromString(host.resource.body)
    sources = {(source.manifest, source.mod_revision) for host in hosts for source in host.resource.sources}
    return messages.resource(Type.ROUTE, names.PLAINTEXT_ROUTE, message, sources=sources)


def answered(app_port: int, rules: bytes, sources: Iterable[tuple[str, int]]) -> Resource:
    """As `inbound`, of an application that takes its requests from the network itself."""
    name = names.inbound_route(app_port)
    route = route_components_pb2.Route(
        match=route_components_pb2.RouteMatch(prefix="/"),
        non_forwarding_action=route_components_pb2.NonForwardingAction(),
    )
    route.typed_per_filter_config[RBAC].MergeFromString(rules)
    return _everywhere(name, [route], sources)


def alone(name: str, destination: Destination) -> Resource:
    """The RouteConfiguration of one Destination, for who asks for nothing else by it."""
    return _everywhere(name, _to(destination), destination.versions)


def _everywhere(name: str, found: Iterable[Any], sources: Iterable[tuple[str, int]]) -> Resource:
    host = route_components_pb2.VirtualHost(name=name, domains=["*"], routes=found)
    return messages.resource(
        Type.ROUTE, name, route_pb2.RouteConfiguration(name=name, virtual_hosts=[host]), sources=sources
    )


def _judged(app_port: int, rules: bytes, limit: RateLimit | None) -> Any:
    route = route_components_pb2.Route(
        match=route_components_pb2.RouteMatch(prefix="/"),
        route=_patiently(route_components_pb2.RouteAction(cluster=names.local(app_port))),
    )
    route.typed_per_filter_config[RBAC].MergeFromString(rules)
    return route if limit is None else traffic.rate_limited(route, limit)


def permissions(policy: Policy, trust_domain: str, mode: Mode = Mode.ENFORCING, *, known: bool = False) -> bytes:
    """The union of all Permissions as an RBACPerRoute in a serialised Any; without any, everything is denied.

    Unless the mode is ENFORCING, what that would deny is let through and counted. Only certificates that are barred are
    refused in every mode: to have one is no matter of policy. With `known` it is let through for workloads of this mesh
    alone, where TLS takes whatever the authority has signed, such as an operator's credential.
    """
    # `rules` must be present whatever it holds: an RBACPerRoute without rules switches the filter off.
    rules = rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW)
    seen: Counter[str] = Counter()
    for permission in policy.permissions:
        seen[permission.manifest] += 1
        nth = seen[permission.manifest]
        name = permission.manifest if nth == 1 else f"{permission.manifest}#{nth}"
        rules.policies[name].CopyFrom(_policy(permission, trust_domain, policy.barred))
    rbac = filter_pb2.RBAC(rules=rules)
    if mode is not Mode.ENFORCING:
        anybody = rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW)
        anybody.policies[mode.value].permissions.add(any=True)
        revoked = [_caller(identity, trust_domain) for identity in policy.banned]
        everybody = _workload(trust_domain) if known else rbac_pb2.Principal(any=True)
        anybody.policies[mode.value].principals.extend(_without([everybody], policy.barred, revoked))
        rbac = filter_pb2.RBAC(rules=anybody, shadow_rules=rules)
    config = filter_pb2.RBACPerRoute(rbac=rbac)
    return messages.serialised(messages.packed(config))


def policy_sources(policy: Policy) -> list[tuple[str, int]]:
    """Every manifest that the Permissions were compiled from."""
    return [
        source
        for permission in policy.permissions
        for source in ((permission.manifest, permission.mod_revision), *permission.also)
    ]


def _policy(permission: Permission, trust_domain: str, barred: tuple[str, ...]) -> Any:
    principals = [_caller(identity, trust_domain) for identity in permission.sources]
    return rbac_pb2.Policy(
        permissions=[_request(match) for match in permission.http], principals=_without(principals, barred)
    )


def _caller(identity: Identity, trust_domain: str) -> Any:
    return _shown(string_pb2.StringMatcher(exact=identity.uri(trust_domain)))


def _workload(trust_domain: str) -> Any:
    return _shown(tls.of_workloads(trust_domain))


def _shown(uri: Any) -> Any:
    return rbac_pb2.Principal(authenticated=rbac_pb2.Principal.Authenticated(principal_name=uri))


def _without(principals: list[Any], barred: tuple[str, ...], revoked: Sequence[Any] = ()) -> list[Any]:
    """Those of the principals that show none of these certificates, and are none of the revoked ones.

    TLS asks for revocation at the handshake only. The certificate of an open connection is in the header that the
    connection manager has set anew, whatever the peer had sent, before any filter sees the request.
    """
    if not (barred or revoked):
        return principals
    shown = [
        *revoked,
        *(
            rbac_pb2.Principal(
                header=_header_matcher(
                    "x-forwarded-client-cert", string_pb2.StringMatcher(contains=f"Hash={fingerprint};")
                )
            )
            for fingerprint in barred
        ),
    ]
    one_of = rbac_pb2.Principal(or_ids=rbac_pb2.Principal.Set(ids=principals))
    none_of = rbac_pb2.Principal(not_id=rbac_pb2.Principal(or_ids=rbac_pb2.Principal.Set(ids=shown)))
    return [rbac_pb2.Principal(and_ids=rbac_pb2.Principal.Set(ids=[one_of, none_of]))]


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


def disjoint(hosts: Sequence[VirtualHost]) -> Sequence[VirtualHost]:
    """Envoy refuses a whole RouteConfiguration in which a domain occurs twice, so none does; most often as they are.

    Where two services spell a host alike, the longer way of naming a service wins, then the order of the services.
    """
    if len({(name, host.port) for host in hosts for name in host.hosts}) == sum(len(host.hosts) for host in hosts):
        return hosts
    owners: dict[tuple[str, int], VirtualHost] = {}
    for rank in range(max(len(host.hosts) for host in hosts)):
        for host in hosts:
            if rank < len(host.hosts):
                owners.setdefault((host.hosts[rank], host.port), host)
    kept = (host.owning(owners) for host in hosts)
    return [host for host in kept if host is not None]


def _to(destination: Destination) -> Iterator[Any]:
    if destination.protocol is Protocol.TCP:
        return _connecting_to(destination)
    if destination.treatment is None:
        return _asking(destination)
    policy = destination.treatment.policy
    return (traffic.treat(route, policy) for route in _asking(destination))


def _asking(destination: Destination) -> Iterator[Any]:
    for branch in destination.branches:
        for match in branch.matches:
            yield route_components_pb2.Route(match=_matching(match), route=_share(branch.targets))
    everything = route_components_pb2.RouteMatch(prefix="/")
    if destination.targets:
        yield route_components_pb2.Route(match=everything, route=_share(destination.targets))
    else:
        text = f"no backend of {destination.service} port {destination.port} has a weight above 0"
        yield route_components_pb2.Route(match=everything, direct_response=_response(503, text))


def _connecting_to(destination: Destination) -> Iterator[Any]:
    if destination.targets:
        matcher = route_components_pb2.RouteMatch.ConnectMatcher()
        action = _share(destination.targets)
        terminated = route_components_pb2.RouteAction.UpgradeConfig.ConnectConfig()
        action.upgrade_configs.add(upgrade_type=CONNECT, connect_config=terminated)
        yield route_components_pb2.Route(match=route_components_pb2.RouteMatch(connect_matcher=matcher), route=action)
    text = (
        f"port {destination.port} of {destination.service} is TCP, and this is an HTTP request: "
        "use CONNECT, or let the sidecar intercept the connection"
    )
    everything = route_components_pb2.RouteMatch(prefix="/")
    yield route_components_pb2.Route(match=everything, direct_response=_response(400, text))


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


def _elsewhere(config: MeshConfig) -> list[Any]:
    """Where requests go that no service answers to. The hosts that are let out are no domains of their own: so none can
    meet a service's, which would cost every caller its whole configuration, and the service wins.
    """
    match = route_components_pb2.RouteMatch(prefix="/")
    action = _patiently(route_components_pb2.RouteAction(cluster=names.PASSTHROUGH))
    if config.egress is Egress.ALLOW:
        return [route_components_pb2.Route(match=match, route=action)]
    text = "no service of the mesh answers to this host and port, and the mesh lets no request out (egress: deny)"
    return [
        *(
            route_components_pb2.Route(
                match=route_components_pb2.RouteMatch(
                    prefix="/", headers=[_header_matcher(":authority", _whole(_spelled(host)))]
                ),
                route=action,
            )
            for host in config.egress_hosts
        ),
        route_components_pb2.Route(match=match, direct_response=_response(502, text)),
    ]


def _spelled(host: EgressHost) -> str:
    """A regular expression for how requests spell it: in any case, with a trailing dot, port 80 also by silence."""
    suffix = host.host.removeprefix("*.")
    name = ("[a-z0-9_.-]+[.]" if suffix != host.host else "") + suffix.replace(".", "[.]")
    port = "(:[0-9]+)?" if host.port is None else "(:80)?" if host.port == 80 else f":{host.port}"
    return f"(?i){name}[.]?{port}"


def _patiently(action: Any) -> Any:
    """No timeout: how long a request may take is for the application to say."""
    action.timeout.SetInParent()
    return action


def _response(status: int, text: str) -> Any:
    return route_components_pb2.DirectResponseAction(
        status=status, body=base_pb2.DataSource(inline_string=f"smc: {text}\n")
    )
