"""From `smc apply` to the last ACK of real Envoys.

The demo's mesh with more callers: one etcd, one replica, a real Envoy for each workload, on loopback addresses. The
clock starts when the API is asked to apply a TrafficSplit with other weights, which every Envoy gets, and ends when the
API says that all have ACKed it, as `smc apply --wait` does, whose own start is not in it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click

from bench.figures import Machine, Spread
from smc.cli.session import Session
from smc.demo import bookstore
from smc.demo.bookstore import Placement
from smc.demo.local import LocalMesh, Plan
from smc.errors import Invalid, SmcError
from smc.v1 import smc_pb2 as pb

WARM = 5
"""Changes that are not counted."""
FEWEST = 3
"""Envoys: those of the two that are split between, and of one who calls them."""
MORE = "sysctl fs.inotify.max_user_instances=1024 lets more run"
INSTANCES = Path("/proc/sys/fs/inotify/max_user_instances")
"""How many inotify instances Linux lets a user have: 128, unless it was told otherwise."""
EACH = 4
"""Of them that an Envoy takes, for the files of its credential; without them it aborts."""
PATIENCE = 300.0
"""Seconds for all sidecars to start at once, and to be in sync: on two cores, 40 programs in Python take a while."""


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    envoys: int
    changes: int
    written_ms: Spread
    """Until the API has confirmed the write."""
    acked_ms: Spread
    """Until the last Envoy has ACKed it, the write included."""


def most() -> int:
    """How many Envoys can run on this machine at once, beside what runs now."""
    taken = 0
    for held in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            taken += held.readlink().name == "anon_inode:inotify"
    return (int(INSTANCES.read_text()) - taken) // EACH


def _plan(envoys: int) -> Plan:
    stores = (bookstore.store("v1"), bookstore.store("v2"))
    callers = tuple(Placement("bookbuyer", f"buyer-{n:02}", "bookbuyer") for n in range(envoys - len(stores)))
    return Plan(replicas=1, workloads=(*stores, *callers), patience=PATIENCE)


def _change(session: Session, v1: int) -> tuple[float, float]:
    """Seconds until the write of one change is confirmed, and until it is ACKed."""
    document = bookstore.split(v1, 100 - v1).encode()
    start = time.perf_counter()
    applied = session.call("Apply", pb.ApplyRequest(document=document, file="split.yaml", line=1))
    written = time.perf_counter() - start
    wait = pb.WaitRequest(resource_versions=[applied.object.resource_version], seconds=8)
    while not session.call("Wait", wait, timeout=15).done:
        pass
    return written, time.perf_counter() - start


async def run(envoys: int, changes: int, say: Callable[[str], None]) -> Report:
    """Measure.

    Raises:
        SmcError: the mesh did not start, or the API does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="smc-bench-") as directory:
        async with LocalMesh(Path(directory), _plan(envoys), progress=say) as mesh:
            await mesh.wait_synced(timeout=PATIENCE)
            machine = Machine.here()
            session = Session(mesh.credential, [replica.api for replica in mesh.replicas])
            measured = [await asyncio.to_thread(_change, session, n % 2 * 50 + 10) for n in range(WARM + changes)][
                WARM:
            ]
    return Report(machine, envoys, changes, _spread([w for w, _ in measured]), _spread([a for _, a in measured]))


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread.of([second * 1000 for second in seconds])


def table(report: Report) -> str:
    machine = report.machine
    lines = [
        f"{machine.cpus} cores of {machine.model}, Python {machine.python}, load {machine.load:g}; "
        f"{report.envoys} Envoys, {report.changes} changes",
        "",
        f"{'ms':<10}{'median':>10}{'p99':>10}{'max':>10}",
    ]
    for what, spread in (("written", report.written_ms), ("acked", report.acked_ms)):
        lines.append(f"{what:<10}{spread.median:>10.1f}{spread.p99:>10.1f}{spread.max:>10.1f}")
    return "\n".join(lines)


@click.command()
@click.option("--envoys", type=click.IntRange(FEWEST, 200), default=40, show_default=True, help="Real Envoys.")
@click.option("--changes", type=click.IntRange(1), default=100, show_default=True, help="Changes, one after the other.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def main(envoys: int, changes: int, as_json: bool) -> None:
    """Measure how long it takes from applying a manifest to the last ACK of real Envoys."""
    say = partial(print, file=sys.stderr)
    try:
        if (fit := most()) < FEWEST:
            raise Invalid("this machine has no inotify instances for three Envoys", hint=MORE)
        if fit < envoys:
            say(f"{fit} Envoys in place of {envoys}: this machine has no inotify instances for others; {MORE}")
        report = asyncio.run(run(min(envoys, fit), changes, say=say))
    except SmcError as e:
        raise click.ClickException(str(e)) from None
    print(json.dumps(asdict(report), indent=1) if as_json else table(report))


if __name__ == "__main__":
    main()
