"""What is wrong with a manifest, where, why, and what to do: everything at once, not the first thing only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from smc.errors import Invalid

MAX_FINDINGS = 100
"""Of one text; who makes more mistakes than that mends these first."""


@dataclass(frozen=True, slots=True)
class Finding:
    file: str
    line: int
    """From 1; 0: not known, because it was read from a stored object."""
    column: int
    """From 1, in characters; 0: not known."""
    field: str
    """The path of the field, such as `spec.backends[1].weight`; "" for the document or the text as a whole."""
    reason: str
    hint: str = ""

    @property
    def where(self) -> str:
        """`<file>:<line>:<column>`, as editors and terminals understand it."""
        return ":".join(part for part in (self.file, *(str(n) for n in (self.line, self.column) if n)) if part)

    @property
    def message(self) -> str:
        """Where, what and why, without the hint."""
        return ": ".join(part for part in (self.where, self.field, self.reason) if part)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidManifest(Invalid):
    """A text is refused, whole. `message` and `hint` tell the first finding; the text of the exception tells all."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        first, *others = findings
        more = f", and {len(others)} more" if others else ""
        super().__init__(first.message + more, hint=first.hint)
        self.findings = tuple(findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


class Unfit(ValueError):
    """Why a value is refused; whoever reads the document adds where it is."""

    def __init__(self, reason: str, hint: str = "", *, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.field = field
        """Below the field that is read, such as `backends[1].service`; "": that field itself."""


def shown(text: str) -> str:
    """`text` in double quotes, short, and with nothing in it that a terminal would act on."""
    cut = text if len(text) <= 60 else text[:57] + "..."
    escaped = "".join(_escaped(c) for c in cut)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if unicodedata.category(character)[0] in "CZ" and character != " ":
        return character.encode("unicode_escape").decode()
    return character


def below(field: str, key: str) -> str:
    """The path of what a map at `field` holds under `key`."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", key):
        return f"{field}[{shown(key)}]"
    return f"{field}.{key}" if field else key


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest of the known words, or else all of them."""
    words = sorted(known)
    near = nearest(word, words)
    return f'did you mean "{near}"?' if near else one_of(words)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like this one; "" if none is."""
    by_lower = {k.lower(): k for k in known}
    near = get_close_matches(word[:80].lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else ""


def one_of(words: Sequence[str]) -> str:
    if not words:
        return ""
    return f"only {words[0]} is known" if len(words) == 1 else f"known are {', '.join(words)}"
