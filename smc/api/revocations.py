"""`Revoke` and `Certificates`: who is out, and what is still good.

A revocation is one record, which every replica obeys as soon as it sees it. What has to be signed for it, a key for the
others and the lists, is for the leader: see `smc.certificates.revoking`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from cluster.kv import Committed, Delete, Guard, KeyValue, Operation, Put
from smc import telemetry
from smc.api.backends import Backends
from smc.certificates import admissions, revoking, x509
from smc.codec import UnreadableRecord, decode, encode
from smc.errors import Conflict, Invalid, NotFound, Unavailable
from smc.mesh import Mesh
from smc.model import Identity, Name
from smc.records import AdmissionRecord, CertificateRecord, CrlRecord, RevocationRecord
from smc.v1 import smc_pb2 as pb

ATTEMPTS = 5
"""At one write, when others write the same."""
MOST_REASON = 1000
MOST_NAMED = 100

_ADMISSIONS = {"proxies": "admitted", "credentials": "credentials-admitted"}
"""By table of revocations: that of those who were let in again."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Subject:
    """Who is to be revoked."""

    key: str
    credential: str
    """The path of the one that is refused; "": it is a whole identity."""
    identity: Identity | None = None
    """Of a proxy: the one whose key it has."""
    proxy: Name | None = None

    @classmethod
    def of(cls, b: Backends, mesh: Mesh, request: pb.RevokeRequest) -> _Subject:
        if [bool(request.proxy), bool(request.identity), bool(request.credential)].count(True) != 1:
            raise Invalid("name a proxy, an identity, or the credential of an operator or a viewer, and one alone")
        if request.proxy:
            name = _name(request.proxy, "proxy", "<namespace>/<workload>")
            found = mesh.proxies.get(name)
            had = found.workload.identity if found is not None else None
            return cls(b.keys.revoked_proxy(name), f"proxy/{name}", had, name)
        if request.credential:
            path = _credential(request.credential)
            return cls(b.keys.revoked_credential(path), path)
        name = _name(request.identity, "identity", "<namespace>/<service account>")
        identity = Identity(name.namespace, name.name)
        return cls(b.keys.revoked_identity(identity), "", identity)

    def __str__(self) -> str:
        return self.credential.replace("/", " ", 1) or f"identity {self.identity}"


async def revoke(
    b: Backends, request: pb.RevokeRequest, author: str, may: Callable[[], Awaitable[Sequence[Guard]]]
) -> pb.RevokeResponse:
    """Revoke, or take it back. `may` says what has to hold for the author to be let in: else somebody who was revoked
    a moment ago could take that back.

    Raises:
        Invalid: the request names nobody, or more than one.
        NotFound: what is to be taken back is not revoked.
        Denied: what `may` raises.
        Conflict: others write it all the time.
        Unavailable: this replica has not read the mesh yet.
        StoreError: the store does not answer; Ambiguous: it may have been written.
    """
    mesh = b.mesh()
    if mesh is None:
        raise Unavailable("this replica has not read the mesh yet", hint="try again, or another replica")
    subject = _Subject.of(b, mesh, request)
    for _ in range(ATTEMPTS):
        item = await b.kv.get(subject.key)
        guards = [admissions.unchanged(subject.key, item), *await may()]
        if request.undo:
            written = await b.kv.transact(_undo(b, subject, item), guards)
        elif item is not None and not await _admitted(b, subject, item):
            return _response(mesh, subject, 0, item)
        else:
            credential = "" if subject.proxy is not None else subject.credential
            reason = request.reason[:MOST_REASON]
            record = RevocationRecord(subject.proxy, subject.identity, reason, author, b.now(), credential)
            operations: list[Operation] = [
                Put(subject.key, encode(record, traceparent=telemetry.current_traceparent()))
            ]
            if subject.proxy is not None:
                # Should it come back, it has to show anew that it listens.
                operations.append(Delete(b.keys.ready(subject.proxy)))
            written = await b.kv.transact(operations, guards)
        if isinstance(written, Committed):
            what = "revocation taken back" if request.undo else "revoked"
            log.warning(what, subject=str(subject), author=author, reason=request.reason[:MOST_REASON])
            now = None if request.undo else await b.kv.get(subject.key)
            return _response(mesh, subject, written.revision, now)
    raise Conflict(f"others change the revocation of {subject} all the time", hint="look with smc cert list")


def _undo(b: Backends, subject: _Subject, item: KeyValue | None) -> Sequence[Operation]:
    if item is None:
        raise NotFound(f"{subject} is not revoked", hint="smc cert list shows who is")
    admission = [Delete(b.keys.admitted_credential(subject.credential))] if subject.credential else []
    return [Delete(subject.key), *admission]


async def _admitted(b: Backends, subject: _Subject, item: KeyValue) -> bool:
    return bool(subject.credential) and bool(await admissions.admitted(b.kv, b.keys, subject.credential, item))


def _response(mesh: Mesh, subject: _Subject, revision: int, item: KeyValue | None) -> pb.RevokeResponse:
    of = subject.identity
    holders = sorted(
        str(name) for name, proxy in mesh.proxies.items() if of is not None and proxy.workload.identity == of
    )
    response = pb.RevokeResponse(resource_version=revision)
    if item is not None:
        response.revocation.CopyFrom(_shown(item, None))
    if subject.proxy is not None:
        response.proxies.append(str(subject.proxy))
        response.others = len(set(holders) - {str(subject.proxy)})
    else:
        response.proxies.extend(holders[:MOST_NAMED])
    return response


async def certificates(b: Backends, request: pb.CertificatesRequest) -> pb.CertificatesResponse:
    """What the store has of workload certificates and revocations.

    Raises:
        StoreError: the store does not answer.
    """
    listing = await b.kv.list(b.keys.certificates)
    item = await b.kv.get(b.keys.crl)
    crl = decode(CrlRecord, item.value, key=item.key) if item is not None else None
    response = pb.CertificatesResponse()
    if item is not None and crl is not None:
        response.crl, response.crl_number = item.mod_revision, crl.number
    stored: dict[Identity, tuple[int, CertificateRecord]] = {}
    for found in listing.items:
        try:
            record = decode(CertificateRecord, found.value, key=found.key)
        except UnreadableRecord as e:
            log.warning("a stored certificate cannot be shown", key=found.key, reason=str(e))
            continue
        stored[record.identity] = found.mod_revision, record
    now = b.now()
    shown = [one for identity, (revision, record) in stored.items() for one in _certificates(record, revision, now)]
    revoked = [
        pb.Certificate(
            identity=str(one.identity),
            serial=one.certificate.serial,
            not_after=one.certificate.not_after,
            issuer=one.certificate.issuer,
            state="revoked",
        )
        for one in (crl.revoked if crl is not None else ())
    ]
    serials = {one.serial for one in revoked}
    everything = [*(one for one in shown if one.serial not in serials), *revoked]
    response.certificates.extend(
        one
        for one in sorted(everything, key=lambda one: (one.identity, -one.not_after, one.serial))
        if request.namespace in ("", one.identity.partition("/")[0])
    )
    revocations = {
        tuple(item.key.removeprefix(b.keys.revocations).split("/")): item
        for item in (await b.kv.list(b.keys.revocations)).items
    }
    for (table, *who), found in revocations.items():
        if table in _ADMISSIONS.values():
            continue
        one = _shown(found, revocations.get((_ADMISSIONS.get(table, ""), *who)))
        # Operators and viewers are of no namespace.
        if request.namespace not in ("", (one.proxy or one.identity).partition("/")[0]):
            continue
        held = stored.get(Identity(*one.identity.split("/"))) if one.identity else None
        if held is not None:
            since = found.mod_revision if one.proxy else held[0] + 1
            left = revoking.outstanding(held[1], held[0], crl, since, now)
            one.outstanding.extend(certificate.serial for certificate in left)
        response.revocations.append(one)
    return response


def _certificates(record: CertificateRecord, revision: int, now: float) -> Iterator[pb.Certificate]:
    for one in revoking.issued(record, revision):
        current = one.serial == record.serial
        if current or one.not_after > now:
            yield pb.Certificate(
                identity=str(record.identity),
                serial=one.serial,
                not_before=record.not_before if current else 0.0,
                not_after=one.not_after,
                issuer=one.issuer,
                state="current" if current else "replaced",
            )


def _shown(item: KeyValue, admission: KeyValue | None) -> pb.Revocation:
    """A revocation; of one that cannot be read, what its key says."""
    *_, table, namespace, name = item.key.split("/")
    shown = pb.Revocation(resource_version=item.mod_revision)
    if table == "proxies":
        shown.proxy = f"{namespace}/{name}"
    elif table == "credentials":
        shown.credential = f"{namespace}/{name}"
    else:
        shown.identity = f"{namespace}/{name}"
    try:
        record = decode(RevocationRecord, item.value, key=item.key)
    except UnreadableRecord as e:
        shown.reason = str(e)
        return shown
    if record.identity is not None:
        shown.identity = str(record.identity)
    shown.reason, shown.author, shown.time = record.reason, record.author, record.time
    if admission is not None:
        try:
            let_in = decode(AdmissionRecord, admission.value, key=admission.key)
        except UnreadableRecord:
            return shown
        shown.admitted = let_in.revocation == item.mod_revision and bool(let_in.credentials)
    return shown


def _name(text: str, what: str, form: str) -> Name:
    try:
        return Name.parse(x509.check_credential(f"proxy/{text}").removeprefix("proxy/"))
    except Invalid:
        raise Invalid(f"{text[:80]!r} names no {what}", hint=f"use {form}") from None


def _credential(text: str) -> str:
    try:
        path = x509.check_credential(text)
    except Invalid:
        path = ""
    match path.partition("/")[0]:
        case "operator" | "viewer":
            return path
        case "replica":
            raise Invalid(
                f"{path} cannot be revoked",
                hint="whoever has the key-encryption key and etcd is a replica: change them",
            )
        case _:
            hint = "use operator/<name> or viewer/<name>, as the end of its SPIFFE ID says"
            raise Invalid(f"{text[:80]!r} names no operator and no viewer", hint=hint)
