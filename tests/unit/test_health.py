"""What a supervisor and a scraper are told, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest

from smc import health
from smc.errors import Unavailable
from smc.metrics import Metrics


@dataclass
class Replica:
    port: int
    metrics: Metrics = field(default_factory=Metrics)
    reason: str = ""

    async def get(self, path: str) -> tuple[int, str, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}{path}") as answer,
        ):
            return answer.status, await answer.text(), answer.headers["Content-Type"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@asynccontextmanager
async def serving() -> AsyncIterator[Replica]:
    replica = Replica(free_port())
    async with health.serving("127.0.0.1", replica.port, replica.metrics, lambda: replica.reason):
        yield replica


async def test_whoever_answers_is_alive_ready_or_not() -> None:
    async with serving() as replica:
        for reason in ("", "the mesh has not been read from etcd yet"):
            replica.reason = reason
            status, text, _ = await replica.get("/healthz")
            assert (status, text) == (200, "ok\n")


async def test_a_replica_that_is_not_ready_says_why_and_then_that_it_is() -> None:
    async with serving() as replica:
        replica.reason = "these sources have not been observed yet: files"
        assert (await replica.get("/readyz"))[:2] == (503, "these sources have not been observed yet: files\n")
        replica.reason = ""
        assert (await replica.get("/readyz"))[:2] == (200, "ok\n")


async def test_the_figures_are_those_of_this_replica() -> None:
    async with serving() as replica:
        replica.metrics.revision.set(17)
        status, text, kind = await replica.get("/metrics")
        assert status == 200
        assert kind.startswith("text/plain")
        assert "smc_mesh_revision 17.0" in text.splitlines()
        assert all(line.startswith(("smc_", "# ")) for line in text.splitlines())


async def test_an_address_that_another_process_has_is_an_error_that_says_so() -> None:
    async with serving() as replica:
        with pytest.raises(Unavailable, match=f"127.0.0.1:{replica.port} cannot be bound") as refused:
            async with health.serving("127.0.0.1", replica.port, Metrics(), lambda: ""):
                pass
    assert "is another process there" in str(refused.value)


async def test_the_address_is_free_again_afterwards() -> None:
    async with serving() as replica:
        await replica.get("/healthz")
    async with health.serving("127.0.0.1", replica.port, replica.metrics, lambda: ""):
        assert (await replica.get("/healthz"))[0] == 200


async def test_an_event_loop_that_was_held_shows_as_lag() -> None:
    metrics = Metrics()
    task = asyncio.create_task(health.watch_lag(metrics))
    await asyncio.sleep(0)
    time.sleep(health.TICK + 0.3)  # noqa: ASYNC251 - what is measured
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert metrics.registry.get_sample_value("smc_loop_lag_seconds_bucket", {"le": "0.25"}) == 0
    assert metrics.registry.get_sample_value("smc_loop_lag_seconds_count")
