"""Columns of text, as kubectl prints them: nothing but spaces between, so that they can be cut and grepped."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence

_AGES = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


class Columns:
    """Rows under one header, in parts: each column is as wide as its widest cell so far."""

    def __init__(self, header: Sequence[str]) -> None:
        self._header: Sequence[str] | None = header
        self._widths = [0] * len(header)

    def text(self, rows: Sequence[Sequence[str]]) -> str:
        """These rows, under the header if they are the first. An empty cell is a hyphen."""
        lines = [[cell or "-" for cell in row] for row in rows]
        if self._header is not None:
            lines.insert(0, list(self._header))
            self._header = None
        for line in lines:
            self._widths = [max(w, width(cell)) for w, cell in zip(self._widths, line, strict=True)]
        return "\n".join(
            "".join(cell + " " * (w - width(cell) + 3) for cell, w in zip(line, self._widths, strict=True)).rstrip()
            for line in lines
        )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their header, each column as wide as its widest cell. An empty cell is a hyphen."""
    return Columns(header).text(rows)


def width(text: str) -> int:
    """The columns that a terminal needs for the text."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def age(since: float, now: float | None = None) -> str:
    """`45s`, `3m`, `7h`, `12d`: for how long; `-` if that is not known."""
    if not since:
        return "-"
    seconds = max(0, int((time.time() if now is None else now) - since))
    for unit, name in _AGES:
        if seconds >= 2 * unit or unit == 1:
            return f"{seconds // unit}{name}"
    return "0s"
