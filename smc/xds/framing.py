"""gRPC on top of HTTP/2: how a message, a status and a deadline look on the wire.

Only what a server of bidirectional streams needs. The rules are those of
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from enum import IntEnum

PREFIX = 5
"""Bytes in front of each message: a flag that says whether it is compressed, and its length."""

Header = tuple[bytes, bytes]

_PREFIX = struct.Struct(">BI").pack
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("%")}


class Status(IntEnum):
    """How a call ended. The numbers are gRPC's; these are the ones that are used here."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Malformed(Exception):
    """What came is no message that is taken here. `status` is how to end the call; the text says why."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(text)
        self.status = status


def prefix(length: int) -> bytes:
    """What goes in front of a message of so many bytes."""
    return _PREFIX(0, length)


class Messages:
    """Cuts what comes on one stream into messages."""

    def __init__(self, most: int) -> None:
        """`most` is the longest message that is taken, in bytes."""
        self._most = most
        self._partial = bytearray()

    @property
    def complete(self) -> bool:
        """Nothing of a message is there whose rest is missing."""
        return not self._partial

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with `data`. Must be used up.

        Raises:
            Malformed: a message is compressed or too long, which its first bytes say; nothing later can be read.
        """
        if not self._partial and len(data) >= PREFIX and self._length(data) == len(data) - PREFIX:
            yield data[PREFIX:]  # nearly always: one message, and all of it
            return
        partial = self._partial
        partial += data
        while len(partial) >= PREFIX:
            end = PREFIX + self._length(partial)
            if len(partial) < end:
                return
            message = bytes(partial[PREFIX:end])
            del partial[:end]
            yield message

    def _length(self, data: bytes | bytearray) -> int:
        if data[0]:
            raise Malformed(Status.UNIMPLEMENTED, "compressed messages are not read here: send them as they are")
        length = int.from_bytes(data[1:PREFIX], "big")
        if length > self._most:
            raise Malformed(Status.RESOURCE_EXHAUSTED, f"a message of {length} bytes; at most {self._most} are read")
        return length


RESPONSE: tuple[Header, ...] = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity"),
)
"""The headers of every response."""


def trailers(status: Status, text: str) -> tuple[Header, ...]:
    """How a call ended; to be sent after the last message, or with the headers if there is none."""
    code = (b"grpc-status", b"%d" % status)
    if not text:
        return (code,)
    encoded = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in text.encode())
    return code, (b"grpc-message", encoded.encode())


def timeout(value: bytes) -> float:
    """The seconds that a `grpc-timeout` leaves.

    Raises:
        Malformed: it is none.
    """
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise Malformed(Status.INVALID_ARGUMENT, f"the grpc-timeout {value[:50]!r} is no time")
    return int(found[1]) * _SECONDS[found[2]]
