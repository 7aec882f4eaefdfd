"""The kind TrafficPolicy: how callers and servers treat one service. Nothing is on that nobody wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from smc.manifests import schema
from smc.manifests.findings import Unfit
from smc.manifests.kinds import Metadata, Schema
from smc.manifests.schema import Field, Findings, Integer, ListOf, Object, OneOf, Text
from smc.manifests.text import Node
from smc.model import ConnectionLimits, Fault, HealthCheck, Name, OutlierDetection, RateLimit, Retries, TrafficPolicy

WHOLE = 1_000_000
"""A share of everything, in millionths."""

RETRY_ON = (
    "cancelled",
    "connect-failure",
    "deadline-exceeded",
    "gateway-error",
    "internal",
    "refused-stream",
    "reset",
    "reset-before-request",
    "resource-exhausted",
    "retriable-4xx",
    "unavailable",
    "5xx",
)
"""Envoy's words: those of gRPC look at `grpc-status` (Envoy, "Router", x-envoy-retry-on and x-envoy-retry-grpc-on)."""
SAFE_TO_RETRY = ("connect-failure", "refused-stream")
"""What no application has seen, so that another attempt repeats nothing."""

_SECOND = timedelta(seconds=1)
_WAIT = Text(schema.duration(timedelta(milliseconds=1), timedelta(hours=1)))


@dataclass(frozen=True, slots=True)
class _Percent:
    """A share in per cent, such as 5 or 0.1, read in millionths of everything; not 0."""

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        checked = OneOf({int: Integer(1, 100), float: _Fraction()}, "number")
        share = checked.read(node, field, findings)
        return share * WHOLE // 100 if isinstance(node.value, int) and isinstance(share, int) else share


@dataclass(frozen=True, slots=True)
class _Fraction:
    def read(self, node: Node, field: str, findings: Findings) -> Any:
        value = node.value if isinstance(node.value, float) else 0.0
        # What no share can be is not rounded: a number that is too long is read as infinite.
        share = round(value * WHOLE / 100) if 0 < value <= 100 else 0
        return share or findings.add(node, field, f"{value} is not from 0.0001 to 100")


_COUNT = Integer(1, 1_000_000)

_RETRIES = Object(
    (
        Field("attempts", Integer(1, 10), required=True),
        Field(
            "on",
            ListOf(
                Text(schema.choice({word: word for word in RETRY_ON})),
                least=1,
                unique=lambda word: word,
                empty="leave it out: what no application has seen is tried again",
            ),
            default=SAFE_TO_RETRY,
        ),
        Field("perTryTimeout", _WAIT),
    ),
    lambda attempts, on, timeout: Retries(attempts, tuple(sorted(on)), timeout),
)
_LIMITS = Object(
    (Field("maxConnections", _COUNT), Field("maxPendingRequests", _COUNT), Field("maxRequests", _COUNT)),
    ConnectionLimits,
)
_HEALTH_CHECK = Object(
    (
        Field("interval", Text(schema.duration(timedelta(milliseconds=100), timedelta(minutes=5)))),
        Field("timeout", Text(schema.duration(timedelta(milliseconds=10), timedelta(minutes=1)))),
        Field("unhealthyThreshold", Integer(1, 20)),
        Field("healthyThreshold", Integer(1, 20)),
    ),
    HealthCheck,
)
_OUTLIERS = Object(
    (
        Field("consecutive5xx", Integer(1, 1000), required=True),
        Field("interval", Text(schema.duration(timedelta(milliseconds=100), timedelta(hours=1))), default=_SECOND),
        Field(
            "baseEjectionTime",
            Text(schema.duration(_SECOND, timedelta(hours=1))),
            default=timedelta(seconds=30),
        ),
        Field("maxEjectionPercent", Integer(1, 100), default=50),
    ),
    OutlierDetection,
)
_DELAY = Object(
    (Field("duration", _WAIT, required=True), Field("percent", _Percent(), default=WHOLE)),
    lambda duration, share: (duration, share),
)
_ABORT = Object(
    (Field("status", Integer(400, 599), required=True), Field("percent", _Percent(), default=WHOLE)),
    lambda status, share: (status, share),
)


def _fault(delay: tuple[timedelta, int] | None, abort: tuple[int, int] | None) -> Fault:
    if delay is None and abort is None:
        raise Unfit("does nothing", "write delay, abort or both, or leave it out")
    waited, delayed = delay or (None, 0)
    status, aborted = abort or (0, 0)
    return Fault(waited, delayed, status, aborted)


def _rate_limit(requests: int, per: timedelta, burst: int | None) -> RateLimit:
    if burst is not None and burst < requests:
        raise Unfit(f"{burst} is less than the {requests} requests of each {per.total_seconds():g} s", field="burst")
    return RateLimit(requests, per, requests if burst is None else burst)


_RATE_LIMIT = Object(
    (
        Field("requests", _COUNT, required=True),
        # Envoy fills its buckets every 50 ms at most.
        Field("per", Text(schema.duration(timedelta(milliseconds=50), timedelta(hours=1))), default=_SECOND),
        Field("burst", _COUNT),
    ),
    _rate_limit,
)


def _policy(service: str, *settings: Any) -> Callable[[Metadata], TrafficPolicy]:
    if all(setting is None for setting in settings):
        raise Unfit("asks for nothing", "write what is to be otherwise than for any other service, or delete it")

    def of(metadata: Metadata) -> TrafficPolicy:
        return TrafficPolicy(Name(metadata.name.namespace, service), *settings)

    return of


TRAFFIC_POLICY = Schema(
    (
        Field(
            "spec",
            Object(
                (
                    Field("service", Text(schema.label), required=True),
                    Field("timeout", _WAIT),
                    Field("retries", _RETRIES),
                    Field("limits", _LIMITS),
                    Field("healthCheck", _HEALTH_CHECK),
                    Field("outlierDetection", _OUTLIERS),
                    Field("fault", Object((Field("delay", _DELAY), Field("abort", _ABORT)), _fault)),
                    Field("rateLimit", _RATE_LIMIT),
                ),
                _policy,
                {"circuitBreakers": "write limits", "namespace": "it is that of the manifest"},
            ),
            required=True,
        ),
    ),
    lambda metadata, spec: spec(metadata),
)
