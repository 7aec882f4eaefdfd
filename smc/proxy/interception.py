"""Interception on this host: the rules written and taken back, and Envoy made a user of its own.

The rules are those of `smc.injector.rules`; here is what has to be asked, run and owned around them. They stand for the
network namespace that this process is in, so one proxy at most intercepts in one namespace: who does holds a socket
name of that namespace, which the kernel gives free however the process ends.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path
from typing import Protocol

import structlog

from smc.envoy import names
from smc.injector import rules
from smc.injector.rules import Interception, IpAddress
from smc.proxy.enrolment import Enrolment
from smc.proxy.settings import Backends, Exit, InterceptionSettings, ProxyFailed

ALWAYS_OPEN = (names.PROMETHEUS_PORT,)
"""Ports of this host that are reached without the inbound listener, beside SSH: Envoy serves them itself."""
_NAME = "\0smc-interception"
"""Of a socket in the abstract namespace, which belongs to the network namespace."""
_TIMEOUT = 10.0
_RESOLV_CONF = Path("/etc/resolv.conf")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_CHOWN, _SETGID, _SETUID, _NET_ADMIN = 0, 6, 7, 12
"""Bits of Linux's capabilities."""
_REJECT = 0x200
"""The flag of a route that says that there is no way."""

_log = structlog.get_logger(__name__)


# ---------------------------------------------------------------------------------------------------------- the kernel


class Backend(Protocol):
    """A program that tells the kernel. Both methods raise ProxyFailed if it cannot."""

    def apply(self, interception: Interception) -> None:
        """Put the rules into force, in place of those that this backend has put there before."""

    def remove(self) -> tuple[str, ...]:
        """Take away whatever `apply` has put there; returns its names, none if there was nothing."""


class Nft:
    def apply(self, interception: Interception) -> None:
        _run("nft", "-f", "-", text=rules.nft(interception))

    def remove(self) -> tuple[str, ...]:
        table = f"table inet {rules.TABLE}"
        if table not in _run("nft", "list", "tables").splitlines():
            return ()
        _run("nft", "-f", "-", text=rules.NFT_REMOVAL)
        return (f"nft: {table}",)


class Iptables:
    """IPv6 is refused before IPv4 is redirected, so that nothing goes round in between."""

    def apply(self, interception: Interception) -> None:
        if _has_ipv6():
            self._restore("ip6tables", rules.ip6tables(interception, self._saved("ip6tables", "filter")))
        self._restore("iptables", rules.iptables(interception, self._saved("iptables", "nat")))

    def remove(self) -> tuple[str, ...]:
        removed = []
        for tool, table in (("iptables", "nat"), ("ip6tables", "filter")):
            if tool == "ip6tables" and not _has_ipv6():
                continue
            if text := rules.iptables_removal(table, self._saved(tool, table)):
                self._restore(tool, text)
                removed.append(f"{tool}: chains {rules.OUTBOUND} and {rules.INBOUND} of table {table}")
        return tuple(removed)

    @staticmethod
    def _saved(tool: str, table: str) -> str:
        return _run(f"{tool}-save", "-t", table)

    @staticmethod
    def _restore(tool: str, text: str) -> None:
        # Others write rules as well; it waits for them so many seconds.
        _run(f"{tool}-restore", "--noflush", "-w", "5", text=text)


_BACKENDS: tuple[tuple[str, str, type[Backend]], ...] = (
    ("nft", "nft", Nft),
    ("iptables", "iptables-restore", Iptables),
)
"""Name, the program that it needs, and what drives it; the first one is preferred."""


def _installed(choice: Backends) -> dict[str, Backend]:
    """By name, the preferred one first.

    Raises:
        ProxyFailed: there is none of that choice.
    """
    found = {n: kind() for n, program, kind in _BACKENDS if choice in ("auto", n) and _find(program) is not None}
    if not found:
        wanted = " or ".join(program for n, program, _ in _BACKENDS if choice in ("auto", n))
        raise ProxyFailed(
            Exit.CANNOT_INTERCEPT, f"there is no {wanted} on this machine", hint="install the package nftables"
        )
    return found


def apply(choice: Backends, interception: Interception) -> str:
    """Put the rules into force, in place of all that were there before; returns the backend's name.

    Raises:
        ProxyFailed: the program is missing, or the kernel refuses.
    """
    name, backend = next(iter(_installed(choice).items()))
    backend.apply(interception)
    # What the other one has left from another time goes only now: in no moment is there nothing.
    for other, leftover in _installed("auto").items():
        if other != name and (removed := leftover.remove()):
            _log.info("rules of another backend removed", removed=removed)
    return name


def remove() -> tuple[str, ...]:
    """Take away all rules of interception that are in this network namespace; returns what they were.

    Raises:
        ProxyFailed: no program is there that could, or the kernel refuses.
    """
    _needs(_NET_ADMIN)
    return tuple(removed for backend in _installed("auto").values() for removed in backend.remove())


def _run(program: str, *arguments: str, text: str = "") -> str:
    path = _find(program)
    if path is None:
        raise ProxyFailed(Exit.CANNOT_INTERCEPT, f"there is no {program} on this machine")
    command = " ".join((program, *arguments))
    try:
        done = subprocess.run(  # noqa: S603
            [path, *arguments], input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ProxyFailed(Exit.CANNOT_INTERCEPT, f"`{command}` did not end within {_TIMEOUT:g} s") from None
    except OSError as e:
        raise ProxyFailed(Exit.CANNOT_INTERCEPT, f"`{command}` cannot be run: {e.strerror}") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[:500]
        raise ProxyFailed(
            Exit.CANNOT_INTERCEPT,
            f"`{command}` ended with {done.returncode}: {said}",
            hint="does this kernel have it? --backend chooses another",
        )
    return done.stdout


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


def _has_ipv6() -> bool:
    return Path("/proc/self/net/if_inet6").exists()


# ------------------------------------------------------------------------------------------------------- this process


@contextmanager
def claimed() -> Iterator[None]:
    """Be the one who intercepts in this network namespace.

    Raises:
        ProxyFailed: another process is.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        try:
            claim.bind(_NAME)
        except OSError:
            raise ProxyFailed(
                Exit.CANNOT_INTERCEPT,
                "another process intercepts in this network namespace",
                hint="one `smc proxy run --intercept` at a time; when it is stopped, it takes its rules back",
            ) from None
        yield


def prepare(settings: InterceptionSettings, directory: Path, log: Path | None) -> None:
    """Check that all of it may be done, give Envoy's user what it reads, and get its group for ourselves.

    With that group what this process sends goes its own way, also past rules that a crash has left. `directory` is
    the proxy's; it is made if it is missing.

    Raises:
        ProxyFailed: this process may not.
    """
    uid = settings.proxy_uid
    _needs(_NET_ADMIN)
    _installed(settings.backend)
    if os.geteuid() == uid:
        return
    _needs(_CHOWN, _SETGID, _SETUID, or_be=uid)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (directory, *directory.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)
        if log is not None:
            log.touch(mode=0o600)
            os.chown(log, uid, uid)
        os.setegid(uid)
    except OSError as e:
        raise ProxyFailed(Exit.CANNOT_INTERCEPT, f"{directory} cannot be given to user {uid}: {e.strerror}") from None


def _needs(*capabilities: int, or_be: int | None = None) -> None:
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    if all(effective >> one & 1 for one in capabilities):
        return
    if or_be is None:
        raise ProxyFailed(
            Exit.CANNOT_INTERCEPT,
            "the rules of interception need CAP_NET_ADMIN, which this process does not have",
            hint="run it as root; in systemd AmbientCapabilities=CAP_NET_ADMIN is enough for the proxy's own user",
        )
    raise ProxyFailed(
        Exit.CANNOT_INTERCEPT,
        f"Envoy cannot be started as user {or_be}: this process may not change its user",
        hint=f"run it as root, or as user {or_be}, or name its own user by --proxy-uid",
    )


# -------------------------------------------------------------------------------------------------- what is redirected


def rules_of(settings: InterceptionSettings, enrolled: Enrolment) -> Interception:
    """The rules of one proxy on this host.

    Raises:
        ProxyFailed: the workload's address is none that can be redirected to.
    """
    address = ip_address(enrolled.address)
    if not isinstance(address, IPv4Address) or address.is_loopback:
        raise ProxyFailed(
            Exit.CANNOT_INTERCEPT,
            f"the workload's address is {address}, and interception needs an IPv4 address of this host's network",
            hint="correct spec.address of its Workload",
        )
    return Interception(
        address=address,
        outbound_port=names.OUTBOUND_PORT,
        inbound_port=names.INBOUND_PORT,
        dns_port=names.DNS_PORT,
        proxy_id=settings.proxy_uid,
        inbound_ports=(*ALWAYS_OPEN, *settings.inbound_ports),
        outbound_ports=settings.outbound_ports,
        networks=settings.networks,
        users=settings.users,
        control_plane=tuple(_addresses((*enrolled.xds_addresses, *enrolled.api_addresses))),
        dns_servers=tuple(server for server in _name_servers() if server.is_loopback),
    )


def _addresses(endpoints: Sequence[str]) -> Iterator[tuple[IpAddress, int]]:
    """Those that are IP addresses. Names may move; who follows them is the proxy, and it is not redirected anyway."""
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        try:
            yield ip_address(host.strip("[]")), int(port)
        except ValueError:
            continue


def _name_servers() -> Iterator[IpAddress]:
    try:
        lines = _RESOLV_CONF.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        match line.split():
            case ["nameserver", address, *_]:
                try:
                    yield ip_address(address.partition("%")[0])
                except ValueError:
                    _log.warning("no address of a name server", line=line, file=str(_RESOLV_CONF))


def check_route() -> None:
    """Say so if no route leads to virtual addresses: then the kernel says ENETUNREACH before any rule is asked."""
    if not has_virtual_route(Path("/proc/self/net/route").read_text()):
        _log.warning(
            "this host has no route to virtual addresses: whoever calls a service that has one gets `unreachable`",
            addresses=names.VIRTUAL_ADDRESSES,
            hint=f"add a default route, or: ip route add {names.VIRTUAL_ADDRESSES} dev lo",
        )


def has_virtual_route(table: str) -> bool:
    """Whether a route of `table`, which is as /proc/net/route, leads to all virtual addresses."""
    for line in table.splitlines()[1:]:
        _, destination, _, flags, _, _, _, mask, *_ = line.split()
        start, bits = (int.from_bytes(bytes.fromhex(field), "little") for field in (destination, mask))
        covers = IPv4Network(names.VIRTUAL_ADDRESSES).subnet_of(IPv4Network((start, bits.bit_count())))
        if covers and not int(flags, 16) & _REJECT:
            return True
    return False
