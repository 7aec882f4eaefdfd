"""LDS: the two doors of a proxy. Listeners are kept dull, because a changed one cuts long requests when it drains.

A filter chain's bytes follow from its own service port, the trust domain and MeshConfig: no policy, split, endpoint,
certificate or other service enters them.

What a proxy does to requests, and why:

- A peer is trusted with nothing but its certificate. `x-envoy-*` from anybody is dropped (everyone counts as external),
  and so is `x-forwarded-client-cert`; inbound sets that header anew from the TLS connection.
- Inbound, where policy judges paths and headers, the application must see what was judged: paths are normalised, a path
  with an escaped slash is refused (400), and a header with an underscore is dropped, since many applications cannot
  tell it from its twin with a hyphen. Outbound changes nothing on the way to hosts outside the mesh.
- No timeout ends a request that runs; only headers have to arrive within a minute.
"""

from __future__ import annotations

from typing import Any

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, protocol_pb2, substitution_format_string_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.access_loggers.stream.v3 import stream_pb2
from envoy.extensions.filters.http.dynamic_forward_proxy.v3 import dynamic_forward_proxy_pb2
from envoy.extensions.filters.http.health_check.v3 import health_check_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.type.matcher.v3 import string_pb2
from envoy.type.v3 import percent_pb2

from smc.envoy import clusters, messages, names, routes, tls
from smc.model import MeshConfig, Name
from smc.xds.snapshot import Resource, Type

_Hcm = http_connection_manager_pb2.HttpConnectionManager
# Envoy reads an empty list as every private address: name one that nobody can have.
_NOBODY_INTERNAL = _Hcm.InternalAddressConfig(
    cidr_ranges=[address_pb2.CidrRange(address_prefix="255.255.255.255", prefix_len=messages.uint32(32))]
)


def outbound(address: str, config: MeshConfig) -> Resource:
    """What the application uses as its HTTP proxy."""
    manager = _connections(names.OUTBOUND, names.OUTBOUND, config, _OUTBOUND_LOG)
    manager.http_filters.extend([_forward_proxy(), _router()])
    manager.forward_client_cert_details = _Hcm.SANITIZE
    message = listener_pb2.Listener(
        name=names.OUTBOUND,
        address=messages.socket_address(address, names.OUTBOUND_PORT),
        traffic_direction=base_pb2.OUTBOUND,
        filter_chains=[listener_components_pb2.FilterChain(filters=[_network_filter(manager)])],
    )
    return messages.resource(Type.LISTENER, names.OUTBOUND, message, warms=((Type.ROUTE, names.OUTBOUND),))


def inbound(address: str, chains: bytes, app_ports: tuple[int, ...]) -> Resource:
    """What other proxies dial. `chains` are joined results of `chain`, at least one."""
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
    wanted = tuple((Type.ROUTE, names.inbound_route(port)) for port in app_ports)
    return messages.resource(
        Type.LISTENER, names.INBOUND, messages.serialised(message) + chains, warms=(*wanted, *tls.SECRETS)
    )


def chain(service: Name, port: int, app_port: int, trust_domain: str, config: MeshConfig) -> bytes:
    """A serialised Listener with the filter chain of one service port and nothing else."""
    manager = _connections(names.INBOUND, names.inbound_route(app_port), config, _INBOUND_LOG)
    manager.codec_type = _Hcm.HTTP2
    manager.http_filters.extend([_health(app_port), _deny_all(), _router()])
    manager.forward_client_cert_details = _Hcm.SANITIZE_SET
    manager.set_current_client_cert_details.uri = True
    manager.normalize_path.value = True
    manager.merge_slashes = True
    manager.path_with_escaped_slashes_action = _Hcm.REJECT_REQUEST
    common = manager.common_http_protocol_options
    common.headers_with_underscores_action = protocol_pb2.HttpProtocolOptions.DROP_HEADER
    # Nobody's identity outlives its handshake by more; requests under way are waited for.
    common.max_connection_duration.seconds = 3600
    manager.http2_protocol_options.max_concurrent_streams.value = 1024
    message = listener_components_pb2.FilterChain(
        name=names.cluster(service, port),
        filter_chain_match=listener_components_pb2.FilterChainMatch(
            transport_protocol="tls", server_names=[names.sni(service, port, config.mesh_domain)]
        ),
        transport_socket=base_pb2.TransportSocket(
            name="envoy.transport_sockets.tls", typed_config=messages.packed(tls.downstream(trust_domain))
        ),
        transport_socket_connect_timeout=messages.seconds(10),
        filters=[_network_filter(manager)],
    )
    return messages.serialised(listener_pb2.Listener(filter_chains=[message]))


def _connections(stat_prefix: str, route: str, config: MeshConfig, log: dict[str, str]) -> Any:
    manager = _Hcm(
        stat_prefix=stat_prefix,
        rds=http_connection_manager_pb2.Rds(config_source=messages.ads(), route_config_name=route),
        use_remote_address=messages.TRUE,
        skip_xff_append=True,
        internal_address_config=_NOBODY_INTERNAL,
        # Everyone is external, so without this every hop would give a request a new id.
        preserve_external_request_id=True,
        server_header_transformation=_Hcm.PASS_THROUGH,
        stream_idle_timeout=messages.seconds(0),
        request_headers_timeout=messages.seconds(60),
    )
    if config.access_log:
        manager.access_log.append(_access_log(log))
    return manager


def _network_filter(manager: Any) -> Any:
    return listener_components_pb2.Filter(
        name="envoy.filters.network.http_connection_manager", typed_config=messages.packed(manager)
    )


def _http_filter(name: str, config: Any) -> Any:
    return http_connection_manager_pb2.HttpFilter(name=name, typed_config=messages.packed(config))


def _router() -> Any:
    return _http_filter("envoy.filters.http.router", router_pb2.Router(suppress_envoy_headers=True))


def _forward_proxy() -> Any:
    """Idle unless a route leads to the cluster `passthrough`; always there, so that egress changes no listener."""
    config = dynamic_forward_proxy_pb2.FilterConfig(dns_cache_config=clusters.dns_cache())
    return _http_filter("envoy.filters.http.dynamic_forward_proxy", config)


def _deny_all() -> Any:
    """ALLOW with no policies: only what a route's own rules allow passes."""
    config = filter_pb2.RBAC(rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW))
    return _http_filter(routes.RBAC, config)


def _health(app_port: int) -> Any:
    """Says whether the application's port is open; before policy, since every caller's proxy has to know."""
    config = health_check_pb2.HealthCheck(
        pass_through_mode=messages.FALSE,
        headers=[
            route_components_pb2.HeaderMatcher(
                name=":path", string_match=string_pb2.StringMatcher(exact=names.HEALTH_PATH)
            )
        ],
    )
    config.cluster_min_healthy_percentages[names.local(app_port)].CopyFrom(percent_pb2.Percent(value=1.0))
    return _http_filter("envoy.filters.http.health_check", config)


_LOG = {
    "time": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "authority": "%REQ(:AUTHORITY)%",
    # Without the query, which is where applications put what is secret.
    "path": "%PATH(NQ:ORIG_OR_PATH)%",
    "protocol": "%PROTOCOL%",
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "duration_ms": "%DURATION%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "cluster": "%UPSTREAM_CLUSTER%",
    "upstream": "%UPSTREAM_HOST%",
    "tls_failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}
_INBOUND_LOG = _LOG | {
    "direction": names.INBOUND,
    "source": "%DOWNSTREAM_PEER_URI_SAN%",
    "destination": "%DOWNSTREAM_LOCAL_URI_SAN%",
    "peer_address": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
    "sni": "%REQUESTED_SERVER_NAME%",
}
_OUTBOUND_LOG = _LOG | {
    "direction": names.OUTBOUND,
    "source": "%UPSTREAM_LOCAL_URI_SAN%",
    "destination": "%UPSTREAM_PEER_URI_SAN%",
}


def _access_log(fields: dict[str, str]) -> Any:
    format_ = substitution_format_string_pb2.SubstitutionFormatString()
    for name, operator in fields.items():
        format_.json_format.fields[name].string_value = operator
    return accesslog_pb2.AccessLog(
        name="envoy.access_loggers.stdout",
        filter=accesslog_pb2.AccessLogFilter(not_health_check_filter=accesslog_pb2.NotHealthCheckFilter()),
        typed_config=messages.packed(stream_pb2.StdoutAccessLog(log_format=format_)),
    )
