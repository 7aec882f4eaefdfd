"""What every chain that speaks HTTP ends in, on either side: the connection's own settings, and the filters that each
request goes through.

- A peer is trusted with nothing but its certificate. `x-envoy-*` from anybody is dropped (everyone counts as external),
  and each user of `connections` says what becomes of `x-forwarded-client-cert`.
- On the way to hosts outside the mesh nothing is changed.
- No timeout ends a request that runs; only headers have to arrive within a minute.
- WebSockets are let through. Between proxies they are streams of HTTP/2, but routes and policy see what the application
  sees, a GET with its path; as with any request, what is already open is not judged again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from envoy.config.core.v3 import address_pb2
from envoy.config.listener.v3 import listener_components_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.dynamic_forward_proxy.v3 import dynamic_forward_proxy_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.health_check.v3 import health_check_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.type.matcher.v3 import string_pb2
from envoy.type.v3 import percent_pb2

from smc.envoy import clusters, messages, names, routes, traffic

_Hcm = http_connection_manager_pb2.HttpConnectionManager
# Envoy reads an empty list as every private address: name one that nobody can have.
_NOBODY_INTERNAL = _Hcm.InternalAddressConfig(
    cidr_ranges=[address_pb2.CidrRange(address_prefix="255.255.255.255", prefix_len=messages.uint32(32))]
)


def connections(stat_prefix: str, access_log: Iterable[Any]) -> Any:
    """What all HTTP connection managers have in common."""
    return _Hcm(
        stat_prefix=stat_prefix,
        access_log=access_log,
        use_remote_address=messages.TRUE,
        skip_xff_append=True,
        internal_address_config=_NOBODY_INTERNAL,
        # Everyone is external, so without this every hop would give a request a new id.
        preserve_external_request_id=True,
        server_header_transformation=_Hcm.PASS_THROUGH,
        stream_idle_timeout=messages.seconds(0),
        request_headers_timeout=messages.seconds(60),
        upgrade_configs=[upgrade("websocket")],
    )


def fetched(route: str) -> Any:
    """The RouteConfiguration of that name, from the stream that everything comes on."""
    return http_connection_manager_pb2.Rds(config_source=messages.ads(), route_config_name=route)


def upgrade(to: str) -> Any:
    """Lets requests become connections that speak `to`, where their route does too."""
    return _Hcm.UpgradeConfig(upgrade_type=to)


def network_filter(manager: Any) -> Any:
    """The last filter of a chain that speaks HTTP."""
    return listener_components_pb2.Filter(
        name="envoy.filters.network.http_connection_manager", typed_config=messages.packed(manager)
    )


def filter_(name: str, config: Any) -> Any:
    """One of the filters that each request goes through."""
    return http_connection_manager_pb2.HttpFilter(name=name, typed_config=messages.packed(config))


def router() -> Any:
    """The last of them."""
    return filter_("envoy.filters.http.router", router_pb2.Router(suppress_envoy_headers=True))


def faults() -> Any:
    """Idle unless a route asks for faults."""
    return filter_(traffic.FAULT, fault_pb2.HTTPFault())


def rate_limit() -> Any:
    """Idle unless a route has a limit. After policy: who may not ask takes nothing from those who may."""
    return filter_(traffic.RATE_LIMIT, local_rate_limit_pb2.LocalRateLimit(stat_prefix=traffic.COUNTED_AS))


def forward_proxy() -> Any:
    """Idle unless a route leads to the cluster `passthrough`; always there, so that egress changes no listener."""
    config = dynamic_forward_proxy_pb2.FilterConfig(dns_cache_config=clusters.dns_cache())
    return filter_("envoy.filters.http.dynamic_forward_proxy", config)


def deny_all(counted_as: str) -> Any:
    """ALLOW with no policies: only what a route's own rules allow passes.

    What they judge is counted under this filter's names, not under their own, so the port that was called is in these.
    """
    config = filter_pb2.RBAC(
        rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW),
        rules_stat_prefix=f"{counted_as}.",
        shadow_rules_stat_prefix=f"{counted_as}.",
    )
    return filter_(routes.RBAC, config)


def health(app_port: int) -> Any:
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
    return filter_("envoy.filters.http.health_check", config)
