"""Whom each Binding means: the identities of its namespace that its labels, its names and its SPIFFE IDs select.

Permissions are granted to identities, and several workloads may share one. So labels select an identity only if all of
its workloads have them: otherwise those that have not would be let in with the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from smc.mesh.compiled import Compiled
from smc.mesh.problems import Problems
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Table, Tables
from smc.model import Binding, Identity, Name, Problem, Severity


@dataclass(slots=True)
class Bindings(Tables):
    bindings: Table[Name, Binding] = field(default_factory=Table)
    identities: Table[Name, tuple[Identity, ...]] = field(default_factory=Table)
    """binding -> whom it means, sorted"""

    labelled: Index[str, Name] = field(default_factory=Index)
    """namespace -> its bindings that select by labels"""
    accounts: Index[str, Identity] = field(default_factory=Index)
    """namespace -> the identities that workloads have in it"""
    selected: Index[Name, Identity] = field(default_factory=Index)
    """binding -> the identities whose workloads all have its labels"""
    mixed: Index[Name, Identity] = field(default_factory=Index)
    """binding -> the identities of which some workloads have its labels and some have not"""

    def update(
        self,
        compiled: Compiled,
        sources: Sources,
        trust_domain: str,
        problems: Problems,
    ) -> None:
        touched: dict[Name, None] = {}
        for scope in compiled.rules.changed:
            was, now = compiled.rules.was(scope), compiled.rules.get(scope)
            before = {b.name: b for b in was.bindings} if was is not None else {}
            after = {b.name: b for b in now.bindings} if now is not None else {}
            for name in before | after:
                if before.get(name) != after.get(name):
                    self.bindings.put(name, after.get(name))
                    touched[name] = None
        moved: dict[Identity, None] = {}
        for name in sources.workloads.changed:
            for workload in (sources.workloads.was(name), sources.workloads.get(name)):
                if workload is not None:
                    moved[workload.identity] = None
        for identity in moved:
            if identity in sources.identities:
                self.accounts.add(identity.namespace, identity)
            else:
                self.accounts.discard(identity.namespace, identity)
            touched.update(dict.fromkeys(self.labelled.of(identity.namespace)))
        for name in touched:
            self._bind(name, sources, moved, trust_domain, problems)

    def _bind(
        self,
        name: Name,
        sources: Sources,
        moved: Iterable[Identity],
        trust_domain: str,
        problems: Problems,
    ) -> None:
        binding = self.bindings.get(name)
        found: list[Problem] = []
        means: set[Identity] = set()
        if name in self.bindings.changed:
            if binding is not None and binding.labels:
                self.labelled.add(name.namespace, name)
            else:
                self.labelled.discard(name.namespace, name)
            for identity in (*self.selected.of(name), *self.mixed.of(name)):
                self.selected.discard(name, identity)
                self.mixed.discard(name, identity)
            if binding is not None and binding.labels:
                for identity in self.accounts.of(name.namespace):
                    self._select(binding, identity, sources)
        else:
            for identity in moved:
                if binding is not None and identity.namespace == name.namespace:
                    self._select(binding, identity, sources)
        if binding is not None:
            means = self._means(binding, trust_domain, found)
        problems.report("binding", name, found)
        self.identities.put(name, tuple(sorted(means)) or None)

    def _select(self, binding: Binding, identity: Identity, sources: Sources) -> None:
        wanted = set(binding.labels)
        fits = {wanted.issubset(sources.workloads[name].labels) for name in sources.identities.of(identity)}
        for index, counts in ((self.selected, fits == {True}), (self.mixed, fits == {True, False})):
            if counts:
                index.add(binding.name, identity)
            else:
                index.discard(binding.name, identity)

    def _means(self, binding: Binding, trust_domain: str, found: list[Problem]) -> set[Identity]:
        namespace = binding.name.namespace
        means = set(self.selected.of(binding.name))
        if binding.service_account:
            means.add(Identity(namespace, binding.service_account))
        own = Identity(namespace, "").uri(trust_domain)
        for index, uri in enumerate(binding.uris):
            account = uri.removeprefix(own)
            if account != uri and account and "/" not in account:
                means.add(Identity(namespace, account))
            else:
                message = f"{uri} is no identity of this mesh, whose are {own}<service account>: it means nobody"
                where = f"spec.schemes.spiffeIdentities[{index}]"
                found.append(Problem(binding.manifest, "ForeignIdentity", message, where, Severity.WARNING.value))
        for identity in sorted(self.mixed.of(binding.name) - means):
            message = (
                f"some workloads of identity {identity} have the labels and some have not, so it is not meant: "
                "give those that are meant a service account of their own"
            )
            found.append(Problem(binding.manifest, "SharedIdentity", message, "spec.schemes.podLabelSelector"))
        if not means:
            message = "it means nobody, so whatever names it grants nothing by it"
            found.append(Problem(binding.manifest, "SelectsNobody", message, "spec.schemes"))
        return means
