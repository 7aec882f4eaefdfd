"""CDS: the services that a proxy calls, its own application, and the world outside.

Which endpoint gets a request is decided here, without the control plane:

- An active health check over the very TLS that requests use. Two misses in a row, 0.75 s apart, take an endpoint out; a
  healthy one of a cluster that nobody has used yet is checked every 5 s only.
- One failure of the connection itself (refused, reset, timed out) takes an endpoint out at once, because nothing is
  retried; a passed health check brings it back within a second. What the application answers, 5xx included, never does.
  (A server that refuses a TCP connection by policy is out until the next check, for the caller that it refused.)
- A service's TrafficPolicy may ask for more, see `traffic.py`.
- When every endpoint is out, all of them get traffic (panic threshold 1 %): to try costs no more than to fail at once,
  and a caller whose own checks were starved does not lose a service that is well. The threshold is not higher, so that
  no request goes to a dead endpoint while a living one is known.
"""

from __future__ import annotations

from typing import Any

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2, outlier_detection_pb2
from envoy.config.core.v3 import address_pb2, base_pb2, health_check_pb2, protocol_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.extensions.clusters.dynamic_forward_proxy.v3 import cluster_pb2 as forward_pb2
from envoy.extensions.common.dynamic_forward_proxy.v3 import dns_cache_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.type.v3 import http_pb2, percent_pb2

from smc.envoy import messages, names, tls, traffic
from smc.model import Protocol, TrafficPolicy, Upstream
from smc.xds.snapshot import Resource, Type

_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_CONNECT_TIMEOUT = 2.0
_RETRIES = 200
"""What may be tried again at a time however little is under way: all that waited for an endpoint that died."""
_MANY = 2**16
"""A bound on what one proxy may have open to one cluster; far above what an application reaches unless it loops."""


def upstream(noun: Upstream, trust_domain: str, mesh_domain: str, reconnect: str = "") -> Resource:
    """A port of a service, dialled through the proxies of its endpoints.

    With another `reconnect` it is another cluster to Envoy, which connects anew to every endpoint before it sends
    anything there, and lets what is under way on the old connections come to its end.
    """
    name = names.cluster(noun.service, noun.port)
    sni = names.sni(noun.service, noun.port, mesh_domain)
    tcp = noun.protocol is Protocol.TCP
    asked = noun.treatment.policy if noun.treatment is not None else TrafficPolicy(noun.service)
    message = cluster_pb2.Cluster(
        name=name,
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=messages.ads()),
        connect_timeout=messages.seconds(_CONNECT_TIMEOUT),
        lb_policy=cluster_pb2.Cluster.LEAST_REQUEST,
        common_lb_config=cluster_pb2.Cluster.CommonLbConfig(
            healthy_panic_threshold=percent_pb2.Percent(value=1.0),
            # An endpoint that was never checked must not count as ill, or every new one brings panic nearer.
            ignore_new_hosts_until_first_hc=True,
            # Envoy would otherwise gather what it learns of endpoints for a second, and send requests to dead ones.
            update_merge_window=messages.seconds(0),
        ),
        # Otherwise an endpoint that is taken out of the assignment stays for as long as it answers.
        ignore_health_on_host_removal=True,
        health_checks=[traffic.checked(_mesh_health_check(sni), asked.health_check)],
        outlier_detection=traffic.detecting(_connection_failures_only(), asked.outlier_detection),
        circuit_breakers=traffic.limited(_limits(), asked.limits),
        transport_socket=base_pb2.TransportSocket(
            name="envoy.transport_sockets.tls",
            typed_config=messages.packed(
                tls.upstream(noun.identities, trust_domain, sni, tls.NOT_HTTP if tcp else tls.HTTP)
            ),
        ),
    )
    if tcp:
        # Nothing else would find out that a peer is gone without a word.
        message.upstream_connection_options.tcp_keepalive.CopyFrom(_keepalive())
    else:
        message.typed_extension_protocol_options[_OPTIONS].CopyFrom(messages.packed(_between_proxies()))
    if reconnect:
        message.metadata.filter_metadata["smc"]["reconnect"] = reconnect
    sources = [noun.treatment.source] if noun.treatment is not None else []
    warms = ((Type.ENDPOINT, name), *tls.SECRETS)
    return messages.resource(Type.CLUSTER, name, message, sources=sources, warms=warms)


def local(app_address: str, app_port: int, protocol: Protocol) -> Resource:
    """The proxy's own application."""
    name = names.local(app_port)
    endpoint = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(address=messages.socket_address(app_address, app_port))
    )
    message = cluster_pb2.Cluster(
        name=name,
        type=cluster_pb2.Cluster.STATIC,
        connect_timeout=messages.seconds(_CONNECT_TIMEOUT),
        load_assignment=endpoint_pb2.ClusterLoadAssignment(
            cluster_name=name,
            endpoints=[endpoint_components_pb2.LocalityLbEndpoints(lb_endpoints=[endpoint])],
        ),
        # The result is what callers' health checks hear. There is one host: with the usual panic threshold it gets
        # requests whatever the check says, so that an application that has just come up does not wait for it.
        health_checks=[
            health_check_pb2.HealthCheck(
                timeout=messages.seconds(1),
                interval=messages.seconds(1),
                no_traffic_interval=messages.seconds(1),
                interval_jitter_percent=10,
                unhealthy_threshold=messages.uint32(2),
                healthy_threshold=messages.uint32(1),
                tcp_health_check=health_check_pb2.HealthCheck.TcpHealthCheck(),
            )
        ],
        circuit_breakers=_limits(),
    )
    if protocol is not Protocol.TCP:
        message.typed_extension_protocol_options[_OPTIONS].CopyFrom(messages.packed(_to_application(protocol)))
    return messages.resource(Type.CLUSTER, name, message)


def dns_cache() -> Any:
    """The forward proxy's cluster and filter share one cache: both must say the same of it."""
    return dns_cache_pb2.DnsCacheConfig(
        name=names.PASSTHROUGH,
        dns_lookup_family=cluster_pb2.Cluster.V4_PREFERRED,
        max_hosts=messages.uint32(1024),
    )


def passthrough() -> Resource:
    """Whatever host a request names, over plain HTTP."""
    message = cluster_pb2.Cluster(
        name=names.PASSTHROUGH,
        cluster_type=cluster_pb2.Cluster.CustomClusterType(
            name="envoy.clusters.dynamic_forward_proxy",
            typed_config=messages.packed(forward_pb2.ClusterConfig(dns_cache_config=dns_cache())),
        ),
        connect_timeout=messages.seconds(5),
        lb_policy=cluster_pb2.Cluster.CLUSTER_PROVIDED,
    )
    return messages.resource(Type.CLUSTER, names.PASSTHROUGH, message)


def original_destination() -> Resource:
    """Whatever an intercepted application dialled."""
    message = cluster_pb2.Cluster(
        name=names.ORIGINAL,
        type=cluster_pb2.Cluster.ORIGINAL_DST,
        connect_timeout=messages.seconds(5),
        lb_policy=cluster_pb2.Cluster.CLUSTER_PROVIDED,
        circuit_breakers=_limits(),
    )
    return messages.resource(Type.CLUSTER, names.ORIGINAL, message)


def _mesh_health_check(sni: str) -> Any:
    return health_check_pb2.HealthCheck(
        timeout=messages.seconds(1),
        interval=messages.seconds(0.75),
        no_traffic_interval=messages.seconds(1),
        no_traffic_healthy_interval=messages.seconds(5),
        interval_jitter_percent=10,
        unhealthy_threshold=messages.uint32(2),
        healthy_threshold=messages.uint32(1),
        tls_options=health_check_pb2.HealthCheck.TlsOptions(alpn_protocols=tls.HTTP),
        http_health_check=health_check_pb2.HealthCheck.HttpHealthCheck(
            host=sni, path=names.HEALTH_PATH, codec_client_type=http_pb2.HTTP2
        ),
    )


def _connection_failures_only() -> Any:
    never = messages.uint32(0)
    return outlier_detection_pb2.OutlierDetection(
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=messages.uint32(1),
        enforcing_consecutive_local_origin_failure=messages.uint32(100),
        enforcing_consecutive_5xx=never,
        enforcing_consecutive_gateway_failure=never,
        enforcing_success_rate=never,
        enforcing_local_origin_success_rate=never,
        enforcing_failure_percentage=never,
        enforcing_failure_percentage_local_origin=never,
        # Longer than the health check needs to see for itself, even one that has just found out about traffic; a passed
        # check ends it earlier.
        interval=messages.seconds(1),
        base_ejection_time=messages.seconds(10),
        max_ejection_time=messages.seconds(30),
        max_ejection_percent=messages.uint32(100),
        successful_active_health_check_uneject_host=messages.TRUE,
    )


def _limits() -> Any:
    many = messages.uint32(_MANY)
    return circuit_breaker_pb2.CircuitBreakers(
        thresholds=[
            circuit_breaker_pb2.CircuitBreakers.Thresholds(
                max_connections=many,
                max_pending_requests=many,
                max_requests=many,
                retry_budget=circuit_breaker_pb2.CircuitBreakers.Thresholds.RetryBudget(
                    budget_percent=percent_pb2.Percent(value=20.0), min_retry_concurrency=messages.uint32(_RETRIES)
                ),
            )
        ]
    )


def _between_proxies() -> Any:
    """HTTP/2. The caller ends its connections after half an hour, before the server would (an hour), so that neither a
    certificate nor a verdict outlives its handshake for long; what is under way on them ends in peace.
    """
    return http_protocol_options_pb2.HttpProtocolOptions(
        common_http_protocol_options=protocol_pb2.HttpProtocolOptions(max_connection_duration=messages.seconds(1800)),
        explicit_http_config=http_protocol_options_pb2.HttpProtocolOptions.ExplicitHttpConfig(
            http2_protocol_options=protocol_pb2.Http2ProtocolOptions(
                allow_connect=True,  # which is what a WebSocket is there
                connection_keepalive=protocol_pb2.KeepaliveSettings(
                    interval=messages.seconds(30), timeout=messages.seconds(10)
                ),
            )
        ),
    )


def _keepalive() -> Any:
    return address_pb2.TcpKeepalive(
        keepalive_time=messages.uint32(60), keepalive_interval=messages.uint32(10), keepalive_probes=messages.uint32(3)
    )


def _to_application(protocol: Protocol) -> Any:
    explicit = http_protocol_options_pb2.HttpProtocolOptions.ExplicitHttpConfig()
    if protocol is Protocol.HTTP:
        explicit.http_protocol_options.SetInParent()
        # Without retries, a request on a connection that the application is just closing is lost: be the first to
        # close. Servers keep idle connections for two seconds and more.
        common = protocol_pb2.HttpProtocolOptions(idle_timeout=messages.seconds(1))
    else:
        explicit.http2_protocol_options.SetInParent()
        common = protocol_pb2.HttpProtocolOptions()
    return http_protocol_options_pb2.HttpProtocolOptions(
        common_http_protocol_options=common, explicit_http_config=explicit
    )
