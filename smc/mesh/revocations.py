"""Who is revoked, and what that takes from whom.

Whatever cannot be read stays closed: that a revocation is there is all that is asked of it, and a credential that was
not admitted since is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from smc.mesh.problems import Problems
from smc.mesh.reading import Records, Revoked
from smc.mesh.sources import Sources
from smc.mesh.tables import Table, Tables
from smc.model import Identity, Name, Problem
from smc.records import AdmissionRecord


@dataclass(slots=True)
class Revocations(Tables):
    admitted: Table[Name, tuple[str, ...]] = field(default_factory=Table)
    """revoked proxy -> the serials of the credentials that were signed for it since, sorted; often none"""
    shut: Table[Name, bool] = field(default_factory=Table)
    """The workloads that nobody may dial: revoked and not let in again, or of a revoked identity."""
    credentials: Table[str, tuple[str, ...]] = field(default_factory=Table)
    """`operator/<name>` or `viewer/<name>` that is revoked -> as `admitted`"""
    barred: Table[Identity, tuple[str, ...]] = field(default_factory=Table)
    """identity -> the fingerprints of its certificates that are revoked, sorted"""

    def update(self, records: Records, sources: Sources, problems: Problems) -> None:
        for name in dict.fromkeys((*records.revoked_proxies.changed, *records.admissions.changed)):
            self.admitted.put(name, _admitted(records.revoked_proxies.get(name), records.admissions.get(name)))
        for path in dict.fromkeys((*records.revoked_credentials.changed, *records.credential_admissions.changed)):
            revoked, admission = records.revoked_credentials.get(path), records.credential_admissions.get(path)
            self.credentials.put(path, _admitted(revoked, admission))
        touched = dict.fromkeys((*self.admitted.changed, *sources.workloads.changed, *sources.origins.changed))
        for identity in records.revoked_identities.changed:
            touched.update(dict.fromkeys(sources.identities.of(identity)))
        for name in touched:
            self._shut(name, records, sources, problems)
        if records.crls.changed:
            self._bar(records)

    def _shut(self, name: Name, records: Records, sources: Sources, problems: Problems) -> None:
        why = ""
        workload = sources.workloads.get(name)
        if workload is not None and workload.identity in records.revoked_identities:
            why = f"its identity {workload.identity} is revoked: smc cert list says why, smc cert revoke --undo ends it"
        elif self.admitted.get(name) == ():
            why = "its proxy is revoked: smc cert list says why, and a new token lets it in again"
        self.shut.put(name, True if why else None)
        told: list[Problem] = []
        if why and workload is not None:
            message = f"workload {name} takes no part in the mesh: {why}"
            told.append(Problem(sources.origins[name], "Revoked", message))
        problems.report("revoked", name, told)

    def _bar(self, records: Records) -> None:
        found: defaultdict[Identity, list[str]] = defaultdict(list)
        for one in records.crl.revoked if records.crl is not None else ():
            found[one.identity].append(one.certificate.fingerprint)
        for identity in dict.fromkeys((*found, *self.barred.rows)):
            self.barred.put(identity, tuple(sorted(found[identity])) or None)

    def barring(self, identities: Iterable[Identity] | None = None) -> tuple[str, ...]:
        """The fingerprints of all revoked certificates of these, or of everybody, sorted."""
        of = self.barred.rows if identities is None else identities
        return tuple(sorted({one for identity in of for one in self.barred.get(identity) or ()}))


def _admitted(revoked: Revoked | None, admission: AdmissionRecord | None) -> tuple[str, ...] | None:
    if revoked is None:
        return None
    if admission is None or admission.revocation != revoked.revision:
        return ()
    return tuple(sorted(serial for serial, _ in admission.credentials))
