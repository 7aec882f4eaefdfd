"""Mappings that change a little and often, and that nobody has to copy as a whole each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt
from types import MappingProxyType
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

FEW = 64
"""Late rows that are never worth a merge."""


def is_much(late: int, base: int) -> bool:
    """Whether to merge so many late rows: if so, each of many writes costs about the square root of the rows."""
    return late > FEW + isqrt(base)


def merged(base: dict[K, V] | MappingProxyType[K, V], late: Mapping[K, V | None]) -> dict[K, V]:
    """A copy of `base` with what came later, in the order of the base; None: it is not there any more."""
    rows = base.copy()
    for key, value in late.items():
        if value is None:
            rows.pop(key, None)
        else:
            rows[key] = value
    return rows


class Overlay(Mapping[K, V]):
    """The same without a copy, as long as neither of the two changes. No value is None."""

    __slots__ = ("_base", "_late", "_length")

    def __init__(self, base: Mapping[K, V], late: Mapping[K, V | None]) -> None:
        self._base = base
        self._late = late
        self._length = len(base) + sum((value is not None) - (key in base) for key, value in late.items())

    def __getitem__(self, key: K) -> V:
        value = self._late[key] if key in self._late else self._base[key]
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[K]:
        late = self._late
        for key in self._base:
            if key not in late or late[key] is not None:
                yield key
        for key, value in late.items():
            if value is not None and key not in self._base:
                yield key

    def __len__(self) -> int:
        return self._length
