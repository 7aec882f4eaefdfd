"""P1, P2: the leader may die or freeze. No request fails, another one leads, and a deposed one writes nothing."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from smc.demo import bookstore
from smc.demo.programs import Replica

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

TTL = 5.0
"""Seconds: the leader's lease in these meshes (`Plan.replica_env`)."""
FILES = 10
CROWD = FILES * 300


async def test_a_killed_leader_costs_no_request_and_a_new_endpoint_still_arrives(mesh: Mesh) -> None:
    leader, key = await mesh.leader(), await mesh.leader_key()
    newcomer = bookstore.store("v2", 1)
    async with mesh.prober(rate=150.0) as prober:
        await prober.until(300)
        await leader.kill()
        assert not leader.process.alive
        took = await eventually(lambda: _another_leads(mesh, key), timeout=TTL + 2, what="another replica leads")
        await mesh.add(newcomer)
        await eventually(lambda: _requests(mesh, newcomer.workload), timeout=10, what="the new endpoint gets requests")
        await prober.until(3000)
    prober.assert_clean()
    assert took <= TTL + 2
    assert await mesh.leader() is not leader
    await leader.start()
    await leader.until_ready()


async def test_a_leader_that_was_frozen_in_the_middle_of_its_writes_writes_nothing_more(mesh: Mesh) -> None:
    leader, key = await mesh.leader(), await mesh.leader_key()
    async with mesh.prober(rate=150.0) as prober, _crowd_in_the_making(mesh, "frozen") as crowd:
        leader.process.pause()
        frozen = asyncio.get_running_loop().time()
        assert await crowd.size() < CROWD, "it was frozen too late"
        await eventually(lambda: _another_leads(mesh, key), timeout=2 * TTL, what="another replica leads")
        await eventually(crowd.complete, timeout=20, what="the new leader wrote the rest")
        written = await crowd.read()
        await asyncio.sleep(max(0.0, frozen + 3 * TTL - asyncio.get_running_loop().time()))
        assert leader.process.alive
        leader.process.resume()
        await eventually(lambda: _follows(leader), timeout=20, what="the deposed leader knows that it follows")
        await prober.until(3000)
        assert await crowd.read() == written, "the deposed leader changed nothing"
    prober.assert_clean()
    now = await mesh.leader_key()
    assert key is not None
    assert now is not None
    assert now[1] > key[1]
    await leader.until_ready()


async def test_the_next_write_of_a_leader_that_was_deposed_without_its_knowledge_is_fenced_by_etcd(mesh: Mesh) -> None:
    leader = await mesh.leader()
    fenced = (await leader.metrics())["smc_fenced_writes_total"]
    async with mesh.prober(rate=150.0) as prober, _crowd_in_the_making(mesh, "fenced") as crowd:
        # It renews its lease and looks at its key once a second, and writes every few milliseconds.
        await _delete(mesh, "/smc/demo/leader")
        await eventually(lambda: _fenced(leader, fenced), timeout=20, what="its write was refused")
        await eventually(crowd.complete, timeout=20, what="whoever leads then wrote the rest")
        await prober.until(3000)
    prober.assert_clean()
    assert "a write was fenced" in leader.process.log.read_text()


# ------------------------------------------------------------------------------------------------------ what is read


class _Crowd:
    """Workloads of an identity that is there already, which back nothing: they cost no proxy anything."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self._mesh, self._name = mesh, name

    def write(self) -> None:
        for number in range(FILES):
            self._mesh.write(
                f"{self._name}-{number}", "\n---\n".join(self._workload(number, one) for one in range(300))
            )

    def remove(self) -> None:
        for number in range(FILES):
            self._mesh.write(f"{self._name}-{number}", None)

    def _workload(self, number: int, one: int) -> str:
        return json.dumps(
            {
                "apiVersion": "smc.io/v1alpha1",
                "kind": "Workload",
                "metadata": {"name": f"{self._name}-{number}-{one}", "namespace": "bookbuyer"},
                "spec": {"address": f"127.0.{number}.{one % 250 + 1}", "serviceAccount": "bookbuyer"},
            }
        )

    async def read(self) -> dict[str, tuple[bytes, int]]:
        return await self._mesh.etcd.read(f"/smc/demo/registry/files/workloads/bookbuyer/{self._name}-")

    async def size(self) -> int:
        return len(await self.read())

    async def complete(self) -> bool:
        return await self.size() == CROWD


@asynccontextmanager
async def _crowd_in_the_making(mesh: Mesh, name: str) -> AsyncIterator[_Crowd]:
    """The block begins in the middle of the many transactions that the leader needs for so many workloads."""
    crowd = _Crowd(mesh, name)
    crowd.write()
    try:
        await eventually(crowd.size, timeout=30, every=0.0, what="the leader has begun to write them")
        yield crowd
    finally:
        crowd.remove()


async def _delete(mesh: Mesh, key: str) -> None:
    body = {"key": base64.b64encode(key.encode()).decode()}
    async with mesh.children.http.post(f"http://{mesh.etcd.endpoints[0]}/v3/kv/deleterange", json=body) as answer:
        assert (await answer.json()).get("deleted") == "1"


async def _another_leads(mesh: Mesh, key: object) -> bool:
    now = await mesh.leader_key()
    return now is not None and now != key


async def _requests(mesh: Mesh, workload: str) -> bool:
    return (await mesh.seen_by_apps())[workload] > 0


async def _fenced(replica: Replica, before: float) -> bool:
    return (await replica.metrics())["smc_fenced_writes_total"] > before


async def _follows(replica: Replica) -> bool:
    return (await replica.metrics())["smc_leader"] == 0.0
