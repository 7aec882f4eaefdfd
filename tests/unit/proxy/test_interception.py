"""What is asked of a host before it is intercepted, and the life of the rules around a real Envoy in a namespace."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

import pytest
from click.testing import CliRunner

from smc.certificates import credential as credentials
from smc.cli.proxy import proxy
from smc.injector.rules import Interception
from smc.proxy import enrolment, envoy, interception
from smc.proxy.enrolment import CREDENTIAL, Enrolment
from smc.proxy.settings import Exit, InterceptionSettings, ProxyFailed
from tests.unit.certificates.authority import DAY, TestAuthority

CA = TestAuthority.make(now=time.time() - 60)
ADDRESS = "10.9.0.5"


def enrolled(address: str = ADDRESS, *, replicas: tuple[str, ...] = ("10.9.0.1:15128",)) -> Enrolment:
    return Enrolment(
        "shop/buyer", "default", "mesh.example", "mesh.internal", replicas, ("10.9.0.1:15129",), address, ""
    )


def rules_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resolv_conf: str | None, given: Enrolment
) -> Interception:
    path = tmp_path / "resolv.conf"
    if resolv_conf is not None:
        path.write_text(resolv_conf)
    monkeypatch.setattr(interception, "_RESOLV_CONF", path)
    return interception.rules_of(InterceptionSettings(users=(7,), networks=(IPv4Network("10.0.0.0/8"),)), given)


def test_the_rules_are_those_of_the_workload_and_of_what_was_excluded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = rules_of(monkeypatch, tmp_path, None, enrolled())
    assert (str(found.address), found.outbound_port, found.inbound_port, found.dns_port) == (
        ADDRESS, 15001, 15003, 15053,
    )  # fmt: skip
    assert (found.users, found.networks, found.proxy_id) == ((7,), (IPv4Network("10.0.0.0/8"),), 1337)
    assert 15010 in found.inbound_ports, "Prometheus has no certificate"


def test_of_the_control_plane_only_addresses_are_written_and_no_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replicas = ("smc.example:15128", "[2001:db8::1]:15128", "10.9.0.2:15128")
    found = rules_of(monkeypatch, tmp_path, None, enrolled(replicas=replicas))
    assert set(found.control_plane) == {
        (IPv6Address("2001:db8::1"), 15128),
        (IPv4Address("10.9.0.2"), 15128),
        (IPv4Address("10.9.0.1"), 15129),
    }


@pytest.mark.parametrize(
    ("resolv_conf", "servers"),
    [
        pytest.param(None, (), id="no file"),
        pytest.param("nameserver 10.9.0.1\nnameserver 10.9.0.2\n", (), id="servers elsewhere"),
        pytest.param(
            "# a resolver\nnameserver 127.0.0.53\noptions edns0\n", (IPv4Address("127.0.0.53"),), id="resolver here"
        ),
        pytest.param("nameserver fe80::1%eth0\nnameserver ::1\n", (IPv6Address("::1"),), id="IPv6"),
        pytest.param("nameserver\nnameserver here\nsearch example\n", (), id="nonsense"),
    ],
)
def test_a_resolver_on_the_host_is_told_from_one_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resolv_conf: str | None, servers: tuple[object, ...]
) -> None:
    assert rules_of(monkeypatch, tmp_path, resolv_conf, enrolled()).dns_servers == servers


@pytest.mark.parametrize("address", ["127.0.10.1", "2001:db8::5"])
def test_an_address_that_nothing_can_be_redirected_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    with pytest.raises(ProxyFailed, match="IPv4 address") as failed:
        rules_of(monkeypatch, tmp_path, None, enrolled(address))
    assert failed.value.exit == Exit.CANNOT_INTERCEPT


HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


@pytest.mark.parametrize(
    ("routes", "leads"),
    [
        pytest.param("", False, id="none"),
        pytest.param("eth0\t0009090A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n", False, id="the local network"),
        pytest.param("eth0\t00000000\t0109090A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n", True, id="default"),
        pytest.param("lo\t000000F0\t00000000\t0001\t0\t0\t0\t000000F0\t0\t0\t0\n", True, id="240.0.0.0/4"),
        pytest.param("*\t00000000\t00000000\t0200\t0\t0\t0\t00000000\t0\t0\t0\n", False, id="unreachable default"),
    ],
)
def test_a_host_has_to_have_a_route_to_virtual_addresses(routes: str, leads: bool) -> None:
    assert interception.has_virtual_route(HEAD + routes) == leads


def test_one_process_intercepts_in_one_network_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interception, "_NAME", f"\0smc-test-{os.getpid()}")
    with (
        interception.claimed(),
        pytest.raises(ProxyFailed, match="another process intercepts"),
        interception.claimed(),
    ):
        pytest.fail("two do")
    with interception.claimed():
        """The first one has let go."""


def test_envoy_cannot_open_a_socket_nor_what_belongs_to_somebody_else(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with here, there, (tmp_path / "log").open("w") as file:
        assert not envoy.may_open(here.fileno(), None), "as systemd gives it"
        assert envoy.may_open(file.fileno(), None)
        assert envoy.may_open(file.fileno(), os.getuid())
        assert not envoy.may_open(file.fileno(), os.getuid() + 1)


# ------------------------------------------------------------------------------------------------------- in a namespace


def _namespaces_or_end() -> None:
    missing = [f"the program {name}" for name in ("unshare", "nsenter", "nft", "ip") if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("root, who may make network namespaces")
    if missing:
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse(f"this needs {', '.join(missing)}")


def until(condition: Callable[[], object], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address, and a directory that Envoy's user may go through."""

    folder: Path
    holder: int
    """The pid of a process whose network is this machine's."""

    @property
    def directory(self) -> Path:
        return self.folder / "proxy"

    def enrol(self, *, ttl: timedelta = DAY, ago: float = 0.0) -> None:
        given = CA.credential("proxy/shop/buyer", now=time.time() - ago, ttl=ttl)
        credentials.write(self.directory / CREDENTIAL, given)
        enrolment.write(self.directory, enrolled())

    def command(self, *argv: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net", *argv]

    def run(self, *argv: str) -> str:
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def rules(self) -> str:
        return self.run("nft", "list", "ruleset")

    @contextmanager
    def start(self, *arguments: str, stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
        argv = [sys.executable, "-m", "smc", "proxy", "run", "--intercept", "--dir", str(self.directory), *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "SMC_ENVOY"}
        with subprocess.Popen(
            self.command(*argv), stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def machine() -> Iterator[Machine]:
    _namespaces_or_end()
    folder = Path(tempfile.mkdtemp(prefix="smc-intercepted-"))
    folder.chmod(0o711)
    # `cat` ends with its standard input, and so with this process.
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as holder:
        own = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own)
        made = Machine(folder, holder.pid)
        for command in (
            "link set lo up",
            "link add eth0 type veth peer name eth1",
            "link set eth0 up",
            f"address add {ADDRESS}/24 dev eth0",
        ):
            made.run("ip", *command.split())
        yield made
    shutil.rmtree(folder)


def child(process: subprocess.Popen[str]) -> int:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(found[0]) if found else 0


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def is_envoy(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/exe").endswith("/envoy")
    except FileNotFoundError:
        return False


def test_envoy_is_a_user_without_any_capability_that_reads_what_is_its_own(machine: Machine) -> None:
    machine.enrol()
    with machine.start() as process:
        until(lambda: is_envoy(child(process)))
        found = status(child(process))
        assert found["Uid"].split() == found["Gid"].split() == ["1337"] * 4
        assert found["Groups"].strip() == ""
        assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        key = (machine.directory / CREDENTIAL / "key.pem").stat()
        assert (key.st_uid, key.st_mode & 0o777) == (1337, 0o600)
        until(lambda: "127.0.0.1:15000" in machine.run("ss", "-ltn"))
        assert status(process.pid)["Gid"].split()[1] == "1337", "so that what it sends is not redirected either"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == Exit.STOPPED


def test_envoy_may_lie_where_its_user_cannot_go_and_has_a_log_where_it_cannot_open_ours(machine: Machine) -> None:
    machine.enrol()
    (machine.folder / "private").mkdir(mode=0o700)
    hidden = shutil.copy(envoy.find("", {}), machine.folder / "private" / "envoy")
    here, there = socket.socketpair()
    with here, there, machine.start("--envoy", hidden, stdout=here.fileno()) as process:
        until(lambda: is_envoy(child(process)))
        assert status(child(process))["Uid"].split()[0] == "1337"
        assert (machine.directory / "envoy.log").stat().st_uid == 1337


def test_rules_are_there_before_envoy_and_go_when_it_is_told_to_stop(machine: Machine) -> None:
    machine.enrol()
    with machine.start() as process:
        until(lambda: is_envoy(child(process)))
        assert f"dnat ip to {ADDRESS}:15003" in machine.rules()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == Exit.STOPPED
    assert machine.rules() == ""


def test_what_a_killed_one_leaves_is_replaced_by_the_next_and_removed_by_clean(machine: Machine) -> None:
    machine.enrol()
    smc = (sys.executable, "-m", "smc", "proxy", "clean")
    with machine.start("--exclude-inbound-port", "9100") as process:
        until(lambda: is_envoy(child(process)))
        process.kill()
    assert "9100" in machine.rules()
    with machine.start("--backend", "iptables", "--exclude-inbound-port", "9200") as process:
        until(lambda: is_envoy(child(process)))
        assert "table inet smc" not in machine.rules()
        assert machine.run("iptables-save", "-t", "nat").count("-j SMC_OUTBOUND") == 1
        refused = subprocess.run(machine.command(*smc), capture_output=True, text=True, timeout=90, check=False)
        assert refused.returncode != 0
        assert "another process intercepts" in refused.stderr
        process.kill()
    said = machine.run(*smc)
    assert "removed iptables: chains SMC_OUTBOUND and SMC_INBOUND of table nat" in said
    assert "removed ip6tables: chains SMC_OUTBOUND and SMC_INBOUND of table filter" in said
    assert "SMC" not in machine.run("iptables-save") + machine.run("ip6tables-save")
    assert "nothing to remove" in machine.run(*smc)


def test_a_failure_opens_nothing(machine: Machine) -> None:
    machine.enrol(ttl=timedelta(minutes=1), ago=120.0)
    with machine.start() as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == Exit.CREDENTIAL_EXPIRED
    assert "traffic stays redirected" in errors
    assert f"dnat ip to {ADDRESS}:15003" in machine.rules()


def test_a_machine_that_never_joined_is_left_alone(machine: Machine) -> None:
    with machine.start("--token", "nonsense", "--join", "127.0.0.1:1") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == Exit.USAGE
    assert "traffic stays redirected" not in errors
    assert machine.rules() == ""


def test_without_the_right_to_it_says_what_is_missing(machine: Machine) -> None:
    argv = ["setpriv", "--bounding-set=-net_admin", sys.executable, "-m", "smc", "proxy"]
    for command in (("run", "--intercept", "--dir", str(machine.directory)), ("clean",)):
        done = subprocess.run(machine.command(*argv, *command), capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode in (1, Exit.CANNOT_INTERCEPT)
        assert "CAP_NET_ADMIN, which this process does not have" in done.stderr
    assert not machine.directory.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("--exclude-inbound-port", "0"), "0 is not in the range 1<=x<=65535", id="port"),
        pytest.param(("--exclude-outbound-port", "http"), "not a valid integer", id="no port"),
        pytest.param(
            ("--exclude-cidr", "10.0.0.1/8"), "has host bits set; write one such as 10.0.0.0/8", id="host bits"
        ),
        pytest.param(
            ("--exclude-cidr", "example.com"), "does not appear to be an IPv4 or IPv6 network", id="no network"
        ),
        pytest.param(("--exclude-uid", "-1"), "-1 is not in the range", id="user"),
        pytest.param(("--proxy-uid", "0"), "0 is not in the range", id="root"),
        pytest.param(("--backend", "pf"), "'pf' is not one of 'auto', 'nft', 'iptables'", id="backend"),
    ],
)
def test_wrong_input_is_told_at_once(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(proxy, ["run", "--dir", str(tmp_path), "--intercept", *arguments])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_an_exclusion_without_interception_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(proxy, ["run", "--dir", str(tmp_path), "--exclude-uid", "1000"])
    assert done.exit_code == 2
    assert "say something of --intercept" in " ".join(done.output.split())
