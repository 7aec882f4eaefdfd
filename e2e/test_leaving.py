"""P1: a workload leaves a service that others go on serving, and stays in the mesh. No request fails.

Its own proxy and those of its callers are told by different streams, and different replicas, so for a while callers
still dial what it has left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually, module_mesh
from smc.demo import bookstore
from smc.demo.bookstore import Placement
from smc.demo.local import Plan
from smc.demo.programs import Replica
from smc.registry import LEAVING

IN_A_FILE, APPLIED = (bookstore.store("v1", number) for number in (1, 2))
mesh = module_mesh(Plan(workloads=(*bookstore.BOOKSTORE, IN_A_FILE, APPLIED)))
pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVICE = "bookstore/bookstore|80"
OTHER = ("bookstore-v1",)

Say = Callable[[Mesh, tuple[str, ...]], Awaitable[None]]


async def in_a_file(mesh: Mesh, services: tuple[str, ...]) -> None:
    mesh.write(IN_A_FILE.workload, text(mesh, IN_A_FILE, services))


async def applied(mesh: Mesh, services: tuple[str, ...]) -> None:
    path = mesh.directory / "applied.yaml"
    path.write_text(text(mesh, APPLIED, services))
    # Another replica may be paused.
    await mesh.smc("apply", "-f", str(path), "--server", (await mesh.leader()).api)
    (mesh.files / f"{APPLIED.workload.replace('/', '_')}.yaml").unlink(missing_ok=True)


@pytest.mark.parametrize("left", [OTHER, ()], ids=["it serves another", "it serves nothing any more"])
@pytest.mark.parametrize(("say", "leaver"), [(in_a_file, IN_A_FILE), (applied, APPLIED)])
async def test_who_still_dials_what_a_workload_has_left_is_answered_as_before(
    mesh: Mesh, say: Say, leaver: Placement, left: tuple[str, ...]
) -> None:
    await say(mesh, leaver.services)
    await eventually(lambda: is_dialled(mesh, leaver), timeout=10, what="its callers dial it")
    deaf = await the_replica_of_the_caller_alone(mesh, leaver)
    async with mesh.prober(rate=200.0, connections="new") as prober:
        await prober.until(500)
        deaf.process.pause()
        try:
            await say(mesh, left)
            await eventually(
                lambda: is_dialled(mesh, leaver, False, by=leaver.workload), timeout=5, what="others have heard of it"
            )
            before = await answered(mesh, leaver)
            await prober.more(300)
            assert await is_dialled(mesh, leaver), "its caller has heard of nothing yet"
            assert await answered(mesh, leaver) > before
        finally:
            deaf.process.resume()
        await eventually(lambda: is_dialled(mesh, leaver, False), timeout=10, what="its caller dials it no longer")
        await prober.until(2000)
    prober.assert_clean(2000)


async def test_what_a_workload_has_left_it_serves_no_longer_in_the_end(mesh: Mesh) -> None:
    for say in (in_a_file, applied):
        await say(mesh, IN_A_FILE.services)
    for leaver in (IN_A_FILE, APPLIED):
        await eventually(lambda leaver=leaver: serves(mesh, leaver, leaver.services), timeout=10, what="it serves both")
    async with mesh.prober(rate=100.0) as prober:
        for say in (in_a_file, applied):
            await say(mesh, OTHER)
        for leaver in (IN_A_FILE, APPLIED):
            await eventually(
                lambda leaver=leaver: serves(mesh, leaver, OTHER),
                timeout=LEAVING + 10,
                what="it serves the other alone",
            )
        await prober.until(2000)
    prober.assert_clean(2000)


def text(mesh: Mesh, leaver: Placement, services: tuple[str, ...]) -> str:
    return bookstore.workload(replace(leaver, services=services), mesh.sidecar(leaver.workload).address)


async def the_replica_of_the_caller_alone(mesh: Mesh, leaver: Placement) -> Replica:
    """One that tells the caller, and neither the workload that leaves nor, as the leader, the store. None will move."""
    while True:
        await eventually(lambda: is_even(mesh), timeout=20, what="no replica has to send streams away")
        caller, other = await mesh.replica_of("bookbuyer"), await mesh.replica_of(leaver.workload)
        assert caller is not None
        if caller not in (other, await mesh.leader()):
            return caller
        await caller.kill()
        await caller.start()
        await caller.until_ready()
        await mesh.wait_synced()


async def is_even(mesh: Mesh) -> bool:
    streams = Counter((await mesh.serving()).values())
    return max(streams.values()) <= ceil(streams.total() / len(mesh.replicas)) + 1


async def answered(mesh: Mesh, leaver: Placement) -> int:
    """How many requests its application has counted."""
    return (await mesh.seen_by_apps())[leaver.workload]


async def is_dialled(mesh: Mesh, leaver: Placement, wanted: bool = True, *, by: str = "bookbuyer") -> bool:
    """Whether a proxy has it among the endpoints of the service."""
    hosts = (await mesh.sidecar(by).admin.clusters()).get(SERVICE, ())
    return (f"{mesh.sidecar(leaver.workload).address}:{INBOUND_PORT}" in {host.address for host in hosts}) is wanted


async def serves(mesh: Mesh, leaver: Placement, services: tuple[str, ...]) -> bool:
    """Whether its proxy has the filter chains of these, and no others."""
    found: list[dict[str, Any]] = await mesh.sidecar(leaver.workload).admin.config_dump("dynamic_listeners")
    chains = [
        chain["name"]
        for one in found
        if one["name"] == "inbound"
        for chain in one["active_state"]["listener"]["filter_chains"]
    ]
    return sorted(chains) == sorted(f"bookstore/{service}|80" for service in services)
