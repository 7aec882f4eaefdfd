"""What is left out for single proxies, because they refuse it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Table, Tables
from smc.model import Name, Problem
from smc.records import QuarantineRecord

Version = tuple[str, int]
"""(manifest, mod_revision)"""


_NOTHING: Final[frozenset[Version]] = frozenset()


@dataclass(slots=True)
class Quarantines(Tables):
    quarantined: Table[Name, tuple[QuarantineRecord, ...]] = field(default_factory=Table)
    """proxy -> the quarantines that count: those of what its manifest is now"""

    quarantines: Index[Name, Version] = field(default_factory=Index)
    """proxy -> what is quarantined for it, whether it counts or not"""
    refusing: Index[str, Name] = field(default_factory=Index)
    """manifest -> the proxies that have a quarantine of it"""

    def left_out(self, proxy: Name) -> frozenset[Version]:
        found = self.quarantined.get(proxy)
        return frozenset((record.manifest, record.mod_revision) for record in found) if found else _NOTHING

    def update(self, records: Records, sources: Sources, problems: Problems) -> None:
        proxies = dict.fromkeys(name for name in sources.workloads.changed if name in self.quarantines)
        manifests: dict[str, None] = {}
        for proxy, manifest, revision in records.quarantines.changed:
            if (proxy, manifest, revision) in records.quarantines:
                self.quarantines.add(proxy, (manifest, revision))
            else:
                self.quarantines.discard(proxy, (manifest, revision))
            if any(known == manifest for known, _ in self.quarantines.of(proxy)):
                self.refusing.add(manifest, proxy)
            else:
                self.refusing.discard(manifest, proxy)
            proxies[proxy] = None
            manifests[manifest] = None
        for manifest in records.manifests.changed:
            proxies.update(dict.fromkeys(self.refusing.of(manifest)))
        for proxy in proxies:
            counting = self._counting(proxy, records) if proxy in sources.workloads else ()
            self.quarantined.put(proxy, counting or None)
        for proxy in self.quarantined.changed:
            for record in (*(self.quarantined.was(proxy) or ()), *(self.quarantined.get(proxy) or ())):
                manifests[record.manifest] = None
        for manifest in manifests:
            problems.report("quarantine", manifest, self._refused(manifest))

    def _counting(self, proxy: Name, records: Records) -> tuple[QuarantineRecord, ...]:
        return tuple(
            records.quarantines[proxy, manifest, revision]
            for manifest, revision in sorted(self.quarantines.of(proxy))
            if (found := records.manifests.get(manifest)) is not None and found.mod_revision == revision
        )

    def _refused(self, manifest: str) -> Iterable[Problem]:
        found = [
            record
            for proxy in sorted(self.refusing.of(manifest))
            for record in self.quarantined.get(proxy) or ()
            if record.manifest == manifest
        ]
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            message = f"it is left out for proxy {found[0].proxy}{others}, which refuses it: {found[0].reason}"
            yield Problem(manifest, "Quarantined", message)
