"""Every proxy comes back at once: after its stream was cut, after its replica was restarted, and to another replica.

A real etcd, real replicas (`smc serve`) and the clients are processes of their own. Each storm is run warm, by streams
that say what they hold (`initial_resource_versions`, as Envoy does), and cold, with streams that hold nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import click
import uvloop

from bench import stage
from bench.figures import Machine, cpu
from bench.shape import Change, Shape
from bench.streams import Known, Streams, Tally
from smc.certificates.credential import Credential
from smc.demo import programs
from smc.errors import SmcError
from smc.model import Name

KINDS = ("cut", "restart", "failover")
"""All streams are cut and come back; their replica is killed and started again; it is killed, and they go elsewhere."""
ENDPOINTS = 10
"""Of each service."""
QUIET = 0.5
"""Seconds without a response after which a storm is over."""
PUSHED = 30.0
"""Seconds in which a change must have reached all."""
GONE = 30.0
"""Seconds in which a replica must have noticed that its streams are gone."""


@dataclass(frozen=True, slots=True)
class Storm:
    streams: int
    were_open: int
    """How many had been, when it began."""
    seconds: float
    """From the kill, or from the first stream that was opened again, until the last one was served."""
    ready_seconds: float | None
    """From the kill until the replica was ready again; None: it was ready all the time."""
    cpu_seconds: float
    """Of the replica that they came to. That of its start is in it, if it was started."""
    responses: int
    """That the replica sent, by its own count."""
    resources: int
    """In these responses."""
    kb_per_stream: float
    """Messages to the client, in 1,000 bytes."""
    asked_kb_per_stream: float
    """Requests of the client without ACKs, in 1,000 bytes."""
    pushed: int | None
    """Of a warm storm: how many streams were sent a change that was made after it, and concerns all of them."""


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    shape: Shape
    warm: Mapping[str, Storm]
    """By kind, as `cold`."""
    cold: Mapping[str, Storm]
    ratios: Mapping[str, float]
    """Of warm to cold; `last_restart` counts from when the replica was ready again."""


@dataclass(frozen=True, slots=True)
class _Count:
    """What a replica has used and sent since it was started."""

    cpu: float = 0.0
    responses: int = 0
    resources: int = 0

    @classmethod
    async def of(cls, replica: programs.Replica) -> _Count:
        metrics = await replica.metrics()

        def total(name: str) -> int:
            return int(sum(value for key, value in metrics.items() if key.startswith(f"{name}{{")))

        used = cpu(replica.process.pid)
        return cls(used, total("smc_xds_pushes_total"), total("smc_xds_resources_sent_total"))


async def run(shape: Shape, kinds: Sequence[str], *, say: Callable[[str], None]) -> Report:
    """Measure it all.

    Raises:
        SmcError: a program does not start, or a stream does not get what it should.
    """
    machine = Machine.here()
    async with stage.mesh(shape, say=say) as mesh:
        say("starting a replica")
        first = await mesh.leader()
        weather = _Weather(mesh, await mesh.credentials(), first)
        try:
            say(f"opening {shape.streams} streams")
            await weather.begin()
            warm, cold = {}, {}
            for kind in kinds:
                say(f"{kind}: warm, then cold")
                warm[kind] = await weather.storm(kind, warm=True)
                cold[kind] = await weather.storm(kind, warm=False)
        finally:
            await weather.end()
    return Report(machine, shape, warm, cold, _ratios(warm, cold))


def _ratios(warm: Mapping[str, Storm], cold: Mapping[str, Storm]) -> Mapping[str, float]:
    ratios = {}
    for kind in warm:
        ratios[f"last_{kind}"] = round(_waited(warm[kind]) / _waited(cold[kind]), 3)
        ratios[f"cpu_{kind}"] = round(warm[kind].cpu_seconds / cold[kind].cpu_seconds, 3)
    return ratios


def _waited(storm: Storm) -> float:
    """Seconds that the last stream waited for a replica that was ready."""
    return storm.seconds - (storm.ready_seconds or 0.0)


class _Weather:
    """One storm after the other. The streams that one leaves are those that the next one cuts."""

    def __init__(self, mesh: stage.Mesh, credentials: Mapping[Name, Credential], serving: programs.Replica) -> None:
        """`serving` runs, alone: another replica is started when it is failed over to, and not before.

        Of two replicas that are ready, one with all the streams sends half of them to the other.
        """
        self._mesh = mesh
        self._replicas = itertools.count(1)
        self._credentials = credentials
        self._serving = serving
        self._known: Known = {}
        self._changes = 0
        self._streams = Streams(serving.xds, credentials, known=self._known)

    async def begin(self) -> None:
        """Open the streams that the first storm cuts; what they are sent is what warm streams hold."""
        await self._streams.open(stage.OPEN)
        await self._streams.quiet(QUIET)

    async def end(self) -> None:
        await self._streams.close()

    async def storm(self, kind: str, *, warm: bool) -> Storm:
        """Let all streams come back at once.

        Raises:
            SmcError: a replica does not start or get ready, or not all streams are served again.
        """
        target, before, were_open = self._serving, _Count(), self._streams.alive
        if kind == "cut":
            await self._streams.close()
            await self._nobody_left()
            before = await _Count.of(target)
        elif kind == "failover":
            target = self._mesh.replica(next(self._replicas))
            await target.start()
            await target.until_ready()
            before, were_open = await _Count.of(target), self._streams.alive
        streams = Streams(target.xds, self._credentials, known=self._known if warm else None, retry=True)
        left, self._streams = self._streams, streams
        try:
            started = time.monotonic()
            if kind != "cut":
                await self._serving.kill()
            if kind == "restart":
                await target.start()

            async def ready() -> float:
                await target.until_ready()
                return time.monotonic() - started

            async def served() -> tuple[float, Tally]:
                tally = await streams.open(stage.OPEN)
                return time.monotonic() - started, tally

            (seconds, tally), ready_seconds = await asyncio.gather(served(), ready())
            await streams.quiet(QUIET)
            after = await _Count.of(target)
        finally:
            await left.close()
        self._serving = target
        return Storm(
            streams=len(self._credentials),
            were_open=were_open,
            seconds=round(seconds, 3),
            ready_seconds=round(ready_seconds, 3) if kind == "restart" else None,
            cpu_seconds=round(after.cpu - before.cpu, 3),
            responses=after.responses - before.responses,
            resources=after.resources - before.resources,
            kb_per_stream=round(tally.bytes / len(self._credentials) / 1000, 2),
            asked_kb_per_stream=round(tally.asked / len(self._credentials) / 1000, 2),
            pushed=await self._pushed() if warm else None,
        )

    async def _nobody_left(self) -> None:
        async def nobody() -> bool:
            return (await self._serving.metrics())["smc_xds_streams"] == 0

        await self._serving.process.until(nobody, "it had noticed that all streams are gone", timeout=GONE)

    async def _pushed(self) -> int:
        """Change an endpoint that all are told of. Streams that do not remember would have to be told again later."""
        tally = self._streams.tally(len(self._credentials))
        await self._mesh.change(Change.ALL, self._changes)()
        self._changes += 1
        await tally.reached(PUSHED)
        await self._streams.quiet(QUIET)
        return len(tally.received)


# -------------------------------------------------------------------------------------------------------------- output


def table(report: Report) -> str:
    """The report for people: one line for each storm."""
    machine, shape = report.machine, report.shape
    lines = [
        f"{machine.cpus} cores of {machine.model}, Linux {machine.kernel}, Python {machine.python}, "
        f"grpcio {machine.grpcio}, load {machine.load:g}; clients and servers share the cores",
        f"{shape.services} services with {shape.endpoints} endpoints, {len(shape.identities)} identities, "
        f"{shape.streams} mTLS delta streams",
        "",
        _row("storm", "last s", "ready s", "CPU s", "responses", "resources", "kB/stream", "asked kB", "pushed"),
    ]
    for kind in report.warm:
        for what, one in (("warm", report.warm[kind]), ("cold", report.cold[kind])):
            lines.append(
                _row(
                    f"{kind}, {what}",
                    f"{one.seconds:.2f}",
                    "-" if one.ready_seconds is None else f"{one.ready_seconds:.2f}",
                    f"{one.cpu_seconds:.2f}",
                    str(one.responses),
                    str(one.resources),
                    f"{one.kb_per_stream:.2f}",
                    f"{one.asked_kb_per_stream:.2f}",
                    "-" if one.pushed is None else str(one.pushed),
                )
            )
    lines += ["", "warm to cold: " + "  ".join(f"{name} {ratio:g}" for name, ratio in report.ratios.items())]
    return "\n".join(lines)


def _row(first: str, *others: str) -> str:
    return f"{first:<16}" + "".join(f"{other:>11}" for other in others)


@click.command()
@click.option("--streams", default=1000, show_default=True, help="Streams, each of another workload.")
@click.option("--services", default=100, show_default=True, help=f"Services, of {ENDPOINTS} endpoints each.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, help="Only this one; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def main(streams: int, services: int, kinds: tuple[str, ...], as_json: bool) -> None:
    """Measure what it takes until the last of many proxies that come back at once is served again."""
    try:
        shape = Shape(services, ENDPOINTS, streams)
        report = uvloop.run(run(shape, kinds or KINDS, say=lambda text: print(text, file=sys.stderr)))
    except SmcError as e:
        raise click.ClickException(str(e)) from None
    print(json.dumps(asdict(report), indent=1) if as_json else table(report))


if __name__ == "__main__":
    main()
