"""Which proxies have been ready once: written when a proxy has its listeners, forgotten with its workload.

A lost stream takes nothing back: the control plane being hurt removes no endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable, Mapping

import structlog

from cluster.election import Deposed, Leadership
from cluster.kv import KV, Committed, Delete, Guard, Put, StoreError
from smc import telemetry
from smc.codec import encode
from smc.keys import Keys
from smc.manifests.own import GROUP
from smc.mesh import Mesh
from smc.model import Name
from smc.records import ReadyRecord

LOOK_AGAIN = 5.0
"""Seconds until all proxies are looked at again when none has come."""
RETRY = 1.0
"""Seconds until the store is asked again."""
AT_ONCE = 64
"""Records that are written at the same time."""

log = structlog.get_logger(__name__)


class Readiness:
    """Writes `ready/<namespace>/<workload>` for the proxies of this replica. Belongs to one event loop."""

    def __init__(
        self,
        kv: KV,
        keys: Keys,
        is_known: Callable[[Name], bool],
        all_listening: Callable[[], Iterable[Name]] = tuple,
    ) -> None:
        """
        Args:
            is_known: whether the record is there already, as far as this replica knows.
            all_listening: every proxy here that has its listeners now. They are looked at again and again, because
                what was written may go: a restore of the store takes it back, and the proxy will not say it twice.
        """
        self._kv = kv
        self._keys = keys
        self._is_known = is_known
        self._all_listening = all_listening
        self._seen: dict[Name, None] = {}
        self._arrived = asyncio.Event()

    def listening(self, proxy: Name) -> None:
        """A proxy has ACKed its listeners."""
        if not self._is_known(proxy):
            self._seen[proxy] = None
            self._arrived.set()

    async def run(self) -> None:
        """Write what was seen, however long the store cannot be reached, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_AGAIN):
                    await self._arrived.wait()
            except TimeoutError:
                for proxy in self._all_listening():
                    self.listening(proxy)
            self._arrived.clear()
            while self._seen:
                proxies = list(self._seen)[:AT_ONCE]
                try:
                    await asyncio.gather(*(self._write(proxy) for proxy in proxies))
                except StoreError as e:
                    log.warning("that proxies are ready cannot be written yet", proxies=len(self._seen), error=str(e))
                    await asyncio.sleep(RETRY)
                else:
                    for proxy in proxies:
                        self._seen.pop(proxy, None)

    async def _write(self, proxy: Name) -> None:
        key = self._keys.ready(proxy)
        outcome = await self._kv.transact([Put(key, encode(ReadyRecord(proxy)))], [Guard(key, create_revision=0)])
        if isinstance(outcome, Committed):
            log.info("a proxy is ready", **{telemetry.PROXY: str(proxy)})


async def forget(leadership: Leadership, kv: KV, keys: Keys, meshes: AsyncIterable[Mesh]) -> None:
    """Take back the readiness of workloads that are gone, and what their proxies said of their trust: one of that name
    that comes later has to prove its own.

    Raises:
        Deposed: another replica leads.
    """
    before: Mapping[Name, bool] = {}
    async for mesh in meshes:
        # Else nobody has gone or come back since.
        if mesh.departed is not before and (not mesh.departed or await _forget(leadership, kv, keys, mesh)):
            before = mesh.departed


async def _forget(leadership: Leadership, kv: KV, keys: Keys, mesh: Mesh) -> bool:
    """Delete the records of who has gone, however long the store cannot be reached; False: somebody is there again."""
    while True:
        try:
            return all([await _delete(leadership, kv, keys, mesh, name) for name in mesh.departed])
        except Deposed:
            raise
        except StoreError as e:
            log.warning("the readiness of workloads that are gone cannot be taken back yet", error=str(e))
        await asyncio.sleep(RETRY)


async def _delete(leadership: Leadership, kv: KV, keys: Keys, mesh: Mesh, name: Name) -> bool:
    found = await kv.get(keys.ready(name))
    if found is None:
        return True
    # One that came back keeps its record: its proxy may have been seen already, and nobody would write it again.
    absent = [keys.manifest(f"{GROUP}/Workload/{name}")]
    absent += [keys.workload(source, name) for source in sorted(mesh.synced)]
    guards = [Guard(found.key, mod_revision=found.mod_revision), *(Guard(key, create_revision=0) for key in absent)]
    outcome = await leadership.transact([Delete(found.key), Delete(keys.trust(name))], guards)
    return isinstance(outcome, Committed)
