"""What the leader does about a NACK: leave one suspect at a time out of that proxy's configuration until it ACKs.

Only that proxy's: an odd or hostile one can take nothing from the others. What is left out stays closed: a Permission
left out is a denial. A quarantine holds for one version of a manifest, so writing the manifest anew ends it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from contextlib import aclosing

import structlog

from cluster.election import Deposed, Leadership
from cluster.kv import KV, Delete, KeyValue, Put, Status, StoreError
from smc import telemetry
from smc.codec import UnreadableRecord, decode, encode
from smc.keys import Keys
from smc.mesh import Mesh
from smc.model import Name
from smc.records import AckRecord, Nack, QuarantineRecord

RETRY = 1.0
"""Seconds until the store is asked again."""
LOOK_AGAIN = 60.0
"""Seconds between two looks for quarantines that have ended: they do no harm, and only take room."""
AT_ONCE = 100
"""Records in one transaction."""

log = structlog.get_logger(__name__)

Version = tuple[str, int]
"""(manifest, mod_revision)"""


def next_suspect(
    nack: Nack, quarantined: Mapping[Version, int], manifests: Mapping[str, int]
) -> QuarantineRecord | None:
    """The suspect to leave out next, or None when there is nothing to do, or not yet.

    `quarantined` is what is left out for the proxy, with the revision at which it was; `manifests` has the mod_revision
    of every manifest. While one of the suspects was left out or written anew after what was refused, the NACK proves
    nothing about the others: the proxy has yet to say what it makes of that. If that made no difference to what it
    refuses, then its NACK stands, and that one is no suspect any more.
    """
    if any(manifests.get(manifest) != mod_revision for manifest, mod_revision in nack.suspects):
        return None
    if any(quarantined.get(suspect, 0) > nack.revision for suspect in nack.suspects):
        return None
    for manifest, mod_revision in nack.suspects:
        if (manifest, mod_revision) not in quarantined:
            resource = nack.resources[0] if nack.resources else ""
            return QuarantineRecord(nack.proxy, manifest, mod_revision, nack.type_url, resource, nack.text)
    return None


async def run(leadership: Leadership, kv: KV, keys: Keys) -> None:
    """Follow what the replicas report, for as long as the leadership lasts.

    Raises:
        Deposed: another replica leads.
    """
    while True:
        try:
            listing = await kv.list(keys.acks)
            await _judge(leadership, kv, keys, _nacks(listing.items))
            judged = {item.key: _nacks([item]) for item in listing.items}
            async with aclosing(kv.watch(keys.acks, Status(listing.cluster_id, listing.revision))) as batches:
                async for batch in batches:
                    for report in batch.puts:
                        # A report changes with every revision; what is refused seldom does, and judging reads a lot.
                        nacks = _nacks([report])
                        if nacks and nacks != judged.get(report.key):
                            await _judge(leadership, kv, keys, nacks)
                        judged[report.key] = nacks
        except Deposed:
            raise
        except StoreError as e:
            log.info("the replicas' reports are listed again", reason=str(e))
            await asyncio.sleep(RETRY)


async def _judge(leadership: Leadership, kv: KV, keys: Keys, nacks: Sequence[Nack]) -> None:
    quarantined: defaultdict[Name, dict[Version, int]] = defaultdict(dict)
    prefix = keys.manifests
    manifests = {item.key.removeprefix(prefix): item.mod_revision for item in (await kv.list(prefix)).items}
    for item, record in await _quarantines(kv, keys):
        if manifests.get(record.manifest) == record.mod_revision:
            quarantined[record.proxy][record.manifest, record.mod_revision] = item.create_revision
    for nack in nacks:
        suspect = next_suspect(nack, quarantined[nack.proxy], manifests)
        if suspect is None:
            continue
        key = keys.quarantine(suspect.proxy, suspect.manifest, suspect.mod_revision)
        outcome = await leadership.transact([Put(key, encode(suspect))])
        quarantined[suspect.proxy][suspect.manifest, suspect.mod_revision] = outcome.revision
        log.warning(
            "a manifest is left out for a proxy that refuses it",
            **{telemetry.PROXY: str(suspect.proxy), telemetry.MANIFEST: suspect.manifest, "reason": suspect.reason},
        )


async def forget(leadership: Leadership, kv: KV, keys: Keys, meshes: AsyncIterable[Mesh]) -> None:
    """Delete the quarantines that have ended: of a manifest that was written anew or is gone, or of a workload that is.

    They are looked for at the first Mesh and at later ones, at most every LOOK_AGAIN seconds. A workload that comes
    back has to refuse again what was left out for it.

    Raises:
        Deposed: another replica leads.
    """
    async for mesh in meshes:
        await _forget(leadership, kv, keys, mesh)
        await asyncio.sleep(LOOK_AGAIN)


async def _forget(leadership: Leadership, kv: KV, keys: Keys, mesh: Mesh) -> None:
    """Delete what counts for no proxy of `mesh`, however long the store cannot be reached."""
    while True:
        try:
            return await _delete(leadership, kv, keys, mesh)
        except Deposed:
            raise
        except StoreError as e:
            log.warning("quarantines that have ended cannot be deleted yet", error=str(e))
        await asyncio.sleep(RETRY)


async def _delete(leadership: Leadership, kv: KV, keys: Keys, mesh: Mesh) -> None:
    def counts(record: QuarantineRecord) -> bool:
        return record.proxy in mesh.proxies and record in mesh.proxies[record.proxy].quarantined

    # What is newer than the Mesh is for the next one to judge.
    ended = [
        Delete(item.key)
        for item, record in await _quarantines(kv, keys)
        if item.mod_revision <= mesh.revision and not counts(record)
    ]
    for start in range(0, len(ended), AT_ONCE):
        await leadership.transact(ended[start : start + AT_ONCE])


async def _quarantines(kv: KV, keys: Keys) -> list[tuple[KeyValue, QuarantineRecord]]:
    """All that can be read; what cannot is left to whoever can."""
    found: list[tuple[KeyValue, QuarantineRecord]] = []
    for item in (await kv.list(keys.quarantines)).items:
        try:
            found.append((item, decode(QuarantineRecord, item.value, key=item.key)))
        except UnreadableRecord as e:
            log.warning("a quarantine cannot be read", key=item.key, reason=str(e))
    return found


def _nacks(reports: Iterable[KeyValue]) -> tuple[Nack, ...]:
    """What all of them report; one that cannot be read hurts nobody."""
    found: list[Nack] = []
    for report in reports:
        try:
            found.extend(decode(AckRecord, report.value, key=report.key).nacks)
        except UnreadableRecord as e:
            log.warning("a replica's report cannot be read", key=report.key, reason=str(e))
    return tuple(found)
