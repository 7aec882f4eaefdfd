"""What a build makes: the Mesh, and in it each proxy with exactly what it is configured from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from smc.manifests import Manifest
from smc.mesh.reading import Revoked
from smc.model import Identity, Inbound, MeshConfig, Mode, Name, Outbound, Policy, Problem, Workload
from smc.records import BundleRecord, CertificateRecord, CrlRecord, QuarantineRecord


class Proxy(NamedTuple):
    """One proxy, and exactly what its configuration is made from.

    A tuple, for a changed endpoint makes another one for each proxy that is told of it, and a frozen dataclass is made
    in more than twice the time. So two are equal if what they are made of is, and no weak reference can be had.
    """

    workload: Workload
    outbound: Outbound
    inbound: tuple[Inbound, ...]
    """Sorted by port."""
    policy: Policy
    certificate: CertificateRecord | None
    """None: the leader has not issued it yet."""
    quarantined: tuple[QuarantineRecord, ...] = ()
    """What is left out for it now: a quarantine ends with that version of the manifest. Sorted by manifest."""
    mode: Mode = Mode.ENFORCING
    """Of its workload's namespace: what becomes of calls to it that `policy` does not allow."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Mesh:
    """Everything, at one revision. Indexes are never changed: where nothing differs they are those of the Mesh before,
    and otherwise new ones that share their values.
    """

    revision: int
    mesh_id: str
    trust_domain: str
    config: MeshConfig
    bundle: BundleRecord | None
    proxies: Mapping[Name, Proxy]
    """By workload."""
    manifests: Mapping[str, Manifest]
    """By id, `<group>/<kind>/<namespace>/<name>`."""
    problems: Mapping[str, tuple[Problem, ...]]
    """By manifest. What is wrong with a record that is no manifest is under `<source>:<table>/<namespace>/<name>` for
    an informer's, and under the key below the mesh's root for any other.
    """
    identities: frozenset[Identity]
    """Every identity that a workload has: what the leader issues certificates for. Its order reaches no wire."""
    own_addresses: Mapping[Name, str]
    """By service: the IPv4 address that it has of its own, "" if none."""
    intercepts: bool
    """Whether a workload is intercepted, so that every service needs an address."""
    synced: frozenset[str]
    """The sources that were observed whole."""
    affected: frozenset[Name]
    """The proxies that are new, gone, or whose Proxy, config, bundle or CRL is another object than in the Mesh before.
    """
    departed: Mapping[Name, bool] = field(default_factory=dict)
    """As keys: the workloads that were ready once and are gone."""
    crl: CrlRecord | None = None
    revoked_proxies: Mapping[Name, Revoked] = field(default_factory=dict)
    revoked_identities: Mapping[Identity, bool] = field(default_factory=dict)
    """As keys."""
    admitted: Mapping[Name, tuple[str, ...]] = field(default_factory=dict)
    """By revoked proxy: the serials of the credentials that were signed for it since, in hexadecimal."""
    revoked_credentials: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By path, of operators and viewers that are revoked: as `admitted`."""
    stages: object = field(default=None, repr=False)
    """What the next build goes on from; nothing to anybody else."""

    def is_out(self, proxy: Name) -> bool:
        """Whether a proxy takes no part: it is revoked and was not let in again, or its identity is revoked."""
        found = self.proxies.get(proxy)
        return self.admitted.get(proxy) == () or (
            found is not None and found.workload.identity in self.revoked_identities
        )

    def refuses(self, proxy: Name, serial: str) -> str:
        """Why nothing is for the holder of a proxy's credential; "" if it is not revoked."""
        if not (self.admitted or self.revoked_identities):
            return ""  # as nearly always
        if proxy in self.admitted and serial not in self.admitted[proxy]:
            return f"the credential of {proxy} is revoked: ask for a new token"
        found = self.proxies.get(proxy)
        if self.revoked_identities and found is not None and found.workload.identity in self.revoked_identities:
            return f"the identity {found.workload.identity} of {proxy} is revoked"
        return ""

    def refuses_credential(self, path: str, serial: str) -> str:
        """As `refuses`, of the credential with this path, whoever's it is."""
        kind, _, name = path.partition("/")
        if kind == "proxy":
            return self.refuses(Name.parse(name), serial)
        if serial in self.revoked_credentials.get(path, (serial,)):
            return ""
        return f"the credential of {path} is revoked: log in with a new token"
