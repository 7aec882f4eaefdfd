"""Where the stages come together: from a View to the Mesh at its revision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cluster.kv import View
from smc.manifests import PolicyApi
from smc.mesh.addresses import Addresses
from smc.mesh.bindings import Bindings
from smc.mesh.callers import Callers
from smc.mesh.compiled import Compiled
from smc.mesh.egress import EgressHosts
from smc.mesh.listening import Listening
from smc.mesh.nouns import Mesh
from smc.mesh.permissions import Permissions
from smc.mesh.problems import Problems
from smc.mesh.proxies import Proxies
from smc.mesh.quarantines import Quarantines
from smc.mesh.reading import Records
from smc.mesh.revocations import Revocations
from smc.mesh.served import Served
from smc.mesh.sources import Sources
from smc.mesh.splits import Splits
from smc.mesh.tables import Table, Tables
from smc.mesh.traffic import Traffic

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class _Stages(Tables):
    records: Records = field(default_factory=Records)
    sources: Sources = field(default_factory=Sources)
    traffic: Traffic = field(default_factory=Traffic)
    revocations: Revocations = field(default_factory=Revocations)
    served: Served = field(default_factory=Served)
    addresses: Addresses = field(default_factory=Addresses)
    egress: EgressHosts = field(default_factory=EgressHosts)
    compiled: Compiled = field(default_factory=Compiled)
    splits: Splits = field(default_factory=Splits)
    bindings: Bindings = field(default_factory=Bindings)
    permissions: Permissions = field(default_factory=Permissions)
    quarantines: Quarantines = field(default_factory=Quarantines)
    callers: Callers = field(default_factory=Callers)
    listening: Listening = field(default_factory=Listening)
    proxies: Proxies = field(default_factory=Proxies)
    problems: Problems = field(default_factory=Problems)

    def update(self, view: View, policies: Sequence[PolicyApi]) -> None:
        """Bring every stage to the View; raises as `Records.update`."""
        self.records.update(view, self.problems)
        self.sources.update(self.records, self.problems)
        self.revocations.update(self.records, self.sources, self.problems)
        self.traffic.update(self.records, self.sources, self.problems)
        self.served.update(self.records, self.sources, self.traffic, self.revocations, self.problems)
        self.addresses.update(self.records, self.sources, self.problems)
        self.egress.update(self.records, self.sources, self.problems)
        self.compiled.update(self.records, policies, self.problems)
        self.splits.update(self.compiled, self.served, self.problems)
        self.bindings.update(self.compiled, self.sources, self.records.the_mesh.trust_domain, self.problems)
        self.permissions.update(
            self.compiled,
            self.sources,
            self.records,
            self.revocations,
            self.bindings,
            self.problems,
        )
        self.quarantines.update(self.records, self.sources, self.problems)
        self.callers.update(
            self.records,
            self.sources,
            self.served,
            self.traffic,
            self.splits,
            self.addresses,
            self.quarantines,
        )
        self.listening.update(self.records, self.sources, self.served, self.traffic, self.problems)
        self.proxies.update(
            self.records,
            self.sources,
            self.permissions,
            self.revocations,
            self.quarantines,
            self.callers,
            self.listening,
            self.problems,
        )
        self.problems.gather()


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the next build goes on from, and what it must have in common with this one."""

    cluster_id: int
    generation: int
    policies: tuple[PolicyApi, ...]
    stages: _Stages


def build(previous: Mesh | None, view: View, policies: Sequence[PolicyApi]) -> Mesh:
    """Make the Mesh at `view`; whatever `view.changed` does not touch is the same object as in `previous`.

    A Mesh built step by step and one built from nothing at the same View generate equal bytes. With no `previous`, or
    with one of another generation of the store, everything is built. One bad record hurts only itself: it becomes a
    Problem. `previous` stays as it is, also when this fails.

    Raises:
        NotFound: the store has no record of a mesh: whose mesh this is, is not known.
        UnreadableRecord: that record, or the bundle of roots, cannot be read. To tell the proxies less than before
            would cut them off, so the Mesh before stays.
    """
    before = _stages(previous, view, policies)
    if before is not None:
        stages = before.fork()
        stages.update(view, policies)
    if before is None or stages.records.mesh.changed:
        before = None
        stages = _Stages()
        stages.update(
            View(view.cluster_id, view.generation, view.revision, view.items, frozenset(view.items)), policies
        )
    return _mesh(previous, before is not None, stages, view, policies)


def with_revocations(mesh: Mesh, view: View) -> Mesh:
    """The same Mesh, which also refuses whom `view` revokes: for a View that no Mesh can be made of.

    What it refuses already it goes on to refuse, unless the View lets a newer credential in: nothing is opened by what
    cannot be built. Itself, if the View revokes nobody else.
    """
    records, revocations, problems = Records(), Revocations(), Problems()
    records.read_revocations(view, problems)
    revocations.update(records, Sources(), problems)
    found: dict[str, Any] = {
        "revoked_proxies": {**mesh.revoked_proxies, **records.revoked_proxies.rows},
        "revoked_identities": {**mesh.revoked_identities, **records.revoked_identities.rows},
        "admitted": {**mesh.admitted, **revocations.admitted.rows},
        "revoked_credentials": {**mesh.revoked_credentials, **revocations.credentials.rows},
    }
    differs = {field: now for field, now in found.items() if now != getattr(mesh, field)}
    return replace(mesh, **differs) if differs else mesh


def _stages(previous: Mesh | None, view: View, policies: Sequence[PolicyApi]) -> _Stages | None:
    """What to go on from; None: everything is built."""
    kept = previous.stages if previous is not None else None
    if not isinstance(kept, _Kept):
        return None
    same = (kept.cluster_id, kept.generation, kept.policies) == (view.cluster_id, view.generation, tuple(policies))
    return kept.stages if same else None


def _mesh(previous: Mesh | None, step: bool, stages: _Stages, view: View, policies: Sequence[PolicyApi]) -> Mesh:
    records, revocations, proxies = stages.records, stages.revocations, stages.proxies.proxies
    config, identities = records.config, stages.sources.identities
    if previous is not None and previous.config == config:
        config = previous.config
    trusts_the_same = previous is not None and records.bundle is previous.bundle and records.crl is previous.crl
    if step and previous is not None and config is previous.config and trusts_the_same:
        affected = frozenset(proxies.changed)
    else:
        affected = frozenset(proxies.rows).union(previous.proxies if previous is not None else ())
    last = previous if step else None
    return Mesh(
        revision=view.revision,
        mesh_id=records.the_mesh.mesh_id,
        trust_domain=records.the_mesh.trust_domain,
        config=config,
        bundle=records.bundle,
        crl=records.crl,
        revoked_proxies=_frozen(records.revoked_proxies, last.revoked_proxies if last else None),
        revoked_identities=_frozen(records.revoked_identities, last.revoked_identities if last else None),
        admitted=_frozen(revocations.admitted, last.admitted if last else None),
        revoked_credentials=_frozen(revocations.credentials, last.revoked_credentials if last else None),
        proxies=_frozen(proxies, last.proxies if last else None),
        manifests=_frozen(records.manifests, last.manifests if last else None),
        problems=_frozen(stages.problems.by_manifest, last.problems if last else None),
        identities=identities.keys() if last is None or identities.has_other_keys() else last.identities,
        own_addresses=_frozen(stages.addresses.own, last.own_addresses if last else None),
        intercepts=stages.addresses.are_dialled,
        synced=frozenset(records.synced.rows),
        affected=affected,
        departed=_frozen(stages.served.departed, last.departed if last else None),
        stages=_Kept(view.cluster_id, view.generation, tuple(policies), stages.settled()),
    )


def _frozen(table: Table[K, V], before: Mapping[K, V] | None) -> Mapping[K, V]:
    """What was there before, if nothing of it has changed."""
    return before if before is not None and not table.changed else table.frozen()
