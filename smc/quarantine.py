"""What the leader does about a NACK: leave one suspect at a time out of that proxy's configuration until it ACKs.

Only that proxy's: an odd or hostile one can take nothing from the others. What is left out stays closed: a Permission
left out is a denial. A quarantine holds for one version of a manifest, so writing the manifest anew ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing

import structlog

from cluster.election import Deposed, Leadership
from cluster.kv import KV, Delete, KeyValue, Operation, Put, Status, StoreError
from smc import telemetry
from smc.model import Name
from smc.records import AckRecord, Keys, Nack, QuarantineRecord, UnreadableRecord, decode, encode

RETRY = 1.0
"""Seconds until the store is asked again."""

log = structlog.get_logger(__name__)

Quarantines = Mapping[tuple[Name, str, int], int]
"""(proxy, manifest, mod_revision) -> the revision at which it was left out."""


def next_suspect(nack: Nack, quarantines: Quarantines) -> QuarantineRecord | None:
    """The suspect to leave out next, or None when there is nothing to do.

    A NACK of a Mesh from before the proxy's last quarantine proves nothing about what is left, so it is passed over.
    """
    last = max((at for (proxy, _, _), at in quarantines.items() if proxy == nack.proxy), default=0)
    if nack.revision < last:
        return None
    for manifest, mod_revision in nack.suspects:
        if (nack.proxy, manifest, mod_revision) not in quarantines:
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
            await _judge(leadership, kv, keys, listing.items)
            async with aclosing(kv.watch(keys.acks, Status(listing.cluster_id, listing.revision))) as batches:
                async for batch in batches:
                    await _judge(leadership, kv, keys, batch.puts)
        except Deposed:
            raise
        except StoreError as e:
            log.info("the replicas' reports are listed again", reason=str(e))
            await asyncio.sleep(RETRY)


async def _judge(leadership: Leadership, kv: KV, keys: Keys, reports: tuple[KeyValue, ...]) -> None:
    nacks = [nack for report in reports for nack in _nacks(report)]
    if not nacks:
        return
    quarantines: dict[tuple[Name, str, int], int] = {}
    ended: list[Operation] = []
    manifests = {item.key: item.mod_revision for item in (await kv.list(keys.manifests)).items}
    for item in (await kv.list(keys.quarantines)).items:
        record = decode(QuarantineRecord, item.value, key=item.key)
        if manifests.get(keys.manifest(record.manifest)) == record.mod_revision:
            quarantines[record.proxy, record.manifest, record.mod_revision] = item.create_revision
        else:
            ended.append(Delete(item.key))
    if ended:
        await leadership.transact(ended[:100])
    for nack in nacks:
        record_ = next_suspect(nack, quarantines)
        if record_ is None:
            continue
        key = keys.quarantine(record_.proxy, record_.manifest, record_.mod_revision)
        outcome = await leadership.transact([Put(key, encode(record_))])
        quarantines[record_.proxy, record_.manifest, record_.mod_revision] = outcome.revision
        log.warning(
            "a manifest is left out for a proxy that refuses it",
            **{telemetry.PROXY: str(record_.proxy), telemetry.MANIFEST: record_.manifest, "reason": record_.reason},
        )


def _nacks(report: KeyValue) -> tuple[Nack, ...]:
    try:
        return decode(AckRecord, report.value, key=report.key).nacks
    except UnreadableRecord as e:
        log.warning("a replica's report cannot be read", key=report.key, reason=str(e))
        return ()
