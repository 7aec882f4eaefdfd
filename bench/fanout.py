"""One changed endpoint or split, and how long it takes to reach every proxy that it concerns; `make bench`.

A real etcd, a real replica (`smc serve`) and the clients are processes of their own. The clock starts before a record
of the registry is put into etcd, as the leader would put what an informer saw, and stops when the last stream has it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass

import click
import uvloop

from bench import floor, sameness, stage
from bench.awake import awake
from bench.client import Client, framed
from bench.figures import Machine, Spread, Usage, cpu
from bench.sameness import Kept
from bench.shape import Change, Shape
from bench.streams import DELTA, FOLLOWS, SOTW, Streams, Tally, Variant
from smc.certificates import credential
from smc.certificates.credential import Credential
from smc.config import XDS_PORT
from smc.demo import programs
from smc.demo.processes import Process
from smc.errors import Invalid, SmcError
from smc.model import Name
from smc.xds.snapshot import Type

PUSHED = 30.0
"""Seconds in which a change must have reached all whom it concerns."""
SETTLE = 0.2
"""Seconds after a change in which nothing more should come, and what it set off ends."""
QUIET = 0.5
"""Seconds without a push after which streams that were opened are left alone."""
IDLE = 2.0
"""Seconds over which is measured what a server uses when nothing happens."""


@dataclass(frozen=True, slots=True)
class Opened:
    """All streams opened at the same moment."""

    streams: int
    seconds: float
    """Until the last had been answered all that a cold Envoy asks for."""
    cpu_seconds: float
    """Of the server."""
    kb_per_stream: float
    """Messages to the client, in 1,000 bytes."""
    rss_kb_per_stream: float
    """What the server's resident memory grew by, in 1,000 bytes, all of its caches included."""
    idle_cpu_percent: float
    """Of one core, once nothing happens any more."""


@dataclass(frozen=True, slots=True)
class Changed:
    """One write again and again. The times are in ms since just before each write was sent."""

    streams: int
    """That each write concerns."""
    rounds: int
    written_ms: Spread
    """The write was confirmed."""
    first_ms: Spread | None
    """The first stream had the push; None: it concerns nobody."""
    last_ms: Spread | None
    """The last one had it."""
    acked_ms: Spread | None
    """The last ACK was sent."""
    cpu_ms: Spread
    """Of the server for one write, without what it uses when nothing happens."""
    cpu_us_per_push: float | None
    client_cpu_us_per_push: float | None
    bytes_per_push: float | None
    unexpected_pushes: int
    """In all rounds: to streams that it did not concern, or twice."""


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    awake: bool
    """Whether the cores were kept awake."""
    shape: Shape
    opened: Opened
    floor_opened: Opened
    """Of the floor, which sends each stream one message."""
    changes: Mapping[str, Changed]
    """By the value of Change, and `<value>, sotw` where streams are of that variant; `floor`: ready bytes to all."""
    ratios: Mapping[str, float]
    kept: Mapping[str, Kept]


async def run(shape: Shape, rounds: int, *, kept_awake: bool, say: Callable[[str], None]) -> Report:
    """Measure it all, with cores that are kept awake or that sleep between the changes.

    Raises:
        SmcError: a program does not start, or a stream does not get what it should.
    """
    machine = Machine.here()
    with awake() if kept_awake else nullcontext():
        say("building meshes in this process")
        kept = sameness.measure(shape, rounds)
        async with stage.mesh(shape, say=say) as mesh:
            say("starting a replica")
            replica = await mesh.leader()
            credentials = await mesh.credentials()
            say(f"opening {shape.streams} streams")
            opened, changes, message = await _fan_out(mesh, rounds, replica, credentials, say)
            say("measuring the floor")
            process, target = await _floor(mesh, message)
            floor_opened, changes["floor"] = await _measure_floor(process, target, credentials, rounds)
    return Report(machine, kept_awake, shape, opened, floor_opened, changes, _ratios(changes), kept)


def _ratios(changes: Mapping[str, Changed]) -> Mapping[str, float]:
    everybody, few, ready = changes["all"], changes["few"], changes["floor"]

    def last(changed: Changed) -> float:
        return changed.last_ms.median if changed.last_ms else 0.0

    return {
        "last_all_to_floor": round(last(everybody) / last(ready), 2),
        "cpu_split_to_all": round(changes["split"].cpu_ms.median / everybody.cpu_ms.median, 2),
        "cpu_all_to_floor": round(everybody.cpu_ms.median / ready.cpu_ms.median, 2),
        "last_few_to_all": round(last(few) / last(everybody), 3),
        "cpu_few_to_all": round(few.cpu_ms.median / everybody.cpu_ms.median, 3),
    }


# ------------------------------------------------------------------------------------------------------------ programs


async def _floor(mesh: stage.Mesh, message: bytes) -> tuple[Process, str]:
    directory, address = mesh.directory, mesh.addresses.take()
    credential.write(directory / "floor", await mesh.credential("replica/floor"))
    (directory / "message").write_bytes(message)
    target = f"{address}:{XDS_PORT}"
    argv = [sys.executable, "-m", "bench.floor", target, str(directory / "floor"), str(directory / "message")]
    process = mesh.children.process("floor", argv, role="floor", env=stage.PAGES)
    await process.start()

    async def listens() -> bool:
        try:
            _, writer = await asyncio.open_connection(address, XDS_PORT)
        except OSError:
            return False
        writer.close()
        return True

    await process.until(listens, "it listened", timeout=programs.START)
    return process, target


# --------------------------------------------------------------------------------------------------------- measurements


async def _fan_out(
    mesh: stage.Mesh,
    rounds: int,
    replica: programs.Replica,
    credentials: Mapping[Name, Credential],
    say: Callable[[str], None],
) -> tuple[Opened, dict[str, Changed], bytes]:
    """Returns also the last push to all, as it was on the wire."""
    pid, concerned = replica.process.pid, mesh.shape.concerned

    async def measure(
        streams: Streams, opened: Opened, kinds: Sequence[Change], rounds: int, since: int
    ) -> dict[Change, list[Round]]:
        found: dict[Change, list[Round]] = {what: [] for what in kinds}
        # In turn, so that what else happens on the machine meets all alike.
        for number in range(-1, rounds):
            for what in kinds:
                change = mesh.change(what, since + number + 1)
                one = await one_round(streams, pid, opened.idle_cpu_percent, change, concerned(what))
                if number >= 0:  # the first of each is for the caches
                    found[what].append(one)
        return found

    async with opening(replica.xds, pid, credentials) as (streams, opened):
        say(f"making each change {rounds} times")
        found = await measure(streams, opened, tuple(Change), rounds, 0)
    changes = {what.value: summary(concerned(what), some) for what, some in found.items()}
    say("the same in the state-of-the-world variant")
    async with opening(replica.xds, pid, credentials, variant=SOTW) as (streams, opened_again):
        whole = await measure(streams, opened_again, (Change.ALL, Change.SPLIT), rounds, rounds + 1)
    changes |= {f"{what.value}, sotw": summary(concerned(what), some) for what, some in whole.items()}
    return opened, changes, found[Change.ALL][-1].tally.last


async def _measure_floor(
    process: Process, target: str, credentials: Mapping[Name, Credential], rounds: int
) -> tuple[Opened, Changed]:
    asks = next(iter(credentials.values()))
    async with opening(target, process.pid, credentials, first=Type.ENDPOINT, follows={}) as (streams, opened):
        answered = asyncio.Event()
        asking = await Client.connect(target, asks, floor.PUSH, lambda _client, _message: answered.set())

        async def write() -> None:
            answered.clear()
            asking.write(framed(b""))
            await answered.wait()

        try:
            # The first is for the caches.
            found = [
                await one_round(streams, process.pid, opened.idle_cpu_percent, write, len(credentials))
                for _ in range(rounds + 1)
            ]
        finally:
            asking.close()
        return opened, summary(len(credentials), found[1:])


@asynccontextmanager
async def opening(
    target: str,
    pid: int,
    credentials: Mapping[Name, Credential],
    *,
    first: Type = Type.CLUSTER,
    follows: Mapping[Type, tuple[Type, ...]] = FOLLOWS,
    variant: Variant = DELTA,
) -> AsyncIterator[tuple[Streams, Opened]]:
    """Streams to a server that was idle, and what it cost to open them."""
    async with Streams(target, credentials, first=first, follows=follows, variant=variant) as streams:
        before, started = Usage.of(pid), time.monotonic()
        tally = await streams.open(stage.OPEN)
        seconds = time.monotonic() - started
        await streams.quiet(QUIET)
        after = Usage.of(pid)
        # What is there by now stays: the collector need not look at it again while it is measured.
        gc.collect()
        gc.freeze()
        try:
            idle = cpu(pid)
            await asyncio.sleep(IDLE)
            yield (
                streams,
                Opened(
                    streams=len(credentials),
                    seconds=round(seconds, 3),
                    cpu_seconds=round(after.cpu - before.cpu, 3),
                    kb_per_stream=round(tally.bytes / len(credentials) / 1000, 1),
                    rss_kb_per_stream=round((after.resident - before.resident) / len(credentials) / 1000, 1),
                    idle_cpu_percent=round((cpu(pid) - idle) / IDLE * 100, 2),
                ),
            )
        finally:
            gc.unfreeze()


@dataclass(frozen=True, slots=True)
class Round:
    """One write and what came of it; all times in seconds."""

    started: float
    written: float
    tally: Tally
    server_cpu: float
    client_cpu: float
    unexpected: int


async def one_round(
    streams: Streams, pid: int, idle_percent: float, write: Callable[[], Awaitable[object]], concerned: int
) -> Round:
    tally = streams.tally(concerned)
    client, server = time.process_time(), cpu(pid)
    started = time.monotonic()
    await write()
    written = time.monotonic()
    try:
        await tally.reached(PUSHED)
    finally:
        streams.check()
    client = time.process_time() - client
    await asyncio.sleep(SETTLE)
    streams.check()
    server = cpu(pid) - server - idle_percent / 100 * (time.monotonic() - started)
    return Round(started, written, tally, server, client, len(tally.received) - concerned)


def summary(streams: int, rounds: Sequence[Round]) -> Changed:
    def spread(time_of: Callable[[Round], float]) -> Spread | None:
        return Spread.of([(time_of(one) - one.started) * 1000 for one in rounds]) if streams else None

    def per_push(value_of: Callable[[Round], float]) -> float | None:
        return round(statistics.median(value_of(one) / streams for one in rounds), 1) if streams else None

    return Changed(
        streams=streams,
        rounds=len(rounds),
        written_ms=Spread.of([(one.written - one.started) * 1000 for one in rounds]),
        first_ms=spread(lambda one: min(one.tally.received)),
        last_ms=spread(lambda one: max(one.tally.received)),
        acked_ms=spread(lambda one: one.tally.last_acked),
        cpu_ms=Spread.of([one.server_cpu * 1000 for one in rounds]),
        cpu_us_per_push=per_push(lambda one: one.server_cpu * 1e6),
        client_cpu_us_per_push=per_push(lambda one: one.client_cpu * 1e6),
        bytes_per_push=per_push(lambda one: float(one.tally.bytes)),
        unexpected_pushes=sum(one.unexpected for one in rounds),
    )


# -------------------------------------------------------------------------------------------------------------- output


def table(report: Report) -> str:
    """The report for people: one line for each kind of change."""
    machine, shape, opened = report.machine, report.shape, report.opened
    lines = [
        f"{machine.cpus} cores of {machine.model}, Linux {machine.kernel}, Python {machine.python}, "
        f"grpcio {machine.grpcio}, load {machine.load:g}; clients and servers share the cores, "
        f"which {'are kept awake' if report.awake else 'sleep between the changes'}",
        f"{shape.services} services with {shape.endpoints} endpoints, {len(shape.identities)} identities, "
        f"{shape.streams} mTLS delta streams, {report.changes['all'].rounds} rounds",
        "",
        _row("open", "last s", "CPU s", "kB/stream", "RSS kB/str.", "idle CPU %"),
        *(
            _row(
                what,
                f"{one.seconds:.2f}",
                f"{one.cpu_seconds:.2f}",
                f"{one.kb_per_stream:.1f}",
                f"{one.rss_kb_per_stream:.0f}",
                f"{one.idle_cpu_percent:.1f}",
            )
            for what, one in (("all", opened), ("floor", report.floor_opened))
        ),
        "",
        _row("change", "streams", "first ms", "last ms", "p99", "max", "CPU ms", "us/push", "client us", "B/push"),
    ]
    for what, changed in report.changes.items():
        first, last = changed.first_ms, changed.last_ms
        lines.append(
            _row(
                what,
                str(changed.streams),
                f"{first.median:.1f}" if first else "-",
                *((f"{last.median:.1f}", f"{last.p99:.1f}", f"{last.max:.1f}") if last else "---"),
                f"{changed.cpu_ms.median:.1f}",
                _or_dash(changed.cpu_us_per_push),
                _or_dash(changed.client_cpu_us_per_push),
                _or_dash(changed.bytes_per_push),
            )
        )
        if changed.unexpected_pushes:
            lines.append(f"  {changed.unexpected_pushes} pushes that nobody should have got")
    lines += ["", "  ".join(f"{name} {ratio:g}" for name, ratio in report.ratios.items()), ""]
    lines.append(_row("in process", "told", "same", "new", "shared", "build ms", "snapshots ms"))
    for what, kept in report.kept.items():
        counts = (str(number) for number in (kept.concerned, kept.same, kept.new, kept.shared))
        lines.append(_row(what, *counts, f"{kept.build_ms.median:.2f}", f"{kept.snapshots_ms.median:.2f}"))
    return "\n".join(lines)


def _row(first: str, *others: str) -> str:
    return f"{first:<12}" + "".join(f"{other:>13}" if len(other) > 9 else f"{other:>10}" for other in others)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


@click.command()
@click.option("--streams", default=1000, show_default=True, help="Streams, each of another workload.")
@click.option("--services", default=100, show_default=True, help="Services; one, few and nobody are told of three.")
@click.option("--told", type=int, help="Of how many services everybody is told. [default: all but the three]")
@click.option("--endpoints", default=10, show_default=True, help="Endpoints of each service.")
@click.option("--changes", default=30, show_default=True, help="Rounds of each kind of change.")
@click.option("--sleepy", is_flag=True, help="Let the cores sleep between the changes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def main(
    streams: int, services: int, told: int | None, endpoints: int, changes: int, sleepy: bool, as_json: bool
) -> None:
    """Measure what a changed endpoint costs, and how long it takes to reach all whom it concerns."""
    try:
        if changes < 1:
            raise Invalid(f"{changes} changes are too few: at least 1")
        shape = Shape(services, endpoints, streams, told=told)
        report = uvloop.run(run(shape, changes, kept_awake=not sleepy, say=lambda text: print(text, file=sys.stderr)))
    except SmcError as e:
        raise click.ClickException(str(e)) from None
    print(json.dumps(asdict(report), indent=1) if as_json else table(report))


if __name__ == "__main__":
    main()
