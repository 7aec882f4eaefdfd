"""What the leader does, and nobody else: observe, issue, judge NACKs, and keep the store small.

All of it ends with the leadership, and every write carries its fence.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from cluster.backoff import Backoff
from cluster.election import Leadership
from cluster.kv import KV, StoreError
from smc import addresses, informers, quarantine, readiness
from smc.certificates.issuing import Issuer, Wanted
from smc.certificates.revoking import Revoked
from smc.errors import SmcError
from smc.keys import Keys
from smc.mesh import Mesh
from smc.model import Identity, Name
from smc.registry import Registry

COMPACT_EVERY = 300.0
KEEP_HISTORY = 600.0
"""Seconds: a replica that was away for less catches up without listing everything again."""
FIRST_RETRY, LAST_RETRY = 1.0, 30.0
"""Seconds between attempts to load the authority, doubled each time; see `Backoff`."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Duties:
    kv: KV
    keys: Keys
    registry: Registry
    informers: Sequence[informers.Informer]
    issuer: Issuer
    meshes: Callable[[], AsyncGenerator[Mesh, None]]
    """Each newer Mesh, from when every source has been observed: before that nobody knows what is not there."""
    compacts: bool
    """Whether this mesh has its etcd for itself."""

    async def run(self, leadership: Leadership) -> None:
        """Lead until cancelled or deposed.

        Raises:
            Deposed, HistoryChanged (in a group): it is over.
        """
        async with (
            aclosing(self.meshes()) as for_issuer,
            aclosing(self.meshes()) as for_readiness,
            aclosing(self.meshes()) as for_quarantine,
            aclosing(self.meshes()) as for_addresses,
            aclosing(_wanted(for_issuer)) as wanted,
            asyncio.TaskGroup() as tasks,
        ):
            for informer in self.informers:
                tasks.create_task(informers.run(leadership, self.registry, informer), name=f"informer {informer.name}")
            tasks.create_task(self._issue(leadership, wanted), name="issuer")
            tasks.create_task(quarantine.run(leadership, self.kv, self.keys), name="quarantine")
            tasks.create_task(readiness.forget(leadership, self.kv, self.keys, for_readiness), name="readiness")
            ended = quarantine.forget(leadership, self.kv, self.keys, for_quarantine)
            tasks.create_task(ended, name="ended quarantines")
            given = addresses.run(leadership, self.kv, self.keys, for_addresses)
            tasks.create_task(given, name="addresses")
            if self.compacts:
                tasks.create_task(compact(self.kv), name="compaction")

    async def _issue(self, leadership: Leadership, wanted: AsyncIterable[Wanted]) -> None:
        """Have certificates issued. While the authority cannot be loaded there are none, and all else goes on."""
        backoff = Backoff(FIRST_RETRY, LAST_RETRY)
        while True:
            try:
                await self.issuer.run(leadership, wanted)
            except SmcError as e:
                log.warning("no certificate can be issued; trying on", error=str(e))
            await backoff.wait()


async def _wanted(meshes: AsyncGenerator[Mesh, None]) -> AsyncGenerator[Wanted, None]:
    last: Wanted | None = None
    async for mesh in meshes:
        config = mesh.config
        wanted = Wanted(
            mesh.identities - mesh.revoked_identities.keys() if mesh.revoked_identities else mesh.identities,
            config.workload_certificate_ttl,
            config.credential_ttl,
            _revoked(mesh),
        )
        if wanted != last:
            last = wanted
            yield wanted


def _revoked(mesh: Mesh) -> Revoked:
    since: dict[Identity, int] = {}
    for revoked in mesh.revoked_proxies.values():
        if revoked.identity is not None and revoked.identity not in mesh.revoked_identities:
            since[revoked.identity] = max(revoked.revision, since.get(revoked.identity, 0))
    if not (since or mesh.revoked_identities):
        return Revoked()
    others: dict[Identity, set[Name]] = {identity: set() for identity in since}
    banned: dict[Name, Identity] = {}
    for name, proxy in mesh.proxies.items():
        identity = proxy.workload.identity
        if identity in mesh.revoked_identities:
            banned[name] = identity
        elif identity in others and not mesh.is_out(name):
            others[identity].add(name)
    held = {identity: frozenset(names) for identity, names in others.items()}
    return Revoked(frozenset(mesh.revoked_identities), since, held, banned)


async def compact(kv: KV) -> None:
    """Have the store forget what is older than KEEP_HISTORY, every COMPACT_EVERY seconds, until cancelled."""
    loop = asyncio.get_running_loop()
    seen: deque[tuple[float, int]] = deque()
    while True:
        try:
            seen.append((loop.time(), (await kv.status()).revision))
            old = None
            while seen and seen[0][0] <= loop.time() - KEEP_HISTORY:
                old = seen.popleft()[1]
            if old is not None:
                await kv.compact(old)
                log.info("the store forgot its history", before=old)
        except StoreError as e:
            log.warning("the store could not be compacted", error=str(e))
        await asyncio.sleep(COMPACT_EVERY)
