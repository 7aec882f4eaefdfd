"""The pages that `--help` shows: what a command does, examples, exit codes, and where its settings come from."""

from __future__ import annotations

from inspect import cleandoc


def page(text: str, *, examples: str, exits: str = "") -> str:
    """The help of a command, with the first line of `text` as its summary. The lists keep their lines."""
    parts = [cleandoc(text), _block("Examples:", examples)]
    if exits:
        parts.append(_block("Exit codes, beside those of every command (smc --help):", exits))
    return "\n\n".join(parts)


def _block(heading: str, lines: str) -> str:
    indented = "\n".join(f"  {line}" for line in cleandoc(lines).splitlines())
    return f"\b\n{heading}\n{indented}"
