"""`smc demo` on a terminal and without one: starts the mesh, walks through the story, and cleans up after itself."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import aiohttp
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from smc.demo.figures import Figures
from smc.demo.local import LocalMesh
from smc.demo.processes import ProcessFailed
from smc.demo.story import CHAPTERS, Claim, Story

REFRESH = 1.0


async def show(console: Console, *, check: bool, only: Collection[str] = CHAPTERS) -> int:
    """Run the demo, of its chapters those that are named in `only`; the exit code is 0 if every claim held.

    With `check` it ends after the last chapter; without, it goes on until it is interrupted. Cancelling it ends every
    process. What the processes logged is kept if a claim failed, and its place printed.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    directory = Path(tempfile.mkdtemp(prefix="smc-demo-"))
    failed: list[Claim] = []
    keep = False
    try:
        async with LocalMesh(directory, progress=lambda step: console.print(step, style="dim")) as mesh:
            if mesh.etcd.program.warning:
                console.print(f"warning: {mesh.etcd.program.warning}", style="yellow")
            story = Story(mesh)
            await story.begin()
            async with _live(console, mesh) if not check else contextlib.nullcontext():
                for chapter in story.chapters:
                    if chapter.name not in only:
                        continue
                    console.print(f"\n{chapter.title}", style="bold")
                    async for claim in chapter.tell():
                        console.print(line(claim, console.width if console.is_terminal else None))
                        if not claim.held:
                            failed.append(claim)
                if not check:
                    console.print(_goodbye(mesh))
                    await asyncio.Event().wait()
    except ProcessFailed:
        keep = True
        raise
    finally:
        keep = keep or bool(failed)
        if keep:
            console.print(f"the logs of every process are in {directory / 'logs'}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
        loop.remove_signal_handler(signal.SIGTERM)
    for claim in failed:
        console.print(f"failed: {claim.text} ({claim.figure})", style="red")
    return 1 if failed else 0


def line(claim: Claim, width: int | None = None) -> Text:
    """One claim and its figure, which has a line of its own where both are wider than the terminal."""
    mark = ("  ok    ", "green") if claim.held else ("  FAILED ", "bold red")
    found = Text.assemble(mark, claim.text, (f"   {claim.figure}", "dim"))
    if width is None or found.cell_len <= width:
        return found
    return Text.assemble(mark, claim.text, (f"\n        {claim.figure}", "dim"))


def _goodbye(mesh: LocalMesh) -> Text:
    replica = mesh.replicas[0]
    return Text(
        "\nThe mesh goes on until Ctrl-C. Look around from another terminal:\n"
        f"  export SMC_CREDENTIAL={mesh.credential}\n"
        "  smc get trafficsplits -A\n"
        "  smc proxy status\n"
        f"  curl -x http://{mesh.sidecar('bookbuyer').outbound} http://bookstore.bookstore/books\n"
        f"  curl {replica.health}/metrics\n"
        "The applications listen on the shared loopback, so that whoever is on this machine can also reach them past "
        "the mesh; on machines of their own nobody can."
    )


@contextlib.asynccontextmanager
async def _live(console: Console, mesh: LocalMesh) -> AsyncIterator[None]:
    """The table, below what is printed meanwhile."""
    with Live(console=console, auto_refresh=False, transient=True) as live:

        async def refresh() -> None:
            loop = asyncio.get_running_loop()
            then, before = loop.time(), await mesh.figures()
            while True:
                await asyncio.sleep(REFRESH)
                asked = loop.time()
                try:
                    now = await mesh.figures()
                    leader = await mesh.leader_key()
                except (aiohttp.ClientError, TimeoutError, ProcessFailed):
                    continue  # the next look may find everybody
                leads = next((r.name for r in mesh.replicas if leader is not None and r.name in leader[0]), "nobody")
                # An Envoy that does not answer is waited for, so that it may be more than one second.
                live.update(picture(mesh, now - before, leads, asked - then), refresh=True)
                before, then = now, asked

        task = asyncio.create_task(refresh(), name="demo: table")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def picture(mesh: LocalMesh, happened: Figures, leader: str, seconds: float = 1.0) -> RenderableType:
    """What happened in so many seconds, as requests a second by visitor, and how each sidecar is."""
    traffic = Table("VISITOR", "SENT/S", "V1", "V2", "DENIED", "OTHER", "FAILED", title="traffic", title_justify="left")
    for visitor in mesh.visitors:
        versions, statuses = happened.versions(visitor), happened.statuses(visitor)
        denied = statuses[403] + statuses["PERMISSION_DENIED"]
        other = statuses.total() - denied - versions.total()
        cells = (happened.sent[visitor], versions["v1"], versions["v2"], denied, other, happened.failed[visitor])
        traffic.add_row(visitor, *(f"{cell / seconds:.0f}" for cell in cells))
    replicas = Table("REPLICA", "PROCESS", "LEADS", title="control plane", title_justify="left")
    for replica in mesh.replicas:
        alive = f"pid {replica.process.pid}" if replica.process.alive else Text("dead", "red")
        replicas.add_row(replica.name, alive, "yes" if replica.name == leader else "")
    sidecars = Table("SIDECAR", "SERVED BY", "IN SYNC", "CERTIFICATE", title="sidecars", title_justify="left")
    for workload in mesh.sidecars:
        heard = happened.heard.get(workload, "")
        by = next((replica.name for replica in mesh.replicas if replica.name in heard), heard or "-")
        serials = happened.serials.get(workload, ())
        pending = happened.pending.get(workload, "no answer")
        in_sync = Text(f"no: {pending}", "yellow") if pending else "yes"
        sidecars.add_row(workload, by, in_sync, ", ".join(serial[-8:] for serial in serials) or "-")
    return Group(traffic, replicas, sidecars)
