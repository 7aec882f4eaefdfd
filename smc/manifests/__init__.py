"""Manifests as users write them: read strictly, with positions, and refused with a reason that can be acted on.

`read` and `read_all` make records from a text, `noun` makes from a stored record what it says. A kind is one line of a
table, and what it may hold is a schema: a new kind needs no new code here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smc.manifests.expressions import RE2_MAX_LENGTH, RE2_MAX_PROGRAM_SIZE
from smc.manifests.findings import Finding, InvalidManifest
from smc.manifests.kinds import DEFAULT_NAMESPACE, MESH_WIDE, Kind, find, noun, read, read_all, within
from smc.manifests.own import OWN_KINDS, mesh_config, service, workload
from smc.manifests.text import MAX_DOCUMENT, MAX_TEXT, Document, documents
from smc.model import Binding, Grant, Permission, PolicyOptions, Problem, Split
from smc.records import ManifestRecord

__all__ = [
    "DEFAULT_NAMESPACE",
    "MAX_DOCUMENT",
    "MAX_TEXT",
    "MESH_WIDE",
    "OWN_KINDS",
    "RE2_MAX_LENGTH",
    "RE2_MAX_PROGRAM_SIZE",
    "Document",
    "Finding",
    "InvalidManifest",
    "Kind",
    "Manifest",
    "PolicyApi",
    "Rules",
    "documents",
    "find",
    "mesh_config",
    "noun",
    "read",
    "read_all",
    "service",
    "within",
    "workload",
]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Manifest:
    """A stored manifest, at the revision of its last write."""

    record: ManifestRecord
    mod_revision: int

    def __hash__(self) -> int:
        return hash((self.record.id, self.mod_revision))


@dataclass(frozen=True, slots=True)
class Rules:
    """What the policy manifests of one namespace compile to."""

    splits: tuple[Split, ...] = ()
    """Of several of one root, a request takes the first that is for it."""
    permissions: tuple[Permission, ...] = ()
    grants: tuple[Grant, ...] = ()
    """What becomes further permissions by Bindings, of this namespace or another."""
    bindings: tuple[Binding, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyApi:
    """One API that policy may be written in."""

    groups: frozenset[str]
    """The API groups whose manifests it compiles."""
    compile: Callable[[str, Sequence[Manifest], PolicyOptions], Rules]
    """(namespace, its manifests in these groups, sorted by id, options) -> Rules.

    Pure; raises nothing: it reports Problems.
    """
