"""`Mesh`: the methods for operators, viewers, proxies and replicas.

Reads come from the store, linearizably: what one replica has confirmed every other one shows. What the mesh makes of a
manifest, its problems and NACKs, comes from this replica's Mesh.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from cluster import kv as store
from cluster.kv import Guard
from smc import manifests, telemetry
from smc.api import denials, inspecting, objects, peers, revocations, rotation, waiting
from smc.api.access import PROXY, REPLICA, Caller
from smc.api.backends import Backends, ProxyStatus
from smc.api.calls import Work
from smc.api.credentials import answer
from smc.api.denials import Denials
from smc.certificates import admissions, requests, tokens, x509
from smc.certificates.authority import store_errors
from smc.codec import UnreadableRecord
from smc.errors import Exhausted, Invalid, NotFound, Unavailable
from smc.mesh import Mesh
from smc.model import Name
from smc.records import ManifestRecord, MemberRecord
from smc.v1 import smc_pb2 as pb

log = structlog.get_logger(__name__)

MOST_LISTED = 32 * 1024 * 1024
"""Bytes of one answer to List."""
MOST_FILE = 4096
"""Characters of the name of the file that a manifest was written in."""
SETTLE = 0.5
"""Seconds that Apply waits for this replica's Mesh, to tell what problems the manifest has in it."""
_LOOK = 0.01
_UNKNOWN = "every other replica: etcd cannot be asked which there are"


@dataclass(frozen=True, slots=True)
class MeshService:
    backends: Backends
    denials: Denials
    comparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one call that has configurations made only to be looked at: they take memory and time."""

    def methods(self) -> Mapping[str, Work]:
        return {
            "Apply": self.apply,
            "Get": self.get,
            "List": self.list_,
            "Delete": self.delete,
            "Proxies": self.proxies,
            "Wait": self.wait,
            "Acks": self.acks,
            "Denials": self.denials_,
            "ReportDenials": self.report_denials,
            "Explain": self.explain,
            "Diff": self.diff,
            "Config": self.config,
            "Reach": self.reach,
            "CreateToken": self.create_token,
            "Certificates": self.certificates,
            "Revoke": self.revoke,
            "Renew": self.renew,
            "Trust": partial(rotation.trust, self.backends),
            "Rotate": self.rotate,
            "Rotation": partial(rotation.rotation, self.backends),
        }

    # ------------------------------------------------------------------------------------------------------ manifests

    async def apply(self, request: pb.ApplyRequest, caller: Caller) -> pb.ApplyResponse:
        """Check, store, and tell what became of it. A dry run tells what would."""
        b = self.backends
        record = await asyncio.to_thread(self._read, request, caller)
        if not request.dry_run:
            await _let_in(b, caller)
        written = await b.registry.put_manifest(
            record,
            expected=request.resource_version or None,
            traceparent=telemetry.current_traceparent(),
            dry_run=request.dry_run,
        )
        if request.dry_run:
            shown = objects.shown(record, 0, objects.Known.of(None))
        else:
            await self._settle(record.id, written.revision)
            shown = objects.shown(record, written.revision, objects.Known.of(b.mesh()))
            log.info(
                "manifest applied",
                **{telemetry.MANIFEST: record.id, telemetry.REVISION: written.revision, "author": caller.uri},
            )
        return pb.ApplyResponse(object=shown, outcome=written.outcome.name)

    def _read(self, request: pb.ApplyRequest, caller: Caller) -> ManifestRecord:
        b = self.backends
        file = request.file[:MOST_FILE] or "-"
        record = manifests.read(
            request.document, b.kinds, file=file, line=request.line or 1, author=caller.uri, now=b.now()
        )
        return manifests.within(record, request.namespace)

    async def _settle(self, manifest: str, mod_revision: int) -> None:
        """Wait a moment for a Mesh that has this version of the manifest."""
        deadline = asyncio.get_running_loop().time() + SETTLE
        while (mesh := self.backends.mesh()) is not None and not objects.is_built(manifest, mod_revision, mesh):
            if asyncio.get_running_loop().time() >= deadline:
                return
            await asyncio.sleep(_LOOK)

    async def get(self, request: pb.GetRequest, caller: Caller) -> pb.Object:
        b = self.backends
        id_ = _id(request)
        item = await b.kv.get(b.keys.manifest(id_))
        if item is None:
            raise _missing(request)
        return objects.stored(item, objects.Known.of(b.mesh()))

    async def list_(self, request: pb.ListRequest, caller: Caller) -> pb.ListResponse:
        b = self.backends
        if not request.group or not request.kind:
            raise Invalid("a list is of one kind, and group or kind is missing")
        prefix = "/".join(_part(part) for part in (request.group, request.kind, request.namespace) if part) + "/"
        listing = await b.kv.list(b.keys.manifests + prefix)
        response = await asyncio.to_thread(self._listed, listing)
        if response.ByteSize() > MOST_LISTED:
            raise Exhausted(
                f"the {len(response.objects)} manifests take {response.ByteSize()} bytes, more than {MOST_LISTED}",
                hint="ask for one namespace at a time",
            )
        return response

    def _listed(self, listing: store.Listing) -> pb.ListResponse:
        known = objects.Known.of(self.backends.mesh())
        response = pb.ListResponse(resource_version=listing.revision)
        for item in listing.items:
            try:
                response.objects.append(objects.stored(item, known))
            except UnreadableRecord as e:
                # One bad record hurts only itself.
                log.warning("a stored manifest cannot be shown", key=item.key, reason=str(e))
        return response

    async def delete(self, request: pb.DeleteRequest, caller: Caller) -> pb.DeleteResponse:
        b = self.backends
        id_ = _id(request)
        await _let_in(b, caller)
        try:
            revision = await b.registry.delete_manifest(id_, expected=request.resource_version or None)
        except NotFound:
            raise _missing(request) from None
        log.info("manifest deleted", **{telemetry.MANIFEST: id_, telemetry.REVISION: revision, "author": caller.uri})
        return pb.DeleteResponse(resource_version=revision)

    # -------------------------------------------------------------------------------------------------------- proxies

    async def proxies(self, request: pb.ProxiesRequest, caller: Caller) -> pb.ProxiesResponse:
        b = self.backends
        own = b.replica()
        mesh = b.mesh()
        response = pb.ProxiesResponse(proxies=[_proxy(p, own.name, mesh) for p in b.proxies()])
        response.replicas.add(
            name=own.name,
            leader=own.leader,
            ready=own.ready,
            revision=own.revision,
            streams=own.streams,
            version=own.version,
        )
        if request.local or caller.role == REPLICA:
            return response
        members = await self._others()
        if members is None:
            response.unreachable.append(_UNKNOWN)
            return response
        others, unreachable = await peers.proxies(members, b.credential())
        for other in others:
            response.proxies.extend(other.proxies)
            response.replicas.extend(other.replicas)
        response.unreachable.extend(unreachable)
        response.proxies.sort(key=lambda p: (p.name, p.replica))
        response.replicas.sort(key=lambda r: r.name)
        return response

    async def _others(self) -> Sequence[MemberRecord] | None:
        """The other replicas that are alive; None while that is not known."""
        b = self.backends
        try:
            return [member for member in await b.members() if member.name != b.replica().name]
        except (store.StoreError, Unavailable) as e:
            log.warning("the other replicas are not known", reason=str(e))
            return None

    async def denials_(self, request: pb.DenialsRequest, caller: Caller) -> pb.DenialsResponse:
        own = pb.DenialsResponse(denials=self.denials.of(self._mesh(), request.namespace, self.backends.now()))
        if request.local or caller.role == REPLICA:
            return own
        members = await self._others()
        if members is None:
            own.unreachable.append(_UNKNOWN)
            return own
        others, unreachable = await peers.denials(members, self.backends.credential(), request.namespace)
        told = (denial for answer in (own, *others) for denial in answer.denials)
        return pb.DenialsResponse(denials=denials.newest(told), unreachable=unreachable)

    async def report_denials(self, request: pb.ReportDenialsRequest, caller: Caller) -> pb.ReportDenialsResponse:
        """Of the caller itself, whatever the request says."""
        self.denials.take(Name.parse(caller.path.removeprefix(f"{PROXY}/")), request, self._mesh())
        return pb.ReportDenialsResponse()

    def _mesh(self) -> Mesh:
        mesh = self.backends.mesh()
        if mesh is None:
            raise Unavailable("this replica has not read the mesh yet", hint="ask again soon, or another one")
        return mesh

    async def wait(self, request: pb.WaitRequest, caller: Caller) -> pb.WaitResponse:
        return await waiting.wait(self.backends, request)

    async def acks(self, request: pb.AcksRequest, caller: Caller) -> pb.AcksResponse:
        return waiting.acks(self.backends, waiting.versions(request))

    # ------------------------------------------------------------------------------------ what the mesh makes of things

    async def explain(self, request: pb.ExplainRequest, caller: Caller) -> pb.ExplainResponse:
        return await inspecting.explain(self.backends, request)

    async def diff(self, request: pb.DiffRequest, caller: Caller) -> pb.DiffResponse:
        async with self.comparing:
            return await inspecting.diff(self.backends, request, caller.uri)

    async def config(self, request: pb.ConfigRequest, caller: Caller) -> pb.ConfigResponse:
        connected = await self.proxies(pb.ProxiesRequest(), caller)
        async with self.comparing:
            return await inspecting.config(self.backends, request, connected.proxies)

    async def reach(self, request: pb.GetRequest, caller: Caller) -> pb.ReachResponse:
        found = await self.get(request, caller)
        return await inspecting.reach(self.backends, _id(request), found.resource_version)

    # ---------------------------------------------------------------------------------------------------- credentials

    async def create_token(self, request: pb.CreateTokenRequest, caller: Caller) -> pb.CreateTokenResponse:
        b = self.backends
        text, expires = await tokens.create_token(
            b.kv,
            b.keys,
            b.keyring,
            request.credential,
            ttl=float(request.ttl_seconds),
            now=b.now(),
            author=caller.path,
            guards=await _let_in(b, caller),
        )
        log.info("token created", credential=request.credential, expires=expires, author=caller.uri)
        return pb.CreateTokenResponse(token=text, expires=expires)

    async def certificates(self, request: pb.CertificatesRequest, caller: Caller) -> pb.CertificatesResponse:
        return await revocations.certificates(self.backends, request)

    async def revoke(self, request: pb.RevokeRequest, caller: Caller) -> pb.RevokeResponse:
        return await revocations.revoke(self.backends, request, caller.uri, partial(_let_in, self.backends, caller))

    async def rotate(self, request: pb.RotateRequest, caller: Caller) -> pb.RotationResponse:
        await _let_in(self.backends, caller)
        return await rotation.rotate(self.backends, request, caller)

    async def renew(self, request: pb.RenewRequest, caller: Caller) -> pb.Credential:
        """The caller's own name, whatever the request says; only its public key is used."""
        b = self.backends
        key = x509.requested_key(request.csr)
        guards = await _let_in(b, caller)
        chain = await requests.request_credential(b.kv, b.keys, b.keyring, caller.path, key, caller.uri, guards=guards)
        return await answer(b, caller.path, chain)


async def _let_in(b: Backends, caller: Caller) -> Sequence[Guard]:
    """What holds as long as the caller is not revoked, by the store itself: this replica's Mesh may be a moment behind.

    Raises:
        Denied: the caller is revoked.
        Unavailable: the store does not answer.
    """
    with store_errors("it cannot be told whether the credential is revoked"):
        return await admissions.check_credential(b.kv, b.keys, caller.path, caller.serial)


def _proxy(status: ProxyStatus, replica: str, mesh: Mesh | None) -> pb.Proxy:
    """What it refuses now comes first, then what it goes without because it refused it before."""
    known = mesh.proxies.get(status.name) if mesh is not None else None
    nacks = [
        pb.Nack(proxy=str(n.proxy), type_url=n.type_url, resource=", ".join(n.resources)[:1000], text=n.text)
        for n in status.nacks[:100]
    ]
    left_out = [objects.left_out(q) for q in (known.quarantined if known is not None else ())[:100]]
    return pb.Proxy(
        name=str(status.name),
        replica=replica,
        identity=status.identity,
        connected=status.connected,
        revision=status.revision,
        acked=status.acked,
        state=status.state,
        versions=dict(status.versions),
        nacks=[*nacks, *left_out],
    )


def _id(request: pb.GetRequest | pb.DeleteRequest) -> str:
    parts = (request.group, request.kind, request.namespace or "-", request.name)
    return "/".join(_part(part) for part in parts)


def _part(text: str) -> str:
    """One part of a key; what cannot be one names nothing."""
    if not text or len(text) > 253 or "/" in text:
        raise NotFound(f"{text[:80]!r} names no manifest")
    return text


def _missing(request: pb.GetRequest | pb.DeleteRequest) -> NotFound:
    name = str(Name(request.namespace, request.name)) if request.namespace not in ("", "-") else request.name
    return NotFound(f"there is no {request.kind} {name}", hint=f"smc get {request.kind.lower()} -A lists all")
