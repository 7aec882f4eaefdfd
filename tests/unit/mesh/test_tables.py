"""Tables and Indexes say what dictionaries would, and what they were forked from stays as it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.mesh.tables import Index, Table

Builds = Sequence[Sequence[tuple[int, int]]]
"""Of each build, what it writes: (key, value), where 0 deletes."""

builds = st.lists(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 3)), max_size=40), max_size=12)
sizes = st.sampled_from((0, 10, 120))


@given(builds, sizes)
def test_a_table_equals_a_dictionary_that_was_copied_before_each_build(history: Builds, size: int) -> None:
    table: Table[int, str] = Table(dict.fromkeys(range(size), "1"))
    model = dict.fromkeys(range(size), "1")
    older: list[tuple[Table[int, str], Mapping[int, str], dict[int, str]]] = []
    for writes in history:
        table = table.settled()
        assert {key: table.was(key) for key in range(121)} == {key: model.get(key) for key in range(121)}
        older.append((table, table.frozen(), model))
        table, before, model = table.fork(), model, model.copy()
        for key, number in writes:
            value = str(number) if number else None
            table.put(key, value)
            if value is None:
                model.pop(key, None)
            else:
                model[key] = value
            assert table.get(key) == value
        assert {key: table.get(key) for key in range(121)} == {key: model.get(key) for key in range(121)}
        assert table.rows_of(model) == list(model.values())
        assert {key: table.was(key) for key in range(121)} == {key: before.get(key) for key in range(121)}
        assert {key for key in model.keys() ^ before.keys() if key in table.changed} == set(table.appeared_or_went())
        assert model.keys() ^ before.keys() == set(table.appeared_or_went())
    older.append((table, table.frozen(), model))
    for forked, frozen, expected in older:
        assert (dict(frozen), len(frozen)) == (expected, len(expected))
        assert forked.rows == expected


@given(builds, sizes)
def test_an_index_equals_a_dictionary_of_sets(history: Builds, size: int) -> None:
    index: Index[int, int] = Index({key: {1: None} for key in range(size)})
    model = {key: {1} for key in range(size)}
    older = []
    for writes in history:
        index = index.settled()
        older.append((index, model))
        index, before = index.fork(), model
        now = defaultdict(set, {key: set(values) for key, values in model.items()})
        for key, number in writes:
            if number:
                index.add(key, number)
                now[key].add(number)
            else:
                index.discard(key, 1)
                now[key].discard(1)
        model = {key: values for key, values in now.items() if values}
        assert {key: index.of(key) for key in range(121) if key in index} == model
        assert index.has_other_keys() == (model.keys() != before.keys())
        assert {k for k in range(121) if index.appeared_or_went(k)} == model.keys() ^ before.keys()
    for forked, expected in [*older, (index, model)]:
        assert {key: forked.of(key) for key in forked.rows} == expected


def test_one_write_among_many_rows_copies_none_of_them() -> None:
    table = Table(dict.fromkeys(range(10_000), "old"))
    now = table.fork()
    now.put(7, "new")
    assert now._base is table._base
    assert (now.frozen()[7], table[7], len(now.frozen())) == ("new", "old", 10_000)


@pytest.mark.parametrize("size", [0, 1, 10_000])
def test_what_is_settled_is_a_fork_only_where_something_was_written(size: int) -> None:
    table = Table(dict.fromkeys(range(size), "old")).fork()
    assert table.settled() is table
    table.put(0, "new")
    settled = table.settled()
    assert (settled.was(0), settled[0], dict(settled.changed)) == ("new", "new", {})


def test_rows_that_are_sorted_stay_so_when_one_is_another() -> None:
    table = Table(dict.fromkeys(range(1000), "old")).fork()
    table.put(500, "new")
    table.sort(lambda row: row[0])
    assert list(table.frozen()) == list(range(1000))
    table = table.fork()
    table.put(-1, "first")
    table.sort(lambda row: row[0])
    assert list(table.frozen()) == list(range(-1, 1000))
