"""A large mesh: what a replica needs to build it from nothing, and then for a change that concerns few.

As in `fanout`, a real etcd, a real replica and the clients are processes of their own. Each proxy is told of REACH
services, as in a mesh of this size it would be.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import click
import uvloop

from bench import stage
from bench.fanout import Changed, Opened, one_round, opening, summary
from bench.figures import Machine, Usage
from bench.shape import Change, Shape
from smc.demo import programs
from smc.errors import SmcError

ENDPOINTS = 10
"""Of each service."""
REACH = 10
BUILT = 300.0
"""Seconds in which a replica must be ready: long after a quiet machine is through."""


@dataclass(frozen=True, slots=True)
class Scale:
    services: int
    records: int
    """In etcd, certificates not counted."""
    ready_seconds: float
    """From the start of a replica's process until it answers new streams. It finds its certificates made."""
    ready_cpu_seconds: float
    build_seconds: float
    """Of that, from what etcd holds to the Mesh."""
    resident_mb: float
    """Then; in 1,000,000 bytes."""
    opened: Opened
    changes: Mapping[str, Changed]
    """`few` concerns ENDPOINTS proxies, `none` nobody."""


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    scales: Sequence[Scale]


async def run(sizes: Sequence[int], streams: int, rounds: int, *, say: Callable[[str], None]) -> Report:
    """Measure a mesh of each size.

    Raises:
        SmcError: a program does not start, or a stream does not get what it should.
    """
    machine = Machine.here()
    return Report(machine, [await _measure(Shape(size, ENDPOINTS, streams, REACH), rounds, say=say) for size in sizes])


async def _measure(shape: Shape, rounds: int, *, say: Callable[[str], None]) -> Scale:
    async with stage.mesh(shape, say=say) as mesh:
        leader = await mesh.leader(BUILT)
        say("starting another replica")
        replica = mesh.replica(1)
        started = time.monotonic()
        await replica.start()
        await replica.until_ready(BUILT)
        ready, usage = time.monotonic() - started, Usage.of(replica.process.pid)
        built = (await replica.metrics())["smc_build_seconds_sum"]
        # It serves alone, so that no stream is sent elsewhere, and leads: that is in what a change costs.
        await leader.kill()
        await _led(replica)
        credentials = await mesh.credentials()
        say(f"opening {shape.streams} streams")
        pid = replica.process.pid
        async with opening(replica.xds, pid, credentials) as (opened, cost):
            say(f"making each change {rounds} times")
            changes = {}
            for what in (Change.FEW, Change.NONE):
                concerned = shape.concerned(what)
                found = [
                    await one_round(opened, pid, cost.idle_cpu_percent, mesh.change(what, number), concerned)
                    for number in range(rounds + 1)
                ]
                changes[what.value] = summary(concerned, found[1:])
    resident = round(usage.resident / 1e6, 1)
    return Scale(
        shape.services, shape.size, round(ready, 2), round(usage.cpu, 2), round(built, 2), resident, cost, changes
    )


async def _led(replica: programs.Replica) -> None:
    async def leads() -> bool:
        return (await replica.metrics())["smc_leader"] == 1

    await replica.process.until(leads, "it led", timeout=BUILT)
    await asyncio.sleep(2)  # what a new leader looks through; and by then nobody counts on the old one


def table(report: Report) -> str:
    """The report for people: one line for each size."""
    machine = report.machine
    heads = ("ready s", "CPU s", "build s", "RSS MB", "RSS kB/str.", "few last ms", "few CPU ms", "none CPU ms")
    lines = [
        f"{machine.cpus} cores of {machine.model}, Python {machine.python}, load {machine.load:g}; "
        f"{report.scales[0].opened.streams} mTLS delta streams, each told of {REACH} services",
        "",
        f"{'services':>8}" + "".join(f"{head:>13}" for head in heads),
    ]
    for scale in report.scales:
        few, none = scale.changes["few"], scale.changes["none"]
        last = few.acked_ms.median if few.acked_ms else 0.0
        figures = (
            scale.ready_seconds, scale.ready_cpu_seconds, scale.build_seconds, scale.resident_mb,
            scale.opened.rss_kb_per_stream, last, few.cpu_ms.median, none.cpu_ms.median,
        )  # fmt: skip
        lines.append(f"{scale.services:>8}" + "".join(f"{figure:>13.1f}" for figure in figures))
    return "\n".join(lines)


@click.command()
@click.option("--services", "sizes", type=int, multiple=True, default=(1000, 10000), show_default=True, help="A size.")
@click.option("--streams", default=1000, show_default=True, help="Streams, each of another workload.")
@click.option("--changes", default=10, show_default=True, help="Rounds of each kind of change.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def main(sizes: tuple[int, ...], streams: int, changes: int, as_json: bool) -> None:
    """Measure what a large mesh costs: a cold build, and a change after it that concerns few."""
    try:
        report = uvloop.run(run(sizes, streams, changes, say=lambda text: print(text, file=sys.stderr)))
    except SmcError as e:
        raise click.ClickException(str(e)) from None
    print(json.dumps(asdict(report), indent=1) if as_json else table(report))


if __name__ == "__main__":
    main()
