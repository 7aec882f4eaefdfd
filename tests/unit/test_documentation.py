"""What is written for users names all that there is, leads where it says, and has no mistake in its manifests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from e2e.kit.reader import differs
from smc import plugins
from smc.cli.program import program
from smc.manifests import OWN_KINDS, read_all
from smc.manifests.schema import Field
from smc.proxy.settings import Exit
from tests.documentation import CHAPTERS, DOCS, PAGES, ROOT, anchors, blocks, links

TEXT = "\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
NOT_RUN = {
    "ini": "units of systemd, which a test does not install on the machine that it runs on",
    "yaml": "manifests: those that begin with the name of a file are kept under it",
    "text": "what the block before prints",
}
"""Kinds of blocks that are no commands, and why; all others are typed by e2e/test_docs.py."""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}"


def test_the_index_leads_to_every_chapter() -> None:
    assert {(DOCS / link).resolve() for link in links(DOCS / "README.md")} >= set(CHAPTERS)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_block_is_typed_or_has_a_reason_not_to_be(chapter: Path) -> None:
    for block in blocks(chapter):
        assert block.kind == "sh" or block.kind in NOT_RUN, f"{chapter.name}:{block.line}: {block.kind}"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_manifest_of_a_chapter_is_one(chapter: Path) -> None:
    for block in blocks(chapter):
        if block.kind == "yaml":
            assert read_all(block.text, plugins.kinds(), file=chapter.name, line=block.line + 1)


def _commands(command: click.Command, words: tuple[str, ...]) -> Iterator[str]:
    if isinstance(command, click.Group):
        with click.Context(command) as context:
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from _commands(found, (*words, name))
    else:
        yield " ".join(words)


@pytest.mark.parametrize("command", [*_commands(program, ("smc",))])
def test_every_command_occurs(command: str) -> None:
    assert re.search(rf"\b{command}\b", TEXT)


def _fields(shape: Any) -> Iterator[str]:
    if isinstance(shape, Field):
        yield shape.name
    if isinstance(shape, tuple):
        for part in shape:
            yield from _fields(part)
    elif isinstance(shape, dict):
        for part in shape.values():
            yield from _fields(part)
    elif is_dataclass(shape):
        for field in fields(shape):
            yield from _fields(getattr(shape, field.name))


@pytest.mark.parametrize(
    ("kind", "field"), [(kind.name, field) for kind in OWN_KINDS for field in sorted({*_fields(kind.versions)})]
)
def test_every_field_of_our_own_kinds_occurs(kind: str, field: str) -> None:
    assert re.search(rf"\b{kind}\b", TEXT)
    assert re.search(rf"\b{field}\b", TEXT)


def test_every_exit_code_of_a_proxy_is_told_with_what_mends_it() -> None:
    table = (DOCS / "troubleshooting.md").read_text()
    told = {int(code) for code in re.findall(r"^\| ([0-9]+) \|", table, re.MULTILINE)}
    assert told == {*Exit} - {Exit.STOPPED}


def test_what_is_printed_is_compared_line_by_line() -> None:
    assert differs("a  b\n\nc 17s\n", "a b\nc …\n") == ""
    assert differs("a\nx\ny\nb\n", "a\n…\nb\n") == ""
    assert differs("a\nb\n", "a\n…\nb\n") == ""
    assert differs("a\nb\n", "…\n") == ""
    assert differs("a\nb\n", "a\n") == "printed as well: b"
    assert differs("a\n", "a\nb\n") == "not printed: b"
    assert differs("a\nc\n", "a\nb\n") == "printed: c\nexpected: b"
