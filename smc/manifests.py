"""Manifests as users write them: read strictly, with positions, and refused with a reason that can be acted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smc.model import Permission, Problem, Split
from smc.records import ManifestRecord

RE2_MAX_PROGRAM_SIZE = 5000
"""The largest regular expression that a manifest may hold, in RE2's own measure; Envoy is started with the same bound."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A stored manifest, at the revision of its last write."""

    record: ManifestRecord
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Rules:
    """What the policy manifests of one namespace compile to."""

    splits: tuple[Split, ...] = ()
    permissions: tuple[Permission, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyApi:
    """One API that policy may be written in."""

    groups: frozenset[str]
    """The API groups whose manifests it compiles."""
    compile: Callable[[str, Sequence[Manifest]], Rules]
    """(namespace, its manifests in these groups, sorted by id) -> Rules. Pure; raises nothing: it reports Problems."""
