"""Why manifests have no or less effect: what each stage found, gathered by manifest."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from smc.manifests import InvalidManifest
from smc.mesh.tables import Index, Table, Tables
from smc.model import Problem

Finder = tuple[str, Hashable]
"""What was looked at: a word for the check, and what it was about."""

MOST_FINDINGS = 10
"""Of one manifest that cannot be read."""


@dataclass(slots=True)
class Problems(Tables):
    found: Table[Finder, tuple[Problem, ...]] = field(default_factory=Table)
    finders: Index[str, Finder] = field(default_factory=Index)
    by_manifest: Table[str, tuple[Problem, ...]] = field(default_factory=Table)

    def report(self, check: str, subject: Hashable, problems: Iterable[Problem]) -> None:
        """Tell all that a check finds now; what it found before is forgotten."""
        finder = (check, subject)
        now = tuple(sorted(set(problems))) if problems else ()
        before = self.found.get(finder) or ()
        if now != before:
            self.found.put(finder, now or None)
            self.finders.move(finder, {p.manifest for p in before}, {p.manifest for p in now})

    def gather(self) -> None:
        """Bring `by_manifest` up to date."""
        touched = {
            problem.manifest: None
            for finder in self.found.changed
            for problem in (*(self.found.was(finder) or ()), *(self.found.get(finder) or ()))
        }
        for manifest in touched:
            problems = {p for f in self.finders.of(manifest) for p in self.found[f] if p.manifest == manifest}
            self.by_manifest.put(manifest, tuple(sorted(problems)) or None)


def invalid(manifest: str, error: InvalidManifest) -> tuple[Problem, ...]:
    """What to say of a stored manifest that this version does not take."""
    return tuple(
        Problem(
            manifest,
            "InvalidManifest",
            f"{finding.reason}{f': {finding.hint}' if finding.hint else ''}; the manifest has no effect",
            finding.field,
        )
        for finding in error.findings[:MOST_FINDINGS]
    )
