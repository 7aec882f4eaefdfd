from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from structlog.testing import capture_logs

from smc.certificates import credential as credentials
from smc.cli.completion import PATIENCE, SHELLS
from smc.cli.program import COMMANDS, program
from smc.cli.session import Config
from smc.v1 import smc_pb2 as pb
from tests.unit.api.replica import SERVICE, Replica, call, running


@pytest.fixture
async def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replica]:
    """One with the Services shop/bookstore and shop/bookshelf, and the credential of an operator in SMC_CREDENTIAL."""
    monkeypatch.setattr("smc.api.mesh_service.SETTLE", 0.0)
    monkeypatch.setenv("SMC_CREDENTIAL", str(tmp_path))
    with capture_logs():
        async with running() as found:
            credentials.write(tmp_path, found.operator)
            Config((found.api,), "default").write(tmp_path)
            for text in (SERVICE, SERVICE.replace(b"bookstore", b"bookshelf")):
                await call(found, found.operator, "Apply", pb.ApplyRequest(document=text, file="f", line=1))
            yield found


def complete(*words: str) -> list[str]:
    """What the shell would offer for the last word."""
    found = ShellComplete(program, {}, "smc", "_SMC_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


def test_commands_are_completed_from_the_table_without_importing_them() -> None:
    assert complete("") == list(COMMANDS)
    assert complete("de") == ["demo", "delete", "describe"]
    assert complete("--de") == ["--debug"]


def test_a_kind_is_completed_by_each_of_its_words() -> None:
    assert complete("get", "traffics") == ["trafficsplit", "trafficsplits"]
    assert {"service", "svc", "workload", "ts"} <= set(complete("describe", ""))
    assert complete("get", "trafficsplits.") == ["trafficsplits.split.smi-spec.io"]
    assert complete("get", "nonsense") == []


async def test_names_are_those_that_there_are(replica: Replica) -> None:
    assert await asyncio.to_thread(complete, "get", "-n", "shop", "svc", "") == ["bookshelf", "bookstore"]
    assert await asyncio.to_thread(complete, "get", "services", "-n", "shop", "bookst") == ["bookstore"]
    assert await asyncio.to_thread(complete, "describe", "-n", "shop", "svc/book") == ["svc/bookshelf", "svc/bookstore"]
    assert await asyncio.to_thread(complete, "get", "svc", "") == []
    assert await asyncio.to_thread(complete, "proxy", "status", "") == []


@pytest.mark.parametrize(
    "words", [("get", "svc", ""), ("proxy", "status", "s"), ("get", "nonsense", ""), ("get", "a/")]
)
def test_without_a_credential_names_are_not_completed_and_nothing_is_said(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMC_CREDENTIAL", str(tmp_path))
    assert complete(*words) == []
    assert capfd.readouterr() == ("", "")


async def test_a_control_plane_that_does_not_answer_costs_a_second_at_most_however_many_replicas_it_has(
    replica: Replica, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        words = ("get", *("--server", server) * 10, "-n", "shop", "svc", "")
        assert await asyncio.to_thread(complete, *words) == []
    assert time.monotonic() - began < 6 * PATIENCE
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_is_for_its_shell_and_asks_smc(shell: str) -> None:
    result = CliRunner().invoke(program, ["completion", shell], prog_name="smc")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"_SMC_COMPLETE={shell}_complete" in result.stdout


def test_a_shell_that_is_not_known_is_wrong_usage() -> None:
    assert CliRunner().invoke(program, ["completion", "csh"], prog_name="smc").exit_code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
async def test_bash_completes_names_with_the_script(replica: Replica, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "smc").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m smc "$@"\n')
    (tmp_path / "bin" / "smc").chmod(0o755)
    script = """\
    eval "$(smc completion bash)"
    COMP_WORDS=(smc get -n shop svc booksh) COMP_CWORD=5
    _smc_completion smc
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    process = await asyncio.create_subprocess_exec(
        *("bash", "--norc", "-c", script),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SMC_CREDENTIAL": str(tmp_path)},
    )
    assert await process.communicate() == (b"bookshelf\n", b"")
