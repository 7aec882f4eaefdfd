"""What ends the page that `--help` shows of a command: examples, and the exit codes that it alone has."""

from __future__ import annotations

from collections.abc import Mapping

WATCHED = {130: "Ctrl-C ended --watch"}
"""Of commands with `watch_option`."""


def examples(*lines: str, exits: Mapping[int, str] | None = None) -> str:
    """An epilog, in lines that are not wrapped; `exits` are the codes beside those that `smc --help` lists."""
    parts = ["\b\nExamples:", *(f"  {line}" for line in lines)]
    if exits:
        parts.append("\n\b\nExit codes, beside those of every command (smc --help):")
        parts.extend(f"  {code:<4} {meaning}" for code, meaning in exits.items())
    return "\n".join(parts)
