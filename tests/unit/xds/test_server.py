"""Who may open a stream, how each refusal looks, and how streams end; over real gRPC and real mTLS on loopback."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import structlog

from cluster.kv import Delete
from smc.certificates import x509
from smc.codec import decode
from smc.errors import Unavailable
from smc.model import Name
from smc.records import AdmissionRecord, ReadyRecord, RevocationRecord
from smc.xds import server, session
from smc.xds.slot import Slot
from smc.xds.snapshot import Type
from tests.unit.bookshop import KEYS, service, workload
from tests.unit.xds.replica import (
    METHOD,
    Client,
    Mesh,
    Replica,
    answer_to,
    channel,
    open_stream,
    request,
    said_on,
    serving,
    until,
)

Code = grpc.StatusCode
FIRST = request(Type.CLUSTER, node="shop/buyer")


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[tuple[Mesh, Replica]]:
    """A bookstore with a buyer, and one replica that is ready."""
    mesh = await Mesh.make()
    await mesh.observe(service("store"), workload("buyer"), workload("store", "store"))
    await mesh.certify("buyer", "store")
    async with serving(mesh, **settings) as replica:
        await until(lambda: replica.pipeline.ready)
        yield mesh, replica


@asynccontextmanager
async def buyers(mesh: Mesh, replica: Replica, number: int) -> AsyncIterator[list[Client]]:
    """So many proxies, all connected and complete."""
    names = [f"b{n}" for n in range(number)]
    await mesh.observe(service("store"), *(workload(n, address=f"127.0.3.{i + 1}") for i, n in enumerate(names)))
    await mesh.certify(*names)
    async with AsyncExitStack() as stack:
        clients = [await Client.of(mesh, name) for name in names]
        for client in clients:
            await stack.enter_async_context(client.connected(replica))
        await until(lambda: all(client.is_complete for client in clients), 30)
        yield clients


# ------------------------------------------------------------------------------------------------------ a good stream


async def test_a_proxy_gets_all_that_it_asks_for_and_nothing_twice() -> None:
    async with world() as (mesh, replica):
        client = await Client.of(mesh, "buyer")
        async with client.connected(replica):
            await until(lambda: client.is_complete)
            await asyncio.sleep(0.2)
            assert set(client.has[Type.CLUSTER]) == {"shop/store|80", "passthrough"}
            assert set(client.has[Type.SECRET]) == {"identity", "bundle"}
            assert set(client.has[Type.LISTENER]) == {"outbound"}
            names = [(type_, name) for type_, found, _ in client.news() for name in found]
            assert len(names) == len(set(names))
            assert client.identifier == "replica-1/1/1"
            assert replica.metric("smc_xds_streams") == 1
        await until(lambda: replica.metric("smc_xds_streams") == 0)
        assert not replica.streams.sessions


async def test_a_proxy_that_listens_is_written_as_ready() -> None:
    async with world() as (mesh, replica):
        await mesh.observe(service("store"), workload("buyer"), workload("store", "store"), workload("fresh"))
        await mesh.certify("fresh")
        await mesh.kv.transact([Delete(KEYS.ready(Name("shop", "fresh")))])
        client = await Client.of(mesh, "fresh")
        async with client.connected(replica):
            await until(lambda: client.is_complete)
            await until(lambda: mesh.store.get(KEYS.ready(Name("shop", "fresh"))) is not None)
        item = mesh.store.get(KEYS.ready(Name("shop", "fresh")))
        assert item is not None
        assert decode(ReadyRecord, item.value).workload == Name("shop", "fresh")


async def test_a_newer_stream_of_a_proxy_ends_the_older() -> None:
    async with world() as (mesh, replica):
        older, newer = await Client.of(mesh, "buyer"), await Client.of(mesh, "buyer")
        async with older.connected(replica):
            await until(lambda: older.is_complete)
            async with newer.connected(replica):
                await until(lambda: newer.is_complete and older.ended)
                assert older.ended == (Code.UNAVAILABLE, "a newer stream of shop/buyer took its place")
                assert len(replica.streams.sessions) == 1


# ------------------------------------------------------------------------------------------------------ who is refused


async def test_without_a_certificate_nobody_gets_as_far_as_a_word() -> None:
    async with world() as (_, replica):
        code, _ = await answer_to(replica, None, FIRST)
        assert code is Code.UNAVAILABLE
        assert not replica.streams.sessions


async def test_a_certificate_that_others_signed_is_none() -> None:
    async with world() as (_, replica):
        other = await Mesh.make()
        stranger = await other.credential("proxy/shop/buyer")
        code, _ = await answer_to(replica, stranger, FIRST)
        assert code is Code.UNAVAILABLE


@pytest.mark.parametrize("path", ["operator/ann", "viewer/vic", "replica/replica-2"])
async def test_only_a_proxys_credential_opens_a_stream(path: str) -> None:
    async with world() as (mesh, replica):
        code, text = await answer_to(replica, await mesh.credential(path), FIRST)
        assert code is Code.PERMISSION_DENIED
        assert text == f"{path} is no proxy's credential: only a proxy's may open a stream"
        assert replica.refused("denied") == 1


async def test_a_workloads_certificate_opens_no_stream() -> None:
    async with world() as (mesh, replica):
        workloads = await mesh.certified("spiffe://mesh.example/ns/shop/sa/buyer")
        code, text = await answer_to(replica, workloads, FIRST)
        assert code is Code.PERMISSION_DENIED
        assert "a workload's certificate is for the traffic of the mesh" in text


async def test_another_trust_domain_is_nobody_here() -> None:
    async with world() as (mesh, replica):
        stranger = await mesh.certified("spiffe://other.example/proxy/shop/buyer")
        code, _ = await answer_to(replica, stranger, FIRST)
        assert code is Code.UNAVAILABLE, "the authority may not sign for it, so TLS refuses it"


async def test_a_credential_that_expires_ends_its_stream_and_opens_no_other_on_its_connection() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer", ttl=timedelta(seconds=3))
        async with channel(replica, credential) as opened:
            code, text = await said_on(replica, open_stream(opened), FIRST)
            assert (code, text) == (Code.UNAVAILABLE, "the credential of shop/buyer has expired")
            assert time.time() >= credential.not_after
            code, text = await said_on(replica, open_stream(opened), FIRST)
            assert code is Code.UNAUTHENTICATED
            assert "has expired" in text
            assert replica.refused("unauthenticated") == 1
        code, _ = await answer_to(replica, credential, FIRST)
        assert code is Code.UNAVAILABLE, "and TLS refuses it as well"


async def test_a_revoked_credential_ends_its_stream_and_opens_no_other_and_one_that_was_let_in_does() -> None:
    async with world() as (mesh, replica):
        buyer, store = await Client.of(mesh, "buyer"), await Client.of(mesh, "store")
        async with buyer.connected(replica), store.connected(replica):
            await until(lambda: buyer.is_complete and store.is_complete)
            name = Name("shop", "buyer")
            revision = await mesh.put(KEYS.revoked_proxy(name), RevocationRecord(name, None, "", "", 1.0))
            await until(lambda: [s.proxy for s in replica.streams.sessions] == [Name("shop", "store")])
            refusal = (Code.PERMISSION_DENIED, "the credential of shop/buyer is revoked: ask for a new token")
            assert await answer_to(replica, buyer.credential, FIRST) == refusal
            assert replica.refused("revoked") >= 1
        again = await Client.of(mesh, "buyer")
        (leaf,) = x509.load(again.credential.chain)[:1]
        admitted = AdmissionRecord(name, revision, ((f"{leaf.serial_number:x}", again.credential.not_after),))
        let_in = await mesh.put(KEYS.admission(name), admitted)
        # Until then it is refused, and a proxy would come again.
        await until(lambda: replica.pipeline.mesh is not None and replica.pipeline.mesh.revision >= let_in)
        async with again.connected(replica):
            await until(lambda: again.is_complete)
            assert await answer_to(replica, buyer.credential, FIRST) == refusal
            assert [session.proxy for session in replica.streams.sessions] == [name], "and took no place from it"


async def test_a_proxy_speaks_for_itself_alone() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        code, text = await answer_to(replica, credential, request(Type.CLUSTER, node="shop/store"))
        assert code is Code.PERMISSION_DENIED
        assert text == "node.id is 'shop/store', and the credential is of shop/buyer: they must be equal"
        code, _ = await answer_to(replica, credential, request(Type.CLUSTER))
        assert code is Code.PERMISSION_DENIED, "the first message must say it"
        assert replica.refused("impostor") == 2


async def test_a_proxy_cannot_become_another_in_the_middle_of_a_stream() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        code, text = await answer_to(replica, credential, FIRST, request(Type.LISTENER, node="shop/store"))
        assert code is Code.PERMISSION_DENIED
        assert "node.id is 'shop/store'" in text
        assert replica.refused("impostor") == 1
        assert not replica.streams.sessions


@pytest.mark.parametrize("first", [True, False])
async def test_a_proxy_that_asks_for_anothers_secret_is_refused_counted_and_logged(first: bool) -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        theirs = request(Type.SECRET, "identity", "shop/store", node="shop/buyer")
        with structlog.testing.capture_logs() as logs:
            code, text = await answer_to(replica, credential, *([theirs] if first else [FIRST, theirs]))
        assert code is Code.PERMISSION_DENIED
        assert text == "shop/buyer asks for the secret 'shop/store': a proxy has identity and bundle"
        assert replica.refused("foreign_secret") == 1
        (line,) = [line for line in logs if line["event"] == "a proxy asks for a secret that is not its own"]
        assert (line["log_level"], line["smc.proxy"]) == ("warning", "shop/buyer")


async def test_all_secrets_at_once_are_refused_as_well() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        code, _ = await answer_to(replica, credential, FIRST, request(Type.SECRET, "*"))
        assert code is Code.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([b"\xff\xff\xff garbage"], "a message that is no DeltaDiscoveryRequest"),
        ([FIRST, b"\xff\xff\xff garbage"], "a message that is no DeltaDiscoveryRequest"),
        ([request(Type.CLUSTER, node="shop/buyer").replace(b"Cluster", b"Clutter")], "is not served here"),
        ([FIRST, request(Type.ENDPOINT, "")], "name is empty"),
    ],
)
async def test_what_no_correct_client_says_ends_the_stream(messages: list[bytes], text: str) -> None:
    async with world() as (mesh, replica):
        code, said = await answer_to(replica, await mesh.credential("proxy/shop/buyer"), *messages)
        assert code is Code.INVALID_ARGUMENT
        assert text in said
        assert not replica.streams.sessions


async def test_a_stream_that_says_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.FIRST_REQUEST == 10.0
    monkeypatch.setattr(server, "FIRST_REQUEST", 0.2)
    async with world() as (mesh, replica):
        code, text = await answer_to(replica, await mesh.credential("proxy/shop/buyer"))
        assert code is Code.DEADLINE_EXCEEDED
        assert "the stream said nothing for" in text
        assert replica.refused("silent") == 1


async def test_a_proxy_without_a_workload_is_told_so() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/stranger")
        code, text = await answer_to(replica, credential, request(Type.CLUSTER, node="shop/stranger"))
        assert code is Code.NOT_FOUND
        assert "no workload shop/stranger in the mesh" in text
        assert "apply its Workload" in text
        assert replica.refused("unknown_workload") == 1


async def test_a_full_replica_sends_the_next_one_away_before_it_looks_who_it_is() -> None:
    async with world(max_streams=1) as (mesh, replica):
        client = await Client.of(mesh, "buyer")
        async with client.connected(replica):
            await until(lambda: client.is_complete)
            code, text = await answer_to(replica, await mesh.credential("operator/ann"), FIRST)
            assert code is Code.RESOURCE_EXHAUSTED
            assert "at most 1 streams: try another one, or raise --max-streams" in text
            assert replica.refused("full") == 1


async def test_streams_that_are_only_being_opened_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_REQUEST", 1.0)
    async with world(max_streams=1) as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        silent = asyncio.create_task(answer_to(replica, credential))
        await until(lambda: replica.streams._opening)
        code, _ = await answer_to(replica, credential, FIRST)
        assert code is Code.RESOURCE_EXHAUSTED
        await silent
        async with channel(replica, credential) as opened:
            call = open_stream(opened)
            await call.write(FIRST)
            assert await call.read(), "and when they are gone there is room again"
            call.cancel()


async def test_a_replica_that_is_not_ready_says_why() -> None:
    mesh = await Mesh.make()
    async with serving(mesh) as replica:
        await until(lambda: replica.pipeline.mesh is not None)
        code, text = await answer_to(replica, await mesh.credential("proxy/shop/buyer"), FIRST)
        assert (code, text) == (Code.UNAVAILABLE, "these sources have not been observed yet: files")
        assert replica.refused("not_ready") == 1


async def test_without_the_store_a_cold_proxy_is_sent_away_and_a_connected_one_stays() -> None:
    async with world() as (mesh, replica):
        client, cold = await Client.of(mesh, "buyer"), await mesh.credential("proxy/shop/store")
        async with client.connected(replica):
            await until(lambda: client.is_complete)
            replica.kv.disconnect()
            code, text = await answer_to(replica, cold, request(Type.CLUSTER, node="shop/store"))
            assert code is Code.UNAVAILABLE
            assert "etcd cannot be reached" in text
            assert replica.refused("not_admitted") == 1
            assert client.ended is None


async def test_a_port_that_another_process_has_is_an_error_that_says_so() -> None:
    async with world() as (mesh, replica):
        taken = f"127.0.0.1:{replica.port}"
        own = await mesh.credential("replica/replica-2")
        tls = server.ServerTLS(own.chain, own.key, own.roots_pem)
        with pytest.raises(Unavailable, match=f"{taken} cannot be bound"):
            async with server.serving(replica.streams, lambda: tls, address=taken, max_connection_age=60):
                pass


# ------------------------------------------------------------------------------------------------------------ moving on


async def test_a_connection_that_is_old_enough_is_ended_and_the_next_stream_is_sent_nothing() -> None:
    async with world(max_connection_age=1.0) as (mesh, replica):
        client = await Client.of(mesh, "buyer")
        began = time.monotonic()
        async with client.connected(replica):
            await until(lambda: client.is_complete)
            await until(lambda: client.ended)
            assert 0.9 <= time.monotonic() - began <= 30
        await until(lambda: not replica.streams.sessions)
        client.news()
        answers = client.answers
        async with client.connected(replica):
            await until(lambda: client.answers >= answers + 2)
            await asyncio.sleep(0.3)
            assert client.news() == []


async def test_a_replica_that_stops_sends_all_streams_away_in_its_time_and_takes_no_other() -> None:
    async with world() as (mesh, replica), buyers(mesh, replica, 5) as clients:
        draining = asyncio.create_task(replica.streams.drain(6.0))
        await until(lambda: any(client.ended for client in clients))
        assert not all(client.ended for client in clients), "one after the other"
        code, text = await answer_to(replica, clients[0].credential, request(Type.CLUSTER, node="shop/b0"))
        assert (code, text) == (Code.UNAVAILABLE, "this replica shuts down")
        assert replica.refused("draining") == 1
        await draining
        await until(lambda: all(client.ended for client in clients))
        assert {client.ended for client in clients} == {(Code.UNAVAILABLE, "this replica shuts down")}


async def test_a_replica_without_streams_has_stopped_at_once() -> None:
    async with world() as (_, replica):
        await asyncio.wait_for(replica.streams.drain(60), 20)


async def test_the_surplus_moves_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BALANCE_EVERY", 0.05)
    monkeypatch.setattr(server, "SETTLED", 0.0)
    async with world() as (mesh, replica), buyers(mesh, replica, 9) as clients:
        order = [found.proxy for found in replica.streams.sessions]
        balancing = asyncio.create_task(
            replica.streams.balance(lambda: [9 - len(replica.streams.sessions)])  # who is sent away goes there
        )
        await until(lambda: len(replica.streams.sessions) == 6)
        await asyncio.sleep(0.5)
        assert len(replica.streams.sessions) == 6, "of 9 streams on two replicas the even share is 5, and 1 is allowed"
        ended = [client for client in clients if client.ended]
        assert {client.ended for client in ended} == {(Code.UNAVAILABLE, "another replica has fewer streams")}
        assert {client.name for client in ended} == set(order[-3:]), "those that came last"
        balancing.cancel()
        await asyncio.wait([balancing])


@dataclass(frozen=True, eq=False)
class Standing:
    slot: Slot
    opened: float


def standing(streams: server.Streams, number: int, *, opened: float = 0.0) -> list[Slot]:
    """Streams that do not end although they are asked to."""
    slots = [Slot() for _ in range(number)]
    streams._sessions = {Standing(slot, opened): None for slot in slots}  # type: ignore[misc]
    return slots


@pytest.mark.looptime
async def test_a_stream_that_takes_long_to_end_does_not_cost_another_its_place() -> None:
    streams = server.Streams(
        SimpleNamespace(), SimpleNamespace(),  # type: ignore[arg-type]
        replica="r", identifier="r", trust_domain="d", max_streams=99, listening=lambda _: None,
    )  # fmt: skip
    slots = standing(streams, 30)
    task = asyncio.create_task(streams.balance(lambda: [0 + sum(bool(slot.ended) for slot in slots)]))
    await asyncio.sleep(600)
    task.cancel()
    assert sum(bool(slot.ended) for slot in slots) == 30 - 15 - 1


@pytest.mark.looptime
async def test_a_stream_that_has_just_come_is_left_where_it_is() -> None:
    streams = server.Streams(
        SimpleNamespace(), SimpleNamespace(),  # type: ignore[arg-type]
        replica="r", identifier="r", trust_domain="d", max_streams=99, listening=lambda _: None,
    )  # fmt: skip
    slots = standing(streams, 30, opened=100.0)
    task = asyncio.create_task(streams.balance(lambda: [0]))
    await asyncio.sleep(100 + server.SETTLED - 0.1)
    assert not any(slot.ended for slot in slots)
    await asyncio.sleep(server.BALANCE_EVERY)
    assert any(slot.ended for slot in slots)
    task.cancel()


async def test_a_proxy_that_never_reads_costs_little_and_ends_while_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert session.WRITE_DEADLINE == 15.0
    monkeypatch.setattr(session, "WRITE_DEADLINE", 1.0)
    async with world() as (mesh, replica):
        services = [service(f"s{number}") for number in range(200)]
        await mesh.observe(service("store"), *services, workload("buyer"), workload("store", "store"))
        healthy, credential = await Client.of(mesh, "store"), await mesh.credential("proxy/shop/buyer")
        async with healthy.connected(replica), AsyncExitStack() as stack:
            await until(lambda: healthy.is_complete, 30)
            for _ in range(server.MOST_OF_ONE):
                call = open_stream(await stack.enter_async_context(channel(replica, credential, narrow=True)))
                await call.write(FIRST)
                await until(lambda: len(replica.streams.sessions) == 2)
                await mesh.observe(service("new"), *services, workload("buyer"), workload("store", "store"))
                await until(lambda: "shop/new|80" in healthy.has[Type.CLUSTER])
                await mesh.observe(service("store"), *services, workload("buyer"), workload("store", "store"))
                await until(lambda: "shop/store|80" in healthy.has[Type.CLUSTER])
                await until(lambda: len(replica.streams.sessions) == 1, 5)
            assert healthy.ended is None
            code, text = await answer_to(replica, credential, FIRST)
            assert code is Code.RESOURCE_EXHAUSTED
            assert "has 3 streams here already, open or with an end that it has not read" in text
            assert replica.refused("too_many_of_one") == 1
            assert await said_on(replica, call) == (Code.UNAVAILABLE, "the proxy did not read for 1 s"), (
                "it reads at last"
            )
        await until(lambda: not replica.streams._calls)
        async with channel(replica, credential) as opened:
            call = open_stream(opened)
            await call.write(FIRST)
            assert await call.read(), "and once its connections are gone there is room again"
            call.cancel()


async def test_a_stream_that_must_end_while_it_is_first_written_to_ends() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")
        for _ in range(50):
            code, _ = await answer_to(replica, credential, FIRST, request(Type.SECRET, "*"))
            assert code is Code.PERMISSION_DENIED


async def test_a_proxy_that_goes_while_it_is_admitted_leaves_nothing_behind() -> None:
    async with world() as (mesh, replica):
        credential = await mesh.credential("proxy/shop/buyer")

        class Gone:
            """A call that its client cancels as soon as it has been admitted."""

            peer = "test"
            certificate = x509.pem(x509.load(credential.chain)[0])

            async def read(self) -> bytes:
                return FIRST

            def drained(self) -> None:
                return None

            def start(self) -> None:
                raise asyncio.CancelledError

        serve = replica.streams.methods(server.AGGREGATED)[METHOD]
        with pytest.raises(asyncio.CancelledError):
            await serve(Gone())  # type: ignore[arg-type]
        assert not replica.streams.sessions
        assert not replica.pipeline._slots


# ----------------------------------------------------------------------------------------------------------- the report


async def test_the_report_says_what_all_have_acked_and_who_has_not() -> None:
    async with world() as (mesh, replica):
        good, slow = await Client.of(mesh, "store"), await Client.of(mesh, "buyer")
        async with good.connected(replica), slow.connected(replica):
            await until(lambda: good.is_complete and slow.is_complete)
            await until(lambda: replica.streams.report().laggards == ())
            report = replica.streams.report()
            assert (report.replica, report.streams, report.nacks) == ("replica-1", 2, ())
            assert report.revision == replica.pipeline.mesh.revision  # type: ignore[union-attr]
            slow.acks = False
            await mesh.observe(service("store"), service("new"), workload("buyer"), workload("store", "store"))
            await until(lambda: "shop/new|80" in good.has[Type.CLUSTER])
            await until(lambda: len(replica.streams.report().laggards) == 1)
            report = replica.streams.report()
            assert [(found.proxy, found.reason) for found in report.laggards] == [(Name("shop", "buyer"), "pending")]
            assert report.revision < replica.pipeline.mesh.revision  # type: ignore[union-attr]


async def test_the_report_has_the_words_of_who_refuses_something() -> None:
    async with world() as (mesh, replica):
        client = await Client.of(mesh, "buyer")
        async with client.connected(replica):
            await until(lambda: client.is_complete)
            await mesh.observe(
                service("store"),
                service("paper"),
                workload("buyer"),
                workload("paper", "paper"),
                workload("store", "store"),
            )
            await mesh.certify("paper")
            await until(lambda: "shop/paper|80" in client.has[Type.ENDPOINT])
            await until(lambda: client.get(Type.ENDPOINT, "shop/paper|80").endpoints)
            await until(lambda: not replica.streams.report().laggards)
            client.refuses = lambda type_, _: type_ is Type.VIRTUAL_HOST
            revision = await mesh.split("store", paper=100)
            await until(lambda: replica.streams.report().nacks)
            report = replica.streams.report()
            (nack,) = report.nacks
            assert (nack.proxy, nack.resources) == (Name("shop", "buyer"), ("outbound/store.shop|80",))
            assert nack.text == "outbound/store.shop|80: refused by the test"
            assert nack.suspects == (("split.smi-spec.io/TrafficSplit/shop/store", revision),)
            assert nack.revision >= revision
            assert report.laggards[0].reason == "NACKed VirtualHost outbound/store.shop|80"


async def test_a_replica_without_streams_has_acked_all_there_is() -> None:
    async with world() as (_, replica):
        report = replica.streams.report()
        assert report.streams == 0
        assert report.revision == replica.pipeline.mesh.revision  # type: ignore[union-attr]


async def test_a_stream_that_ended_leaves_nothing_behind() -> None:
    async with world() as (mesh, replica):
        client = await Client.of(mesh, "buyer")
        async with client.connected(replica):
            await until(lambda: client.is_complete)
            (only,) = replica.streams.sessions
            tasks = len(asyncio.all_tasks())
        await until(lambda: not replica.streams.sessions and len(asyncio.all_tasks()) < tasks)
        del only

        def left() -> bool:
            gc.collect()
            return any(type(found) is session.Session for found in gc.get_objects())

        await until(lambda: not left())
