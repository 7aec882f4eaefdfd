"""Proxies spread over the replicas, after they came and after a replica was away; moving costs no request."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from smc.demo import bookstore
from smc.demo.bookstore import Placement
from smc.demo.local import Plan
from smc.demo.programs import Replica

ENVOYS, REPLICAS = 12, 3
AGE = 15.0
"""Seconds after which a replica asks a proxy to connect anew."""
FEWEST, MOST = 2, 6
"""Envoys that a replica may have: the even share is four."""
IN_TIME = 25.0
"""Seconds from the last join. A replica with too many sends one away each second, and which one an Envoy tries next is
chance: a dozen in a row may find none but those that have too many."""


def _light(number: int) -> Placement:
    """An Envoy that backs no service and that nobody calls."""
    return Placement("bookbuyer", f"light-{number}", "bookbuyer")


LAST = _light(ENVOYS)
mesh = module_mesh(
    Plan(
        replicas=REPLICAS,
        workloads=(*bookstore.BOOKSTORE, *(_light(n) for n in range(len(bookstore.BOOKSTORE) + 1, ENVOYS))),
        replica_env=(("SMC_LEASE_TTL", "5s"), ("SMC_MAX_CONNECTION_AGE", f"{AGE:g}s")),
    )
)
pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_every_replica_has_its_share_after_the_last_join_and_after_a_restart(mesh: Mesh) -> None:
    async with mesh.prober(rate=60.0) as prober:
        await mesh.add(LAST)
        assert len(mesh.sidecars) == ENVOYS
        await eventually(lambda: _is_even(mesh), timeout=IN_TIME, every=0.2, what="every replica has its share")

        victim = mesh.replicas[0]
        await victim.kill()
        await eventually(lambda: _has_none(mesh, victim), timeout=10, every=0.2, what="all were taken over")
        await victim.start()
        await victim.until_ready(60)
        await eventually(
            lambda: _is_even(mesh), timeout=AGE, every=0.2, what="the replica that came back has its share as well"
        )
        # Connections come of age meanwhile, more than once.
        await prober.until(3000)
    prober.assert_clean()


async def test_replicas_that_were_away_get_their_share_although_no_connection_comes_of_age(mesh: Mesh) -> None:
    first, *others = mesh.replicas
    async with mesh.prober(rate=60.0) as prober:
        for replica in mesh.replicas:
            await replica.kill()
            replica.process.env["SMC_MAX_CONNECTION_AGE"] = "1h"
        await first.start()
        await first.until_ready(60)
        await eventually(lambda: _has_all(mesh, first), timeout=30, every=0.2, what="one replica has every Envoy")
        for replica in others:
            await replica.start()
        for replica in others:
            await replica.until_ready(60)
        await eventually(lambda: _is_even(mesh), timeout=IN_TIME, every=0.2, what="every replica has its share")
        await eventually(lambda: _is_even(mesh, MOST - 1), timeout=10, every=0.2, what="no replica has too many")
        before = await mesh.serving()
        await prober.until(3000)
        assert await mesh.serving() == before, "once it is even nobody is sent to and fro"
    prober.assert_clean()


# ------------------------------------------------------------------------------------------------------ what is read


async def _spread(mesh: Mesh) -> Counter[str]:
    """How many Envoys have a connection to each replica, as they say themselves."""
    identifiers = await mesh.serving()
    connected = await asyncio.gather(
        *(sidecar.admin.stat("control_plane.connected_state") for sidecar in mesh.sidecars.values())
    )
    return Counter(
        replica.name
        for identifier, state in zip(identifiers.values(), connected, strict=True)
        for replica in mesh.replicas
        if state == 1 and replica.name in identifier
    )


async def _is_even(mesh: Mesh, most: int = MOST) -> bool:
    spread = await _spread(mesh)
    return spread.total() == len(mesh.sidecars) and all(
        FEWEST <= spread[replica.name] <= most for replica in mesh.replicas
    )


async def _has_all(mesh: Mesh, replica: Replica) -> bool:
    return (await _spread(mesh))[replica.name] == len(mesh.sidecars)


async def _has_none(mesh: Mesh, replica: Replica) -> bool:
    spread = await _spread(mesh)
    return spread.total() == len(mesh.sidecars) and spread[replica.name] == 0
