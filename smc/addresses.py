"""Virtual IP addresses: a service without an address of its own gets one, keeps it, and leaves it once it is gone.

Only who is intercepted dials addresses. So none is given while no workload is: an explicit mesh has no key of these,
and its leader nothing to do. What was given stays with its service, even when the last such workload goes: an address
that comes and goes would be in somebody's cache.

There is a key for each service, written by the leader alone. That no two have one address rests on three things. A
leader begins by listing what there is, and no write of one before it can come after that: it is fenced. It writes one
transaction at a time, and sends one whose answer was lost again until it knows what became of it. And each write names
the version that it replaces, so that of two attempts at most one is applied.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from operator import attrgetter

import structlog

from cluster.election import Deposed, Leadership
from cluster.kv import KV, Committed, Delete, Guard, KeyValue, Operation, Put, StoreError
from smc.codec import UnreadableRecord, decode, encode
from smc.envoy import names
from smc.keys import Keys
from smc.manifests.own import GROUP
from smc.mesh import Mesh
from smc.model import Name
from smc.records import AddressRecord

KEEP = 600.0
"""Seconds that a service has to be gone before another may get its address: longer than a look-up is remembered."""
RETRY = 1.0
"""Seconds until the store is asked again."""
AT_ONCE = 100
"""Addresses that are given in one transaction."""
RELEASED_AT_ONCE = 16
"""Fewer: each asks the store whether the service is still gone, in every place where it may be."""

_NETWORK = IPv4Network(names.VIRTUAL_ADDRESSES)
_FIRST, _COUNT = int(_NETWORK.network_address) + 1, _NETWORK.num_addresses - 2
"""Without the first, which is the network's name, and the last, which is everybody's."""

_by_name = attrgetter("namespace", "name")

log = structlog.get_logger(__name__)


def candidates(service: Name) -> Iterator[str]:
    """Every virtual address, in the order in which a service tries them: the same in every mesh and at every time."""
    digest = hashlib.blake2b(str(service).encode(), digest_size=8).digest()
    start = int.from_bytes(digest, "big")
    for offset in range(_COUNT):
        yield str(IPv4Address(_FIRST + (start + offset) % _COUNT))


def assign(services: Collection[Name], held: Mapping[Name, str], own: Iterable[str]) -> Iterator[tuple[Name, str]]:
    """The addresses that have to be given, so that each of `services` has one to itself.

    Args:
        services: who needs one.
        held: what each service has, whether it needs it or not; "" for what is no virtual address.
        own: addresses that some service has of its own.
    """
    taken = {*own, ""}
    # Who does not need its address keeps it from the others all the same.
    taken.update(address for name, address in held.items() if name not in services)
    without = []
    for name in sorted(services, key=_by_name):
        if held.get(name, "") in taken:
            without.append(name)
        else:
            taken.add(held[name])
    for name in without:
        address = next(address for address in candidates(name) if address not in taken)
        taken.add(address)
        yield name, address


async def run(leadership: Leadership, kv: KV, keys: Keys, meshes: AsyncIterable[Mesh]) -> None:
    """Give addresses and take them back, however long the store cannot be reached, until cancelled.

    Raises:
        Deposed (in a group): another replica leads.
    """
    term = _Term(leadership, kv, keys)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(term.follow(meshes), name="addresses: meshes")
        tasks.create_task(term.work(), name="addresses")


@dataclass(frozen=True, slots=True)
class _Held:
    """What is stored for a service."""

    address: str
    """"": nothing that can be used."""
    mod_revision: int


class _Term:
    """The addresses during one term of leadership."""

    def __init__(self, leadership: Leadership, kv: KV, keys: Keys) -> None:
        self._leadership = leadership
        self._kv = kv
        self._keys = keys
        self._mesh: Mesh | None = None
        self._changed = asyncio.Event()
        self._held: dict[Name, _Held] = {}
        self._gone: dict[Name, float] = {}
        """Since when a service that has an address is not there, by the loop's clock."""

    async def follow(self, meshes: AsyncIterable[Mesh]) -> None:
        async for mesh in meshes:
            before, self._mesh = self._mesh, mesh
            if before is None or (before.own_addresses, before.intercepts) != (mesh.own_addresses, mesh.intercepts):
                self._changed.set()

    async def work(self) -> None:
        await self._changed.wait()
        await self._load()
        while True:
            self._changed.clear()
            if self._mesh is not None:
                await self._give(self._mesh)
                await self._release(self._mesh)
            await self._wait()

    async def _wait(self) -> None:
        """Until there is something to do, which may be now."""
        due = min(self._gone.values()) + KEEP if self._gone else None
        try:
            async with asyncio.timeout_at(due):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _load(self) -> None:
        while True:
            try:
                listing = await self._kv.list(self._keys.addresses)
            except StoreError as e:
                log.warning("the addresses of services cannot be read yet", error=str(e))
                await asyncio.sleep(RETRY)
            else:
                self._held = {}
                for item in listing.items:
                    namespace, slash, name = item.key.removeprefix(self._keys.addresses).partition("/")
                    if slash:
                        self._held[Name(namespace, name)] = _Held(_address(item), item.mod_revision)
                return

    async def _give(self, mesh: Mesh) -> None:
        own = mesh.own_addresses
        needing = {name for name, address in own.items() if not address} if mesh.intercepts else set()
        complete = False
        while not complete:
            complete = True
            given = assign(needing, {name: held.address for name, held in self._held.items()}, own.values())
            while complete and (batch := dict(islice(given, AT_ONCE))):
                complete = await self._write(
                    [Put(self._keys.address(name), encode(AddressRecord(name, to))) for name, to in batch.items()],
                    [self._unchanged(name) for name in batch],
                    batch,
                )

    async def _release(self, mesh: Mesh) -> None:
        now = asyncio.get_running_loop().time()
        gone = self._held.keys() - mesh.own_addresses.keys()
        self._gone = {name: self._gone.get(name, now) for name in gone}
        over = sorted(name for name, since in self._gone.items() if since + KEEP <= now)
        for start in range(0, len(over), RELEASED_AT_ONCE):
            batch = over[start : start + RELEASED_AT_ONCE]
            guards = [guard for name in batch for guard in (self._unchanged(name), *self._absent(name, mesh))]
            await self._write([Delete(self._keys.address(name)) for name in batch], guards, dict.fromkeys(batch))
        for name in over:  # one that came back meanwhile: a newer Mesh has it
            self._gone.pop(name, None)
            if name in self._held:
                self._gone[name] = now

    def _unchanged(self, name: Name) -> Guard:
        held = self._held.get(name)
        return Guard(self._keys.address(name), mod_revision=held.mod_revision if held is not None else 0)

    def _absent(self, name: Name, mesh: Mesh) -> Iterator[Guard]:
        yield Guard(self._keys.manifest(f"{GROUP}/Service/{name}"), create_revision=0)
        for source in sorted(mesh.synced):
            yield Guard(self._keys.service(source, name), create_revision=0)

    async def _write(
        self, operations: Sequence[Operation], guards: Sequence[Guard], now: Mapping[Name, str | None]
    ) -> bool:
        """Write what services have from now on. False: what is stored was not what was thought; it was read again."""
        while True:
            try:
                outcome = await self._leadership.transact(operations, guards)
            except Deposed:
                raise
            except StoreError as e:
                log.warning("the addresses of services cannot be written yet", error=str(e))
                await asyncio.sleep(RETRY)
                continue
            if not isinstance(outcome, Committed):
                await self._load()
                return False
            for name, address in now.items():
                if address is None:
                    del self._held[name]
                else:
                    self._held[name] = _Held(address, outcome.revision)
            log.info("addresses of services", given=sum(a is not None for a in now.values()), services=len(now))
            return True


def _address(item: KeyValue) -> str:
    try:
        address = decode(AddressRecord, item.value, key=item.key).address
        return address if IPv4Address(address) in _NETWORK else ""
    except (UnreadableRecord, ValueError) as e:
        log.warning("an address cannot be read; its service gets another", key=item.key, error=str(e))
        return ""
