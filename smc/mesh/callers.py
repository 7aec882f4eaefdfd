"""What the proxies know of the services they call.

Proxies that know the same share one Outbound, so a changed endpoint costs one object for each group of proxies that may
reach its service, however many they are. What they know is found out once for all namespaces, and not at all where an
endpoint has changed, or how a service is shared out: the new assignment or Destination takes the place of the old one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
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
from smc.model import Assignment, Destination, Frontend, Name, Outbound, Sidecar, Upstream, Workload


@dataclass(frozen=True, slots=True)
class Reach:
    """What decides which services a proxy knows, and how."""

    intercepted: bool
    reachable: tuple[Name, ...] | None
    """Sorted; None: every service."""
    whole: tuple[Name, ...]
    """The services whose splits are left out for these proxies, sorted.

    All of a service's, since what is for one split would otherwise be taken by the next, and not by the root.
    """
    untreated: tuple[Name, ...]
    """The services whose TrafficPolicy is left out for these proxies, sorted."""
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.intercepted, self.reachable, self.whole, self.untreated)))

    def __hash__(self) -> int:
        """Computed once: of thousands of names it takes a while."""
        return self._hash


class Group(NamedTuple):
    """What decides which Outbound a proxy has."""

    namespace: str
    reach: Reach


class Known(NamedTuple):
    """All of an Outbound but the namespace."""

    reach: Reach
    upstreams: tuple[Upstream, ...]
    assignments: tuple[Assignment, ...]
    destinations: Destinations
    frontends: tuple[Frontend, ...] | None


@dataclass(slots=True)
class Callers(Tables):
    outbounds: Table[Group, Outbound] = field(default_factory=Table)
    groups: Table[Name, Group] = field(default_factory=Table)
    """proxy -> its group"""
    members: Index[Group, Name] = field(default_factory=Index)

    sharing: Index[Reach, Group] = field(default_factory=Index)
    """reach -> its groups"""
    known: Table[Reach, Known] = field(default_factory=Table)
    watching: Index[Name | None, Reach] = field(default_factory=Index)
    """service -> the reaches that it concerns; None -> those of every service"""
    watched: Table[Reach, tuple[Name | None, ...]] = field(default_factory=Table)

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
        groups = self._regroup(records, sources, traffic, splits, quarantines)
        anew = {group.reach: None for group in groups if (group.reach in self.sharing) != (group.reach in self.known)}
        redirected = _redirected(splits)
        elsewhere = (service for service in splits.destinations.changed if service not in redirected)
        others = (*served.upstreams.changed, *elsewhere, *addresses.frontends.changed)
        for service in (None, *others) if others else ():
            anew.update(dict.fromkeys(self.watching.of(service)))
        for reach in (reach for service in redirected for of in (service, None) for reach in self.watching.of(of)):
            if reach.whole or reach.untreated:  # to which they are other ones
                anew[reach] = None
        for reach in anew:
            there = reach in self.sharing
            known, watched = self._know(reach, served, splits, addresses) if there else (None, ())
            before = self.watched.get(reach) or ()
            if watched != before:
                self.watching.move(reach, before, watched)
                self.watched.put(reach, watched or None)
            self.known.put(reach, known)
        self._put_in_place("assignments", served.assignments, served.assignments.changed, anew)
        self._put_in_place("destinations", splits.destinations, redirected, anew)
        groups.update(dict.fromkeys(group for reach in self.known.changed for group in self.sharing.of(reach)))
        for group in groups:
            now = self.known.get(group.reach) if group in self.members else None
            outbound = Outbound(group.namespace, *now[1:]) if now is not None else None
            self.outbounds.put(group, kept(self.outbounds.get(group), outbound))

    def _regroup(
        self, records: Records, sources: Sources, traffic: Traffic, splits: Splits, quarantines: Quarantines
    ) -> dict[Group, None]:
        """Put each proxy into its group; returns the groups that are new or have no proxy any more."""
        fresh: dict[Reach, Reach] = {}
        for proxy in _regrouped(sources, traffic, splits, quarantines):
            before, group = self.groups.get(proxy), None
            if (workload := sources.workloads.get(proxy)) is not None:
                reach = _reach(workload, records, traffic, splits, quarantines.left_out(proxy))
                there = self.known.get(reach)
                group = Group(proxy.namespace, there.reach if there is not None else fresh.setdefault(reach, reach))
            if group != before:
                self.groups.put(proxy, group)
                self.members.move(proxy, [before] if before else (), [group] if group else ())
        found: dict[Group, None] = {}
        for proxy in self.groups.changed:
            for group in (self.groups.was(proxy), self.groups.get(proxy)):
                if group is not None and (group in self.members) != (group in self.outbounds):
                    found[group] = None
        for group in found:
            if group in self.members:
                self.sharing.add(group.reach, group)
            else:
                self.sharing.discard(group.reach, group)
        return found

    def _know(
        self, reach: Reach, served: Served, splits: Splits, addresses: Addresses
    ) -> tuple[Known, tuple[Name | None, ...]]:
        """What a reach comes to, and what it has to be told of when it changes."""
        if reach.reachable is None:
            rows = splits.destinations.rows
            if reach.whole:
                rows = rows | {name: splits.unsplit[name] for name in reach.whole if name in rows}
            known = Known(
                reach,
                _joined(served.upstreams.rows.values()),
                _joined(served.assignments.rows.values()),
                _joined(rows.values()),
                tuple(addresses.frontends.rows.values()) if reach.intercepted else None,
            )
            return _untreated(known), (None,)
        found: list[Destinations] = []
        for name in reach.reachable:
            table = splits.unsplit if name in reach.whole else splits.destinations
            found.append(table.get(name) or ())
        destinations = _joined(found)
        used = {(target.service, target.port) for d in destinations for target in d.all_targets}
        targets = sorted({service for service, _ in used})
        watched = tuple(sorted({*reach.reachable, *targets}))
        dialled = (addresses.frontends.get(name) for name in reach.reachable) if reach.intercepted else None
        known = Known(
            reach,
            tuple(u for name in targets for u in served.upstreams[name] if (name, u.port) in used),
            tuple(a for name in targets for a in served.assignments[name] if (name, a.port) in used),
            destinations,
            None if dialled is None else tuple(frontend for frontend in dialled if frontend is not None),
        )
        return _untreated(known), watched

    def _put_in_place(
        self, what: str, table: Table[Name, tuple[Any, ...]], changed: Iterable[Name], done: Container[Reach]
    ) -> None:
        """Where of what is known only such rows have changed, put the new ones where the old ones were."""
        touched: defaultdict[Reach, dict[int, Any]] = defaultdict(dict)
        for service in changed:
            reaches = [r for of in (service, None) for r in self.watching.of(of) if r not in done]
            if reaches:  # then the service has the ports that it had
                was, now = table.was(service) or (), table[service]
                instead = {id(before): after for before, after in zip(was, now, strict=True)}
                for reach in reaches:
                    touched[reach].update(instead)
        for reach, instead in touched.items():
            known = self.known[reach]
            rows: dict[str, Any] = {what: tuple([instead.get(id(one), one) for one in getattr(known, what)])}
            self.known.put(reach, known._replace(**rows))


def _redirected(splits: Splits) -> dict[Name, None]:
    """The services of which the Destinations have changed, and lead to the same as before: in other shares, say."""
    found: dict[Name, None] = {}
    for service in splits.destinations.changed:
        was, now = splits.destinations.was(service), splits.destinations.get(service)
        if was is not None and now is not None and list(map(_leads_to, was)) == list(map(_leads_to, now)):
            found[service] = None
    return found


def _leads_to(destination: Destination) -> tuple[int, frozenset[tuple[Name, int]]]:
    return destination.port, frozenset((target.service, target.port) for target in destination.all_targets)


def _untreated(known: Known) -> Known:
    """The same without the TrafficPolicies that are left out."""
    services = known.reach.untreated
    if not services:
        return known
    return known._replace(
        upstreams=tuple(replace(u, treatment=None) if u.service in services else u for u in known.upstreams),
        destinations=tuple(replace(d, treatment=None) if d.service in services else d for d in known.destinations),
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


def _reach(
    workload: Workload,
    records: Records,
    traffic: Traffic,
    splits: Splits,
    left_out: AbstractSet[Version],
) -> Reach:
    reachable = workload.reachable
    if reachable:  # most often in order already
        reachable = tuple(sorted(dict.fromkeys(reachable)))
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
    return Reach(intercepted, reachable, tuple(sorted(whole)), tuple(sorted(untreated)))
