"""`--watch`: ask once a second, and tell what is different from the last time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NoReturn, TypeVar

import click

from smc.cli import say
from smc.cli.session import Session
from smc.errors import Exhausted, Unavailable

T = TypeVar("T")

INTERVAL = 1.0
"""Seconds from one answer to the next question."""
PATIENCE = 5.0
"""Seconds that a replica has to answer, so that one whose machine died does not hold up the others' news."""
INTERRUPTED = 130
"""The exit code, as a shell has it for what Ctrl-C ended."""

watch_option = click.option(
    "-w", "--watch", "watched", is_flag=True, help="Go on, and print what changes, until Ctrl-C."
)


class Change(StrEnum):
    """What happened to a thing, in the words that kubectl has for it."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


Changes = Sequence[tuple[Change, T]]


def changes(before: Mapping[str, T], now: Mapping[str, T]) -> Iterator[tuple[Change, T]]:
    """What led from one to the other, in the order of `now`; what is gone comes last, as it was."""
    for key, value in now.items():
        if key not in before:
            yield Change.ADDED, value
        elif before[key] != value:
            yield Change.MODIFIED, value
    for key, value in before.items():
        if key not in now:
            yield Change.DELETED, value


def watch(
    session: Session, look: Callable[[Mapping[str, T]], Mapping[str, T]], tell: Callable[[Changes[T]], None]
) -> NoReturn:
    """Tell all that there is, then what changes, for as long as nobody interrupts it.

    `look` gets what was seen last and returns what is there now. While no replica answers it is asked again; that is
    said once. The credential is kept fresh meanwhile.

    Raises:
        Reported: with INTERRUPTED, on SIGINT.
        SmcError: the first look failed, or a later one for another reason than that no replica answers.
    """
    try:
        seen = look({})
        tell([(Change.ADDED, value) for value in seen.values()])
        silent = False
        while True:
            session.keep_fresh()
            time.sleep(INTERVAL)
            try:
                now = look(seen)
            except (Unavailable, Exhausted) as e:
                if session.credential.not_after <= time.time():
                    raise
                if not silent:
                    say.warning(f"{e.message}; what is shown may be old, and it is asked again every second")
                silent = True
                continue
            if silent:
                say.note("the control plane answers again")
            silent = False
            if found := list(changes(seen, now)):
                tell(found)
            seen = now
    except KeyboardInterrupt:
        raise say.Reported(INTERRUPTED) from None


def refuse(output: str) -> None:
    """Refuse a format in which changes cannot be told.

    Raises:
        click.UsageError: it is one.
    """
    if output == "yaml":
        raise click.UsageError("--watch tells changes as table, wide, json or name: not as yaml")
