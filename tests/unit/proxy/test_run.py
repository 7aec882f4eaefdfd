"""The life of `smc proxy run` around a stand-in for Envoy: start, restart, signals, readiness, renewal, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import structlog

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.certificates.tokens import Token
from smc.proxy import enrolment, envoy, program, renewal
from smc.proxy.enrolment import CREDENTIAL, Enrolment
from smc.proxy.run import BOOTSTRAP, READY, run_proxy
from smc.proxy.settings import Exit, ProxyFailed, ProxySettings
from tests.unit.certificates.authority import DAY, TestAuthority
from tests.unit.proxy.control_plane import ControlPlane, serving

CA = TestAuthority.make(now=time.time() - 3600)
REPLICA = CA.credential("replica/a", now=time.time())
TOKEN = Token(secrets.token_bytes(32), (x509.pin(CA.root),))
FAKE = Path(__file__).with_name("fake_envoy.py")


async def until(condition: Callable[[], object], timeout: float = 60) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class Machine:
    """One directory with a stand-in for Envoy, and what the tests ask of it."""

    folder: Path

    @property
    def directory(self) -> Path:
        return self.folder / "proxy"

    def settings(self, **more: object) -> ProxySettings:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        known = {"directory": self.directory, "envoy": str(self.folder / "envoy"), "admin": f"127.0.0.1:{port}"}
        return ProxySettings(**{**known, **more})  # type: ignore[arg-type]

    def enrol(self, api: str = "127.0.0.1:1", *, ttl: timedelta = DAY, ago: float = 0.0) -> Credential:
        credential = CA.credential("proxy/shop/buyer", now=time.time() - ago, ttl=ttl)
        credentials.write(self.directory / CREDENTIAL, credential)
        enrolment.write(
            self.directory,
            Enrolment(
                "shop/buyer", "default", "mesh.example", "mesh.internal", ("127.0.0.1:1",), (api,), "127.0.0.1", ""
            ),
        )
        return credential

    def events(self) -> list[str]:
        path = self.folder / "events"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def mark(self, name: str) -> None:
        (self.folder / name).touch()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    text = FAKE.read_text()
    (tmp_path / "envoy").write_text(f"#!{sys.executable} -IS\n{text}")
    (tmp_path / "envoy").chmod(0o755)
    return Machine(tmp_path)


async def stopped(task: asyncio.Task[int]) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(60):
        return await task


async def test_from_token_to_ready_to_the_end(machine: Machine) -> None:
    plane = ControlPlane(CA)
    async with serving(plane, REPLICA) as address:
        task = asyncio.create_task(run_proxy(machine.settings(join=(address,), token=TOKEN.text())))
        # Live is not ready: without its certificate every handshake fails.
        await until((machine.folder / "asked").exists)
        assert not (machine.directory / READY).exists()
        machine.mark("identity")
        await until((machine.directory / READY).exists)
    ready = json.loads((machine.directory / READY).read_text())
    assert (ready["proxy"], ready["pid"]) == ("shop/buyer", machine.pid())
    assert "--disable-hot-restart" in (machine.folder / "events").read_text(), "else each start leaves shared memory"
    node = json.loads((machine.directory / BOOTSTRAP).read_text())["node"]
    assert node["id"] == "shop/buyer"
    assert await stopped(task) == Exit.STOPPED
    assert machine.events() == ["start", "SIGTERM"]
    assert not (machine.directory / READY).exists()
    assert not alive(machine.pid())


async def test_a_restart_needs_neither_token_nor_control_plane(machine: Machine) -> None:
    before = machine.enrol()
    machine.mark("identity")
    task = asyncio.create_task(run_proxy(machine.settings(token=TOKEN.text())))
    await until((machine.directory / READY).exists)
    assert await stopped(task) == Exit.STOPPED
    assert credentials.read(machine.directory / CREDENTIAL) == before


async def test_an_envoy_that_dies_is_started_again_and_is_not_ready_meanwhile(machine: Machine) -> None:
    machine.enrol()
    machine.mark("identity")
    task = asyncio.create_task(run_proxy(machine.settings()))
    await until((machine.directory / READY).exists)
    first = machine.pid()
    (machine.folder / "identity").unlink()
    os.kill(first, signal.SIGKILL)
    await until(lambda: machine.events() == ["start", "start"])
    assert machine.pid() != first
    assert not (machine.directory / READY).exists()
    machine.mark("identity")
    await until((machine.directory / READY).exists)
    assert await stopped(task) == Exit.STOPPED


async def test_an_envoy_that_dies_at_once_is_started_less_and_less_often(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envoy, "FIRST_RETRY", 0.01)
    monkeypatch.setattr(envoy, "LAST_RETRY", 0.04)
    machine.enrol()
    machine.mark("die")
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(run_proxy(machine.settings()))
        await until(lambda: len(machine.events()) >= 4)
        assert await stopped(task) == Exit.STOPPED
    waits = [entry["retry_in"] for entry in logs if entry["event"] == "envoy died"]
    assert waits[:4] == [0.01, 0.02, 0.04, 0.04][: len(waits)]
    assert len(waits) >= 3
    assert {entry["code"] for entry in logs if entry["event"] == "envoy died"} == {3}


async def test_beside_a_program_it_is_ready_until_it_is_told_to_stop(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(_directory: Path, _who: program.Who, *, news: asyncio.Event, ready: Callable[[], None]) -> None:
        ready()
        await asyncio.Event().wait()

    monkeypatch.setattr(program, "serve", serve)
    machine.enrol()
    task = asyncio.create_task(run_proxy(machine.settings(grpc=True)))
    await until((machine.directory / READY).exists)
    ready = json.loads((machine.directory / READY).read_text())
    assert ready["GRPC_XDS_BOOTSTRAP"] == str(machine.directory / program.BOOTSTRAP)
    assert await stopped(task) == Exit.STOPPED
    assert not (machine.directory / READY).exists()
    assert machine.events() == [], "there is no Envoy"


async def test_a_deaf_envoy_is_killed_in_the_end(machine: Machine) -> None:
    machine.enrol()
    machine.mark("deaf")
    task = asyncio.create_task(run_proxy(machine.settings(stop_timeout=3)))
    await until(lambda: "start" in machine.events())
    assert await stopped(task) == Exit.STOPPED
    assert "SIGTERM" in machine.events()
    assert not alive(machine.pid())


async def test_signals_go_on_to_envoy(machine: Machine) -> None:
    machine.enrol()
    task = asyncio.create_task(run_proxy(machine.settings()))
    await until(lambda: "start" in machine.events())
    os.kill(os.getpid(), signal.SIGUSR1)
    await until(lambda: "SIGUSR1" in machine.events())
    assert await stopped(task) == Exit.STOPPED


async def test_it_stops_while_it_still_tries_to_join(machine: Machine) -> None:
    task = asyncio.create_task(run_proxy(machine.settings(join=("127.0.0.1:1",), token=TOKEN.text())))
    await until((machine.directory / "pending.pem").exists)
    assert await stopped(task) == Exit.STOPPED
    assert machine.events() == []


RUNNER = """
import asyncio, sys
from pathlib import Path
from smc.proxy.run import run_proxy
from smc.proxy.settings import ProxySettings
sys.exit(asyncio.run(run_proxy(ProxySettings(directory=Path(sys.argv[1]), envoy=sys.argv[2], admin=sys.argv[3]))))
"""


async def start_process(machine: Machine) -> asyncio.subprocess.Process:
    settings = machine.settings()
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUNNER, str(settings.directory), settings.envoy, settings.admin,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_no_envoy_outlives_a_killed_parent(machine: Machine) -> None:
    machine.enrol()
    process = await start_process(machine)
    await until(lambda: "start" in machine.events())
    assert alive(machine.pid())
    process.kill()
    await process.communicate()
    await until(lambda: not alive(machine.pid()))


async def test_a_second_proxy_in_the_same_directory_is_refused(machine: Machine) -> None:
    machine.enrol()
    process = await start_process(machine)
    await until(lambda: "start" in machine.events())
    assert await run_proxy(machine.settings()) == Exit.FAILED
    process.terminate()
    await process.communicate()
    assert process.returncode == Exit.STOPPED


# --- the ways in which it does not start


async def test_each_reason_not_to_start_has_its_own_exit_code(
    machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    assert await run_proxy(machine.settings()) == Exit.USAGE
    assert "no token was given" in capfd.readouterr().err
    assert await run_proxy(machine.settings(token="smc-nonsense", join=("127.0.0.1:1",))) == Exit.USAGE
    assert "nonsense" not in capfd.readouterr().err
    assert await run_proxy(machine.settings(token=TOKEN.text())) == Exit.USAGE
    assert await run_proxy(machine.settings(envoy=str(machine.folder / "nowhere"))) == Exit.NO_ENVOY
    machine.enrol(ttl=timedelta(seconds=60), ago=600)
    assert await run_proxy(machine.settings()) == Exit.CREDENTIAL_EXPIRED
    assert "ask for a new token" in capfd.readouterr().err
    shutil.rmtree(machine.directory)
    machine.enrol(ago=-600)
    assert await run_proxy(machine.settings()) == Exit.CLOCK_SKEW
    assert machine.events() == []


@pytest.mark.parametrize("grpc_program", [False, True])
async def test_what_is_wrong_after_it_has_entered_ends_it_with_a_code_as_well(
    machine: Machine, capsys: pytest.CaptureFixture[str], grpc_program: bool
) -> None:
    machine.folder = machine.folder / ("long" * 25 if grpc_program else "short")
    machine.enrol()
    enrolled = enrolment.read(machine.directory)
    assert enrolled is not None
    enrolment.write(machine.directory, replace(enrolled, xds_addresses=("nowhere",)))
    settings = replace(machine.settings(grpc=grpc_program), envoy=sys.executable)
    async with asyncio.timeout(60):
        assert await run_proxy(settings) == (Exit.FAILED if grpc_program else Exit.REFUSED)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("use a directory with a shorter path" if grpc_program else "does the workload have an address?") in said


async def test_a_refused_token_ends_it_with_a_clear_text_and_no_secret(
    machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    failure = (grpc.StatusCode.PERMISSION_DENIED, f"{TOKEN.text()} was used by another key", "Denied")
    async with serving(ControlPlane(CA, failures=[failure]), REPLICA) as address:
        code = await run_proxy(machine.settings(join=(address,), token=TOKEN.text()))
    output = "".join(capfd.readouterr())
    assert code == Exit.TOKEN_USED
    assert "used by another key" in output
    assert TOKEN.text()[4:47] not in output
    assert "PRIVATE KEY" not in output
    assert TOKEN.text() not in repr(machine.settings(token=TOKEN.text()))


async def test_an_expired_credential_and_a_token_join_anew(machine: Machine) -> None:
    old = machine.enrol(ttl=timedelta(seconds=60), ago=600)
    machine.mark("identity")
    async with serving(ControlPlane(CA), REPLICA) as address:
        task = asyncio.create_task(run_proxy(machine.settings(join=(address,), token=TOKEN.text())))
        await until((machine.directory / READY).exists)
    assert credentials.read(machine.directory / CREDENTIAL) != old
    assert await stopped(task) == Exit.STOPPED


async def test_a_revoked_credential_and_a_token_join_anew_in_the_same_directory(machine: Machine) -> None:
    plane = ControlPlane(CA, failures=[(grpc.StatusCode.PERMISSION_DENIED, "it is revoked", "Denied")])
    machine.mark("identity")
    async with serving(plane, REPLICA) as join_port, serving(plane, REPLICA, mutual=True) as api:
        old = machine.enrol(api=api)
        task = asyncio.create_task(run_proxy(machine.settings(join=(join_port,), token=TOKEN.text())))
        await until((machine.directory / READY).exists)
    assert (len(plane.renewals), len(plane.joins)) == (1, 1)
    assert credentials.read(machine.directory / CREDENTIAL) != old
    assert await stopped(task) == Exit.STOPPED


async def test_a_token_beside_a_good_credential_is_not_spent(machine: Machine) -> None:
    plane = ControlPlane(CA)
    machine.mark("identity")
    async with serving(plane, REPLICA) as join_port, serving(plane, REPLICA, mutual=True) as api:
        machine.enrol(api=api)
        task = asyncio.create_task(run_proxy(machine.settings(join=(join_port,), token=TOKEN.text())))
        await until((machine.directory / READY).exists)
    assert not plane.joins
    assert await stopped(task) == Exit.STOPPED


def test_envoy_is_found_in_the_order_that_is_documented(tmp_path: Path, machine: Machine) -> None:
    here, there = str(machine.folder / "envoy"), shutil.which("true") or ""
    on_path = {"PATH": str(machine.folder)}
    assert envoy.find(there, {"SMC_ENVOY": here, **on_path}) == there
    assert envoy.find("", {"SMC_ENVOY": there, **on_path}) == there
    assert envoy.find("", on_path) == here
    assert envoy.find("", {"PATH": str(tmp_path / "empty")}).endswith("/envoy")
    script = os.path.dirname(sys.executable)
    assert envoy.find("", {"PATH": script}) == envoy.find("", {"PATH": str(tmp_path / "empty")}), (
        "not the wheel's script"
    )
    with pytest.raises(ProxyFailed, match="SMC_ENVOY, is no executable"):
        envoy.find("", {"SMC_ENVOY": "/nowhere/envoy"})


# --- renewal


async def test_the_credential_is_renewed_over_mutual_tls_with_a_new_key(machine: Machine) -> None:
    plane = ControlPlane(CA)
    async with serving(plane, REPLICA, mutual=True) as address:
        plane.api = address
        old = machine.enrol(api=address)
        enrolled = enrolment.read(machine.directory)
        assert enrolled is not None
        fresh, _ = await renewal.renew(machine.directory, old, enrolled)
    assert plane.renewals == [old.uri]
    assert fresh.key != old.key
    assert credentials.read(machine.directory / CREDENTIAL) == fresh


async def test_it_is_renewed_at_half_life_while_envoy_runs_on(machine: Machine) -> None:
    plane = ControlPlane(CA, ttl=timedelta(seconds=4))
    async with serving(plane, REPLICA, mutual=True) as address:
        plane.api = address
        old = machine.enrol(api=address, ttl=timedelta(seconds=2))
        task = asyncio.create_task(run_proxy(machine.settings()))
        await until(lambda: "start" in machine.events())
        await until(lambda: credentials.read(machine.directory / CREDENTIAL) != old)
        assert time.time() >= old.renew_at
        assert await stopped(task) == Exit.STOPPED
    assert machine.events() == ["start", "SIGTERM"]


@pytest.mark.parametrize("what", ["dead", "refusing", "another name"])
async def test_what_fails_while_renewing_leaves_the_old_credential_in_use(machine: Machine, what: str) -> None:
    plane = ControlPlane(CA)
    if what == "refusing":
        plane.failures.append((grpc.StatusCode.PERMISSION_DENIED, "revoked", "Denied"))
    if what == "another name":
        plane.path = "proxy/shop/other"
    async with serving(plane, REPLICA, mutual=True) as address:
        old = machine.enrol(api="127.0.0.1:1" if what == "dead" else address, ttl=timedelta(seconds=1), ago=0.5)
        enrolled = enrolment.read(machine.directory)
        assert enrolled is not None
        with structlog.testing.capture_logs() as logs:
            task = asyncio.create_task(renewal.keep_fresh(machine.directory, old, enrolled, news=asyncio.Event()))
            await until(lambda: any("renewed" in entry["event"] or "expired" in entry["event"] for entry in logs))
            assert not task.done()
            task.cancel()
            await asyncio.wait([task])
    assert credentials.read(machine.directory / CREDENTIAL) == old
    said = json.dumps(logs)
    assert logs[0]["event"] in ("the credential cannot be renewed", "the credential has expired")
    assert old.key.splitlines()[1] not in said


async def test_a_credential_that_turns_out_to_be_revoked_is_replaced_by_joining_where_there_is_a_token(
    machine: Machine,
) -> None:
    refused = (grpc.StatusCode.PERMISSION_DENIED, "revoked", "Denied")
    plane = ControlPlane(CA, failures=[refused])
    renewed: list[Credential] = []
    async with serving(plane, REPLICA, mutual=True) as address:
        plane.api = address
        old = machine.enrol(api=address, ttl=timedelta(minutes=10), ago=420.0)
        enrolled = enrolment.read(machine.directory)
        assert enrolled is not None
        tried: list[str] = []

        async def rejoin() -> tuple[Credential, Enrolment]:
            tried.append("once more")
            if len(tried) <= 2:
                plane.failures.append(refused)
                raise ProxyFailed(Exit.UNREACHABLE, "no answer") if len(tried) == 1 else OSError("the disk is full")
            new = CA.credential("proxy/shop/buyer", now=time.time())
            credentials.write(machine.directory / CREDENTIAL, new)
            return new, enrolled

        task = asyncio.create_task(
            renewal.keep_fresh(
                machine.directory,
                old,
                enrolled,
                news=asyncio.Event(),
                renewed=lambda credential, _: renewed.append(credential),
                rejoin=rejoin,
            )
        )
        await until(lambda: plane.told or task.done())
        assert not task.done(), task
        task.cancel()
        await asyncio.wait([task])
    assert len(tried) == 3, "a token that did not help is tried again"
    assert renewed == [credentials.read(machine.directory / CREDENTIAL)]
    assert renewed != [old]
    assert tuple(plane.told[-1].roots) == renewed[0].pins, "what is said of trust is said with the new credential"


async def test_a_replica_of_another_mesh_is_not_asked(machine: Machine) -> None:
    other = TestAuthority.make(now=time.time())
    plane = ControlPlane(other)
    async with serving(plane, other.credential("replica/a", now=time.time())) as address:
        old = machine.enrol(api=address)
        enrolled = enrolment.read(machine.directory)
        assert enrolled is not None
        with pytest.raises(Exception, match="no replica renewed the credential"):
            await renewal.renew(machine.directory, old, enrolled)
    assert plane.renewals == []
