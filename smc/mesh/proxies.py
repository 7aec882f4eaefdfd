"""The last stage: each proxy, with what it knows of its callees, its own ports, its policy and its certificate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from smc.mesh.addresses import Addresses
from smc.mesh.callers import Callers, Group
from smc.mesh.nouns import Proxy
from smc.mesh.permissions import NOBODY, Permissions
from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.revocations import Revocations
from smc.mesh.served import Served
from smc.mesh.sources import Sources
from smc.mesh.splits import Splits
from smc.mesh.tables import Index, Table, Tables, kept
from smc.mesh.traffic import Traffic
from smc.model import (
    Inbound,
    Mode,
    Name,
    Permission,
    Policy,
    Problem,
    Protocol,
    RateLimit,
    Severity,
    Sidecar,
    Workload,
)
from smc.records import QuarantineRecord

Version = tuple[str, int]
"""(manifest, mod_revision)"""


@dataclass(slots=True)
class Proxies(Tables):
    proxies: Table[Name, Proxy] = field(default_factory=Table)
    inbounds: Table[Name, tuple[Inbound, ...]] = field(default_factory=Table)
    """workload -> its ports"""
    quarantined: Table[Name, tuple[QuarantineRecord, ...]] = field(default_factory=Table)
    """proxy -> the quarantines that count: those of what its manifest is now"""

    quarantines: Index[Name, Version] = field(default_factory=Index)
    """proxy -> what is quarantined for it, whether it counts or not"""
    refusing: Index[str, Name] = field(default_factory=Index)
    """manifest -> the proxies that have a quarantine of it"""
    intercepted: Index[Sidecar, Name] = field(default_factory=Index)
    """INTERCEPTED -> the proxies that are"""

    def update(
        self,
        records: Records,
        sources: Sources,
        served: Served,
        traffic: Traffic,
        splits: Splits,
        permissions: Permissions,
        revocations: Revocations,
        callers: Callers,
        addresses: Addresses,
        problems: Problems,
    ) -> None:
        touched = dict.fromkeys(sources.workloads.changed)
        touched.update(self._quarantine(records, sources, traffic, splits, problems))
        for name in sources.workloads.changed:
            self.intercepted.move(
                name, _interception(sources.workloads.was(name)), _interception(sources.workloads.get(name))
            )
        for name in touched:
            left_out = _versions(self.quarantined.get(name) or ())
            callers.assign(name, _group(sources.workloads.get(name), records, traffic, splits, left_out))
        callers.update(served, splits, addresses)
        self._listen(sources, served, traffic, problems)
        self._report_unready(records, sources, served, permissions, problems)

        touched.update(self.inbounds.changed)
        if records.namespaces.changed or records.configs.changed:
            touched.update(self._of_another_mode(records, sources))
        if revocations.barred.changed or records.revoked_identities.changed:
            touched.update(dict.fromkeys(n for n in sources.workloads.rows if _is_open(records, n)))
        for identity in dict.fromkeys((*permissions.policies.changed, *records.certificates.changed)):
            touched.update(dict.fromkeys(permissions.identities.of(identity)))
        for name in touched:
            self.proxies.put(name, self._proxy(name, records, sources, permissions, revocations, callers))
            problems.report("ports", name, self._unused(name, sources, permissions))
        alone = set(touched)
        for group in callers.outbounds.changed:
            outbound = callers.outbounds.get(group)
            if outbound is not None:  # of the others only this differs
                rows = self.proxies.rows
                self.proxies.put_new(
                    {
                        name: Proxy(
                            was.workload,
                            outbound,
                            was.inbound,
                            was.policy,
                            was.certificate,
                            was.quarantined,
                            was.mode,
                        )
                        for name in callers.members.of(group) - alone
                        for was in (rows[name],)
                    }
                )

    # --------------------------------------------------------------------------------------------------- quarantines

    def _quarantine(
        self, records: Records, sources: Sources, traffic: Traffic, splits: Splits, problems: Problems
    ) -> dict[Name, None]:
        """Decide which quarantines count; returns the proxies for which that may make a difference."""
        proxies: dict[Name, None] = {}
        manifests: dict[str, None] = {}
        for proxy, manifest, revision in records.quarantines.changed:
            if (proxy, manifest, revision) in records.quarantines:
                self.quarantines.add(proxy, (manifest, revision))
            else:
                self.quarantines.discard(proxy, (manifest, revision))
            if any(known == manifest for known, _ in self.quarantines.of(proxy)):
                self.refusing.add(manifest, proxy)
            else:
                self.refusing.discard(manifest, proxy)
            proxies[proxy] = None
            manifests[manifest] = None
        for manifest in records.manifests.changed:
            proxies.update(dict.fromkeys(self.refusing.of(manifest)))
        for service in traffic.treatments.changed:
            for treatment in (traffic.treatments.was(service), traffic.treatments.get(service)):
                if treatment is not None:
                    proxies.update(dict.fromkeys(self.refusing.of(treatment.source[0])))
        for root in splits.splits.changed:  # another split may count now, which nobody wrote anew
            for split in (*(splits.splits.was(root) or ()), *(splits.splits.get(root) or ())):
                for manifest, _ in split.versions:
                    proxies.update(dict.fromkeys(self.refusing.of(manifest)))
        for proxy in dict.fromkeys((*proxies, *sources.workloads.changed)):
            counting = self._counting(proxy, records) if proxy in sources.workloads else ()
            self.quarantined.put(proxy, counting or None)
        for proxy in self.quarantined.changed:
            for record in (*(self.quarantined.was(proxy) or ()), *(self.quarantined.get(proxy) or ())):
                manifests[record.manifest] = None
        for manifest in manifests:
            problems.report("quarantine", manifest, self._refused(manifest))
        return {proxy: None for proxy in proxies if proxy in sources.workloads}

    def _counting(self, proxy: Name, records: Records) -> tuple[QuarantineRecord, ...]:
        return tuple(
            records.quarantines[proxy, manifest, revision]
            for manifest, revision in sorted(self.quarantines.of(proxy))
            if (found := records.manifests.get(manifest)) is not None and found.mod_revision == revision
        )

    def _refused(self, manifest: str) -> Iterable[Problem]:
        found = [
            record
            for proxy in sorted(self.refusing.of(manifest))
            for record in self.quarantined.get(proxy) or ()
            if record.manifest == manifest
        ]
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            message = f"it is left out for proxy {found[0].proxy}{others}, which refuses it: {found[0].reason}"
            yield Problem(manifest, "Quarantined", message)

    # ------------------------------------------------------------------------------------------------------- inbound

    def _listen(self, sources: Sources, served: Served, traffic: Traffic, problems: Problems) -> None:
        touched = dict.fromkeys((*served.backing.changed, *sources.workloads.changed, *sources.origins.changed))
        for service in dict.fromkeys((*sources.services.changed, *traffic.treatments.changed)):
            touched.update(dict.fromkeys(e.workload for e in sources.endpoints.get(service) or ()))
        for name in touched:
            found: list[Problem] = []
            inbounds = self._inbounds(name, sources, served, traffic, found) if name in sources.workloads else ()
            self.inbounds.put(name, inbounds or None)
            problems.report("inbound", name, found)

    def _inbounds(
        self, name: Name, sources: Sources, served: Served, traffic: Traffic, found: list[Problem]
    ) -> tuple[Inbound, ...]:
        leading: defaultdict[int, dict[tuple[Name, int], Protocol]] = defaultdict(dict)
        for service_name, ports in (served.backing.get(name) or {}).items():
            service = sources.services.get(service_name)
            targets = dict(reversed(ports))
            for port in service.ports if service is not None else ():
                if port.number in targets:
                    leading[targets[port.number]][service_name, port.number] = port.protocol
        before = {inbound.port: inbound for inbound in self.inbounds.get(name) or ()}
        numbers = {number for services in leading.values() for _, number in services}
        inbounds = []
        for app_port, services in sorted(leading.items()):
            first, *others = sorted(services)
            protocol = services[first]
            leads = [first]
            for service_name, number in others:
                other = services[service_name, number]
                # What callers speak to a TCP port is nothing that an HTTP port understands, nor the other way round.
                if alike := (other is Protocol.TCP) is (protocol is Protocol.TCP):
                    leads.append((service_name, number))
                if other is not protocol:
                    message = (
                        f"by service {first[0]} port {first[1]} port {app_port} of {name} speaks {protocol.value}, and "
                        f"by service {service_name} port {number} {other.value}: the first counts"
                        f"{'' if alike else ', and nothing gets there by the other'}; make them equal"
                    )
                    found.append(Problem(sources.origins[name], "ProtocolConflict", message))
            called = {number for _, number in leads} | ({app_port} - numbers)
            limit = _tightest({service for service, _ in leads}, traffic) if protocol is not Protocol.TCP else ()
            inbound = Inbound(app_port, protocol, tuple(leads), tuple(sorted(called)), *limit)
            inbounds.append(kept(before.get(app_port), inbound))
        return tuple(inbounds)

    def _unused(self, name: Name, sources: Sources, permissions: Permissions) -> Iterable[Problem]:
        """Permissions for ports that a workload with services does not have, likely a wrong number, and those of some
        requests for ports where there are none.

        Workloads of one identity say it in the same words, so that it is told once.
        """
        workload, inbounds = sources.workloads.get(name), self.inbounds.get(name)
        policy = permissions.policies.get(workload.identity) if workload is not None else None
        if policy is None or inbounds is None:
            return
        numbers = {number for inbound in inbounds for number in inbound.numbers}
        for permission in policy.permissions:
            if permission.ports is not None and numbers.isdisjoint(permission.ports):
                ports = ", ".join(map(str, permission.ports))
                message = f"a workload of {permission.destination} has no port {ports}, so nothing is allowed on it"
                yield Problem(permission.manifest, "PortNotFound", message, severity=Severity.WARNING.value)
            if not permission.tcp:
                yield from _without_requests(permission, inbounds)

    # ----------------------------------------------------------------------------------------------------- readiness

    def _report_unready(
        self, records: Records, sources: Sources, served: Served, permissions: Permissions, problems: Problems
    ) -> None:
        """A workload that backs a service gets no traffic before its proxy is there and can prove who it is."""
        touched = dict.fromkeys(
            (
                *served.backing.changed,
                *sources.workloads.changed,
                *sources.origins.changed,
                *records.ready.changed,
            )
        )
        for identity in records.certificates.appeared_or_went():
            touched.update(dict.fromkeys(permissions.identities.of(identity)))
        for name in touched:
            workload = sources.workloads.get(name)
            missing = ""
            if workload is not None and name in served.backing:
                if workload.identity not in records.certificates:
                    missing = f"its identity {workload.identity} has no certificate yet: the leader issues it"
                elif name not in records.ready:
                    missing = "its proxy has not taken its configuration yet: start it, or see what it says"
            message = f"workload {name} gets no traffic: {missing}"
            problems.report("ready", name, [Problem(sources.origins[name], "NotReady", message)] if missing else ())

    # ------------------------------------------------------------------------------------------------------- the proxy

    def _proxy(
        self,
        name: Name,
        records: Records,
        sources: Sources,
        permissions: Permissions,
        revocations: Revocations,
        callers: Callers,
    ) -> Proxy | None:
        workload = sources.workloads.get(name)
        if workload is None:
            return None
        before = self.proxies.get(name)
        quarantined = self.quarantined.get(name) or ()
        policy = shared = permissions.policies.get(workload.identity) or NOBODY
        left_out = _versions(quarantined)
        left = tuple(p for p in policy.permissions if not _is_of(p, left_out))
        if left != policy.permissions:
            policy = Policy(left, policy.barred)
        if _is_open(records, name) and (records.revoked_identities.rows or revocations.barred.rows):
            policy = Policy(policy.permissions, revocations.barring(), tuple(sorted(records.revoked_identities.rows)))
        if policy is not shared:
            policy = kept(before.policy if before is not None else None, policy)
        outbound = callers.outbounds[callers.groups[name]]
        now = Proxy(
            workload,
            kept(before.outbound, outbound) if before is not None else outbound,
            _unlimited(self.inbounds.get(name) or (), left_out, before.inbound if before is not None else ()),
            policy,
            records.certificates.get(workload.identity),
            quarantined,
            records.mode(name.namespace),
        )
        return kept(before, now)

    def _of_another_mode(self, records: Records, sources: Sources) -> dict[Name, None]:
        return {
            name: None
            for name in sources.workloads.rows
            if (was := self.proxies.get(name)) is not None and was.mode is not records.mode(name.namespace)
        }


def _without_requests(permission: Permission, inbounds: Iterable[Inbound]) -> Iterable[Problem]:
    """HTTP rules for a port by its number, or for a workload all of whose ports speak TCP."""
    named = set(permission.ports or ())
    tcp = {number for inbound in inbounds if inbound.protocol is Protocol.TCP for number in inbound.numbers}
    if permission.ports is None and all(inbound.protocol is Protocol.TCP for inbound in inbounds):
        named = tcp
    if meant := named & tcp:
        message = (
            f"port {', '.join(map(str, sorted(meant)))} of a workload of {permission.destination} speaks TCP, where "
            "there are no requests to match, so HTTP rules allow nothing on it: to allow connections, name a TCPRoute "
            "in a target without HTTP rules"
        )
        yield Problem(permission.manifest, "HTTPRulesOnTCP", message, severity=Severity.WARNING.value)


def _is_open(records: Records, name: Name) -> bool:
    """Whether calls pass that no policy allows."""
    return records.mode(name.namespace) is not Mode.ENFORCING


def _interception(workload: Workload | None) -> list[Sidecar]:
    return [Sidecar.INTERCEPTED] if workload is not None and workload.sidecar is Sidecar.INTERCEPTED else []


def _group(
    workload: Workload | None, records: Records, traffic: Traffic, splits: Splits, left_out: AbstractSet[Version]
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


def _tightest(services: Iterable[Name], traffic: Traffic) -> tuple[RateLimit, tuple[Version]] | tuple[()]:
    """The rate limit of whichever service lets the fewest requests through, and who says so."""
    found = [
        (limit, treatment.source)
        for service in sorted(services)
        if (treatment := traffic.treatments.get(service)) is not None
        if (limit := treatment.policy.rate_limit) is not None
    ]
    if not found:
        return ()
    limit, source = min(found, key=lambda one: (one[0].requests / one[0].per.total_seconds(), one[0].burst))
    return limit, (source,)


def _unlimited(
    inbounds: tuple[Inbound, ...], left_out: AbstractSet[Version], before: Iterable[Inbound]
) -> tuple[Inbound, ...]:
    """The same without what was compiled from these."""
    if all(left_out.isdisjoint(inbound.sources) for inbound in inbounds):
        return inbounds
    known = {inbound.port: inbound for inbound in before}
    return tuple(
        inbound
        if left_out.isdisjoint(inbound.sources)
        else kept(known.get(inbound.port), replace(inbound, rate_limit=None, sources=()))
        for inbound in inbounds
    )


def _versions(quarantined: Iterable[QuarantineRecord]) -> frozenset[Version]:
    return frozenset((record.manifest, record.mod_revision) for record in quarantined)


def _is_of(permission: Permission, versions: AbstractSet[Version]) -> bool:
    """Whether the permission was compiled from one of these."""
    return (permission.manifest, permission.mod_revision) in versions or not versions.isdisjoint(permission.also)
