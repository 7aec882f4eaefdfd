"""The leader's loop around an informer: what it writes, and what it does when something fails. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.election import Deposed, Election, Leadership
from cluster.kv import HistoryChanged, RevisionRegressed
from cluster.memory import MemoryKV, MemoryStore
from smc import informers
from smc import registry as registry_
from smc.codec import traceparent
from smc.errors import Unavailable
from smc.informers import LAST_RETRY
from smc.keys import Keys
from smc.model import Name, Observation, Service
from smc.registry import Registry
from tests.unit.leadership import elect
from tests.unit.tasks import at_work

pytestmark = pytest.mark.looptime

KEYS = Keys("default")


def observation(*names: str) -> Observation:
    return Observation(services=tuple(Service(Name("shop", name), ()) for name in sorted(names)))


class Scripted:
    """An informer that says what the test puts into it: an observation, an exception, or None for its end."""

    name = "scripted"

    def __init__(self, *script: Observation | Exception | None) -> None:
        self.script: asyncio.Queue[Observation | Exception | None] = asyncio.Queue()
        for step in script:
            self.script.put_nowait(step)
        self.calls: list[float] = []
        self.closed = 0

    async def observe(self) -> AsyncGenerator[Observation, None]:
        self.calls.append(asyncio.get_running_loop().time())
        try:
            while True:
                step = await self.script.get()
                if isinstance(step, Exception):
                    raise step
                if step is None:
                    return
                yield step
        finally:
            self.closed += 1


@asynccontextmanager
async def running(kv: MemoryKV, leading: Leadership, informer: Scripted) -> AsyncIterator[asyncio.Task[None]]:
    async with at_work(informers.run(leading, Registry(kv, KEYS), informer)) as task:
        yield task


async def written(kv: MemoryKV, *names: str) -> None:
    """Return once the registry has exactly these services."""
    prefix = KEYS.source("scripted") + "services/shop/"
    async with asyncio.timeout(3600):
        while {item.key.removeprefix(prefix) for item in (await kv.list(prefix)).items} != set(names):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_each_observation_is_written() -> None:
    kv = MemoryKV()
    informer = Scripted()
    async with running(kv, await elect(kv, KEYS), informer):
        for names in (["a"], ["a", "b"], []):
            informer.script.put_nowait(observation(*names))
            await written(kv, *names)
    assert informer.closed == 1


@pytest.mark.parametrize("failure", [Unavailable("it does not answer"), ValueError("a fault of ours"), None])
async def test_a_source_that_fails_is_observed_again_and_what_is_known_stays(failure: Exception | None) -> None:
    kv = MemoryKV()
    informer = Scripted(observation("a"), failure, observation("b"))
    async with running(kv, await elect(kv, KEYS), informer):
        await written(kv, "a")
        assert await kv.get(KEYS.synced("scripted")) is not None
        await written(kv, "b")
    assert len(informer.calls) == 2
    assert 0.5 <= informer.calls[1] - informer.calls[0] <= 2.0


async def test_it_is_asked_less_and_less_often_but_at_least_twice_a_minute() -> None:
    kv = MemoryKV()
    informer = Scripted(*[Unavailable("it does not answer")] * 12, observation("a"), Unavailable("again"))
    with structlog.testing.capture_logs() as logs:
        async with running(kv, await elect(kv, KEYS), informer):
            await written(kv, "a")
            while len(informer.calls) < 14:  # noqa: ASYNC110
                await asyncio.sleep(1)
    waits = [after - before for before, after in zip(informer.calls, informer.calls[1:], strict=False)]
    for nth, wait in enumerate(waits[:12]):
        whole = min(2.0**nth, LAST_RETRY)
        assert whole / 2 <= wait <= whole + 0.1
    assert len({round(wait, 6) for wait in waits[5:12]}) > 1, "many replicas or sources must not ask in step"
    assert waits[12] <= 2.0, "after a success it begins anew"
    failures = [entry for entry in logs if entry["log_level"] == "warning"]
    assert len(failures) == 13
    assert failures[0]["error"] == "it does not answer"
    assert failures[0]["smc.source"] == "scripted"


async def test_a_store_that_cannot_be_reached_gets_the_whole_truth_once_it_can() -> None:
    other = MemoryKV()
    kv = MemoryKV(other.store)
    informer = Scripted(observation("a"))
    async with running(kv, await elect(kv, KEYS), informer):
        await written(other, "a")
        kv.disconnect()
        informer.script.put_nowait(observation("b"))
        await asyncio.sleep(100)
        await written(other, "a")
        kv.reconnect()
        informer.script.put_nowait(observation("b"))
        await written(other, "b")


async def test_a_deposed_leader_ends() -> None:
    kv = MemoryKV()
    informer = Scripted(observation("a"))
    async with running(kv, await elect(kv, KEYS), informer) as task:
        await written(kv, "a")
        await elect(kv, KEYS)
        informer.script.put_nowait(observation("b"))
        with pytest.raises(Deposed):
            await task
        await written(kv, "a")
    assert informer.closed == 1


async def test_the_next_leader_goes_on_where_the_last_one_stopped() -> None:
    store = MemoryStore()
    first, second = (MemoryKV(store) for _ in range(2))
    sources = {"one": Scripted(observation("a")), "two": Scripted(observation("a", "b"))}

    def standing(kv: MemoryKV, name: str) -> asyncio.Task[None]:
        async def work(leadership: Leadership) -> None:
            await informers.run(leadership, Registry(kv, KEYS), sources[name])

        return asyncio.create_task(Election(kv, KEYS.leader, name, pinned=[KEYS.epoch]).run(work))

    one = standing(first, "one")
    await written(second, "a")
    two = standing(second, "two")
    first.disconnect()
    await written(second, "a", "b")
    assert sources["one"].closed == 1, "whoever cannot renew stops before another begins"
    for task in (one, two):
        task.cancel()
    await asyncio.wait([one, two])


async def test_another_history_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = MemoryKV()

    async def regressed(_prefix: str) -> None:
        raise RevisionRegressed(9, 3)

    monkeypatch.setattr(kv, "list", regressed)
    async with running(kv, await elect(kv, KEYS), Scripted(observation("a"))) as task:
        with pytest.raises(HistoryChanged):
            await task


async def test_what_is_written_carries_the_trace_of_its_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(informers, "tracer", provider.get_tracer("test"))
    monkeypatch.setattr(registry_, "tracer", provider.get_tracer("test"))
    kv = MemoryKV()
    async with running(kv, await elect(kv, KEYS), Scripted(observation("a"))):
        await written(kv, "a")
        while len(spans.get_finished_spans()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    replace, observe = spans.get_finished_spans()
    assert (replace.name, observe.name) == ("smc.replace", "smc.observe")
    assert replace.parent == observe.context
    assert observe.attributes == {"smc.source": "scripted"}
    assert replace.attributes == {"smc.source": "scripted", "smc.written": 1, "smc.deleted": 0}
    item = await kv.get(KEYS.service("scripted", Name("shop", "a")))
    assert item is not None
    assert observe.context is not None
    assert traceparent(item.value).split("-")[1:3] == [
        trace.format_trace_id(observe.context.trace_id),
        trace.format_span_id(observe.context.span_id),
    ]
