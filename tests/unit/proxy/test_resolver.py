"""An intercepted application gets the answers of a resolver: the mesh's names from Envoy, all others from the host."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.proxy import resolver
from smc.proxy.resolver import Malformed, Question, addresses, answer, servers
from smc.proxy.settings import ProxyFailed

A, AAAA, TXT = 1, 28, 16
OK, FAILED, NO_SUCH_NAME = 0, 2, 3
HERE = f"127.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}.9"
VIRTUAL = IPv4Address("240.1.2.3")


def asked(name: str, kind: int = A, *, id_: int = 7, more: bytes = b"") -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">6H", id_, 0x0100, 1, 0, 0, 1 if more else 0) + labels + struct.pack(">BHH", 0, kind, 1) + more


def code(message: bytes) -> int:
    return message[3] & 15


# ----------------------------------------------------------------------------------------------------------- messages


def test_a_question_is_read_in_lower_case_and_answered_in_its_own_words() -> None:
    message = asked("BookStore.Books")
    question = Question.of(message)
    assert (question.name, question.kind, question.end) == (b"\x09bookstore\x05books\x00", A, len(message))
    said = answer(message, question, [VIRTUAL])
    assert said[:2] == message[:2]
    assert b"\x09BookStore\x05Books\x00" in said
    assert (code(said), addresses(said)) == (OK, (VIRTUAL,))


def test_an_answer_without_addresses_says_that_the_name_is_there() -> None:
    message = asked("bookstore", AAAA)
    said = answer(message, Question.of(message), ())
    assert (code(said), addresses(said)) == (OK, ())


def test_what_comes_after_the_question_is_not_repeated_in_the_answer() -> None:
    options = struct.pack(">BHHIH", 0, 41, 1232, 0, 0)
    message = asked("bookstore", more=options)
    said = answer(message, Question.of(message), [VIRTUAL])
    assert struct.unpack(">6H", said[:12])[2:] == (1, 1, 0, 0)
    assert addresses(said) == (VIRTUAL,)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"\0" * 11, "header"),
        (asked("a")[:-1], "cut off"),
        (asked("a")[:13], "cut off"),
        (b"\0\0\x81\0" + asked("a")[4:], "no standard query"),
        (b"\0\0\x28\0" + asked("a")[4:], "no standard query"),
        (asked("a")[:4] + b"\0\2" + asked("a")[6:], "one question"),
        (asked("a")[:-1] + b"\3", "class 3"),
    ],
)
def test_what_is_no_question_is_not_taken_for_one(message: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        Question.of(message)


@given(st.binary(max_size=80))
def test_whatever_comes_is_read_or_refused(message: bytes) -> None:
    for read in (Question.of, addresses):
        try:
            read(message)
        except Malformed:
            continue


@given(st.binary(max_size=60).map(lambda rest: asked("bookstore") + rest), st.lists(st.ip_addresses(v=4), max_size=4))
def test_what_was_answered_is_what_is_read(message: bytes, found: list[IPv4Address]) -> None:
    assert addresses(answer(message, Question.of(message), found)) == tuple(found)


def test_the_resolvers_of_a_host_are_read_from_its_file() -> None:
    text = (
        "# nameserver 1.1.1.1\nsearch a b\nnameserver 10.0.0.53 \n nameserver fd00::53\nnameserver nonsense\nnameserver"
    )
    assert servers(text) == ["10.0.0.53", "fd00::53"]
    assert servers("") == ["127.0.0.1"], "as the C library has it"


# ------------------------------------------------------------------------------------------------------------ the wire


@dataclass
class Server(asyncio.DatagramProtocol):
    """Says what `says` makes of each message; nothing for b""."""

    says: Callable[[bytes], bytes]
    seen: list[bytes] = field(default_factory=list)
    late: float = 0.0
    """Seconds until it says so."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.seen.append(data)
        if said := self.says(data):
            asyncio.get_running_loop().call_later(self.late, self.transport.sendto, said, addr)

    @property
    def port(self) -> int:
        return int(self.transport.get_extra_info("sockname")[1])


def says(names: dict[bytes, IPv4Address], missing: int = NO_SUCH_NAME) -> Callable[[bytes], bytes]:
    """A server that knows the addresses of some names, and of no other whether it is there."""

    def answered(message: bytes) -> bytes:
        question = Question.of(message)
        if found := names.get(question.name):
            return answer(message, question, [found] if question.kind == A else ())
        return answer(message, question, (), missing)

    return answered


MESH = {b"\x09bookstore\x00": VIRTUAL}
OUTSIDE = {b"\x07example\x03com\x00": IPv4Address("192.0.2.7")}


@dataclass
class Running:
    table: Server
    host: Server
    resolv_conf: Path
    port: int

    async def ask(self, message: bytes, timeout: float = 10.0) -> bytes:
        said: asyncio.Queue[bytes] = asyncio.Queue()
        asking = Server(lambda data: said.put_nowait(data) or b"")
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: asking, remote_addr=(HERE, self.port)
        )
        try:
            transport.sendto(message)
            return await asyncio.wait_for(said.get(), timeout)
        finally:
            transport.close()


@asynccontextmanager
async def running(
    tmp_path: Path, *, table: Callable[[bytes], bytes], host: Callable[[bytes], bytes]
) -> AsyncIterator[Running]:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        servers_ = []
        for one in (table, host):
            transport, server = await loop.create_datagram_endpoint(lambda one=one: Server(one), local_addr=(HERE, 0))
            stack.callback(transport.close)
            servers_.append(server)
        free, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=(HERE, 0))
        port = free.get_extra_info("sockname")[1]
        free.close()
        await asyncio.sleep(0)
        resolv_conf = tmp_path / "resolv.conf"
        resolv_conf.write_text(f"nameserver {HERE}\n")
        await stack.enter_async_context(
            resolver.answering(
                group=None,
                listen=(HERE, port),
                table=(HERE, servers_[0].port),
                resolv_conf=resolv_conf,
                port=servers_[1].port,
            )
        )
        yield Running(servers_[0], servers_[1], resolv_conf, port)


async def test_a_name_of_the_mesh_has_its_address_in_any_spelling_and_the_host_is_not_asked(tmp_path: Path) -> None:
    async with running(tmp_path, table=says(MESH), host=says(OUTSIDE)) as run:
        for name in ("bookstore", "BookStore"):
            assert addresses(await run.ask(asked(name))) == (VIRTUAL,)
        assert run.host.seen == []


@pytest.mark.parametrize("kind", [AAAA, TXT])
async def test_a_name_of_the_mesh_has_nothing_else_and_is_there_all_the_same(tmp_path: Path, kind: int) -> None:
    async with running(tmp_path, table=says(MESH), host=says(OUTSIDE)) as run:
        said = await run.ask(asked("bookstore", kind))
        assert (code(said), addresses(said)) == (OK, ())
        assert run.host.seen == []


async def test_any_other_question_and_its_answer_go_on_as_they_are(tmp_path: Path) -> None:
    async with running(tmp_path, table=says(MESH), host=lambda message: message[:2] + b"whatever") as run:
        for message in (asked("example.com", TXT, more=b"\0" * 11), b"\1\2 no question at all"):
            assert await run.ask(message) == message[:2] + b"whatever"
            assert run.host.seen[-1] == message


async def test_a_name_that_nobody_knows_is_said_to_be_none(tmp_path: Path) -> None:
    async with running(tmp_path, table=says(MESH), host=says(OUTSIDE)) as run:
        assert code(await run.ask(asked("missing.example"))) == NO_SUCH_NAME


async def test_while_envoy_cannot_be_asked_the_host_knows_what_it_knows_and_no_name_is_said_to_be_none(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, table=says({}, FAILED), host=says(OUTSIDE)) as run:
        assert addresses(await run.ask(asked("example.com"))) == (OUTSIDE[b"\x07example\x03com\x00"],)
        assert code(await run.ask(asked("bookstore"))) == FAILED
        run.table.transport.close()
        await asyncio.sleep(0)
        assert code(await run.ask(asked("bookstore"))) == FAILED


async def test_an_envoy_that_is_late_because_the_machine_stood_still_is_waited_for(tmp_path: Path) -> None:
    async with running(tmp_path, table=says(MESH), host=says(OUTSIDE)) as run:
        run.table.late = 1.8
        assert addresses(await run.ask(asked("bookstore"))) == (VIRTUAL,)


async def test_an_answer_to_another_question_is_not_taken(tmp_path: Path) -> None:
    def forged(message: bytes) -> bytes:
        return bytes([message[0] ^ 1]) + says(OUTSIDE)(message)[1:]

    async with running(tmp_path, table=says(MESH), host=forged) as run:
        with pytest.raises(TimeoutError):
            await run.ask(asked("example.com"), 0.5)


async def test_the_next_resolver_is_asked_when_one_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "HOST_TIMEOUT", 2.0)
    async with running(tmp_path, table=says(MESH), host=says(OUTSIDE)) as run:
        run.resolv_conf.write_text(f"nameserver {HERE[:-1]}8\nnameserver {HERE}\n")
        assert addresses(await run.ask(asked("example.com"))) == (OUTSIDE[b"\x07example\x03com\x00"],)
        run.host.transport.close()
        await asyncio.sleep(0)
        assert code(await run.ask(asked("example.com"))) == FAILED, "later, perhaps"


async def test_more_questions_than_can_be_kept_are_dropped_and_the_others_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "AT_ONCE", 4)
    monkeypatch.setattr(resolver, "HOST_TIMEOUT", 0.5)
    async with running(tmp_path, table=says(MESH), host=lambda _: b"") as run:
        codes = await asyncio.gather(
            *(run.ask(asked("example.com", id_=id_), 5.0) for id_ in range(20)), return_exceptions=True
        )
        assert [code(said) for said in codes if isinstance(said, bytes)] == [FAILED] * 4
        assert addresses(await run.ask(asked("bookstore"))) == (VIRTUAL,)


async def test_an_address_that_is_taken_is_an_error_that_says_so(tmp_path: Path) -> None:
    async with running(tmp_path, table=says(MESH), host=says(OUTSIDE)) as run:
        with pytest.raises(ProxyFailed, match=f"look-ups cannot be answered at {HERE}:{run.port}"):
            async with resolver.answering(group=None, listen=(HERE, run.port)):
                pass


@pytest.mark.parametrize(
    ("given", "ports"),
    [
        ("32768\t60999\n", range(61000, 65536)),
        ("32768\t65000\n", range(1024, 32768)),
        ("1024\t65000\n", range(65001, 65536)),
        ("1024\t65535\n", range(1024, 65536)),
    ],
)
def test_questions_to_the_host_come_from_ports_that_no_application_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, ports: range
) -> None:
    """Otherwise the kernel would take the application's next question from there for one of ours."""
    monkeypatch.setattr(resolver, "_GIVEN_PORTS", tmp_path / "range")
    (tmp_path / "range").write_text(given)
    assert resolver._ports() == ports
    with resolver._apart(socket.AF_INET, os.getegid()) as made:
        assert made.getsockname()[1] in ports


def test_no_free_port_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_ports", lambda: [taken.getsockname()[1]])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 0))
        with pytest.raises(OSError, match="no port is free"):
            resolver._apart(socket.AF_INET, os.getegid())
