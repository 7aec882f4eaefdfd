"""What every benchmark is played on: a mesh in etcd, replicas that serve it, and a credential for each proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from bench.shape import Shape
from cluster.kv import KV, MOST_BYTES, MOST_OPERATIONS, OVERHEAD, Put
from smc.certificates import x509
from smc.certificates.authority import Authority, load_authority, load_keyring
from smc.certificates.credential import Credential
from smc.certificates.initialise import initialise
from smc.certificates.signers.local import LocalSigner
from smc.demo import programs
from smc.demo.processes import Children, Process
from smc.keys import Keys
from smc.model import Name

MESH = "bench"
TRUST_DOMAIN = "bench.smc.internal"
OPEN = 120.0
"""Seconds in which all streams must be in sync."""
AT_ONCE = 8
"""Transactions that are under way while the mesh is written."""


async def mesh(kv: KV, keys: Keys, shape: Shape, directory: Path) -> tuple[Authority, tuple[str, ...]]:
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


def replica(children: Children, etcd: programs.Etcd, name: str, address: str, directory: Path) -> programs.Replica:
    """One of the mesh, not started yet. `directory` is that of `mesh`."""
    files = directory / "files"
    files.mkdir(exist_ok=True)
    return programs.replica(
        children,
        name,
        address,
        etcd=etcd,
        mesh=MESH,
        kek_file=directory / "kek",
        files=files,
        env={"SMC_LOG_LEVEL": "warning"},
    )


async def certified(kv: KV, keys: Keys, shape: Shape, process: Process) -> None:
    """Until the leader has issued every identity's certificate. `process` is the leader's.

    Raises:
        ProcessFailed: it ended, or did not within OPEN seconds.
    """

    async def all_there() -> bool:
        return (await kv.survey(keys.certificates)).count >= len(shape.identities)

    await process.until(all_there, f"the leader had issued {len(shape.identities)} certificates", timeout=OPEN)


async def credentials(
    authority: Authority, roots: tuple[str, ...], proxies: Sequence[Name]
) -> Mapping[Name, Credential]:
    return {proxy: await signed(authority, roots, f"proxy/{proxy}") for proxy in proxies}


async def signed(authority: Authority, roots: tuple[str, ...], path: str) -> Credential:
    """A credential of the mesh, for `path` below its trust domain."""
    key = x509.new_key()
    uri = x509.credential_uri(TRUST_DOMAIN, path)
    _, chain = await authority.issue(key.public_key(), uri, now=time.time(), ttl=timedelta(hours=24))
    return Credential(uri, chain, x509.private_pem(key).decode(), roots)
