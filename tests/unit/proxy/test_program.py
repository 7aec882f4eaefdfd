"""What stands beside a gRPC program, between it and replicas that serve real xDS over real mTLS."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from envoy.service.discovery.v3 import discovery_pb2

from smc.certificates import credential as credentials
from smc.certificates.credential import Credential
from smc.model import Identity, Name
from smc.proxy import program
from smc.proxy.enrolment import Enrolment
from smc.proxy.settings import Exit, ProxyFailed
from smc.xds.snapshot import Type
from tests.unit.bookshop import KEYS, TRUST_DOMAIN, service, workload
from tests.unit.xds.replica import Mesh, open_stream, serving, until

ADS = f"/{program._ADS}/{program._METHOD}"
NOBODY = "127.0.0.1:1"


@dataclass
class Beside:
    """A gRPC program's directory, what its proxy is told, and what it has said."""

    directory: Path
    credential: Credential
    addresses: tuple[str, ...]
    news: asyncio.Event = field(default_factory=asyncio.Event)
    readied: int = 0

    def who(self) -> tuple[Credential, Enrolment]:
        name = self.credential.path.removeprefix("proxy/")
        return self.credential, Enrolment(
            name, "default", TRUST_DOMAIN, "mesh.internal", self.addresses, (NOBODY,), "127.0.0.1", ""
        )

    def ready(self) -> None:
        self.readied += 1

    def serve(self) -> Any:
        return program.serve(self.directory, self.who, news=self.news, ready=self.ready)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.serve())
        try:
            await until(lambda: task.done() or (self.directory / program.SOCKET).exists())
            yield
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    @asynccontextmanager
    async def program(self) -> AsyncIterator[grpc.aio.Channel]:
        """The program's own channel, in plaintext, as its bootstrap has it."""
        target = f"unix:{self.directory / program.SOCKET}"
        async with grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield channel

    def held(self) -> Credential | None:
        where = self.directory / program.WORKLOAD
        return credentials.read(where) if where.exists() else None


async def bookstore() -> Mesh:
    mesh = await Mesh.make()
    await mesh.observe(service("store"), workload("buyer"), workload("store", "store"))
    return mesh


async def beside(folder: Path, mesh: Mesh, *ports: int, proxy: str = "shop/buyer") -> Beside:
    addresses = tuple(f"127.0.0.1:{port}" for port in ports) or (NOBODY,)
    return Beside(folder, await mesh.credential(f"proxy/{proxy}"), addresses)


def asking(type_: Type, *names: str, node: str = "shop/buyer") -> bytes:
    message = discovery_pb2.DiscoveryRequest(resource_names=names, type_url=type_.value)
    message.node.id = node
    data: bytes = message.SerializeToString()
    return data


async def heard(call: Any) -> Any:
    async with asyncio.timeout(60):
        return discovery_pb2.DiscoveryResponse.FromString(await call.read())


# ---------------------------------------------------------------------------------------------------------- the secrets


async def test_secrets_are_written_once_both_are_there_and_again_when_one_changes(tmp_path: Path) -> None:
    mesh = await bookstore()
    async with serving(mesh) as replica:
        await replica.until(lambda: replica.pipeline.ready)
        ours = await beside(tmp_path, mesh, replica.port)
        async with ours.serving():
            await replica.until(lambda: any(session.versions for session in replica.streams.sessions))
            assert ours.held() is None, "there are roots, but no certificate yet"
            assert not ours.news.is_set()
            assert ours.readied == 0
            await mesh.certify("buyer", "store")
            await until(lambda: ours.readied)
            first = ours.held()
            assert first is not None
            assert first.uri == Identity("shop", "buyer").uri(TRUST_DOMAIN)
            first.check(replica_time(first))
            assert ours.news.is_set()
            ours.news.clear()
            await mesh.certify("store")
            await mesh.certify("buyer")
            await until(ours.news.is_set)
            second = ours.held()
            assert second is not None
            assert second.chain != first.chain
            second.check(replica_time(second))
            assert ours.readied == 1
    assert stat.S_IMODE((tmp_path / program.WORKLOAD / "key.pem").stat().st_mode) == 0o600


def replica_time(credential: Credential) -> float:
    return credential.not_after - 60


async def test_when_a_replica_dies_another_one_is_asked(tmp_path: Path) -> None:
    mesh = await bookstore()
    await mesh.certify("buyer", "store")
    async with AsyncExitStack() as stack:
        async with serving(mesh) as first:
            await first.until(lambda: first.pipeline.ready)
            ours = await beside(tmp_path, mesh, first.port)
            await stack.enter_async_context(ours.serving())
            await until(lambda: ours.readied)
        async with serving(mesh, "replica-2") as second:
            ours.addresses = (NOBODY, f"127.0.0.1:{second.port}")
            await mesh.certify("buyer")
            before = ours.held()
            await until(lambda: ours.held() != before)


async def test_while_no_replica_answers_it_is_asked_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "FIRST_RETRY", 0.1)
    monkeypatch.setattr(program, "LAST_RETRY", 0.4)
    ours = await beside(tmp_path, await bookstore())
    with structlog.testing.capture_logs() as logs:

        def waits() -> list[float]:
            return [log["retry_in"] for log in logs if "secrets are not kept" in log["event"]]

        async with ours.serving():
            await until(lambda: len(waits()) >= 4)
    assert waits()[:4] == [0.1, 0.2, 0.4, 0.4]
    assert ours.readied == 0


async def test_secrets_that_nobody_can_read_leave_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = await bookstore()
    await mesh.certify("buyer", "store")
    async with serving(mesh) as replica:
        await replica.until(lambda: replica.pipeline.ready)
        ours = await beside(tmp_path, mesh, replica.port)
        with structlog.testing.capture_logs() as logs:
            async with ours.serving():
                await until(lambda: ours.readied)
                before = ours.held()
                identity = Identity("shop", "buyer")
                item = await mesh.kv.get(KEYS.certificate(identity))
                assert item is not None
                monkeypatch.setattr(program.x509, "uri", _unreadable)
                await mesh.certify("buyer")
                await until(lambda: [log for log in logs if log.get("reason") == "this is no certificate"])
                monkeypatch.undo()
                assert ours.held() == before


def _unreadable(_certificate: object) -> str:
    raise UnicodeError("this is no certificate")


# ------------------------------------------------------------------------------------------------------------ the relay


@asynccontextmanager
async def relayed(tmp_path: Path, *, proxy: str = "shop/buyer") -> AsyncIterator[tuple[Mesh, Any, Beside]]:
    mesh = await bookstore()
    await mesh.certify("buyer", "store")
    async with serving(mesh) as replica:
        await replica.until(lambda: replica.pipeline.ready)
        ours = await beside(tmp_path, mesh, replica.port, proxy=proxy)
        async with ours.serving():
            yield mesh, replica, ours


def streams(replica: Any) -> Callable[[], int]:
    return lambda: sum(session.proxy == Name("shop", "buyer") for session in replica.streams.sessions)


async def test_a_stream_is_passed_on_both_ways_as_it_is(tmp_path: Path) -> None:
    async with relayed(tmp_path) as (mesh, _, ours), ours.program() as channel:
        call = open_stream(channel, ADS)
        await call.write(asking(Type.ENDPOINT, "shop/store|80"))
        first = await heard(call)
        assert first.type_url == Type.ENDPOINT.value
        ack = discovery_pb2.DiscoveryRequest(
            type_url=Type.ENDPOINT.value,
            resource_names=["shop/store|80"],
            version_info=first.version_info,
            response_nonce=first.nonce,
        )
        await call.write(ack.SerializeToString())
        other = workload("store-2", "store", address="127.0.7.7")
        await mesh.observe(service("store"), workload("buyer"), workload("store", "store"), other)
        await mesh.certify("store-2")
        second = await heard(call)
        assert second.version_info != first.version_info
        assert b"127.0.7.7" in second.SerializeToString()
        call.cancel()


async def test_a_refusal_reaches_the_program_with_its_status(tmp_path: Path) -> None:
    async with relayed(tmp_path) as (_, _, ours), ours.program() as channel:
        call = open_stream(channel, ADS)
        await call.write(asking(Type.CLUSTER, node="shop/store"))
        with pytest.raises(grpc.aio.AioRpcError):
            await heard(call)
        assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "shop/store" in await call.details()


async def test_when_the_program_goes_the_replica_has_no_stream_of_it_any_more(tmp_path: Path) -> None:
    async with relayed(tmp_path) as (_, replica, ours):
        count = streams(replica)
        await until(lambda: ours.readied and count() == 1)  # that of the secrets
        async with ours.program() as channel:
            call = open_stream(channel, ADS)
            await call.write(asking(Type.ENDPOINT, "shop/store|80"))
            await heard(call)
            assert count() == 2
        await until(lambda: count() == 1)


async def test_a_stream_ends_with_its_replica_so_that_the_program_asks_again(tmp_path: Path) -> None:
    mesh = await bookstore()
    await mesh.certify("buyer", "store")
    async with AsyncExitStack() as stack:
        async with serving(mesh) as first:
            await first.until(lambda: first.pipeline.ready)
            ours = await beside(tmp_path, mesh, first.port)
            await stack.enter_async_context(ours.serving())
            await until(lambda: ours.readied)
            channel = await stack.enter_async_context(ours.program())
            call = open_stream(channel, ADS)
            await call.write(asking(Type.ENDPOINT, "shop/store|80"))
            await heard(call)
        async with asyncio.timeout(60):
            assert await call.code() is not grpc.StatusCode.OK
        async with serving(mesh, "replica-2") as second:
            await second.until(lambda: second.pipeline.ready)
            ours.addresses = (f"127.0.0.1:{second.port}",)
            again = open_stream(channel, ADS)
            await again.write(asking(Type.ENDPOINT, "shop/store|80"))
            assert (await heard(again)).type_url == Type.ENDPOINT.value


async def test_a_program_has_so_many_streams_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program.MOST_STREAMS == 100
    monkeypatch.setattr(program, "MOST_STREAMS", 3)
    async with relayed(tmp_path) as (_, _, ours), ours.program() as channel:
        # None of them says anything: a replica lets a proxy have one such stream that does.
        calls = [open_stream(channel, ADS) for _ in range(program.MOST_STREAMS + 1)]
        codes = [asyncio.ensure_future(call.code()) for call in calls]
        async with asyncio.timeout(5):
            refused, open_ = await asyncio.wait(codes, return_when=asyncio.FIRST_COMPLETED)
        assert [code.result() for code in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert len(open_) == program.MOST_STREAMS
        for call in calls:
            call.cancel()
        await asyncio.wait(codes)


# -------------------------------------------------------------------------------------------------------- the directory


async def test_nobody_but_the_owner_of_the_directory_may_knock_whatever_the_umask(tmp_path: Path) -> None:
    mesh = await bookstore()
    ours = await beside(tmp_path, mesh)
    ours.directory.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(ours.directory, 4711, 4712)
    before = os.umask(0)
    try:
        async with ours.serving():
            found = (ours.directory / program.SOCKET).stat()
            while_serving = os.umask(0)
    finally:
        os.umask(before)
    assert while_serving == 0, "it is this process's again"
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (ours.directory.stat().st_uid, ours.directory.stat().st_gid)
    assert stat.S_IMODE((ours.directory / program.BOOTSTRAP).stat().st_mode) == 0o600


async def test_what_a_crash_has_left_at_the_socket_is_in_nobodys_way(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / program.SOCKET))
    async with relayed(tmp_path) as (_, _, ours), ours.program() as channel:
        await until(lambda: ours.readied)
        call = open_stream(channel, ADS)
        await call.write(asking(Type.ENDPOINT, "shop/store|80"))
        assert (await heard(call)).type_url == Type.ENDPOINT.value
        call.cancel()


async def test_a_directory_whose_path_is_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    ours = await beside(tmp_path / ("long" * 30), await bookstore())
    with pytest.raises(ProxyFailed, match="too long for the path of a socket") as failed:
        await ours.serve()
    assert failed.value.exit is Exit.FAILED
