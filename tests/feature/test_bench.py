"""The benchmarks speak to real replicas as Envoys do; the times that they measure are not looked at here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def bench(which: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"bench.{which}", *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def report() -> Any:
    ran = bench("fanout", "--streams", "5", "--services", "6", "--endpoints", "2", "--changes", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def storms() -> Any:
    """A replica that starts after the leader was killed waits for the next one: let that not take 10 s."""
    shape = "--streams", "12", "--services", "6"
    ran = bench("storm", *shape, "--kind", "cut", "--kind", "failover", "--json", SMC_LEASE_TTL="2s")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_every_stream_is_answered_all_that_a_cold_envoy_asks_for(report: Any) -> None:
    assert report["opened"]["streams"] == 5
    assert report["opened"]["kb_per_stream"] > report["floor_opened"]["kb_per_stream"] > 0


def test_a_changed_endpoint_is_pushed_to_those_whom_it_concerns_and_to_nobody_else(report: Any) -> None:
    concerned = {what: changed["streams"] for what, changed in report["changes"].items()}
    assert concerned == {
        "all": 5, "one": 1, "few": 2, "none": 0, "many": 5, "split": 5, "all, sotw": 5, "split, sotw": 5, "floor": 5,
    }  # fmt: skip
    assert all(changed["unexpected_pushes"] == 0 for changed in report["changes"].values())


def test_what_keeps_the_cores_awake_is_gone_with_the_benchmark_that_was_killed() -> None:
    """One process a core, which takes only the time that nobody wants."""
    code = "import time; from bench.awake import awake\nwith awake(): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as measuring:
        assert measuring.stdout is not None
        measuring.stdout.readline()
        children = Path(f"/proc/{measuring.pid}/task/{measuring.pid}/children").read_text().split()
        assert len(children) == len(os.sched_getaffinity(0))
        until(lambda: all(os.sched_getscheduler(int(child)) == os.SCHED_IDLE for child in children))
        measuring.kill()
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_what_keeps_the_cores_awake_ends_although_the_benchmark_was_killed_before_it_ran() -> None:
    code = "import os, time; from bench.awake import awake\nwith awake(): os.kill(os.getpid(), 9)"
    with subprocess.Popen([sys.executable, "-c", code]) as measuring:
        measuring.wait()
    mine = f"bench.awake\0{measuring.pid}\0".encode()
    until(lambda: not any(mine in command(process) for process in Path("/proc").glob("[0-9]*")))


def command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_whom_a_change_does_not_concern_keeps_the_very_snapshot_that_he_had(report: Any) -> None:
    assert {what: (kept["new"], kept["same"]) for what, kept in report["kept"].items()} == {
        "all": (5, 0),
        "one": (1, 4),
        "few": (2, 3),
        "none": (0, 5),
        "many": (5, 0),
    }


def test_a_mesh_that_cannot_be_measured_is_refused_in_one_line() -> None:
    ran = bench("fanout", "--streams", "50", "--services", "6", "--endpoints", "2")
    assert ran.returncode == 1
    assert ran.stderr.startswith("Error: 50 streams: ")
    assert ran.stderr.count("\n") == 1


def test_streams_that_come_back_with_all_they_hold_are_sent_no_resource_by_either_replica(storms: Any) -> None:
    assert {kind: storm["resources"] for kind, storm in storms["warm"].items()} == {"cut": 0, "failover": 0}
    assert all(storm["resources"] > 0 for storm in storms["cold"].values())
    assert all(
        0 < storms["warm"][kind]["kb_per_stream"] < storm["kb_per_stream"] for kind, storm in storms["cold"].items()
    )


def test_streams_that_came_back_are_sent_what_changes_from_then_on(storms: Any) -> None:
    assert {kind: storm["pushed"] for kind, storm in storms["warm"].items()} == {"cut": 12, "failover": 12}


def test_a_replica_of_a_large_mesh_pushes_a_change_to_the_few_whom_it_concerns() -> None:
    ran = bench("scale", "--services", "12", "--streams", "20", "--changes", "1", "--json", SMC_LEASE_TTL="2s")
    assert ran.returncode == 0, ran.stderr
    (scale,) = json.loads(ran.stdout)["scales"]
    assert scale["services"] == 12
    assert {what: changed["streams"] for what, changed in scale["changes"].items()} == {"few": 10, "none": 0}
    assert all(changed["unexpected_pushes"] == 0 for changed in scale["changes"].values())


def test_a_change_is_followed_to_the_last_ack_of_real_envoys() -> None:
    ran = bench("apply", "--envoys", "3", "--changes", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["envoys"], report["changes"]) == (3, 2)
    assert 0 < report["written_ms"]["median"] < report["acked_ms"]["median"]
