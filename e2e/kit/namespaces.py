"""Hosts on one machine: network namespaces on a bridge, each with addresses and a name server of its own.

    with Namespaces() as network:
        host = network.add("a")
        done = await host.run("curl", "-s", f"http://{other.address}/")

The bridge stands for the network that the hosts share. This process is on it too, with as many addresses as it takes:
that is where the control plane is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

TIMEOUT = 60.0
"""Seconds that one command in a host may take, on a machine that is busy."""
UNANSWERED = 6
"""Seconds that a host's resolver waits for an answer. Nothing else here waits less for what never comes."""
AT_ONCE = 4.0
"""Seconds, fewer than UNANSWERED: nothing was waited for, even if the machine had other things to do for a while."""
_NAME = re.compile(r"smc-(\d+)-\d+-\w+")
_BRIDGE = re.compile(r"smcb(\d+)x\d+")
_NETNS = Path("/etc/netns")
_serial = itertools.count()


def require() -> None:
    """End the test that cannot run on this machine, and say what is missing: a failure in CI, else it is skipped."""
    missing = [f"the program {name}" for name in ("ip", "nft", "iptables", "curl") if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("root, who may make network namespaces")
    if missing:
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse(f"this needs {', '.join(missing)}")


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    errors: str


@dataclass(frozen=True, slots=True)
class Host:
    """One network namespace: `lo`, and `eth0` with one address of each family and a default route."""

    name: str
    """Of the namespace, as `ip netns` knows it."""
    address: str
    address6: str

    def command(self, *argv: str) -> list[str]:
        """The command line that runs `argv` in this host; what it becomes has the same pid."""
        return ["ip", "netns", "exec", self.name, *argv]

    async def run(self, *argv: str, uid: int = 0, timeout: float = TIMEOUT) -> Done:
        """Run a command in this host to its end, as a user.

        Raises:
            TimeoutError: it did not end within `timeout` seconds; it is killed.
        """
        become = [] if uid == 0 else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        process = await asyncio.create_subprocess_exec(
            *self.command(*become, *argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(timeout):
                out, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return Done(process.returncode or 0, out.decode(errors="replace"), errors.decode(errors="replace"))

    async def rules(self) -> str:
        """All that nft knows of this host's network, whoever wrote it; "" if there is nothing."""
        done = await self.run("nft", "list", "ruleset")
        assert done.code == 0, done.errors
        return done.out


class Namespaces:
    """A bridge and its hosts, while this is open. Afterwards all of them are gone, with the processes in them.

    What a run that was killed has left is taken away by the next one: names carry the pid.
    """

    def __init__(self) -> None:
        serial = next(_serial)
        self._prefix = f"smc-{os.getpid()}-{serial}-"
        self._bridge = f"smcb{os.getpid()}x{serial}"
        self._links = f"smcv{os.getpid()}x{serial}"
        self._network = 0
        self._last = 0
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        require()
        _purge()
        self._network = _free_network()
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
            self.gateway = self.take()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def take(self) -> str:
        """One more address of this process on the bridge."""
        address, _ = self._next()
        _ip("address", "add", f"{address}/24", "dev", self._bridge)
        return address

    def add(self, name: str, *, name_server: str = "", routed: bool = True) -> Host:
        """One more host, called `name` (few letters).

        Args:
            name: at most four letters.
            name_server: the IP address that its programs look names up at; "" is its own.
            routed: whether it has a default route.
        """
        address, address6 = self._next()
        host = Host(self._prefix + name, address, address6)
        link = f"{self._links}{len(self.hosts)}"
        resolver = _NETNS / host.name
        resolver.mkdir(parents=True)
        (resolver / "resolv.conf").write_text(
            f"nameserver {name_server or address}\noptions timeout:{UNANSWERED} attempts:1\n"
        )
        _ip("netns", "add", host.name)
        self.hosts.append(host)
        inside = ("-n", host.name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", link, "master", self._bridge, "up")
        for device in ("lo", "eth0"):
            _ip(*inside, "link", "set", device, "up")
        _ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        # Without the check whether somebody has it, which takes a second.
        _ip(*inside, "-6", "address", "add", f"{address6}/64", "dev", "eth0", "nodad")
        if routed:
            _ip(*inside, "route", "add", "default", "via", self.gateway)
        return host

    def add_address(self, host: Host) -> str:
        """One more IPv4 address of a host."""
        address, _ = self._next()
        _ip("-n", host.name, "address", "add", f"{address}/24", "dev", "eth0")
        return address

    def close(self) -> None:
        for host in self.hosts:
            _remove_namespace(host.name)
        self.hosts.clear()
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, timeout=TIMEOUT, check=False)

    def _next(self) -> tuple[str, str]:
        self._last += 1
        third, fourth = self._network, self._last
        return f"198.18.{third}.{fourth}", f"fd00:736d:63:{third:x}::{fourth:x}"


def _free_network() -> int:
    """The third part of a network 198.18.x.0/24 (kept for benchmarks, so nobody's) that is on no interface here."""
    shown = json.loads(_ip("-j", "-4", "address", "show"))
    taken = {info["local"].rpartition(".")[0] for link in shown for info in link.get("addr_info", ())}
    return random.choice([n for n in range(1, 255) if f"198.18.{n}" not in taken])


def _purge() -> None:
    """Take away what processes have left that are gone."""
    names = [entry.name for entry in Path("/run/netns").glob("smc-*")] if Path("/run/netns").is_dir() else []
    for name in {*names, *(entry.name for entry in _NETNS.glob("smc-*"))}:
        if (found := _NAME.fullmatch(name)) and not Path(f"/proc/{found[1]}").exists():
            _remove_namespace(name)
    for link in Path("/sys/class/net").glob("smcb*"):
        if (found := _BRIDGE.fullmatch(link.name)) and not Path(f"/proc/{found[1]}").exists():
            subprocess.run(["ip", "link", "delete", link.name], capture_output=True, timeout=TIMEOUT, check=False)


def _remove_namespace(name: str) -> None:
    """With the processes in it, which are all somebody's who ran a test."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not (pids := _pids(name)):
            break
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has ended
        _wait_until_gone(name)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=TIMEOUT, check=False)
    shutil.rmtree(_NETNS / name, ignore_errors=True)


def _wait_until_gone(name: str, timeout: float = 3.0) -> None:
    end = time.monotonic() + timeout
    while _pids(name) and time.monotonic() < end:
        time.sleep(0.05)


def _pids(name: str) -> Sequence[int]:
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return [int(pid) for pid in done.stdout.split()]


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
