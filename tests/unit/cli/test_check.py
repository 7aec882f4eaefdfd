from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from smc.api.backends import ProxyStatus
from smc.certificates import credential as credentials
from smc.cli import check
from smc.cli.check import Check
from smc.cli.program import program
from smc.cli.session import Config
from smc.model import Name
from smc.v1 import smc_pb2 as pb
from tests.unit.api.replica import SERVICE, UNREACHABLE, Replica, call, member, running
from tests.unit.certificates.authority import TestAuthority

NOW = 1_900_000_000.0


@dataclass
class Pair:
    """Two replicas of a mesh, and the directory with an operator's credential for both."""

    one: Replica
    two: Replica
    home: Path

    async def smc(self, *arguments: str) -> tuple[Result, dict[str, str]]:
        """`smc check`: what came of it, and each check's result."""

        def run() -> Result:
            environment = {"SMC_CREDENTIAL": str(self.home)}
            return CliRunner().invoke(program, ["check", *arguments], env=environment, prog_name="smc")

        result = await asyncio.to_thread(run)
        found = json.loads(result.stdout)["checks"] if "json" in arguments else []
        return result, {c["id"].partition("/")[0]: c["result"] for c in found}


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr("smc.api.mesh_service.SETTLE", 0.0)
    monkeypatch.setattr(check, "LOOKS", 1)
    with capture_logs():
        async with running() as one, running(of=one, name="replica-2") as two:
            one.members = two.members = [member(one, "replica-1"), member(two, "replica-2")]
            credentials.write(tmp_path, one.operator)
            Config((one.api, two.api), "default").write(tmp_path)
            yield Pair(one, two, tmp_path)


async def test_all_is_well(pair: Pair) -> None:
    result, _ = await pair.smc()
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split()[:2] for line in result.stdout.splitlines()]
    assert lines == [
        ["CHECK", "RESULT"],
        ["credential", "ok"],
        [f"server/{pair.one.api}", "ok"],
        [f"server/{pair.two.api}", "ok"],
        *([name, "ok"] for name in ("replicas", "leader", "revision", "proxies", "manifests")),
    ]


async def test_a_server_that_cannot_be_reached_is_an_error_and_the_others_are_asked(pair: Pair) -> None:
    result, found = await pair.smc("--server", "127.0.0.1:1", "--server", pair.two.api, "-o", "json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["ok"]) == (1, False)
    dead, alive = data["checks"][1:3]
    assert (dead["id"], dead["result"]) == ("server/127.0.0.1:1", "error")
    assert "cannot be reached" in dead["reason"]
    assert dead["command"].startswith("smc serve")
    assert alive["result"] == found["replicas"] == found["leader"] == "ok"


async def test_when_no_server_answers_the_rest_is_skipped(pair: Pair) -> None:
    result, found = await pair.smc("--server", "127.0.0.1:1", "-o", "json")
    assert result.exit_code == 1
    assert found == {
        "credential": "ok",
        "server": "error",
        **dict.fromkeys(("replicas", "leader", "revision", "proxies", "manifests"), "skipped"),
    }


async def test_without_a_credential_it_says_how_to_get_one(tmp_path: Path) -> None:
    environment = {"SMC_CREDENTIAL": str(tmp_path / "nowhere")}
    result = await asyncio.to_thread(CliRunner().invoke, program, ["check", "-o", "json"], env=environment)
    first, *others = json.loads(result.stdout)["checks"]
    assert (result.exit_code, first["id"], first["result"]) == (1, "credential", "error")
    assert first["command"].startswith("smc login")
    assert {c["result"] for c in others} == {"skipped"}


async def test_a_store_that_does_not_answer_is_told(pair: Pair) -> None:
    pair.one.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    result, found = await pair.smc("-o", "json")
    assert result.exit_code == 1
    assert (found["server"], found["replicas"], found["manifests"]) == ("ok", "error", "error")
    assert found["revision"] == "skipped"


async def test_what_the_api_tells_of_proxies_and_manifests_is_judged(pair: Pair) -> None:
    await call(pair.one, pair.one.operator, "Apply", pb.ApplyRequest(document=SERVICE, file="f", line=1))
    pair.one.streams = [ProxyStatus(Name("shop", "buyer-1"), "spiffe://x", 1.0, 7, 6, "stalled", {}, ())]
    result, found = await pair.smc("-o", "json")
    assert result.exit_code == 1
    assert (found["proxies"], found["manifests"]) == ("error", "ok")


# ----------------------------------------------------------------------------------------------------------- the rules


def brief(found: Check) -> tuple[str, str]:
    return found.result, found.reason


@pytest.mark.parametrize(("age", "result"), [(0, "ok"), (16, "ok"), (20, "warning"), (23, "warning")])
def test_a_credential_past_three_quarters_of_its_life_was_not_renewed_when_due(age: float, result: str) -> None:
    # Half of its life, from when it counts, is 0.4 to 0.6 of it, as its serial says.
    made = TestAuthority.make(now=NOW).credential("operator/ann", now=NOW)
    life = made.not_after - NOW
    found = check.credential(made, NOW + life * age / 24)
    assert found.result == result
    assert bool(found.command) == (result != "ok")


def test_a_server_that_is_not_ready_is_an_error() -> None:
    answer = pb.ProxiesResponse(replicas=[pb.Replica(name="replica-1", ready=False)])
    assert check.server("192.0.2.11:15129", answer).result == "error"


ONE, TWO = pb.Replica(name="a", leader=True, ready=True, revision=7), pb.Replica(name="b", ready=True, revision=6)


async def test_whoever_is_revoked_is_told_so_and_to_log_in_again(pair: Pair) -> None:
    await call(pair.one, pair.one.operator, "Revoke", pb.RevokeRequest(credential="operator/admin"))
    for replica in (pair.one, pair.two):
        replica.mesh = replace(replica.mesh, revoked_credentials={"operator/admin": ()})
    result, found = await pair.smc("-o", "json")
    assert (result.exit_code, found["server"], found["replicas"]) == (1, "error", "skipped")
    one, two = json.loads(result.stdout)["checks"][1:3]
    for told in (one, two):
        assert told["reason"] == "the credential of operator/admin is revoked"
        assert told["command"] == "smc login --join <host> --token <token>"


def test_one_replica_alone_is_a_warning_and_one_that_is_not_there_an_error() -> None:
    assert check.replicas([ONE, TWO], ()).result == "ok"
    assert check.replicas([ONE], ()).result == "warning"
    assert brief(check.replicas([ONE], ["b"])) == ("error", "no answer: b")
    assert brief(check.replicas([ONE, pb.Replica(name="c")], ())) == ("error", "c is not ready")


def test_exactly_one_replica_leads() -> None:
    assert brief(check.leader([ONE, TWO], ())) == ("ok", "a leads")
    assert check.leader([TWO], ()).result == "error"
    assert check.leader([ONE, ONE], ()).result == "error"
    assert check.leader([TWO], ["a"]).result == "warning"


def test_every_replica_has_built_the_newest_manifest_however_far_each_is_beyond() -> None:
    assert check.revisions([ONE, TWO], 6).result == "ok"
    assert check.revisions([ONE, TWO], 0).result == "ok"
    assert brief(check.revisions([ONE, TWO], 7)) == ("error", "the newest manifest is of revision 7, and b is at 6")


async def test_what_passes_by_itself_is_waited_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look finds a leader."""
    monkeypatch.setattr(check, "LOOKS", 3)
    status = pair.one.backends.replica
    calls = 0

    def late() -> object:
        nonlocal calls
        calls += 1
        return replace(status(), leader=calls > 2)

    object.__setattr__(pair.one.backends, "replica", late)
    began = time.monotonic()
    _, found = await pair.smc("-o", "json", "--server", pair.one.api)
    assert found["leader"] == "ok"
    assert time.monotonic() - began >= 1.0


def test_a_proxy_that_stalls_or_refuses_something_is_an_error() -> None:
    nack = pb.Nack(text="no")
    assert check.proxies([pb.Proxy(name="x", state="synced"), pb.Proxy(name="y", state="pending")]).result == "ok"
    assert brief(check.proxies([pb.Proxy(name="x", state="stalled")])) == ("error", "x does not answer")
    assert brief(check.proxies([pb.Proxy(name="x", state="synced", nacks=[nack])])) == ("error", "x refuses no")


def test_manifests_without_effect_are_told_with_the_command_that_shows_the_first() -> None:
    good = pb.Object(kind="Service", namespace="shop", name="store")
    good.problems.add(reason="NotBuiltYet", severity="warning")
    bad = pb.Object(kind="TrafficSplit", namespace="shop", name="store")
    bad.problems.add(reason="BackendNotFound", message="there is no service", severity="error")
    assert brief(check.manifests([good])) == ("ok", "1 are in effect")
    found = check.manifests([good, bad, bad, bad, bad])
    assert found.result == "error"
    assert found.reason.endswith("; and 1 more")
    assert found.command == "smc describe trafficsplit store -n shop"


def test_what_to_do_stands_below_the_table() -> None:
    found = [Check("a", check.Result.OK, "fine"), Check("b", check.Result.ERROR, "bad\nthing", "mend it")]
    assert check.render(found, "table") == (
        "CHECK   RESULT   REASON\n"
        "a       ok       fine\n"
        "b       error    bad thing\n"
        "\n"
        "CHECK   WHAT TO DO\n"
        "b       mend it"
    )
