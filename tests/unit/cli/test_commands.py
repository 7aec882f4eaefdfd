from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from smc.certificates import credential as credentials
from smc.certificates.credential import Credential
from smc.certificates.tokens import Token
from smc.cli.program import program
from smc.cli.session import Config
from smc.model import MeshConfig
from tests.unit.api.meshes import mesh
from tests.unit.api.replica import SERVICE, UNREACHABLE, Replica, running
from tests.unit.certificates.authority import TestAuthority


@dataclass
class Desk:
    """An operator's desk: a replica, a credential directory and a directory of files."""

    replica: Replica
    home: Path
    files: Path

    async def smc(self, *arguments: str, stdin: str | bytes = "", credential: Path | None = None) -> Result:
        environment = {"SMC_CREDENTIAL": str(credential or self.home), "NO_COLOR": "", "SMC_TOKEN": ""}

        def run() -> Result:
            return CliRunner().invoke(program, list(arguments), input=stdin, env=environment, prog_name="smc")

        return await asyncio.to_thread(run)

    def write(self, name: str, text: bytes) -> str:
        path = self.files / name
        path.write_bytes(text)
        return str(path)


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    (tmp_path / "files").mkdir()
    # The replica's log is not what a command prints.
    with capture_logs():
        async with running() as replica:
            replica.mesh = mesh(MeshConfig(), {})
            monkeypatch.setattr("smc.api.mesh_service.SETTLE", 0.0)
            credentials.write(tmp_path / "home", replica.operator)
            Config((replica.api,), "default").write(tmp_path / "home")
            yield Desk(replica, tmp_path / "home", tmp_path / "files")


# --------------------------------------------------------------------------------------------------------------- apply


async def test_apply_tells_of_each_manifest_what_became_of_it(desk: Desk) -> None:
    file = desk.write("shop.yaml", SERVICE + b"---\n" + SERVICE.replace(b"bookstore", b"bookstore-2"))
    first = await desk.smc("apply", "-f", file)
    assert (first.exit_code, first.stderr, first.stdout) == (
        0,
        "",
        "service/bookstore created\nservice/bookstore-2 created\n",
    )
    again = desk.write(
        "shop.yaml", SERVICE + b"---\n" + SERVICE.replace(b"bookstore", b"bookstore-2").replace(b"80", b"81")
    )
    second = await desk.smc("apply", "-f", again)
    assert (second.exit_code, second.stdout) == (0, "service/bookstore unchanged\nservice/bookstore-2 configured\n")


async def test_apply_reads_standard_input_and_directories(desk: Desk) -> None:
    desk.write("a.yaml", SERVICE)
    result = await desk.smc(
        "apply", "-f", str(desk.files), "-f", "-", stdin=SERVICE.replace(b"bookstore", b"bookstore-2")
    )
    assert (result.exit_code, result.stdout) == (0, "service/bookstore created\nservice/bookstore-2 created\n")


async def test_all_findings_of_all_files_are_printed_and_the_good_manifests_are_applied(desk: Desk) -> None:
    bad = SERVICE.replace(b"port: 80", b"port: 99999\n  - port: 0")
    one = desk.write("one.yaml", bad + b"---\n" + SERVICE)
    two = desk.write("two.yaml", b"\n" + bad.replace(b"kind: Service", b"kind: Servise"))
    result = await desk.smc("apply", "-f", one, "-f", two)
    assert result.exit_code == 1
    assert result.stdout == "service/bookstore created\n"
    places = [line.split(" ")[1] for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert places == [f"{one}:8:11:", f"{one}:9:11:", f"{two}:3:7:"]
    assert "spec.ports[0].port: " in result.stderr
    assert 'what to do: did you mean "Service"?' in result.stderr


async def test_a_dry_run_changes_nothing(desk: Desk) -> None:
    file = desk.write("shop.yaml", SERVICE)
    assert (await desk.smc("apply", "-f", file, "--dry-run")).stdout == "service/bookstore created (dry run)\n"
    assert (await desk.smc("get", "service", "bookstore", "-n", "shop")).exit_code == 3


async def test_a_manifest_that_is_too_large_is_refused_at_once(desk: Desk) -> None:
    result = await desk.smc("apply", "-f", desk.write("shop.yaml", SERVICE + b"#" * (5 * 1024 * 1024)))
    assert result.exit_code == 1
    assert "what to do: a manifest has at most 1 MiB" in result.stderr


async def test_apply_over_another_version_fails(desk: Desk) -> None:
    file = desk.write("shop.yaml", SERVICE)
    await desk.smc("apply", "-f", file)
    desk.write("shop.yaml", SERVICE.replace(b"80", b"81"))
    result = await desk.smc("apply", "-f", file, "--resource-version", "1")
    assert result.exit_code == 1
    assert f"error: {file}:1: " in result.stderr


async def test_a_namespace_is_for_manifests_that_name_none(desk: Desk) -> None:
    file = desk.write("shop.yaml", SERVICE.replace(b"  namespace: shop\n", b""))
    await desk.smc("apply", "-f", file, "-n", "books")
    assert (await desk.smc("get", "svc", "-n", "books", "-o", "name")).stdout == "service/bookstore\n"


async def test_what_would_fail_for_every_document_fails_once(desk: Desk) -> None:
    desk.replica.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    desk.replica.unreachable_for = 42
    file = desk.write("shop.yaml", SERVICE + b"---\n" + SERVICE.replace(b"bookstore", b"bookstore-2"))
    result = await desk.smc("apply", "-f", file)
    assert result.exit_code == 5
    assert result.stderr.count("error: ") == 1
    assert "42 s" in result.stderr


# ------------------------------------------------------------------------------------------------ get, describe, delete


@pytest.mark.parametrize("word", ["service", "services", "svc", "SERVICE", "Services.smc.io"])
async def test_a_kind_has_many_names(desk: Desk, word: str) -> None:
    await desk.smc("apply", "-f", desk.write("shop.yaml", SERVICE))
    result = await desk.smc("get", word, "-n", "shop")
    assert result.stdout.splitlines()[0].split() == ["NAME", "PORTS", "ADDRESS", "STATUS", "AGE"]
    assert result.stdout.splitlines()[1].split()[:3] == ["bookstore", "80/http", "-"]


async def test_a_kind_that_nobody_knows_is_wrong_usage(desk: Desk) -> None:
    result = await desk.smc("get", "servise")
    assert result.exit_code == 2
    assert 'did you mean "service"?' in result.stderr


async def test_kind_and_name_may_be_one_word(desk: Desk) -> None:
    await desk.smc("apply", "-f", desk.write("shop.yaml", SERVICE))
    result = await desk.smc("get", "service/bookstore", "-n", "shop", "-o", "json")
    assert json.loads(result.stdout)["metadata"]["name"] == "bookstore"


async def test_what_get_prints_as_yaml_can_be_applied(desk: Desk) -> None:
    await desk.smc("apply", "-f", desk.write("shop.yaml", SERVICE))
    text = (await desk.smc("get", "svc", "-A", "-o", "yaml")).stdout
    assert (await desk.smc("apply", "-f", "-", stdin=text)).stdout == "service/bookstore unchanged\n"


async def test_nothing_found_is_no_error_and_no_output(desk: Desk) -> None:
    result = await desk.smc("get", "services", "-n", "shop")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no services found in namespace shop\n")
    assert json.loads((await desk.smc("get", "services", "-A", "-o", "json")).stdout)["items"] == []


async def test_a_manifest_that_is_not_there_is_exit_code_3(desk: Desk) -> None:
    result = await desk.smc("describe", "service", "bookstore", "-n", "shop")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("error: there is no Service shop/bookstore\n")


async def test_describe_shows_the_manifest(desk: Desk) -> None:
    await desk.smc("apply", "-f", desk.write("shop.yaml", SERVICE))
    result = await desk.smc("describe", "service", "bookstore", "-n", "shop")
    assert result.exit_code == 0
    assert "Kind:        Service (smc.io/v1alpha1)\n" in result.stdout
    assert "Author:      spiffe://mesh.example/operator/admin\n" in result.stdout


async def test_delete_by_name_and_by_file(desk: Desk) -> None:
    file = desk.write("shop.yaml", SERVICE + b"---\n" + SERVICE.replace(b"bookstore", b"bookstore-2"))
    await desk.smc("apply", "-f", file)
    one = await desk.smc("delete", "service", "bookstore", "-n", "shop")
    assert (one.exit_code, one.stdout) == (0, "service/bookstore deleted\n")
    rest = await desk.smc("delete", "-f", file)
    assert (rest.exit_code, rest.stdout) == (1, "service/bookstore-2 deleted\n")
    assert f"error: {file}:1: there is no Service shop/bookstore\n" in rest.stderr


# --------------------------------------------------------------------------------------------------------- credentials


async def test_a_token_is_the_only_thing_on_standard_output(desk: Desk) -> None:
    result = await desk.smc("token", "create", "proxy/shop/buyer", "--ttl", "90s")
    assert result.exit_code == 0
    assert Token.parse(result.stdout).text() == result.stdout.strip()
    assert "good for 90 s" in result.stderr or "good for 89 s" in result.stderr


async def test_a_viewer_may_look_and_not_write(desk: Desk, tmp_path: Path) -> None:
    viewer = tmp_path / "viewer"
    credentials.write(viewer, await desk.replica.signed("viewer/vic"))
    Config((desk.replica.api,)).write(viewer)
    assert (await desk.smc("get", "services", "-A", credential=viewer)).exit_code == 0
    result = await desk.smc("apply", "-f", desk.write("shop.yaml", SERVICE), credential=viewer)
    assert result.exit_code == 4
    assert "spiffe://mesh.example/viewer/vic may not call Apply" in result.stderr


async def test_a_credential_renews_itself_past_half_of_its_life(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await desk.replica.signed("operator/ann", ttl=timedelta(hours=1))
    credentials.write(desk.home, old)
    assert (await desk.smc("get", "services", "-A")).exit_code == 0
    assert credentials.read(desk.home) == old
    monkeypatch.setattr(Credential, "renew_at", property(lambda _self: time.time() - 1))
    result = await desk.smc("get", "services", "-A")
    assert (result.exit_code, result.stderr) == (0, "no services found\n")
    renewed = credentials.read(desk.home)
    assert renewed.uri == old.uri
    assert renewed.key != old.key
    assert renewed.not_after > old.not_after


async def test_a_credential_that_cannot_be_renewed_is_used_while_it_lives(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Credential, "renew_at", property(lambda _self: time.time() - 1))
    desk.replica.mesh = None
    monkeypatch.setattr("smc.api.credentials.PATIENCE", 0.0)
    result = await desk.smc("get", "services", "-A")
    assert result.exit_code == 0
    assert "could not be renewed; it is good for 24.0 h more" in result.stderr


async def test_without_a_credential_it_says_how_to_get_one(desk: Desk, tmp_path: Path) -> None:
    result = await desk.smc("get", "services", credential=tmp_path / "nowhere")
    assert result.exit_code == 3
    assert "smc login" in result.stderr


async def test_an_expired_credential_is_not_even_tried(desk: Desk) -> None:
    now = time.time() - 90000
    old = TestAuthority.make(now=now).credential("operator/ann", now=now)
    credentials.write(desk.home, old)
    result = await desk.smc("get", "services")
    assert result.exit_code == 4
    assert "has expired" in result.stderr


async def test_an_operator_joins_with_a_token(desk: Desk, tmp_path: Path) -> None:
    desk.replica.mesh = mesh(MeshConfig(), {})
    token = (await desk.smc("token", "create", "operator/ann")).stdout.strip()
    home = tmp_path / "ann"
    code, out, err = await smc(
        "login",
        "--join",
        "127.0.0.1:1",
        "--join",
        desk.replica.join,
        "--credential",
        str(home),
        env={"SMC_TOKEN": token},
    )
    assert (code, out) == (0, "spiffe://mesh.example/operator/ann\n"), err
    assert (await desk.smc("get", "services", "-A", credential=home)).exit_code == 0
    code, _, err = await smc(
        "login", "--join", desk.replica.join, "--credential", str(tmp_path / "bob"), env={"SMC_TOKEN": token}
    )
    assert code == 4
    assert "used by another key" in err


# ------------------------------------------------------------------------------------------------------------- servers


async def test_servers_are_tried_in_turn(desk: Desk) -> None:
    result = await desk.smc("get", "services", "-A", "--server", "127.0.0.1:1", "--server", desk.replica.api)
    assert result.exit_code == 0


async def test_when_no_server_answers_each_ones_reason_is_told(desk: Desk) -> None:
    result = await desk.smc("get", "services", "-A", "--server", "127.0.0.1:1", "--server", "127.0.0.1:2")
    assert result.exit_code == 5
    assert "127.0.0.1:1 cannot be reached" in result.stderr
    assert "127.0.0.1:2 cannot be reached" in result.stderr
    assert "what to do: " in result.stderr


async def test_another_mesh_is_not_trusted(desk: Desk) -> None:
    stranger = TestAuthority.make(now=time.time()).credential("operator/ann", now=time.time())
    credentials.write(desk.home, stranger)
    result = await desk.smc("get", "services", "-A")
    assert result.exit_code == 5
    assert "is no replica of the mesh that the credential is of" in result.stderr


async def test_an_unforeseen_failure_of_a_replica_is_one_line_with_its_id(desk: Desk) -> None:
    desk.replica.kv.error = ZeroDivisionError("inside")  # type: ignore[attr-defined]
    result = await desk.smc("get", "services", "-A")
    assert result.exit_code == 1
    assert "List failed inside the replica" in result.stderr
    assert "inside\n" not in result.stderr.replace("inside the replica", "")


async def test_an_unforeseen_failure_of_the_command_is_one_line_unless_debugged(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("smc.cli.session.Session.call", fail)
    result = await desk.smc("get", "services")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: smc failed in a way that nobody foresaw: ZeroDivisionError: division by zero\n"
        "  what to do: run it again as `smc --debug …` and report what that prints\n"
    )
    assert "Traceback" in (await desk.smc("--debug", "get", "services")).stderr


async def test_proxy_status_warns_of_replicas_that_do_not_answer(desk: Desk) -> None:
    desk.replica.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    result = await desk.smc("proxy", "status", "-o", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["replicas"][0]["name"] == "replica-1"
    assert "every other replica" in result.stderr


# ------------------------------------------------------------------------------------------------------- as a process


async def smc(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run it as users do."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "smc",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if not k.startswith("SMC_")} | (env or {}),
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_help_imports_nothing_heavy() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "importtime", "-m", "smc", "--help"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert b"Exit codes:" in out
    imported = {line.rpartition("|")[2].strip() for line in err.decode().splitlines()}
    assert not imported & {"grpc", "google.protobuf", "cryptography", "yaml", "rich", "asyncio", "structlog", "re2"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("version",), 0, ""),
        (("nonsense",), 2, "No such command"),
        (("apply",), 2, "-f is missing"),
        (("get",), 2, "KIND"),
        (("delete", "service"), 2, "NAME is missing"),
        (("login",), 2, "--join is missing"),
        (("serve",), 1, "SMC_NAME"),
        (("init", "--etcd", "nonsense", "--trust-domain", "a", "--kek-file", "/nowhere/kek"), 1, "host:port"),
        (("get", "services", "--credential", "/nowhere"), 3, "there is no credential in /nowhere"),
    ],
)
async def test_every_end_has_its_exit_code_and_no_traceback(arguments: tuple[str, ...], code: int, said: str) -> None:
    found, _, err = await smc(*arguments)
    assert found == code, err
    assert said in err
    assert "Traceback" not in err
