"""What is stored in etcd: the table of keys, the values under them, and the codec.

Every value is canonical JSON, `{"format": 1, "record": {...}, "traceparent": "..."}`: equal records have equal bytes
but for the trace. A record of a newer format than this version knows is refused, never guessed at.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import timedelta
from enum import Enum
from functools import cache, lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from smc.errors import Invalid
from smc.model import Endpoints, Identity, Name, Problem, Service, Workload

FORMAT = 1
"""The format that this version writes; it reads this one and, once there is one, the one before it."""
READABLE = (1,)

MOST_ALIKE = 4096
"""Values of a kind that are kept to be found again."""

T = TypeVar("T")


class UnreadableRecord(Invalid):
    """A stored value is of an unknown format, or not of the shape that its key promises."""


# ---------------------------------------------------------------------------------------------------------------- keys


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

    def workload(self, source: str, name: Name) -> str:
        return f"{self.source(source)}workloads/{name}"

    def synced(self, source: str) -> str:
        return f"{self.source(source)}synced"

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
            self.readiness,
            self.certificates,
            self.bundle,
            self.crl,
            self.revocations,
            self.quarantines,
            self.addresses,
        )


# ------------------------------------------------------------------------------------------------------------- records


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


# --------------------------------------------------------------------------------------------------------------- codec


def encode(record: object, *, traceparent: str = "") -> bytes:
    """The canonical bytes of a record."""
    document: dict[str, Any] = {"format": FORMAT, "record": _plain(record)}
    if traceparent:
        document["traceparent"] = traceparent
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode(kind: type[T], value: bytes, *, key: str = "") -> T:
    """Read a record.

    Raises:
        UnreadableRecord: not JSON, not a readable format, or not the shape of `kind`.
    """
    document = _document(value, key)
    try:
        record: T = _reader(kind)(document["record"])
        return record
    except (KeyError, TypeError, ValueError) as e:
        raise UnreadableRecord(f"the value at {key or 'a key'} is not a {kind.__name__}: {e}") from e


def traceparent(value: bytes, *, key: str = "") -> str:
    """The W3C trace context of whoever wrote the record; "" if it had none."""
    # It is the last member of a canonical value: to look there spares reading the whole of it.
    if (found := _TRACE.search(value, len(value) - _TRACE_BYTES)) is not None:
        return found[1].decode()
    return str(_document(value, key).get("traceparent", "")) if b'"traceparent"' in value else ""


_TRACE = re.compile(rb',"traceparent":"([0-9a-f-]{55})"\}\Z')
_TRACE_BYTES = 73


def equal(value: bytes, record: object) -> bool:
    """Whether a stored value says the same as `record`, whoever wrote it."""
    try:
        document = _document(value, "")
    except UnreadableRecord:
        return False
    return bool(document["format"] == FORMAT and document.get("record") == json.loads(json.dumps(_plain(record))))


def _document(value: bytes, key: str) -> dict[str, Any]:
    try:
        document = json.loads(value)
    except ValueError as e:
        raise UnreadableRecord(f"the value at {key or 'a key'} is not JSON: {e}") from e
    if not isinstance(document, dict) or document.get("format") not in READABLE:
        found = document.get("format") if isinstance(document, dict) else None
        raise UnreadableRecord(
            f"the value at {key or 'a key'} has format {found!r}; this version reads {', '.join(map(str, READABLE))}",
            hint="finish the upgrade: a newer replica has written it",
        )
    return document


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Name):
        return {"namespace": value.namespace, "name": value.name}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return {name: _plain(getattr(value, name)) for name in _names(value.__class__)}


@cache
def _names(kind: type) -> tuple[str, ...]:
    if not is_dataclass(kind):
        raise TypeError(f"a record cannot hold a {kind.__name__}")
    return tuple(f.name for f in fields(kind))


def _make_reader(kind: Any) -> Callable[[Any], Any]:
    """A function from plain JSON to `kind`; it raises KeyError, TypeError or ValueError."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        (inner,) = [a for a in get_args(kind) if a is not NoneType]
        read = _reader(inner)
        return lambda plain: None if plain is None else read(plain)
    if origin is tuple:
        items = get_args(kind)
        if len(items) == 2 and items[1] is ...:
            read = _reader(items[0])
            return lambda plain: tuple([read(item) for item in plain])
        readers = [_reader(item) for item in items]
        return lambda plain: tuple([read(item) for read, item in zip(readers, plain, strict=True)])
    if kind is Any or origin is not None:
        return lambda plain: plain
    if kind is Name:
        return _name
    if is_dataclass(kind):
        return _dataclass_reader(kind)
    if kind is bytes:
        return lambda plain: base64.b64decode(plain, validate=True)
    if kind is timedelta:
        return lambda plain: timedelta(seconds=plain)
    if kind is float:
        return float
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind

    def scalar(plain: Any) -> Any:
        if type(plain) is not kind:
            raise TypeError(f"{plain!r} is not a {kind.__name__}")
        return plain

    return scalar


_reader: Callable[[Any], Callable[[Any], Any]] = cache(_make_reader)


def _name(plain: Any) -> Name:
    namespace, name = plain["namespace"], plain["name"]
    if type(namespace) is not str or type(name) is not str:
        raise TypeError(f"{plain!r} is not a Name")
    return Name(namespace, name)


def _dataclass_reader(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = [
        (f.name, _reader(hints[f.name]), f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)
    ]

    def read(plain: Any) -> Any:
        try:
            return kind(*[of(plain[name]) for name, of, _ in readers])
        except KeyError:  # a field that has a default, most likely
            return kind(**{name: of(plain[name]) for name, of, required in readers if required or name in plain})

    if not all(hints[name] is str for name, _, _ in readers):
        return read
    # An identity, a locality: there are few, and each is read again and again.
    known = lru_cache(MOST_ALIKE)(
        lambda *texts: kind(*[of(text) for (_, of, _), text in zip(readers, texts, strict=True)])
    )

    def look_up(plain: Any) -> Any:
        try:
            return known(*[plain[name] for name, _, _ in readers])
        except KeyError:
            return read(plain)

    return look_up


REGISTERED: Mapping[str, type[Service | Endpoints | Workload]] = {
    "services": Service,
    "endpoints": Endpoints,
    "workloads": Workload,
}
"""What `registry/<source>/<table>/<namespace>/<name>` holds."""
