"""A change of policy is in force within a second, both ways, on open connections, and costs nobody else anything."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

import pytest

from e2e.kit.mesh import Mesh, module_mesh
from e2e.kit.prober import Prober
from e2e.kit.story import Pulse
from smc.demo import bookstore

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE = 1.0
"""Seconds from the return of `smc apply`, in which this machine does not stand still."""
SERVERS = ("bookstore-v1", "bookstore-v2")


def _policy(*visitors: str) -> str:
    """The demo's policy, with these visitors as the sources of its TrafficTargets."""
    kept = "    - kind: ServiceAccount\n      name: bookbuyer\n      namespace: bookbuyer\n"
    assert bookstore.policy().count(kept) == 2
    return bookstore.policy().replace(kept, "".join(kept.replace("bookbuyer", name) for name in visitors))


def _verdicts(prober: Prober, begin: float, end: float) -> Counter[int]:
    """Statuses of what was sent between two moments, both in seconds on the loop's clock."""
    return Counter(found.status for found in prober.probes if begin <= found.sent < end)


@dataclass(frozen=True)
class Doors:
    """What a change of policy must leave as it is, of every Envoy by workload."""

    listeners: dict[str, dict[str, str]]
    """The version of each listener."""
    received: dict[str, dict[str, int]]
    """Listener updates of any kind beyond the first of each stream, and listeners that were added, changed, removed or
    are draining."""
    closed: dict[str, dict[str, int]]
    """Connections that were closed, on either side of each listener; health checks among them."""

    @classmethod
    async def of(cls, mesh: Mesh) -> Doors:
        listeners, received, closed = {}, {}, {}
        for workload, sidecar in mesh.sidecars.items():
            listeners[workload] = {
                listener["name"]: listener["active_state"]["version_info"]
                for listener in await sidecar.admin.config_dump(resource="dynamic_listeners")
            }
            received[workload] = await sidecar.admin.stats(
                r"^listener_manager\.(lds\.update_(success|rejected)|listener_\w+|total_listeners_draining)$"
            )
            # A stream begins with one empty answer, and may move to another replica at any time.
            streams = await sidecar.admin.stat("cluster.xds.upstream_rq_total")
            received[workload]["listener_manager.lds.update_success"] -= streams
            closed[workload] = await sidecar.admin.stats(
                r"^(http\.(in|out)bound.*\.downstream_cx_destroy|cluster\.bookstore/.*\.upstream_cx_destroy)$"
            )
        return cls(listeners, received, closed)


async def test_verdicts_change_within_a_second_on_open_connections(mesh: Mesh) -> None:
    loop = asyncio.get_running_loop()
    await mesh.apply(_policy("bookbuyer"))
    await mesh.wait_synced()
    begun: list[float] = []
    in_force: list[tuple[float, int]] = []
    async with (
        Pulse() as pulse,
        mesh.prober("bookbuyer", rate=150) as buyer,
        mesh.prober("bookthief", rate=150, expect=403) as thief,
    ):
        await thief.until(200)
        assert set(Counter(found.status for found in thief.probes)) == {403}
        before = await Doors.of(mesh)
        for turn in range(6):
            allow = turn % 2 == 0
            begun.append(loop.time())
            await mesh.apply(_policy("bookbuyer", "bookthief") if allow else _policy("bookbuyer"))
            await asyncio.sleep(DEADLINE)
            await asyncio.sleep(pulse.latest)
            in_force.append((loop.time(), 200 if allow else 403))
            await thief.fresh(150)
        ended = loop.time()
        after = await Doors.of(mesh)
        await buyer.until(3000)

    buyer.assert_clean(minimum=3000)
    assert thief.sent == len(thief.probes)
    for (since, status), end in zip(in_force, [*begun[1:], ended], strict=True):
        found = _verdicts(thief, since, end)
        assert set(found) == {status}, f"{DEADLINE:g} s after the change to {status}, and until the next: {found}"
        assert found.total() >= 150
    for answer in thief.probes:
        assert answer.status != 200 or answer.source.endswith("/ns/bookthief/sa/bookthief")

    assert after.listeners == before.listeners
    assert before.listeners.keys() == mesh.sidecars.keys()
    assert all({"inbound", "outbound"} >= set(names) >= {"outbound"} for names in before.listeners.values())
    assert after.received == before.received, "listeners were left alone"
    for name in SERVERS:
        assert "http.inbound.downstream_cx_destroy" in before.closed[mesh.sidecar(name).workload]
    assert after.closed == before.closed, "every verdict was given on a connection that was open before"
