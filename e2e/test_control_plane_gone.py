"""P1, P3, P8: every replica may be gone. No request fails, and when they are back no Envoy is given anything new."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from smc.demo import bookstore
from smc.demo.programs import Sidecar

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

GONE = 30.0
"""Seconds without any control plane."""
BACK = 10.0
"""Seconds after which every Envoy has found back, from when the first replica is ready."""
WHEN = frozenset({"last_updated", "health_status"})
"""What a dump says of the moment and not of the configuration: Envoy also finds that no replica answers it."""


async def test_all_replicas_may_be_gone_for_half_a_minute_and_nothing_differs_afterwards(mesh: Mesh) -> None:
    await mesh.apply(bookstore.split(50, 50))
    await mesh.wait_synced()
    sidecars = list(mesh.sidecars.values())
    before = {sidecar.workload: await _configuration(mesh, sidecar) for sidecar in sidecars}
    counted = {sidecar.workload: await _counted(sidecar) for sidecar in sidecars}
    loop = asyncio.get_running_loop()

    async with mesh.prober(rate=100.0) as prober:
        await prober.until(300)
        async with asyncio.TaskGroup() as tasks:
            for replica in mesh.replicas:
                tasks.create_task(replica.kill())
        gone = loop.time()
        await eventually(lambda: _connected(sidecars, 0), timeout=5, what="no Envoy has a control plane")
        while loop.time() < gone + GONE:
            # An attempt that is just failing counts as connected.
            await eventually(lambda: _connected(sidecars, 0), timeout=3, what="no Envoy has a control plane")
            assert not any(replica.process.alive for replica in mesh.replicas)
            await asyncio.sleep(0.5)
        assert {sidecar.workload: await _configuration(mesh, sidecar) for sidecar in sidecars} == before

        async with asyncio.TaskGroup() as tasks:
            for replica in mesh.replicas:
                tasks.create_task(replica.start())
        await eventually(lambda: _one_is_ready(mesh), timeout=60, what="a replica is ready again")
        took = await eventually(
            lambda: _connected(sidecars, 1), timeout=BACK, what="every Envoy has a control plane again"
        )
        for replica in mesh.replicas:
            await replica.until_ready(60)
        await mesh.wait_synced()
        # Streams that move to the replicas that were ready later are part of it.
        await prober.more(1000)
        await prober.until(4000)
    prober.assert_clean(4000)
    assert took <= BACK

    for sidecar in sidecars:
        now = await _configuration(mesh, sidecar)
        assert _differing(before[sidecar.workload], now) == [], f"{sidecar.workload} was given something else"
        assert await _counted(sidecar) == counted[sidecar.workload], f"{sidecar.workload} was given something again"


# ------------------------------------------------------------------------------------------------------ what is read


async def _configuration(mesh: Mesh, sidecar: Sidecar) -> dict[str, Any]:
    """All that an Envoy has been configured with, endpoints included, and each version: by the part of its dump."""
    async with mesh.children.http.get(f"{sidecar.admin.url}/config_dump", params={"include_eds": ""}) as answer:
        answer.raise_for_status()
        document = await answer.json(content_type=None)
    found = {config["@type"].rpartition(".")[2]: _timeless(config) for config in document["configs"]}
    assert {"ClustersConfigDump", "ListenersConfigDump", "RoutesConfigDump", "EndpointsConfigDump"} <= found.keys()
    found["hosts"] = {
        name: [(host.address, host.weight) for host in hosts]
        for name, hosts in (await sidecar.admin.clusters()).items()
    }
    return found


def _timeless(value: Any) -> Any:
    """The same without times, and in an order of its own: Envoy keeps much of it in hash tables."""
    match value:
        case dict():
            return {name: _timeless(part) for name, part in sorted(value.items()) if name not in WHEN}
        case list():
            return sorted((_timeless(part) for part in value), key=lambda part: json.dumps(part, sort_keys=True))
    return value


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]


@dataclass(frozen=True, slots=True)
class _Counted:
    """What rises when an Envoy is given something, or makes something anew of what it has."""

    resources: dict[str, int]
    """By name, how often a load assignment, a route configuration or a secret arrived."""
    contexts: dict[str, int]
    """How often a TLS context was made anew."""
    listeners: dict[str, int]
    """Listeners that were added, changed, removed or are draining."""
    clusters: dict[str, int]


async def _counted(sidecar: Sidecar) -> _Counted:
    admin = sidecar.admin
    # A wildcard that has nothing new gets one empty answer: that greeting is no resource.
    greetings = ("cluster_manager.cds.update_success", "listener_manager.lds.update_success")
    return _Counted(
        {name: count for name, count in (await admin.updates()).items() if name not in greetings},
        await admin.secret_updates(),
        await admin.stats(
            r"^listener_manager\.(listener_(added|modified|removed|in_place_updated)|total_listeners_\w+)$"
        ),
        await admin.stats(r"^cluster_manager\.(cluster_(added|modified|removed)|warming_clusters|active_clusters)$"),
    )


async def _connected(sidecars: list[Sidecar], state: int) -> bool:
    """Whether every Envoy says that it has (1) or has not (0) a control plane."""
    found = [sidecar.admin.stat("control_plane.connected_state") for sidecar in sidecars]
    return set(await asyncio.gather(*found)) == {state}


async def _one_is_ready(mesh: Mesh) -> bool:
    answers = [mesh.children.answers(f"{replica.health}/readyz") for replica in mesh.replicas]
    return any(await asyncio.gather(*answers))
