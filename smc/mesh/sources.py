"""The services, workloads and endpoints of all sources as one.

Where several sources offer a service or workload of the same name, applied manifests come first, then the sources by
name; the others have a Problem. Endpoints of one service are the union of what all sources say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

from smc.endpoints import join
from smc.mesh.problems import Problems
from smc.mesh.reading import OWN, Offered, Records, manifest_of
from smc.mesh.tables import Index, Table, Tables
from smc.model import Endpoint, Identity, Name, Problem, Service, Workload

T = TypeVar("T")
Placed = dict[Name, Endpoint]
"""One workload's endpoints, by service."""

_by_workload = attrgetter("workload.namespace", "workload.name")


@dataclass(slots=True)
class Sources(Tables):
    services: Table[Name, Service] = field(default_factory=Table)
    workloads: Table[Name, Workload] = field(default_factory=Table)
    origins: Table[Name, str] = field(default_factory=Table)
    """workload -> where its Problems are told."""
    identities: Index[Identity, Name] = field(default_factory=Index)
    """identity -> its workloads"""
    endpoints: Table[Name, tuple[Endpoint, ...]] = field(default_factory=Table)
    """service -> all that any source says, sorted by workload, none twice. It may be there before its service."""

    service_offers: Index[Name, str] = field(default_factory=Index)
    workload_offers: Index[Name, str] = field(default_factory=Index)
    endpoint_offers: Index[Name, str] = field(default_factory=Index)
    backers: Index[Name, Name] = field(default_factory=Index)
    """service -> the workloads of applied manifests that say that they back it."""
    placed: Table[Name, Placed] = field(default_factory=Table)
    """workload of an applied manifest -> its endpoints."""

    def update(self, records: Records, problems: Problems) -> None:
        _choose("services", records.services, self.service_offers, self.services, problems)
        _choose("workloads", records.workloads, self.workload_offers, self.workloads, problems)
        for _, name in records.workloads.changed:
            offers = self.workload_offers.of(name)
            self.origins.put(name, manifest_of(min(offers), "workloads", name) if offers else None)
        for name in self.workloads.changed:
            was, now = self.workloads.was(name), self.workloads.get(name)
            self.identities.move(name, [was.identity] if was else (), [now.identity] if now else ())
        services = self._join(records, problems)
        for source, name in records.endpoints.changed:
            _note(records.endpoints, self.endpoint_offers, (source, name))
            services[name] = None
        for name in services:
            self.endpoints.put(name, self._endpoints(records, name))

    def _join(self, records: Records, problems: Problems) -> dict[Name, None]:
        """Place the workloads of applied manifests; returns the services that this touches."""
        workloads: dict[Name, None] = {}
        for source, name in records.workloads.changed:
            if source == OWN:
                self.backers.move(
                    name, _named(records.workloads.was((OWN, name))), _named(records.workloads.get((OWN, name)))
                )
                workloads[name] = None
        for service in self.services.changed:
            workloads.update(dict.fromkeys(self.backers.of(service)))
        for name in workloads:
            workload = records.workloads.get((OWN, name))
            found: tuple[Problem, ...] = ()
            placed: Placed = {}
            if workload is not None:
                placed, found = self.place(workload, self.origins[name])
            problems.report("join", name, found)
            self.placed.put(name, placed or None)
        touched: dict[Name, None] = {}
        for name in self.placed.changed:
            for row in (self.placed.was(name), self.placed.get(name)):
                touched.update(dict.fromkeys(row or ()))
        return touched

    def place(self, workload: Workload, origin: str = "") -> tuple[Placed, tuple[Problem, ...]]:
        """Its endpoints by what it says itself, and at `origin` why it has no more."""
        known = [s for n in _named(workload) if (s := self.services.get(n)) is not None]
        joined, found = join(known, [workload], manifest_of_workload={workload.name: origin})
        return {one.service: endpoint for one in joined for endpoint in one.endpoints}, found

    def _endpoints(self, records: Records, name: Name) -> tuple[Endpoint, ...] | None:
        found: dict[Name, Endpoint] = {}
        for workload in self.backers.of(name):
            if placed := (self.placed.get(workload) or {}).get(name):
                found[workload] = placed
        for source in sorted(self.endpoint_offers.of(name)):
            for endpoint in records.endpoints[source, name]:
                found.setdefault(endpoint.workload, endpoint)
        return tuple(sorted(found.values(), key=_by_workload)) or None


def _named(workload: Workload | None) -> list[Name]:
    return [Name(workload.name.namespace, short) for short in workload.services] if workload is not None else []


def _note(table: Table[Offered, T], offers: Index[Name, str], key: Offered) -> None:
    source, name = key
    if key in table:
        offers.add(name, source)
    else:
        offers.discard(name, source)


def _choose(
    what: str, offered: Table[Offered, T], offers: Index[Name, str], chosen: Table[Name, T], problems: Problems
) -> None:
    for key in offered.changed:
        _note(offered, offers, key)
    for name in dict.fromkeys(name for _, name in offered.changed):
        sources = sorted(offers.of(name))
        chosen.put(name, offered[sources[0], name] if sources else None)
        problems.report(
            what,
            name,
            [
                Problem(
                    manifest_of(source, what, name),
                    "Duplicate",
                    f"{name} comes from {_called(sources[0])} too, and that one counts: remove or rename one of them",
                )
                for source in sources[1:]
            ],
        )


def _called(source: str) -> str:
    return "an applied manifest" if source == OWN else f"source {source}"
