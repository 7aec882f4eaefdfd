"""The sixth stage: what each identity may be asked, by whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

from smc.manifests import Rules
from smc.mesh.compiled import Compiled, Scope
from smc.mesh.problems import Problems
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Table, Tables, kept
from smc.model import Identity, Name, Permission, Policy, Problem, Severity

K = TypeVar("K")
_destination: Callable[[Permission], Identity] = attrgetter("destination")
_manifest: Callable[[Permission], str] = attrgetter("manifest")

NOBODY = Policy(())
"""Of an identity that nobody may call."""


@dataclass(slots=True)
class Permissions(Tables):
    policies: Table[Identity, Policy] = field(default_factory=Table)
    """For every identity that somebody may call."""
    identities: Index[Identity, Name] = field(default_factory=Index)
    """identity -> its workloads"""

    granted: Index[Identity, Scope] = field(default_factory=Index)
    """destination -> whose rules have Permissions to it"""
    by_manifest: Table[str, tuple[Permission, ...]] = field(default_factory=Table)
    naming: Index[Identity, str] = field(default_factory=Index)
    """identity -> the manifests whose Permissions name it"""

    def update(self, compiled: Compiled, sources: Sources, problems: Problems) -> None:
        manifests = self._note_workloads(sources)
        destinations: dict[Identity, None] = {}
        granted: dict[Scope, dict[Identity, tuple[Permission, ...]]] = {}
        for scope in compiled.rules.changed:
            was, now = _permissions(compiled.rules.was(scope)), _permissions(compiled.rules.get(scope))
            before, granted[scope] = _grouped(was, _destination), _grouped(now, _destination)
            self.granted.move(scope, before, granted[scope])
            either = before | granted[scope]
            destinations.update(dict.fromkeys(d for d in either if before.get(d) != granted[scope].get(d)))
            self._note_manifests(was, now)
        for destination in destinations:
            found: list[Permission] = []
            for scope in sorted(self.granted.of(destination)):
                if scope not in granted:
                    granted[scope] = _grouped(compiled.rules[scope].permissions, _destination)
                found.extend(granted[scope][destination])
            policy = Policy(tuple(sorted(found, key=_manifest)))
            self.policies.put(destination, kept(self.policies.get(destination), policy) if found else None)
        for manifest in {**manifests, **self.by_manifest.changed}:
            problems.report("identities", manifest, self._absent(manifest))

    def _note_workloads(self, sources: Sources) -> dict[str, None]:
        """Returns the manifests that name an identity which workloads had or have not."""
        identities: dict[Identity, bool] = {}
        for name in sources.workloads.changed:
            was, now = sources.workloads.was(name), sources.workloads.get(name)
            for workload in (was, now):
                if workload is not None:
                    identities.setdefault(workload.identity, workload.identity in self.identities)
            self.identities.move(name, [was.identity] if was else (), [now.identity] if now else ())
        return {
            manifest: None
            for identity, there in identities.items()
            if there != (identity in self.identities)
            for manifest in self.naming.of(identity)
        }

    def _note_manifests(self, was: Iterable[Permission], now: Iterable[Permission]) -> None:
        before, after = _grouped(was, _manifest), _grouped(now, _manifest)
        for manifest in {**before, **after}:
            old, new = before.get(manifest, ()), after.get(manifest, ())
            if old != new:
                self.by_manifest.put(manifest, new or None)
                self.naming.move(manifest, _names(old), _names(new))

    def _absent(self, manifest: str) -> Iterable[Problem]:
        """Identities that no workload has: likely a wrong name, and no fault if the workload comes later."""
        for permission in self.by_manifest.get(manifest) or ():
            if permission.destination not in self.identities:
                message = f"no workload has the identity {permission.destination}, so there is nobody to call"
                yield Problem(manifest, "DestinationNotFound", message, "spec.destination", Severity.WARNING.value)
            for source in permission.sources:
                if source not in self.identities:
                    message = f"no workload has the identity {source}, so nobody may call as it"
                    yield Problem(manifest, "SourceNotFound", message, "spec.sources", Severity.WARNING.value)


def _permissions(rules: Rules | None) -> tuple[Permission, ...]:
    return rules.permissions if rules is not None else ()


def _grouped(permissions: Iterable[Permission], by: Callable[[Permission], K]) -> dict[K, tuple[Permission, ...]]:
    found: dict[K, tuple[Permission, ...]] = {}
    for permission in permissions:
        found[by(permission)] = (*found.get(by(permission), ()), permission)
    return found


def _names(permissions: Iterable[Permission]) -> set[Identity]:
    return {identity for p in permissions for identity in (p.destination, *p.sources)}
