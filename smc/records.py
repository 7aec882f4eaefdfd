"""What is stored in etcd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from smc.model import Endpoints, Identity, Name, Problem, Service, Workload


@dataclass(frozen=True, slots=True)
class MeshRecord:
    """`mesh`, written once by `smc init`."""

    mesh_id: str
    """Random; part of what seals a value to its place."""
    trust_domain: str
    cluster_id: str
    """The etcd cluster's id in hexadecimal: another one means that the store was replaced."""


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """`epoch`, raised by a restore. Certificate serials begin with it."""

    number: int


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """`members/<replica>`."""

    name: str
    xds_address: str
    api_address: str
    join_address: str
    formats: tuple[int, ...]
    ready: bool
    streams: int
    version: str
    roots: tuple[str, ...] = ()
    """The pins of the roots that it trusts."""
    issuer: str = ""
    """The key id of the intermediate that signed its credential."""


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """`manifests/<group>/<kind>/<namespace>/<name>`: a manifest as written. Every replica compiles it."""

    group: str
    version: str
    kind: str
    name: Name
    """A mesh-wide kind has the namespace `-`."""
    object: Mapping[str, Any]
    """The parsed document, whole."""
    text: str
    file: str
    line: int
    """The first line of the document in `file`, from 1."""
    created: float
    """Seconds since 1970, by the clock of the replica that accepted it."""
    author: str
    """The operator's credential, a SPIFFE ID."""

    @property
    def id(self) -> str:
        return f"{self.group}/{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class SyncedRecord:
    """`registry/<source>/synced`: the source was observed whole at least once."""

    source: str
    problems: tuple[Problem, ...] = ()
    """What the source's own objects lack; at most 100."""


@dataclass(frozen=True, slots=True)
class ReadyRecord:
    """`ready/<namespace>/<workload>`: its proxy has ACKed its listeners once. A lost stream does not take it back."""

    workload: Name


@dataclass(frozen=True, slots=True, order=True)
class IssuedCertificate:
    """A workload certificate, as far as one has to know it to revoke it."""

    serial: str
    """Hexadecimal."""
    issuer: int
    """The number of the intermediate that signed it."""
    fingerprint: str
    """SHA-256 of its DER in hexadecimal: what Envoy calls it."""
    not_after: float
    revision: int
    """At which its record was written: whoever was revoked before has never been sent its key."""


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """`certificates/<namespace>/<service account>`: what SDS serves as `identity`."""

    identity: Identity
    chain: str
    """PEM: the leaf, then the intermediate."""
    sealed_key: bytes
    """PKCS#8 PEM, sealed to this key's path."""
    serial: str
    """Hexadecimal."""
    not_before: float
    not_after: float
    issuer: int
    """The number of the intermediate that signed it."""
    replaced: tuple[IssuedCertificate, ...] = ()
    """Those of the identity before this one that may still be in use when it is written, the oldest first: a connection
    outlives the certificate that it was made with.
    """
    reconnect: str = ""
    """The serial of the one, of them or this, with which its proxies were told to make all their connections anew; "":
    never.
    """
    written: int = 0
    """The revision at which its key was first written; 0: at that of this record."""


@dataclass(frozen=True, slots=True)
class RevocationRecord:
    """`revocations/proxies/<namespace>/<workload>`, `revocations/identities/<namespace>/<service account>` or
    `revocations/credentials/{operator,viewer}/<name>`.

    That the key is there revokes; what it says is for people. Its mod_revision is when: credentials, and of a proxy the
    certificates of its identity, that were signed before are refused.
    """

    proxy: Name | None
    """None: the whole identity is revoked, or `credential` is."""
    identity: Identity | None
    """Of a proxy: the one whose key it had; None if the mesh did not have the workload."""
    reason: str
    author: str
    """The operator's credential, a SPIFFE ID."""
    time: float
    """Seconds since 1970, by the clock of the replica that was asked."""
    credential: str = ""
    """`operator/<name>` or `viewer/<name>`."""


@dataclass(frozen=True, slots=True)
class AdmissionRecord:
    """`revocations/admitted/<namespace>/<workload>`, or `revocations/credentials-admitted/{operator,viewer}/<name>`.

    What was signed for it since it was revoked.
    """

    proxy: Name | None
    """None: it is about `credential`."""
    revocation: int
    """The mod_revision of the revocation since which; with another one it says nothing."""
    credentials: tuple[tuple[str, float], ...]
    """(serial in hexadecimal, not_after) of those that have not expired; at least one."""
    credential: str = ""
    """`operator/<name>` or `viewer/<name>`."""


@dataclass(frozen=True, slots=True, order=True)
class RevokedCertificate:
    identity: Identity
    certificate: IssuedCertificate
    time: float
    """When it was revoked, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class CrlRecord:
    """`ca/crl`: the certificates that nobody takes, with a list of them signed by each intermediate.

    A TLS library that has a list of one intermediate refuses the certificates of every other, so there is one of each,
    an empty one too.
    """

    number: int
    """Raised with each change."""
    issuers: tuple[int, ...]
    """The numbers of the intermediates, sorted."""
    lists: tuple[str, ...]
    """PEM, one of each of `issuers`."""
    revoked: tuple[RevokedCertificate, ...] = ()
    """Sorted."""


@dataclass(frozen=True, slots=True)
class RootRecord:
    """`ca/roots/<n>`."""

    number: int
    certificate: str
    sealed_key: bytes | None
    """None: the operator keeps the key."""


@dataclass(frozen=True, slots=True)
class IntermediateRecord:
    """`ca/intermediates/<n>`."""

    number: int
    root: int
    certificate: str
    sealed_key: bytes


@dataclass(frozen=True, slots=True)
class DekRecord:
    """`ca/dek/<n>`: a data-encryption key, wrapped by the signer."""

    number: int
    signer: str
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """`ca/bundle`: the roots that everybody trusts now."""

    roots: tuple[str, ...]
    """PEM, sorted by number."""


@dataclass(frozen=True, slots=True)
class AddressRecord:
    """`addresses/<namespace>/<service>`: the virtual IP address of a service that has none of its own."""

    service: Name
    address: str
    """IPv4, of no other record."""


@dataclass(frozen=True, slots=True)
class SigningRecord:
    """`ca/signing`: who signs now."""

    intermediate: int


class Rotates(Enum):
    """What a rotation replaces. With a root its intermediate goes as well."""

    INTERMEDIATE = "intermediate"
    ROOT = "root"


class Phase(Enum):
    """How far a rotation is. Each ends when nobody who lives is missing; see `certificates.rotation`."""

    REQUESTED = "requested"
    PUBLISHING = "publishing"
    """What is new is made, and trusted beside what is old."""
    SIGNING = "signing"
    """What is new signs."""
    RETIRING = "retiring"
    """What is old is trusted no longer, and its keys are gone."""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class RotationRecord:
    """`ca/rotation`: the rotation that is under way, or the last one."""

    id: str
    of: Rotates
    requester: str
    """A SPIFFE ID; empty: it was due."""
    phase: Phase = Phase.REQUESTED
    since: float = 0.0
    """When the phase began, in seconds since 1970."""
    forced: float = 0.0
    """When it was asked to leave behind whom it misses; 0: it was not."""
    intermediate: int = 0
    """The new one's number; 0 until it is made."""
    began: int = 0
    """The revision before that of the first write: what is older knows nothing of what is new."""
    left_behind: tuple[str, ...] = ()
    """Who was missing when a phase ended all the same; at most 100."""


@dataclass(frozen=True, slots=True)
class TrustRecord:
    """`trust/<namespace>/<workload>`: what a proxy says of the credential that lies on its disk."""

    proxy: Name
    roots: tuple[str, ...]
    """The pins of the roots that it trusts, sorted."""
    issuer: str
    """The key id of the intermediate that signed the credential."""
    not_after: float
    """The credential's end, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class QuarantineRecord:
    """`quarantine/<namespace>/<workload>/<manifest>@<mod_revision>`: that version of it is left out for that proxy."""

    proxy: Name
    manifest: str
    mod_revision: int
    type_url: str
    resource: str
    reason: str
    """Envoy's own text."""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """`tokens/<sha256 of the token>`, leased: etcd ends it."""

    credential: str
    """The path of the credential's SPIFFE ID: `proxy/<namespace>/<workload>`, `operator/<name>` …"""
    expires: float
    """Seconds since 1970."""
    used_by: str = ""
    """SHA-256 of the public key that used it, in hexadecimal; that key may ask again."""
    author: str = ""
    """The path of the credential that made it: what is made before a revocation ends with it."""
    proof: bytes = b""
    """Made under the data-encryption key, over all but `used_by`."""


@dataclass(frozen=True, slots=True)
class JoinedRecord:
    """`joined/<namespace>/<workload>`, leased: its proxy has used a token lately, and may not have been seen yet."""

    proxy: Name


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """`requests/<id>`, leased: a replica asks the leader for a credential."""

    id: str
    credential: str
    public_key: bytes
    """DER, SubjectPublicKeyInfo."""
    requester: str
    """Who asked: `token:<first 8 of the hash>` or a SPIFFE ID."""
    proof: bytes
    """A MAC under the data-encryption key: whoever can only write to etcd cannot ask."""


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """`answers/<id>`, leased: what the leader made of a request. Either a chain or an error."""

    id: str
    chain: str = ""
    """PEM: the leaf, then the intermediate."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Nack:
    """A proxy refused a resource."""

    proxy: Name
    type_url: str
    resources: tuple[str, ...]
    text: str
    """Envoy's own."""
    suspects: tuple[tuple[str, int], ...]
    """(manifest, mod_revision) of the sources that changed since the proxy's last ACK, newest first."""
    revision: int
    """The Mesh revision of what it refused."""


@dataclass(frozen=True, slots=True)
class Laggard:
    """A proxy that has not ACKed what it should have."""

    proxy: Name
    reason: str
    revision: int
    """The Mesh revision that it has ACKed."""


@dataclass(frozen=True, slots=True)
class AckRecord:
    """`acks/<replica>`, leased, written at most once a second."""

    replica: str
    revision: int
    """The lowest Mesh revision that all its streams have ACKed."""
    streams: int
    laggards: tuple[Laggard, ...] = ()
    """At most 100."""
    nacks: tuple[Nack, ...] = ()
    """At most 100: what the leader quarantines from."""


REGISTERED: Mapping[str, type[Service | Endpoints | Workload]] = {
    "services": Service,
    "endpoints": Endpoints,
    "workloads": Workload,
}
"""What `registry/<source>/<table>/<namespace>/<name>` holds.

`leaving/<namespace>/<workload>/<revision>`, leased, holds the Workload of that revision, which serves less since.
"""
