"""The policy manifests of one namespace, compiled to Rules.

Whatever a manifest refers to is in its own namespace. A manifest that cannot be understood, or refers to what is not
there, has less effect than it says or none, never more; a Problem says so, and the others are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

from smc.manifests import InvalidManifest, Manifest, Rules, noun
from smc.model import HttpMatch, Permission, Problem, Split
from smc.smi.kinds import KINDS, RouteGroup, RouteReference, TrafficSplit, TrafficTarget

T = TypeVar("T")
Read = tuple[Manifest, T]


def compile_namespace(namespace: str, manifests: Sequence[Manifest]) -> Rules:
    """Compile the SMI manifests of one namespace; those of others are left out, with a Problem.

    The result does not depend on the order of `manifests`: splits are sorted by root, permissions by manifest.
    """
    problems: list[Problem] = []
    splits: list[Read[TrafficSplit]] = []
    targets: list[Read[TrafficTarget]] = []
    groups: dict[str, Read[RouteGroup]] = {}
    for manifest in sorted(manifests, key=lambda m: m.record.id):
        record = manifest.record
        if record.name.namespace != namespace:
            message = f"it is of namespace {record.name.namespace}, not of {namespace}: it has no effect"
            problems.append(Problem(record.id, "OtherNamespace", message))
            continue
        match _noun(manifest, problems):
            case TrafficSplit() as split:
                splits.append((manifest, split))
            case TrafficTarget() as target:
                targets.append((manifest, target))
            case RouteGroup() as group:
                groups[record.name.name] = (manifest, group)
    permissions = [_permission(manifest, target, groups, problems) for manifest, target in targets]
    return Rules(
        splits=_splits(splits, problems),
        permissions=tuple(p for p in permissions if p is not None),
        problems=tuple(sorted(problems)),
    )


_read: WeakKeyDictionary[Manifest, object] = WeakKeyDictionary()
"""What was read once: a change of one manifest costs nothing for the others of its namespace."""


def _noun(manifest: Manifest, problems: list[Problem]) -> object:
    """What the manifest says; None, with Problems, if this version of SMC does not take it."""
    try:
        if manifest not in _read:
            _read[manifest] = noun(manifest.record, KINDS)
        return _read[manifest]
    except InvalidManifest as e:
        for finding in e.findings[:10]:
            hint = f": {finding.hint}" if finding.hint else ""
            message = f"{finding.reason}{hint}; the manifest has no effect"
            problems.append(Problem(manifest.record.id, "InvalidManifest", message, finding.field))
        return None


def _splits(splits: Sequence[Read[TrafficSplit]], problems: list[Problem]) -> tuple[Split, ...]:
    """One for each root: the oldest, so that a new manifest cannot take the traffic of one that works."""
    chosen: dict[str, Manifest] = {}
    compiled = []
    for manifest, split in sorted(splits, key=lambda s: (s[0].record.created, s[0].record.id)):
        id_ = manifest.record.id
        if split.matches:
            message = (
                "requests are not told apart by spec.matches yet, so the split has no effect: "
                f"all requests go to {split.root}'s own endpoints; remove matches to split every request"
            )
            problems.append(Problem(id_, "MatchesNotSupported", message, "spec.matches"))
        elif first := chosen.get(split.root.name):
            message = (
                f"{split.root} is split by {first.record.name}, which is older, so this split has no effect: "
                "delete one of the two"
            )
            problems.append(Problem(id_, "Conflict", message, "spec.service"))
        else:
            chosen[split.root.name] = manifest
            compiled.append(Split(id_, manifest.mod_revision, split.root, split.backends))
    return tuple(sorted(compiled, key=lambda s: s.root))


def _permission(
    manifest: Manifest, target: TrafficTarget, groups: dict[str, Read[RouteGroup]], problems: list[Problem]
) -> Permission | None:
    """What the target grants; None if nothing."""
    id_ = manifest.record.id
    allowed: set[HttpMatch] = set()
    also: set[tuple[str, int]] = set()
    unknown = False
    for index, rule in enumerate(target.rules):
        field = f"spec.rules[{index}]"
        if rule.kind != "HTTPRouteGroup":
            # It would restrict the ports of every other rule, so none of them may be granted without it.
            message = f"{rule.kind} is not supported yet, so the whole target grants nothing: remove the rule"
            problems.append(Problem(id_, "RouteKindNotSupported", message, f"{field}.kind"))
            unknown = True
        elif rule.name not in groups:
            message = (
                f"there is no HTTPRouteGroup {manifest.record.name.namespace}/{rule.name} (or it is invalid), "
                "so the rule grants nothing: create it or correct the name"
            )
            problems.append(Problem(id_, "RouteGroupNotFound", message, f"{field}.name"))
        else:
            source, group = groups[rule.name]
            allowed |= _granted(id_, field, rule, group, problems)
            also.add((source.record.id, source.mod_revision))
    if unknown:
        return None
    if not allowed:
        message = "none of its rules grants anything, so the target has no effect"
        problems.append(Problem(id_, "GrantsNothing", message, "spec.rules"))
        return None
    http = (HttpMatch(),) if HttpMatch() in allowed else tuple(sorted(allowed, key=_order))
    return Permission(id_, manifest.mod_revision, target.destination, target.sources, http, tuple(sorted(also)))


def _order(match: HttpMatch) -> tuple[bool, str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    return (match.path is not None, match.path or "", match.methods, match.headers)


def _granted(id_: str, field: str, rule: RouteReference, group: RouteGroup, problems: list[Problem]) -> set[HttpMatch]:
    """The matches of the group that the rule names; a name that the group does not have grants nothing."""
    known = dict(group.matches)
    granted = set()
    for index, name in enumerate(rule.matches if rule.matches is not None else known):
        if name in known:
            granted.add(known[name])
        else:
            message = f"HTTPRouteGroup {rule.name} has no match {name}, so it grants nothing: it has {', '.join(known)}"
            problems.append(Problem(id_, "MatchNotFound", message[:500], f"{field}.matches[{index}]"))
    return granted
