from __future__ import annotations

from smc.api.limits import MOST_PEERS, Limiter, Limits, Rate


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_calls_come_at_the_rate() -> None:
    clock = Clock()
    limiter = Limiter(Limits(peer=Rate(2, 3), overall=Rate(100, 100)), clock)
    assert [limiter.admit("a") for _ in range(3)] == [0, 0, 0]
    assert limiter.admit("a") == 0.5
    clock.now += 0.5
    assert limiter.admit("a") == 0
    assert limiter.admit("a") == 0.5


def test_one_peer_is_refused_and_the_others_are_not() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(100, 100)), Clock())
    assert limiter.admit("a") == 0
    assert limiter.admit("a") > 0
    assert limiter.admit("b") == 0


def test_what_one_peer_is_refused_is_not_taken_from_all() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(1, 2)), Clock())
    for _ in range(50):
        limiter.admit("a")
    assert limiter.admit("b") == 0


def test_all_together_are_bounded_however_many_they_are() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(1, 10)), Clock())
    assert sum(limiter.admit(f"peer-{n}") == 0 for n in range(100)) == 10


def test_a_long_pause_fills_no_more_than_the_burst() -> None:
    clock = Clock()
    limiter = Limiter(Limits(peer=Rate(1, 2), overall=Rate(100, 100)), clock)
    limiter.admit("a")
    clock.now += 3600
    assert [limiter.admit("a") == 0 for _ in range(3)] == [True, True, False]


def test_the_peers_that_are_remembered_are_bounded() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(1e9, 1e9)), Clock())
    for n in range(MOST_PEERS + 100):
        limiter.admit(str(n))
    assert len(limiter._peers) == MOST_PEERS
