"""The pages of `--help`: every command has one that can be read in a terminal and learnt from."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from smc.cli import say
from smc.cli.kinds import known
from smc.cli.program import ANSWERS, COMMANDS, SECTIONS, program

WIDTH = 100
WATCHING, WAITING = "--watch", "--wait"


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


ALL = dict(commands(program))


def page(*path: str, width: int = WIDTH) -> str:
    result = CliRunner().invoke(program, [*path, "--help"], terminal_width=width, prog_name="smc")
    assert result.exit_code == 0, result.output
    return result.output


def examples(text: str) -> list[str]:
    """The lines below the heading."""
    _, _, rest = text.partition("  Examples:\n")
    return [line.strip() for line in rest.partition("\n\n")[0].splitlines()]


def codes(text: str) -> set[int]:
    """The first words of the lines below the heading."""
    below = text.partition("  Exit codes")[2]
    return {int(code) for code in re.findall(r"^ {4}(\d+) +\S", below, re.MULTILINE)}


@pytest.mark.parametrize("path", [(), *{path[:1] for path in ALL}, *ALL], ids=" ".join)
def test_no_line_is_too_long_for_a_terminal(path: tuple[str, ...]) -> None:
    assert [line for line in page(*path).splitlines() if len(line) > WIDTH] == []


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_a_page_begins_with_what_the_command_does_in_one_line(path: tuple[str, ...]) -> None:
    first = (ALL[path].help or "").strip().partition("\n\n")[0]
    assert re.fullmatch(r"[A-Z][^\n]{10,}\.", first.split("\n\b")[0].strip()), first


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_a_page_has_examples_of_the_command_that_its_options_know(path: tuple[str, ...]) -> None:
    found = examples(page(*path))
    assert found
    known = {option for parameter in ALL[path].params for option in parameter.opts}
    for line in found:
        assert " ".join(("smc", *path)) in line, line
        words = shlex.split(line.partition(" ".join(("smc", *path)))[2].partition(" > ")[0].rstrip(')"'))
        given = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert given <= known, line


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_a_page_tells_the_exit_codes_that_the_command_alone_has(path: tuple[str, ...]) -> None:
    options = {option for parameter in ALL[path].params for option in parameter.opts}
    wanted = {
        *({130} if WATCHING in options else ()),
        *({say.LAGGING} if WAITING in options else ()),
        *({say.OK, say.FAILED, say.UNANSWERED} if path[0] in ANSWERS else ()),
    }
    assert wanted <= codes(page(*path))


def test_the_first_page_lists_every_command_once_by_its_purpose() -> None:
    text = page()
    assert [name for section in SECTIONS.values() for name in section] == list(COMMANDS)
    for purpose, section in SECTIONS.items():
        below = text.partition(f"\n{purpose}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  (\S+)", below, re.MULTILINE) == list(section)


def test_the_first_page_tells_every_exit_code_and_where_settings_come_from() -> None:
    text = page()
    assert codes(text) >= {0, 1, 2, 3, 4, 5, 6, 7, 130}
    for source in ("--credential", "SMC_CREDENTIAL", "--server", "config.json", "NO_COLOR"):
        assert source in text


def test_what_a_list_of_commands_says_is_what_the_page_begins_with() -> None:
    """The list is a table of its own, so that no command is imported for it."""
    for name, (_, summary) in COMMANDS.items():
        assert re.fullmatch(r"[A-Z].*\.", summary), name
        assert len(summary) < WIDTH - 14


@pytest.mark.parametrize("command", ["get", "describe"])
def test_every_kind_is_listed_with_its_short_name(command: str) -> None:
    text = page(command)
    for kind in known():
        assert re.search(rf"\b{kind.name} +{kind.short_names[0]}\b", text), kind.name


@pytest.mark.parametrize("group", ["proxy", "token"])
def test_a_group_says_of_each_command_what_it_does_in_words_that_fit(group: str) -> None:
    assert "..." not in page(group, width=80).partition("Commands:")[2]


def test_a_replica_says_what_it_cannot_do_without() -> None:
    text = " ".join(page("serve").split())
    for flag in ("--name", "--etcd", "--kek-file", "--address"):
        assert re.search(rf"{flag} TEXT [^\[]*\(required\) \[SMC_", text), flag
