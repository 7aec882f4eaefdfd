"""What `-f` names: files, directories and standard input, in documents that know where they were written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from smc.errors import Invalid, NotFound

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE = 64 * 1024 * 1024
"""Bytes."""
_MARKER = re.compile(rb"(?:---|\.\.\.)(?=[ \t\r\n]|$)")
_NOTHING = re.compile(rb"(?:[ \t\r]*(?:#[^\n]*)?(?:\n|$))*")


@dataclass(frozen=True, slots=True)
class Document:
    file: str
    line: int
    """Its first line in the file, from 1."""
    text: bytes


def read_all(files: Sequence[str]) -> list[Document]:
    """What `-f` was given: at least one document.

    Raises:
        UsageError: `-f` was not given.
        NotFound: there is none in all of them, and as `read`.
        Invalid: as `read`.
    """
    if not files:
        raise click.UsageError("-f is missing: the file, directory or - for standard input")
    documents = list(read(files))
    if not documents:
        raise NotFound(f"there is no manifest in {', '.join(files)}", hint="an empty document is none")
    return documents


def read(names: Sequence[str]) -> Iterator[Document]:
    """Every document of the files, in the order given; the files of a directory by name; `-` is standard input.

    Raises:
        NotFound: there is no such file, or no manifest in the directory.
        Invalid: it cannot be read, or is larger than MAX_FILE.
    """
    for name in names:
        if name == "-":
            yield from split(_bounded(sys.stdin.buffer.read(MAX_FILE + 1), "standard input"), "-")
            continue
        for path in _files(Path(name)):
            try:
                with path.open("rb") as file:
                    text = _bounded(file.read(MAX_FILE + 1), str(path))
            except OSError as e:
                raise Invalid(f"{path} cannot be read: {e.strerror}") from None
            yield from split(text, str(path))


def split(text: bytes, file: str) -> Iterator[Document]:
    """The documents of a YAML stream, or the one of a JSON file. Empty ones and comments are none.

    A line that begins with `---` or `...` ends a document wherever it stands (YAML 1.2, section 9.1).
    """
    text = text.removeprefix(b"\xef\xbb\xbf")
    first = 1
    kept: list[bytes] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if _MARKER.match(line):
            yield from _document(kept, file, first)
            # What stands behind the marker belongs to the document, in its column.
            behind = line[3:].strip()
            kept, first = ([b"   " + line[3:]], number) if behind else ([], number + 1)
        else:
            kept.append(line)
    yield from _document(kept, file, first)


def _document(lines: list[bytes], file: str, first: int) -> Iterator[Document]:
    text = b"".join(lines)
    if not _NOTHING.fullmatch(text):
        yield Document(file, first, text)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise NotFound(f"there is no file {path}", hint="check the name after -f")
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise NotFound(f"there is no manifest in {path}", hint=f"files must end in {', '.join(SUFFIXES)}")
    return found


def _bounded(text: bytes, name: str) -> bytes:
    if len(text) > MAX_FILE:
        raise Invalid(f"{name} has more than {MAX_FILE} bytes", hint="split it")
    return text
