"""What each workload's application listens on, by the services that lead there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from smc.mesh.problems import Problems
from smc.mesh.served import Served
from smc.mesh.sources import Sources
from smc.mesh.tables import Table, Tables, kept
from smc.mesh.traffic import Traffic
from smc.model import Inbound, Name, Problem, Protocol, RateLimit

Source = tuple[str, int]
"""(manifest, mod_revision)"""


@dataclass(slots=True)
class Listening(Tables):
    inbounds: Table[Name, tuple[Inbound, ...]] = field(default_factory=Table)
    """workload -> its ports"""

    def update(self, sources: Sources, served: Served, traffic: Traffic, problems: Problems) -> None:
        touched = dict.fromkeys((*served.backing.changed, *sources.workloads.changed, *sources.origins.changed))
        for service in dict.fromkeys((*sources.services.changed, *traffic.treatments.changed)):
            touched.update(dict.fromkeys(e.workload for e in sources.endpoints.get(service) or ()))
        for name in touched:
            found: list[Problem] = []
            inbounds = self._inbounds(name, sources, served, traffic, found) if name in sources.workloads else ()
            self.inbounds.put(name, inbounds or None)
            problems.report("inbound", name, found)

    def _inbounds(
        self, name: Name, sources: Sources, served: Served, traffic: Traffic, found: list[Problem]
    ) -> tuple[Inbound, ...]:
        leading: defaultdict[int, dict[tuple[Name, int], Protocol]] = defaultdict(dict)
        for service_name, ports in (served.backing.get(name) or {}).items():
            service = sources.services.get(service_name)
            targets = dict(reversed(ports))
            for port in service.ports if service is not None else ():
                if port.number in targets:
                    leading[targets[port.number]][service_name, port.number] = port.protocol
        before = {inbound.port: inbound for inbound in self.inbounds.get(name) or ()}
        numbers = {number for services in leading.values() for _, number in services}
        inbounds = []
        for app_port, services in sorted(leading.items()):
            first, *others = sorted(services)
            protocol = services[first]
            leads = [first]
            for service_name, number in others:
                other = services[service_name, number]
                # What callers speak to a TCP port is nothing that an HTTP port understands, nor the other way round.
                if alike := (other is Protocol.TCP) is (protocol is Protocol.TCP):
                    leads.append((service_name, number))
                if other is not protocol:
                    message = (
                        f"by service {first[0]} port {first[1]} port {app_port} of {name} speaks {protocol.value}, and "
                        f"by service {service_name} port {number} {other.value}: the first counts"
                        f"{'' if alike else ', and nothing gets there by the other'}; make them equal"
                    )
                    found.append(Problem(sources.origins[name], "ProtocolConflict", message))
            called = {number for _, number in leads} | ({app_port} - numbers)
            limit = _tightest({service for service, _ in leads}, traffic) if protocol is not Protocol.TCP else ()
            inbound = Inbound(app_port, protocol, tuple(leads), tuple(sorted(called)), *limit)
            inbounds.append(kept(before.get(app_port), inbound))
        return tuple(inbounds)


def _tightest(services: Iterable[Name], traffic: Traffic) -> tuple[RateLimit, tuple[Source]] | tuple[()]:
    """The rate limit of whichever service lets the fewest requests through, and who says so."""
    found = [
        (limit, treatment.source)
        for service in sorted(services)
        if (treatment := traffic.treatments.get(service)) is not None
        if (limit := treatment.policy.rate_limit) is not None
    ]
    if not found:
        return ()
    limit, source = min(found, key=lambda one: (one[0].requests / one[0].per.total_seconds(), one[0].burst))
    return limit, (source,)
