"""What the API says of the authority: whom a proxy is to trust, and how far a rotation is."""

from __future__ import annotations

import structlog

from cluster.kv import Committed, Guard, Put
from smc.api import credentials, waiting
from smc.api.access import PROXY, Caller
from smc.api.backends import Backends
from smc.certificates import authority, rotating
from smc.certificates.rotating import Progress
from smc.codec import encode, equal
from smc.errors import Invalid, NotFound, Unavailable
from smc.model import MeshConfig, Name
from smc.records import Phase, Rotates, RotationRecord, TrustRecord
from smc.v1 import smc_pb2 as pb

MOST_TOLD = 100
"""Who is missing, in one answer."""
MOST_ROOTS = 16

log = structlog.get_logger(__name__)


async def trust(b: Backends, request: pb.TrustRequest, caller: Caller) -> pb.TrustResponse:
    """Keep what a proxy says of its credential, and answer what it should be.

    A proxy that lies is left behind when what it really has is retired, and nobody else is.

    Raises:
        Invalid: it says what nobody can have.
        NotFound: its workload is gone, and nobody would forget what it says.
        Unavailable: the store does not answer, or this replica has not read the mesh yet.
    """
    if not 0 < len(request.roots) <= MOST_ROOTS or not all(len(text) == 64 for text in request.roots):
        raise Invalid("the pins of the roots that are trusted are missing, or are none")
    name = Name.parse(caller.path.removeprefix(f"{PROXY}/"))
    await credentials.check_workload(b, name)
    record = TrustRecord(name, tuple(sorted(request.roots)), request.issuer[:64], caller.not_after)
    key = b.keys.trust(name)
    with authority.store_errors("what the proxy trusts cannot be kept"):
        item = await b.kv.get(key)
        if item is None or not equal(item.value, record):
            # Should another replica have heard something else meanwhile, the proxy will have to say it again.
            guard = Guard(key, mod_revision=item.mod_revision) if item is not None else Guard(key, create_revision=0)
            if not isinstance(await b.kv.transact([Put(key, encode(record))], [guard]), Committed):
                raise Unavailable("what the proxy trusts was written by another replica meanwhile", hint="say it again")
    newest = authority.trust(await authority.load_stored(b.kv, b.keys))
    return pb.TrustResponse(roots=newest.roots, renew=request.issuer != newest.signer)


async def rotate(b: Backends, request: pb.RotateRequest, caller: Caller) -> pb.RotationResponse:
    """Have the leader rotate, or join the rotation of that kind that is under way.

    Raises:
        Invalid: nothing of that name can be rotated, or not now.
        Conflict: one of the other kind is under way.
        Unavailable: the store does not answer.
    """
    try:
        of = Rotates(request.of)
    except ValueError:
        known = " or ".join(one.value for one in Rotates)
        raise Invalid(f"{request.of[:80]!r} cannot be rotated: {known} can") from None
    asked = await rotating.request(b.kv, b.keys, of, caller.uri, force=request.force, now=b.now())
    log.info("rotation asked for", rotation=asked.id, of=of.value, force=request.force, author=caller.uri)
    return _response(Progress(asked, (), 0))


async def rotation(b: Backends, _request: pb.RotationRequest, _caller: Caller) -> pb.RotationResponse:
    """How far the newest rotation is.

    Raises:
        NotFound: there never was one.
        Unavailable, StoreError: it is not known.
    """
    stored = await authority.load_stored(b.kv, b.keys)
    if stored.rotation is None:
        raise NotFound("nothing was ever rotated in this mesh", hint="smc cert rotate begins it")
    mesh = b.mesh()
    config = mesh.config if mesh is not None else MeshConfig()
    progress = await rotating.look(
        b.kv,
        b.keys,
        lambda revision: waiting.survey(b, revision),
        stored,
        ttl=config.workload_certificate_ttl,
        now=b.now(),
    )
    return _response(progress)


def _response(progress: Progress) -> pb.RotationResponse:
    record: RotationRecord = progress.rotation
    response = pb.RotationResponse(
        id=record.id,
        of=record.of.value,
        phase=record.phase.value,
        done=record.phase is Phase.DONE,
        requester=record.requester,
        since=record.since,
        forced=bool(record.forced),
        proxies=progress.proxies,
        lacking=len(progress.missing),
        left_behind=record.left_behind,
    )
    for one in progress.missing[:MOST_TOLD]:
        response.missing.add(kind=one.kind.value, who=one.who, why=one.why)
    return response
