"""What each workload's application listens on, by the services that lead there.

A service that a workload has left leads there for a while longer: its callers hear of that when they do, and until then
they are answered as they were. Nobody else dials it, and who may call is said by the same policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.served import Ports, Served
from smc.mesh.sources import Sources
from smc.mesh.tables import Table, Tables, kept
from smc.mesh.traffic import Traffic
from smc.model import Inbound, Name, Problem, Protocol, RateLimit, Workload

Source = tuple[str, int]
"""(manifest, mod_revision)"""
Leading = Mapping[int, dict[tuple[Name, int], Protocol]]
"""application port -> service and its port that lead there -> what is spoken"""


@dataclass(slots=True)
class Listening(Tables):
    inbounds: Table[Name, tuple[Inbound, ...]] = field(default_factory=Table)
    """workload -> its ports"""

    def update(self, records: Records, sources: Sources, served: Served, traffic: Traffic, problems: Problems) -> None:
        left: defaultdict[Name, list[Workload]] = defaultdict(list)
        for (name, _), was in sorted(records.leaving.rows.items(), key=lambda row: -int(row[0][1])):
            left[name].append(was)
        touched = dict.fromkeys((*served.backing.changed, *sources.workloads.changed, *sources.origins.changed))
        touched.update(dict.fromkeys(name for name, _ in records.leaving.changed))
        if sources.services.changed or traffic.treatments.changed:
            touched.update(dict.fromkeys(left))
        for service in dict.fromkeys((*sources.services.changed, *traffic.treatments.changed)):
            touched.update(dict.fromkeys(e.workload for e in sources.endpoints.get(service) or ()))
        for name in touched:
            found: list[Problem] = []
            inbounds: tuple[Inbound, ...] = ()
            workload = sources.workloads.get(name)
            if workload is not None:
                serves = _leading(served.backing.get(name) or {}, sources)
                numbers = _numbers(serves)
                inbounds = _inbounds(name, sources.origins[name], serves, numbers, traffic, found)
                # What was allowed to one identity says nothing of another.
                alike = [was for was in left.get(name, ()) if was.identity == workload.identity]
                if alike and (leaves := _left(alike, serves, sources)):
                    late = _inbounds(name, "", leaves, numbers | _numbers(leaves), traffic, [])
                    inbounds = _joined(inbounds, late)
            before = {inbound.port: inbound for inbound in self.inbounds.get(name) or ()}
            self.inbounds.put(name, tuple(kept(before.get(inbound.port), inbound) for inbound in inbounds) or None)
            problems.report("inbound", name, found)


def _leading(backing: Mapping[Name, Ports], sources: Sources) -> Leading:
    leading: defaultdict[int, dict[tuple[Name, int], Protocol]] = defaultdict(dict)
    for service_name, ports in backing.items():
        service = sources.services.get(service_name)
        targets = dict(reversed(ports))
        for port in service.ports if service is not None else ():
            if port.number in targets:
                leading[targets[port.number]][service_name, port.number] = port.protocol
    return leading


def _left(workloads: Iterable[Workload], serves: Leading, sources: Sources) -> Leading:
    """What a workload served as it was lately (the newest first), and does not serve any more."""
    backed: dict[Name, Ports] = {}
    for workload in workloads:
        for service, endpoint in sources.place(workload)[0].items():
            backed.setdefault(service, endpoint.ports)
    now = {port for services in serves.values() for port in services}
    leading = {
        app_port: {port: protocol for port, protocol in services.items() if port not in now}
        for app_port, services in _leading(backed, sources).items()
    }
    return {app_port: services for app_port, services in leading.items() if services}


def _numbers(leading: Leading) -> set[int]:
    return {number for services in leading.values() for _, number in services}


def _inbounds(
    name: Name, origin: str, leading: Leading, numbers: AbstractSet[int], traffic: Traffic, found: list[Problem]
) -> tuple[Inbound, ...]:
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
                found.append(Problem(origin, "ProtocolConflict", message))
        called = {number for _, number in leads} | ({app_port} - numbers)
        limit = _tightest({service for service, _ in leads}, traffic) if protocol is not Protocol.TCP else ()
        inbounds.append(Inbound(app_port, protocol, tuple(leads), tuple(sorted(called)), *limit))
    return tuple(inbounds)


def _joined(now: Iterable[Inbound], left: Iterable[Inbound]) -> tuple[Inbound, ...]:
    """Both, by port. What a port is now counts, and what was left joins it, unless that speaks otherwise.

    By which numbers it is called is said by what leads there now alone: one route judges all requests to the port, and
    a permission for the number of a service that was left would let them in by the others as well.
    """
    ports = {inbound.port: inbound for inbound in now}
    for one in left:
        there = ports.setdefault(one.port, one)
        if there is not one and (there.protocol is Protocol.TCP) is (one.protocol is Protocol.TCP):
            ports[one.port] = replace(there, services=tuple(sorted({*there.services, *one.services})))
    return tuple(ports[number] for number in sorted(ports))


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
