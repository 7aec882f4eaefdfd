"""P5: `apply --wait` returns once every proxy has it, and not before, whoever of the control plane dies meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from e2e.kit.prober import statuses
from smc.cli.session import Config
from smc.demo import bookstore
from smc.demo.processes import ProcessFailed
from smc.demo.programs import Replica

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

BUYER = "bookbuyer/bookbuyer"
REQUESTS = 200


async def _apply(mesh: Mesh, v1: int, v2: int, patience: str) -> str:
    path = mesh.directory / "split.yaml"
    await asyncio.to_thread(path.write_text, bookstore.split(v1, v2))
    return await mesh.smc("apply", "-f", str(path), f"--wait={patience}")


async def _all_reach(mesh: Mesh, version: str) -> None:
    probes = await mesh.send(REQUESTS)
    assert statuses(probes) == {200: REQUESTS}
    assert Counter(probe.version for probe in probes) == {version: REQUESTS}


async def test_when_it_returns_every_request_obeys(mesh: Mesh) -> None:
    await mesh.wait_synced()
    for v1, v2 in [(100, 0), (0, 100)] * 5:
        await _apply(mesh, v1, v2, "30s")
        await _all_reach(mesh, "v1" if v1 else "v2")


async def test_an_envoy_that_does_not_answer_is_named_and_has_it_once_it_does(mesh: Mesh) -> None:
    await _apply(mesh, 0, 100, "30s")
    with mesh.sidecar(BUYER).stopped():
        with pytest.raises(ProcessFailed) as e:
            await _apply(mesh, 100, 0, "5s")
        assert "ended with 6:" in str(e.value)
        (laggard,) = [line for line in str(e.value).splitlines() if line.startswith("warning: ")]
        assert laggard.startswith(f"warning: {BUYER} at replica-")
        assert laggard.endswith(": pending")
        waiting = asyncio.create_task(_apply(mesh, 100, 0, "30s"))
        await asyncio.sleep(3)
        assert not waiting.done()
    assert "unchanged" in await waiting
    await _all_reach(mesh, "v1")


async def test_delete_waits_too(mesh: Mesh) -> None:
    await _apply(mesh, 0, 100, "30s")
    await mesh.smc("delete", "trafficsplit", "bookstore", "-n", "bookstore", "--wait")
    versions = {probe.version for probe in await mesh.send(REQUESTS)}
    assert versions == {"v1", "v2"}, "without a split the root's own endpoints serve"


@pytest.mark.parametrize("who", ["the one that is asked", "the leader", "the one that serves the laggard"])
async def test_a_replica_may_die_while_it_is_waited_for(mesh: Mesh, who: str) -> None:
    await _apply(mesh, 100, 0, "30s")
    buyer = mesh.sidecar(BUYER)
    victim = await _replica(mesh, who)
    with buyer.stopped():
        waiting = asyncio.create_task(_apply(mesh, 0, 100, "25s"))
        await asyncio.sleep(2.5)
        assert not waiting.done()
        await victim.kill()
        # Longer than the lease of the dead, and than a proxy is looked for that nobody has seen.
        await asyncio.sleep(10)
        assert not waiting.done(), "the laggard has not ACKed, wherever it is"
    assert "configured" in await waiting
    await _all_reach(mesh, "v2")
    await victim.start()
    await victim.until_ready()
    await eventually(lambda: _connected(mesh), timeout=20, what="every proxy is connected")


async def _replica(mesh: Mesh, who: str) -> Replica:
    match who:
        case "the leader":
            return await mesh.leader()
        case "the one that is asked":
            first = Config.read(mesh.credential).servers[0]
            return next(replica for replica in mesh.replicas if replica.api == first)
        case _:
            identifier = await mesh.sidecar(BUYER).admin.identifier()
            return next(replica for replica in mesh.replicas if replica.name in identifier)


async def _connected(mesh: Mesh) -> bool:
    return {proxy["name"] for proxy in await mesh.proxies()} == set(mesh.sidecars)
