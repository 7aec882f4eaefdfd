"""What one build hands to the next: tables that share their rows, and know which of them changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar, cast

from cluster.overlay import Overlay, is_much, merged

K = TypeVar("K")
V = TypeVar("V")
N = TypeVar("N")

_NOTHING: frozenset[Any] = frozenset()


class _Rows(Generic[K, V]):
    """Rows that share those of before, which never change: beside them stand the few that were written since.

    So a write copies few of the others, however many there are, and a read is mostly one look into a dictionary.
    """

    __slots__ = ("_base", "_had", "_late", "_owns_base", "_owns_late")

    def __init__(self, base: dict[K, V] | None = None, late: dict[K, V | None] | None = None) -> None:
        self._base: dict[K, Any] = base if base is not None else {}
        self._late: dict[K, Any] = late if late is not None else {}
        """What was written over the base; None: deleted."""
        self._owns_base = base is None
        self._owns_late = False
        self._had: tuple[dict[K, Any], dict[K, Any]] = ({}, {}) if base is None else (self._base, self._late)

    def fork(self) -> Self:
        """The same rows, none of them changed."""
        return type(self)(self._base, self._late)

    def settled(self) -> Self:
        """The same rows, to be forked and no more to be written: what was there before is forgotten."""
        return self.fork() if self._owns_base or self._owns_late else self

    def get(self, key: K) -> V | None:
        late = self._late
        if late and key in late:
            return cast("V | None", late[key])
        return self._base.get(key)

    def was(self, key: K) -> V | None:
        """The row before the fork."""
        base, late = self._had
        return late[key] if late and key in late else base.get(key)

    @property
    def rows(self) -> dict[K, V]:
        """All of them, to read from and not to write to. It may cost a copy: of a single one ask `get`."""
        if self._late:
            self._merge()
        return self._base

    def frozen(self) -> Mapping[K, V]:
        """All of them without a copy, once nothing is written here any more."""
        return Overlay(self._base, self._late) if self._late else MappingProxyType(self._base)

    def __contains__(self, key: object) -> bool:
        late = self._late
        return late[key] is not None if late and key in late else key in self._base

    def _set(self, key: K, value: V | None) -> None:
        rows = self._base if self._owns_base else self._writable(1)
        if value is None and rows is self._base:
            del rows[key]
        else:
            rows[key] = value

    def _writable(self, number: int) -> dict[K, Any]:
        """Where to write so many rows."""
        if not self._owns_base and is_much(len(self._late) + number, len(self._base)):
            self._merge()
        if self._owns_base:
            return self._base
        if not self._owns_late:
            self._late, self._owns_late = self._late.copy(), True
        return self._late

    def _merge(self) -> None:
        self._base, self._owns_base = merged(self._base, self._late), True
        self._late, self._owns_late = {}, False


class Table(_Rows[K, V]):
    """A mapping whose values are never None. What it was forked from never changes."""

    __slots__ = ("changed",)

    def __init__(self, base: dict[K, V] | None = None, late: dict[K, V | None] | None = None) -> None:
        super().__init__(base, late)
        self.changed: dict[K, None] = {}
        """The keys whose row is another than before the fork; in the order of the writes."""

    def put(self, key: K, value: V | None) -> None:
        """Write a row; None deletes it. One that equals what is there leaves the object that is there."""
        there = self.get(key)
        if there is value or there == value:
            return
        self._set(key, value)
        self.changed[key] = None

    def put_new(self, rows: Mapping[K, V]) -> None:
        """Write many rows, all of them other objects than what is there."""
        self._writable(len(rows)).update(rows)
        self.changed.update(dict.fromkeys(rows))

    def sort(self, key: Callable[[tuple[K, V]], Any]) -> None:
        """Put the rows in order, if there are any new ones."""
        if any(self.was(name) is None for name in self.changed):
            self._base, self._owns_base = dict(sorted(self.rows.items(), key=key)), True

    def appeared_or_went(self) -> Iterator[K]:
        """The keys that have a row and had none, or had one and have none."""
        return (key for key in self.changed if (self.was(key) is None) != (self.get(key) is None))

    def rows_of(self, keys: Iterable[K]) -> list[V]:
        """The rows of keys that all have one, in their order."""
        base, late = self._base, self._late
        return [late[key] if late and key in late else base[key] for key in keys]

    def __getitem__(self, key: K) -> V:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value


class Index(_Rows[K, dict[V, None]]):
    """Which values belong to a key: a mapping to sets, without empty ones. What it was forked from never changes.

    The sets are the keys of dictionaries, so that whoever goes through one meets its values in about the order of
    memory. Nothing may depend on that order: it is another one in a Mesh that was built from nothing.
    """

    __slots__ = ("_own",)

    def __init__(
        self, base: dict[K, dict[V, None]] | None = None, late: dict[K, dict[V, None] | None] | None = None
    ) -> None:
        super().__init__(base, late)
        self._own: dict[K, bool] = {}
        """The keys that were written since the fork: whether there is a set, which is nobody else's."""

    def of(self, key: K) -> AbstractSet[V]:
        """The values of a key, in no order."""
        row = self.get(key)
        return row.keys() if row is not None else _NOTHING

    def add(self, key: K, value: V) -> None:
        row = self.get(key)
        if row is None or value not in row:
            self._writable_set(key, row)[value] = None

    def discard(self, key: K, value: V) -> None:
        row = self.get(key)
        if row is None or value not in row:
            return
        if len(row) > 1:
            del self._writable_set(key, row)[value]
        else:
            self._set(key, None)
            self._own[key] = False

    def move(self, value: V, before: Iterable[K], now: Iterable[K]) -> None:
        """Let a value that belonged to some keys belong to others."""
        old, new = set(before), set(now)
        for key in old - new:
            self.discard(key, value)
        for key in new - old:
            self.add(key, value)

    def keys(self) -> frozenset[K]:
        return frozenset(self.rows)

    def appeared_or_went(self, key: K) -> bool:
        """Whether that key has values and had none before the fork, or had some and has none."""
        return (self.was(key) is None) != (self.get(key) is None)

    def has_other_keys(self) -> bool:
        """Whether a key has come or gone since the fork."""
        return any(self.appeared_or_went(key) for key in self._own)

    def _writable_set(self, key: K, there: dict[V, None] | None) -> dict[V, None]:
        if there is None or not self._own.get(key):
            there = there.copy() if there is not None else {}
            self._set(key, there)
            self._own[key] = True
        return there


@dataclass(slots=True)
class Tables:
    """A stage: a dataclass whose fields are Tables and Indexes."""

    def fork(self) -> Self:
        return type(self)(*[table.fork() for table in self._all()])

    def settled(self) -> Self:
        return type(self)(*[table.settled() for table in self._all()])

    def _all(self) -> list[Any]:
        names: tuple[str, ...] = self.__match_args__
        return [getattr(self, name) for name in names]


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
