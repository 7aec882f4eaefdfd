"""The TrafficPolicy that counts for each service."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Table, Tables
from smc.model import Name, Problem, Protocol, Severity, TrafficPolicy, Treatment

_SERVICE = "spec.service"


@dataclass(slots=True)
class Traffic(Tables):
    treatments: Table[Name, Treatment] = field(default_factory=Table)
    """service -> what counts for it, whether it is there or not: of several the oldest, so that a new manifest cannot
    take the place of one that works.
    """
    written: Table[str, TrafficPolicy] = field(default_factory=Table)
    """manifest -> what it said when it was last looked at"""
    about: Index[Name, str] = field(default_factory=Index)
    """service -> the manifests about it"""

    def update(self, records: Records, sources: Sources, problems: Problems) -> None:
        touched = dict.fromkeys(service for service in sources.services.changed if service in self.about)
        for id_ in records.manifests.changed:
            before, now = self.written.get(id_), records.traffic.get(id_)
            if before is None and now is None:
                continue
            self.written.put(id_, now)
            services = [[policy.service] if policy is not None else [] for policy in (before, now)]
            self.about.move(id_, *services)
            touched.update(dict.fromkeys(service for both in services for service in both))
        for service in touched:
            ids = sorted(self.about.of(service), key=lambda id_: (records.manifests[id_].record.created, id_))
            first = ids[0] if ids else None
            treatment = None
            if first is not None:
                treatment = Treatment(self.written[first], (first, records.manifests[first].mod_revision))
            self.treatments.put(service, treatment)
            problems.report("traffic", service, self._problems(service, ids, sources))

    def _problems(self, service: Name, ids: list[str], sources: Sources) -> Iterable[Problem]:
        for id_ in ids[1:]:
            message = f"{service} has {ids[0]}, which is older, so this one has no effect: put both into one"
            yield Problem(id_, "Conflict", message, _SERVICE)
        found = sources.services.get(service)
        for id_ in ids[:1]:
            if found is None:
                yield Problem(id_, "ServiceNotFound", f"there is no service {service}: create it", _SERVICE)
            elif tcp := [port.number for port in found.ports if port.protocol is Protocol.TCP]:
                policy = self.written[id_]
                of_requests = (policy.timeout, policy.retries, policy.fault, policy.rate_limit)
                if any(setting is not None for setting in of_requests):
                    message = (
                        f"{service} port {', '.join(map(str, tcp))} speaks TCP, where there are no requests: "
                        "timeout, retries, fault and rateLimit do nothing there"
                    )
                    yield Problem(id_, "HTTPSettingsOnTCP", message, _SERVICE, Severity.WARNING.value)
