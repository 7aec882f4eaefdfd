"""What one stream does while it is open, and what others see of it; its transport is two functions. In virtual time."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.kv import MOST_BYTES
from smc import telemetry
from smc.codec import encode
from smc.metrics import Metrics
from smc.model import Name
from smc.records import AckRecord, Laggard
from smc.xds import session as module
from smc.xds.server import MOST_REPORTED
from smc.xds.session import BURST, LINES_BURST, LINES_RATE, MOST_TOLD, RATE, SOON, WRITE_DEADLINE, Ended, Session, Watch
from smc.xds.slot import Offer, Slot
from smc.xds.snapshot import Resource, Snapshot, Type
from smc.xds.stream import PATIENCE, STALLED_AFTER, ProtocolError, Request, Stream
from smc.xds.subscription import Response
from tests.unit.xds.resources import assignment, cluster, layered, listener, route, secret, source, static

pytestmark = pytest.mark.looptime

PROXY = Name("shop", "buyer")
FIRST = Request(Type.CLUSTER)


def offer(revision: int, build: trace.SpanContext | None = None) -> Offer:
    return Offer(revision, asyncio.get_running_loop().time(), build)


class Client:
    """The other side, which says whatever it is told to, and what it was sent."""

    def __init__(self) -> None:
        self.slot = Slot()
        self.metrics = Metrics()
        self.received: list[Response] = []
        self.ready: list[Name] = []
        self.reads = True
        """False: it makes no room for a response."""
        self.room: asyncio.Future[None]
        """Done, it makes room again."""
        self.acks = True
        self.said: deque[Request | Exception | None] = deque()
        """What was not read yet."""
        self.session = Session(PROXY, Stream(), self.slot, self.metrics, self, Watch(), listening=self.ready.append)
        self._paused = True
        self._receive: Callable[[Request | None], None]
        self._fail: Callable[[Exception], None]

    def deliver(self, receive: Callable[[Request | None], None], fail: Callable[[Exception], None]) -> None:
        self._receive, self._fail = receive, fail
        self.resume_reading()

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        asyncio.get_running_loop().call_soon(self._pass_on)

    def _pass_on(self) -> None:
        while self.said and not self._paused:
            said = self.said.popleft()
            if isinstance(said, Exception):
                self._fail(said)
                continue
            try:
                self._receive(said)
            except ProtocolError as e:
                self._fail(e)

    def write(self, response: Response) -> int:
        self.received.append(response)
        if self.acks:
            self.say(Request(response.type, nonce=response.nonce))
        return 100

    def drained(self) -> asyncio.Future[None] | None:
        if self.reads:
            return None
        self.room = asyncio.get_running_loop().create_future()
        return self.room

    def say(self, request: Request | Exception | None) -> None:
        self.said.append(request)
        asyncio.get_running_loop().call_soon(self._pass_on)

    def refuse(self, text: str) -> None:
        last = self.received[-1]
        self.say(Request(last.type, nonce=last.nonce, error=text))

    def offer(self, revision: int, *resources: Resource) -> None:
        self.slot.put(layered(resources), offer(revision))
        self.slot.write()

    @property
    def got(self) -> list[str]:
        return [f"{found.name}={found.body.decode()}" for response in self.received for found in response.resources]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @asynccontextmanager
    async def connected(self, first: Request = FIRST) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.session.run(first))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def settle() -> None:
    """Let everything happen that needs no time."""
    await asyncio.sleep(0.001)


# ------------------------------------------------------------------------------------------------------------- pushes


async def test_what_is_offered_is_sent_and_then_each_change() -> None:
    client = Client()
    client.offer(1, static("local", "a"))
    async with client.connected():
        await settle()
        client.offer(2, static("local", "b"))
        await settle()
        assert client.got == ["local=a", "local=b"]
        assert client.metric("smc_xds_pushes_total", type="Cluster") == 2
        assert client.metric("smc_xds_resources_sent_total", type="Cluster") == 2
        assert client.metric("smc_xds_bytes_sent_total", type="Cluster") == 200


async def test_a_slow_proxy_is_spared_what_was_replaced_meanwhile() -> None:
    client = Client()
    client.acks = False
    client.offer(1, static("local", "a"))
    async with client.connected():
        await settle()
        for revision in range(2, 100):
            client.offer(revision, static("local", f"{revision}"))
            await settle()
        client.acks = True
        client.say(Request(Type.CLUSTER, nonce=client.received[0].nonce))
        await settle()
        assert client.got == ["local=a", "local=99"]
        assert client.session.state == "synced"


async def test_a_proxy_that_acks_nothing_costs_two_snapshots_however_much_changes() -> None:
    client = Client()
    client.acks = False
    offered = []
    async with client.connected():
        for revision in range(1, 50):
            snapshot = Snapshot.of([static("local", f"{revision}")])
            offered.append(weakref.ref(snapshot))
            client.slot.put(snapshot, offer(revision))
            client.slot.write()
            del snapshot
            await settle()
        assert sum(held() is not None for held in offered) == 2


async def test_what_happens_while_a_proxy_makes_no_room_is_sent_once_it_does() -> None:
    client = Client()
    async with client.connected():
        client.say(Request(Type.ENDPOINT, ("bookstore",)))
        await settle()
        client.reads = False
        client.offer(1, cluster("bookstore"), assignment("bookstore", "one"))
        await settle()
        assert client.got == ["bookstore=1"], "the second response waits for room"
        client.offer(2, cluster("bookstore"), assignment("bookstore", "two"))
        await settle()
        client.reads = True
        client.room.set_result(None)
        await settle()
        assert client.got == ["bookstore=1", "bookstore=one", "bookstore=two"]
        assert client.session.revision(2) == 2


# --------------------------------------------------------------------------------------------------------- too much


async def test_a_proxy_that_says_too_much_is_read_at_the_rate_and_not_ended() -> None:
    client = Client()
    async with client.connected() as running:
        for _ in range(BURST + 10 * int(RATE)):
            client.say(Request(Type.CLUSTER, nonce="late"))
        await settle()
        assert len(client.said) == 10 * RATE - 1, "what comes at once, as from an Envoy that starts, is not held up"
        await asyncio.sleep(5)
        assert len(client.said) == pytest.approx(5 * RATE, abs=2)
        await asyncio.sleep(5.1)
        assert not client.said
        assert not running.done()


async def test_a_proxy_that_is_read_slowly_is_sent_what_changes_at_once() -> None:
    client = Client()
    client.offer(1, static("local", "a"))
    async with client.connected():
        await settle()
        for _ in range(2 * BURST):
            client.say(Request(Type.CLUSTER, nonce="late"))
        await settle()
        client.offer(2, static("local", "b"))
        await settle()
        assert client.got == ["local=a", "local=b"]


async def test_a_stream_ends_while_its_proxy_is_read_slowly() -> None:
    client = Client()
    async with client.connected() as running:
        for _ in range(2 * BURST):
            client.say(Request(Type.CLUSTER, nonce="late"))
        await settle()
        client.slot.end("this replica shuts down")
        with pytest.raises(Ended, match="this replica shuts down"):
            await running
    assert asyncio.get_running_loop().time() < 0.01


async def test_who_was_quiet_for_a_while_may_say_much_again_but_not_more_than_the_burst() -> None:
    client = Client()
    async with client.connected():
        for _ in range(2):
            await asyncio.sleep(10 * BURST / RATE)
            for _ in range(BURST + 10):
                client.say(Request(Type.CLUSTER, nonce="late"))
            await settle()
            assert len(client.said) == 9, "all but the one that is waited for"


async def test_refusals_without_end_are_a_few_lines_and_counted_all_the_same() -> None:
    client = Client()
    with structlog.testing.capture_logs() as logs:
        async with client.connected():
            for _ in range(100):
                client.say(Request(Type.CLUSTER, nonce="late", error="no"))
            await settle()
            assert len(logs) == LINES_BURST
            assert client.metric("smc_xds_nacks_total", type="Cluster") == 100
            await asyncio.sleep(1 / LINES_RATE)
            client.say(Request(Type.CLUSTER, nonce="late", error="still no"))
            await settle()
    assert len(logs) == LINES_BURST + 1
    assert (logs[-1]["reason"], logs[-1]["unlogged"]) == ("still no", 100 - LINES_BURST)
    assert "unlogged" not in logs[0]


# ---------------------------------------------------------------------------------------------------------------- ends


async def test_a_write_that_takes_too_long_ends_the_stream() -> None:
    client = Client()
    client.reads = False
    client.offer(1, static("local"))
    async with client.connected() as running:
        await asyncio.sleep(WRITE_DEADLINE - 0.1)
        assert not running.done()
        with pytest.raises(Ended, match="did not read for 15 s"):
            await running
    assert asyncio.get_running_loop().time() == WRITE_DEADLINE


async def test_an_ended_slot_ends_the_stream_with_its_reason() -> None:
    client = Client()
    async with client.connected() as running:
        await settle()
        client.slot.end("this replica shuts down")
        with pytest.raises(Ended, match="this replica shuts down"):
            await running


async def test_a_slot_that_ended_before_the_stream_began_sends_nothing() -> None:
    client = Client()
    client.offer(1, static("local"))
    client.slot.end("this replica shuts down")
    async with client.connected() as running:
        with pytest.raises(Ended):
            await running
    assert client.received == []


async def test_the_stream_is_over_when_the_proxy_closes_it() -> None:
    client = Client()
    async with client.connected() as running:
        client.say(None)
        await running


async def test_a_protocol_error_is_told_as_it_is() -> None:
    client = Client()
    async with client.connected() as running:
        client.say(Request(Type.ENDPOINT, ("",)))
        with pytest.raises(ProtocolError, match="name is empty"):
            await running


async def test_a_protocol_error_in_the_first_request_is_told_as_it_is() -> None:
    with pytest.raises(ProtocolError):
        await Client().session.run(Request(Type.ENDPOINT, ("",)))


async def test_what_reading_fails_with_is_told_as_it_is() -> None:
    client = Client()
    async with client.connected() as running:
        client.say(PermissionError("another node.id"))
        with pytest.raises(PermissionError, match=r"another node\.id"):
            await running


@pytest.mark.parametrize("reads", [True, False])
async def test_cancelling_leaves_no_task_behind(reads: bool) -> None:
    before = asyncio.all_tasks()
    client = Client()
    if not reads:
        client.reads = False
    client.offer(1, static("local"))
    async with client.connected() as running:
        await settle()
        assert len(asyncio.all_tasks()) > len(before)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert asyncio.all_tasks() == before


# ---------------------------------------------------------------------------------------------------- what others see


async def test_a_proxy_is_synced_once_it_has_acked_all() -> None:
    client = Client()
    client.acks = False
    client.offer(5, static("local"))
    async with client.connected():
        await settle()
        assert (client.session.state, client.session.revision(5)) == ("pending", 0)
        assert client.session.laggard() == Laggard(PROXY, "pending", 0)
        client.say(Request(Type.CLUSTER, nonce=client.received[0].nonce))
        await settle()
        assert (client.session.state, client.session.revision(5)) == ("synced", 5)
        assert client.session.laggard() is None
        assert set(client.session.versions) == {"Cluster"}


async def test_a_mesh_that_did_not_concern_a_proxy_counts_as_acked() -> None:
    client = Client()
    client.offer(5, static("local"))
    async with client.connected():
        await settle()
        assert client.session.revision(80) == 80


async def test_what_came_before_the_open_offer_and_did_not_concern_it_counts_as_acked() -> None:
    client = Client()
    client.offer(5, static("local", "a"))
    async with client.connected():
        await settle()
        client.acks = False
        client.offer(81, static("local", "b"))
        await settle()
        client.offer(90, static("local", "c"))
        client.offer(95, static("local", "d"))
        await settle()
        assert client.session.revision(95) == 80
        client.say(Request(Type.CLUSTER, nonce=client.received[-1].nonce))
        await settle()
        assert client.session.revision(95) == 89


async def test_an_offer_that_was_not_taken_yet_is_not_acked() -> None:
    client = Client()
    client.offer(5, static("local", "a"))
    async with client.connected():
        await settle()
        client.offer(6, static("local", "b"))
        assert client.session.revision(6) == 5, "the stream has had no time to see it"
        assert client.session.state == "pending"
        assert client.session.laggard() == Laggard(PROXY, "pending", 5)


async def test_an_offer_behind_a_write_that_takes_long_is_not_acked() -> None:
    client = Client()
    client.offer(5, static("local"))
    async with client.connected():
        await settle()
        client.reads = False
        client.say(Request(Type.ENDPOINT, ("nobody",)))
        await settle()
        client.offer(6, static("local", "b"))
        await asyncio.sleep(5)
        assert client.session.revision(6) == 5


async def test_what_could_not_be_made_is_not_acked() -> None:
    client = Client()
    client.offer(5, static("local", "a"))
    async with client.connected():
        await settle()
        client.slot.stale = True
        assert (client.session.state, client.session.revision(6)) == ("pending", 5)
        laggard = client.session.laggard()
        assert laggard is not None
        assert laggard.reason == "its configuration cannot be made: see this replica's log"
        client.offer(7, static("local", "b"))
        await settle()
        assert client.session.revision(7) == 7


async def test_after_a_restore_a_lower_revision_is_awaited_like_any_other() -> None:
    client = Client()
    client.offer(100, static("local", "a"))
    async with client.connected():
        await settle()
        client.acks = False
        client.offer(50, static("local", "b"))
        await settle()
        assert (client.session.state, client.session.revision(50)) == ("pending", 49)
        client.say(Request(Type.CLUSTER, nonce=client.received[-1].nonce))
        await settle()
        assert (client.session.state, client.session.revision(50)) == ("synced", 50)


@pytest.mark.parametrize("later", [5, 2 * SOON + 0.001], ids=["before another one", "just after a look"])
async def test_a_deadline_is_kept_to_the_moment_whenever_it_is_set(later: float) -> None:
    client = Client()
    client.acks = False
    client.offer(1, cluster("store"), listener("out", routes=()))
    async with client.connected():
        client.say(Request(Type.LISTENER))
        await asyncio.sleep(later)
        assert client.got == ["store=1"], "unanswered, and stalled in a while"
        client.say(Request(Type.CLUSTER, nonce=client.received[0].nonce))
        await asyncio.sleep(PATIENCE - 0.001)
        assert client.got == ["store=1"], "it should ask for the load assignment"
        await asyncio.sleep(0.002)
        assert client.got == ["store=1", "out=1"]


async def test_what_a_wildcard_has_already_is_acked_although_it_is_greeted() -> None:
    client, held = Client(), static("local")
    client.acks = False
    client.offer(500, held)
    async with client.connected(Request(Type.CLUSTER, initial={"local": held.version}, resumed=True)):
        await settle()
        assert [response.resources for response in client.received] == [()], "the greeting"
        assert client.session.stream.acked == 500
        assert client.session.revision(510) == 510
        assert client.session.laggard() is None
        assert client.metric("smc_convergence_seconds_count") == 1


# ---------------------------------------------------------------------------------------------------------- deadlines


def test_no_deadline_is_nearer_than_the_look_at_it() -> None:
    assert min(PATIENCE, STALLED_AFTER) > 2 * SOON


async def test_each_look_comes_soon_and_at_most_twice_as_late() -> None:
    watch, asked, looked, loop = Watch(), {}, {}, asyncio.get_running_loop()
    for number in range(50):
        asked[number] = loop.time()
        watch.soon(lambda number=number: looked.setdefault(number, loop.time()))  # type: ignore[misc]
        await asyncio.sleep(0.13)
    await asyncio.sleep(2 * SOON)
    assert looked.keys() == asked.keys()
    assert all(SOON <= at - asked[number] <= 2 * SOON + 0.001 for number, at in looked.items())


async def test_all_who_ask_together_have_one_timer_and_nobody_has_one_when_all_have_looked() -> None:
    watch, looked = Watch(), []
    timers = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def counted(*args: Any, **more: Any) -> asyncio.TimerHandle:
        timers.append(args[0])
        return call_later(*args, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "call_later", counted)
        for number in range(100):
            watch.soon(partial(looked.append, number))
        assert timers == [SOON]
        await asyncio.sleep(3 * SOON)
        assert looked == list(range(100))
        assert len([after for after in timers if after == SOON]) == 2


async def test_one_look_that_fails_takes_no_look_from_others_who_ask_later() -> None:
    watch, looked, failed = Watch(), [], []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failed.append(context["exception"]))
    watch.soon(partial(int, "no number"))
    await asyncio.sleep(1.5 * SOON)
    watch.soon(partial(looked.append, 1))
    await asyncio.sleep(3 * SOON)
    watch.soon(partial(looked.append, 2))
    await asyncio.sleep(3 * SOON)
    assert [type(error) for error in failed] == [ValueError]
    assert looked == [1, 2]


async def test_what_is_forgotten_looks_no_more_and_changes_nothing_for_others() -> None:
    watch, looked, loop = Watch(), [], asyncio.get_running_loop()
    begun = loop.time()
    recent, due = partial(looked.append, "recent"), partial(looked.append, "due")
    watch.soon(due)
    await asyncio.sleep(1.5 * SOON)
    watch.soon(recent)
    watch.forget(recent)
    watch.forget(due)
    watch.soon(lambda: looked.append(loop.time() - begun))
    await asyncio.sleep(3 * SOON)
    assert looked == [pytest.approx(3 * SOON)], "at the next but one tick of the one timer"


async def test_a_stream_that_is_over_is_held_by_nobody() -> None:
    client = Client()
    client.acks = False
    client.offer(1, static("local"))
    async with client.connected():
        await settle()
        assert client.got == ["local=1"]
    watch, over = client.session._watch, weakref.ref(client.session)
    del client
    await settle()
    gc.collect()
    assert over() is None, f"{watch} holds what nobody needs"


async def test_a_proxy_that_does_not_answer_is_stalled_and_counted_once() -> None:
    client = Client()
    client.acks = False
    client.offer(5, static("local"))
    async with client.connected():
        await asyncio.sleep(STALLED_AFTER - 1)
        assert client.session.state == "pending"
        await asyncio.sleep(100)
        assert client.session.state == "stalled"
        assert client.session.laggard() == Laggard(PROXY, "stalled", 0)
        assert client.metric("smc_xds_stalled_total") == 1
        client.say(Request(Type.CLUSTER, nonce=client.received[0].nonce))
        await settle()
        assert client.session.state == "synced"


async def test_a_refusal_is_reported_with_its_suspects_and_its_own_text() -> None:
    client = Client()
    old, new = source("old", 3), source("new", 7)
    client.acks = False
    client.offer(9, static("local"), Resource(Type.CLUSTER, "bad", b"bad", (old, new)))
    async with client.connected():
        await settle()
        client.refuse("bad: no such thing")
        await settle()
        assert client.session.state == "nacked"
        (nack,) = client.session.nacks
        assert (nack.proxy, nack.type_url, nack.resources) == (PROXY, Type.CLUSTER.value, ("bad",))
        assert (nack.text, nack.revision) == ("bad: no such thing", 9)
        assert nack.suspects == ((new.manifest, 7), (old.manifest, 3))
        laggard = client.session.laggard()
        assert laggard is not None
        assert laggard.reason == "NACKed Cluster bad"
        assert client.metric("smc_xds_nacks_total", type="Cluster") == 1


async def test_what_one_proxy_refuses_leaves_room_in_a_report_for_what_others_do() -> None:
    client = Client()
    client.acks = False
    names = [f"{'n' * 60}/{number}|80" for number in range(1000)]
    sources = tuple(source(f"{'m' * 60}-{number}", number) for number in range(1000))
    client.offer(9, *(Resource(Type.CLUSTER, name, name.encode(), sources) for name in names))
    async with client.connected():
        await settle()
        client.refuse("".join(f"{name}: bad\n" for name in names))
        await settle()
        (nack,) = client.session.nacks
        laggard = client.session.laggard()
        assert nack.suspects == tuple((f.manifest, f.mod_revision) for f in sources[:-6:-1])  # the newest
        assert laggard is not None
        assert laggard.reason.endswith("more")
        report = AckRecord("r", 9, 100, (laggard,) * MOST_REPORTED, (nack,) * MOST_REPORTED)
        assert len(encode(report)) < MOST_BYTES


async def test_one_proxy_fills_no_report_with_many_refusals_and_tells_first_what_can_be_left_out() -> None:
    client = Client()
    client.acks = False
    client.offer(9, *(static(f"c{n}") for n in range(10)), Resource(Type.CLUSTER, "z", b"z", (source("new", 7),)))
    async with client.connected():
        await settle()
        for _ in range(30):  # it blames nobody, so each is tried by itself
            client.refuse("no")
            await settle()
        assert len(client.session.stream.refusals) == 11
        assert len(client.session.nacks) == MOST_TOLD
        assert client.session.nacks[0].resources == ("z",)


async def test_the_way_to_the_last_ack_is_measured_from_the_offer() -> None:
    client = Client()
    client.acks = False
    client.offer(5, static("local"))
    async with client.connected():
        await asyncio.sleep(4)
        client.say(Request(Type.CLUSTER, nonce=client.received[0].nonce))
        await settle()
        assert client.metric("smc_convergence_seconds_count") == 1
        assert client.metric("smc_convergence_seconds_sum") == pytest.approx(4)


async def test_that_of_an_offer_which_replaced_another_is_measured_from_the_oldest() -> None:
    client = Client()
    client.acks = False
    client.offer(1, static("local"))
    async with client.connected():
        for revision in (2, 3, 4):
            await asyncio.sleep(1)
            client.offer(revision, static("local", f"{revision}"))
        await settle()
        client.acks = True
        client.say(Request(Type.CLUSTER, nonce=client.received[0].nonce))
        await settle()
        assert client.got == ["local=1", "local=4"]
        assert client.metric("smc_convergence_seconds_count") == 2
        assert client.metric("smc_convergence_seconds_sum") == pytest.approx(3 + 2, abs=0.01)


async def test_that_a_proxy_listens_is_told_once() -> None:
    client = Client()
    everything = (
        cluster("bookstore"),
        assignment("bookstore"),
        secret("identity"),
        listener("inbound", routes=("inbound",)),
        route("inbound", "bookstore"),
    )
    client.offer(1, *everything)
    async with client.connected():
        for request in (
            Request(Type.ENDPOINT, ("bookstore",)),
            Request(Type.SECRET, ("identity",)),
            Request(Type.LISTENER),
            Request(Type.ROUTE, ("inbound",)),
        ):
            await settle()
            assert client.ready == []
            client.say(request)
        await settle()
        assert client.ready == [PROXY]
        client.offer(2, *everything[:-1], route("inbound", "bookstore", mark="another"))
        await settle()
        assert "inbound=another:bookstore" in client.got
        assert client.ready == [PROXY]


# --------------------------------------------------------------------------------------------------------------- spans


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(module, "tracer", provider.get_tracer("test"))
    return exporter


def sampled_build() -> trace.SpanContext:
    return TracerProvider().get_tracer("test").start_span("smc.build").get_span_context()


async def test_a_push_and_its_ack_are_spans_of_the_build_and_the_last_ends_with_the_ack(
    spans: InMemorySpanExporter,
) -> None:
    client, build = Client(), sampled_build()
    client.acks = False
    client.slot.put(Snapshot.of([static("local")]), offer(5, build))
    client.slot.write()
    async with client.connected():
        await settle()
        (push,) = spans.get_finished_spans()
        assert push.name == "smc.push"
        assert push.attributes == {telemetry.PROXY: str(PROXY), telemetry.TYPE: "Cluster", telemetry.RESOURCES: 1}
        client.say(Request(Type.CLUSTER, nonce=client.received[0].nonce))
        await settle()
        _, ack = spans.get_finished_spans()
        assert (ack.name, dict(ack.attributes or {})[telemetry.REVISION]) == ("smc.ack", 5)
        for span in (push, ack):
            assert span.parent is not None
            assert (span.parent.trace_id, span.parent.span_id) == (build.trace_id, build.span_id)


async def test_what_nobody_records_makes_no_span(spans: InMemorySpanExporter) -> None:
    client = Client()
    client.slot.put(Snapshot.of([static("local")]), offer(5))
    client.slot.write()
    async with client.connected():
        await settle()
    assert client.got == ["local=1"]
    assert spans.get_finished_spans() == ()


async def test_no_span_is_left_open_when_an_offer_is_replaced_or_the_stream_ends(spans: InMemorySpanExporter) -> None:
    client = Client()
    client.acks = False
    async with client.connected():
        for revision in range(1, 5):
            client.slot.put(Snapshot.of([static("local", str(revision))]), offer(revision, sampled_build()))
            client.slot.write()
            await settle()
    assert sorted(
        dict(span.attributes or {})[telemetry.REVISION] for span in spans.get_finished_spans() if span.name == "smc.ack"
    ) == [1, 2, 3, 4]
