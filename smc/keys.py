"""Where in etcd the records of a mesh are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smc.model import Identity, Name


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one mesh. `feeds_mesh` lists the prefixes that the mesh is built from; the rest is coordination."""

    mesh_name: str

    @property
    def root(self) -> str:
        return f"/smc/{self.mesh_name}/"

    @property
    def mesh(self) -> str:
        return self.root + "mesh"

    @property
    def epoch(self) -> str:
        return self.root + "epoch"

    @property
    def leader(self) -> str:
        return self.root + "leader"

    @property
    def members(self) -> str:
        return self.root + "members/"

    @property
    def acks(self) -> str:
        return self.root + "acks/"

    @property
    def manifests(self) -> str:
        return self.root + "manifests/"

    def manifest(self, manifest: str) -> str:
        """The key of `<group>/<kind>/<namespace>/<name>`."""
        return self.manifests + manifest

    @property
    def registry(self) -> str:
        return self.root + "registry/"

    def source(self, source: str) -> str:
        return f"{self.registry}{source}/"

    def service(self, source: str, name: Name) -> str:
        return f"{self.source(source)}services/{name}"

    def endpoints(self, source: str, name: Name) -> str:
        return f"{self.source(source)}endpoints/{name}"

    def workloads(self, source: str) -> str:
        return f"{self.source(source)}workloads/"

    def workload(self, source: str, name: Name) -> str:
        return f"{self.workloads(source)}{name}"

    def synced(self, source: str) -> str:
        return f"{self.source(source)}synced"

    @property
    def leavings(self) -> str:
        return self.root + "leaving/"

    def leaving(self, workload: Name, revision: int) -> str:
        return f"{self.leavings}{workload}/{revision}"

    @property
    def readiness(self) -> str:
        return self.root + "ready/"

    def ready(self, workload: Name) -> str:
        return f"{self.readiness}{workload}"

    @property
    def certificates(self) -> str:
        return self.root + "certificates/"

    def certificate(self, identity: Identity) -> str:
        return f"{self.certificates}{identity}"

    def ca(self, what: Literal["roots", "intermediates", "dek"], number: int) -> str:
        return f"{self.root}ca/{what}/{number:08d}"

    def ca_prefix(self, what: Literal["roots", "intermediates", "dek"]) -> str:
        return f"{self.root}ca/{what}/"

    @property
    def authorities(self) -> str:
        """The prefix of all that the certificate authority keeps."""
        return self.root + "ca/"

    @property
    def bundle(self) -> str:
        return self.root + "ca/bundle"

    @property
    def crl(self) -> str:
        return self.root + "ca/crl"

    @property
    def revocations(self) -> str:
        return self.root + "revocations/"

    def revoked_proxy(self, proxy: Name) -> str:
        return f"{self.revocations}proxies/{proxy}"

    def revoked_identity(self, identity: Identity) -> str:
        return f"{self.revocations}identities/{identity}"

    def admission(self, proxy: Name) -> str:
        return f"{self.revocations}admitted/{proxy}"

    def revoked_credential(self, credential: str) -> str:
        """The key for the path of a proxy's credential, an operator's or a viewer's."""
        kind, _, name = credential.partition("/")
        return (
            self.revoked_proxy(Name.parse(name)) if kind == "proxy" else f"{self.revocations}credentials/{credential}"
        )

    def admitted_credential(self, credential: str) -> str:
        """As `revoked_credential`."""
        kind, _, name = credential.partition("/")
        if kind == "proxy":
            return self.admission(Name.parse(name))
        return f"{self.revocations}credentials-admitted/{credential}"

    @property
    def signing(self) -> str:
        return self.root + "ca/signing"

    @property
    def rotation(self) -> str:
        return self.root + "ca/rotation"

    @property
    def joins(self) -> str:
        return self.root + "joined/"

    def joined(self, proxy: Name) -> str:
        return f"{self.joins}{proxy}"

    @property
    def trusts(self) -> str:
        return self.root + "trust/"

    def trust(self, proxy: Name) -> str:
        return f"{self.trusts}{proxy}"

    @property
    def addresses(self) -> str:
        return self.root + "addresses/"

    def address(self, service: Name) -> str:
        return f"{self.addresses}{service}"

    @property
    def quarantines(self) -> str:
        return self.root + "quarantine/"

    def quarantine(self, proxy: Name, manifest: str, mod_revision: int) -> str:
        return f"{self.quarantines}{proxy}/{manifest}@{mod_revision}"

    @property
    def tokens(self) -> str:
        return self.root + "tokens/"

    def token(self, sha256_hex: str) -> str:
        return self.tokens + sha256_hex

    @property
    def requests(self) -> str:
        return self.root + "requests/"

    def request(self, request_id: str) -> str:
        return self.requests + request_id

    @property
    def answers(self) -> str:
        return self.root + "answers/"

    def answer(self, request_id: str) -> str:
        return self.answers + request_id

    @property
    def feeds_mesh(self) -> tuple[str, ...]:
        return (
            self.mesh,
            self.manifests,
            self.registry,
            self.leavings,
            self.readiness,
            self.certificates,
            self.bundle,
            self.crl,
            self.revocations,
            self.quarantines,
            self.addresses,
        )
