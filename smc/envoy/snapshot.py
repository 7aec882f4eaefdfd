"""From a Mesh to what each proxy should have, rebuilding no more than what changed.

Each resource is made from the smallest noun that it needs and remembered with it, for as long as that noun lives.
What comes out equal is made the same object again, each resource, each set and each Layer, and the Snapshot of a proxy
stays the same while its Layers do: so "the same object" means "nothing to send" all the way down to the wire.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from smc.envoy import clusters, endpoints, interception, listeners, names, proxyless, routes, secrets
from smc.mesh import Mesh, Proxy
from smc.model import (
    Assignment,
    Destination,
    Egress,
    Frontend,
    Identity,
    Inbound,
    MeshConfig,
    Mode,
    Name,
    Outbound,
    Policy,
    Protocol,
    RateLimit,
    Sidecar,
    Upstream,
)
from smc.records import BundleRecord, CertificateRecord, CrlRecord
from smc.xds import virtual_hosts
from smc.xds.snapshot import EMPTY, Layer, Resource, ResourceSet, Snapshot, Type

K = TypeVar("K")
V = TypeVar("V")


class Generator:
    """Makes Snapshots. Not safe for use by two threads at once.

    `open_key` gives the PKCS#8 PEM of a certificate's key; what it raises is raised by `snapshot`.
    """

    def __init__(self, open_key: Callable[[CertificateRecord], bytes]) -> None:
        self._open_key = open_key
        self._interned = _Interned()
        self._mesh: ref[Mesh] | None = None
        """Of which a Snapshot was made last."""
        self._given: _Given | None = None
        """What that Mesh gives all of its proxies."""
        self._last: dict[Name, _Last] = {}

    def snapshot(self, mesh: Mesh, proxy: Name) -> Snapshot:
        """All that `proxy` should have in `mesh`: the same object as before if nothing in it, nor the config, differs.

        Raises:
            KeyError: the mesh has no such proxy.
        """
        found, given = mesh.proxies[proxy], self._given_by(mesh)
        last = self._last.get(proxy)
        if last is not None and last.given is given:
            if last.proxy is found:
                return last.snapshot
            own = last.own if _differ_in_outbound_alone(last.proxy, found) else self._own(found, given)
        else:
            own = self._own(found, given)
        if found.workload.sidecar is Sidecar.GRPC:
            callees = given.settings.asked_by_name(found.outbound)
        else:
            reconnect = found.certificate.reconnect if found.certificate is not None else ""
            callees = given.settings.callees(found.outbound, reconnect)
        snapshot = self._snapshot(own, callees)
        if last is None:
            if len(self._last) >= len(mesh.proxies):  # some of them are gone
                self._last = {name: kept for name, kept in self._last.items() if name in mesh.proxies}
            self._last[proxy] = _Last(found, given, own, snapshot)
        else:
            last.proxy, last.given, last.own, last.snapshot = found, given, own, snapshot
        return snapshot

    def _snapshot(self, own: _Own, callees: _Callees) -> Snapshot:
        before = own.callees
        if before is callees:
            return own.snapshot  # this proxy's, or that of one that is equal
        # Most often only what it calls has changed, and of that only what is not joined with its own.
        as_before = before is not None and before.joined == callees.joined
        layer = own.snapshot.own if as_before else self._joined(own, callees.joined)
        if own.snapshot.own is not layer or own.snapshot.shared is not callees.shared:
            own.snapshot = Snapshot(layer, callees.shared)
        own.callees = callees
        return own.snapshot

    def _joined(self, own: _Own, joined: _Joined) -> Layer:
        return self._interned.layer(
            {
                Type.CLUSTER: self._interned.joined(joined.clusters, own.clusters),
                Type.SECRET: own.secrets,
                Type.LISTENER: self._interned.joined(joined.listeners, own.listeners),
                Type.ROUTE: self._interned.joined(joined.routes, own.routes),
            }
        )

    def _given_by(self, mesh: Mesh) -> _Given:
        """The same object for as long as it is equal."""
        given = self._given
        if given is not None and self._mesh is not None and self._mesh() is mesh:
            return given
        if given is None or not given.settings.are_of(mesh):
            settings = _Settings(mesh.trust_domain, mesh.config, self._interned)
            given = _Given(settings, mesh.bundle, mesh.crl)
            self._last.clear()
        elif (mesh.bundle, mesh.crl) != (given.bundle, given.crl):
            given = _Given(given.settings, mesh.bundle, mesh.crl)
        self._mesh, self._given = ref(mesh), given
        return given

    def _own(self, proxy: Proxy, given: _Given) -> _Own:
        settings, workload = given.settings, proxy.workload
        if workload.sidecar is Sidecar.GRPC:
            return self._proxyless(proxy, given)
        served = tuple(inbound for inbound in proxy.inbound if inbound.services)
        listening = []
        if workload.sidecar is Sidecar.EXPLICIT:
            listening.append(settings.outbound_listener(workload.address, workload.app_address))
        if served:  # Envoy refuses a listener without a filter chain
            listening.append(settings.inbound_listener(proxy, served))
        own = _Own(
            tuple(listening),
            tuple(settings.local(inbound, workload.app_address) for inbound in served),
            settings.inbound_routes(proxy, tuple(i for i in served if i.protocol is not Protocol.TCP)),
            self._secrets(proxy, given),
        )
        return self._interned.own(own)

    def _proxyless(self, proxy: Proxy, given: _Given) -> _Own:
        served = tuple(inbound for inbound in proxy.inbound if inbound.services)
        listening = (listener for i in served for listener in proxyless.server_listeners(proxy.workload, i))
        own = _Own(
            tuple(self._interned.resource(listener) for listener in listening),
            (),
            tuple(given.settings.answered(proxy.policy, i.port, i.numbers, proxy.mode) for i in served),
            self._secrets(proxy, given),
        )
        return self._interned.own(own)

    def _secrets(self, proxy: Proxy, given: _Given) -> ResourceSet:
        found = []
        if given.bundle is not None:
            lists = given.crl.lists if given.crl is not None else ()
            found.append(self._interned.resource(secrets.bundle(given.bundle.roots, lists)))
        if proxy.certificate is not None:
            found.append(self._identity(proxy.certificate))
        return self._interned.set(found)

    def _identity(self, certificate: CertificateRecord) -> Resource:
        """Opened once for all proxies of the identity, and forgotten with the last Snapshot that holds it."""
        known = self._interned.identities.get(certificate)
        if known is None:
            known = self._interned.resource(secrets.identity(certificate.chain, self._open_key(certificate)))
            self._interned.identities[certificate] = known
        return known


class _Joined(NamedTuple):
    """What a proxy has of its own comes to these."""

    clusters: ResourceSet
    listeners: ResourceSet
    routes: ResourceSet


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Callees:
    """What proxies with the same Outbound have in common."""

    joined: _Joined
    shared: Layer
    """The load assignments and virtual hosts, of which no proxy has its own."""
    shares: tuple[_Shared, ...] = ()
    """Those of these sets that others have as well."""
    asked: tuple[Destination, ...] = ()
    """What each virtual host but that of all others was made from, whole; empty: some have lost domains to another."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Shared:
    """What was made from the same nouns for callees that differ in others. It is gone with the last of them."""

    resources: ResourceSet


class _Own:
    """What a proxy has whoever it calls: the same object for proxies that have the same."""

    __slots__ = ("__weakref__", "callees", "clusters", "listeners", "routes", "secrets", "snapshot")

    def __init__(
        self,
        listeners: tuple[Resource, ...],
        clusters: tuple[Resource, ...],
        routes: tuple[Resource, ...],
        secrets: ResourceSet,
    ) -> None:
        self.listeners = listeners
        self.clusters = clusters
        self.routes = routes
        self.secrets = secrets
        self.callees: _Callees | None = None
        """Of the Snapshot that was made with it last."""
        self.snapshot = Snapshot()


class _Given(NamedTuple):
    """What is the same for all proxies of a mesh."""

    settings: _Settings
    bundle: BundleRecord | None
    """Whose certificates are taken."""
    crl: CrlRecord | None
    """Which of them are not."""


@dataclass(slots=True)
class _Last:
    """What was made for a proxy last, and from what."""

    proxy: Proxy
    given: _Given
    own: _Own
    snapshot: Snapshot


_REST = slice(Proxy._fields.index("outbound") + 1, None)
"""All of a Proxy but its Workload and its Outbound."""


def _differ_in_outbound_alone(one: Proxy, other: Proxy) -> bool:
    """Whether `_Own` of both is the same, which is made from all of a Proxy but its Outbound."""
    mine, its = one.workload, other.workload
    return one[_REST] == other[_REST] and (
        mine is its or (mine.address, mine.app_address, mine.sidecar) == (its.address, its.app_address, its.sidecar)
    )


class _Interned:
    """One object for equal things, for as long as somebody holds it."""

    def __init__(self) -> None:
        self.identities: WeakValueDictionary[CertificateRecord, Resource] = WeakValueDictionary()
        self._resources: WeakValueDictionary[Hashable, Resource] = WeakValueDictionary()
        self._sets: WeakValueDictionary[tuple[Resource, ...], ResourceSet] = WeakValueDictionary()
        self._joined: WeakValueDictionary[tuple[object, ...], ResourceSet] = WeakValueDictionary()
        self._own: WeakValueDictionary[tuple[object, ...], _Own] = WeakValueDictionary()
        self._layers: WeakValueDictionary[tuple[tuple[Type, ResourceSet], ...], Layer] = WeakValueDictionary()

    def resource(self, made: Resource) -> Resource:
        return self._resources.setdefault((made.type, made.name, made.version, made.sources, made.warms), made)

    def set(self, resources: Iterable[Resource]) -> ResourceSet:
        return self._set(ResourceSet.of(resources))

    def replacing(self, before: ResourceSet, resources: Iterable[Resource]) -> ResourceSet:
        """`before.replacing(resources)`."""
        return self._set(before.replacing(resources))

    def _set(self, made: ResourceSet) -> ResourceSet:
        key = tuple(made.resources.values())
        return self._sets.setdefault(key, made) if key else EMPTY

    def joined(self, shared: ResourceSet, own: tuple[Resource, ...]) -> ResourceSet:
        """All of both."""
        if not own:
            return shared  # under a key of itself it would be held for ever
        key = (shared, own)
        known = self._joined.get(key)
        if known is None:
            known = self._joined[key] = self.set((*shared.resources.values(), *own))
        return known

    def layer(self, sets: Mapping[Type, ResourceSet]) -> Layer:
        return self._layers.setdefault(tuple(sets.items()), Layer(sets))

    def own(self, made: _Own) -> _Own:
        return self._own.setdefault((made.listeners, made.clusters, made.routes, made.secrets), made)


class _Memo(Generic[K, V]):
    """What was made from a noun and a few plain values, for as long as the noun lives."""

    def __init__(self, make: Callable[..., V]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[K, dict[tuple[Any, ...], V]] = WeakKeyDictionary()

    def __call__(self, noun: K, *rest: Hashable) -> V:
        try:
            return self._made[noun][rest]
        except KeyError:
            pass
        made = self._made.get(noun)
        if made is None:
            made = self._made[noun] = {}
        value = made[rest] = self._make(noun, *rest)
        return value


class _Settings:
    """Every memo that depends on the trust domain and MeshConfig: another one of these makes new ones."""

    def __init__(self, trust_domain: str, config: MeshConfig, interned: _Interned) -> None:
        self.trust_domain = trust_domain
        self.config = config
        self._interned = interned
        named = (clusters.passthrough(),) if config.egress is Egress.ALLOW or config.egress_hosts else ()
        dialled = (clusters.original_destination(),) if named else ()
        self._elsewhere = tuple(interned.resource(cluster) for cluster in named)
        """The clusters of what explicit applications ask for outside the mesh."""
        by_name = named if config.egress is Egress.DENY else ()
        self._dialled_elsewhere = tuple(interned.resource(cluster) for cluster in (*by_name, *dialled))
        """Those of what intercepted ones dial there."""
        self._elsewhere_host = interned.resource(routes.elsewhere(config))
        """Where requests go whose host is no service's."""
        self.callees: _Memo[Outbound, _Callees] = _Memo(self._callees)
        self._alike: WeakValueDictionary[Hashable, _Callees] = WeakValueDictionary()
        """By what decides where requests go."""
        self._latest: WeakValueDictionary[tuple[str, int], _Callees] = WeakValueDictionary()
        """Of the explicit proxies of a namespace that are told of so many Destinations, those made last."""
        self._shared: WeakValueDictionary[Hashable, _Shared] = WeakValueDictionary()
        """By the nouns: of all namespaces, and of hundreds of services, most have the same."""
        self.asked_by_name: _Memo[Outbound, _Callees] = _Memo(self._asked_by_name)
        self.local: _Memo[Inbound, Resource] = _Memo(self._local)
        self.permitted: _Memo[Policy, Resource] = _Memo(self._permitted)
        self.answered: _Memo[Policy, Resource] = _Memo(self._answered)
        self._rules: _Memo[Policy, bytes] = _Memo(lambda policy, mode: routes.permissions(policy, trust_domain, mode))
        self._upstreams: _Memo[Upstream, Resource] = _Memo(self._upstream)
        self._assignments: _Memo[Assignment, Resource] = _Memo(
            lambda assignment: interned.resource(endpoints.load_assignment(assignment))
        )
        self._named_clusters: _Memo[Upstream, Resource] = _Memo(
            lambda upstream: interned.resource(proxyless.cluster(upstream, trust_domain, config.mesh_domain))
        )
        self._named_listeners: _Memo[Destination, tuple[Resource, ...]] = _Memo(self._named_listener)
        self._named_routes: _Memo[Destination, Resource] = _Memo(
            lambda destination: interned.resource(proxyless.route(destination))
        )
        self._virtual_hosts: _Memo[Destination, routes.VirtualHost] = _Memo(self._virtual_host)
        self._dialled_hosts: _Memo[Destination, routes.VirtualHost] = _Memo(self._dialled_host)
        self._dialled_chains: _Memo[Destination, bytes] = _Memo(
            lambda destination, address: interception.chain(destination, address, config)
        )
        self._answers: _Memo[Frontend, bytes] = _Memo(
            lambda frontend, same: interception.answers(frontend, config.mesh_domain, same_namespace=same)
        )
        self._http_chains: _Memo[Inbound, bytes] = _Memo(self._http_chain)
        self._tcp_chains: _Memo[Inbound, bytes] = _Memo(self._tcp_chain)

    def are_of(self, mesh: Mesh) -> bool:
        same = self.config is mesh.config or self.config == mesh.config
        return same and self.trust_domain == mesh.trust_domain

    def outbound_listener(self, address: str, app_address: str) -> Resource:
        return self._interned.resource(listeners.outbound(address, app_address, self.config))

    def inbound_listener(self, proxy: Proxy, served: tuple[Inbound, ...]) -> Resource:
        chains: list[bytes] = []
        http_ports: list[int] = []
        sources: list[tuple[str, int]] = []
        for inbound in served:
            if inbound.protocol is Protocol.TCP:
                held = proxy.policy.at(inbound.numbers).of_connections
                callers = tuple(sorted({caller for permission in held.permissions for caller in permission.sources}))
                chains.append(self._tcp_chains(inbound, callers, held.barred, held.banned, proxy.mode))
                sources.extend(routes.policy_sources(held))
            else:
                chains.append(self._http_chains(inbound))
                http_ports.append(inbound.port)
        wanted = [names.inbound_route(port) for port in http_ports]
        redirected = proxy.workload.sidecar is Sidecar.INTERCEPTED
        if redirected and proxy.mode is Mode.PERMISSIVE:
            chains.extend(self._plaintext_chains(inbound) for inbound in served)
        elif http_ports and _tells_plaintext_by_host(proxy):
            chains.append(listeners.plaintext_chain(self.config))
            wanted.append(names.PLAINTEXT_ROUTE)
        return self._interned.resource(
            listeners.inbound(proxy.workload.address, b"".join(chains), wanted, sources, redirected=redirected)
        )

    def _plaintext_chains(self, inbound: Inbound) -> bytes:
        if inbound.protocol is Protocol.TCP:
            return listeners.plaintext_tcp_chain(self.config, inbound.port, self.trust_domain)
        return listeners.plaintext_chain(self.config, inbound.port)

    def inbound_routes(self, proxy: Proxy, served: tuple[Inbound, ...]) -> tuple[Resource, ...]:
        """Of the ports that speak HTTP."""
        found = [self.permitted(proxy.policy, i.port, i.numbers, proxy.mode, i.rate_limit, i.sources) for i in served]
        if served and _tells_plaintext_by_host(proxy):
            found.append(self._interned.resource(routes.plaintext(self._applications(proxy, served))))
        return tuple(found)

    def _applications(self, proxy: Proxy, served: tuple[Inbound, ...]) -> list[routes.VirtualHost]:
        namespace = proxy.workload.name.namespace
        return [
            routes.VirtualHost.of_application(
                service,
                port,
                inbound.port,
                self._rules(held, proxy.mode),
                (*routes.policy_sources(held), *inbound.sources),
                inbound.rate_limit,
                self.config.mesh_domain,
                same_namespace=service.namespace == namespace,
            )
            for inbound in served
            for held in (proxy.policy.at(inbound.numbers),)
            for service, port in inbound.services
        ]

    def _callees(self, outbound: Outbound, reconnect: str) -> _Callees:
        elsewhere = self._elsewhere if outbound.frontends is None else self._dialled_elsewhere
        # Most often only an assignment is another one, and the tuples that say where requests go are as they were.
        key = (outbound.namespace, outbound.destinations, outbound.frontends)
        alike = self._alike.get(key)
        if alike is not None:
            (_, listening, routed), asked = alike.joined, alike.asked
            hosts = alike.shared.sets[Type.VIRTUAL_HOST]
        elif outbound.frontends is None:
            listening, (routed, hosts, asked) = EMPTY, self._asked(outbound)
        else:
            asked = ()
            listening, routed, hosts = self._dialled(outbound, {f.service: f.address for f in outbound.frontends})
        clusters = self._share(
            (reconnect, elsewhere, outbound.upstreams),
            lambda: (*elsewhere, *(self._upstreams(u, reconnect) for u in outbound.upstreams)),
        )
        assigned = self._share(outbound.assignments, lambda: map(self._assignments, outbound.assignments))
        made = self._alike[key] = _Callees(
            _Joined(clusters.resources, listening, routed),
            self._interned.layer({Type.ENDPOINT: assigned.resources, Type.VIRTUAL_HOST: hosts}),
            (clusters, assigned),
            asked,
        )
        if asked:
            self._latest[outbound.namespace, len(asked)] = made
        return made

    def _share(self, nouns: Hashable, make: Callable[[], Iterable[Resource]]) -> _Shared:
        known = self._shared.get(nouns)
        if known is None:
            known = self._shared[nouns] = _Shared(self._interned.set(make()))
        return known

    def _asked_by_name(self, outbound: Outbound) -> _Callees:
        """What gRPC's own clients ask for."""
        http = [d for d in outbound.destinations if d.protocol is not Protocol.TCP]
        listening: dict[str, Resource] = {}
        for destination in http:
            for listener in self._named_listeners(destination, destination.service.namespace == outbound.namespace):
                listening.setdefault(listener.name, listener)
        upstreams = (upstream for upstream in outbound.upstreams if upstream.protocol is not Protocol.TCP)
        return _Callees(
            _Joined(
                self._interned.set(map(self._named_clusters, upstreams)),
                self._interned.set(listening.values()),
                self._interned.set(map(self._named_routes, http)),
            ),
            self._interned.layer({Type.ENDPOINT: self._interned.set(map(self._assignments, outbound.assignments))}),
        )

    def _named_listener(self, destination: Destination, same_namespace: bool) -> tuple[Resource, ...]:
        found = proxyless.listeners(destination, self.config.mesh_domain, same_namespace=same_namespace)
        return tuple(self._interned.resource(listener) for listener in found)

    def _asked(self, outbound: Outbound) -> tuple[ResourceSet, ResourceSet, tuple[Destination, ...]]:
        """The routes and virtual hosts of applications that name each service in their requests; and `_Callees.asked`.

        Most often one of hundreds of Destinations is another one: so no more is made, and looked at, than that.
        """
        latest = self._latest.get((outbound.namespace, len(outbound.destinations)))
        if latest is not None and (changed := _changed(latest.asked, outbound.destinations)) is not None:
            hosts = (self._virtual_hosts(d, d.service.namespace == outbound.namespace) for d in changed)
            found = self._interned.replacing(latest.shared.sets[Type.VIRTUAL_HOST], (host.resource for host in hosts))
            return latest.joined.routes, found, outbound.destinations
        all_ = [self._virtual_hosts(d, d.service.namespace == outbound.namespace) for d in outbound.destinations]
        kept = self._disjoint(all_)
        route = self._interned.resource(virtual_hosts.route(names.OUTBOUND))
        whole = kept == [host.resource for host in all_]
        return (
            self._interned.set([route]),
            self._interned.set([*kept, self._elsewhere_host]),
            outbound.destinations if whole else (),
        )

    def _disjoint(self, hosts: Sequence[routes.VirtualHost]) -> list[Resource]:
        kept = routes.disjoint(hosts)
        found = [host.resource for host in kept]
        return found if kept is hosts else [self._interned.resource(resource) for resource in found]

    def _dialled(
        self, outbound: Outbound, addresses: Mapping[Name, str]
    ) -> tuple[ResourceSet, ResourceSet, ResourceSet]:
        """The listeners, routes and virtual hosts of applications that dial each service.

        One without an address waits for it.
        """
        hosts: defaultdict[int, list[routes.VirtualHost]] = defaultdict(list)
        chains: dict[tuple[str, int], bytes] = {}
        tcp_ports: set[int] = set()
        sources: list[tuple[str, int]] = []
        for destination in outbound.destinations:
            address = addresses.get(destination.service)
            if address is None:
                continue
            if not interception.shares_a_chain(destination, address):
                chains[address, destination.port] = self._dialled_chains(destination, address)
            if destination.protocol is Protocol.TCP:
                tcp_ports.add(destination.port)
                sources.extend(destination.sources)
            else:
                same = destination.service.namespace == outbound.namespace
                hosts[destination.port].append(self._dialled_hosts(destination, address, same))
        table = (self._answers(f, f.service.namespace == outbound.namespace) for f in outbound.frontends or ())
        listening = [
            interception.outbound(chains, hosts.keys(), tcp_ports, self.config, sources),
            interception.dns(b"".join(table)),
        ]
        routed = [virtual_hosts.route(names.outbound_route(port)) for port in sorted(hosts)]
        found = [resource for at_port in hosts.values() for resource in self._disjoint(at_port)]
        found.extend(self._interned.resource(routes.nowhere(port)) for port in hosts)
        if self.config.egress is Egress.DENY:
            routed.append(virtual_hosts.route(names.OUTBOUND))
            found.append(self._elsewhere_host)
        return (
            self._interned.set(self._interned.resource(listener) for listener in listening),
            self._interned.set(self._interned.resource(route) for route in routed),
            self._interned.set(found),
        )

    def _upstream(self, upstream: Upstream, reconnect: str) -> Resource:
        return self._interned.resource(
            clusters.upstream(upstream, self.trust_domain, self.config.mesh_domain, reconnect)
        )

    def _local(self, inbound: Inbound, app_address: str) -> Resource:
        return self._interned.resource(clusters.local(app_address, inbound.port, inbound.protocol))

    def _permitted(
        self,
        policy: Policy,
        app_port: int,
        numbers: tuple[int, ...],
        mode: Mode,
        limit: RateLimit | None,
        limited_by: tuple[tuple[str, int], ...],
    ) -> Resource:
        held = policy.at(numbers)
        sources = (*routes.policy_sources(held), *limited_by)
        return self._interned.resource(routes.inbound(app_port, self._rules(held, mode), sources, limit))

    def _answered(self, policy: Policy, app_port: int, numbers: tuple[int, ...], mode: Mode) -> Resource:
        held = policy.at(numbers)
        rules = routes.permissions(held, self.trust_domain, mode, known=True)
        return self._interned.resource(routes.answered(app_port, rules, routes.policy_sources(held)))

    def _virtual_host(self, destination: Destination, same_namespace: bool) -> routes.VirtualHost:
        return self._known(routes.VirtualHost.of(destination, self.config.mesh_domain, same_namespace=same_namespace))

    def _known(self, host: routes.VirtualHost) -> routes.VirtualHost:
        return replace(host, resource=self._interned.resource(host.resource))

    def _dialled_host(self, destination: Destination, address: str, same_namespace: bool) -> routes.VirtualHost:
        domain = self.config.mesh_domain
        host = routes.VirtualHost.of_dialled(destination, address, domain, same_namespace=same_namespace)
        return self._known(host)

    def _http_chain(self, inbound: Inbound) -> bytes:
        return b"".join(
            listeners.http_chain(service, port, inbound.port, self.trust_domain, self.config)
            for service, port in inbound.services
        )

    def _tcp_chain(
        self,
        inbound: Inbound,
        callers: tuple[Identity, ...],
        barred: tuple[str, ...],
        banned: tuple[Identity, ...],
        mode: Mode,
    ) -> bytes:
        held = (callers, barred, banned, mode)
        return b"".join(
            listeners.tcp_chains(service, port, inbound.port, *held, self.trust_domain, self.config)
            for service, port in inbound.services
        )


def _changed(before: Sequence[Destination], after: Sequence[Destination]) -> Sequence[Destination] | None:
    """Those that are other ones than `before`, in the same places; None: they are not of the same ports of services."""
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old is not new]
    same = all(old.service == new.service and old.port == new.port for old, new in changed)
    return [new for _, new in changed] if same else None


def _tells_plaintext_by_host(proxy: Proxy) -> bool:
    """Whether requests without TLS come to the port that other proxies dial, so that their host has to say for whom."""
    return proxy.mode is Mode.PERMISSIVE and proxy.workload.sidecar is Sidecar.EXPLICIT
