"""gRPC over our own HTTP/2 and TLS: to gRPC's own client, and to peers that mean no good. Real sockets on loopback."""

from __future__ import annotations

import asyncio
import gc
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from resource import getpagesize
from typing import Any, Self

import grpc
import grpc.aio
import ngh2
import pytest
import structlog

from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.tls import ServerTLS
from smc.xds import transport
from smc.xds.framing import Messages, Status, prefix
from smc.xds.transport import Call
from tests.unit.bookshop import TRUST_DOMAIN
from tests.unit.xds.replica import Mesh, until

Code = grpc.StatusCode
ECHO = "/test.Service/Echo"
FUZZED = 10_000
"""Frames of which most are not what they should be."""
SEED = 20_26


class World:
    """A server, whom it trusts, and somebody who has a credential."""

    def __init__(self, mesh: Mesh, own: Credential, credential: Credential) -> None:
        self.mesh = mesh
        self.credential = credential
        self.tls = ServerTLS(own.chain, own.key, own.roots_pem)
        self.calls: list[Call] = []
        self.cancelled = 0
        self.served: Callable[[Call], Awaitable[None]] = self.echo
        self.port = 0

    async def serve(self, call: Call) -> None:
        self.calls.append(call)
        try:
            await self.served(call)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def echo(self, call: Call) -> None:
        while (message := await call.read()) is not None:
            call.write(message)
            if (room := call.drained()) is not None:
                await room

    @asynccontextmanager
    async def channel(self, credential: Credential | None = None, **options: int) -> AsyncIterator[grpc.aio.Channel]:
        credential = credential or self.credential
        tls = grpc.ssl_channel_credentials(
            credential.roots_pem.encode(), credential.key.encode(), credential.chain.encode()
        )
        named = {
            "grpc.ssl_target_name_override": x509.replica_host(TRUST_DOMAIN),
            "grpc.use_local_subchannel_pool": 1,
            "grpc.max_receive_message_length": -1,
            "grpc.max_send_message_length": -1,
        } | {name.replace("__", "."): value for name, value in options.items()}
        async with grpc.aio.secure_channel(f"127.0.0.1:{self.port}", tls, list(named.items())) as opened:
            yield opened

    async def still_serves(self) -> None:
        async with self.channel() as opened:
            call: Any = opened.stream_stream(ECHO)()
            await call.write(b"hello")
            assert await call.read() == b"hello"
            await call.done_writing()
            assert await call.code() is Code.OK


@asynccontextmanager
async def world(*, max_connection_age: float = 3600.0, max_connections: int = 100) -> AsyncIterator[World]:
    mesh = await Mesh.make()
    made = World(mesh, await mesh.credential("replica/replica-1"), await mesh.credential("proxy/shop/buyer"))
    async with transport.serving(
        {ECHO: made.serve},
        lambda: made.tls,
        address="127.0.0.1:0",
        max_connection_age=max_connection_age,
        max_connections=max_connections,
    ) as made.port:
        yield made


class Peer:
    """A client of which each byte is ours to choose: TLS is up, and HTTP/2 is begun."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.http2 = ngh2.Connection(ngh2.Role.CLIENT)
        self.http2.initiate_connection()
        self.events: list[Any] = []

    @classmethod
    async def connect(cls, made: World, credential: Credential | None = None) -> Self:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", made.port, ssl=context(credential or made.credential), server_hostname=_HOST
        )
        return cls(reader, writer)

    def request(self, path: str = ECHO, **more: str) -> int:
        headers = {":method": "POST", ":scheme": "https", ":path": path, ":authority": "x"}
        headers |= {"content-type": "application/grpc", "te": "trailers"} | {
            name.replace("__", ":").replace("_", "-"): value for name, value in more.items()
        }
        return self.http2.send_request([(name.encode(), value.encode()) for name, value in headers.items()])

    def request_and_never_read(self) -> None:
        """Ask, with windows that never end, and leave what comes in the socket."""
        self.http2.update_settings({ngh2.Setting.INITIAL_WINDOW_SIZE: 2**31 - 1})
        self.http2.set_local_window_size(2**31 - 1)
        self.request()
        self.flush()
        self.writer.transport.pause_reading()

    def flush(self) -> None:
        self.writer.write(self.http2.data_to_send())

    async def hear(self, wanted: type[Any], seconds: float = 5.0) -> Any:
        """The next event of that kind."""
        async with asyncio.timeout(seconds):
            while True:
                while self.events:
                    event = self.events.pop(0)
                    if isinstance(event, wanted):
                        return event
                data = await self.reader.read(65536)
                assert data, f"the connection was closed before any {wanted.__name__}"
                self.http2.receive_data(data)
                self.events += self.http2.events()
                self.flush()

    async def closed(self, seconds: float = 5.0) -> None:
        async with asyncio.timeout(seconds):
            try:
                while await self.reader.read(65536):
                    pass
            except (ConnectionError, ssl.SSLError):
                pass

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)


_HOST = x509.replica_host(TRUST_DOMAIN)


def context(credential: Credential) -> ssl.SSLContext:
    made = ssl.create_default_context(cadata=credential.roots_pem)
    made.set_alpn_protocols(["h2"])
    for path, text in ((Path("/dev/shm") / f"smc-test-{random.getrandbits(64):x}", credential.key + credential.chain),):
        path.touch(mode=0o600)
        try:
            path.write_text(text)
            made.load_cert_chain(path)
        finally:
            path.unlink()
    return made


def frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload


# -------------------------------------------------------------------------------------------------- gRPC's own client


async def test_messages_go_both_ways_and_the_call_ends_well() -> None:
    async with world() as made, made.channel() as opened:
        call: Any = opened.stream_stream(ECHO)()
        for message in (b"", b"one", b"x" * 100_000):
            await call.write(message)
            assert await call.read() == message
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert (await call.code(), await call.details()) == (Code.OK, "")


async def test_what_is_much_larger_than_any_window_arrives_whole() -> None:
    large = random.Random(SEED).randbytes(4 * 1024 * 1024)

    async def serve(call: Call) -> None:
        assert await call.read() == large
        for _ in range(4):
            call.write(large, large, b"end")
        room = call.drained()
        assert room is not None, "the client's window is smaller"
        await room

    async with world() as made, made.channel() as opened:
        made.served = serve
        call: Any = opened.stream_stream(ECHO)()
        await call.write(large)
        for _ in range(4):
            assert await call.read() == large + large + b"end"
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is Code.OK


async def test_a_client_with_small_windows_gets_it_all_as_well() -> None:
    async with world() as made, made.channel(grpc__http2__bdp_probe=0, grpc__http2__lookahead_bytes=1024) as opened:
        call: Any = opened.stream_stream(ECHO)()
        await call.write(b"x" * 1_000_000)
        assert await call.read() == b"x" * 1_000_000
        call.cancel()


async def test_an_unknown_method_is_unimplemented() -> None:
    async with world() as made, made.channel() as opened:
        call: Any = opened.stream_stream("/test.Service/Nothing")()
        assert await call.code() is Code.UNIMPLEMENTED
        assert await call.details() == "there is no method /test.Service/Nothing"


async def test_a_compressed_message_is_unimplemented() -> None:
    async with world() as made, made.channel() as opened:
        call: Any = opened.stream_stream(ECHO)(compression=grpc.Compression.Gzip)
        await call.write(b"x" * 10_000)
        assert await call.code() is Code.UNIMPLEMENTED
        assert "compressed messages are not read here" in await call.details()


async def test_a_message_that_is_too_long_is_refused_before_it_is_there() -> None:
    async with world() as made:
        peer = await Peer.connect(made)
        number = peer.request()
        peer.http2.send_data(number, prefix(transport.LONGEST + 1))
        peer.flush()
        headers = dict((await peer.hear(ngh2.ResponseReceived)).headers)
        assert headers[b"grpc-status"] == b"8"
        assert headers[b"grpc-message"] == b"a message of 4194305 bytes; at most 4194304 are read"
        assert (await peer.hear(ngh2.StreamReset)).error_code == ngh2.ErrorCode.NO_ERROR
        await peer.close()


async def test_the_clients_deadline_ends_the_call_and_what_serves_it() -> None:
    async with world() as made, made.channel() as opened:
        call: Any = opened.stream_stream(ECHO)(timeout=3)
        await call.write(b"hello")
        assert await call.read() == b"hello"
        assert await call.code() is Code.DEADLINE_EXCEEDED
        await until(lambda: made.cancelled == 1)


async def test_a_deadline_that_is_none_is_refused() -> None:
    async with world() as made:
        peer = await Peer.connect(made)
        peer.request(grpc_timeout="soon")
        peer.flush()
        assert (b"grpc-status", b"3") in (await peer.hear(ngh2.ResponseReceived)).headers
        assert not made.calls
        await peer.close()


# ------------------------------------------------------------------------------------------------- without a reader


async def test_what_comes_is_delivered_in_order_and_then_that_it_was_all() -> None:
    delivered: list[bytes | None] = []
    over = asyncio.Event()

    async def serve(call: Call) -> None:
        assert await call.read() == b"first"
        call.write(b"go on")
        await asyncio.sleep(0.05)  # some of it is there before anybody takes it
        call.deliver(lambda message: delivered.append(message) if message is not None else over.set())
        await over.wait()

    async with world() as made, made.channel() as opened:
        made.served = serve
        call: Any = opened.stream_stream(ECHO)()
        await call.write(b"first")
        assert await call.read() == b"go on"
        sent = [b"%d" % number * 1_000 for number in range(500)]  # several windows
        for message in sent:
            await call.write(message)
        await call.done_writing()
        assert await call.code() is Code.OK
        assert delivered == sent


async def test_while_reading_is_paused_nothing_is_delivered_and_the_client_waits() -> None:
    delivered: list[bytes | None] = []
    calls: list[Call] = []

    async def serve(call: Call) -> None:
        calls.append(call)
        over = asyncio.Event()

        def received(message: bytes | None) -> None:
            delivered.append(message)
            if message is None:
                over.set()
            elif len(delivered) == 1:
                call.pause_reading()

        call.deliver(received)
        await over.wait()

    async with world() as made:
        made.served = serve
        peer = await Peer.connect(made)
        number = peer.request()
        whole = prefix(10_000) + b"x" * 10_000
        peer.http2.send_data(number, whole * 20)
        peer.http2.send_data(number, b"", end_stream=True)
        peer.flush()
        await until(lambda: len(delivered) == 1)
        for _ in range(5):
            peer.http2.ping()  # whatever else is said on the connection
            peer.flush()
            await peer.hear(ngh2.PingAcknowledged)
        assert len(delivered) == 1
        assert peer.http2.queued_body_size(number) >= 200_000 - 2 * 65_535, "most of it waits with the client"
        calls[0].resume_reading()
        await peer.hear(ngh2.ResponseReceived)
        assert delivered == [b"x" * 10_000] * 20 + [None]
        await peer.close()


async def test_what_is_no_message_ends_a_call_that_is_delivered_to() -> None:
    delivered: list[bytes | None] = []

    async def serve(call: Call) -> None:
        call.deliver(delivered.append)
        await asyncio.sleep(60)

    async with world() as made:
        made.served = serve
        peer = await Peer.connect(made)
        number = peer.request()
        peer.http2.send_data(number, prefix(4) + b"good" + b"\x01\0\0\0\x01x")
        peer.flush()
        assert (b"grpc-status", b"12") in (await peer.hear(ngh2.ResponseReceived)).headers
        assert delivered == [b"good"]
        await until(lambda: made.cancelled == 1)
        await peer.close()


async def test_a_client_that_cancels_ends_what_serves_it() -> None:
    async with world() as made, made.channel() as opened:
        call: Any = opened.stream_stream(ECHO)()
        await call.write(b"hello")
        await call.read()
        call.cancel()
        await until(lambda: made.cancelled == 1)


async def test_a_defect_ends_its_own_stream_alone_and_is_logged() -> None:
    async def serve(call: Call) -> None:
        if await call.read() == b"bad":
            raise ZeroDivisionError
        await made.echo(call)

    with structlog.testing.capture_logs() as logs:
        async with world() as made, made.channel() as opened:
            made.served = serve
            good: Any = opened.stream_stream(ECHO)()
            bad: Any = opened.stream_stream(ECHO)()
            await good.write(b"good")
            await bad.write(b"bad")
            assert await bad.code() is Code.UNKNOWN
            await good.write(b"still here")
            assert await good.read() == b"still here"
            good.cancel()
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["serving a stream failed"]


@pytest.mark.parametrize("wrote", [True, False])
@pytest.mark.parametrize("text", ["plain", "100 %", "Größe\nand a second line", "x" * 5_000])
async def test_a_status_arrives_as_it_was_said(text: str, wrote: bool) -> None:
    async def serve(call: Call) -> None:
        if wrote:
            call.write(b"something")
        await call.end(Status.NOT_FOUND, text)

    async with world() as made, made.channel() as opened:
        made.served = serve
        call: Any = opened.stream_stream(ECHO)()
        assert not wrote or await call.read() == b"something"
        assert await call.code() is Code.NOT_FOUND
        assert await call.details() == text


async def test_ten_streams_share_a_connection_and_no_more() -> None:
    async with world() as made:
        peer = await Peer.connect(made)
        peer.flush()
        settings = (await peer.hear(ngh2.SettingsReceived)).settings
        assert settings[ngh2.Setting.MAX_CONCURRENT_STREAMS] == transport.MOST_STREAMS == 10
        await peer.close()


@pytest.mark.parametrize("more", [{"content_type": "text/html"}, {"__method": "GET"}])
async def test_what_is_no_grpc_is_told_so(more: Mapping[str, str]) -> None:
    async with world() as made:
        peer = await Peer.connect(made)
        peer.request(**more)
        peer.flush()
        assert (await peer.hear(ngh2.ResponseReceived)).headers[0] == (b":status", b"415")
        assert not made.calls
        await peer.close()
        await made.still_serves()


# --------------------------------------------------------------------------------------------------------- who may come


async def test_new_roots_count_for_the_next_connection_and_leave_the_open_ones() -> None:
    async with world() as made, made.channel() as opened:
        call: Any = opened.stream_stream(ECHO)()
        await call.write(b"before")
        assert await call.read() == b"before"
        other = await Mesh.make()
        own = await other.credential("replica/replica-1")
        made.tls = ServerTLS(own.chain, own.key, own.roots_pem)
        await call.write(b"after")
        assert await call.read() == b"after"
        theirs = await other.credential("proxy/shop/buyer")
        peer = await Peer.connect(made, theirs)
        peer.request()
        peer.flush()
        await until(lambda: len(made.calls) == 2)
        await peer.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            await Peer.connect(made)
        call.cancel()


async def test_the_certificate_is_that_of_the_connection() -> None:
    async with world() as made:
        await made.still_serves()
        (leaf,) = x509.load(made.calls[0].certificate)
        assert x509.uri(leaf) == f"spiffe://{TRUST_DOMAIN}/proxy/shop/buyer"
        assert made.calls[0].peer.startswith("127.0.0.1:")


async def test_one_certificate_gets_so_many_connections_and_room_again_when_they_are_gone() -> None:
    async with world() as made:
        peers = [await Peer.connect(made) for _ in range(transport.MOST_OF_ONE)]
        for peer in peers:
            peer.flush()
            await peer.hear(ngh2.SettingsReceived)
        one_more = await Peer.connect(made)
        await one_more.closed()
        async with made.channel(await made.mesh.credential("proxy/shop/other")) as opened:
            call: Any = opened.stream_stream(ECHO)()
            await call.write(b"others are not concerned")
            assert await call.read()
            call.cancel()
        for peer in peers:
            await peer.close()
        await asyncio.sleep(0.1)
        await made.still_serves()


async def test_a_full_server_takes_no_connection_until_one_is_gone() -> None:
    async with world(max_connections=1) as made:
        peer = await Peer.connect(made)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await Peer.connect(made)
        await peer.close()
        await asyncio.sleep(0.1)
        await made.still_serves()


# --------------------------------------------------------------------------------------------------------- who is gone


async def test_who_is_silent_in_the_middle_of_the_handshake_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transport.SWEEP == 5.0
    monkeypatch.setattr(transport, "SWEEP", 0.1)
    async with world() as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(b"\x16\x03\x01")
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_who_takes_too_long_for_the_handshake_is_cut_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SWEEP", 0.1)
    monkeypatch.setattr(transport, "HANDSHAKE", 1.0)
    async with world() as made:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        ended = asyncio.ensure_future(reader.read())
        for byte in b"\x16\x03\x01\x02\x00" + b"\x01" * 500:
            writer.write(bytes((byte,)))
            await asyncio.wait((ended,), timeout=0.05)
            if ended.done():
                break
        assert ended.done()
        assert 0.9 < time.monotonic() - began < 20, "before it has sent all"
        writer.close()


async def test_a_peer_that_answers_no_ping_is_gone_and_one_that_does_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SWEEP", 0.1)
    async with world() as made, made.channel() as opened:
        call: Any = opened.stream_stream(ECHO)()
        await call.write(b"hello")
        await call.read()
        dead = await Peer.connect(made)
        dead.request()
        dead.flush()
        await until(lambda: len(made.calls) == 2)
        await until(lambda: made.cancelled == 1, 5)
        await asyncio.sleep(1)
        await call.write(b"still here")
        assert await call.read() == b"still here"
        call.cancel()
        await dead.close()


async def test_a_connection_without_a_stream_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SWEEP", 0.1)
    monkeypatch.setattr(transport, "IDLE", 0.3)
    async with world() as made:
        peer = await Peer.connect(made)
        peer.flush()
        assert (await peer.hear(ngh2.GoAwayReceived)).error_code == ngh2.ErrorCode.NO_ERROR
        await peer.closed()


async def test_a_connection_that_is_old_says_goaway_lets_its_streams_end_and_is_closed() -> None:
    async with world(max_connection_age=0.3) as made:
        peer = await Peer.connect(made)
        number = peer.request()
        peer.flush()
        assert (await peer.hear(ngh2.GoAwayReceived)).last_stream_id == 2**31 - 1
        peer.http2.send_data(number, prefix(2) + b"hi")
        peer.flush()
        assert list(Messages(10).feed((await peer.hear(ngh2.DataReceived)).data)) == [b"hi"]
        trailers = dict((await peer.hear(ngh2.TrailersReceived)).headers)
        assert trailers[b"grpc-status"] == b"14"
        assert trailers[b"grpc-message"] == b"this connection is old enough: open another one"
        await peer.closed()


async def test_a_server_that_stops_ends_what_is_open() -> None:
    async with world() as made:
        peer = await Peer.connect(made)
        number = peer.request()
        peer.http2.send_data(number, prefix(2) + b"hi")
        peer.flush()
        await peer.hear(ngh2.DataReceived)
        ended = asyncio.ensure_future(peer.hear(ngh2.TrailersReceived))
    assert (b"grpc-message", b"this server shuts down") in (await ended).headers
    assert made.cancelled == 1
    await peer.close()


# ------------------------------------------------------------------------------------------------------- who is hostile


async def test_every_ping_is_answered_and_none_is_too_many() -> None:
    async with world() as made:
        peer = await Peer.connect(made)
        peer.request()
        for _ in range(300):
            peer.http2.ping(b"12345678")
        peer.flush()
        for _ in range(300):
            await peer.hear(ngh2.PingAcknowledged)
        await peer.close()


async def test_what_is_not_read_is_not_taken_in() -> None:
    gate = asyncio.Event()

    async def serve(call: Call) -> None:
        await gate.wait()
        await made.echo(call)

    async with world() as made:
        made.served = serve
        peer = await Peer.connect(made)
        number = peer.request()
        peer.http2.send_data(number, (prefix(1) + b"x") * 1_000_000)
        peer.flush()
        await until(lambda: made.calls)
        await asyncio.sleep(0.3)
        peer.flush()
        (call,) = made.calls
        assert sum(map(len, call._messages)) <= 65_535
        assert peer.http2.queued_body_size(number) > 5_000_000
        gate.set()
        assert await peer.hear(ngh2.DataReceived)
        await peer.close()


async def test_a_peer_that_does_not_read_costs_the_server_next_to_nothing() -> None:
    large = b"x" * 10_000_000

    async def serve(call: Call) -> None:
        for _ in range(20):
            call.write(large)
        while (room := call.drained()) is not None:
            await room

    async with world() as made:
        await made.still_serves()
        made.served = serve
        before = resident()
        peer = await Peer.connect(made)
        peer.request_and_never_read()
        await until(lambda: len(made.calls) == 2)
        await asyncio.sleep(0.3)
        assert made.calls[1].drained() is not None
        assert resident() - before < 5_000_000, "twenty times the same bytes are held once"
        await peer.close()
        await until(lambda: made.cancelled == 1)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(lambda peer: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="another protocol"),
        pytest.param(
            lambda peer: started(peer, *(reset for n in range(1, 4_001, 2) for reset in (opening(n), ending(n)))),
            id="rapid reset",
        ),
        pytest.param(
            lambda peer: started(peer, frame(1, 0, 1, b"\x82"), *[frame(9, 0, 1, b"\x40\x01a\x01b")] * 5_000),
            id="continuation flood",
        ),
        pytest.param(lambda peer: started(peer, *[frame(1, 4, 1, b"\x40\x7f\xff\xff\xff\x7f")]), id="huge header"),
        pytest.param(
            lambda peer: started(peer, frame(1, 0, 1, b"\x40\x01a" + b"\x7f\x99\x74" + b"x" * 15_000), *[
                frame(9, 0, 1, b"\x40\x01a" + b"\x7f\x99\x74" + b"x" * 15_000)] * 3),
            id="many headers",
        ),
        pytest.param(lambda peer: started(peer, frame(4, 0, 0, b"\0\1\0\0\0\0" * 100)), id="many settings"),
        pytest.param(lambda peer: started(peer, frame(0, 0, 1, b"x" * 20_000)), id="too long a frame"),
        pytest.param(lambda peer: started(peer, frame(8, 0, 0, b"\0\0\0\0")), id="a window of nothing"),
        pytest.param(
            lambda peer: started(peer, frame(8, 0, 0, b"\x7f\xff\xff\xff"), frame(8, 0, 0, b"\x7f\xff\xff\xff")),
            id="a window of too much",
        ),
    ],
)  # fmt: skip
async def test_who_breaks_the_rules_is_cut_off_and_nobody_else_notices(attack: Callable[[Peer], bytes]) -> None:
    async with world() as made, made.channel(await made.mesh.credential("proxy/shop/other")) as opened:
        call: Any = opened.stream_stream(ECHO)()
        await call.write(b"hello")
        await call.read()
        peer = await Peer.connect(made)
        tasks = len(asyncio.all_tasks())
        peer.writer.write(attack(peer))
        await peer.closed()
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await call.write(b"still here")
        assert await call.read() == b"still here"
        call.cancel()
        await peer.close()


async def test_a_flood_of_settings_and_pings_by_who_does_not_read_is_bounded() -> None:
    async with world() as made:
        await made.still_serves()
        before = resident()
        peer = await Peer.connect(made)
        peer.flush()
        peer.writer.transport.pause_reading()
        flood = (frame(4, 0, 0) + frame(6, 0, 0, b"12345678")) * 2_000
        try:
            async with asyncio.timeout(5):
                for _ in range(200):
                    peer.writer.write(flood)
                    await peer.writer.drain()
        except (ConnectionError, TimeoutError):
            pass
        assert resident() - before < 32_000_000
        await peer.close()
        await made.still_serves()


def started(peer: Peer, *frames: bytes) -> bytes:
    return peer.http2.data_to_send() + b"".join(frames)


def opening(number: int) -> bytes:
    """HEADERS of a POST to /, of which only the end is missing."""
    return frame(1, 4, number, b"\x83\x87\x84\x41\x01x")


def ending(number: int) -> bytes:
    return frame(3, 0, number, b"\0\0\0\x08")


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


# ----------------------------------------------------------------------------------------------------------- the fuzz


def conversation(peer: Peer, rng: random.Random) -> list[bytes]:
    """What a client says, frame by frame."""
    number = peer.request()
    for _ in range(rng.randint(1, 5)):
        peer.http2.send_data(number, prefix(5) + b"hello")
        if rng.random() < 0.3:
            peer.http2.ping()
    if rng.random() < 0.3:
        peer.http2.end_stream(number)
    data, frames = peer.http2.data_to_send(), []
    preface, data = data[:24], data[24:]
    while data:
        end = 9 + int.from_bytes(data[:3], "big")
        frames.append(data[:end])
        data = data[end:]
    frames[0] = preface + frames[0]
    return frames


def damaged(rng: random.Random, said: bytes) -> bytes:
    data = bytearray(said)
    match rng.randrange(6):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            data[3:4] = bytes((rng.randrange(12),))
        case 3:
            data[4:5] = bytes((rng.randrange(256),))
        case 4:
            data[5:9] = rng.choice((0, 1, 2, 3, 5, 2**31 - 1)).to_bytes(4, "big")
        case _:
            at = rng.randrange(len(data) + 1)
            data[at:at] = rng.randbytes(rng.randint(1, 40))
    return bytes(data)


async def test_ten_thousand_frames_of_nonsense_break_nothing() -> None:
    rng, said, problems = random.Random(SEED), 0, []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: problems.append(what))
    with structlog.testing.capture_logs() as logs:
        async with world() as made, made.channel(await made.mesh.credential("proxy/shop/other")) as opened:
            call: Any = opened.stream_stream(ECHO)()
            before = 0
            while said < FUZZED:
                peer = await Peer.connect(made)
                while said < FUZZED and not peer.reader.at_eof():
                    frames = conversation(peer, rng)
                    said += len(frames)
                    for one in frames:
                        peer.writer.write(damaged(rng, one) if rng.random() < 0.4 else one)
                    try:
                        await peer.writer.drain()
                    except (ConnectionError, ssl.SSLError):
                        break
                    await asyncio.sleep(0)
                await peer.close()
                if before == 0 and said > FUZZED / 10:
                    before = resident()
                async with asyncio.timeout(10):
                    await call.write(b"ping")
                    assert await call.read() == b"ping"
            assert resident() - before < 32_000_000
            call.cancel()
            await until(lambda: all(c._closed for c in made.calls), 20)
    assert not problems
    assert not [line for line in logs if line["log_level"] in ("error", "critical", "warning")]
