"""`--wait`: return once every proxy has ACKed what was written, or say which have not, and why."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say
from smc.cli.session import Session
from smc.config import duration
from smc.errors import Exhausted, Unavailable

if TYPE_CHECKING:
    from smc.v1 import smc_pb2 as pb

PATIENCE = "30s"
ONE_CALL = 8.0
"""Seconds until a replica answers although it is not done."""
ANSWER = 4.0
"""Seconds that a replica may be late with that; then it is taken for dead, and another one is asked."""
ASK_AGAIN = 0.5
"""Seconds until the replicas are asked again when none has answered."""
MOST_NAMED = 10
"""Proxies that are named in one line."""


class Waits(click.Command):
    """A command with `wait_option`: its value is optional, and never the word that follows it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        given = [f"--wait={PATIENCE}" if word == "--wait" else word for word in args[:end]]
        return super().parse_args(ctx, given + args[end:])


class Patience(click.ParamType[float]):
    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return duration(str(value)).total_seconds()
        except ValueError as e:
            self.fail(f"{value!r} is not {e}", param, ctx)


wait_option = click.option(
    "--wait",
    "patience",
    type=Patience(),
    metavar="[=TIMEOUT]",
    help=f"Return once every connected proxy has ACKed it. Default of TIMEOUT: {PATIENCE}.",
)


def wait(session: Session, versions: Sequence[int], patience: float) -> None:
    """Wait until every proxy has ACKed the writes of these resource versions, for at most `patience` seconds.

    Raises:
        Reported: with LAGGING, once it is said who has not.
        Unavailable: at the end no replica could say.
    """
    from smc.v1 import smc_pb2 as pb

    deadline = time.monotonic() + patience
    progress = Progress()
    lagging: Sequence[str] = ()
    seconds = 0.0  # The first answer comes at once: it is what there is to show.
    try:
        while True:
            request = pb.WaitRequest(resource_versions=versions, seconds=seconds, lagging=lagging)
            try:
                answer = session.call("Wait", request, timeout=seconds + ANSWER)
            except (Unavailable, Exhausted) as e:
                if time.monotonic() >= deadline:
                    raise Unavailable(
                        f"it is written, and which proxies have it is not known after {patience:g} s: {e.message}",
                        hint=e.hint,
                    ) from None
                time.sleep(ASK_AGAIN)
            else:
                progress.show(f"{_count(answer)} have ACKed it …")
                if answer.done or time.monotonic() >= deadline:
                    break
                lagging = [laggard.proxy for laggard in answer.laggards if laggard.proxy]
            seconds = max(0.0, min(ONE_CALL, deadline - time.monotonic()))
    finally:
        progress.clear()
    _conclude(answer, patience)


def _conclude(answer: pb.WaitResponse, patience: float) -> None:
    """Say what it came to.

    Raises:
        Reported: with LAGGING, unless all is well.
    """
    absent = ", ".join(answer.disconnected[:MOST_NAMED])
    more = f" and {answer.absent - MOST_NAMED} more" if answer.absent > MOST_NAMED else ""
    if answer.done and not answer.laggards:
        say.note(f"{_count(answer)} have ACKed it")
        if absent:
            say.warning(f"connected to no replica, and not waited for: {absent}{more}")
        return
    for laggard in answer.laggards:
        at = f" at {laggard.replica}" if laggard.proxy and laggard.replica else ""
        text = f": {laggard.text}" if laggard.text else ""
        say.warning(f"{laggard.proxy or laggard.replica}{at}: {laggard.state}{text}")
    if absent:
        say.warning(f"connected to no replica: {absent}{more}")
    if answer.done:
        say.finding(f"{_count(answer)} have ACKed it; the others have refused it", "correct it, and apply it again")
    else:
        say.finding(
            f"after {patience:g} s {_count(answer)} have ACKed it",
            "it is written, and they get it once they can: see smc proxy status, or wait on in the same way",
        )
    raise say.Reported(say.LAGGING)


def _count(answer: pb.WaitResponse) -> str:
    return f"{answer.acked} of {answer.proxies} proxies"


class Progress:
    """One line on standard error that is written over; nothing where that would be no use."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stderr
        self._shown = False

    def show(self, text: str) -> None:
        if not say.is_plain(self._stream):
            self._write(f"\r\x1b[K{text}")
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
