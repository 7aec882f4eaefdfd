"""P1, P3: any replica may die. No request fails, and a proxy that moves to another one is sent nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from smc.demo import bookstore
from smc.demo.programs import Replica, Sidecar

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

GREETED = ("cluster_manager.cds.update_success", "listener_manager.lds.update_success")
LITTLE = 2048
"""Bytes: less than one Cluster with its TLS context and a handshake. About 500 were seen."""


async def test_a_killed_replica_costs_no_request_and_nothing_is_sent_again(mesh: Mesh) -> None:
    await mesh.apply(bookstore.split(50, 50))
    await mesh.wait_synced()
    victim = await _the_one_with_streams(mesh)
    moving = [s for s in mesh.sidecars.values() if victim.name in await s.admin.identifier()]
    assert moving
    before = {s.workload: await _received(s) for s in mesh.sidecars.values()}
    others = [replica for replica in mesh.replicas if replica is not victim]
    sent_before = [await _resources_sent(replica) for replica in others]

    async with mesh.prober(rate=150.0) as prober:
        await prober.until(500)
        pid = victim.process.pid
        await victim.kill()
        assert victim.process.pid == pid
        assert not victim.process.alive
        took = await eventually(
            lambda: _all_moved(moving, victim), timeout=5.0, what="every proxy of the dead replica is served by another"
        )
        await prober.until(3000)
    prober.assert_clean()
    assert took < 5.0

    for sidecar in mesh.sidecars.values():
        then, now = before[sidecar.workload], await _received(sidecar)
        opened = now.streams - then.streams
        # One each, unless chance put all on the same replica, and balance one of them back.
        assert opened in ((1, 2) if sidecar in moving else (0, 1))
        assert now.updates.keys() == then.updates.keys()
        for name, count in then.updates.items():
            # Each stream begins with one empty answer to a wildcard, which says that there is nothing to tell.
            greetings = opened if name in GREETED else 0
            assert now.updates[name] == count + greetings, f"{sidecar.workload}: {name} was {count}, {opened} streams"
        assert now.contexts == then.contexts
        assert now.total - then.total < LITTLE * max(1, opened)
    assert [await _resources_sent(replica) for replica in others] == sent_before

    await victim.start()
    await victim.until_ready()


async def test_a_replica_that_is_asked_to_stop_costs_no_request_and_gives_the_lead_away_at_once(mesh: Mesh) -> None:
    leader = await mesh.leader()
    key = await mesh.leader_key()
    async with mesh.prober(rate=150.0) as prober:
        await prober.until(300)
        leader.process.terminate()
        took = await eventually(lambda: _another_leads(mesh, key), timeout=4.0, what="another replica leads")
        await leader.process.wait()
        assert leader.process.returncode == 0
        await prober.until(3000)
    prober.assert_clean()
    assert took < 4.0, "the lease lives for 5 s: it was given back, not waited for"
    await leader.start()
    await leader.until_ready()


# ------------------------------------------------------------------------------------------------------ what is read


@dataclass(frozen=True, slots=True)
class _Received:
    """What an Envoy has received so far."""

    streams: int
    """How many it has opened."""
    updates: dict[str, int]
    contexts: dict[str, int]
    total: int
    """Bytes."""


async def _received(sidecar: Sidecar) -> _Received:
    admin = sidecar.admin
    return _Received(
        await admin.stat("cluster.xds.upstream_rq_total"),
        await admin.updates(),
        await admin.secret_updates(),
        await admin.control_plane_bytes(),
    )


async def _resources_sent(replica: Replica) -> float:
    metrics = await replica.metrics()
    return sum(value for name, value in metrics.items() if name.startswith("smc_xds_resources_sent_total"))


async def _the_one_with_streams(mesh: Mesh) -> Replica:
    """The replica that most proxies are served by, once streams have stopped moving for the sake of balance."""
    last: list[str] = []
    for _ in range(30):
        now = sorted((await mesh.serving()).values())
        if now == last:
            break
        last = now
        await asyncio.sleep(2.0)
    return max(mesh.replicas, key=lambda replica: sum(replica.name in identifier for identifier in last))


async def _all_moved(moving: list[Sidecar], victim: Replica) -> bool:
    said = await asyncio.gather(*(sidecar.admin.identifier() for sidecar in moving))
    return all(identifier and victim.name not in identifier for identifier in said)


async def _another_leads(mesh: Mesh, key: object) -> bool:
    now = await mesh.leader_key()
    return now is not None and now != key
