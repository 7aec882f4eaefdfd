"""Each proxy, with what it knows of its callees, its own ports, its policy and its certificate."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from smc.mesh.callers import Callers
from smc.mesh.listening import Listening
from smc.mesh.nouns import Proxy
from smc.mesh.permissions import NOBODY, Permissions
from smc.mesh.problems import Problems
from smc.mesh.quarantines import Quarantines, Version
from smc.mesh.reading import Records
from smc.mesh.revocations import Revocations
from smc.mesh.sources import Sources
from smc.mesh.tables import Table, Tables, kept
from smc.model import Inbound, Mode, Name, Permission, Policy, Problem, Protocol, Severity


@dataclass(slots=True)
class Proxies(Tables):
    proxies: Table[Name, Proxy] = field(default_factory=Table)

    def update(
        self,
        records: Records,
        sources: Sources,
        permissions: Permissions,
        revocations: Revocations,
        quarantines: Quarantines,
        callers: Callers,
        listening: Listening,
        problems: Problems,
    ) -> None:
        touched = dict.fromkeys(
            (
                *sources.workloads.changed,
                *quarantines.quarantined.changed,
                *callers.groups.changed,
                *listening.inbounds.changed,
            )
        )
        if records.namespaces.changed or records.configs.changed:
            touched.update(self._of_another_mode(records, sources))
        if revocations.barred.changed or records.revoked_identities.changed:
            touched.update(dict.fromkeys(n for n in sources.workloads.rows if _is_open(records, n)))
        for identity in dict.fromkeys((*permissions.policies.changed, *records.certificates.changed)):
            touched.update(dict.fromkeys(sources.identities.of(identity)))
        for name in touched:
            self.proxies.put(
                name, self._proxy(name, records, sources, permissions, revocations, quarantines, callers, listening)
            )
            problems.report("ports", name, _unused(name, sources, permissions, listening))
        alone = set(touched)
        for group in callers.outbounds.changed:
            outbound = callers.outbounds.get(group)
            if outbound is not None:  # of the others only this differs
                members = callers.members.of(group)
                others = [name for name in members if name not in alone] if alone else members
                self.proxies.put_new(
                    {
                        name: Proxy(workload, outbound, inbound, policy, certificate, quarantined, mode)
                        for name, (workload, _, inbound, policy, certificate, quarantined, mode) in zip(
                            others, self.proxies.rows_of(others), strict=True
                        )
                    }
                )

    def _proxy(
        self,
        name: Name,
        records: Records,
        sources: Sources,
        permissions: Permissions,
        revocations: Revocations,
        quarantines: Quarantines,
        callers: Callers,
        listening: Listening,
    ) -> Proxy | None:
        workload = sources.workloads.get(name)
        if workload is None:
            return None
        before = self.proxies.get(name)
        policy = shared = permissions.policies.get(workload.identity) or NOBODY
        left_out = quarantines.left_out(name)
        if left_out and (left := tuple(p for p in policy.permissions if not _is_of(p, left_out))) != policy.permissions:
            policy = Policy(left, policy.barred)
        if _is_open(records, name) and (records.revoked_identities.rows or revocations.barred.rows):
            policy = Policy(policy.permissions, revocations.barring(), tuple(sorted(records.revoked_identities.rows)))
        if policy is not shared:
            policy = kept(before.policy if before is not None else None, policy)
        outbound = callers.outbounds[callers.groups[name]]
        return Proxy(
            workload,
            kept(before.outbound, outbound) if before is not None else outbound,
            _unlimited(listening.inbounds.get(name) or (), left_out, before.inbound if before is not None else ()),
            policy,
            records.certificates.get(workload.identity),
            quarantines.quarantined.get(name) or (),
            records.mode(name.namespace),
        )

    def _of_another_mode(self, records: Records, sources: Sources) -> dict[Name, None]:
        return {
            name: None
            for name in sources.workloads.rows
            if (was := self.proxies.get(name)) is not None and was.mode is not records.mode(name.namespace)
        }


def _unused(name: Name, sources: Sources, permissions: Permissions, listening: Listening) -> Iterable[Problem]:
    """Permissions for ports that a workload with services does not have, likely a wrong number, and those of some
    requests for ports where there are none.

    Workloads of one identity say it in the same words, so that it is told once.
    """
    workload, inbounds = sources.workloads.get(name), listening.inbounds.get(name)
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


def _unlimited(
    inbounds: tuple[Inbound, ...], left_out: AbstractSet[Version], before: Iterable[Inbound]
) -> tuple[Inbound, ...]:
    """The same without what was compiled from these."""
    if not left_out or all(left_out.isdisjoint(inbound.sources) for inbound in inbounds):
        return inbounds
    known = {inbound.port: inbound for inbound in before}
    return tuple(
        inbound
        if left_out.isdisjoint(inbound.sources)
        else kept(known.get(inbound.port), replace(inbound, rate_limit=None, sources=()))
        for inbound in inbounds
    )


def _is_of(permission: Permission, versions: AbstractSet[Version]) -> bool:
    """Whether the permission was compiled from one of these."""
    return (permission.manifest, permission.mod_revision) in versions or not versions.isdisjoint(permission.also)
