"""What `/metrics` shows: every instrument of a replica, made in one place and passed to whoever counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(slots=True)
class Sent:
    """What was sent of one type. Plain numbers, for they are counted with each push."""

    pushes: int = 0
    resources: int = 0
    bytes: int = 0


class _AllSent(Collector):
    """Shows them as counters."""

    def __init__(self) -> None:
        self.types: defaultdict[str, Sent] = defaultdict(Sent)

    def collect(self) -> Iterator[CounterMetricFamily]:
        pushes = CounterMetricFamily("smc_xds_pushes", "Responses sent, by type", labels=["type"])
        resources = CounterMetricFamily("smc_xds_resources_sent", "Resources sent, by type", labels=["type"])
        sizes = CounterMetricFamily("smc_xds_bytes_sent", "Bytes of responses, by type", labels=["type"])
        for type_, sent in self.types.items():
            pushes.add_metric([type_], sent.pushes)
            resources.add_metric([type_], sent.resources)
            sizes.add_metric([type_], sent.bytes)
        yield from (pushes, resources, sizes)


class Metrics:
    """The instruments of one replica, on a registry of their own. Names begin with `smc_`."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.loop_lag = Histogram(
            "smc_loop_lag_seconds", "How late the event loop ran a timer of 100 ms", registry=r, buckets=_FAST
        )
        self.leader = Gauge("smc_leader", "1 while this replica is the leader", registry=r)
        self.fenced_writes = Counter(
            "smc_fenced_writes_total", "Writes that etcd refused because this replica no longer leads", registry=r
        )
        self.ready = Gauge("smc_ready", "1 while this replica answers new streams", registry=r)
        self.revision = Gauge("smc_mesh_revision", "The store revision of the Mesh that is served", registry=r)
        self.store_unreachable = Gauge(
            "smc_store_unreachable_seconds", "For how long etcd has not answered; 0 while it does", registry=r
        )
        self.build_time = Histogram("smc_build_seconds", "View to Mesh", registry=r, buckets=_FAST)
        self.build_failures = Counter(
            "smc_build_failures_total", "Views that could not be built: the Mesh before stays", registry=r
        )
        self.snapshot_time = Histogram(
            "smc_snapshot_seconds", "Mesh to the Snapshots of all affected proxies", registry=r, buckets=_FAST
        )
        self.affected = Histogram(
            "smc_affected_proxies",
            "Proxies that a build concerned",
            registry=r,
            buckets=(0, 1, 3, 10, 30, 100, 300, 1000, 3000),
        )
        self.problems = Gauge("smc_problems", "Problems of all manifests", registry=r)
        self.streams = Gauge("smc_xds_streams", "Connected proxies", registry=r)
        self.refused = Counter("smc_xds_refused_total", "Streams refused, by reason", ["reason"], registry=r)
        all_sent = _AllSent()
        r.register(all_sent)
        self.sent: Mapping[str, Sent] = all_sent.types
        """By the name that people have for a type; one that is not there yet is made."""
        self.nacks = Counter("smc_xds_nacks_total", "Responses that a proxy refused, by type", ["type"], registry=r)
        self.stalled = Counter("smc_xds_stalled_total", "Streams that did not ACK in time", registry=r)
        self.convergence_time = Histogram(
            "smc_convergence_seconds",
            "From a revision's arrival at this replica to its last ACK by each proxy",
            registry=r,
            buckets=_FAST,
        )
        self.certificates_issued = Counter(
            "smc_certificates_issued_total", "Certificates signed, by kind", ["kind"], registry=r
        )
        self.api_calls = Counter(
            "smc_api_calls_total", "API calls, by method and status", ["method", "code"], registry=r
        )
