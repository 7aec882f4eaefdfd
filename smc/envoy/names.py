"""What resources, ports and hosts are called: the words on which callers and proxies agree."""

from __future__ import annotations

from smc.hosts import hosts as hosts
from smc.model import Name
from smc.xds import virtual_hosts

OUTBOUND = "outbound"
"""The listener that the application's own requests enter by, and the one RouteConfiguration behind it."""
INBOUND = "inbound"
"""The listener that other proxies dial."""
PLAINTEXT = "plaintext"
"""The inbound filter chain of requests without TLS, and what they are counted under."""
TCP = "tcp"
"""What refused connections to ports that speak TCP are counted under: Envoy does not say to which."""
PLAINTEXT_ROUTE = "inbound|plaintext"
PASSTHROUGH = "passthrough"
"""The cluster, and the DNS cache, of hosts outside the mesh."""
ORIGINAL = "original"
"""The cluster of whatever an intercepted application dialled, outside the mesh."""
NOWHERE = "nowhere"
"""A cluster that is never there: what goes to it is closed."""
IDENTITY = "identity"
BUNDLE = "bundle"

DNS = "dns"
"""The listener of an intercepted proxy that knows where the mesh's names are."""

OUTBOUND_PORT = 15001
INBOUND_PORT = 15003
ADMIN_PORT = 15000
PROMETHEUS_PORT = 15010
DNS_PORT = 15053
"""Where an intercepted application's look-ups go: to `smc.proxy.resolver`."""
DNS_TABLE_PORT = 15054
"""Where it asks Envoy."""

SIDECAR_UID = 1337
"""Whom an intercepted proxy runs as: what this user sends is never redirected."""
LOOPBACK = "127.0.0.1"
"""Where an intercepted proxy's `outbound` and `dns` listen: REDIRECT sends there what is sent on the same machine."""
VIRTUAL_ADDRESSES = "240.0.0.0/4"
"""What virtual IP addresses are taken from. Nobody routes it, so what is not redirected arrives nowhere."""

HEALTH = "health"
HEALTH_PATH = "/.smc/health"
"""What callers' health checks ask for; answered by the proxy itself, before policy, to any identity of the mesh."""


def cluster(service: Name, port: int) -> str:
    """Also the name of its ClusterLoadAssignment and of its inbound filter chain."""
    return f"{service}|{port}"


def virtual_host(route: str, service: Name, port: int) -> str:
    """Of a service's port, in that RouteConfiguration; without a slash but the one after the route's name."""
    return virtual_hosts.name(route, f"{service.name}.{service.namespace}|{port}")


def local(app_port: int) -> str:
    return f"local|{app_port}"


def outbound_route(port: int) -> str:
    """Of an intercepted proxy, which learns a service's port from the connection; also a filter chain's name."""
    return f"{OUTBOUND}|{port}"


def inbound_route(app_port: int) -> str:
    return f"inbound|{app_port}"


def sni(service: Name, port: int, mesh_domain: str) -> str:
    """What a caller asks for in its TLS handshake; lower case, as Envoy compares it."""
    return f"{port}.{service.name}.{service.namespace}.{mesh_domain.rstrip('.')}".lower()


def domains(host: str, port: int | None) -> tuple[str, ...]:
    """How a request may spell `host` and `port`: with and without the trailing dot, and port 80 also by silence.

    Without a `port`: where whatever port a request spells is ignored.
    """
    if port is None:
        return (host, f"{host}.")
    spelled = (f"{host}:{port}", f"{host}.:{port}")
    return (host, f"{host}.", *spelled) if port == 80 else spelled
