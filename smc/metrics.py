"""What `/metrics` shows: every instrument of a replica, made in one place and passed to whoever counts."""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Sent(NamedTuple):
    """The counters of what was sent of one type: looked up once, for they are counted with each push."""

    pushes: Counter
    resources: Counter
    bytes: Counter


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
        self.pushes = Counter("smc_xds_pushes_total", "Responses sent, by type", ["type"], registry=r)
        self.resources_sent = Counter("smc_xds_resources_sent_total", "Resources sent, by type", ["type"], registry=r)
        self.bytes_sent = Counter("smc_xds_bytes_sent_total", "Bytes of responses, by type", ["type"], registry=r)
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
        self._sent: dict[str, Sent] = {}

    def sent(self, type_: str) -> Sent:
        """What was sent of a type, by the name that people have for it."""
        if type_ not in self._sent:
            counters = self.pushes, self.resources_sent, self.bytes_sent
            self._sent[type_] = Sent(*(counter.labels(type_) for counter in counters))
        return self._sent[type_]
