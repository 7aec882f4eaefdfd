"""What was done to a mesh at random, told so that it can be understood and done again."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.kit.verdicts import Lane, Wrong

FIRST_WRONG = 20


@dataclass(slots=True)
class Done:
    """One action that was taken."""

    name: str
    begun: float
    """On the loop's clock, in seconds."""
    to: str = ""
    """To whom, and how."""
    took: float | None = None
    """None: it has not come to its end."""
    converged: float = 0.0
    """Seconds, of `took`, that the mesh had to come to what it should be."""


@dataclass(frozen=True, slots=True)
class Run:
    """One test, as pytest is told of it."""

    test: str
    seed: int
    seconds: float

    @property
    def command(self) -> str:
        return (
            f"E2E_CHAOS_SECONDS={self.seconds:g} E2E_SEED={self.seed} .venv/bin/python -X dev -m pytest -s {self.test}"
        )


class Pulse:
    """How long this process and this machine let others wait, while it is open.

    A mesh that is slow because nobody had a processor is told from one that is slow by itself.
    """

    TICK = 0.05
    """Seconds."""

    def __init__(self) -> None:
        self.latest = 0.0
        """Seconds that the event loop was late at most,"""
        self.latest_at = 0.0
        """and when, on its clock."""
        self._begun = self._waited = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._begun, self._waited = asyncio.get_running_loop().time(), _waited_for_processors()
        self._task = asyncio.create_task(self._beat(), name="pulse")
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self.TICK
            await asyncio.sleep(self.TICK)
            if (late := loop.time() - due) > self.latest:
                self.latest, self.latest_at = late, due

    def told(self, start: float) -> str:
        """In words; times are seconds after `start`."""
        text = f"the test's own loop was late by {self.latest:.2f} s at most, at {self.latest_at - start:.1f}"
        seconds = asyncio.get_running_loop().time() - self._begun
        if self._waited:
            share = (_waited_for_processors() - self._waited) / max(seconds, self.TICK)
            text += f"; somebody on this machine waited for a processor {share:.0%} of the time"
        return text


def _waited_for_processors() -> float:
    """Seconds since the machine started; 0 where the kernel does not say."""
    with suppress(OSError):
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
        return int(some.rpartition("total=")[2]) / 1e6
    return 0.0


def table(actions: Iterable[Done], lanes: Iterable[Lane]) -> str:
    """How often each action was taken, and what became of the requests."""
    found: dict[str, list[Done]] = defaultdict(list)
    for done in actions:
        found[done.name].append(done)
    lines = [f"{'action':<26}{'times':>6}{'longest convergence':>22}"]
    for name, each in sorted(found.items()):
        lines.append(f"{name:<26}{len(each):>6}{max(one.converged for one in each):>20.1f} s")
    lines += ["", f"{'requests':<56}{'answers':>8}{'passed':>8}{'one rule':>9}"]
    for lane in lanes:
        share = lane.certain / max(1, lane.answered)
        lines.append(f"{lane.question!s:<56}{lane.answered:>8}{lane.passed:>8}{share:>9.0%}")
    return "\n".join(lines)


def story(run: Run, actions: Iterable[Done], wrong: Sequence[Wrong], *, start: float, now: float) -> str:
    """How to run it again, everything that was done, and the first wrong answers. `start` is the loop's clock then."""
    lines = [
        f"after {now - start:.1f} s of {run.seconds:g} s with E2E_SEED={run.seed}; the same actions again:",
        f"\n    {run.command}\n",
        f"all actions, in seconds after the start ({start:.3f} on the loop's clock):",
    ]
    for done in actions:
        end = f"{done.begun - start + done.took:8.1f}" if done.took is not None else " not yet"
        lines.append(f"  {done.begun - start:8.1f} to {end}  {done.name:<24} {done.to}".rstrip())
    lines.append(f"{len(wrong)} wrong answers; the first, by when they were sent:")
    first = sorted(wrong, key=lambda one: one.found.sent)[:FIRST_WRONG]
    return "\n".join([*lines, *(f"  {one.found.sent - start:8.1f}  {one}" for one in first)])
