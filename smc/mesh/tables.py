"""What one build hands to the next: tables that share their rows until one is written, and know which rows changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, Generic, Self, TypeVar

K = TypeVar("K")
V = TypeVar("V")
N = TypeVar("N")

_NOTHING: frozenset[Any] = frozenset()


class Table(Generic[K, V]):
    """A mapping whose values are never None. What it was forked from never changes."""

    __slots__ = ("_before", "_rows", "changed")

    def __init__(self, rows: dict[K, V] | None = None) -> None:
        self._before: dict[K, V] = {} if rows is None else rows
        self._rows = self._before
        self.changed: dict[K, None] = {}
        """The keys whose row is another than before the fork; in the order of the writes."""

    def fork(self) -> Table[K, V]:
        """The same rows, none of them changed."""
        return Table(self._rows)

    def put(self, key: K, value: V | None) -> None:
        """Write a row; None deletes it. One that equals what is there leaves the object that is there."""
        there = self._rows.get(key)
        if there is value or there == value:
            return
        rows = self._writable()
        if value is None:
            del rows[key]
        else:
            rows[key] = value
        self.changed[key] = None

    def put_new(self, rows: Mapping[K, V]) -> None:
        """Write many rows, all of them other objects than what is there."""
        self._writable().update(rows)
        self.changed.update(dict.fromkeys(rows))

    def sort(self, key: Callable[[tuple[K, V]], Any]) -> None:
        """Put the rows in order, if there are any new ones."""
        if any(name not in self._before for name in self.changed):
            self._rows = dict(sorted(self._rows.items(), key=key))

    def get(self, key: K) -> V | None:
        return self._rows.get(key)

    def was(self, key: K) -> V | None:
        """The row before the fork."""
        return self._before.get(key)

    def appeared_or_went(self) -> Iterator[K]:
        """The keys that have a row and had none, or had one and have none."""
        return (key for key in self.changed if (key in self._before) != (key in self._rows))

    @property
    def rows(self) -> dict[K, V]:
        """To read from, not to write to."""
        return self._rows

    def __getitem__(self, key: K) -> V:
        return self._rows[key]

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def _writable(self) -> dict[K, V]:
        if self._rows is self._before:
            self._rows = self._before.copy()
        return self._rows


class Index(Generic[K, V]):
    """Which values belong to a key: a mapping to sets, without empty ones. What it was forked from never changes."""

    __slots__ = ("_before", "_own", "_rows")

    def __init__(self, rows: dict[K, set[V]] | None = None) -> None:
        self._before: dict[K, set[V]] = {} if rows is None else rows
        self._rows = self._before
        self._own: set[K] = set()

    def fork(self) -> Index[K, V]:
        return Index(self._rows)

    def of(self, key: K) -> AbstractSet[V]:
        """The values of a key, in no order."""
        return self._rows.get(key, _NOTHING)

    def add(self, key: K, value: V) -> None:
        row = self._rows.get(key, _NOTHING)
        if value not in row:
            self._writable(key).add(value)

    def discard(self, key: K, value: V) -> None:
        if value in self._rows.get(key, _NOTHING):
            row = self._writable(key)
            row.discard(value)
            if not row:
                del self._rows[key]
                self._own.discard(key)

    def move(self, value: V, before: Iterable[K], now: Iterable[K]) -> None:
        """Let a value that belonged to some keys belong to others."""
        old, new = set(before), set(now)
        for key in old - new:
            self.discard(key, value)
        for key in new - old:
            self.add(key, value)

    def keys(self) -> frozenset[K]:
        return frozenset(self._rows)

    def appeared_or_went(self, key: K) -> bool:
        """Whether that key has values and had none before the fork, or had some and has none."""
        return (key in self._before) != (key in self._rows)

    def has_other_keys(self) -> bool:
        """Whether a key has come or gone since the fork."""
        return self._rows is not self._before and self._rows.keys() != self._before.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def _writable(self, key: K) -> set[V]:
        if self._rows is self._before:
            self._rows = self._before.copy()
        if key not in self._own:
            self._rows[key] = set(self._rows.get(key, ()))
            self._own.add(key)
        return self._rows[key]


@dataclass(slots=True)
class Tables:
    """A stage: a dataclass whose fields are Tables and Indexes."""

    def fork(self) -> Self:
        return type(self)(**{f.name: getattr(self, f.name).fork() for f in fields(self)})


def kept(before: Any, now: N) -> N:
    """`before`, if it says the same as `now`: nouns compare by identity, so an equal one has to stay the same."""
    if type(before) is not type(now) or now is None:
        return now
    kind: Any = type(now)
    of = _fields(kind)
    same: N = before if of(before) == of(now) else now
    return same


@cache
def _fields(noun: Any) -> Callable[[Any], Any]:
    if not is_dataclass(noun):
        raise TypeError(f"{noun.__name__} is no noun")
    return attrgetter(*(f.name for f in fields(noun)))
