"""Regular expressions that users write: RE2 only, bounded, and judged as Envoy will judge them.

Envoy compiles the text that it gets, byte by byte, and refuses a whole resource for one expression whose program is too
large. So the same text is compiled here with the same options, before it is stored.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import re2

from smc.manifests.findings import Unfit

RE2_MAX_LENGTH = 1024
"""Characters of an expression as it is written."""
RE2_MAX_PROGRAM_SIZE = 5000
"""The largest program that an expression may compile to; Envoy is started with the same bound."""


def whole(expression: str) -> str:
    """Check an expression that Envoy gets as it is written, and matches with the whole text.

    Raises:
        Unfit: it is empty, too long, too large or no expression of RE2.
    """
    _check(expression)
    _compile(expression)
    return expression


def prefix(expression: str) -> str:
    """The expression that matches with the whole of every text whose beginning `expression` matches.

    Raises:
        Unfit: it is empty, too long, too large or no expression of RE2.
    """
    _check(expression)
    # On its own first: `a)|(b` would be well-formed between the brackets, and mean something else.
    _compile(expression)
    wrapped = f"(?:{expression}).*"
    _compile(wrapped)
    return wrapped


def unanchored(prefixed: str) -> str:
    """What `prefix` was given."""
    return prefixed.removeprefix("(?:").removesuffix(").*")


def matches_whole(expression: str, value: bytes) -> bool:
    """Whether an expression that was taken matches with all of `value`, byte by byte, as Envoy decides it."""
    return _compiled(expression).fullmatch(value) is not None


def _check(expression: str) -> None:
    if not expression:
        raise Unfit("is empty", "leave it out to match anything")
    if len(expression) > RE2_MAX_LENGTH:
        raise Unfit(
            f"the expression has {len(expression)} characters, at most {RE2_MAX_LENGTH} are taken", "shorten it"
        )


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> Any:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    return re2.compile(expression.encode(), options)


def _compile(expression: str) -> None:
    try:
        compiled = _compiled(expression)
    except re2.error as e:
        text = e.args[0]
        why = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        raise Unfit(f"not an RE2 expression: {why[:120]}", _hint(why)) from None
    size = compiled.programsize
    if size > RE2_MAX_PROGRAM_SIZE:
        raise Unfit(
            f"the expression compiles to a program of {size} steps, at most {RE2_MAX_PROGRAM_SIZE} are taken",
            "repeat less, or use smaller character classes",
        )


def _hint(why: str) -> str:
    if "repetition operator: *" in why:
        return "to match anything write .*"
    if "(?=" in why or "(?!" in why or "(?<" in why:
        return "RE2 has no look-around"
    if "invalid escape sequence" in why:
        return "RE2 has no back-references; a backslash itself is written \\\\"
    if "invalid repetition size" in why:
        return "repeat at most 1000 times"
    if "too large" in why:
        return "repeat less, or use smaller character classes"
    if "missing )" in why or "unexpected )" in why:
        return "check the brackets; a literal one is written \\( or \\)"
    return ""
