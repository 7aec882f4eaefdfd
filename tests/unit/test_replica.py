"""What ends a replica, and what must not: all of its parts, on a store in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import structlog

from cluster.kv import KV, Refused
from cluster.members import Members
from cluster.memory import MemoryKV, MemoryStore
from smc import plugins, replica, serve
from smc.certificates.initialise import initialise
from smc.certificates.signers.local import LocalSigner
from smc.config import Settings, duration
from smc.errors import Conflict
from smc.keys import Keys

KEYS = Keys("default")
SIGNER = LocalSigner(b"k" * 32)
SETTINGS = Settings(
    name="replica-1", etcd=("unused:1",), kek_file=Path("unused"), address="127.0.87.1", lease_ttl=duration("2s")
)


class Full(MemoryKV):
    """A store that has no room for a lease while it is `full`, as an etcd beyond its quota."""

    full = True

    async def grant(self, ttl: float) -> int:
        if self.full:
            raise Refused("etcd refused granting a lease: database space exceeded")
        return await super().grant(ttl)


async def served_from(kv: KV, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a replica on a new mesh until it ends."""
    monkeypatch.setattr(plugins, "store", lambda _: kv)
    monkeypatch.setattr(plugins, "signer", lambda _: SIGNER)
    await serve._until_stopped(SETTINGS)


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in the store
            await asyncio.sleep(0.02)


async def test_a_name_that_another_live_replica_has_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    kv = MemoryKV(store)
    await initialise(kv, KEYS, SIGNER, "mesh.example", time.time())
    other = asyncio.create_task(Members(kv, KEYS.members).announce("replica-1", lambda: b"{}", ttl=2.0))
    await until(lambda: kv.get(f"{KEYS.members}replica-1"))
    try:
        with pytest.raises(Conflict, match=r"another live replica holds .*replica-1: give this one another name"):
            async with asyncio.timeout(20):
                await served_from(MemoryKV(store), monkeypatch)
    finally:
        other.cancel()
        await asyncio.wait((other,))


async def test_a_store_that_is_full_ends_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "RENEW_RETRY", 0.05)
    kv = Full(MemoryStore())
    await initialise(kv, KEYS, SIGNER, "mesh.example", time.time())
    running = asyncio.create_task(served_from(kv, monkeypatch))
    try:
        done, _ = await asyncio.wait((running,), timeout=0.5)
        assert not done
        kv.full = False

        async def is_ready() -> bool:
            item = await kv.get(f"{KEYS.members}replica-1")
            return item is not None and b'"ready":true' in item.value

        await until(is_ready)
    finally:
        running.cancel()
        await asyncio.wait((running,))


async def test_that_a_replica_leads_and_that_it_leads_no_longer_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = MemoryKV(MemoryStore())
    await initialise(kv, KEYS, SIGNER, "mesh.example", time.time())
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(served_from(kv, monkeypatch))

        async def led() -> bool:
            return any(line["event"] == "leading" for line in logs)

        await until(led)
        running.cancel()
        await asyncio.wait((running,))
    assert [line["event"] for line in logs if "leading" in line["event"]] == ["leading", "leading no longer"]
