"""What each identity may be asked, by whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TypeVar

from smc.manifests import Rules
from smc.mesh.bindings import Bindings
from smc.mesh.compiled import Compiled
from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.revocations import Revocations
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Table, Tables, kept
from smc.model import Grant, Identity, Name, Permission, Policy, Problem, Severity

K = TypeVar("K")
P = TypeVar("P")
_destination: Callable[[Permission], Identity] = attrgetter("destination")
_manifest: Callable[[Permission | Grant], str] = attrgetter("manifest")

NOBODY = Policy(())
"""Of an identity that nobody may call."""


@dataclass(slots=True)
class Permissions(Tables):
    policies: Table[Identity, Policy] = field(default_factory=Table)
    """For every identity that somebody may call."""

    granted: Index[Identity, str] = field(default_factory=Index)
    """destination -> the manifests with Permissions to it"""
    written: Table[str, tuple[Permission | Grant, ...]] = field(default_factory=Table)
    """manifest -> what it was compiled to"""
    bound: Index[Name, str] = field(default_factory=Index)
    """binding -> the manifests whose Grants name it"""
    by_manifest: Table[str, tuple[Permission, ...]] = field(default_factory=Table)
    """manifest -> its Permissions, now that it is known whom its bindings mean"""
    naming: Index[Identity, str] = field(default_factory=Index)
    """identity -> the manifests whose Permissions name it"""

    def update(
        self,
        compiled: Compiled,
        sources: Sources,
        records: Records,
        revocations: Revocations,
        bindings: Bindings,
        problems: Problems,
    ) -> None:
        for scope in compiled.rules.changed:
            self._note_manifests(_written(compiled.rules.was(scope)), _written(compiled.rules.get(scope)))
        unresolved = dict.fromkeys(self.written.changed)
        for binding in (*bindings.bindings.changed, *bindings.identities.changed):
            unresolved.update(dict.fromkeys(self.bound.of(binding)))
        for manifest in unresolved:
            found: list[Problem] = []
            resolved = tuple(p for written in self.written.get(manifest) or () for p in _each(written, bindings, found))
            self.by_manifest.put(manifest, resolved or None)
            problems.report("bindings", manifest, found)
        destinations: dict[Identity, None] = {}
        for manifest in self.by_manifest.changed:
            was, now = self.by_manifest.was(manifest) or (), self.by_manifest.get(manifest) or ()
            before, after = _grouped(was, _destination), _grouped(now, _destination)
            self.granted.move(manifest, before, after)
            self.naming.move(manifest, _names(was), _names(now))
            destinations.update(dict.fromkeys(d for d in before | after if before.get(d) != after.get(d)))
        for identity in (*records.revoked_identities.changed, *revocations.barred.changed):
            for manifest in self.naming.of(identity):
                destinations.update(dict.fromkeys(p.destination for p in self.by_manifest[manifest]))
        for destination in destinations:
            permissions = tuple(
                held
                for manifest in sorted(self.granted.of(destination))
                for permission in self.by_manifest[manifest]
                if permission.destination == destination
                for held in _but(permission, records)
            )
            policy = Policy(permissions, revocations.barring(s for p in permissions for s in p.sources))
            self.policies.put(destination, kept(self.policies.get(destination), policy) if permissions else None)
        for manifest in {**self._meant_otherwise(sources), **self.by_manifest.changed}:
            problems.report("identities", manifest, self._absent(manifest, sources))

    def _meant_otherwise(self, sources: Sources) -> dict[str, None]:
        """The manifests that name an identity which workloads have now and had not, or had and have not."""
        table = sources.workloads
        workloads = (workload for name in table.changed for workload in (table.was(name), table.get(name)))
        identities = dict.fromkeys(workload.identity for workload in workloads if workload is not None)
        return {
            manifest: None
            for identity in identities
            if sources.identities.appeared_or_went(identity)
            for manifest in self.naming.of(identity)
        }

    def _note_manifests(self, was: Iterable[Permission | Grant], now: Iterable[Permission | Grant]) -> None:
        before, after = _grouped(was, _manifest), _grouped(now, _manifest)
        for manifest in {**before, **after}:
            old, new = before.get(manifest, ()), after.get(manifest, ())
            if old != new:
                self.written.put(manifest, new or None)
                self.bound.move(manifest, _bindings(old), _bindings(new))

    def _absent(self, manifest: str, sources: Sources) -> Iterable[Problem]:
        """Identities that no workload has: likely a wrong name, and no fault if the workload comes later."""
        for permission in self.by_manifest.get(manifest) or ():
            if permission.destination not in sources.identities:
                message = f"no workload has the identity {permission.destination}, so there is nobody to call"
                yield Problem(manifest, "DestinationNotFound", message, "spec.destination", Severity.WARNING.value)
            for source in permission.sources:
                if source not in sources.identities:
                    message = f"no workload has the identity {source}, so nobody may call as it"
                    yield Problem(manifest, "SourceNotFound", message, "spec.sources", Severity.WARNING.value)


def _each(written: Permission | Grant, bindings: Bindings, found: list[Problem]) -> Iterable[Permission]:
    """The Permissions of a Grant, one to each identity of its destination; a Permission itself."""
    if isinstance(written, Permission):
        yield written
        return
    also = set(written.also)
    for name in _bindings([written]):
        binding = bindings.bindings.get(name)
        if binding is None:
            where = "spec.destination" if name == written.destination else "spec.sources"
            message = f"there is no binding {name} (or it is invalid), so it means nobody: create it"
            found.append(Problem(written.manifest, "BindingNotFound", message, where))
        else:
            also.add((binding.manifest, binding.mod_revision))
    sources = {*written.sources, *(i for name in written.bindings for i in bindings.identities.get(name) or ())}
    to = written.destination
    destinations = (to,) if isinstance(to, Identity) else bindings.identities.get(to) or ()
    if not (sources and destinations):
        message = "its bindings mean nobody, so it grants nothing: see what is said of them"
        found.append(Problem(written.manifest, "GrantsNothing", message))
    for destination in destinations if sources else ():
        yield Permission(
            written.manifest,
            written.mod_revision,
            destination,
            tuple(sorted(sources)),
            written.http,
            tuple(sorted(also)),
            written.ports,
            written.tcp,
        )


def _but(permission: Permission, records: Records) -> Iterable[Permission]:
    """What is left of a permission without the sources that are revoked."""
    left = tuple(source for source in permission.sources if source not in records.revoked_identities)
    if left:
        yield permission if left == permission.sources else replace(permission, sources=left)


def _bindings(written: Iterable[Permission | Grant]) -> list[Name]:
    """Every binding that is named, in order, none twice."""
    grants = [grant for grant in written if isinstance(grant, Grant)]
    to = {grant.destination for grant in grants if isinstance(grant.destination, Name)}
    return sorted(to.union(*(grant.bindings for grant in grants)))


def _written(rules: Rules | None) -> tuple[Permission | Grant, ...]:
    return (*rules.permissions, *rules.grants) if rules is not None else ()


def _grouped(permissions: Iterable[P], by: Callable[[P], K]) -> dict[K, tuple[P, ...]]:
    found: dict[K, tuple[P, ...]] = {}
    for permission in permissions:
        found[by(permission)] = (*found.get(by(permission), ()), permission)
    return found


def _names(permissions: Iterable[Permission]) -> set[Identity]:
    return {identity for p in permissions for identity in (p.destination, *p.sources)}
