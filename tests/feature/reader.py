"""A replica in a process of its own that reads the store and says, byte for byte, what each proxy should have.

    PYTHONHASHSEED=1 python -m tests.feature.reader 127.0.0.1:2379 books

It writes the revision of every View that it has built, a line each. When its standard input ends, it writes what it
has made, as JSON in a line, and ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog

from cluster.etcd import EtcdKV
from cluster.kv import Batch, Compacted, Status
from cluster.mirror import Mirror
from smc import plugins
from smc.envoy.snapshot import Generator
from smc.keys import Keys
from smc.mesh import Mesh, build
from smc.model import Name
from smc.xds.snapshot import Snapshot


class CountingKV(EtcdKV):
    """Counts how often a watch came too late for what the store keeps."""

    compactions = 0

    async def watch(self, prefix: str, after: Status) -> AsyncGenerator[Batch, None]:
        async with aclosing(super().watch(prefix, after)) as batches:
            try:
                async for batch in batches:
                    yield batch
            except Compacted:
                self.compactions += 1
                raise


class Reader:
    """What a replica's pipeline does, without its streams."""

    def __init__(self, kv: CountingKV, keys: Keys) -> None:
        self._kv = kv
        self._mirror = Mirror(kv, keys.root, keys.feeds_mesh)
        self._generator = Generator(lambda record: record.sealed_key)
        self._mesh: Mesh | None = None
        self._snapshots: dict[Name, Snapshot] = {}
        self._views = 0

    async def follow(self) -> None:
        async with aclosing(self._mirror.follow()) as views:
            async for view in views:
                self._mesh = build(self._mesh, view, plugins.policies())
                self._snapshots = {
                    # As the pipeline does: a proxy that is not affected keeps what it had.
                    name: self._generator.snapshot(self._mesh, name)
                    if name in self._mesh.affected or name not in self._snapshots
                    else self._snapshots[name]
                    for name in sorted(self._mesh.proxies)
                }
                self._views += 1
                sys.stdout.write(f"{view.revision}\n")
                sys.stdout.flush()

    def report(self) -> dict[str, Any]:
        assert self._mesh is not None
        return {
            # Differs with the seed of hashes: that of numbers does not.
            "seed": hash("a text"),
            "views": self._views,
            "compactions": self._kv.compactions,
            "revision": self._mesh.revision,
            "problems": {
                manifest: [str(problem) for problem in problems] for manifest, problems in self._mesh.problems.items()
            },
            "proxies": {str(name): _said(snapshot) for name, snapshot in self._snapshots.items()},
        }


def _said(snapshot: Snapshot) -> dict[str, Any]:
    """By type, the version of the set, and of each resource, in order, all that reaches a stream."""
    return {
        type_.name: {
            "version": resources.version,
            "resources": [
                [
                    resource.name,
                    resource.version,
                    len(resource.body),
                    hashlib.sha256(resource.body).hexdigest(),
                    [[source.manifest, source.mod_revision] for source in resource.sources],
                    [[warmed.name, name] for warmed, name in resource.warms],
                ]
                for resource in resources.resources.values()
            ],
        }
        for type_, resources in snapshot.sets.items()
    }


async def main(endpoint: str, mesh: str) -> None:
    kv = CountingKV([endpoint], tls=None, timeout=5.0)
    reader = Reader(kv, Keys(mesh))
    try:
        following = asyncio.create_task(reader.follow())
        told = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
        ending = asyncio.create_task(told.read())
        await asyncio.wait([following, ending], return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            await following
        following.cancel()
        await asyncio.wait([following])
    finally:
        await kv.close()
    sys.stdout.write(json.dumps(reader.report()) + "\n")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(*sys.argv[1:]))
