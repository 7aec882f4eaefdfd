"""Programs that know of no mesh: an HTTP server that says who asked, a greeter, and a name server of one zone.

    python -m e2e.kit.plain --http 198.18.7.4:8080 --http [fd00::4]:8080
    python -m e2e.kit.plain --greet 198.18.7.4:5432 --name ledger-v1
    python -m e2e.kit.plain --dns 198.18.7.4 --zone outside.example=198.18.7.4

Each line on standard output is one JSON document: what was asked for, and by whom.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from ipaddress import IPv4Address

_NXDOMAIN = 3


def _tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def _serve_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("peername")[0]
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split()[1].decode()
            _tell(http=path, peer=peer)
            body = json.dumps({"peer": peer, "path": path}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _greet(name: str, writer: asyncio.StreamWriter) -> None:
    """Say a name, before the caller has said anything, and close."""
    _tell(greeted=writer.get_extra_info("peername")[0])
    writer.write(f"{name}\n".encode())
    writer.close()


class _Dns(asyncio.DatagramProtocol):
    """Answers A from the zone, AAAA of its names with nothing, and all else with NXDOMAIN."""

    def __init__(self, zone: dict[str, IPv4Address]) -> None:
        self._zone = zone

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        labels, at = [], 12
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode())
            at += 1 + length
        question = data[12 : at + 5]
        name, kind = ".".join(labels).lower(), int.from_bytes(data[at + 1 : at + 3])
        _tell(dns=name, type=kind, peer=address[0])
        found = self._zone.get(name)
        code = 0 if found is not None else _NXDOMAIN
        answers = [found.packed] if found is not None and kind == 1 else []
        head = data[:2] + (0x8180 | code).to_bytes(2) + (1).to_bytes(2) + len(answers).to_bytes(2) + bytes(4)
        records = b"".join(b"\xc0\x0c\x00\x01\x00\x01" + (5).to_bytes(4) + (4).to_bytes(2) + a for a in answers)
        self._transport.sendto(head + question + records, address)


async def main(options: argparse.Namespace) -> None:
    zone = {name: IPv4Address(address) for name, _, address in (entry.partition("=") for entry in options.zone)}
    for listen in options.http:
        host, _, port = listen.rpartition(":")
        await asyncio.start_server(_serve_http, host.strip("[]"), int(port))
    for listen in options.greet:
        host, _, port = listen.rpartition(":")
        await asyncio.start_server(lambda _, writer: _greet(options.name, writer), host.strip("[]"), int(port))
    for address in options.dns:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: _Dns(zone), local_addr=(address, 53))
    _tell(serving=[*options.http, *options.greet, *options.dns])
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", action="append", default=[], metavar="ADDRESS:PORT")
    parser.add_argument("--greet", action="append", default=[], metavar="ADDRESS:PORT")
    parser.add_argument("--name", default="")
    parser.add_argument("--dns", action="append", default=[], metavar="ADDRESS")
    parser.add_argument("--zone", action="append", default=[], metavar="NAME=ADDRESS")
    asyncio.run(main(parser.parse_args()))
