"""What the proxies know of the services they call.

Proxies that know the same share one Outbound, so a changed endpoint costs one object for each group of proxies that may
reach its service, however many they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from smc.mesh.addresses import Addresses
from smc.mesh.quarantines import Quarantines, Version
from smc.mesh.reading import Records
from smc.mesh.served import Served
from smc.mesh.sources import Sources
from smc.mesh.splits import Destinations, Splits
from smc.mesh.tables import Index, Table, Tables, kept
from smc.mesh.traffic import Traffic
from smc.model import Name, Outbound, Sidecar, Workload


class Group(NamedTuple):
    """What decides which Outbound a proxy has."""

    namespace: str
    intercepted: bool
    reachable: tuple[Name, ...] | None
    """Sorted; None: every service."""
    whole: tuple[Name, ...]
    """The services whose splits are left out for these proxies, sorted.

    All of a service's, since what is for one split would otherwise be taken by the next, and not by the root.
    """
    untreated: tuple[Name, ...]
    """The services whose TrafficPolicy is left out for these proxies, sorted."""


@dataclass(slots=True)
class Callers(Tables):
    outbounds: Table[Group, Outbound] = field(default_factory=Table)
    groups: Table[Name, Group] = field(default_factory=Table)
    """proxy -> its group"""
    members: Index[Group, Name] = field(default_factory=Index)

    watching: Index[Name | None, Group] = field(default_factory=Index)
    """service -> the groups that it concerns; None -> those that reach every service"""
    watched: Table[Group, tuple[Name | None, ...]] = field(default_factory=Table)
    everything: Table[str, tuple[Any, ...]] = field(default_factory=Table)
    """The parts of the Outbound of whoever reaches every service and has no split left out."""

    def update(
        self,
        records: Records,
        sources: Sources,
        served: Served,
        traffic: Traffic,
        splits: Splits,
        addresses: Addresses,
        quarantines: Quarantines,
    ) -> None:
        for proxy in _regrouped(sources, traffic, splits, quarantines):
            before = self.groups.get(proxy)
            group = _group(sources.workloads.get(proxy), records, traffic, splits, quarantines.left_out(proxy))
            self.groups.put(proxy, group)
            self.members.move(proxy, [before] if before else (), [group] if group else ())
        for part, table in (
            ("upstreams", served.upstreams),
            ("assignments", served.assignments),
            ("destinations", splits.destinations),
        ):
            if table.changed:
                self.everything.put(part, _joined(table.rows.values()))
        if addresses.frontends.changed:
            self.everything.put("frontends", tuple(addresses.frontends.rows.values()))
        touched: dict[Group, None] = {}
        for proxy in self.groups.changed:
            for group in (self.groups.was(proxy), self.groups.get(proxy)):
                if group is not None and (group in self.members) != (group in self.outbounds):
                    touched[group] = None
        services = (
            *served.upstreams.changed,
            *served.assignments.changed,
            *splits.destinations.changed,
            *addresses.frontends.changed,
        )
        for service in (None, *dict.fromkeys(services)) if services else ():
            touched.update(dict.fromkeys(self.watching.of(service)))
        for group in touched:
            there = group in self.members
            outbound, watched = self._outbound(group, served, splits, addresses) if there else (None, ())
            self.watching.move(group, self.watched.get(group) or (), watched)
            self.watched.put(group, watched or None)
            self.outbounds.put(group, kept(self.outbounds.get(group), outbound))

    def _outbound(
        self, group: Group, served: Served, splits: Splits, addresses: Addresses
    ) -> tuple[Outbound, tuple[Name | None, ...]]:
        """What the group knows, and what it has to be told of when it changes."""
        if group.reachable is None:
            upstreams, assignments, destinations = (
                self.everything.get(part) or () for part in ("upstreams", "assignments", "destinations")
            )
            if group.whole:
                rows = dict(splits.destinations.rows)
                rows.update((name, splits.unsplit[name]) for name in group.whole if name in rows)
                destinations = _joined(rows.values())
            frontends = (self.everything.get("frontends") or ()) if group.intercepted else None
            known = Outbound(group.namespace, upstreams, assignments, destinations, frontends)
            return _untreated(known, group.untreated), (None,)
        found: list[Destinations] = []
        for name in group.reachable:
            table = splits.unsplit if name in group.whole else splits.destinations
            found.append(table.get(name) or ())
        destinations = _joined(found)
        targets = sorted({target.service for d in destinations for target in d.all_targets})
        watched = tuple(sorted({*group.reachable, *targets}))
        used = {(target.service, target.port) for d in destinations for target in d.all_targets}
        dialled = (addresses.frontends.get(name) for name in group.reachable) if group.intercepted else None
        known = Outbound(
            group.namespace,
            tuple(u for name in targets for u in served.upstreams[name] if (name, u.port) in used),
            tuple(a for name in targets for a in served.assignments[name] if (name, a.port) in used),
            destinations,
            None if dialled is None else tuple(frontend for frontend in dialled if frontend is not None),
        )
        return _untreated(known, group.untreated), watched


def _untreated(outbound: Outbound, services: tuple[Name, ...]) -> Outbound:
    """The same without the TrafficPolicies of some services."""
    if not services:
        return outbound
    return replace(
        outbound,
        upstreams=tuple(replace(u, treatment=None) if u.service in services else u for u in outbound.upstreams),
        destinations=tuple(replace(d, treatment=None) if d.service in services else d for d in outbound.destinations),
    )


def _joined(rows: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(rows))


def _regrouped(sources: Sources, traffic: Traffic, splits: Splits, quarantines: Quarantines) -> Iterable[Name]:
    """The proxies that may belong to another group than before."""
    manifests: dict[str, None] = {}
    for service in traffic.treatments.changed:
        for treatment in (traffic.treatments.was(service), traffic.treatments.get(service)):
            if treatment is not None:
                manifests[treatment.source[0]] = None
    for root in splits.splits.changed:  # another split may count now, which nobody wrote anew
        for split in (*(splits.splits.was(root) or ()), *(splits.splits.get(root) or ())):
            manifests.update(dict.fromkeys(manifest for manifest, _ in split.versions))
    refusing = (proxy for manifest in manifests for proxy in quarantines.refusing.of(manifest))
    return dict.fromkeys((*sources.workloads.changed, *quarantines.quarantined.changed, *refusing))


def _group(
    workload: Workload | None,
    records: Records,
    traffic: Traffic,
    splits: Splits,
    left_out: AbstractSet[Version],
) -> Group | None:
    if workload is None:
        return None
    reachable = tuple(sorted(set(workload.reachable))) if workload.reachable is not None else None
    whole = {
        root
        for manifest, _ in left_out
        for root in splits.by_manifest.of(manifest)
        if any(not left_out.isdisjoint(split.versions) for split in splits.splits[root])
    }
    untreated = {
        policy.service
        for manifest, _ in left_out
        if (policy := records.traffic.get(manifest)) is not None
        if (counts := traffic.treatments.get(policy.service)) is not None and counts.source in left_out
    }
    intercepted = workload.sidecar is Sidecar.INTERCEPTED
    return Group(workload.name.namespace, intercepted, reachable, tuple(sorted(whole)), tuple(sorted(untreated)))
