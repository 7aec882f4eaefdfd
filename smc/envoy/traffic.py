"""What a TrafficPolicy becomes. The filters that it needs are in every listener, idle, so that it changes none of them:
what is asked of them stands in routes.

- A retry goes to another endpoint than the attempts before, if there is one, 25 ms and more after them. Retries in all
  are at most a fifth of what a proxy has under way to a cluster, or 200: an ill service is not buried in them.
- Faults are a caller's proxy's: the server never sees what was aborted.
- The bucket of a rate limit is a proxy's, shared by its threads. It comes after policy: who may not ask takes nothing.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.common.fault.v3 import fault_pb2 as common_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.type.v3 import percent_pb2, token_bucket_pb2

from smc.envoy import messages
from smc.model import ConnectionLimits, Fault, HealthCheck, OutlierDetection, RateLimit, Retries, TrafficPolicy

FAULT = "envoy.filters.http.fault"
RATE_LIMIT = "envoy.filters.http.local_ratelimit"
COUNTED_AS = "rate_limit"
"""In the names of its statistics."""


def treat(route: Any, policy: TrafficPolicy) -> Any:
    """A route to a service as its policy wants requests to be treated; one that leads nowhere stays as it is."""
    if not route.HasField("route"):
        return route
    if policy.timeout is not None:
        route.route.timeout.CopyFrom(_duration(policy.timeout))
    if policy.retries is not None:
        route.route.retry_policy.CopyFrom(_retries(policy.retries))
    if policy.fault is not None:
        route.typed_per_filter_config[FAULT].CopyFrom(messages.packed(_fault(policy.fault)))
    return route


def rate_limited(route: Any, limit: RateLimit) -> Any:
    """A route to the proxy's own application that requests take only as often as the limit lets them."""
    always = base_pb2.RuntimeFractionalPercent(default_value=_share(1_000_000))
    config = local_rate_limit_pb2.LocalRateLimit(
        stat_prefix=COUNTED_AS,
        token_bucket=token_bucket_pb2.TokenBucket(
            max_tokens=limit.burst,
            tokens_per_fill=messages.uint32(limit.requests),
            fill_interval=_duration(limit.per),
        ),
        filter_enabled=always,
        filter_enforced=always,
    )
    route.typed_per_filter_config[RATE_LIMIT].CopyFrom(messages.packed(config))
    return route


def limited(breakers: Any, asked: ConnectionLimits | None) -> Any:
    """The circuit breakers of a cluster with what is asked of them."""
    (thresholds,) = breakers.thresholds
    if asked is not None and asked.connections is not None:
        thresholds.max_connections.value = asked.connections
    if asked is not None and asked.pending_requests is not None:
        thresholds.max_pending_requests.value = asked.pending_requests
    if asked is not None and asked.requests is not None:
        thresholds.max_requests.value = asked.requests
    return breakers


def detecting(outliers: Any, asked: OutlierDetection | None) -> Any:
    """The outlier detection of a cluster that looks at answers as well."""
    if asked is not None:
        outliers.consecutive_5xx.value = asked.consecutive_5xx
        outliers.enforcing_consecutive_5xx.value = 100
        outliers.interval.CopyFrom(_duration(asked.interval))
        outliers.base_ejection_time.CopyFrom(_duration(asked.base_ejection_time))
        outliers.max_ejection_time.CopyFrom(_duration(asked.base_ejection_time * 10))
        outliers.max_ejection_percent.value = asked.max_ejection_percent
        # The check asks the proxy, and it is the application's answers that are ill.
        outliers.successful_active_health_check_uneject_host.value = False
    return outliers


def checked(health_check: Any, asked: HealthCheck | None) -> Any:
    """A health check of proxies with what is asked of it; an interval holds whether or not there is traffic."""
    if asked is None:
        return health_check
    if asked.interval is not None:
        for field in ("interval", "no_traffic_interval", "no_traffic_healthy_interval"):
            getattr(health_check, field).CopyFrom(_duration(asked.interval))
    if asked.timeout is not None:
        health_check.timeout.CopyFrom(_duration(asked.timeout))
    if asked.unhealthy_threshold is not None:
        health_check.unhealthy_threshold.value = asked.unhealthy_threshold
    if asked.healthy_threshold is not None:
        health_check.healthy_threshold.value = asked.healthy_threshold
    return health_check


def _retries(asked: Retries) -> Any:
    previous = route_components_pb2.RetryPolicy.RetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts",
        typed_config=messages.packed(previous_hosts_pb2.PreviousHostsPredicate()),
    )
    found = route_components_pb2.RetryPolicy(
        retry_on=",".join(asked.on),
        num_retries=messages.uint32(asked.attempts),
        retry_host_predicate=[previous],
        host_selection_retry_max_attempts=5,
    )
    if asked.per_try_timeout is not None:
        found.per_try_timeout.CopyFrom(_duration(asked.per_try_timeout))
    return found


def _fault(asked: Fault) -> Any:
    found = fault_pb2.HTTPFault()
    if asked.delay is not None:
        found.delay.CopyFrom(
            common_pb2.FaultDelay(fixed_delay=_duration(asked.delay), percentage=_share(asked.delay_share))
        )
    if asked.abort_status:
        found.abort.CopyFrom(fault_pb2.FaultAbort(http_status=asked.abort_status, percentage=_share(asked.abort_share)))
    return found


def _share(millionths: int) -> Any:
    return percent_pb2.FractionalPercent(numerator=millionths, denominator=percent_pb2.FractionalPercent.MILLION)


def _duration(value: timedelta) -> Any:
    return messages.seconds(value.total_seconds())
