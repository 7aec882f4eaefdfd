"""What only etcd can show: dead, frozen and cut-off members, lost answers, fragments, restores, and etcd's refusals."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from aetcd import rpc
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from cluster import etcd
from cluster.etcd import EtcdKV, EtcdTLS, Revisions
from cluster.kv import (
    KV,
    Ambiguous,
    Batch,
    ClusterChanged,
    Committed,
    Compacted,
    Delete,
    Guard,
    HistoryChanged,
    Put,
    Refused,
    RevisionRegressed,
    Status,
    Unavailable,
)
from tests.contract.etcd_server import ADDRESS, EtcdFactory, EtcdServer, Wire, certificates, client, etcds, free_ports


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd that no test hurts."""
    with etcds(tmp_path_factory.mktemp("etcd")) as factory:
        yield factory.one()


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[EtcdFactory]:
    with etcds(tmp_path) as factory:
        yield factory


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not wait as long for a watch to say something."""
    monkeypatch.setattr(etcd, "QUIET", 0.3)
    monkeypatch.setattr(etcd, "ANSWER", 0.5)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes no endpoint for dead that is late because this machine has other things to do."""
    monkeypatch.setattr(etcd, "PATIENCE", 30.0)


@pytest.fixture
def unaided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not told by gRPC that a peer is dead, which notices after 3 s, or after 13."""
    late = {"grpc.keepalive_time_ms": 600_000, "grpc.http2.ping_timeout_ms": 600_000}
    monkeypatch.setattr(etcd, "_OPTIONS", tuple((dict(etcd._OPTIONS) | late).items()))


class Ledger:
    """Someone writes numbered keys, someone watches: nothing may be missing, and nothing come twice."""

    def __init__(self, writer: KV, watcher: KV, root: str) -> None:
        self._writer = writer
        self._watcher = watcher
        self._root = root
        self.written = 0
        self.seen: list[Batch] = []

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[Ledger]:
        after = await self._watcher.status()
        tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._watch(after))]
        try:
            await self.until_seen(3)
            yield self
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            await self.until_seen(0)
        finally:
            for task in tasks:
                task.cancel()
            failures = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(failure, asyncio.CancelledError) for failure in failures), failures
        found = [int(item.key.removeprefix(self._root)) for batch in self.seen for item in batch.puts]
        assert found == list(range(len(found)))
        revisions = [batch.revision for batch in self.seen]
        assert revisions == sorted(set(revisions))
        assert all(item.mod_revision == batch.revision for batch in self.seen for item in batch.puts)

    async def _write(self) -> None:
        for number in itertools.count():
            key = f"{self._root}{number}"
            while True:
                try:
                    await self._writer.transact([Put(key, b"")], [Guard(key, create_revision=0)])
                    break
                except (Unavailable, Ambiguous):
                    await asyncio.sleep(0.05)
            self.written = number + 1
            await asyncio.sleep(0.01)

    async def _watch(self, after: Status) -> None:
        async with aclosing(self._watcher.watch(self._root, after)) as batches:
            async for batch in batches:
                self.seen.append(batch)

    async def until_seen(self, more: int) -> None:
        """Until all that was written is seen, and so many keys more."""
        enough = self.written + more
        async with asyncio.timeout(30):
            while len(self.seen) < enough:  # noqa: ASYNC110 - no event tells of what comes through a watch
                await asyncio.sleep(0.02)


# ----------------------------------------------------------------------------------------------------- a watch survives


async def test_a_watch_survives_a_killed_etcd(factory: EtcdFactory) -> None:
    server = factory.one()
    await server.until_ready()
    async with server.client() as writer, server.client() as watcher, Ledger(writer, watcher, "/n/").kept() as ledger:
        for _ in range(2):
            server.kill()
            await asyncio.sleep(0.3)
            server.start()
            await ledger.until_seen(10)


async def test_a_watch_survives_a_frozen_etcd(factory: EtcdFactory, impatient: None) -> None:
    server = factory.one()
    await server.until_ready()
    async with (
        server.client(timeout=1) as writer,
        server.client() as watcher,
        Ledger(writer, watcher, "/n/").kept() as ledger,
    ):
        for seconds in (0.2, 1.5):
            server.pause()
            await asyncio.sleep(seconds)
            server.resume()
            await ledger.until_seen(10)


async def test_a_member_that_dies_or_freezes_is_left_for_another(
    factory: EtcdFactory, impatient: None, unaided: None
) -> None:
    members = factory.three()
    endpoints = [member.endpoint for member in members]
    for member in members:
        await member.until_ready()
    async with (
        client(*endpoints) as writer,
        client(*endpoints, timeout=15) as kv,  # time for an election on a machine that is busy
        Ledger(writer, kv, "/n/").kept() as ledger,
    ):
        # That of the first endpoint, to which everything is connected. Another answers before the call's time is up.
        members[0].pause()
        assert (await kv.status()).revision >= ledger.seen[-1].revision
        await ledger.until_seen(10)
        members[0].resume()
        await members[0].until_ready()
        # It stays where it is answered: on the second one.
        members[1].kill()
        await ledger.until_seen(10)


async def test_a_half_open_connection_of_a_watch_is_noticed(shared: EtcdServer, impatient: None, unaided: None) -> None:
    await shared.until_ready()
    async with (
        Wire(shared.endpoint) as wire,
        client(wire.endpoint, shared.endpoint) as kv,
        shared.client() as writer,
        Ledger(writer, kv, "/half-open/").kept() as ledger,
    ):
        wire.swallow_requests = wire.swallow_answers = True
        await ledger.until_seen(10)


async def test_a_quiet_watch_is_not_taken_for_a_dead_one(shared: EtcdServer, impatient: None) -> None:
    await shared.until_ready()
    async with Wire(shared.endpoint) as wire, client(wire.endpoint) as kv, shared.client() as writer:
        watching = asyncio.create_task(first(kv, "/quiet/", await kv.status()))
        await asyncio.sleep(3 * (etcd.QUIET + etcd.ANSWER))
        assert wire.connections == 1
        assert kv._order()[0].resting_until == 0
        revision = await written(writer, "/quiet/a")
        assert (await watching).revision == revision


# --------------------------------------------------------------------------------------------------- choosing endpoints


async def test_an_endpoint_that_refuses_costs_nothing(shared: EtcdServer, patient: None) -> None:
    await shared.until_ready()
    async with client(f"{ADDRESS}:{free_ports(1)[0]}", shared.endpoint, timeout=60) as kv, asyncio.timeout(15):
        # Never Ambiguous: it is known not to have been sent.
        assert isinstance(await kv.transact([Put("/refuses", b"")]), Committed)


async def test_an_endpoint_that_says_nothing_is_left_and_not_asked_again_at_once(
    shared: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "COOL_DOWN", 60.0)
    await shared.until_ready()
    loop = asyncio.get_running_loop()
    async with Wire(shared.endpoint) as hole, client(hole.endpoint, shared.endpoint, timeout=60) as kv:
        hole.swallow_requests = hole.swallow_answers = True
        began = loop.time()
        assert isinstance(await kv.transact([Put("/hole", b"")]), Committed)
        assert 0.9 * etcd.PATIENCE <= loop.time() - began < 20 * etcd.PATIENCE, "long before its time is up"
        for _ in range(10):
            # It may be connected to again, by a keepalive that finds it dead, but it is not the one that is asked.
            assert kv._order()[0].address == shared.endpoint
            await kv.get("/hole")


async def test_an_endpoint_that_came_back_is_not_gone_back_to(
    shared: EtcdServer, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "COOL_DOWN", 0.1)
    await shared.until_ready()
    async with Wire(shared.endpoint) as wire, client(wire.endpoint, shared.endpoint) as kv:
        await wire.cut()
        await kv.status()
        await wire.open()
        await asyncio.sleep(0.2)
        before = wire.connections
        await kv.status()
        assert kv._order()[0].address == shared.endpoint
        assert wire.connections == before


async def test_while_one_call_waits_for_an_endpoint_later_ones_are_sent_elsewhere(shared: EtcdServer) -> None:
    await shared.until_ready()
    async with Wire(shared.endpoint) as wire, client(wire.endpoint, shared.endpoint, timeout=60) as kv:
        await kv.status()
        wire.swallow_answers = True
        waiting = asyncio.create_task(kv.transact([Put("/waits", b"")]))
        await asyncio.sleep(etcd.PATIENCE + 0.1)
        async with asyncio.timeout(20):
            assert isinstance(await kv.transact([Put("/waits", b"")]), Committed)
        assert not waiting.done()
        await wire.cut()
        with pytest.raises(Ambiguous):
            await waiting


async def test_one_that_comes_back_answers_a_read_although_another_stays_silent(
    shared: EtcdServer, unaided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "COOL_DOWN", 60.0)
    await shared.until_ready()
    async with (
        Wire(shared.endpoint) as late,
        Wire(shared.endpoint) as silent,
        client(late.endpoint, silent.endpoint, timeout=8) as kv,
    ):
        await late.cut()
        before = await kv.status()
        await late.open()
        silent.swallow_requests = silent.swallow_answers = True
        await kv.status()
        await late.cut()
        reading = asyncio.create_task(kv.status())
        await asyncio.sleep(2 * etcd.PATIENCE)
        await late.open()
        assert await reading == before, "whoever is asked last leaves time for the others"


async def test_where_nothing_answers_the_error_names_every_endpoint_and_why(shared: EtcdServer) -> None:
    await shared.until_ready()
    closed = f"{ADDRESS}:{free_ports(1)[0]}"
    loop = asyncio.get_running_loop()
    async with Wire(shared.endpoint) as hole, client(closed, hole.endpoint, timeout=1.5) as kv:
        hole.swallow_requests = hole.swallow_answers = True
        began = loop.time()
        with pytest.raises(Unavailable) as unavailable:
            await kv.transact([Put("/nowhere", b"")])
        assert 1.4 < loop.time() - began < 15
    text = str(unavailable.value)
    assert "within 1.5 s" in text
    assert re.search(f"{closed}: .*Connection refused; {hole.endpoint}: .*(no connection|timed out)", text)


async def test_reads_wait_for_an_etcd_that_is_restarting(factory: EtcdFactory) -> None:
    server = factory.one()
    await server.until_ready()
    async with server.client(timeout=20) as kv:
        await kv.transact([Put("/a", b"kept")])
        server.kill()
        reading = asyncio.create_task(kv.get("/a"))
        await asyncio.sleep(0.3)
        server.start()
        item = await reading
        assert item is not None
        assert item.value == b"kept"


# --------------------------------------------------------------------------------------------------------- lost answers


@pytest.mark.parametrize("cut", [False, True], ids=["silent", "cut"])
async def test_a_transaction_whose_answer_was_lost_is_ambiguous(shared: EtcdServer, patient: None, cut: bool) -> None:
    await shared.until_ready()
    key = f"/lost/{cut}"
    async with (
        Wire(shared.endpoint) as wire,
        client(wire.endpoint, shared.endpoint, timeout=60 if cut else 4) as kv,
        shared.client() as other,
    ):
        await kv.status()
        wire.swallow_answers = True
        writing = asyncio.create_task(kv.transact([Put(key, b"once")], [Guard(key, create_revision=0)]))
        if cut:
            while await other.get(key) is None:  # noqa: ASYNC110 - it is at the other end
                await asyncio.sleep(0.02)
            await wire.cut()
        with pytest.raises(Ambiguous, match=f"sent to etcd at {wire.endpoint}"):
            await writing
        item = await kv.get(key)
        assert item is not None
        assert (item.value, item.create_revision) == (b"once", item.mod_revision)


async def test_closing_ends_what_is_under_way_with_an_error_not_a_cancellation(shared: EtcdServer) -> None:
    await shared.until_ready()
    async with Wire(shared.endpoint) as wire, client(wire.endpoint) as kv:
        after = await kv.status()
        wire.swallow_answers = True
        reading = asyncio.create_task(kv.get("/closing"))
        writing = asyncio.create_task(kv.transact([Put("/closing", b"")]))
        renewing = asyncio.create_task(kv.renew(1))
        await asyncio.sleep(0.2)
        await kv.close()
        for task, error in ((reading, Unavailable), (writing, Ambiguous), (renewing, Unavailable)):
            with pytest.raises(error, match="closed"):
                await task
    async with Wire(shared.endpoint) as hole, client(hole.endpoint) as kv:
        hole.swallow_answers = True
        reading, watching = asyncio.create_task(kv.get("/a")), asyncio.create_task(first(kv, "/", after))
        await asyncio.sleep(0.2)
        await kv.close()
        for task in (reading, watching):
            with pytest.raises(Unavailable, match="closed"):
                await task


async def test_a_transaction_that_writes_nothing_is_asked_again(shared: EtcdServer) -> None:
    await shared.until_ready()
    async with Wire(shared.endpoint) as wire, client(wire.endpoint, shared.endpoint) as kv:
        await kv.status()
        wire.swallow_answers = True
        assert isinstance(await kv.transact([], [Guard("/absent", create_revision=0)]), Committed)
    async with Wire(shared.endpoint) as wire, client(wire.endpoint, timeout=4) as kv:
        await kv.status()
        wire.swallow_answers = True
        with pytest.raises(Unavailable):
            await kv.transact([], [Guard("/absent", create_revision=0)])


# ------------------------------------------------------------------------------------------------------------- big data


async def test_a_big_catch_up_arrives_in_fragments_and_whole(
    shared: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shared.until_ready()
    fragments = []

    class Counting(Revisions):
        def feed(self, events: Sequence[Any], *, more: bool) -> list[Batch]:
            fragments.append(more)
            return super().feed(events, more=more)

    monkeypatch.setattr(etcd, "Revisions", Counting)
    async with shared.client(timeout=20) as kv:
        after = await kv.status()
        value = b"x" * 25_000
        for number in range(300):
            await kv.transact([Put(f"/big/{number}/a", value), Put(f"/big/{number}/b", value)])
        batches = []
        async with asyncio.timeout(30), aclosing(kv.watch("/big/", after)) as watch:
            async for batch in watch:
                batches.append(batch)
                if len(batches) == 300:
                    break
    assert any(fragments)
    assert [batch.revision for batch in batches] == list(range(after.revision + 1, after.revision + 301))
    assert [[item.key for item in batch.puts] for batch in batches] == [
        [f"/big/{number}/a", f"/big/{number}/b"] for number in range(300)
    ]


async def test_a_long_listing_of_small_values_takes_few_answers(
    shared: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    await shared.until_ready()
    async with shared.client() as kv:
        keys = [f"/many/{number:04}" for number in range(3_000)]
        for first in range(0, len(keys), 100):
            await kv.transact([Put(key, b"x") for key in keys[first : first + 100]])
        ask = kv._ask

        async def counted(*args: Any, **more: Any) -> Any:
            nonlocal asked
            asked += 1
            return await ask(*args, **more)

        monkeypatch.setattr(kv, "_ask", counted)
        listing = await kv.list("/many/")
    assert [item.key for item in listing.items] == keys
    assert asked == 3, "500, 1,000 and 2,000 keys"


async def test_a_listing_whose_page_is_too_large_for_one_message_takes_smaller_ones(
    shared: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shared.until_ready()
    options = dict(etcd._OPTIONS) | {"grpc.max_receive_message_length": 1_000_000}
    monkeypatch.setattr(etcd, "_OPTIONS", tuple(options.items()))
    async with shared.client() as kv:
        for number in range(20):
            await kv.transact([Put(f"/large/{number:02}", b"x" * 300_000)])
        listing = await kv.list("/large/")
    assert [item.key for item in listing.items] == [f"/large/{number:02}" for number in range(20)]


@given(st.lists(st.integers(1, 5), max_size=12), st.data())
def test_however_events_are_cut_into_messages_whole_revisions_come_out(sizes: list[int], data: st.DataObject) -> None:
    events = [event(10 + n, f"k{n}.{i}") for n, size in enumerate(sizes) for i in range(size)]
    expected = [(10 + n, tuple(f"k{n}.{i}" for i in range(size))) for n, size in enumerate(sizes)]
    seen = data.draw(st.integers(9, 10 + len(sizes)))
    revisions, found = Revisions(seen), []
    while events:
        length = data.draw(st.integers(1, len(events)))
        part, events = events[:length], events[length:]
        # A revision that goes on in the next message is what `fragment` tells of.
        more = bool(events) and (events[0].kv.mod_revision == part[-1].kv.mod_revision or data.draw(st.booleans()))
        found += [(batch.revision, tuple(item.key for item in batch.puts)) for batch in revisions.feed(part, more=more)]
        # The same again, as after a resumption.
        assert revisions.feed(part[:1] if not more else [], more=more) == []
    assert found == [(revision, keys) for revision, keys in expected if revision > seen]


# ------------------------------------------------------------------------------------------------------ other histories


async def test_compaction_behind_a_watch_that_was_cut_off_says_so(shared: EtcdServer) -> None:
    await shared.until_ready()
    async with (
        Wire(shared.endpoint) as wire,
        client(wire.endpoint) as kv,
        shared.client() as other,
        aclosing(kv.watch("/cut/", await other.status())) as batches,
    ):
        revision = await written(other, "/cut/a")
        assert (await anext(batches)).revision == revision
        await wire.cut()
        await other.transact([Delete("/cut/a")])
        compacted = await written(other, "/cut/b")
        await other.compact(compacted)
        await wire.open()
        with pytest.raises(Compacted) as gone:
            async with asyncio.timeout(20):
                await anext(batches)
        assert gone.value.revision == compacted


@pytest.mark.parametrize(
    ("token", "error"),
    [("etcd-cluster", RevisionRegressed), ("another", ClusterChanged)],
    ids=["same token", "new token"],
)
async def test_a_restore_ends_a_watch(
    factory: EtcdFactory, tmp_path: Path, token: str, error: type[HistoryChanged]
) -> None:
    server = factory.one()
    await server.until_ready()
    async with server.client(timeout=20) as kv:
        await kv.transact([Put("/a", b"before")])
        await asyncio.to_thread(server.save, tmp_path / "snapshot")
        saved = await kv.status()
        async with aclosing(kv.watch("/", saved)) as batches:
            for number in range(20):
                await kv.transact([Put("/a", b"%d" % number)])
                await anext(batches)
            seen = await kv.status()
            server.kill()
            await asyncio.to_thread(server.restore, tmp_path / "snapshot", token)
            server.start()
            await server.until_ready()
            await kv.transact([Put("/a", b"after")])
            with pytest.raises(error):
                async with asyncio.timeout(20):
                    await anext(batches)
        now = await kv.status()
        assert now.revision == saved.revision + 1
        assert (now.cluster_id == seen.cluster_id) == (error is RevisionRegressed)


# ---------------------------------------------------------------------------------------------------- what etcd refuses


async def test_an_etcd_that_is_full_refuses_writes_with_what_to_do(factory: EtcdFactory) -> None:
    server = factory.one(flags=["--quota-backend-bytes=500000"])
    await server.until_ready()
    async with server.client() as kv:
        lease = await kv.grant(60)

        async def fill() -> None:
            for number in range(100):
                await kv.transact([Put(f"/{number}", b"x" * 100_000)])

        with pytest.raises(Refused, match=r"space exceeded; compact and defragment .* `etcdctl alarm disarm`"):
            await fill()
        # It can be read, and whoever leads goes on leading.
        listed = await kv.list("/")
        assert len(listed.items) == (await kv.survey("/")).count > 0
        assert await kv.renew(lease) == 60


async def test_who_may_not_touch_a_key_is_refused_with_what_to_do(factory: EtcdFactory, tmp_path: Path) -> None:
    pki = certificates(tmp_path)
    server = factory.one(tls=pki)
    await server.until_ready()
    await restrict(server, user="smc", prefix=b"/smc/")
    async with client(server.endpoint, tls=pki.client) as kv:
        with pytest.raises(Refused, match=r"refused a read of where the store is: .*permission denied; grant"):
            await kv.status()
    kv = EtcdKV([server.endpoint], tls=pki.client, probe="/smc/epoch")
    try:
        after = await kv.status()
        revision = await written(kv, "/smc/a")
        assert (await first(kv, "/smc/", after)).revision == revision
        assert (await kv.list("/smc/")).items[0].key == "/smc/a"
        assert isinstance(await kv.transact([], []), Committed)
        for call in (kv.get("/other"), kv.list("/"), kv.transact([Put("/other", b"")]), first(kv, "/", after)):
            with pytest.raises(Refused, match="permission denied; grant"):
                await call
    finally:
        await kv.close()


async def test_a_client_or_server_that_is_not_trusted_is_told_why(factory: EtcdFactory, tmp_path: Path) -> None:
    pki = certificates(tmp_path)
    (tmp_path / "other").mkdir()
    server = factory.one(tls=pki)
    await server.until_ready()
    strangers = certificates(tmp_path / "other").client
    for tls in (EtcdTLS(pki.client.ca), EtcdTLS(pki.client.ca, strangers.certificate, strangers.key)):
        async with client(server.endpoint, tls=tls, timeout=3) as kv:
            with pytest.raises(Unavailable, match=server.endpoint):
                await kv.status()
    async with client(server.endpoint, tls=strangers, timeout=3) as kv:
        with pytest.raises(Unavailable, match=r"(?i)certificate"):
            await kv.status()


def test_a_private_key_is_not_shown() -> None:
    assert "secret" not in repr(EtcdTLS(b"ca", b"certificate", b"secret"))


def test_a_client_needs_an_endpoint() -> None:
    with pytest.raises(ValueError, match="at least one"):
        EtcdKV([])


async def test_it_tells_the_servers_version(shared: EtcdServer) -> None:
    await shared.until_ready()
    async with shared.client() as kv:
        assert tuple(map(int, (await kv.version()).split("."))) >= (3, 4)


# -------------------------------------------------------------------------------------------------------------- tracing


async def test_a_transaction_is_a_span(shared: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    await shared.until_ready()
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(etcd, "tracer", provider.get_tracer("test"))
    async with shared.client() as kv:
        revision = await written(kv, "/span")
        await kv.transact([Put("/span", b""), Put("/span/2", b"")], [Guard("/span", create_revision=0)])
        await kv.get("/span")
        monkeypatch.setattr(etcd, "check_transaction", lambda *_: None)
        with pytest.raises(Refused):
            await kv.transact([Put("/span", b""), Put("/span", b"")])
    provider.shutdown()
    good, rejected, refused = exporter.get_finished_spans()
    assert {span.name for span in (good, rejected, refused)} == {"etcd.txn"}
    assert good.attributes == {
        "db.system.name": "etcd",
        "db.operation.name": "txn",
        "etcd.txn.operations": 1,
        "etcd.txn.guards": 0,
        "etcd.txn.succeeded": True,
        "etcd.revision": revision,
    }
    assert rejected.attributes is not None
    assert (rejected.attributes["etcd.txn.succeeded"], rejected.attributes["etcd.txn.guards"]) == (False, 1)
    assert rejected.status.status_code is StatusCode.UNSET
    assert refused.status.status_code is StatusCode.ERROR


# ------------------------------------------------------------------------------------------ what no etcd does on demand


@dataclass
class Script:
    """An etcd that answers as it is told to, and remembers what it was asked."""

    watches: list[list[Any]] = field(default_factory=list)
    """Responses of each stream, which then breaks; the last stream stays open, and so does one that ends with None."""
    revision: int = 100
    failure: tuple[grpc.StatusCode, str] | None = None
    starts: list[int] = field(default_factory=list)
    calls: list[tuple[str, dict[str, str], float | None]] = field(default_factory=list)
    transactions: list[Any] = field(default_factory=list)

    @property
    def header(self) -> Any:
        return rpc.ResponseHeader(cluster_id=7, revision=self.revision)

    async def answer(self, name: str, context: Any, response: Any) -> Any:
        self.calls.append((name, dict(context.invocation_metadata()), context.time_remaining()))
        if self.failure is not None:
            await context.abort(*self.failure)
        return response

    async def watch(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.calls.append(("Watch", dict(context.invocation_metadata()), context.time_remaining()))
        self.starts.append((await anext(requests)).create_request.start_revision)
        for response in self.watches.pop(0):
            if response is None:
                await asyncio.Event().wait()
            yield response
        if not self.watches:
            await asyncio.Event().wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream broke")

    async def keep_alive(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        request = await anext(requests)
        answer = rpc.LeaseKeepAliveResponse(header=self.header, ID=request.ID, TTL=9)
        yield await self.answer("KeepAlive", context, answer)


SCRIPTED = 10.0
"""Seconds that each call to a scripted etcd has."""


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[EtcdKV]:
    def unary(name: str, request: Any, response: Callable[[Any], Any]) -> Any:
        async def answer(message: Any, context: Any) -> Any:
            return await script.answer(name, context, response(message))

        return grpc.unary_unary_rpc_method_handler(
            answer, request.FromString, lambda message: message.SerializeToString()
        )

    def streamed(call: Any, request: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(
            call, request.FromString, lambda message: message.SerializeToString()
        )

    def header(kind: Any) -> Callable[[Any], Any]:
        return lambda _: kind(header=script.header)

    def committed(request: Any) -> Any:
        script.transactions.append(request)
        return rpc.TxnResponse(header=script.header, succeeded=True)

    server = grpc.aio.server()
    services = {
        "KV": {
            "Range": unary("Range", rpc.RangeRequest, header(rpc.RangeResponse)),
            "Txn": unary("Txn", rpc.TxnRequest, committed),
            "Compact": unary("Compact", rpc.CompactionRequest, header(rpc.CompactionResponse)),
        },
        "Lease": {
            "LeaseGrant": unary(
                "Grant", rpc.LeaseGrantRequest, lambda r: rpc.LeaseGrantResponse(header=script.header, ID=1, TTL=r.TTL)
            ),
            "LeaseRevoke": unary("Revoke", rpc.LeaseRevokeRequest, header(rpc.LeaseRevokeResponse)),
            "LeaseKeepAlive": streamed(script.keep_alive, rpc.LeaseKeepAliveRequest),
        },
        "Maintenance": {"Status": unary("Status", rpc.StatusRequest, lambda _: rpc.StatusResponse(version="3.4.22"))},
        "Watch": {"Watch": streamed(script.watch, rpc.WatchRequest)},
    }
    for name, methods in services.items():
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"etcdserverpb.{name}", methods)])
    port = server.add_insecure_port(f"{ADDRESS}:0")
    await server.start()
    try:
        async with client(f"{ADDRESS}:{port}", timeout=SCRIPTED) as kv:
            yield kv
    finally:
        await server.stop(None)


async def test_a_watch_is_resumed_after_what_was_delivered_not_at_what_a_header_says() -> None:
    script = Script()
    created = rpc.WatchResponse(header=script.header, created=True)
    script.watches = [
        # The store is at 100, and of what came after 50 only 51 was delivered when the stream broke.
        [created, response(script, event(51, "/a"))],
        [created, rpc.WatchResponse(header=script.header, watch_id=-1)],
        [created, response(script, event(52, "/b"), event(53, "/c"))],
    ]
    async with scripted(script) as kv, asyncio.timeout(10), aclosing(kv.watch("/", Status(7, 50))) as batches:
        assert [(await anext(batches)).revision for _ in range(3)] == [51, 52, 53]
    assert script.starts == [50, 51, 51]


async def test_a_fragment_that_was_cut_short_is_read_again() -> None:
    script = Script()
    created = rpc.WatchResponse(header=script.header, created=True)
    script.watches = [
        [created, response(script, event(51, "/a"), event(52, "/b"), event(53, "/c"), fragment=True)],
        [created, response(script, event(52, "/b"), event(53, "/c"), event(53, "/d"))],
    ]
    async with scripted(script) as kv, asyncio.timeout(10), aclosing(kv.watch("/", Status(7, 50))) as batches:
        found = [await anext(batches) for _ in range(3)]
    assert [[item.key for item in batch.puts] for batch in found] == [["/a"], ["/b"], ["/c", "/d"]]
    assert script.starts == [50, 52]


async def test_a_member_that_lags_behind_is_not_taken_for_a_restored_one() -> None:
    script = Script(revision=100)
    created = rpc.WatchResponse(header=rpc.ResponseHeader(cluster_id=7, revision=90), created=True)
    script.watches = [[created, response(script, event(101, "/a"))]]
    async with scripted(script) as kv, asyncio.timeout(10), aclosing(kv.watch("/", Status(7, 100))) as batches:
        assert (await anext(batches)).revision == 101


async def test_a_watch_that_etcd_cancels_for_another_reason_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd, "QUIET", 60.0)  # for as long as it would be waited, were it not heard
    script = Script()
    created = rpc.WatchResponse(header=script.header, created=True)
    script.watches = [
        [created, rpc.WatchResponse(header=script.header, canceled=True, cancel_reason="it is overloaded"), None],
        [created, response(script, event(51, "/a"))],
    ]
    async with scripted(script) as kv, asyncio.timeout(20), aclosing(kv.watch("/", Status(7, 50))) as batches:
        assert (await anext(batches)).revision == 51


async def test_every_call_has_a_deadline_and_asks_for_a_member_with_a_leader() -> None:
    script = Script(watches=[[rpc.WatchResponse(header=rpc.ResponseHeader(cluster_id=7, revision=100), created=True)]])
    async with scripted(script) as kv:
        await kv.status()
        await kv.get("/a")
        await kv.list("/a")
        await kv.survey("/a")
        await kv.version()
        await kv.transact([Put("/a", b"")])
        await kv.compact(5)
        await kv.renew(await kv.grant(9))
        await kv.revoke(1)
        watching = asyncio.create_task(first(kv, "/", Status(7, 100)))
        async with asyncio.timeout(30):
            while "Watch" not in {name for name, _, _ in script.calls}:  # noqa: ASYNC110 - it is at the other end
                await asyncio.sleep(0.02)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert {name for name, _, _ in script.calls} == {
        "Range", "Status", "Txn", "Compact", "Grant", "Revoke", "KeepAlive", "Watch",
    }  # fmt: skip
    assert len(script.calls) == 11
    for name, metadata, remaining in script.calls:
        assert metadata["hasleader"] == "true"
        if name != "Watch":
            assert remaining is not None
            assert 0 < remaining < 2 * SCRIPTED, "gRPC rounds it up"


async def test_a_transaction_of_nothing_is_not_answered_from_what_one_member_knows() -> None:
    # etcd answers so where a transaction has no read that must be linearizable.
    script = Script()
    async with scripted(script) as kv:
        await kv.transact([])
        await kv.transact([], [Guard("/a", create_revision=0)])
    for request in script.transactions:
        [read] = request.success
        assert read.HasField("request_range")
        assert not read.request_range.serializable


@pytest.mark.parametrize(
    ("code", "details", "error"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Refused),
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: request is too large", Refused),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "grpc: received message larger than max (3 vs. 2)", Refused),
        (grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", Refused),
        (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", Refused),
        (grpc.StatusCode.DATA_LOSS, "etcdserver: corrupt cluster", Refused),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader", Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Unavailable),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out", Ambiguous),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed", Ambiguous),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Ambiguous),
        (grpc.StatusCode.UNKNOWN, "raft proposal dropped", Ambiguous),
        (grpc.StatusCode.CANCELLED, "etcdserver: request is cancelled", Ambiguous),
    ],
)
async def test_an_error_of_etcd_tells_whether_a_transaction_may_have_happened(
    code: grpc.StatusCode, details: str, error: type[Exception]
) -> None:
    script = Script(failure=(code, details))
    async with scripted(script) as kv:
        kv._timeout = 2.0 if error is Unavailable else SCRIPTED  # for so long it is tried again
        with pytest.raises(error, match=re.escape(details)):
            await kv.transact([Put("/a", b"")])
        sent = len(script.calls)
        assert (sent == 1) == (error is not Unavailable)
        # A read may be asked again, whatever became of it.
        kv._timeout = SCRIPTED if error is Refused else 0.3
        with pytest.raises(Refused if error is Refused else Unavailable):
            await kv.get("/a")


# -------------------------------------------------------------------------------------------------------------- helpers


def event(revision: int, key: str) -> Any:
    return rpc.Event(type=rpc.Event.PUT, kv=rpc.KeyValue(key=key.encode(), mod_revision=revision))


def response(script: Script, *events: Any, fragment: bool = False) -> Any:
    return rpc.WatchResponse(header=script.header, events=events, fragment=fragment)


async def written(kv: KV, key: str) -> int:
    outcome = await kv.transact([Put(key, b"v")])
    assert isinstance(outcome, Committed)
    return outcome.revision


async def first(kv: KV, prefix: str, after: Status) -> Batch:
    async with asyncio.timeout(30), aclosing(kv.watch(prefix, after)) as batches:
        return await anext(batches)


async def restrict(server: EtcdServer, *, user: str, prefix: bytes) -> None:
    """Turn access control on; the certificate's name `user` may use what begins with `prefix`, and nothing else."""
    assert server.tls is not None
    tls = server.tls.client
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    async with grpc.aio.secure_channel(server.endpoint, credentials) as channel:
        auth = rpc.AuthStub(channel)
        for name in ("root", user):
            await auth.UserAdd(rpc.AuthUserAddRequest(name=name, password="unused"))
            await auth.RoleAdd(rpc.AuthRoleAddRequest(name=name))
            await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=name, role=name))
        permission = rpc.Permission(
            permType=rpc.Permission.READWRITE, key=prefix, range_end=prefix[:-1] + bytes([prefix[-1] + 1])
        )
        await auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name=user, perm=permission))
        await auth.AuthEnable(rpc.AuthEnableRequest())
