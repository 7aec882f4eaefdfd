"""Where intercepted applications dial each service.

That is its own address, or the virtual one that the leader gave it. No two services have one address: where two claim
it, the one whose own it is keeps it, then the first by name. The other is reached through explicit proxies only, until
that is mended; one that had it as a virtual address soon gets another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from smc.mesh.problems import Problems
from smc.mesh.reading import Records, manifest_of
from smc.mesh.served import by_name
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Table, Tables, kept
from smc.model import Frontend, Name, Problem, Sidecar, Workload


@dataclass(slots=True)
class Addresses(Tables):
    frontends: Table[Name, Frontend] = field(default_factory=Table)
    """Of every service that has an address, in the order of the services."""

    own: Table[Name, str] = field(default_factory=Table)
    """service -> the IPv4 address that it has of its own; "": none"""
    claims: Table[Name, str] = field(default_factory=Table)
    """service -> the address that it would have if it were alone"""
    claimants: Index[str, Name] = field(default_factory=Index)
    """address -> the services that claim it"""
    dialling: Index[Sidecar, Name] = field(default_factory=Index)
    """INTERCEPTED -> the workloads that are: who dials any of them"""

    @property
    def are_dialled(self) -> bool:
        """Whether a workload is intercepted, so that every service needs one."""
        return Sidecar.INTERCEPTED in self.dialling

    def update(self, records: Records, sources: Sources, problems: Problems) -> None:
        for name in sources.workloads.changed:
            self.dialling.move(
                name, _interception(sources.workloads.was(name)), _interception(sources.workloads.get(name))
            )
        touched = dict.fromkeys((*(name for _, name in records.services.changed), *records.addresses.changed))
        addresses: dict[str, None] = {}
        for name in touched:
            service = sources.services.get(name)
            self.own.put(name, _ipv4(service.address) if service is not None else None)
            before = self.claims.get(name)
            virtual = _ipv4(records.addresses.get(name) or "")
            now = (self.own[name] or virtual or None) if service is not None else None
            self.claims.put(name, now)
            self.claimants.move(name, [before] if before else (), [now] if now else ())
            addresses.update(dict.fromkeys(address for address in (before, now) if address))
        # Whose claim is as it was may have won or lost by another's.
        for address in addresses:
            touched.update(dict.fromkeys(self.claimants.of(address)))
        for name in touched:
            claim = self.claims.get(name)
            first = min(self.claimants.of(claim), key=self._rank) if claim else None
            frontend = Frontend(name, claim) if claim and first == name else None
            self.frontends.put(name, kept(self.frontends.get(name), frontend))
            problems.report("address", name, self._lost(name, first, sources))
        self.frontends.sort(by_name)

    def _rank(self, name: Name) -> tuple[bool, Name]:
        return (not self.own[name], name)

    def _lost(self, name: Name, first: Name | None, sources: Sources) -> Iterable[Problem]:
        if first is None or first == name or not self.own[name]:
            return  # a virtual one is replaced by the leader, and nobody has to see to it
        manifest = manifest_of(min(sources.service_offers.of(name)), "services", name)
        message = (
            f"{self.own[name]} is the address of {first} too, and that one counts: give each an address of its own"
        )
        yield Problem(manifest, "AddressConflict", message, "spec.address")


def _interception(workload: Workload | None) -> list[Sidecar]:
    return [Sidecar.INTERCEPTED] if workload is not None and workload.sidecar is Sidecar.INTERCEPTED else []


def _ipv4(text: str) -> str:
    """The address; "" if it is none: a listener that is told so would be refused as a whole."""
    try:
        return str(IPv4Address(text))
    except ValueError:
        return ""
