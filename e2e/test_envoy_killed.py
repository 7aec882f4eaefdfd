"""An Envoy may die under traffic. At most what was in its hands fails, its callers leave it out, and it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from e2e.kit.prober import Prober
from smc.demo import bookstore
from smc.demo.envoy_admin import Host
from smc.demo.figures import is_fair
from smc.demo.local import Plan
from smc.demo.programs import Sidecar

VICTIM = bookstore.store("v2", 1)
mesh = module_mesh(Plan(workloads=(*bookstore.BOOKSTORE, VICTIM)))
pytestmark = pytest.mark.asyncio(loop_scope="module")

CLUSTER = "bookstore/bookstore|80"
CALLERS = ("bookbuyer", "bookthief", "bookstore-v1")
"""The bookbuyer is served all the time, the bookthief is denied all the time, the last one has asked only once."""
OUT = 5.0
"""Seconds after which no caller may send it anything any more: two health checks, on a machine that is busy."""
HELD = 10
"""Requests that its application has not answered: the victim dies with them in its hands."""


async def test_a_killed_envoy_takes_only_what_it_holds_with_it_and_is_left_out_until_it_is_back(mesh: Mesh) -> None:
    victim, app = mesh.sidecar(VICTIM.name), mesh.app(VICTIM.name)
    await mesh.send(10, source="bookstore-v1")
    await eventually(lambda: _all_see(mesh, victim, True), timeout=10, what="every caller has the victim in its set")
    loop = asyncio.get_running_loop()
    async with _prober(mesh, "bookbuyer") as buyer, _prober(mesh, "bookthief") as thief:
        await buyer.until(500)
        app.process.pause()
        held = 0

        async def enough() -> bool:
            nonlocal held
            held = await _held(victim)
            return held >= HELD

        await eventually(enough, timeout=10, what="requests are in its hands")
        # Its supervisor hangs, so that it stays dead for as long as the test looks.
        victim.process.pause()
        try:
            killed = loop.time()
            pid = _kill(victim)
            app.process.resume()
            await eventually(
                lambda: _all_see(mesh, victim, False), timeout=OUT, every=0.01, what="the victim is out of every set"
            )
            out = loop.time()
            await eventually(lambda: not _runs(pid), timeout=10, what="the victim is gone")
            await buyer.more(1000)
            assert await _all_see(mesh, victim, False), "it was let in again while it was dead"
            assert victim.envoy_pid in (0, pid)
            served = await _served(mesh)
            back = loop.time()
        finally:
            victim.process.resume()
        await eventually(lambda: _back(victim, pid), timeout=20, what="its supervisor has started another Envoy")
        await eventually(lambda: _all_see(mesh, victim, True), timeout=10, what="every caller has the victim again")
        await eventually(lambda: _serves_again(mesh, served), timeout=10, what="it gets requests again")
        await buyer.more(500)
        await buyer.until(3000)
    for prober in (buyer, thief):
        _assert_only_its_own(prober, killed, out)
        assert prober.sent == len(prober.probes)
    assert len(buyer.failures) + len(thief.failures) >= held, "what it held cannot have been answered"
    assert not [probe for probe in (*buyer.failures, *thief.failures) if probe.sent > back]


async def test_an_envoy_that_is_started_again_at_once_costs_no_more_either(mesh: Mesh) -> None:
    victim = mesh.sidecar(VICTIM.name)
    await eventually(lambda: _all_see(mesh, victim, True), timeout=10, what="every caller has the victim in its set")
    loop = asyncio.get_running_loop()
    async with _prober(mesh, "bookbuyer") as buyer:
        await buyer.until(500)
        killed = loop.time()
        pid = _kill(victim)
        await eventually(lambda: _back(victim, pid), timeout=20, what="its supervisor has started another Envoy")
        served = await _served(mesh)
        await eventually(lambda: _serves_again(mesh, served), timeout=10, what="it gets requests again")
        await buyer.until(3000)
    assert buyer.sent == len(buyer.probes) >= 3000
    _assert_only_its_own(buyer, killed, killed + OUT)


# ------------------------------------------------------------------------------------------------------ what is read


def _assert_only_its_own(prober: Prober, killed: float, out: float) -> None:
    """No failure but of requests that were under way when the Envoy died, or sent before it was out of the set.

    Both moments are on the loop's clock; `out` is when the caller's own set was seen without it. What is sent in
    between goes to the less busy of two that are drawn of three, and who refuses at once is never busy: to the victim
    five of nine times at most.
    """
    early = [probe for probe in prober.failures if probe.sent + probe.latency < killed]
    late = [probe for probe in prober.failures if probe.sent > out]
    assert not early, f"{len(early)} failed before it was killed:\n{prober.summary()}"
    assert not late, f"{len(late)} failed of what was sent after it was out:\n{prober.summary()}"
    between = [probe for probe in prober.probes if killed < probe.sent <= out]
    lost, share = sum(prober.wrong(probe) for probe in between), 5 / 9
    assert lost <= len(between) * share or is_fair(lost, len(between), share), prober.summary()


def _prober(mesh: Mesh, source: str) -> Prober:
    if source == "bookbuyer":
        return mesh.prober(source, rate=100)
    return mesh.prober(source, rate=60, expect=403)


def _kill(sidecar: Sidecar) -> int:
    pid = sidecar.envoy_pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    return pid


def _runs(pid: int) -> bool:
    """Whether there is such a process; one that nobody has waited for yet is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def _held(victim: Sidecar) -> int:
    """Requests that the Envoy has passed to its application and that are not answered."""
    return await victim.admin.stat("cluster.local|8080.upstream_rq_active")


async def _hosts(mesh: Mesh, caller: str) -> Sequence[Host]:
    return (await mesh.sidecar(caller).admin.clusters())[CLUSTER]


async def _all_see(mesh: Mesh, victim: Sidecar, healthy: bool) -> bool:
    """Whether every caller's Envoy says so of the victim, and has two others that are healthy."""
    for caller in CALLERS:
        hosts = await _hosts(mesh, caller)
        well = {host.address.partition(":")[0] for host in hosts if host.healthy}
        if (victim.address in well) != healthy or len(well - {victim.address}) != 2:
            return False
    return True


def _back(victim: Sidecar, before: int) -> bool:
    return victim.envoy_pid not in (0, before) and (victim.directory / "ready").exists()


async def _served(mesh: Mesh) -> int:
    return (await mesh.seen_by_apps())[VICTIM.workload]


async def _serves_again(mesh: Mesh, before: int) -> bool:
    return await _served(mesh) > before
