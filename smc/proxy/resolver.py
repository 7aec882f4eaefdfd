"""Look-ups of an intercepted application: names of the mesh by Envoy's table, all others by the host's resolvers.

Envoy has the table (its listener `dns`), and is no resolver to put in front of an application: asked for another kind
of address than a name has, it says that there is no such name, where a resolver says that there is none of that kind.
Who asks for both kinds at once, as getaddrinfo does, believes whichever answer comes first. So the application's
questions come here, and Envoy is only asked whether a name is the mesh's, and where. Every other question goes on as it
is, and so does its answer: whatever it is about, and whatever comes with it.

A name of the mesh has IPv4 addresses and nothing else: to any other question about it there is an empty answer at once.
While Envoy cannot be asked nobody knows whose a name is: what the host's resolvers do not know is then no such name
only perhaps, and the answer is that this is for later (SERVFAIL).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import cast

import structlog

from smc.envoy import names
from smc.proxy.settings import Exit, ProxyFailed

RESOLV_CONF = Path("/etc/resolv.conf")
TTL = 30
"""Seconds that an answer is good for; far below how long a service's address outlives the service."""
AT_ONCE = 512
"""Questions on their way; what comes beyond is dropped, and asked again by whoever needs it."""
TABLE_TIMEOUT, HOST_TIMEOUT = 2.5, 4.0
"""Seconds for an answer of Envoy, which is on this machine, and of one of the host's resolvers.

Envoy answers in less than a millisecond, but a machine that stands still for a second or two does so for both: without
the answer a name of the mesh cannot be told. Whoever asks waits for five seconds as a rule, and asks again."""

_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FEW_PORTS, _PORTS_TRIED = 4096, 16
_HEADER = struct.Struct(">6H")
_RESPONSE, _OPCODE, _WANTED, _AVAILABLE, _CODE = 0x8000, 0x7800, 0x0100, 0x0080, 0x000F
"""Bits of the header: it is an answer; what kind of question; recursion is wanted, and is available; how it went."""
_A, _IN = 1, 1
_OK, _FAILED, _NO_SUCH_NAME = 0, 2, 3
_POINTER = 0xC0

_log = structlog.get_logger(__name__)


class Malformed(ValueError):
    """A datagram that is no message of DNS, or not one of those that are looked into."""


# ------------------------------------------------------------------------------------------------------- what is said


@dataclass(frozen=True, slots=True)
class Question:
    """The one question of a message."""

    name: bytes
    """As in the message, in lower case."""
    kind: int
    end: int
    """Where it ends in the message."""

    @classmethod
    def of(cls, message: bytes) -> Question:
        """Read a standard query of the Internet's class.

        Raises:
            Malformed: it is anything else.
        """
        _, flags, questions, *_ = _head(message)
        if flags & (_RESPONSE | _OPCODE) or questions != 1:
            raise Malformed("this is no standard query with one question")
        at = _after_name(message, _HEADER.size)
        if len(message) < at + 4:
            raise Malformed("the question is cut off")
        kind, class_ = struct.unpack_from(">2H", message, at)
        if class_ != _IN:
            raise Malformed(f"this is about class {class_}")
        return cls(message[_HEADER.size : at].lower(), kind, at + 4)


def query(question: Question) -> bytes:
    """What Envoy is asked: for the IPv4 addresses of that name."""
    return _HEADER.pack(secrets.randbits(16), _WANTED, 1, 0, 0, 0) + question.name + struct.pack(">2H", _A, _IN)


def addresses(message: bytes) -> tuple[IPv4Address, ...] | None:
    """What an answer to `query` says; None: there is no such name.

    Raises:
        Malformed: it says neither.
    """
    _, flags, questions, answers, *_ = _head(message)
    if flags & _CODE == _NO_SUCH_NAME:
        return None
    if flags & _CODE != _OK:
        raise Malformed(f"the code {flags & _CODE} is no answer")
    at = _HEADER.size
    for _ in range(questions):
        at = _after_name(message, at) + 4
    found = []
    for _ in range(answers):
        at = _after_name(message, at)
        if len(message) < at + 10:
            raise Malformed("a record is cut off")
        kind, _, _, length = struct.unpack_from(">HHIH", message, at)
        data, at = message[at + 10 : at + 10 + length], at + 10 + length
        if kind == _A and len(data) == 4:
            found.append(IPv4Address(data))
    return tuple(found)


def answer(message: bytes, question: Question, found: Sequence[IPv4Address], code: int = _OK) -> bytes:
    """The answer to `message`; without addresses it is that there is nothing of that kind."""
    id_, flags, *_ = _head(message)
    flags = _RESPONSE | flags & _WANTED | _AVAILABLE | code
    records = [struct.pack(">HHHIH", _POINTER << 8 | _HEADER.size, _A, _IN, TTL, 4) + a.packed for a in found]
    head = _HEADER.pack(id_, flags, 1, len(records), 0, 0)
    return b"".join((head, message[_HEADER.size : question.end], *records))


def servers(text: str) -> list[str]:
    """The resolvers that a resolv.conf names, in order; those that nobody could ask are left out."""
    found = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", address, *_]:
                try:
                    found.append(str(ip_address(address)))
                except ValueError:
                    continue
    return found or ["127.0.0.1"]


def _head(message: bytes) -> tuple[int, ...]:
    if len(message) < _HEADER.size:
        raise Malformed("the header is cut off")
    return _HEADER.unpack_from(message)


def _after_name(message: bytes, at: int) -> int:
    """Where a name ends that begins at `at`; a pointer ends it, and is not followed."""
    while at < len(message):
        length = message[at]
        if length == 0:
            return at + 1
        if length & _POINTER:
            return at + 2
        at += 1 + length
    raise Malformed("a name is cut off")


# ------------------------------------------------------------------------------------------------------ how it is said


@asynccontextmanager
async def answering(
    *,
    group: int | None,
    listen: tuple[str, int] = (names.LOOPBACK, names.DNS_PORT),
    table: tuple[str, int] = (names.LOOPBACK, names.DNS_TABLE_PORT),
    resolv_conf: Path = RESOLV_CONF,
    port: int = 53,
) -> AsyncIterator[None]:
    """Answer for as long as this is open.

    Args:
        group: whose questions to the host's resolvers are not sent here again; None: ours.
        listen: where the application's questions are sent to.
        table: where Envoy answers.
        resolv_conf: names the host's resolvers; it is read again whenever one is needed.
        port: the resolvers' own.

    Raises:
        ProxyFailed: `listen` cannot be bound.
    """
    resolver = _Resolver(table, resolv_conf, port, group)
    try:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: resolver, local_addr=listen)
    except OSError as e:
        raise ProxyFailed(
            Exit.CANNOT_INTERCEPT,
            f"look-ups cannot be answered at {listen[0]}:{listen[1]}: {e.strerror}",
            hint="see who listens there: ss -ulpn",
        ) from None
    try:
        yield
    finally:
        transport.close()
        await resolver.close()


class _Resolver(asyncio.DatagramProtocol):
    def __init__(self, table: tuple[str, int], resolv_conf: Path, port: int, group: int | None) -> None:
        self._table = table
        self._resolv_conf = resolv_conf
        self._port = port
        self._group = group
        self._asked: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, message: bytes, sender: tuple[str, int]) -> None:
        if len(self._asked) < AT_ONCE:
            task = asyncio.create_task(self._answer(message, sender))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)

    async def close(self) -> None:
        asked = list(self._asked)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    async def _answer(self, message: bytes, sender: tuple[str, int]) -> None:
        try:
            question = Question.of(message)
        except Malformed:
            said = await self._ask_host(message)
        else:
            said = await self._resolve(message, question)
        if said is not None and not self._transport.is_closing():
            self._transport.sendto(said, sender)

    async def _resolve(self, message: bytes, question: Question) -> bytes:
        try:
            found = addresses(await _exchange(self._table, query(question), TABLE_TIMEOUT, None))
        except (OSError, TimeoutError, Malformed) as e:
            _log.info("Envoy cannot be asked whose a name is", error=str(e) or type(e).__name__)
            said = await self._ask_host(message)
            # There may be no such name on the host because it is the mesh's.
            is_known = said is not None and len(said) >= _HEADER.size and _head(said)[1] & _CODE == _OK
        else:
            if found is not None:
                return answer(message, question, found if question.kind == _A else ())
            said, is_known = await self._ask_host(message), True
        return said if said is not None and is_known else answer(message, question, (), _FAILED)

    async def _ask_host(self, message: bytes) -> bytes | None:
        """The first answer of a resolver of the host's; None: there is none."""
        try:
            text = await asyncio.to_thread(self._resolv_conf.read_text, errors="replace")
        except OSError:
            text = ""
        for server in servers(text):
            try:
                return await _exchange((server, self._port), message, HOST_TIMEOUT, self._group)
            except (OSError, TimeoutError) as e:
                _log.info("a resolver does not answer", server=server, error=str(e) or type(e).__name__)
        return None


async def _exchange(to: tuple[str, int], message: bytes, timeout: float, group: int | None) -> bytes:
    """Send a datagram from a port of its own, and return the answer.

    Raises:
        OSError, TimeoutError: there is none.
    """
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) if group is None else _apart(family, group) as connected:
        connected.setblocking(False)
        connected.connect(to)
        await loop.sock_sendall(connected, message)
        async with asyncio.timeout(timeout):
            while True:
                said = await loop.sock_recv(connected, 65535)
                if said[:2] == message[:2]:
                    return said


def _apart(family: socket.AddressFamily, group: int) -> socket.socket:
    """A socket whose datagrams the kernel tells from those of applications, by its group and by its port.

    The group is what the rules go by. The port must be none that an application is given: the kernel remembers for half
    a minute where datagrams from that port to that server went, without asking the rules again, and the application's
    next question from there would go the same way.

    Raises:
        OSError: none can be made.
    """
    made = _of_group(family, group)
    for _ in range(_PORTS_TRIED):
        try:
            made.bind(("", secrets.choice(_ports())))
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                made.close()
                raise
        else:
            return made
    made.close()
    raise OSError(errno.EADDRINUSE, "no port is free")


def _of_group(family: socket.AddressFamily, group: int) -> socket.socket:
    """The kernel remembers of a socket who made it: the group of this thread's accesses to files is what counts, and
    that can be changed for the thread alone.
    """
    if group == os.getegid():
        return socket.socket(family, socket.SOCK_DGRAM)
    kernel = ctypes.CDLL(None)
    before = kernel.setfsgid(group)
    try:
        if kernel.setfsgid(group) != group:  # otherwise the question would come back here, for ever
            raise PermissionError(f"no socket of group {group} can be made: CAP_SETGID is missing")
        return socket.socket(family, socket.SOCK_DGRAM)
    finally:
        kernel.setfsgid(before)


def _ports() -> range:
    """Those that the kernel gives to nobody by itself: above its range, or below if there are few; all, if it gives
    all.
    """
    first, last = map(int, _GIVEN_PORTS.read_text().split())
    above, below = range(last + 1, 65536), range(1024, first)
    return (above if len(above) >= min(_FEW_PORTS, len(below)) else below) or range(1024, 65536)
