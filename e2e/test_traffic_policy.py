"""A TrafficPolicy does to the requests of its service what it says, and nothing of it is left once it is deleted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from aiohttp import web

from e2e.kit.mesh import BOOKS, Mesh, eventually, module_mesh
from smc.demo.bookstore import BOOKBUYER, Placement
from smc.demo.figures import is_fair
from smc.demo.local import Plan
from smc.demo.traffic import Answer, Caller

SHOP = Placement("bookstore", "shop-1", "bookstore-v1", ("bookstore",))
SECOND = Placement("bookstore", "shop-2", "bookstore-v1", ("bookstore",))

mesh = module_mesh(Plan(replicas=1, workloads=(BOOKBUYER, SHOP, SECOND)))
pytestmark = pytest.mark.asyncio(loop_scope="module")

EARLY = 0.02
"""Seconds that a timer of Envoy's may fire too early for whoever waits: it is set in whole milliseconds from what its
event loop read off the clock when it woke up, and by then the loop may have been busy for some of them."""
PASSED = "cluster.bookstore/bookstore|80.health_check.success"
SLOW, TIMEOUT, DELAY = 4, 1, 1
"""Seconds: what the application needs, and what a TrafficPolicy gives it or adds."""


@dataclass
class Shop:
    """The application behind both workloads, which does as it is told."""

    mesh: Mesh
    caller: Caller
    seen: Counter[str] = field(default_factory=Counter)
    """Requests, by the workload that they came to."""
    answer: Callable[[str, int], Awaitable[int]] = field(init=False)
    """The status, from the workload and how many it has seen."""

    async def get(self) -> Answer:
        return await self.caller.request(BOOKS)

    async def statuses(self, number: int) -> Counter[int]:
        """Of so many requests at once."""
        return Counter(a.status for a in await asyncio.gather(*(self.get() for _ in range(number))))

    async def ask_for(self, settings: str) -> None:
        """Apply it, and return once every proxy has it."""
        text = "\n".join(
            (
                "apiVersion: smc.io/v1alpha1",
                "kind: TrafficPolicy",
                "metadata: {name: shop, namespace: bookstore}",
                f"spec: {{service: bookstore, {settings}}}",
            )
        )
        path = self.mesh.directory / "traffic-policy.yaml"
        await asyncio.to_thread(path.write_text, text)
        await self.mesh.smc("apply", "-f", str(path), "--wait")


async def _well(_workload: str, _nth: int) -> int:
    return 200


@pytest_asyncio.fixture(loop_scope="module")
async def shop(mesh: Mesh) -> AsyncIterator[Shop]:
    caller = Caller(mesh.sidecar("bookbuyer").outbound, keep_alive=True)
    found = Shop(mesh, caller)
    found.answer = _well
    runners = []
    for placement in (SHOP, SECOND):

        async def serve(_request: web.Request, name: str = placement.name) -> web.Response:
            found.seen[name] += 1
            return web.Response(status=await found.answer(name, found.seen[name]), text=name)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", serve)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, mesh.sidecar(placement.name).address, 8080).start()
        runners.append(runner)

    async def both_well() -> bool:
        hosts = (await mesh.sidecar("bookbuyer").admin.clusters())["bookstore/bookstore|80"]
        return len(hosts) == 2 and all(host.healthy for host in hosts)

    try:
        await eventually(both_well, timeout=20, what="both endpoints are healthy")
        yield found
        await mesh.smc("delete", "trafficpolicy", "shop", "-n", "bookstore", "--wait")
        found.answer = _well
        # An endpoint that was put out for its answers comes back when its time is over.
        await eventually(both_well, timeout=40, what="both endpoints are healthy again")
        assert await found.statuses(50) == {200: 50}, "nothing is left of it"
    finally:
        await caller.close()
        for runner in runners:
            await runner.cleanup()


async def test_a_timeout_ends_what_takes_longer_and_nothing_else(shop: Shop) -> None:
    async def slowly(_workload: str, _nth: int) -> int:
        await asyncio.sleep(SLOW)
        return 200

    shop.answer = slowly
    assert (await shop.get()).status == 200
    await shop.ask_for(f"timeout: {TIMEOUT}s")
    answer = await shop.get()
    assert (answer.status, b"timeout" in answer.body) == (504, True)
    assert TIMEOUT - EARLY <= answer.latency < SLOW
    await shop.ask_for("timeout: 9s")
    assert (await shop.get()).status == 200


async def test_a_retry_hides_an_endpoint_that_fails_and_goes_to_another(shop: Shop) -> None:
    async def first_is_ill(workload: str, _nth: int) -> int:
        return 503 if workload == SHOP.name else 200

    shop.answer = first_is_ill
    assert set(await shop.statuses(40)) == {200, 503}
    # Envoy draws another endpoint up to six times for a retry: one of 64 goes to the same again.
    await shop.ask_for("retries: {attempts: 5, on: [5xx]}")
    shop.seen.clear()
    number = 400
    statuses = Counter([(await shop.get()).status for _ in range(number)])
    assert statuses == {200: number}
    assert shop.seen[SECOND.name] == number, "each was answered there, once"
    assert is_fair(shop.seen[SHOP.name], number, 65 / 128), "it was asked first, by half of them, and hardly ever again"


async def test_a_fault_delays_or_aborts_its_share_of_the_requests(shop: Shop) -> None:
    await shop.ask_for("fault: {abort: {status: 418, percent: 30}}")
    shop.seen.clear()
    statuses = Counter([(await shop.get()).status for _ in range(400)])
    assert set(statuses) == {200, 418}
    assert is_fair(statuses[418], 400, 0.3), statuses
    assert shop.seen.total() == statuses[200], "no server has seen what was aborted"
    await shop.ask_for(f"fault: {{delay: {{duration: {DELAY}s}}}}")
    answer = await shop.get()
    assert answer.status == 200
    assert answer.latency >= DELAY - EARLY


async def test_a_rate_limit_holds_for_each_proxy_of_the_service(shop: Shop) -> None:
    await shop.ask_for("rateLimit: {requests: 20, per: 1h}")
    shop.seen.clear()
    statuses = Counter([(await shop.get()).status for _ in range(120)])
    assert statuses == {200: 40, 429: 80}, "20 for each of the two proxies"
    assert shop.seen == {SHOP.name: 20, SECOND.name: 20}


async def test_limits_refuse_at_once_what_is_too_much_at_a_time(shop: Shop) -> None:
    release = asyncio.Event()

    async def held(_workload: str, _nth: int) -> int:
        await release.wait()
        return 200

    shop.answer = held
    await shop.ask_for("limits: {maxRequests: 5}")
    requests = [asyncio.create_task(shop.get()) for _ in range(20)]

    async def refused() -> bool:
        return sum(request.done() for request in requests) >= 15

    await eventually(refused, timeout=20, what="all but five are refused while those are under way")
    release.set()
    statuses = Counter(answer.status for answer in await asyncio.gather(*requests))
    assert statuses == {200: 5, 503: 15}


async def test_an_endpoint_that_answers_with_errors_is_put_out_for_a_while(shop: Shop) -> None:
    async def first_is_ill(workload: str, _nth: int) -> int:
        return 500 if workload == SHOP.name else 200

    shop.answer = first_is_ill
    await shop.ask_for("outlierDetection: {consecutive5xx: 3, baseEjectionTime: 10s}")
    admin = shop.mesh.sidecar("bookbuyer").admin

    async def ejected() -> bool:
        await shop.statuses(10)
        return await admin.stat("cluster.bookstore/bookstore|80.outlier_detection.ejections_active") == 1

    await eventually(ejected, timeout=20, what="the one that answers with errors is put out")
    passed = await admin.stat(PASSED)
    statuses: Counter[int] = Counter()

    async def checked() -> bool:
        statuses.update(await shop.statuses(5))
        return await admin.stat(PASSED) >= passed + 6

    await eventually(checked, timeout=8, every=0.05, what="three health checks of each have passed")
    assert set(statuses) == {200}, "a passed health check of its proxy does not bring it back"


async def test_the_parameters_of_health_checks_are_those_that_were_asked_for(shop: Shop) -> None:
    admin = shop.mesh.sidecar("bookbuyer").admin
    await shop.ask_for("healthCheck: {interval: 100ms, timeout: 500ms}")

    async def attempts() -> int:
        return await admin.stat("cluster.bookstore/bookstore|80.health_check.attempt")

    before = await attempts()

    async def often() -> bool:
        return await attempts() >= before + 100

    # Unasked they are checked once in 0.75 seconds each: forty times in these.
    await eventually(often, timeout=15, what="both were checked a hundred times, at ten times a second each")
