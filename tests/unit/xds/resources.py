"""Resources whose body is a word, which says what a test needs to know of them; virtual hosts are real messages."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

from envoy.config.route.v3 import route_components_pb2, route_pb2

from smc.xds import virtual_hosts
from smc.xds.snapshot import Layer, Resource, Snapshot, Source, Type

CLUSTER, ENDPOINT, SECRET, LISTENER, ROUTE, VIRTUAL_HOST = Type

BAD = "bad"
"""A body that contains this is refused by clients."""

_LAYERS: WeakValueDictionary[tuple[Resource, ...], Layer] = WeakValueDictionary()


def layered(resources: Iterable[Resource]) -> Snapshot:
    """As the Generator makes it: load assignments and virtual hosts are shared, and equal layers are one object."""
    layers: tuple[list[Resource], list[Resource]] = ([], [])
    for found in resources:
        layers[found.type in (ENDPOINT, VIRTUAL_HOST)].append(found)
    return Snapshot(*(_LAYERS.setdefault(tuple(found), Snapshot.of(found).own) for found in layers))


def resource(
    type_: Type, name: str, body: str = "1", *sources: Source, warms: tuple[tuple[Type, str], ...] = ()
) -> Resource:
    return Resource(type_, name, body.encode(), tuple(sorted(sources)), warms)


def cluster(name: str, body: str = "1", *sources: Source, secrets: tuple[str, ...] = ()) -> Resource:
    """Warms on the assignment of its own name."""
    warms = ((ENDPOINT, name), *((SECRET, secret) for secret in secrets))
    return resource(CLUSTER, name, body, *sources, warms=warms)


def static(name: str, body: str = "1") -> Resource:
    """A Cluster that warms on nothing."""
    return resource(CLUSTER, name, body)


def assignment(name: str, body: str = "1", *sources: Source) -> Resource:
    return resource(ENDPOINT, name, body, *sources)


def secret(name: str = "identity", body: str = "1") -> Resource:
    return resource(SECRET, name, body)


def listener(name: str, body: str = "1", *sources: Source, routes: tuple[str, ...] | None = None) -> Resource:
    """Warms on the route of its own name, unless `routes` says otherwise."""
    warms = tuple((ROUTE, route_) for route_ in (routes if routes is not None else (name,)))
    return resource(LISTENER, name, body, *sources, warms=warms)


def route(name: str, *clusters: str, mark: str = "to", sources: tuple[Source, ...] = ()) -> Resource:
    """Its body names the Clusters that it sends traffic to."""
    return resource(ROUTE, name, ":".join((mark, *clusters)), *sources)


def discovering(name: str) -> Resource:
    """A route that has its virtual hosts by discovery."""
    return virtual_hosts.route(name)


def virtual_host(route_: str, host: str, *clusters: str, domain: str = "", mark: str = "1") -> Resource:
    """Of a route that discovers it; for a domain that is called as itself, unless `domain` says otherwise."""
    name = virtual_hosts.name(route_, host)
    message = route_components_pb2.VirtualHost(name=name, domains=[domain or host], routes=[{"name": mark}])
    for to in clusters:
        message.routes.add().route.cluster = to
    return Resource(VIRTUAL_HOST, name, message.SerializeToString(deterministic=True))


def mark_of(host: Resource) -> str:
    return str(route_components_pb2.VirtualHost.FromString(host.body).routes[0].name)


def domains_of(host: Resource) -> tuple[str, ...]:
    return tuple(route_components_pb2.VirtualHost.FromString(host.body).domains)


def clusters_of(found: Resource) -> tuple[str, ...]:
    """That a route or a virtual host sends traffic to."""
    if found.type is VIRTUAL_HOST:
        hosts = [route_components_pb2.VirtualHost.FromString(found.body)]
    elif found.body.startswith(b"\n"):  # a message, and no word
        hosts = list(route_pb2.RouteConfiguration.FromString(found.body).virtual_hosts)
    else:
        return tuple(found.body.decode().split(":")[1:])
    return tuple(to.route.cluster for host in hosts for to in host.routes if to.route.cluster)


def source(name: str, mod_revision: int) -> Source:
    return Source(f"split.smi-spec.io/TrafficSplit/shop/{name}", mod_revision)
