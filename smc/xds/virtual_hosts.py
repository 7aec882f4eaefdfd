"""VHDS: RouteConfigurations of which each virtual host is a resource of its own, so that a change costs its own host.

Envoy takes a VirtualHost as a part of the RouteConfiguration whose name comes before the last slash of its own. It asks
for all of them at once, by a wildcard, and not again for those of a RouteConfiguration that it asks for later: so they
follow each response that has one. They do not come before it: Envoy lets go those of a RouteConfiguration that it has
not, but says to the next replica that it has them, and that one would not send them again. It must not be told that a
RouteConfiguration discovers no more: Envoy 1.40 forgets what it has subscribed to then, but not that it has. All of
that holds for delta only, as does VHDS:
https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/vhds
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from envoy.config.core.v3 import config_source_pb2
from envoy.config.route.v3 import route_pb2
from google.protobuf.wrappers_pb2 import BoolValue

from smc.xds.snapshot import EMPTY, Layer, Resource, ResourceSet, Snapshot, Source, Type

OTHERS = "others"
"""The virtual host for all that no other one is for. Each of these RouteConfigurations has it: Envoy waits for one."""


def name(route: str, host: str) -> str:
    """Of a virtual host; `host` has no slash."""
    return f"{route}/{host}"


def named(name_: str) -> bytes:
    """A message with field 1, its name, alone."""
    encoded = name_.encode()
    length, size = len(encoded), bytearray()
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    size.append(length)
    return b"\x0a" + bytes(size) + encoded


def route(name_: str) -> Resource:
    """The RouteConfiguration of that name, which says no more than that its virtual hosts are to be discovered.

    One that is named after a port (`outbound|80`) is for connections to that port, and takes no notice of the port that
    a request names.
    """
    # It is made for each name that a client says it has, and so without a message.
    body = named(name_) + (_AT_A_PORT if _is_at_a_port(name_) else _AT_ANY_PORT)
    return Resource(Type.ROUTE, name_, body, warms=((Type.VIRTUAL_HOST, name(name_, OTHERS)),))


def is_route(resource: Resource) -> bool:
    """Whether it is one that `route` makes."""
    return any(type_ is Type.VIRTUAL_HOST for type_, _ in resource.warms)


def route_of(host: str) -> str:
    """The name of the RouteConfiguration that the virtual host is a part of."""
    return host.rpartition("/")[0]


def of_route(name_: str, hosts: Iterable[str]) -> Iterator[str]:
    """The names of those virtual hosts that are a part of the RouteConfiguration."""
    prefix = name(name_, "")
    return (host for host in hosts if host.startswith(prefix))


def has_route(host: str, hosts: Mapping[str, Resource]) -> bool:
    """Whether the RouteConfiguration of that virtual host, which may be gone itself, has others among these."""
    return name(route_of(host), OTHERS) in hosts


_WHOLE: WeakKeyDictionary[Snapshot, Snapshot] = WeakKeyDictionary()
_WHOLE_ROUTES: WeakKeyDictionary[ResourceSet, dict[str, Resource]] = WeakKeyDictionary()


def whole(snapshot: Snapshot) -> Snapshot:
    """The same for who cannot discover virtual hosts: each RouteConfiguration has its own. Made once."""
    hosts = snapshot.set_of(Type.VIRTUAL_HOST)
    if not hosts.resources:
        return snapshot
    known = _WHOLE.get(snapshot)
    if known is None:
        routes = (
            _whole(found.name, hosts) if is_route(found) else found for found in snapshot.of_type(Type.ROUTE).values()
        )
        changed = {Type.ROUTE: ResourceSet.of(routes), Type.VIRTUAL_HOST: EMPTY}
        known = _WHOLE[snapshot] = Snapshot(Layer({**snapshot.sets, **changed}))
    return known


def _whole(name_: str, hosts: ResourceSet) -> Resource:
    made = _WHOLE_ROUTES.setdefault(hosts, {})
    known = made.get(name_)
    if known is None:
        message = _message(name_, at_a_port=_is_at_a_port(name_))
        sources: set[Source] = set()
        for host in of_route(name_, hosts.resources):
            found = hosts.resources[host]
            message.virtual_hosts.add().MergeFromString(found.body)
            sources.update(found.sources)
        body = message.SerializeToString(deterministic=True)
        known = made[name_] = Resource(Type.ROUTE, name_, body, tuple(sorted(sources)))
    return known


def _is_at_a_port(name_: str) -> bool:
    return "|" in name_


def _message(name_: str, *, at_a_port: bool) -> Any:
    return route_pb2.RouteConfiguration(
        name=name_, validate_clusters=BoolValue(value=False), ignore_port_in_host_matching=at_a_port
    )


def _discovering(*, at_a_port: bool) -> bytes:
    message = _message("", at_a_port=at_a_port)
    message.vhds.config_source.CopyFrom(
        config_source_pb2.ConfigSource(
            ads=config_source_pb2.AggregatedConfigSource(), resource_api_version=config_source_pb2.V3
        )
    )
    data: bytes = message.SerializeToString(deterministic=True)
    return data


_AT_A_PORT, _AT_ANY_PORT = _discovering(at_a_port=True), _discovering(at_a_port=False)
"""All of such a route but its name."""
