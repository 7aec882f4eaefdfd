"""Leaderships won without an election, for tests of what is written with one."""

from __future__ import annotations

from cluster.election import Leadership
from cluster.kv import KV, Delete, Guard, Put
from smc.keys import Keys


async def elect(kv: KV, keys: Keys) -> Leadership:
    """Take the leadership from whoever has it."""
    await kv.transact([Delete(keys.leader)])
    outcome = await kv.transact([Put(keys.leader, b"test")], [Guard(keys.leader, create_revision=0)])
    return Leadership(kv, "test", [Guard(keys.leader, create_revision=outcome.revision)], outcome.revision)
