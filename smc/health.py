"""What a supervisor and a scraper ask a replica over plain HTTP: is it alive, is it ready, and its figures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from smc.errors import Unavailable
from smc.metrics import Metrics

TICK = 0.1


@asynccontextmanager
async def serving(address: str, port: int, metrics: Metrics, unready: Callable[[], str]) -> AsyncIterator[None]:
    """Serve `/healthz`, `/readyz` and `/metrics` for as long as the block runs. `unready` says why not; "" if ready.

    Raises:
        Unavailable: the address cannot be bound.
    """

    async def healthz(_: web.Request) -> web.Response:
        # That it is answered is the answer: the event loop runs.
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reason = unready()
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    async def figures(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", figures)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, address, port).start()
    except OSError as e:
        await runner.cleanup()
        raise Unavailable(
            f"{address}:{port} cannot be bound: {e.strerror}",
            hint="is another process there, or is it no address of this machine?",
        ) from None
    try:
        yield
    finally:
        await runner.cleanup()


async def watch_lag(metrics: Metrics) -> None:
    """Measure how late the event loop runs its timers, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + TICK
        await asyncio.sleep(TICK)
        metrics.loop_lag.observe(max(0.0, loop.time() - due))
