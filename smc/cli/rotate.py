"""`smc cert rotate`: another intermediate or root, and what it waits for."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say
from smc.cli.pages import examples
from smc.cli.session import Session, connected
from smc.cli.waiting import Patience, Progress
from smc.errors import Exhausted, Unavailable

if TYPE_CHECKING:
    from smc.v1 import smc_pb2 as pb

LOOK_AGAIN = 0.5
ANSWER = 8.0
"""Seconds that a replica has to say how far it is; then another one is asked."""
CALM = 3.0
"""Seconds for which somebody must be missing before it is told: most who are need a moment."""
INTERRUPTED = 130

_PHASES = {
    "requested": "waits for the leader",
    "publishing": "is being published: nothing is signed with what is new before everybody knows it",
    "signing": "signs: what was signed before is being replaced",
    "retiring": "is alone: what was before it is trusted no longer",
    "done": "is in use, and nothing is left of the one before",
}


@click.command(epilog=examples("smc cert rotate", "smc cert rotate --root --timeout 30m"))
@click.option("--root", "of", flag_value="root", help="The root, and its intermediate with it.")
@click.option("--intermediate", "of", flag_value="intermediate", default=True, help="The intermediate (the default).")
@click.option("--force", is_flag=True, help="Wait 10 s in each phase, then leave behind the proxies that are missing.")
@click.option(
    "--timeout", type=Patience(), default="10m", show_default=True, help="How long to look on; it goes on all the same."
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@connected
def rotate(session: Session, of: str, force: bool, timeout: float, output: str) -> None:
    """Replace the intermediate that signs every certificate, or the root that all of them lead to.

    Traffic goes on. What is new is trusted by every replica and every proxy before it signs anything; what is old is
    taken away once nobody shows it any more. Proxies that are connected to no replica are waited for as long as what
    they hold may be valid. Whoever is missing is named, with the reason.

    With --force they are left behind: what they hold is refused afterwards, and they have to join again with a new
    token. Operators and viewers are not waited for: `smc` renews its credential with the next command that it runs
    while the rotation lasts, and whoever runs none has to log in again after that of a root.

    The leader does it, and the next one goes on with it. This command looks on: run it again to look on again. The exit
    code is 6 if it is not done after TIMEOUT. -o json prints a line for each change.
    """
    from smc.v1 import smc_pb2 as pb

    asked = session.call("Rotate", pb.RotateRequest(of=of, force=force))
    if asked.phase != "requested":
        since = f"{asked.requester} has asked for it" if asked.requester else "it was due"
        say.note(f"the rotation of the {of} is under way: {since}")
    try:
        _look_on(session, asked.id, timeout, _Told(output))
    except KeyboardInterrupt:
        say.note(f"it goes on without you; smc cert rotate --{of} looks on again")
        raise say.Reported(INTERRUPTED) from None


def _look_on(session: Session, id_: str, timeout: float, told: _Told) -> None:
    """Say how far it is until it is done.

    Raises:
        Reported: with LAGGING after `timeout` seconds.
        SmcError: nobody can say how far it is.
    """
    from smc.v1 import smc_pb2 as pb

    deadline = time.monotonic() + timeout
    while True:
        try:
            answer = session.call("Rotation", pb.RotationRequest(), timeout=ANSWER)
        except (Unavailable, Exhausted) as e:
            if time.monotonic() >= deadline:
                raise Unavailable(
                    f"how far it is, is not known after {timeout:g} s: {e.message}", hint=e.hint
                ) from None
        else:
            session.keep_fresh()
            if answer.id != id_:
                told.clear()
                say.note(f"it is done, and a rotation of the {answer.of} has followed it")
                return
            told.tell(answer)
            if answer.done:
                return
            if time.monotonic() >= deadline:
                told.late(answer, timeout)
        time.sleep(LOOK_AGAIN)


class _Told:
    """Says what is new: phases and who is missing as lines, and how many there are in one that is written over."""

    def __init__(self, output: str) -> None:
        self._json = output == "json"
        self._last: pb.RotationResponse | None = None
        self._line = Progress()
        self._missing: dict[tuple[str, str], float] = {}
        """(who, why) -> since when; infinity: it was told."""

    def tell(self, answer: pb.RotationResponse) -> None:
        if self._json:
            if answer != self._last:
                say.out(json.dumps(as_data(answer), ensure_ascii=False))
        elif self._last is None or answer.phase != self._last.phase:
            self.clear()
            say.out(f"{answer.of}: {answer.phase}: the new one {_PHASES.get(answer.phase, '')}".rstrip())
            self._missing.clear()
        self._last = answer
        if not self._json:
            self._name(answer)
            if answer.lacking:
                there = sum(one.kind == "proxy" for one in answer.missing)
                self._line.show(f"{answer.phase}: {answer.proxies - there} of {answer.proxies} proxies …")
        if answer.done:
            self.clear()
            _left_behind(answer)

    def _name(self, answer: pb.RotationResponse) -> None:
        now = time.monotonic()
        lacking = {(one.who, one.why) for one in answer.missing}
        self._missing = {one: self._missing.get(one, now) for one in sorted(lacking)}
        for (who, why), since in self._missing.items():
            if now - since >= CALM:
                self.clear()
                say.warning(f"{who}: {why}")
                self._missing[who, why] = math.inf

    def late(self, answer: pb.RotationResponse, timeout: float) -> None:
        """Say who is missing at the end, and fail."""
        self.clear()
        for one in answer.missing:
            say.warning(f"{one.who}: {one.why}")
        if answer.lacking > len(answer.missing):
            say.warning(f"and {answer.lacking - len(answer.missing)} more")
        say.finding(
            f"after {timeout:g} s the rotation of the {answer.of} is {answer.phase}, and waits",
            "it goes on by itself: run this again to look on, or with --force to leave behind who is missing",
        )
        raise say.Reported(say.LAGGING)

    def clear(self) -> None:
        self._line.clear()


def _left_behind(answer: pb.RotationResponse) -> None:
    if answer.left_behind:
        say.warning(f"left behind: {', '.join(answer.left_behind)}")
        if answer.of == "root":
            say.advice("what they hold is refused now: they join again with a new token, smc token create")


def as_data(answer: pb.RotationResponse) -> dict[str, Any]:
    """The answer as plain JSON."""
    return {
        "id": answer.id,
        "of": answer.of,
        "phase": answer.phase,
        "done": answer.done,
        "requester": answer.requester,
        "since": answer.since,
        "forced": answer.forced,
        "proxies": answer.proxies,
        "lacking": answer.lacking,
        "missing": [{"kind": one.kind, "who": one.who, "why": one.why} for one in answer.missing],
        "leftBehind": list(answer.left_behind),
    }
