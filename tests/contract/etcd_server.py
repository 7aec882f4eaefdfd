"""Real etcds on loopback, each with a data directory of its own, and a wire to them that can be cut."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cluster.etcd import EtcdKV, EtcdTLS

ADDRESS = "127.0.0.1"
START = 60.0
"""Seconds that an etcd has to get ready, on a machine that is busy."""


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind((ADDRESS, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def program(name: str) -> str:
    """`etcd` or `etcdctl` of this machine; a wheel's scripts in this Python environment do not count."""
    folders = [f for f in os.get_exec_path() if Path(f).absolute() != Path(sys.prefix, "bin")]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        pytest.skip(f"there is no {name} on PATH")
    return path


class EtcdServer:
    """One member. It is started by hand, and gone when `etcds` ends."""

    def __init__(
        self,
        directory: Path,
        client: int,
        peer: int,
        *,
        name: str = "etcd",
        members: str = "",
        flags: Sequence[str] = (),
        tls: Certificates | None = None,
    ) -> None:
        self.endpoint = f"{ADDRESS}:{client}"
        self.data = directory / name
        self.tls = tls
        self._program = program("etcd")
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._member = [
            f"--name={name}",
            f"--initial-cluster={members or f'{name}=http://{ADDRESS}:{peer}'}",
            f"--initial-advertise-peer-urls=http://{ADDRESS}:{peer}",
        ]
        scheme = "https" if tls else "http"
        self._flags = [
            *self._member,
            f"--listen-peer-urls=http://{ADDRESS}:{peer}",
            f"--listen-client-urls={scheme}://{self.endpoint}",
            f"--advertise-client-urls={scheme}://{self.endpoint}",
            "--logger=zap",
            "--log-level=error",
            *flags,
        ]
        if tls:
            self._flags += [
                "--client-cert-auth",
                f"--trusted-ca-file={tls.ca}",
                f"--cert-file={tls.server[0]}",
                f"--key-file={tls.server[1]}",
            ]

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, f"--data-dir={self.data}", *self._flags], stdout=log, stderr=log
            )

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """SIGSTOP."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def save(self, path: Path) -> None:
        """Write a snapshot."""
        self._etcdctl("--endpoints", self.endpoint, "snapshot", "save", str(path))

    def restore(self, path: Path, token: str) -> None:
        """Put a snapshot in the place of the data."""
        shutil.rmtree(self.data)
        flags = [f"--data-dir={self.data}", f"--initial-cluster-token={token}"]
        self._etcdctl("snapshot", "restore", str(path), *flags, *self._member)

    @staticmethod
    def _etcdctl(*arguments: str) -> None:
        subprocess.run(
            [program("etcdctl"), *arguments],
            env={**os.environ, "ETCDCTL_API": "3"},
            check=True,
            capture_output=True,
            timeout=START,
        )

    async def until_ready(self) -> None:
        async with self.client(timeout=START) as kv:
            await kv.status()

    def client(self, *, timeout: float = 5.0) -> AbstractAsyncContextManager[EtcdKV]:
        return client(self.endpoint, tls=self.tls and self.tls.client, timeout=timeout)


@asynccontextmanager
async def client(*endpoints: str, tls: EtcdTLS | None = None, timeout: float = 5.0) -> AsyncIterator[EtcdKV]:
    kv = EtcdKV(endpoints, tls=tls, timeout=timeout)
    try:
        yield kv
    finally:
        await kv.close()


class EtcdFactory:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.made: list[EtcdServer] = []

    def one(self, *, flags: Sequence[str] = (), tls: Certificates | None = None) -> EtcdServer:
        """An etcd of one member, started."""
        client, peer = free_ports(2)
        return self._start(EtcdServer(self._next(), client, peer, flags=flags, tls=tls))

    def three(self) -> list[EtcdServer]:
        """An etcd of three members, started."""
        clients, peers = free_ports(3), free_ports(3)
        members = ",".join(f"etcd-{n}=http://{ADDRESS}:{peer}" for n, peer in enumerate(peers))
        directory = self._next()
        flags = ["--heartbeat-interval=50", "--election-timeout=500"]
        return [
            self._start(EtcdServer(directory, clients[n], peers[n], name=f"etcd-{n}", members=members, flags=flags))
            for n in range(3)
        ]

    def _next(self) -> Path:
        directory = self._directory / f"cluster-{len(self.made)}"
        directory.mkdir()
        return directory

    def _start(self, server: EtcdServer) -> EtcdServer:
        self.made.append(server)
        server.start()
        return server


@contextmanager
def etcds(directory: Path) -> Iterator[EtcdFactory]:
    factory = EtcdFactory(directory)
    try:
        yield factory
    finally:
        for server in factory.made:
            server.kill()


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files for etcd, and what a client shows."""

    ca: Path
    server: tuple[Path, Path]
    client: EtcdTLS


def certificates(directory: Path) -> Certificates:
    """An authority of its own, a server on ADDRESS and a client."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
    now = dt.datetime.now(dt.UTC)

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(ADDRESS))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def written(name: str, data: bytes) -> Path:
        path = directory / name
        path.write_bytes(data)
        return path

    def pair(name: str) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return certificate(subject, key, ca=False), pem

    ca = certificate(ca_name, ca_key, ca=True)
    server, server_key = pair("server")
    client, client_key = pair("smc")
    return Certificates(
        written("ca.pem", ca),
        (written("server.pem", server), written("server-key.pem", server_key)),
        EtcdTLS(ca, client, client_key),
    )


class Wire:
    """A TCP proxy in front of a server: `async with Wire(endpoint) as wire`.

    It can swallow what is sent either way, drop its connections, and refuse new ones.
    """

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.rpartition(":")
        self._upstream = (host, int(port))
        self._server: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        """That were made so far."""
        self.swallow_requests = False
        self.swallow_answers = False

    @property
    def endpoint(self) -> str:
        return f"{ADDRESS}:{self._port}"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        for _turn in range(5):  # somebody may just have been accepted, and is served in a moment
            await asyncio.sleep(0)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, ADDRESS, self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Drop the connections, and refuse new ones until it is opened again."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        if self._server is None:
            writer.transport.abort()
            up_writer.transport.abort()
            return
        self.connections += 1
        self._writers |= {writer, up_writer}
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, up_writer, "swallow_requests"))
                tasks.create_task(self._pump(up_reader, writer, "swallow_answers"))
        finally:
            self._writers -= {writer, up_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallow: str) -> None:
        try:
            while data := await reader.read(65536):
                if not getattr(self, swallow):
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
