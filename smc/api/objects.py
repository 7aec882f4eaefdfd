"""A stored manifest as the API shows it: with its problems, and with what proxies said to it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.kv import KeyValue
from smc.codec import decode
from smc.mesh import Mesh
from smc.model import Name, Outbound, Severity
from smc.records import ManifestRecord, QuarantineRecord
from smc.v1 import smc_pb2 as pb

NOT_BUILT_YET = "NotBuiltYet"
"""The reason of the one Problem that says nothing about the manifest."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a Mesh has to say of manifests, gathered once for all of them."""

    mesh: Mesh | None
    quarantined: Mapping[str, Sequence[QuarantineRecord]]
    """By manifest."""
    dialled: Mapping[Name, str]
    """By service: the address at which intercepted callers dial it."""

    @classmethod
    def of(cls, mesh: Mesh | None) -> Known:
        quarantined: defaultdict[str, list[QuarantineRecord]] = defaultdict(list)
        outbounds: dict[int, Outbound] = {}
        for proxy in mesh.proxies.values() if mesh is not None else ():
            outbounds[id(proxy.outbound)] = proxy.outbound
            for record in proxy.quarantined:
                quarantined[record.manifest].append(record)
        dialled = {f.service: f.address for outbound in outbounds.values() for f in outbound.frontends or ()}
        return cls(mesh, quarantined, dialled)


def stored(item: KeyValue, known: Known) -> pb.Object:
    """Show the manifest at `item`.

    Raises:
        UnreadableRecord: it holds none.
    """
    return shown(decode(ManifestRecord, item.value, key=item.key), item.mod_revision, known)


def shown(record: ManifestRecord, mod_revision: int, known: Known) -> pb.Object:
    """Show a manifest at the revision of its last write; 0 if it is not stored."""
    object_ = pb.Object(
        group=record.group,
        version=record.version,
        kind=record.kind,
        namespace=record.name.namespace,
        name=record.name.name,
        json=json.dumps(record.object, sort_keys=True, ensure_ascii=False),
        text=record.text,
        file=record.file,
        line=record.line,
        created=record.created,
        author=record.author,
        resource_version=mod_revision,
    )
    if mod_revision:
        object_.problems.extend(_problems(record.id, mod_revision, known.mesh))
        object_.nacks.extend(nack(q) for q in known.quarantined.get(record.id, ()) if q.mod_revision == mod_revision)
        object_.address = known.dialled.get(record.name, "") if record.kind == "Service" else ""
    return object_


def is_built(manifest: str, mod_revision: int, mesh: Mesh) -> bool:
    """Whether the Mesh was made from that version of the manifest, or a later one."""
    found = mesh.manifests.get(manifest)
    return found is not None and found.mod_revision >= mod_revision


def _problems(manifest: str, mod_revision: int, mesh: Mesh | None) -> list[pb.Problem]:
    if mesh is None or not is_built(manifest, mod_revision, mesh):
        # What the Mesh says is about another version: nothing is known of this one.
        message = "this replica has not built the mesh with this version of it yet: ask again in a moment"
        return [pb.Problem(reason=NOT_BUILT_YET, message=message, severity=Severity.WARNING.value)]
    return [
        pb.Problem(reason=p.reason, message=p.message, field=p.field, severity=p.severity)
        for p in mesh.problems.get(manifest, ())
    ]


def nack(record: QuarantineRecord) -> pb.Nack:
    return pb.Nack(
        proxy=str(record.proxy),
        type_url=record.type_url,
        resource=record.resource,
        text=record.reason,
        resource_version=record.mod_revision,
    )


def left_out(record: QuarantineRecord) -> pb.Nack:
    """The same for the proxy's own page, where the manifest has to be named."""
    found = nack(record)
    found.text = f"{record.manifest} is left out: {record.reason}"
    return found
