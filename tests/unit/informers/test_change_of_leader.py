"""A mistake in a file, then a change of leader: the new one has never read what the file said, and removes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.memory import MemoryKV
from smc import informers
from smc.codec import decode
from smc.demo import bookstore
from smc.informers.files import FilesInformer
from smc.keys import Keys
from smc.model import Name
from smc.records import SyncedRecord
from smc.registry import Registry
from tests.unit.leadership import elect

KEYS = Keys("default")
SYNCED = KEYS.synced("files")


class Replicas:
    """Of each call another replica leads, one that has just been started."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kv = MemoryKV()

    def write(self, name: str, text: str) -> None:
        new = self._directory / f"{name}.new"
        new.write_text(text)
        new.rename(self._directory / f"{name}.yaml")

    async def lead(self, until: Callable[[dict[str, bytes], bool], bool]) -> dict[str, bytes]:
        """Lead until the registry is as it should be, given also whether there are Problems; returns what is in it."""
        leading, registry = await elect(self._kv, KEYS), Registry(self._kv, KEYS)
        task = asyncio.create_task(informers.run(leading, registry, FilesInformer(self._directory, poll=0.01)))
        try:
            async with asyncio.timeout(20):
                while True:
                    found = {item.key: item.value for item in (await self._kv.list(KEYS.source("files"))).items}
                    synced = found.pop(SYNCED, None)
                    if synced and until(found, bool(decode(SyncedRecord, synced).problems)):
                        return found
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.mark.parametrize(("spoilt", "left"), [("services", 2), ("bookstore-v1", 7)])
async def test_a_mistake_before_a_change_of_leader_takes_nothing_away(tmp_path: Path, spoilt: str, left: int) -> None:
    replicas = Replicas(tmp_path)
    first, second = bookstore.store("v1"), bookstore.store("v2")
    replicas.write("services", bookstore.services())
    replicas.write("bookstore-v1", bookstore.workload(first, "127.0.0.9"))
    replicas.write("bookstore-v2", bookstore.workload(second, "127.0.0.10"))
    before = await replicas.lead(lambda found, problems: not problems)
    assert len(before) == 8  # three services, with their endpoints, and two workloads
    assert b"127.0.0.9" in before[KEYS.endpoints("files", Name("bookstore", "bookstore"))]

    replicas.write(spoilt, "nonsense")
    assert await replicas.lead(lambda found, problems: problems) == before

    replicas.write("bookstore-v2", bookstore.workload(second, "127.0.0.77"))
    moved = await replicas.lead(lambda found, _: any(b"127.0.0.77" in value for value in found.values()))
    assert moved.keys() == before.keys()
    for key in (KEYS.workload("files", Name("bookstore", "bookstore-v1")), *map(_endpoints, first.services)):
        assert moved[key] == before[key] or b"127.0.0.9" in moved[key]

    (tmp_path / f"{spoilt}.yaml").unlink()
    await replicas.lead(lambda found, _: len(found) == left)


def _endpoints(service: str) -> str:
    return KEYS.endpoints("files", Name("bookstore", service))
