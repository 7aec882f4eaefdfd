"""What a TrafficPolicy may say."""

from __future__ import annotations

from datetime import timedelta

import pytest

from smc.manifests import OWN_KINDS, InvalidManifest, noun, read
from smc.model import (
    ConnectionLimits,
    Fault,
    HealthCheck,
    Name,
    OutlierDetection,
    RateLimit,
    Retries,
    TrafficPolicy,
)


def said(spec: str) -> TrafficPolicy:
    text = f"apiVersion: smc.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: it, namespace: shop}}\nspec: {spec}\n"
    found: TrafficPolicy = noun(read(text, OWN_KINDS, file="it.yaml"), OWN_KINDS)
    return found


def test_everything_that_can_be_asked_for_is_read() -> None:
    assert said("""
  service: web
  timeout: 2s500ms
  retries: {attempts: 3, on: [reset, 5xx], perTryTimeout: 250ms}
  limits: {maxConnections: 1, maxPendingRequests: 2, maxRequests: 3}
  healthCheck: {interval: 500ms, timeout: 100ms, unhealthyThreshold: 4, healthyThreshold: 5}
  outlierDetection: {consecutive5xx: 6, interval: 7s, baseEjectionTime: 8s, maxEjectionPercent: 9}
  fault: {delay: {duration: 1s, percent: 0.5}, abort: {status: 503, percent: 20}}
  rateLimit: {requests: 10, per: 1m, burst: 11}
""") == TrafficPolicy(
        Name("shop", "web"),
        timedelta(seconds=2.5),
        Retries(3, ("5xx", "reset"), timedelta(milliseconds=250)),
        ConnectionLimits(1, 2, 3),
        HealthCheck(timedelta(milliseconds=500), timedelta(milliseconds=100), 4, 5),
        OutlierDetection(6, timedelta(seconds=7), timedelta(seconds=8), 9),
        Fault(timedelta(seconds=1), 5000, 503, 200_000),
        RateLimit(10, timedelta(minutes=1), 11),
    )


def test_what_is_left_out_has_a_default_or_stays_as_it_is() -> None:
    policy = said(
        "{service: web, retries: {attempts: 1}, outlierDetection: {consecutive5xx: 5}, "
        "fault: {abort: {status: 500}}, rateLimit: {requests: 10}}"
    )
    assert policy == TrafficPolicy(
        Name("shop", "web"),
        retries=Retries(1, ("connect-failure", "refused-stream")),
        outlier_detection=OutlierDetection(5, timedelta(seconds=1), timedelta(seconds=30), 50),
        fault=Fault(abort_status=500, abort_share=1_000_000),
        rate_limit=RateLimit(10, timedelta(seconds=1), 10),
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{timeout: 1s}", "spec.service: is missing (add service)"),
        (
            "{service: web}",
            "spec: asks for nothing (write what is to be otherwise than for any other service, or delete it)",
        ),
        ("{service: web.other, timeout: 1s}", "spec.service: "),
        ("{service: web, timeout: 0s}", "spec.timeout: 0s is not from 1ms to 1h"),
        ("{service: web, timeout: 5}", 'spec.timeout: must be a string, not the number 5 (put it into quotes: "5")'),
        ("{service: web, retries: {attempts: 0}}", "spec.retries.attempts: 0 is not from 1 to 10"),
        (
            "{service: web, retries: {attempts: 1, on: []}}",
            "spec.retries.on: the list is empty, and at least one is needed "
            "(leave it out: what no application has seen is tried again)",
        ),
        (
            "{service: web, retries: {attempts: 1, on: [5XX]}}",
            'spec.retries.on[0]: "5XX" is not known (did you mean "5xx"?)',
        ),
        ("{service: web, limits: {maxRequests: 0}}", "spec.limits.maxRequests: 0 is not from 1 to 1000000"),
        ("{service: web, fault: {}}", "spec.fault: does nothing (write delay, abort or both, or leave it out)"),
        ("{service: web, fault: {abort: {status: 200}}}", "spec.fault.abort.status: 200 is not from 400 to 599"),
        (
            "{service: web, fault: {abort: {status: 503, percent: 0}}}",
            "spec.fault.abort.percent: 0 is not from 1 to 100",
        ),
        (
            "{service: web, fault: {abort: {status: 503, percent: 100.5}}}",
            "spec.fault.abort.percent: 100.5 is not from 0.0001 to 100",
        ),
        (
            "{service: web, fault: {abort: {status: 503, percent: half}}}",
            'spec.fault.abort.percent: must be a number, not the string "half"',
        ),
        (
            "{service: web, fault: {abort: {status: 503, percent: 1e999}}}",
            "spec.fault.abort.percent: inf is not from 0.0001 to 100",
        ),
        (
            "{service: web, rateLimit: {requests: 10, burst: 9}}",
            "spec.rateLimit.burst: 9 is less than the 10 requests of each 1 s",
        ),
        ("{service: web, rateLimit: {requests: 10, per: 10ms}}", "spec.rateLimit.per: 10ms is not from 50ms to 1h"),
        ("{service: web, circuitBreakers: {}}", "spec.circuitBreakers: unknown field (write limits)"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place_and_what_to_do(spec: str, told: str) -> None:
    with pytest.raises(InvalidManifest) as caught:
        said(spec)
    finding = caught.value.findings[0]
    found = f"{finding.field}: {finding.reason}" + (f" ({finding.hint})" if finding.hint else "")
    assert found.startswith(told) if told.endswith(": ") else found == told
