"""What policy denied, or would have denied: every proxy tells some replica what it has counted, and any replica tells
who asks of all.

A report is everything that the proxy has counted since its Envoy started, so nothing is added up over time: a lost
report costs nothing, a replica that has just started knows all after one more, and of what two replicas were told about
one proxy the newer counts. It is kept in memory only, for as long as it is told again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from smc.api.limits import Limiter, Limits, Rate
from smc.envoy import names
from smc.errors import Exhausted, Invalid
from smc.mesh import Mesh, Proxy
from smc.model import Name, Protocol
from smc.v1 import smc_pb2 as pb

LIMITS = Limits(peer=Rate(1, 5), overall=Rate(500, 2000))
"""Reports a second, of one proxy and of all."""
MOST_PORTS = 1000
LONGEST_PORT = 512
KEPT = 180.0
"""Seconds for which a report counts. Proxies repeat what has not changed every minute."""


@dataclass(frozen=True, slots=True)
class _Told:
    report: pb.ReportDenialsRequest
    at: float


class Denials:
    """What one replica was told. `clock` is in seconds and never goes back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._limiter = Limiter(LIMITS, clock)
        self._told: dict[Name, _Told] = {}
        """The oldest first."""

    def take(self, proxy: Name, report: pb.ReportDenialsRequest, mesh: Mesh) -> None:
        """Keep a proxy's report in place of its last one; one of a proxy that is not in the mesh is not kept.

        Raises:
            Exhausted: it tells more often than is taken.
            Invalid: the report has no bounds.
        """
        if wait := self._limiter.admit(str(proxy)):
            raise Exhausted(f"proxy {proxy} reports its denials too often", hint=f"try again in {max(wait, 0.1):.1f} s")
        if len(report.ports) > MOST_PORTS or any(len(counted.port) > LONGEST_PORT for counted in report.ports):
            raise Invalid(f"a report has at most {MOST_PORTS} ports, each of at most {LONGEST_PORT} characters")
        if not all(map(math.isfinite, (report.since, *(counted.last for counted in report.ports)))):
            raise Invalid("a report has a time that is no number")
        now = self._clock()
        while self._told and now - self._told[oldest := next(iter(self._told))].at >= KEPT:
            del self._told[oldest]
        self._told.pop(proxy, None)
        if proxy in mesh.proxies:
            self._told[proxy] = _Told(report, now)

    def of(self, mesh: Mesh, namespace: str, now: float) -> Iterator[pb.Denial]:
        """What counts of it: of the proxies of a namespace, or of all for "", and of the ports that they have.

        `now` is in seconds since 1970: no proxy's clock tells of later.
        """
        for name, told in sorted(self._told.items()):
            proxy = mesh.proxies.get(name)
            if proxy is None or self._clock() - told.at >= KEPT or namespace not in ("", name.namespace):
                continue
            known = _ports(proxy)
            for counted in told.report.ports:
                if counted.port in known:
                    yield pb.Denial(
                        workload=str(name),
                        port=counted.port,
                        mode=proxy.mode.value,
                        denied=counted.denied,
                        would_be_denied=counted.would_be_denied,
                        since=min(told.report.since, now),
                        last=min(counted.last, now),
                    )


def _ports(proxy: Proxy) -> set[str]:
    """What its calls may be counted under. A proxy's word is not taken for it."""
    own = {names.cluster(service, port) for inbound in proxy.inbound for service, port in inbound.services}
    tcp = {names.TCP for inbound in proxy.inbound if inbound.protocol is Protocol.TCP}
    return own | {names.PLAINTEXT} | tcp


def newest(told: Iterable[pb.Denial]) -> list[pb.Denial]:
    """Of what several replicas were told of the same port the newest, sorted by workload and port."""
    denials = list(told)
    since: dict[str, float] = {}
    for denial in denials:
        since[denial.workload] = max(denial.since, since.get(denial.workload, -math.inf))
    found: dict[tuple[str, str], pb.Denial] = {}
    for denial in denials:
        if denial.since == since[denial.workload]:  # else it was counted by an Envoy that is no more
            key = (denial.workload, denial.port)
            known = found.get(key)
            if known is None or _count(known) < _count(denial):
                found[key] = denial
    return [denial for _, denial in sorted(found.items())]


def _count(denial: pb.Denial) -> int:
    return denial.denied + denial.would_be_denied
