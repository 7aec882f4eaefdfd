"""From the text of YAML or JSON to documents whose every value knows its line and column.

It reads the events of libyaml one by one and builds the values itself, so that every bound holds before anything is
built: a bomb costs what it takes to see that it is one. Scalars are those of YAML's core schema, which are JSON's too:
`true`, `false`, `null`, integers and floats. `no`, `on`, `y`, `12:30` and dates are strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from smc.manifests.findings import MAX_FINDINGS, Finding, InvalidManifest, below, shown

MAX_TEXT = 8 * 1024 * 1024
"""Bytes of one file."""
MAX_DOCUMENT = 1024 * 1024
"""Bytes of one document."""
MAX_DOCUMENTS = 1000
"""Documents of one file."""
MAX_DEPTH = 64
"""Lists and maps within each other."""
MAX_NODES = 10_000
"""Values of one document, keys included."""
MAX_NODES_OF_TEXT = 200_000
"""Values of one file."""

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it is."""

    value: Scalar | Sequence[Node] | Mapping[str, Entry]
    line: int = 0
    """From 1; 0: not known."""
    column: int = 0
    """From 1; 0: not known."""
    raw: str = ""
    """A scalar that is no string, as it was written."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a map, with its value."""

    key: Node
    value: Node


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a text, not yet known to be a manifest."""

    root: Node
    text: str
    """As it was written, without the line `---` before it."""
    line: int
    """The first line of `text` in its file, from 1."""


def documents(text: str | bytes, *, file: str, line: int = 1) -> tuple[Document, ...]:
    """Read every document that is not empty; `line` is that of the text's first line in the file.

    Raises:
        InvalidManifest: it is not UTF-8, YAML or JSON, or holds what no manifest may: control characters, anchors,
            aliases, tags, directives, duplicate keys, keys that are not strings; or it exceeds a bound.
    """
    found, findings = parse(text, file=file, line=line)
    if findings:
        raise InvalidManifest(findings[:MAX_FINDINGS])
    return found


def parse(text: str | bytes, *, file: str, line: int = 1) -> tuple[tuple[Document, ...], list[Finding]]:
    """As `documents`, but the findings come beside the documents, so that those can be looked at further."""
    try:
        reader = _Reader(_decoded(text, file, line), file, line)
    except InvalidManifest as e:
        return (), list(e.findings)
    return tuple(reader.documents()), reader.findings


def plain(node: Node) -> Any:
    """The value without positions: what JSON would hold."""
    match node.value:
        case Mapping():
            return {name: plain(entry.value) for name, entry in node.value.items()}
        case list() | tuple():
            return [plain(item) for item in node.value]
        case _:
            return node.value


def bare(value: Any, depth: int = 0) -> Node:
    """A value that was read from JSON, as a Node without positions: the inverse of `plain`.

    Raises:
        InvalidManifest: it is deeper than any document.
    """
    if depth > MAX_DEPTH:
        raise InvalidManifest([Finding("", 0, 0, "", f"more than {MAX_DEPTH} lists and maps are within each other")])
    if isinstance(value, Mapping):
        return Node({str(k): Entry(Node(str(k)), bare(v, depth + 1)) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return Node([bare(item, depth + 1) for item in value])
    return Node(value)


class _Stop(Exception):
    """A bound is exceeded: nothing after it is looked at."""


_REFUSED = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What libyaml takes for no character, and the line separators that editors do not count as lines."""


def _decoded(text: str | bytes, file: str, line: int) -> str:
    # A lone surrogate is refused below, with its place.
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_TEXT:
        reason = f"it has {len(data)} bytes, at most {MAX_TEXT} are read"
        raise InvalidManifest([Finding(file, 0, 0, "", reason, "split it into several files")])
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as e:
            reason = f"it is not UTF-8: byte 0x{data[e.start]:02x}"
            raise InvalidManifest([_at(data[: e.start].decode(), file, line, reason, "save it as UTF-8")]) from None
    text = text.removeprefix("\ufeff")
    if wrong := _REFUSED.search(text):
        reason = f"control character {wrong.group().encode('unicode_escape', 'surrogatepass').decode()}"
        raise InvalidManifest([_at(text[: wrong.start()], file, line, reason, "remove it")])
    return text


def _at(before: str, file: str, line: int, reason: str, hint: str) -> Finding:
    """A finding right after `before`."""
    lines = before.splitlines(keepends=True) or [""]
    if lines[-1].endswith(("\n", "\r")):
        lines.append("")
    return Finding(file, line + len(lines) - 1, len(lines[-1]) + 1, "", reason, hint)


class _Reader:
    """The documents of one text, in order; what is wrong with them gathers in `findings`."""

    def __init__(self, source: str, file: str, line: int) -> None:
        self.findings: list[Finding] = []
        self._source = source
        self._lines = source.splitlines(keepends=True)
        self._file = file
        self._offset = line
        self._nodes = 0
        self._nodes_before = 0
        self._field = ""
        self._duplicates = 0

    def documents(self) -> Iterator[Document]:
        """Every document that has a value, up to where the text cannot be read any more."""
        starts: list[tuple[int, Node]] = []
        line, end = 0, len(self._lines)
        try:
            events = self._events()
            for event in events:
                if not isinstance(event, yaml.DocumentStartEvent):
                    continue
                self._field = ""
                line = self.position(event)[0] - self._offset
                if event.version or event.tags:
                    self._find(event, "YAML directives are not taken", "remove the line that begins with %")
                if len(starts) == MAX_DOCUMENTS:
                    self._find(event, f"it has more than {MAX_DOCUMENTS} documents", "split it into several files")
                    break
                # Comments before a first document without `---` belong to it.
                starts.append((line if starts or event.explicit else 0, self._sound(events)))
        except _Stop:
            end = line
        ends = [start for start, _ in starts[1:]] + [end]
        for (start, root), until in zip(starts, ends, strict=False):
            yield from self._cut(root, start, until)

    def _sound(self, events: Iterator[Any]) -> Node:
        """The value whose events come next; null if so much is wrong with it that more findings would only confuse."""
        self._nodes_before = self._nodes
        wrong = len(self.findings) - self._duplicates
        root = self._document(events)
        return root if len(self.findings) - self._duplicates == wrong else Node(None)

    def _cut(self, root: Node, start: int, end: int) -> Iterator[Document]:
        lines = self._lines[start:end]
        if lines and lines[0].rstrip() == "---":
            start += 1
            del lines[0]
        text = "".join(lines)
        if root.value is None and root.raw == "":
            return
        if len(text.encode()) > MAX_DOCUMENT:
            reason = f"the document has more than {MAX_DOCUMENT} bytes"
            self._append(root.line, root.column, reason, "split it into several manifests")
        yield Document(root, text, self._offset + start)

    def _events(self) -> Iterator[Any]:
        try:
            yield from yaml.parse(self._source, Loader=yaml.CSafeLoader)
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark
            line, column = (0, 0) if mark is None else (mark.line, mark.column)
            reason, hint = self._syntax(e, line, column)
            self._append(self._offset + line, column + 1, reason, hint)
            raise _Stop from None
        except yaml.YAMLError as e:
            self._append(self._offset, 1, f"it is neither YAML nor JSON: {type(e).__name__}", "")
            raise _Stop from None

    def _syntax(self, error: yaml.MarkedYAMLError, line: int, column: int) -> tuple[str, str]:
        """What libyaml found, and what people mostly did."""
        problem = str(error.problem)
        row = self._lines[line] if line < len(self._lines) else ""
        character = row[column : column + 1].strip("\r\n")
        context = str(error.context or "")
        if "found character that cannot start any token" in problem:
            if character == "\t":
                return "a tab character, which YAML does not take as indentation", "indent with spaces"
            return f"a value cannot begin with {character}", "put the value into single quotes"
        hints = (
            ("mapping values are not allowed", "check the indentation; a value with ': ' in it needs quotes"),
            ("did not find expected key", "check the indentation, and the quotes of this line and the one before"),
            ("could not find expected ':'", "a key needs ': ' after it; check the line before as well"),
            ("expected '-' indicator", "check the indentation: a key stands where only '- ' can"),
            ("unknown escape character", "use single quotes: in them a backslash means itself"),
            ("invalid Unicode character escape", "write the character itself"),
            ("expected <document start>", "check for a bracket too many; documents are separated by a line ---"),
            ("expected ',' or", "check that every bracket is closed, and for a missing comma"),
            ("maximum nesting depth", f"at most {MAX_DEPTH} lists and maps may be within each other"),
        )
        hint = next((hint for part, hint in hints if part in problem), "")
        if "alias" in context:
            hint = "put the value into single quotes"
        if "quoted scalar" in context and "end of stream" in problem:
            begin = self._offset + error.context_mark.line if error.context_mark else 0
            hint = f"a quote that opens on line {begin} is not closed"
        return f"it is neither YAML nor JSON: {problem}" + (f" {context}" if context else ""), hint

    def _document(self, events: Iterator[Any]) -> Node:
        """Build the value whose events come next, without recursion."""
        root: list[Node] = []
        open_: list[_Collection] = []
        for event in events:
            if isinstance(event, yaml.DocumentEndEvent):
                break
            if isinstance(event, yaml.CollectionEndEvent):
                node = open_.pop().node
            else:
                self._field = open_[-1].next_field if open_ else ""
                self._count(event, len(open_))
                if isinstance(event, yaml.CollectionStartEvent):
                    open_.append(_Collection(self, event, self._field))
                    continue
                node = self._scalar(event)
            if open_:
                open_[-1].add(node)
            else:
                root.append(node)
        return root[0] if root else Node(None)

    def _count(self, event: Any, depth: int) -> None:
        self._nodes += 1
        if self._nodes - self._nodes_before > MAX_NODES:
            hint = "split it into several manifests"
            self._find(event, f"the document has more than {MAX_NODES} values", hint)
            raise _Stop
        if self._nodes > MAX_NODES_OF_TEXT:
            self._find(event, f"it has more than {MAX_NODES_OF_TEXT} values", "split it into several files")
            raise _Stop
        if isinstance(event, yaml.CollectionStartEvent) and depth >= MAX_DEPTH:
            self._find(event, f"more than {MAX_DEPTH} lists and maps are within each other", "make it flatter")
            raise _Stop
        if isinstance(event, yaml.AliasEvent):
            self._find(event, f"*{event.anchor}: aliases are not taken", "write the value out, or quote it")
        elif event.anchor is not None:
            self._find(event, f"&{event.anchor}: anchors are not taken", "remove it, or quote the value")
        if getattr(event, "tag", None) is not None:
            self._find(event, f"{_tag(event.tag)}: tags are not taken", "remove it; quotes make a string")
        if len(self.findings) >= MAX_FINDINGS:
            raise _Stop

    def _scalar(self, event: Any) -> Node:
        line, column = self.position(event)
        if isinstance(event, yaml.AliasEvent):
            return Node(None, line, column, "*")
        if event.style or not event.implicit[0]:
            return Node(event.value, line, column)
        return Node(_resolved(event.value), line, column, event.value)

    def position(self, event: Any) -> tuple[int, int]:
        return self._offset + event.start_mark.line, event.start_mark.column + 1

    def _find(self, event: Any, reason: str, hint: str) -> None:
        self._append(*self.position(event), reason, hint, self._field)

    def duplicate(self, field: str, key: Node, first: Node) -> None:
        self._duplicates += 1
        self._append(key.line, key.column, "duplicate key", f"it is on line {first.line} too", field)

    def not_a_key(self, field: str, key: Node) -> None:
        at = (key.line, key.column)
        if isinstance(key.value, Mapping | list):
            self._append(*at, "a list or map as a key", "a value with {{ in it needs quotes", field)
        elif key.raw != "*":
            self._append(*at, f"the key {shown(key.raw)} is not a string", f"write '{key.raw[:60]}'", field)

    def _append(self, line: int, column: int, reason: str, hint: str, field: str = "") -> None:
        self.findings.append(Finding(self._file, line, column, field[:200], reason, hint))


def _tag(tag: str) -> str:
    return shown(tag.replace("tag:yaml.org,2002:", "!!"))


class _Collection:
    """A list or map that is being read."""

    def __init__(self, reader: _Reader, start: Any, field: str) -> None:
        self._reader = reader
        self._field = field
        self._items: list[Node] = []
        self._entries: dict[str, Entry] = {}
        self._key: Node | None = None
        self._is_map = isinstance(start, yaml.MappingStartEvent)
        self.node = Node(self._entries if self._is_map else self._items, *reader.position(start))

    @property
    def next_field(self) -> str:
        """The path of what is added next."""
        if not self._is_map:
            return f"{self._field}[{len(self._items)}]"
        key = self._key.value if self._key is not None else None
        return below(self._field, key) if isinstance(key, str) else self._field

    def add(self, node: Node) -> None:
        if not self._is_map:
            self._items.append(node)
        elif self._key is None:
            self._key = node
        else:
            key, self._key = self._key, None
            if not isinstance(key.value, str):
                self._reader.not_a_key(self._field, key)
            elif first := self._entries.get(key.value):
                self._reader.duplicate(below(self._field, key.value), key, first.key)
            else:
                self._entries[key.value] = Entry(key, node)


_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, Scalar] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def _resolved(text: str) -> Scalar:
    """What a plain scalar means in YAML's core schema; of its numbers only those that JSON could hold."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    # A number that no field could hold is a float: it is refused as one, and Python takes no long digits as an int.
    if _INTEGER.fullmatch(text) and len(text) <= 20:
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
