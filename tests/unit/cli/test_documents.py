from __future__ import annotations

from pathlib import Path

import pytest

from smc.cli.documents import read, split
from smc.errors import NotFound


def parts(text: bytes) -> list[tuple[int, bytes]]:
    return [(d.line, d.text) for d in split(text, "f.yaml")]


def test_documents_know_their_first_line() -> None:
    assert parts(b"a: 1\n---\nb: 2\nc: 3\n--- # note\n\nd: 4\n") == [
        (1, b"a: 1\n"),
        (3, b"b: 2\nc: 3\n"),
        (5, b"    # note\n\nd: 4\n"),
    ]


@pytest.mark.parametrize("text", [b"", b"\n\n", b"# nothing\n", b"---\n---\n# x\n...\n---\n", b"\xef\xbb\xbf# x"])
def test_what_is_empty_or_a_comment_is_no_document(text: bytes) -> None:
    assert parts(text) == []


def test_what_stands_behind_a_marker_belongs_to_its_document() -> None:
    assert parts(b"--- {a: 1}\n---\nb: 2") == [(1, b"    {a: 1}\n"), (3, b"b: 2")]


def test_a_marker_counts_only_at_the_beginning_of_a_line_and_alone() -> None:
    text = b"a: |\n  ---\n  text\nb: x---\n----: 1\n"
    assert parts(text) == [(1, text)]


def test_line_ends_of_other_systems_are_counted_once() -> None:
    assert parts(b"a: 1\r\n---\r\nb: 2\r\n") == [(1, b"a: 1\r\n"), (3, b"b: 2\r\n")]


def test_a_json_file_is_one_document() -> None:
    assert parts(b'{\n  "a": 1\n}\n') == [(1, b'{\n  "a": 1\n}\n')]


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.yml", "a.yaml", "c.json", "d.txt"):
        (tmp_path / name).write_text("x: 1")
    assert [Path(d.file).name for d in read([str(tmp_path)])] == ["a.yaml", "b.yml", "c.json"]


def test_a_directory_without_manifests_and_a_missing_file_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no manifest in"):
        list(read([str(tmp_path)]))
    with pytest.raises(NotFound, match="no file"):
        list(read([str(tmp_path / "none.yaml")]))
