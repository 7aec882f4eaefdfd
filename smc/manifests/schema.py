"""What a manifest may hold, as data. Reading is one step: the value is checked and the noun made from it.

A schema reads a Node, from a text or from a stored object alike, and returns what it stands for. Whatever is wrong is
added to Findings with its place, and reading goes on: a user sees every mistake at once.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Protocol

from smc.manifests.findings import MAX_FINDINGS, Finding, Unfit, below, did_you_mean, nearest, shown
from smc.manifests.text import Node


class _Bad:
    """Stands for a value that was refused, so that nothing is made from it."""


BAD: Final = _Bad()


class Findings:
    """What is wrong with one document, in the order in which it is found; and where each field is."""

    def __init__(self, file: str) -> None:
        self.all: list[Finding] = []
        self._file = file
        self._places: dict[str, Node] = {}

    def place(self, field: str, node: Node) -> None:
        self._places[field] = node

    def add(self, node: Node, field: str, reason: str, hint: str = "") -> _Bad:
        if len(self.all) < MAX_FINDINGS:
            self.all.append(Finding(self._file, node.line, node.column, field, reason, hint))
        return BAD

    def unfit(self, node: Node, field: str, why: Unfit) -> _Bad:
        """Add why a value is refused, at the place of the field below it that it names."""
        path = ".".join(part for part in (field, why.field) if part)
        return self.add(self._places.get(path, node), path, why.reason, why.hint)


class Shape(Protocol):
    """What a value must be."""

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        """The value, or BAD once the reason is in `findings`."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """A string; `parse` makes a value of it, and raises Unfit."""

    parse: Callable[[str], Any] = str
    lines: bool = False
    """Whether it may have several."""

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        if not isinstance(node.value, str):
            return findings.add(node, field, *_not_a("string", node))
        for character in node.value:
            if unicodedata.category(character) in {"Cc", "Cf", "Cs"} and not (self.lines and character in "\t\n\r"):
                code = f"U+{ord(character):04X}"
                return findings.add(node, field, f"control character {code} in {shown(node.value)}", "remove it")
        try:
            return self.parse(node.value)
        except Unfit as e:
            return findings.unfit(node, field, e)


@dataclass(frozen=True, slots=True)
class Integer:
    least: int
    most: int

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        value = node.value
        if isinstance(value, float):
            what = f"{shown(node.raw)[1:-1] if node.raw else value} is not a whole number"
            return findings.add(node, field, what, f"write an integer from {self.least} to {self.most}")
        if not isinstance(value, int) or isinstance(value, bool):
            return findings.add(node, field, *_not_a("integer", node))
        if re.match(r"[-+]?0[0-9]", node.raw):
            reason = f"{node.raw} begins with 0, which some readers take for octal"
            return findings.add(node, field, reason, f"write {value}")
        if not self.least <= value <= self.most:
            return findings.add(node, field, f"{value} is not from {self.least} to {self.most}")
        return value


@dataclass(frozen=True, slots=True)
class Boolean:
    def read(self, node: Node, field: str, findings: Findings) -> Any:
        if not isinstance(node.value, bool):
            return findings.add(node, field, *_not_a("boolean", node))
        return node.value


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list, whose items have different keys."""

    item: Shape
    least: int = 0
    most: int = 1000
    unique: Callable[[Any], Hashable] | None = None
    """The key of an item; None as a key: it may occur again."""
    named: Callable[[Any], str] = str
    """What the key of an item is called when it occurs twice."""
    empty: str = ""
    """What to do instead of writing an empty list, where at least one is needed."""

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        if not isinstance(node.value, list):
            return findings.add(node, field, *_not_a("list", node))
        if len(node.value) < self.least:
            return findings.add(node, field, "the list is empty, and at least one is needed", self.empty)
        if len(node.value) > self.most:
            return findings.add(node, field, f"{len(node.value)} items, at most {self.most} are taken")
        items = []
        first: dict[Hashable, int] = {}
        for index, item_node in enumerate(node.value):
            at = f"{field}[{index}]"
            findings.place(at, item_node)
            item = self.item.read(item_node, at, findings)
            if item is not BAD and self.unique is not None and (key := self.unique(item)) is not None:
                if key in first:
                    item = findings.add(
                        item_node, at, f"{self.named(item)} is in the list twice", f"it is at {field}[{first[key]}] too"
                    )
                else:
                    first[key] = index
            items.append(item)
        return BAD if BAD in items else tuple(items)


@dataclass(frozen=True, slots=True)
class MapOf:
    """A map whose keys are for the user to choose; read as pairs, sorted."""

    key: Callable[[str], str]
    value: Shape
    most: int = 1000

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        if not isinstance(node.value, Mapping):
            return findings.add(node, field, *_not_a("map", node))
        if len(node.value) > self.most:
            return findings.add(node, field, f"{len(node.value)} entries, at most {self.most} are taken")
        pairs = []
        for name, entry in node.value.items():
            at = below(field, name)
            key = Text(self.key).read(entry.key, at, findings)
            value = self.value.read(entry.value, at, findings)
            pairs.append(BAD if key is BAD or value is BAD else (key, value))
        return BAD if BAD in pairs else tuple(sorted(pairs))


@dataclass(frozen=True, slots=True)
class Within:
    """A shape that is read only if all strings in the value are short together: what it costs has an end."""

    shape: Shape
    characters: int

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        found = _characters(node)
        if found > self.characters:
            reason = f"{found} characters, at most {self.characters} are taken"
            return findings.add(node, field, reason, "split it into several manifests")
        return self.shape.read(node, field, findings)


def _characters(node: Node) -> int:
    match node.value:
        case str():
            return len(node.value)
        case Mapping():
            return sum(len(name) + _characters(entry.value) for name, entry in node.value.items())
        case list():
            return sum(map(_characters, node.value))
        case _:
            return 0


@dataclass(frozen=True, slots=True)
class OneOf:
    """Different shapes for different types."""

    shapes: Mapping[type, Shape]
    what: str

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        for kind, shape in self.shapes.items():
            if isinstance(node.value, kind) and not isinstance(node.value, bool):
                return shape.read(node, field, findings)
        return findings.add(node, field, *_not_a(self.what, node))


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    shape: Shape
    required: bool = False
    default: Any = None


@dataclass(frozen=True, slots=True)
class Object:
    """A map with known keys; `build` gets the values in the order of the fields, and may raise Unfit."""

    fields: tuple[Field, ...]
    build: Callable[..., Any]
    strange: Mapping[str, str] = field(default_factory=dict)
    """What to do about keys that are not taken but often met."""

    def read(self, node: Node, field: str, findings: Findings) -> Any:
        if not isinstance(node.value, Mapping):
            return findings.add(node, field, *_not_a("map", node))
        known = {f.name for f in self.fields}
        guessed = set()
        bad = False
        for name, entry in node.value.items():
            if name not in known:
                guess = nearest(name, known)
                guessed.add(guess)
                hint = self.strange.get(name) or did_you_mean(name, known)
                if guess in node.value and name not in self.strange:
                    hint += " It is there already"
                findings.add(entry.key, below(field, name), "unknown field", hint)
                bad = True
        values = []
        for f in self.fields:
            at = below(field, f.name)
            if f.name in node.value:
                value_node = node.value[f.name].value
                findings.place(at, value_node)
                values.append(f.shape.read(value_node, at, findings))
            elif f.required:
                # A key that is misspelt is one mistake, not two.
                if f.name not in guessed:
                    findings.add(node, at, "is missing", f"add {f.name}")
                bad = True
            else:
                values.append(f.default)
        if bad or BAD in values:
            return BAD
        try:
            return self.build(*values)
        except Unfit as e:
            return findings.unfit(node, field, e)


_ARTICLES = {"integer": "an integer"}


def _not_a(wanted: str, node: Node) -> tuple[str, str]:
    """The reason and the hint for a value of a wrong type."""
    value = node.value
    wants = f"must be {_ARTICLES.get(wanted, 'a ' + wanted)}"
    match value:
        case None:
            return f"{wants}, and is empty", "give it a value, or remove the line"
        case bool() | int() | float():
            raw = shown(node.raw)[1:-1] if node.raw else str(value).lower()
            found = "the boolean" if isinstance(value, bool) else "the number"
            hint = f'put it into quotes: "{raw}"' if wanted == "string" else ""
            return f"{wants}, not {found} {raw}", hint
        case str():
            return f"{wants}, not the string {shown(value)}", _hint_for(wanted, value)
        case Mapping():
            hint = "begin each item with '- '" if wanted == "list" else ""
            return f"{wants}, not a map", hint
        case _:
            return f"{wants}, not a list", "remove the '- '" if wanted == "map" else ""


def _hint_for(wanted: str, text: str) -> str:
    if wanted == "integer" and re.fullmatch(r"[0-9]{1,20}", text):
        return f"remove the quotes: {text}"
    if wanted == "boolean":
        if text.lower() in {"yes", "on", "y", "true"}:
            return "write true"
        if text.lower() in {"no", "off", "n", "false"}:
            return "write false"
    if wanted == "list":
        return f"write [{text[:60]}]" if re.fullmatch(r"[\w./-]+", text) else "begin each item with '- '"
    return ""


# --------------------------------------------------------------------------------------------------------------- texts

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,8})m)?(?:(\d{1,9})s)?(?:(\d{1,9})ms)?")


def label(text: str) -> str:
    """A DNS label: what namespaces and services are called."""
    if not _LABEL.fullmatch(text):
        reason = f"{shown(text)} is no DNS label: lower-case letters, digits and hyphens, at most 63"
        raise Unfit(reason, _suggested(text, _LABEL))
    return text


def domain(text: str) -> str:
    """A DNS name to which others are prepended, such as `mesh.internal`."""
    if len(text) > 100 or not all(_LABEL.fullmatch(part) for part in text.split(".")):
        reason = f"{shown(text)} is no domain: DNS labels with dots between them, at most 100 characters"
        raise Unfit(reason, _suggested(text, _SUBDOMAIN))
    return text


def subdomain(text: str) -> str:
    """A DNS name: what most objects and service accounts are called."""
    if not _SUBDOMAIN.fullmatch(text):
        reason = f"{shown(text)} is no DNS name: lower-case letters, digits, hyphens and dots, at most 253"
        raise Unfit(reason, _suggested(text, _SUBDOMAIN))
    return text


def _suggested(text: str, form: re.Pattern[str]) -> str:
    other = text[:260].strip().lower().replace("_", "-").replace(" ", "-")
    return f'write "{other}"' if form.fullmatch(other) else ""


def port_name(text: str) -> str:
    if text.isdigit():
        raise Unfit(f"{shown(text)} is no port name: it has no letter", f"remove the quotes: {text[:20]}")
    if len(text) > 15 or not any("a" <= c <= "z" for c in text) or not _LABEL.fullmatch(text):
        raise Unfit(f"{shown(text)} is no port name: lower-case letters, digits and hyphens, at most 15")
    return text


def ip_address(text: str) -> str:
    """An IP address that a connection can be made to, in its canonical form."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise Unfit(f"{shown(text)} is no IP address", "names are not resolved: write the address") from None
    if getattr(address, "scope_id", None):
        raise Unfit(f"{shown(text)} has a zone, which means nothing on another machine", "remove what follows the %")
    if address.is_unspecified or address.is_multicast or address == ipaddress.ip_address("255.255.255.255"):
        raise Unfit(f"{shown(text)} is no address of one machine", "write the address that others connect to")
    return str(address)


def duration(least: timedelta, most: timedelta) -> Callable[[str], timedelta]:
    """Read "24h", "1h30m", "90s" or "250ms"."""

    def parse(text: str) -> timedelta:
        match = _DURATION.fullmatch(text)
        if not text or match is None:
            raise Unfit(f"{shown(text)} is no duration", 'write one such as "24h", "1h30m" or "90s"')
        hours, minutes, seconds, milliseconds = (int(part or 0) for part in match.groups())
        value = timedelta(hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds)
        if not least <= value <= most:
            raise Unfit(f"{text} is not from {_written(least)} to {_written(most)}")
        return value

    return parse


def _written(value: timedelta) -> str:
    seconds = int(value.total_seconds())
    if value != timedelta(seconds=seconds):
        return f"{value // timedelta(milliseconds=1)}ms"
    return f"{seconds // 3600}h" if seconds % 3600 == 0 else f"{seconds}s"


def choice(known: Mapping[str, Any], *, refused: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """One of some words; `refused` says why others that exist are not taken."""

    def parse(text: str) -> Any:
        if text in known:
            return known[text]
        if refused and text in refused:
            raise Unfit(f"{shown(text)} is not taken: {refused[text]}", did_you_mean("", known))
        raise Unfit(f"{shown(text)} is not known", did_you_mean(text, known))

    return parse
