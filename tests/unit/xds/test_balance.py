"""What a replica gives up evens the load out, and never so much that a proxy is sent to and fro."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from smc.xds.balance import surplus

counts = st.lists(st.integers(0, 2000), max_size=8)


def share(counts: list[int]) -> int:
    return -(-sum(counts) // len(counts))


def test_a_replica_that_is_alone_keeps_all() -> None:
    assert surplus(1000, []) == 0


def test_what_is_above_one_more_than_the_even_share_is_too_much() -> None:
    assert surplus(90, [0, 0]) == 90 - 30 - 1
    assert surplus(32, [29, 29]) == 1
    assert surplus(31, [29, 30]) == 0


@given(st.integers(0, 2000), counts)
def test_a_replica_at_or_below_its_allowance_gives_up_nothing(own: int, others: list[int]) -> None:
    if own <= share([own, *others]) + 1:
        assert surplus(own, others) == 0


@given(st.integers(0, 2000), counts)
def test_giving_up_the_surplus_leaves_exactly_the_allowance(own: int, others: list[int]) -> None:
    found = surplus(own, others)
    assert 0 <= found <= own
    if found:
        assert own - found == share([own, *others]) + 1


@given(st.integers(0, 2000), counts)
def test_giving_up_the_surplus_never_makes_a_replica_the_emptiest(own: int, others: list[int]) -> None:
    if found := surplus(own, others):
        assert own - found > min(others)


@given(st.integers(0, 2000), counts, st.randoms(use_true_random=False))
def test_whoever_takes_up_what_was_given_up_the_giver_has_no_more_to_give(
    own: int, others: list[int], chance: Random
) -> None:
    found = surplus(own, others)
    after = list(others)
    for _ in range(found):
        after[chance.randrange(len(after))] += 1
    assert surplus(own - found, after) == 0


@given(st.integers(0, 2000), counts)
def test_more_streams_elsewhere_never_mean_that_more_is_given_up(own: int, others: list[int]) -> None:
    assert surplus(own, [count + 1 for count in others]) <= surplus(own, others)
