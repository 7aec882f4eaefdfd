"""Traffic follows the weights of a TrafficSplit, and weights change under traffic without a failure.

What is counted is what the applications have seen.
"""

from __future__ import annotations

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from e2e.kit.prober import statuses
from smc.demo import bookstore
from smc.demo.figures import is_fair

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = 5000
V1, V2 = "bookstore/bookstore-v1", "bookstore/bookstore-v2"


async def _in_force(mesh: Mesh, v1: int, v2: int) -> None:
    """Apply a split, and return once the bookbuyer's Envoy has taken the route that it makes."""
    admin, arrived = mesh.sidecar("bookbuyer").admin, "http.outbound.rds.vhds.outbound.update_success"
    before = await admin.stat(arrived)
    await mesh.apply(bookstore.split(v1, v2))

    async def taken() -> bool:
        return await admin.stat(arrived) > before

    await eventually(taken, timeout=5, what=f"the split {v1}:{v2} has reached the caller's Envoy")


@pytest.mark.parametrize(("v1", "v2"), [(50, 50), (1, 2), (1000, 500)])
async def test_requests_are_spread_by_weight(mesh: Mesh, v1: int, v2: int) -> None:
    await mesh.wait_synced()
    await _in_force(mesh, v1, v2)
    before = await mesh.seen_by_apps()

    probes = await mesh.send(REQUESTS)

    after = await mesh.seen_by_apps()
    seen = {name: after[name] - before[name] for name in after}
    assert statuses(probes) == {200: REQUESTS}
    assert seen.keys() == {V1, V2}
    assert sum(seen.values()) == REQUESTS, "each request reached one application, once"
    assert is_fair(seen[V1], REQUESTS, v1 / (v1 + v2)), seen


async def test_weights_change_under_traffic_without_a_failure(mesh: Mesh) -> None:
    steps = [(100, 0), (50, 50), (1, 2), (1000, 500), (0, 100), (1, 1)]
    before = await mesh.seen_by_apps()
    async with mesh.prober(rate=200) as prober:
        for v1, v2 in steps:
            await _in_force(mesh, v1, v2)
            # What was under way then may go by the old route, and answers need not come in the order of requests.
            await prober.fresh(20)
            drawn = [found.version for found in await prober.fresh(600)]
            hits, share = drawn.count("v1"), v1 / (v1 + v2)
            assert is_fair(hits, len(drawn), share), f"{v1}:{v2} gave v1 {hits} of {len(drawn)}"
    prober.assert_clean(minimum=3000)
    after = await mesh.seen_by_apps()
    counted = {version: after[name] - before[name] for name, version in ((V1, "v1"), (V2, "v2"))}
    assert counted == prober.versions(), "the applications and the caller have counted the same"
    assert {found.source for found in prober.probes} == {"spiffe://demo.smc.internal/ns/bookbuyer/sa/bookbuyer"}
    assert {found.destination.rpartition("/")[2] for found in prober.probes} == {"bookstore-v1", "bookstore-v2"}
