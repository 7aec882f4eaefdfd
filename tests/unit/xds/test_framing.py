"""How gRPC puts messages, statuses and deadlines on an HTTP/2 stream."""

from __future__ import annotations

from collections import deque
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.xds.framing import PREFIX, Malformed, Messages, Status, prefix, timeout, trailers

MOST = 1_000


def framed(*messages: bytes) -> bytes:
    return b"".join(prefix(len(message)) + message for message in messages)


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 40)))
def test_messages_are_the_same_however_the_bytes_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    data, inbound, read = framed(*messages), Messages(MOST), []
    for cut in (*cuts, len(data)):
        piece, data = data[:cut], data[cut:]
        read += list(inbound.feed(piece))
    assert read == messages
    assert inbound.complete


def test_a_part_of_a_message_is_none() -> None:
    inbound = Messages(MOST)
    assert list(inbound.feed(framed(b"whole", b"half")[:-1])) == [b"whole"]
    assert not inbound.complete
    assert list(inbound.feed(b"f")) == [b"half"]


def test_the_longest_message_is_read() -> None:
    assert list(Messages(MOST).feed(framed(b"x" * MOST))) == [b"x" * MOST]


def test_a_longer_one_is_refused_by_its_first_bytes() -> None:
    with pytest.raises(Malformed, match="a message of 1001 bytes; at most 1000 are read") as raised:
        list(Messages(MOST).feed(prefix(MOST + 1)))
    assert raised.value.status is Status.RESOURCE_EXHAUSTED


def test_what_came_before_a_compressed_message_is_read_and_that_is_not() -> None:
    read: deque[bytes] = deque()
    with pytest.raises(Malformed, match="compressed") as raised:
        read.extend(Messages(MOST).feed(framed(b"plain") + b"\1" + prefix(3)[1:] + b"abc"))
    assert list(read) == [b"plain"]
    assert raised.value.status is Status.UNIMPLEMENTED


@given(st.binary(max_size=200))
def test_no_bytes_at_all_do_any_harm(data: bytes) -> None:
    inbound = Messages(MOST)
    try:
        read = list(inbound.feed(data))
    except Malformed:
        return
    assert sum(map(len, read)) + PREFIX * len(read) <= len(data)


@given(st.text())
def test_the_text_of_a_status_is_plain_ascii_and_means_the_same(text: str) -> None:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return
    headers = dict(trailers(Status.NOT_FOUND, text))
    assert headers[b"grpc-status"] == b"5"
    message = headers.get(b"grpc-message", b"")
    assert all(0x20 <= byte < 0x7F for byte in message)
    assert unquote_to_bytes(message) == encoded


@pytest.mark.parametrize(("value", "seconds"), [(b"2H", 7200.0), (b"1M", 60.0), (b"90S", 90.0), (b"500m", 0.5)])
def test_a_timeout_has_a_unit(value: bytes, seconds: float) -> None:
    assert timeout(value) == seconds
    assert timeout(b"99999999n") == pytest.approx(0.099999999)
    assert timeout(b"100u") == pytest.approx(1e-4)


@pytest.mark.parametrize("value", [b"", b"1", b"S", b"-1S", b"1.5S", b"123456789S", b"1s", "1\u0660S".encode()])
def test_what_is_no_time_is_refused(value: bytes) -> None:
    with pytest.raises(Malformed, match="is no time"):
        timeout(value)
