"""The guarded writes of manifests, as simple as they can be."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.kv import KV, Delete, Guard, KeyValue, Operation, Put, Rejected
from smc.errors import Conflict, NotFound
from smc.records import Keys, ManifestRecord, decode, encode


class Outcome(Enum):
    CREATED = "created"
    CONFIGURED = "configured"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Written:
    outcome: Outcome
    revision: int


@dataclass(frozen=True)
class PlainRegistry:
    kv: KV
    keys: Keys

    async def put_manifest(
        self, record: ManifestRecord, *, expected: int | None, traceparent: str, dry_run: bool
    ) -> Written:
        found = await self._find(record.id, expected)
        if found and decode(ManifestRecord, found.value).object == record.object:
            return Written(Outcome.UNCHANGED, found.mod_revision)
        outcome = Outcome.CONFIGURED if found else Outcome.CREATED
        if dry_run:
            return Written(outcome, 0)
        put = Put(self.keys.manifest(record.id), encode(record, traceparent=traceparent))
        return Written(outcome, await self._write(put, found))

    async def delete_manifest(self, manifest: str, *, expected: int | None) -> int:
        found = await self._find(manifest, expected)
        if found is None:
            raise NotFound(f"there is no {manifest}")
        return await self._write(Delete(found.key), found)

    async def _find(self, manifest: str, expected: int | None) -> KeyValue | None:
        found = await self.kv.get(self.keys.manifest(manifest))
        if expected is not None and (found is None or found.mod_revision != expected):
            raise Conflict(f"{manifest} is not at version {expected}", hint="read it again")
        return found

    async def _write(self, operation: Operation, found: KeyValue | None) -> int:
        outcome = await self.kv.transact(
            [operation], [Guard(operation.key, mod_revision=found.mod_revision if found else 0)]
        )
        if isinstance(outcome, Rejected):
            raise Conflict(f"{operation.key} was changed meanwhile", hint="try again")
        return outcome.revision
