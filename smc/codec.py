"""How a record is written down.

Every value is canonical JSON, `{"format": 1, "record": {...}, "traceparent": "..."}`: equal records have equal bytes
but for the trace. A record of a newer format than this version knows is refused, never guessed at.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from datetime import timedelta
from enum import Enum
from functools import cache, lru_cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from smc.errors import Invalid
from smc.model import Name

FORMAT = 1
"""The format that this version writes; it reads this one and, once there is one, the one before it."""
READABLE = (1,)

MOST_ALIKE = 4096
"""Values of a kind that are kept to be found again."""

T = TypeVar("T")


class UnreadableRecord(Invalid):
    """A stored value is of an unknown format, or not of the shape that its key promises."""


def encode(record: object, *, traceparent: str = "") -> bytes:
    """The canonical bytes of a record."""
    document: dict[str, Any] = {"format": FORMAT, "record": _plain(record)}
    if traceparent:
        document["traceparent"] = traceparent
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode(kind: type[T], value: bytes, *, key: str = "") -> T:
    """Read a record.

    Raises:
        UnreadableRecord: not JSON, not a readable format, or not the shape of `kind`.
    """
    document = _document(value, key)
    try:
        record: T = _reader(kind)(document["record"])
        return record
    except (KeyError, TypeError, ValueError) as e:
        raise UnreadableRecord(f"the value at {key or 'a key'} is not a {kind.__name__}: {e}") from e


def traceparent(value: bytes, *, key: str = "") -> str:
    """The W3C trace context of whoever wrote the record; "" if it had none."""
    # It is the last member of a canonical value: to look there spares reading the whole of it.
    if (found := _TRACE.search(value, len(value) - _TRACE_BYTES)) is not None:
        return found[1].decode()
    return str(_document(value, key).get("traceparent", "")) if b'"traceparent"' in value else ""


_TRACE = re.compile(rb',"traceparent":"([0-9a-f-]{55})"\}\Z')
_TRACE_BYTES = 73


def equal(value: bytes, record: object) -> bool:
    """Whether a stored value says the same as `record`, whoever wrote it."""
    try:
        document = _document(value, "")
    except UnreadableRecord:
        return False
    return bool(document["format"] == FORMAT and document.get("record") == json.loads(json.dumps(_plain(record))))


def _document(value: bytes, key: str) -> dict[str, Any]:
    try:
        document = json.loads(value)
    except ValueError as e:
        raise UnreadableRecord(f"the value at {key or 'a key'} is not JSON: {e}") from e
    if not isinstance(document, dict) or document.get("format") not in READABLE:
        found = document.get("format") if isinstance(document, dict) else None
        raise UnreadableRecord(
            f"the value at {key or 'a key'} has format {found!r}; this version reads {', '.join(map(str, READABLE))}",
            hint="finish the upgrade: a newer replica has written it",
        )
    return document


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Name):
        return {"namespace": value.namespace, "name": value.name}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return {name: _plain(getattr(value, name)) for name in _names(value.__class__)}


@cache
def _names(kind: type) -> tuple[str, ...]:
    if not is_dataclass(kind):
        raise TypeError(f"a record cannot hold a {kind.__name__}")
    return tuple(f.name for f in fields(kind))


def _make_reader(kind: Any) -> Callable[[Any], Any]:
    """A function from plain JSON to `kind`; it raises KeyError, TypeError or ValueError."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        (inner,) = [a for a in get_args(kind) if a is not NoneType]
        read = _reader(inner)
        return lambda plain: None if plain is None else read(plain)
    if origin is tuple:
        items = get_args(kind)
        if len(items) == 2 and items[1] is ...:
            read = _reader(items[0])
            return lambda plain: tuple([read(item) for item in plain])
        readers = [_reader(item) for item in items]
        return lambda plain: tuple([read(item) for read, item in zip(readers, plain, strict=True)])
    if kind is Any or origin is not None:
        return lambda plain: plain
    if kind is Name:
        return _name
    if is_dataclass(kind):
        return _dataclass_reader(kind)
    if kind is bytes:
        return lambda plain: base64.b64decode(plain, validate=True)
    if kind is timedelta:
        return lambda plain: timedelta(seconds=plain)
    if kind is float:
        return float
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind

    def scalar(plain: Any) -> Any:
        if type(plain) is not kind:
            raise TypeError(f"{plain!r} is not a {kind.__name__}")
        return plain

    return scalar


_reader: Callable[[Any], Callable[[Any], Any]] = cache(_make_reader)


def _name(plain: Any) -> Name:
    namespace, name = plain["namespace"], plain["name"]
    if type(namespace) is not str or type(name) is not str:
        raise TypeError(f"{plain!r} is not a Name")
    return Name(namespace, name)


def _dataclass_reader(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = [
        (f.name, _reader(hints[f.name]), f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)
    ]

    def read(plain: Any) -> Any:
        try:
            return kind(*[of(plain[name]) for name, of, _ in readers])
        except KeyError:  # a field that has a default, most likely
            return kind(**{name: of(plain[name]) for name, of, required in readers if required or name in plain})

    if not all(hints[name] is str for name, _, _ in readers):
        return read
    # An identity, a locality: there are few, and each is read again and again.
    known = lru_cache(MOST_ALIKE)(
        lambda *texts: kind(*[of(text) for (_, of, _), text in zip(readers, texts, strict=True)])
    )

    def look_up(plain: Any) -> Any:
        try:
            return known(*[plain[name] for name, _, _ in readers])
        except KeyError:
            return read(plain)

    return look_up
