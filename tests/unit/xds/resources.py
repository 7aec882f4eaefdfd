"""Resources whose body is a word, which says what a test needs to know of them."""

from __future__ import annotations

from smc.xds.snapshot import Resource, Source, Type

CLUSTER, ENDPOINT, SECRET, LISTENER, ROUTE = Type

BAD = "bad"
"""A body that contains this is refused by clients."""


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


def clusters_of(route_: Resource) -> tuple[str, ...]:
    return tuple(route_.body.decode().split(":")[1:])


def source(name: str, mod_revision: int) -> Source:
    return Source(f"split.smi-spec.io/TrafficSplit/shop/{name}", mod_revision)
