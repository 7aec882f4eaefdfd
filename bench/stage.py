"""What every benchmark is played on: a mesh in an etcd of its own."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from bench.shape import Change, Shape
from cluster.etcd import EtcdKV
from cluster.kv import KV, MOST_BYTES, MOST_OPERATIONS, OVERHEAD, Outcome, Put
from smc.certificates import x509
from smc.certificates.authority import Authority, load_authority, load_keyring
from smc.certificates.credential import Credential
from smc.certificates.initialise import initialise
from smc.certificates.signers.local import LocalSigner
from smc.demo import programs
from smc.demo.addresses import Addresses
from smc.demo.processes import Children
from smc.keys import Keys
from smc.model import Name

TRUST_DOMAIN = "bench.smc.internal"
PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The environment of servers, as docs/operations.md recommends it."""
OPEN = 120.0
"""Seconds in which all streams must be in sync."""
AT_ONCE = 8
"""Transactions that are under way while the mesh is written."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """In etcd, and with nobody that serves it yet."""

    shape: Shape
    kv: KV
    keys: Keys
    children: Children
    addresses: Addresses
    directory: Path
    """For this mesh alone, while it is there."""
    _etcd: programs.Etcd
    _authority: Authority
    _roots: tuple[str, ...]

    def replica(self, number: int) -> programs.Replica:
        """One of the mesh, not started yet."""
        files = self.directory / "files"
        files.mkdir(exist_ok=True)
        return programs.replica(
            self.children,
            f"replica-{number}",
            self.addresses.take(),
            etcd=self._etcd,
            mesh=self.keys.mesh_name,
            kek_file=self.directory / "kek",
            files=files,
            env={"SMC_LOG_LEVEL": "warning", **PAGES},
        )

    async def leader(self, ready: float = programs.START) -> programs.Replica:
        """The first replica, started: it is ready, and has issued every identity's certificate.

        Raises:
            ProcessFailed: it ended, or was not ready within `ready` seconds, or had not issued within OPEN.
        """
        leader = self.replica(0)
        await leader.start()
        await leader.until_ready(ready)
        wanted = len(self.shape.identities)

        async def all_there() -> bool:
            return (await self.kv.survey(self.keys.certificates)).count >= wanted

        await leader.process.until(all_there, f"the leader had issued {wanted} certificates", timeout=OPEN)
        return leader

    async def credentials(self) -> Mapping[Name, Credential]:
        """Of each proxy."""
        return {proxy: await self.credential(f"proxy/{proxy}") for proxy in self.shape.proxies}

    async def credential(self, path: str) -> Credential:
        """One for `path` below the trust domain."""
        key = x509.new_key()
        uri = x509.credential_uri(TRUST_DOMAIN, path)
        _, chain = await self._authority.issue(key.public_key(), uri, now=time.time(), ttl=timedelta(hours=24))
        return Credential(uri, chain, x509.private_pem(key).decode(), self._roots)

    def change(self, what: Change, number: int) -> Callable[[], Awaitable[Outcome]]:
        """What makes this change in etcd; all that comes before is done."""
        return partial(self.kv.transact, list(self.shape.change(self.keys, what, number)))


@asynccontextmanager
async def mesh(shape: Shape, *, say: Callable[[str], None]) -> AsyncIterator[Mesh]:
    """Start an etcd, and make the mesh in it.

    Raises:
        SmcError: etcd does not start.
    """
    with tempfile.TemporaryDirectory(prefix="smc-bench-") as name, Addresses() as addresses:
        directory = Path(name)
        async with Children(directory) as children:
            etcd = programs.Etcd(children, await programs.find_etcd(), [addresses.take()])
            say(f"starting etcd {etcd.program.version}")
            await etcd.start()
            kv = EtcdKV(etcd.endpoints)
            try:
                keys = Keys("bench")
                say(f"writing {shape.services} services with {shape.endpoints} endpoints each")
                authority, roots = await _write(kv, keys, shape, directory)
                yield Mesh(shape, kv, keys, children, addresses, directory, etcd, authority, roots)
            finally:
                await kv.close()


async def _write(kv: KV, keys: Keys, shape: Shape, directory: Path) -> tuple[Authority, tuple[str, ...]]:
    """Make the mesh in etcd; returns what signs, and whom all trust."""
    signer = LocalSigner.create(directory / "kek")
    operator = await initialise(kv, keys, signer, TRUST_DOMAIN, time.time())
    chunks = iter(list(_chunks(shape.records(keys))))

    async def write() -> None:
        for chunk in chunks:
            await kv.transact(chunk)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(write())
    keyring = await load_keyring(kv, keys, signer)
    return await load_authority(kv, keys, keyring, signer), operator.roots


def _chunks(puts: Iterable[Put]) -> Iterator[Sequence[Put]]:
    """As few transactions as the store takes them in."""
    chunk: list[Put] = []
    size = 0
    for put in puts:
        more = len(put.key.encode()) + len(put.value) + OVERHEAD
        if len(chunk) == MOST_OPERATIONS or size + more > MOST_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(put)
        size += more
    yield chunk
