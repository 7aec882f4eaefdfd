"""LDS of an intercepted proxy: what its application dials, taken on the way, and where the names are.

The host's rules send here, except what the proxy itself sends (`names.SIDECAR_UID`):

- each TCP connection that the application begins, to `names.LOOPBACK`:15001, which is where REDIRECT puts what is sent
  on the same machine; the kernel tells the original destination. Not what stays on the machine: a connection to 15001
  by its own name is refused, since it would be sent back here for ever.
- each DNS question over UDP, to `names.LOOPBACK`:15053. Over TCP mesh names are not answered. It is not Envoy that
  listens there but `smc.proxy.resolver`, which asks Envoy at 15054 whether a name is the mesh's, and where.
- each TCP connection that arrives, to 15003 of the workload's address: the listener that other proxies dial. It needs
  no original destination, because SNI says which port is meant, and whoever speaks no TLS meets no chain and is closed.

IPv6 is not carried. The rules refuse it, and no mesh name has an IPv6 address.

**Where a connection goes** is decided by the address and the port that it was for, in this order:

1. The address of a service (its own, or a virtual one) and a port of it. HTTP goes by the host of each request; a TCP
   connection goes to one of the split's targets.
2. A virtual address otherwise: nowhere. It is closed at once.
3. Anything else is outside the mesh: let through as it is, or, where egress is denied, only to the hosts that are named
   (HTTP by its host, TLS by its SNI, and resolved here, since an application may write any name next to any address).
   Other requests get 502, other connections are closed.

So a connection to a *workload's* address is one to the outside. No service was asked for, so there is nobody whose
identity could be checked, and no list of all workloads belongs in every listener. It stays plaintext, and it is the
called workload's own proxy that takes it, and closes it unless it is permissive.

**How dull it is.** HTTP services on virtual addresses share one chain for each port number: a service more or less
changes no byte here, let alone a split. A service with an address of its own has a chain for each port, from that and
MeshConfig alone. A TCP port's chain holds its split, for a connection is sent once: a changed split holds for new
connections at once, and those that are open are cut when the chain has drained (60 s), as they are when the service is
gone. No other chain notices.

**Names.** The table of names is part of a listener, which cuts nobody when it changes: a question is a datagram.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from envoy.config.core.v3 import address_pb2, base_pb2, substitution_format_string_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.data.dns.v3 import dns_table_pb2
from envoy.extensions.filters.common.set_filter_state.v3 import value_pb2
from envoy.extensions.filters.listener.http_inspector.v3 import http_inspector_pb2
from envoy.extensions.filters.listener.original_dst.v3 import original_dst_pb2
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.filters.network.set_filter_state.v3 import set_filter_state_pb2
from envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3 import sni_dynamic_forward_proxy_pb2
from envoy.extensions.filters.udp.dns_filter.v3 import dns_filter_pb2
from envoy.type.v3 import range_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from smc.envoy import clusters, http, logs, messages, names, tcp
from smc.model import Destination, Egress, EgressHost, Frontend, MeshConfig, Protocol
from smc.xds.snapshot import Resource, Type

_VIRTUAL = IPv4Network(names.VIRTUAL_ADDRESSES)
_HTTP = ("http/1.0", "http/1.1", "h2c")
"""What `http_inspector` calls requests in plaintext."""
_ANSWER_TTL = 30.0

_Match = listener_components_pb2.FilterChainMatch
_Hcm = http_connection_manager_pb2.HttpConnectionManager


def shares_a_chain(destination: Destination, address: str) -> bool:
    """Whether the chain of its port number serves it; otherwise it has one of its own, see `chain`."""
    return destination.protocol is not Protocol.TCP and IPv4Address(address) in _VIRTUAL


def chain(destination: Destination, address: str, config: MeshConfig) -> bytes:
    """A serialised Listener with the filter chain of one service port at that address and nothing else."""
    if destination.protocol is Protocol.TCP:
        last = tcp.to_services(destination.targets, config)
    else:
        last = _requests(names.outbound_route(destination.port), config)
    name = names.cluster(destination.service, destination.port)
    found = _chain(name, _Match(prefix_ranges=[_alone(address)]), destination.port, last)
    return messages.serialised(listener_pb2.Listener(filter_chains=[found]))


def outbound(
    chains: Mapping[tuple[str, int], bytes],
    http_ports: Collection[int],
    tcp_ports: Collection[int],
    config: MeshConfig,
    sources: Iterable[tuple[str, int]],
) -> Resource:
    """What the application dials.

    Args:
        chains: results of `chain`, by the address and the port that they are for: a host that is let out never takes
            a service's place there, and Envoy would refuse both.
        http_ports: every port at which a service speaks HTTP: each has its RouteConfiguration.
        tcp_ports: every port at which a service speaks TCP.
        config: the mesh's.
        sources: what the splits in `chains` came from.
    """
    let_out = config.egress_hosts if config.egress is Egress.DENY else ()
    ports = sorted({*http_ports, *tcp_ports, *(host.port for host in let_out if host.port is not None)})
    found = [_chain("itself", _Match(), names.OUTBOUND_PORT, tcp.to(names.NOWHERE, config))]
    # Envoy looks for the port first: where a chain has a port, those for any port are not looked at.
    for port in (None, *ports):
        if port is not None and port in http_ports:
            name, last = names.outbound_route(port), _requests(names.outbound_route(port), config)
        else:
            name, last = _named("virtual", port), tcp.to(names.NOWHERE, config)
        found.append(_chain(name, _Match(prefix_ranges=[_range(_VIRTUAL)]), port, last))
        if config.egress is Egress.DENY:
            found += _let_out(port, config, {address for address, taken in chains if taken == port})
    wanted = [names.outbound_route(port) for port in sorted(http_ports)]
    message = listener_pb2.Listener(
        name=names.OUTBOUND,
        address=messages.socket_address(names.LOOPBACK, names.OUTBOUND_PORT),
        traffic_direction=base_pb2.OUTBOUND,
        listener_filters=[_listener_filter("original_dst", original_dst_pb2.OriginalDst())],
        filter_chains=found,
    )
    if config.egress is Egress.ALLOW:
        message.default_filter_chain.CopyFrom(_chain("elsewhere", None, None, tcp.to(names.ORIGINAL, config)))
    else:
        wanted.append(names.OUTBOUND)
        message.listener_filters.extend(_inspectors(sorted(tcp_ports), config))
        message.listener_filters_timeout.CopyFrom(messages.seconds(5))
    return messages.resource(
        Type.LISTENER,
        names.OUTBOUND,
        messages.serialised(message) + b"".join(chains.values()),
        sources=sources,
        warms=tuple((Type.ROUTE, route) for route in wanted),
    )


def answers(frontend: Frontend, mesh_domain: str, *, same_namespace: bool) -> bytes:
    """A serialised DnsFilterConfig with all names of one service and nothing else."""
    domains = [
        dns_table_pb2.DnsTable.DnsVirtualDomain(
            name=host,
            endpoint=dns_table_pb2.DnsTable.DnsEndpoint(
                address_list=dns_table_pb2.DnsTable.AddressList(address=[frontend.address])
            ),
            answer_ttl=messages.seconds(_ANSWER_TTL),
        )
        for host in names.hosts(frontend.service, mesh_domain, same_namespace=same_namespace)
    ]
    return messages.serialised(_dns_filter(dns_table_pb2.DnsTable(virtual_domains=domains)))


def dns(table: bytes) -> Resource:
    """Where the names of services are. `table` is joined results of `answers`."""
    config = _dns_filter(dns_table_pb2.DnsTable())
    config.stat_prefix = names.DNS
    packed = AnyMessage(type_url=messages.packed(config).type_url, value=messages.serialised(config) + table)
    filter_ = listener_components_pb2.ListenerFilter(name="envoy.filters.udp.dns_filter", typed_config=packed)
    address = messages.socket_address(names.LOOPBACK, names.DNS_TABLE_PORT)
    address.socket_address.protocol = address_pb2.SocketAddress.UDP
    message = listener_pb2.Listener(
        name=names.DNS, address=address, traffic_direction=base_pb2.OUTBOUND, listener_filters=[filter_]
    )
    return messages.resource(Type.LISTENER, names.DNS, message)


def _dns_filter(table: Any) -> Any:
    return dns_filter_pb2.DnsFilterConfig(
        server_config=dns_filter_pb2.DnsFilterConfig.ServerContextConfig(inline_dns_table=table)
    )


# ------------------------------------------------------------------------------------------------------ filter chains


def _chain(name: str, match: Any, port: int | None, *filters: Any) -> Any:
    """`port` None: any; `match` None: as the default chain."""
    if match is not None and port is not None:
        match.destination_port.value = port
    return listener_components_pb2.FilterChain(name=name, filter_chain_match=match, filters=filters)


def _named(what: str, port: int | None) -> str:
    return what if port is None else f"{what}|{port}"


def _requests(route: str, config: MeshConfig, *filters: Any) -> Any:
    manager = http.connections(names.OUTBOUND, logs.http(names.OUTBOUND, config))
    manager.rds.CopyFrom(http.fetched(route))
    manager.http_filters.extend([http.faults(), *filters, http.router()])
    manager.forward_client_cert_details = _Hcm.SANITIZE
    return http.network_filter(manager)


def _let_out(port: int | None, config: MeshConfig, taken: AbstractSet[str]) -> Iterator[Any]:
    """What may leave although egress is denied, and the answer to requests that may not.

    Not what is dialled at the `taken` addresses: those are services' at this port.
    """
    hosts = [host for host in config.egress_hosts if host.port is None or host.port == port]
    # A host may be named with its port and without, and Envoy refuses an address that stands in a chain twice.
    named = dict.fromkeys(host.host for host in hosts if _is_address(host) and host.host not in taken)
    addresses = [_alone(address) for address in named]
    if addresses:
        yield _chain(_named("addresses", port), _Match(prefix_ranges=addresses), port, tcp.to(names.ORIGINAL, config))
    if sni := sorted({host.host for host in hosts if not _is_address(host)}):
        match = _Match(transport_protocol="tls", server_names=sni)
        yield _chain(
            _named("tls", port), match, port, _port_as_dialled(), _forwarded(), tcp.to(names.PASSTHROUGH, config)
        )
    match = _Match(transport_protocol="raw_buffer", application_protocols=_HTTP)
    yield _chain(_named("elsewhere", port), match, port, _requests(names.OUTBOUND, config, http.forward_proxy()))


def _port_as_dialled() -> Any:
    """Otherwise it would be 443 whatever the application dialled."""
    text = substitution_format_string_pb2.SubstitutionFormatString()
    text.text_format_source.inline_string = "%DOWNSTREAM_LOCAL_PORT%"
    value = value_pb2.FilterStateValue(object_key="envoy.upstream.dynamic_port", format_string=text)
    return _filter("set_filter_state", set_filter_state_pb2.Config(on_new_connection=[value]))


def _forwarded() -> Any:
    config = sni_dynamic_forward_proxy_pb2.FilterConfig(dns_cache_config=clusters.dns_cache())
    return _filter("sni_dynamic_forward_proxy", config)


def _filter(name: str, config: Any) -> Any:
    return listener_components_pb2.Filter(name=f"envoy.filters.network.{name}", typed_config=messages.packed(config))


def _is_address(host: EgressHost) -> bool:
    try:
        IPv4Address(host.host)
    except ValueError:
        return False
    return True


def _alone(address: str) -> Any:
    return _range(IPv4Network(address))


def _range(network: IPv4Network) -> Any:
    return address_pb2.CidrRange(
        address_prefix=str(network.network_address), prefix_len=messages.uint32(network.prefixlen)
    )


# --------------------------------------------------------------------------------------------------- listener filters


def _inspectors(tcp_ports: Sequence[int], config: MeshConfig) -> Iterator[Any]:
    """What tells requests, and TLS, from anything else. They wait for the caller's first bytes, so they have to keep
    off the ports of TCP services, where it may be the server that speaks first.
    """
    predicate = listener_components_pb2.ListenerFilterChainMatchPredicate
    off = [predicate(destination_port_range=range_pb2.Int32Range(start=port, end=port + 1)) for port in tcp_ports]
    disabled = None
    if off:
        disabled = off[0] if len(off) == 1 else predicate(or_match=predicate.MatchSet(rules=off))
    if config.egress_hosts:
        yield _listener_filter("tls_inspector", tls_inspector_pb2.TlsInspector(), filter_disabled=disabled)
    yield _listener_filter("http_inspector", http_inspector_pb2.HttpInspector(), filter_disabled=disabled)


def _listener_filter(name: str, config: Any, **how: Any) -> Any:
    return listener_components_pb2.ListenerFilter(
        name=f"envoy.filters.listener.{name}", typed_config=messages.packed(config), **how
    )
