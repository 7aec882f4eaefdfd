"""The mesh at a revision: every record joined, indexed and compiled, and nothing rebuilt that did not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.kv import View
from smc.manifests import Manifest, PolicyApi
from smc.model import Identity, Inbound, MeshConfig, Name, Outbound, Policy, Problem, Workload
from smc.records import BundleRecord, CertificateRecord, QuarantineRecord


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Proxy:
    """One proxy, and exactly what its configuration is made from."""

    workload: Workload
    outbound: Outbound
    inbound: tuple[Inbound, ...]
    """Sorted by port."""
    policy: Policy
    certificate: CertificateRecord | None
    """None: the leader has not issued it yet."""
    quarantined: tuple[QuarantineRecord, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """Everything, at one revision. Indexes are never changed; a build makes new ones that share their values."""

    revision: int
    mesh_id: str
    trust_domain: str
    config: MeshConfig
    bundle: BundleRecord | None
    proxies: Mapping[Name, Proxy]
    """By workload."""
    manifests: Mapping[str, Manifest]
    """By id, `<group>/<kind>/<namespace>/<name>`."""
    problems: Mapping[str, tuple[Problem, ...]]
    """By manifest."""
    identities: frozenset[Identity]
    """Every identity that a workload has: what the leader issues certificates for. Its order reaches no wire."""
    synced: frozenset[str]
    """The sources that were observed whole."""
    affected: frozenset[Name]
    """The proxies that are new, gone, or whose Proxy, config or bundle is another object than in the Mesh before."""


def build(previous: Mesh | None, view: View, policies: Sequence[PolicyApi]) -> Mesh:
    """Make the Mesh at `view`; whatever `view.changed` does not touch is the same object as in `previous`.

    A Mesh built step by step and one built from nothing at the same View generate equal bytes. With no `previous`, or
    with one of another generation of the store, everything is built. One bad record hurts only itself: it becomes a
    Problem.
    """
    raise NotImplementedError
