"""How the command line speaks: data to standard output, all else to standard error, colour only on a terminal."""

from __future__ import annotations

import os
import sys
import unicodedata

import click

from smc.errors import Denied, Exhausted, Expired, NotFound, SmcError, Unauthenticated, Unavailable

OK, FAILED, USAGE, NOT_FOUND, DENIED, UNAVAILABLE, LAGGING, UNANSWERED = range(8)
"""UNANSWERED: FAILED, of a command whose 1 is an answer."""


class Reported(SmcError):
    """Something failed, and all of it has been said already; only the exit code is left."""

    def __init__(self, code: int = FAILED) -> None:
        super().__init__(f"failed with code {code}")
        self.code = code


def exit_code(error: SmcError) -> int:
    match error:
        case Reported():
            return error.code
        case NotFound():
            return NOT_FOUND
        case Denied() | Unauthenticated() | Expired():
            return DENIED
        case Unavailable() | Exhausted():
            return UNAVAILABLE
        case _:
            return FAILED


def out(text: str) -> None:
    """Data, on standard output."""
    click.echo(clean(text))


def error(failed: SmcError, *, where: str = "") -> None:
    """Say what, where and why; and in a line of its own what to do."""
    if isinstance(failed, Reported):
        return
    _stderr("error:", "red", f"{where}{failed.message}")
    advice(failed.hint)


def finding(text: str, hint: str = "") -> None:
    """One of several errors."""
    _stderr("error:", "red", text)
    advice(hint)


def advice(text: str) -> None:
    if text:
        note(f"  what to do: {text}")


def warning(text: str) -> None:
    _stderr("warning:", "yellow", text)


def note(text: str) -> None:
    """What is good to know, on standard error."""
    click.echo(colour(clean(text), "bright_black", sys.stderr), err=True, color=True)


def _stderr(label: str, name: str, text: str) -> None:
    click.echo(f"{colour(label, name, sys.stderr)} {clean(text)}", err=True, color=True)


def clean(text: str) -> str:
    """Without the control characters that a foreign text, a proxy's for one, might steer the terminal with."""
    return "".join(c if c in "\n\t" or not unicodedata.category(c).startswith("C") else "�" for c in text)


def colour(text: str, name: str, stream: object = None) -> str:
    """The text in a colour, if the stream (standard output by default) is a terminal and NO_COLOR is not set."""
    return text if is_plain(stream or sys.stdout) else click.style(text, fg=name)


def is_plain(stream: object) -> bool:
    """Whether the stream is to get text and nothing else: it is no terminal, a dumb one, or NO_COLOR is set."""
    is_terminal = bool(getattr(stream, "isatty", lambda: False)())
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not is_terminal
