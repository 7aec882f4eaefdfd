"""LDS: the two doors of a proxy. Listeners are kept dull, because a changed one cuts long requests when it drains.

An HTTP chain's bytes follow from its own service port, the trust domain and MeshConfig: no policy, split, endpoint,
certificate or other service enters them.

A TCP port's chain holds its policy, because a connection is judged once and nothing smaller than its chain can be
changed under it. The chain lets in, at the TLS handshake, exactly the identities that may connect, or nobody. Envoy's
RBAC filter would be too late: it waits for the caller's first bytes, and by then the application has been dialled, and
what servers say first (the greeting of a database) has been passed on. So a changed policy changes this one chain: new
connections obey at once, open ones are cut when it drains, and no other chain notices.

Callers' health checks of a TCP port ask what those of HTTP ask, over HTTP/2, and come to a chain of their own by the
same SNI and ALPN `h2`, which the connections themselves do not offer. A check that only connects would not see a dead
application behind a living proxy, since the handshake is the proxy's, and would be one more connection to a living one.

What inbound does to requests beside `http.py`: the application must see what policy has judged. Paths are normalised, a
path with an escaped slash is refused (400), and a header with an underscore is dropped, since many applications cannot
tell it from its twin with a hyphen. `x-forwarded-client-cert` is set anew from the TLS connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from envoy.config.core.v3 import address_pb2, base_pb2, protocol_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.listener.original_dst.v3 import original_dst_pb2
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2

from smc.envoy import http, logs, messages, names, routes, tcp, tls
from smc.model import Identity, MeshConfig, Mode, Name
from smc.xds.snapshot import Resource, Type

IpAddress = IPv4Address | IPv6Address

_Hcm = http_connection_manager_pb2.HttpConnectionManager


def outbound(address: str, app_address: str, config: MeshConfig) -> Resource:
    """What the application uses as its HTTP proxy.

    Whoever gets in here speaks with the workload's identity. So where others reach `address`, only who comes from this
    very host does, and the application itself if it lives at another `app_address`; all others meet no chain.
    """
    manager = http.connections(names.OUTBOUND, logs.http(names.OUTBOUND, config))
    manager.rds.CopyFrom(http.fetched(names.OUTBOUND))
    manager.upgrade_configs.append(http.upgrade(routes.CONNECT))
    manager.http_filters.extend([http.faults(), http.forward_proxy(), http.router()])
    manager.forward_client_cert_details = _Hcm.SANITIZE
    message = listener_pb2.Listener(
        name=names.OUTBOUND,
        address=messages.socket_address(address, names.OUTBOUND_PORT),
        traffic_direction=base_pb2.OUTBOUND,
        filter_chains=[
            listener_components_pb2.FilterChain(
                name=name, filter_chain_match=match, filters=[http.network_filter(manager)]
            )
            for name, match in _callers(ip_address(address), ip_address(app_address))
        ],
    )
    return messages.resource(Type.LISTENER, names.OUTBOUND, message, warms=((Type.ROUTE, names.OUTBOUND),))


def _callers(address: IpAddress, application: IpAddress) -> Iterator[tuple[str, Any]]:
    """Names and matches of the chains that let them in."""
    match = listener_components_pb2.FilterChainMatch
    if address.is_loopback:
        yield "", None
        return
    yield "host", match(source_type=match.SAME_IP_OR_LOOPBACK)
    if not application.is_loopback and application != address:
        alone = messages.uint32(application.max_prefixlen)
        source = address_pb2.CidrRange(address_prefix=str(application), prefix_len=alone)
        yield "application", match(source_prefix_ranges=[source])


def inbound(
    address: str,
    chains: bytes,
    wanted: Iterable[str],
    sources: Iterable[tuple[str, int]] = (),
    *,
    redirected: bool = False,
) -> Resource:
    """What other proxies dial. `chains` are joined results of `http_chain` and its like, at least one.

    `wanted` are the RouteConfigurations that they name, `sources` what the policy of `tcp_chains` came from. With
    `redirected` the kernel sends here what was for the application's own ports; which one it was, the chains of
    plaintext have to know. It is so in every mode, since what precedes the chains changes for all of them at once.
    """
    message = listener_pb2.Listener(
        name=names.INBOUND,
        address=messages.socket_address(address, names.INBOUND_PORT),
        traffic_direction=base_pb2.INBOUND,
        listener_filters_timeout=messages.seconds(5),
        listener_filters=[
            listener_components_pb2.ListenerFilter(
                name="envoy.filters.listener.tls_inspector",
                typed_config=messages.packed(tls_inspector_pb2.TlsInspector()),
            )
        ],
    )
    if redirected:
        message.listener_filters.add(
            name="envoy.filters.listener.original_dst", typed_config=messages.packed(original_dst_pb2.OriginalDst())
        )
        # Who waits for the server to speak first is plaintext: its chain takes it, if there is one.
        message.continue_on_listener_filters_timeout = True
    return messages.resource(
        Type.LISTENER,
        names.INBOUND,
        messages.serialised(message) + chains,
        sources=sources,
        warms=(*((Type.ROUTE, route) for route in wanted), *tls.SECRETS),
        serves=True,
    )


def http_chain(service: Name, port: int, app_port: int, trust_domain: str, config: MeshConfig) -> bytes:
    """A serialised Listener with the filter chain of one service port and nothing else."""
    manager = _from_proxies(config)
    manager.rds.CopyFrom(http.fetched(names.inbound_route(app_port)))
    name = names.cluster(service, port)
    manager.http_filters.extend([http.health(app_port), http.deny_all(name), http.rate_limit(), http.router()])
    manager.http2_protocol_options.allow_connect = True
    manager.forward_client_cert_details = _Hcm.SANITIZE_SET
    manager.set_current_client_cert_details.uri = True
    _judge_what_the_application_sees(manager)
    match = _reached_by(names.sni(service, port, config.mesh_domain))
    return _only(_chain(name, match, tls.downstream(trust_domain), http.network_filter(manager)))


def plaintext_chain(config: MeshConfig, app_port: int | None = None) -> bytes:
    """As `http_chain`, requests without TLS, from nobody known: to a port that is dialled, else by each one's host."""
    manager = _from_proxies(config)
    manager.codec_type = _Hcm.AUTO
    manager.rds.CopyFrom(http.fetched(names.PLAINTEXT_ROUTE if app_port is None else names.inbound_route(app_port)))
    manager.http_filters.extend([http.deny_all(names.PLAINTEXT), http.rate_limit(), http.router()])
    manager.forward_client_cert_details = _Hcm.SANITIZE
    _judge_what_the_application_sees(manager)
    return _plaintext_chain(app_port, http.network_filter(manager))


def plaintext_tcp_chain(config: MeshConfig, app_port: int, trust_domain: str) -> bytes:
    """As `plaintext_chain`, of a port that speaks TCP: each connection is counted, for nobody known is behind it."""
    counting = tcp.counting(names.PLAINTEXT, (), trust_domain)
    return _plaintext_chain(app_port, counting, tcp.to_application(app_port, config))


def _plaintext_chain(app_port: int | None, *filters: Any) -> bytes:
    match = listener_components_pb2.FilterChainMatch(transport_protocol="raw_buffer")
    name = names.PLAINTEXT
    if app_port is not None:
        match.destination_port.value = app_port
        name = f"{name}|{app_port}"
    return _only(listener_components_pb2.FilterChain(name=name, filter_chain_match=match, filters=filters))


def tcp_chains(
    service: Name,
    port: int,
    app_port: int,
    callers: tuple[Identity, ...],
    barred: tuple[str, ...],
    banned: tuple[Identity, ...],
    mode: Mode,
    trust_domain: str,
    config: MeshConfig,
) -> bytes:
    """As `http_chain`, the two of a port that speaks TCP. Of all `callers` alone may connect, of none nobody.

    Unless the mode is ENFORCING: then whoever has an identity may, and the first bytes of who is no caller are counted.
    `barred` and `banned` are as in a Policy. TLS itself refuses barred certificates when they are shown; what is open
    by one of them is cut because the chain is then another. Whoever is banned is cut at the first byte, until the
    certificates are barred too.
    """
    name, sni = names.cluster(service, port), names.sni(service, port, config.mesh_domain)
    connected = [tcp.to_application(app_port, config)]
    if mode is Mode.ENFORCING:
        context = tls.downstream(trust_domain, callers, tls.NOT_HTTP)
    else:
        context = tls.downstream(trust_domain, offered=tls.NOT_HTTP)
        connected.insert(0, tcp.counting(name, callers, trust_domain, banned))
    manager = _from_proxies(config)
    manager.route_config.CopyFrom(route_pb2.RouteConfiguration(name=names.HEALTH))
    manager.http_filters.extend([http.health(app_port), http.router()])
    health = _reached_by(sni)
    health.application_protocols.extend(tls.HTTP)
    carrying = _chain(name, _reached_by(sni), context, *connected)
    if barred:
        carrying.metadata.filter_metadata["smc"]["barred"] = barred
    return _only(
        carrying,
        _chain(f"{name}|{names.HEALTH}", health, tls.downstream(trust_domain), http.network_filter(manager)),
    )


def _only(*chains: Any) -> bytes:
    return messages.serialised(listener_pb2.Listener(filter_chains=chains))


def _chain(name: str, match: Any, context: Any, *filters: Any) -> Any:
    return listener_components_pb2.FilterChain(
        name=name,
        filter_chain_match=match,
        transport_socket=base_pb2.TransportSocket(
            name="envoy.transport_sockets.tls", typed_config=messages.packed(context)
        ),
        transport_socket_connect_timeout=messages.seconds(10),
        filters=filters,
    )


def _reached_by(sni: str) -> Any:
    return listener_components_pb2.FilterChainMatch(transport_protocol="tls", server_names=[sni])


def _from_proxies(config: MeshConfig) -> Any:
    """What other proxies open, whatever for."""
    manager = http.connections(names.INBOUND, logs.http(names.INBOUND, config))
    manager.codec_type = _Hcm.HTTP2
    common = manager.common_http_protocol_options
    common.headers_with_underscores_action = protocol_pb2.HttpProtocolOptions.DROP_HEADER
    # Nobody's identity outlives its handshake by more; requests under way are waited for.
    common.max_connection_duration.seconds = 3600
    manager.http2_protocol_options.max_concurrent_streams.value = 1024
    return manager


def _judge_what_the_application_sees(manager: Any) -> None:
    manager.normalize_path.value = True
    manager.merge_slashes = True
    manager.path_with_escaped_slashes_action = _Hcm.REJECT_REQUEST
