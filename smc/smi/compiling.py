"""The policy manifests of one namespace, compiled to Rules.

Whatever a manifest refers to is in its own namespace. A manifest that cannot be understood, or refers to what is not
there, has less effect than it says or none, never more; a Problem says so, and the others are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TypeVar
from weakref import WeakKeyDictionary

from smc.manifests import InvalidManifest, Manifest, Rules, expressions, noun
from smc.model import (
    Binding,
    Grant,
    HttpMatch,
    Identity,
    PathAnchor,
    Permission,
    PolicyOptions,
    Problem,
    Severity,
    Split,
)
from smc.smi.access import IdentityBinding, RouteReference, TrafficTarget
from smc.smi.kinds import KINDS
from smc.smi.specs import HTTP_ROUTES, TCP_ROUTE, UDP_ROUTE, PortRoute, RouteGroup
from smc.smi.split import TrafficSplit

T = TypeVar("T")
_DEFAULTS = PolicyOptions()
Read = tuple[Manifest, T]
Routes = dict[tuple[str, str], Read[RouteGroup | PortRoute]]
"""By kind and name."""


def compile_namespace(namespace: str, manifests: Sequence[Manifest], options: PolicyOptions = _DEFAULTS) -> Rules:
    """Compile the SMI manifests of one namespace; those of others are left out, with a Problem.

    The result does not depend on the order of `manifests`: splits are sorted by root, permissions by manifest.
    """
    problems: list[Problem] = []
    splits: list[Read[TrafficSplit]] = []
    targets: list[Read[TrafficTarget]] = []
    routes: Routes = {}
    bindings: list[Binding] = []
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
                routes[record.kind, record.name.name] = (manifest, _anchored(group, options.path_anchor))
            case PortRoute() as route:
                routes[record.kind, record.name.name] = (manifest, route)
            case IdentityBinding() as b:
                whom = (b.service_account, b.labels, b.uris)
                bindings.append(Binding(record.name, record.id, manifest.mod_revision, *whom))
    if not options.cross_namespace:
        targets = [(manifest, target) for manifest, target in targets if _is_at_home(manifest, target, problems)]
    granted = [_granted_by(manifest, target, routes, problems) for manifest, target in targets]
    return Rules(
        splits=_splits(splits, routes, problems),
        permissions=tuple(g for g in granted if isinstance(g, Permission)),
        grants=tuple(g for g in granted if isinstance(g, Grant)),
        bindings=tuple(bindings),
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


def _splits(splits: Sequence[Read[TrafficSplit]], routes: Routes, problems: list[Problem]) -> tuple[Split, ...]:
    """Of each root those with matches, and then one for all other requests.

    Among equals the oldest is first, so that a new manifest cannot take the traffic from one that works.
    """
    chosen: dict[str, Manifest] = {}
    compiled = []
    for manifest, split in sorted(splits, key=lambda s: (not s[1].matches, s[0].record.created, s[0].record.id)):
        id_ = manifest.record.id
        if split.matches:
            matches, also = _condition(manifest, split, routes, problems)
            if matches:
                compiled.append(Split(id_, manifest.mod_revision, split.root, split.backends, matches, also))
            else:
                message = f"it matches no request, so {split.root}'s traffic goes where it goes without this split"
                problems.append(Problem(id_, "MatchesNothing", message, "spec.matches"))
        elif first := chosen.get(split.root.name):
            message = (
                f"{split.root} is split by {first.record.name}, which is older, so this split has no effect: "
                "delete one of the two, or give one of them matches"
            )
            problems.append(Problem(id_, "Conflict", message, "spec.service"))
        else:
            chosen[split.root.name] = manifest
            compiled.append(Split(id_, manifest.mod_revision, split.root, split.backends))
    return tuple(sorted(compiled, key=lambda s: s.root))


def _condition(
    manifest: Manifest, split: TrafficSplit, routes: Routes, problems: list[Problem]
) -> tuple[tuple[HttpMatch, ...], tuple[tuple[str, int], ...]]:
    """The matches of all groups that a split names, as one group, and the manifests of these groups."""
    found: set[HttpMatch] = set()
    also: set[tuple[str, int]] = set()
    for index, name in enumerate(split.matches):
        source, group = routes.get((HTTP_ROUTES, name), (None, None))
        if source is None or not isinstance(group, RouteGroup):
            message = (
                f"there is no HTTPRouteGroup {manifest.record.name.namespace}/{name} (or it is invalid), "
                "so it matches no request: create it or correct the name"
            )
            problems.append(Problem(manifest.record.id, "RouteGroupNotFound", message, f"spec.matches[{index}].name"))
        else:
            found.update(match for _, match in group.matches)
            also.add((source.record.id, source.mod_revision))
    return _alternatives(found), tuple(sorted(also))


def _is_at_home(manifest: Manifest, target: TrafficTarget, problems: list[Problem]) -> bool:
    """Whether the destination is of the target's own namespace: else a client's team could grant itself access."""
    own, where = manifest.record.name.namespace, target.destination.namespace
    if own != where:
        message = (
            f"the destination is of namespace {where}, the TrafficTarget of {own}, so it has no effect: "
            f"whoever owns the destination grants the access, write it in namespace {where}"
        )
        field = "destination.namespace" if target.rules_field == "specs" else "spec.destination.namespace"
        problems.append(Problem(manifest.record.id, "OtherNamespace", message, field))
    return own == where


def _anchored(group: RouteGroup, anchor: PathAnchor) -> RouteGroup:
    if anchor is PathAnchor.SPEC:
        return group
    return RouteGroup(
        tuple(
            (name, match if match.path is None else replace(match, path=expressions.unanchored(match.path)))
            for name, match in group.matches
        )
    )


def _granted_by(
    manifest: Manifest, target: TrafficTarget, routes: Routes, problems: list[Problem]
) -> Permission | Grant | None:
    """What the target grants; None if nothing.

    HTTP rules are alternatives, and so are ports; a request must be one of the first, on one of the second.
    """
    id_ = manifest.record.id
    kinds = {rule.kind for rule in target.rules}
    # Whole connections are granted by TCP rules alone, never by HTTP rules, however much these allow. On a port of
    # HTTP a connection is every request.
    tcp = TCP_ROUTE in kinds and HTTP_ROUTES not in kinds
    allowed: set[HttpMatch] = {HttpMatch()} if tcp else set()
    ports: set[int] | None = set() if TCP_ROUTE in kinds else None
    also: set[tuple[str, int]] = set()
    for index, rule in enumerate(target.rules):
        field = f"{target.rules_field}[{index}]"
        if rule.kind == UDP_ROUTE:
            message = "UDP does not go through the proxies, so this rule neither allows nor keeps out anything"
            problems.append(Problem(id_, "UDPNotEnforced", message, f"{field}.kind", Severity.WARNING.value))
        if (rule.kind, rule.name) not in routes:
            message = (
                f"there is no {rule.kind} {manifest.record.name.namespace}/{rule.name} (or it is invalid), "
                "so the rule grants nothing: create it or correct the name"
            )
            reason = "RouteGroupNotFound" if rule.kind == HTTP_ROUTES else "RouteNotFound"
            problems.append(Problem(id_, reason, message, f"{field}.name"))
            continue
        source, route = routes[rule.kind, rule.name]
        if isinstance(route, RouteGroup):
            allowed |= _granted(id_, field, rule, route, problems)
        elif rule.kind == TCP_ROUTE:
            ports = None if ports is None or route.ports is None else ports.union(route.ports)
        else:
            continue
        also.add((source.record.id, source.mod_revision))
    if target.port is not None:
        ports = {target.port} if ports is None else ports & {target.port}
    if kinds == {UDP_ROUTE}:
        return None
    if not allowed or ports == set():
        message = "none of its rules grants anything, so the target has no effect"
        problems.append(Problem(id_, "GrantsNothing", message, target.rules_field))
        return None
    revision, http = manifest.mod_revision, _alternatives(allowed)
    on = tuple(sorted(ports)) if ports is not None else None
    if isinstance(target.destination, Identity) and not target.bindings:
        return Permission(id_, revision, target.destination, target.sources, http, tuple(sorted(also)), on, tcp)
    whom = (target.destination, target.sources, target.bindings)
    return Grant(id_, revision, *whom, http, tuple(sorted(also)), on, tcp)


def _alternatives(matches: AbstractSet[HttpMatch]) -> tuple[HttpMatch, ...]:
    """In order; one that matches any request makes the others needless."""
    return (HttpMatch(),) if HttpMatch() in matches else tuple(sorted(matches, key=_order))


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
