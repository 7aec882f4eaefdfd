"""What each service port is to its callers, and which of its endpoints may get traffic; of the others, why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.revocations import Revocations
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Table, Tables, kept
from smc.mesh.traffic import Traffic
from smc.model import Assignment, Endpoint, Identity, Name, Problem, Service, Treatment, Upstream

Ports = tuple[tuple[int, int], ...]
"""(service port, application port)"""


def by_name(row: tuple[Name, Any]) -> tuple[str, str]:
    """Sorts a table by its keys."""
    return (row[0].namespace, row[0].name)


@dataclass(slots=True)
class Served(Tables):
    """`upstreams` and `assignments` have a row for every service, in the order of the services, then of its ports."""

    upstreams: Table[Name, tuple[Upstream, ...]] = field(default_factory=Table)
    assignments: Table[Name, tuple[Assignment, ...]] = field(default_factory=Table)
    backing: Table[Name, Mapping[Name, Ports]] = field(default_factory=Table)
    """workload -> service that it has an endpoint of -> that endpoint's ports."""
    departed: Table[Name, bool] = field(default_factory=Table)
    """The workloads that were ready once and are gone."""
    serving: Index[Identity, Name] = field(default_factory=Index)
    """identity -> the services that have an endpoint of it."""

    def update(
        self,
        records: Records,
        sources: Sources,
        traffic: Traffic,
        revocations: Revocations,
        problems: Problems,
    ) -> None:
        touched = dict.fromkeys((*sources.services.changed, *traffic.treatments.changed))
        for name in sources.endpoints.changed:
            self._note(name, sources.endpoints.was(name) or (), sources.endpoints.get(name) or ())
            touched[name] = None
        for workload in (*records.ready.changed, *revocations.shut.changed):
            touched.update(dict.fromkeys(self.backing.get(workload) or ()))
        for identity in records.certificates.appeared_or_went():
            touched.update(dict.fromkeys(self.serving.of(identity)))
        for name in touched:
            self._serve(name, records, sources, traffic, revocations)
        for workload in (*records.ready.changed, *sources.workloads.changed):
            gone = workload in records.ready and workload not in sources.workloads
            self.departed.put(workload, True if gone else None)
        self.upstreams.sort(by_name)
        self.assignments.sort(by_name)
        self._report_unready(records, sources, problems)

    def _note(self, service: Name, was: tuple[Endpoint, ...], now: tuple[Endpoint, ...]) -> None:
        before = {endpoint.workload: endpoint.ports for endpoint in was}
        after = {endpoint.workload: endpoint.ports for endpoint in now}
        for workload in {**before, **after}:
            ports = after.get(workload)
            if ports != before.get(workload):
                row = dict(self.backing.get(workload) or {})
                if ports is None:
                    del row[service]
                else:
                    row[service] = ports
                self.backing.put(workload, row or None)
        self.serving.move(service, {e.identity for e in was}, {e.identity for e in now})

    def _serve(
        self, name: Name, records: Records, sources: Sources, traffic: Traffic, revocations: Revocations
    ) -> None:
        service = sources.services.get(name)
        if service is None:
            self.upstreams.put(name, None)
            self.assignments.put(name, None)
            return
        endpoints = sources.endpoints.get(name) or ()
        usable = [
            e
            for e in endpoints
            if e.workload in records.ready and e.identity in records.certificates and e.workload not in revocations.shut
        ]
        treatment = traffic.treatments.get(name)
        self.upstreams.put(name, _each(self.upstreams.get(name), _upstreams(service, endpoints, treatment)))
        self.assignments.put(name, _each(self.assignments.get(name), _assignments(service, usable)))

    def _report_unready(self, records: Records, sources: Sources, problems: Problems) -> None:
        """A workload that backs a service gets no traffic before its proxy is there and can prove who it is."""
        touched = dict.fromkeys(
            (
                *self.backing.changed,
                *sources.workloads.changed,
                *sources.origins.changed,
                *records.ready.changed,
            )
        )
        for identity in records.certificates.appeared_or_went():
            touched.update(dict.fromkeys(sources.identities.of(identity)))
        for name in touched:
            workload = sources.workloads.get(name)
            missing = ""
            if workload is not None and name in self.backing:
                if workload.identity not in records.certificates:
                    missing = f"its identity {workload.identity} has no certificate yet: the leader issues it"
                elif name not in records.ready:
                    missing = "its proxy has not taken its configuration yet: start it, or see what it says"
            told: list[Problem] = []
            if missing:
                message = f"workload {name} gets no traffic: {missing}"
                told.append(Problem(sources.origins[name], "NotReady", message))
            problems.report("ready", name, told)


def _upstreams(service: Service, endpoints: Iterable[Endpoint], treatment: Treatment | None) -> Iterable[Upstream]:
    for port in service.ports:
        identities = {endpoint.identity for endpoint in endpoints if _has(endpoint, port.number)}
        yield Upstream(service.name, port.number, port.protocol, tuple(sorted(identities)), treatment)


def _assignments(service: Service, endpoints: Iterable[Endpoint]) -> Iterable[Assignment]:
    for port in service.ports:
        yield Assignment(service.name, port.number, tuple(e for e in endpoints if _has(e, port.number)))


def _has(endpoint: Endpoint, port: int) -> bool:
    return any(number == port for number, _ in endpoint.ports)


def _each(before: tuple[Any, ...] | None, now: Iterable[Any]) -> tuple[Any, ...]:
    """The nouns of a service's ports; those that say what they said stay the same."""
    known = {noun.port: noun for noun in before or ()}
    return tuple(kept(known.get(noun.port), noun) for noun in now)
