"""How connections end that do not end as they should. Real sockets on loopback, as in test_transport.py."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop

from smc.xds import transport
from smc.xds.transport import Call
from tests.unit.xds.test_transport import _HOST, Peer, World, context, world


@contextmanager
def problems() -> Iterator[list[str]]:
    """What nobody has caught on this loop."""
    found: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, what: found.append(f"{what['message']}: {what.get('exception')!r}")
    )
    yield found


async def met(made: World) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, ssl.SSLObject, ssl.MemoryBIO]:
    """TLS on a socket that what is not TLS can be written to as well: what is to be sent is in the last."""
    reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context(made.credential).wrap_bio(incoming, outgoing, server_hostname=_HOST)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await reader.read(65536))
    return reader, writer, tls, outgoing


@pytest.mark.timeout(60)  # what goes wrong here stops the event loop
@pytest.mark.parametrize("more", [b"", b"and one more thing", b"\x17\x03\x03\x00\x01x" * 3], ids=["no", "text", "TLS"])
async def test_who_says_goodbye_is_not_listened_to_any_more(more: bytes) -> None:
    async with world() as made:
        with problems() as found:
            reader, writer, tls, outgoing = await met(made)
            with pytest.raises(ssl.SSLWantReadError):
                tls.unwrap()
            writer.write(outgoing.read() + more)
            async with asyncio.timeout(5):
                while await reader.read(65536):
                    pass
            await made.still_serves()
        assert not found
        writer.close()


async def test_who_does_not_read_the_last_that_it_is_told_is_cut_off_however_much_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "SWEEP", 0.2)
    monkeypatch.setattr(transport, "GRACE", 0.2)
    gone = asyncio.Event()

    async def serve(call: Call) -> None:
        connection: Any = call._connection
        lost = connection.connection_lost
        connection.connection_lost = lambda error: (lost(error), gone.set())
        size = connection._transport.get_write_buffer_size
        while size() < 20_000:  # what the kernel takes is the kernel's
            call.write(bytes(4_000))
            await asyncio.sleep(0.02 if size() else 0)
        assert size() < transport._BUFFERED, "it is not cut off for what it was sent before"
        connection.retire("its time has come")
        await asyncio.Event().wait()

    async with world() as made:
        made.served = serve
        peer = await Peer.connect(made)
        peer.request_and_never_read()
        async with asyncio.timeout(20):
            while not gone.is_set():
                peer.http2.ping()
                peer.flush()
                await asyncio.sleep(0.05)
        await peer.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_who_is_gone_before_it_was_met_is_no_error(run: Callable[[Awaitable[None]], None]) -> None:
    async def gone() -> None:
        async with world() as made:
            with problems() as found:
                for _ in range(20):  # as a load balancer does that only looks whether somebody listens
                    one = socket.create_connection(("127.0.0.1", made.port))
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.close()
                await made.still_serves()
            assert not found

    run(gone())
