"""How the command line speaks: data to standard output, all else to standard error, colour only on a terminal."""

from __future__ import annotations

import os
import sys

import click

from smc.errors import Denied, Exhausted, Expired, NotFound, SmcError, Unauthenticated, Unavailable

OK, FAILED, USAGE, NOT_FOUND, DENIED, UNAVAILABLE = range(6)


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


def error(failed: SmcError, *, where: str = "") -> None:
    """Say what, where and why; and in a line of its own what to do."""
    if isinstance(failed, Reported):
        return
    stderr(f"{colour('error:', 'red', sys.stderr)} {where}{failed.message}")
    if failed.hint:
        stderr(f"  what to do: {failed.hint}", dim=True)


def warning(text: str) -> None:
    stderr(f"{colour('warning:', 'yellow', sys.stderr)} {text}")


def stderr(text: str, *, dim: bool = False) -> None:
    click.echo(colour(clean(text), "bright_black", sys.stderr) if dim else clean(text), err=True, color=True)


def clean(text: str) -> str:
    """Without the control characters that a foreign text might steer a terminal with; our own colours stay."""
    return "".join(c if c >= " " or c in "\n\t\x1b" else "�" for c in text)


def colour(text: str, name: str, stream: object = None) -> str:
    """The text in a colour, if the stream (standard output by default) is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    is_terminal = bool(getattr(stream, "isatty", lambda: False)())
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not is_terminal:
        return text
    return click.style(text, fg=name)
