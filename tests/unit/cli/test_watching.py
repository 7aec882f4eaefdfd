from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from smc.api.backends import ProxyStatus
from smc.certificates import credential as credentials
from smc.certificates.credential import Credential
from smc.cli import proxy, say, watching
from smc.cli.program import program
from smc.cli.session import Config, Session
from smc.cli.table import Columns
from smc.cli.watching import Change, changes, watch
from smc.errors import Denied, Unavailable
from smc.model import Name
from smc.v1 import smc_pb2 as pb
from tests.unit.api.replica import SERVICE, Replica, call, running

BUYER = ProxyStatus(Name("shop", "buyer-1"), "spiffe://mesh.example/ns/shop/sa/buyer", 1.0, 7, 7, "synced", {}, ())


@pytest.fixture
async def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replica]:
    monkeypatch.setattr("smc.api.mesh_service.SETTLE", 0.0)
    with capture_logs():
        async with running() as found:
            credentials.write(tmp_path, found.operator)
            Config((found.api,), "default").write(tmp_path)
            yield found


class Watched:
    """`smc … --watch` as a process, line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> str:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 15)
        assert line, await self._process.communicate()
        return line.decode().rstrip("\n")

    async def interrupt(self) -> tuple[int, str, str]:
        """Press Ctrl-C: the exit code, and what was not read yet."""
        self._process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(self._process.communicate(), 15)
        return self._process.returncode or 0, out.decode(), err.decode()


@asynccontextmanager
async def smc(home: Path, *arguments: str) -> AsyncIterator[Watched]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "smc", *arguments, "--watch"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"SMC_CREDENTIAL": str(home)},
    )
    try:
        yield Watched(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def apply(replica: Replica, text: bytes) -> None:
    await call(replica, replica.operator, "Apply", pb.ApplyRequest(document=text, file="f", line=1))


async def test_get_prints_what_there_is_and_then_the_rows_that_change(replica: Replica, tmp_path: Path) -> None:
    await apply(replica, SERVICE)
    await apply(replica, SERVICE.replace(b"bookstore", b"bookshelf"))
    async with smc(tmp_path, "get", "services", "-n", "shop") as watched:
        assert (await watched.line()).split() == ["NAME", "PORTS", "ADDRESS", "STATUS", "AGE"]
        assert [(await watched.line()).split()[0] for _ in range(2)] == ["bookshelf", "bookstore"]
        await apply(replica, SERVICE.replace(b"80", b"81"))
        assert (await watched.line()).split()[:2] == ["bookstore", "81/http"]
        request = pb.DeleteRequest(group="smc.io", kind="Service", namespace="shop", name="bookshelf")
        await call(replica, replica.operator, "Delete", request)
        assert (await watched.line()).split()[:4] == ["bookshelf", "80/http", "-", "deleted"]
        assert await watched.interrupt() == (130, "", "")


async def test_get_as_json_prints_one_document_for_each_change(replica: Replica, tmp_path: Path) -> None:
    async with smc(tmp_path, "get", "service", "bookstore", "-n", "shop", "-o", "json") as watched:
        await apply(replica, SERVICE.replace(b"bookstore", b"bookshelf"))
        await apply(replica, SERVICE)
        added = json.loads(await watched.line())
        assert (added["type"], added["object"]["metadata"]["name"]) == ("ADDED", "bookstore")
        await apply(replica, SERVICE.replace(b"80", b"81"))
        modified = json.loads(await watched.line())
        assert (modified["type"], modified["object"]["spec"]["ports"][0]["port"]) == ("MODIFIED", 81)
        request = pb.DeleteRequest(group="smc.io", kind="Service", namespace="shop", name="bookstore")
        await call(replica, replica.operator, "Delete", request)
        assert json.loads(await watched.line())["type"] == "DELETED"
        assert (await watched.interrupt())[:2] == (130, "")


async def test_a_watch_goes_on_at_the_next_server_when_a_replica_dies(replica: Replica, tmp_path: Path) -> None:
    await apply(replica, SERVICE)
    async with AsyncExitStack() as life:
        dying = await life.enter_async_context(running(name="replica-2", of=replica))
        servers = ("--server", dying.api, "--server", replica.api)
        async with smc(tmp_path, "get", "services", "-n", "shop", "-o", "name", *servers) as watched:
            assert await watched.line() == "service/bookstore"
            await life.aclose()
            await apply(replica, SERVICE.replace(b"bookstore", b"bookshelf"))
            assert await watched.line() == "service/bookshelf"
            assert await watched.interrupt() == (130, "", "")


async def test_proxy_status_prints_the_proxies_that_change(replica: Replica, tmp_path: Path) -> None:
    replica.streams = [BUYER, replace(BUYER, name=Name("shop", "store-1"))]
    async with smc(tmp_path, "proxy", "status") as watched:
        assert (await watched.line()).split()[:3] == ["PROXY", "REPLICA", "STATE"]
        assert [(await watched.line()).split()[0] for _ in range(2)] == ["shop/buyer-1", "shop/store-1"]
        replica.streams = [replace(BUYER, state="pending", revision=8), replica.streams[1]]
        assert (await watched.line()).split()[:5] == ["shop/buyer-1", "replica-1", "pending", "8", "7"]
        replica.streams = replica.streams[1:]
        assert (await watched.line()).split()[:3] == ["shop/buyer-1", "replica-1", "gone"]
        assert await watched.interrupt() == (130, "", "")


@pytest.mark.parametrize("arguments", [("get", "services"), ("proxy", "status")])
def test_changes_are_not_told_as_yaml(arguments: tuple[str, ...], tmp_path: Path) -> None:
    environment = {"SMC_CREDENTIAL": str(tmp_path)}
    result = CliRunner().invoke(program, [*arguments, "-o", "yaml", "--watch"], env=environment, prog_name="smc")
    assert result.exit_code == 2
    assert "not as yaml" in result.stderr


# ----------------------------------------------------------------------------------------------------------- the rules


def test_a_change_is_what_was_added_modified_or_deleted_and_nothing_else() -> None:
    assert list(changes({"a": 1, "b": 2, "c": 3}, {"d": 4, "c": 3, "a": 0})) == [
        (Change.ADDED, 4),
        (Change.MODIFIED, 0),
        (Change.DELETED, 2),
    ]


def test_columns_stay_as_wide_as_they_were() -> None:
    columns = Columns(["A", "B"])
    assert columns.text([["long", "x"]]) == "A      B\nlong   x"
    assert columns.text([["s", ""]]) == "s      -"
    assert columns.text([["longest", "y"]]) == "longest   y"


class Answers:
    """A Session that gets one answer after the other, and is interrupted when there are no more."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.not_after = time.time() + 3600
        self.credential = self

    def call(self, *_arguments: Any, **_more: Any) -> Any:
        if not self._answers:
            raise KeyboardInterrupt
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def keep_fresh(self) -> None:
        pass


def told(session: Any, look: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    with pytest.raises(say.Reported) as ended:
        watch(session, look, lambda changes: found.extend((str(change), value) for change, value in changes))
    assert ended.value.code == 130
    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "INTERVAL", 0.0)


@pytest.mark.usefixtures("at_once")
def test_while_no_replica_answers_it_is_said_once_and_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    down = Unavailable("192.0.2.11:15129 cannot be reached")
    session = Answers({"a": 1}, down, down, {"a": 2}, down, {"a": 2})
    assert told(session, lambda _: session.call()) == [("ADDED", 1), ("MODIFIED", 2)]
    err = capsys.readouterr().err
    assert err.count("192.0.2.11:15129 cannot be reached") == 2
    assert err.count("answers again") == 2


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("answers", "error"), [((Unavailable("x"),), Unavailable), (({}, Denied("x")), Denied)], ids=["first", "denied"]
)
def test_what_will_not_pass_ends_the_watch(answers: tuple[Any, ...], error: type[Exception]) -> None:
    session = Answers(*answers)
    with pytest.raises(error):
        watch(session, lambda _: session.call(), lambda _: None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("at_once")
def test_an_expired_credential_is_not_tried_for_ever() -> None:
    session = Answers({}, Unavailable("x"))
    session.not_after = 0.0
    with pytest.raises(Unavailable):
        watch(session, lambda _: session.call(), lambda _: None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("at_once")
def test_the_proxies_of_a_replica_that_does_not_answer_are_not_gone_unless_they_moved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = pb.Proxy(name="shop/one", replica="a"), pb.Proxy(name="shop/two", replica="a")
    moved = pb.Proxy(name="shop/two", replica="b")
    session: Any = Answers(
        pb.ProxiesResponse(proxies=[one, two]),
        pb.ProxiesResponse(unreachable=["a"]),
        pb.ProxiesResponse(proxies=[moved], unreachable=["a"]),
        pb.ProxiesResponse(proxies=[moved]),
    )
    look = proxy._looker(session, None)
    assert [(change, p.name, p.replica) for change, p in told(session, look)] == [
        ("ADDED", "shop/one", "a"),
        ("ADDED", "shop/two", "a"),
        ("ADDED", "shop/two", "b"),
        ("DELETED", "shop/two", "a"),
        ("DELETED", "shop/one", "a"),
    ]
    assert capsys.readouterr().err.count("no answer: a") == 1


async def test_a_session_goes_on_with_the_credential_that_it_renewed(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def go_on() -> tuple[Credential, Credential]:
        session = Session(tmp_path, ())
        request = pb.ListRequest(group="smc.io", kind="Service")
        session.call("List", request)
        old = session.credential
        monkeypatch.setattr(Credential, "renew_at", property(lambda c: time.time() + (60 if c != old else -60)))
        session.keep_fresh()
        session.call("List", request)
        new = session.credential
        monkeypatch.setattr(Credential, "renew_at", property(lambda _: time.time() - 60))
        monkeypatch.setattr("smc.api.credentials.PATIENCE", 0.0)
        replica.mesh = None
        for _ in range(3):
            session.keep_fresh()
        session.close()
        return old, new

    old, new = await asyncio.to_thread(go_on)
    assert new != old
    assert credentials.read(tmp_path) == new
    assert capsys.readouterr().err.count("could not be renewed") == 1
