"""One leader at a time, a quick successor, and a fence that no deposed leader passes. All in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import structlog

from cluster.election import Deposed, Election, Leadership
from cluster.kv import MOST_OPERATIONS, Ambiguous, Committed, Guard, KeyValue, Put, Refused, Rejected, Unavailable
from cluster.memory import MemoryKV, MemoryStore
from tests.unit.cluster.hostile import HostileKV

pytestmark = pytest.mark.looptime

KEY = "/m/leader"
EPOCH = "/m/epoch"
TTL = 6.0
LOCAL = TTL * 2 / 3


def now() -> float:
    return asyncio.get_running_loop().time()


class Candidate:
    """A replica that does nothing but lead."""

    def __init__(self, store: MemoryStore, name: str) -> None:
        self.name = name
        self.kv = HostileKV(store)
        self.fenced = 0
        self.terms: list[Leadership] = []
        self.began: list[float] = []
        self.ended: list[float] = []
        self.work: Callable[[Leadership], Awaitable[None]] = self._forever
        self.election = Election(self.kv, KEY, name, ttl=TTL, pinned=[EPOCH], on_fenced=self._on_fenced)
        self.task = asyncio.create_task(self.election.run(self._lead))

    def _on_fenced(self) -> None:
        self.fenced += 1

    async def _lead(self, leadership: Leadership) -> None:
        self.terms.append(leadership)
        self.began.append(now())
        try:
            await self.work(leadership)
        finally:
            self.ended.append(now())

    @staticmethod
    async def _forever(leadership: Leadership) -> None:
        await asyncio.Event().wait()

    @property
    def leading(self) -> bool:
        return self.election.leading

    @property
    def term(self) -> Leadership:
        return self.terms[-1]

    async def resign(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    async def crash(self) -> None:
        """End without a word to the store."""
        self.kv.disconnect()
        await self.resign()


class Cluster:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.kv = MemoryKV(self.store)
        self.candidates: list[Candidate] = []

    async def add(self, name: str) -> Candidate:
        candidate = Candidate(self.store, name)
        self.candidates.append(candidate)
        await asyncio.sleep(0.1)
        return candidate

    def held(self) -> KeyValue:
        item = self.store.get(KEY)
        assert item is not None
        return item

    def depose(self) -> None:
        """End the leader's lease, as the store does when the leader was away for too long."""
        self.store.revoke(self.held().lease)

    async def raise_epoch(self) -> None:
        await self.kv.transact([Put(EPOCH, b"again")])


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    await made.kv.transact([Put(EPOCH, b"1")])
    yield made
    for candidate in made.candidates:
        candidate.kv.hangs = set()
        await candidate.resign()


@asynccontextmanager
async def stopwatch(at_least: float, at_most: float) -> AsyncIterator[None]:
    began = now()
    yield
    assert at_least - 0.01 <= now() - began <= at_most + 0.01


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - whatever it is, it is not an event
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------------- who leads when


async def test_one_leads_and_the_others_wait(cluster: Cluster) -> None:
    one, two, three = [await cluster.add(name) for name in ("one", "two", "three")]
    await asyncio.sleep(10 * TTL)
    assert [c.leading for c in (one, two, three)] == [True, False, False]
    assert [len(c.terms) for c in (one, two, three)] == [1, 0, 0]
    assert await three.election.leader() == "one"
    assert one.term.revision == cluster.held().create_revision


async def test_nobody_leads_before_the_first_campaign() -> None:
    assert await Election(MemoryKV(), KEY, "one").leader() is None


async def test_a_crashed_leader_is_followed_within_its_ttl_and_two_seconds(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    await asyncio.sleep(17)
    await one.crash()
    async with stopwatch(TTL * 0.8 - 0.1, TTL + 2):
        await until(lambda: two.leading)


async def test_a_leader_that_resigns_is_followed_at_once(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    await one.resign()
    async with stopwatch(0, 0.1):
        await until(lambda: two.leading)
    assert one.ended[0] <= two.began[0]


async def test_a_leader_whose_store_hangs_while_it_resigns_does_not_hang_with_it(cluster: Cluster) -> None:
    one = await cluster.add("one")
    one.kv.hangs = {"revoke"}
    async with stopwatch(0, 2):
        await one.resign()


async def test_two_candidates_of_one_name_exclude_each_other(cluster: Cluster) -> None:
    one, two = await cluster.add("same"), await cluster.add("same")
    await asyncio.sleep(5 * TTL)
    assert (one.leading, two.leading) == (True, False)


async def test_a_slow_store_is_no_reason_to_change_the_leader(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    one.kv.delay = two.kv.delay = 0.5
    await asyncio.sleep(60 * TTL)
    assert len(one.terms) == 1
    assert two.terms == []


async def test_the_candidates_wait_for_a_key_that_came_back_with_its_lease_in_a_snapshot(cluster: Cluster) -> None:
    gone = await cluster.add("gone")
    snapshot = cluster.store.snapshot()
    await gone.crash()
    two = await cluster.add("two")
    await until(lambda: two.leading)
    cluster.store.restore(snapshot, cluster_id=2)
    async with stopwatch(TTL, TTL + 2):
        await until(lambda: len(two.terms) == 2)
    assert two.leading
    assert two.terms[0].reason


async def test_a_candidate_does_not_wait_for_its_own_key_that_came_back(cluster: Cluster) -> None:
    one = await cluster.add("one")
    snapshot = cluster.store.snapshot()
    await cluster.kv.transact([Put("/m/a", b"")])
    await asyncio.sleep(TTL)
    cluster.store.restore(snapshot)
    async with stopwatch(0, TTL / 5 + 0.2):
        await until(lambda: len(one.terms) == 2)
    assert "restored" in one.terms[0].reason


# ---------------------------------------------------------------------------------------------------- when a term ends


@pytest.mark.parametrize("how", ["disconnected", "silent", "silent proof"])
async def test_leading_ends_at_two_thirds_of_the_ttl_after_the_last_good_renewal_was_sent(
    cluster: Cluster, how: str
) -> None:
    one = await cluster.add("one")
    await asyncio.sleep(10 * TTL)
    one.kv.delay = 0.3
    renewals = one.kv.calls["renew"]
    await until(lambda: one.kv.calls["renew"] > renewals)
    sent = now()
    await asyncio.sleep(1)
    if how == "disconnected":
        one.kv.disconnect()
    else:
        one.kv.hangs = {"renew"} if how == "silent" else {"list"}
    await until(lambda: not one.leading)
    assert now() - sent == pytest.approx(LOCAL, abs=0.05)
    await asyncio.sleep(0.01)
    assert one.ended == [pytest.approx(now(), abs=0.05)]
    assert "not renewed in time" in one.term.reason


async def test_a_leader_that_loses_the_store_stops_before_another_begins(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    await asyncio.sleep(7)
    one.kv.disconnect()
    async with stopwatch(0, TTL + 2):
        await until(lambda: two.leading)
    assert two.began[0] - one.ended[0] >= TTL / 3 - 0.1
    one.kv.reconnect()
    await asyncio.sleep(5 * TTL)
    assert (one.leading, two.leading) == (False, True)


async def test_without_the_store_nobody_leads_and_with_it_again_exactly_one(cluster: Cluster) -> None:
    candidates = [await cluster.add(name) for name in ("one", "two", "three")]
    for candidate in candidates:
        candidate.kv.disconnect()
    await asyncio.sleep(LOCAL)
    assert not any(candidate.leading for candidate in candidates)
    await asyncio.sleep(30)
    assert sum(len(candidate.terms) for candidate in candidates) == 1
    for candidate in candidates:
        candidate.kv.reconnect()
    async with stopwatch(0, 3):
        await until(lambda: any(candidate.leading for candidate in candidates))
    await asyncio.sleep(TTL)
    assert [candidate.leading for candidate in candidates].count(True) == 1


async def test_a_confirmed_renewal_of_a_lease_that_is_gone_keeps_nobody_in_office(cluster: Cluster) -> None:
    one = await cluster.add("one")
    one.kv.renewals_lie = True
    two = await cluster.add("two")
    cluster.depose()
    await until(lambda: two.leading)
    # It has been told nothing, and believes in itself; the store does not.
    assert one.leading
    with pytest.raises(Deposed):
        await one.term.transact([Put("/m/a", b"from one")])
    assert cluster.store.get("/m/a") is None
    assert one.fenced == 1


async def test_a_candidate_that_cannot_renew_leaves_the_office_to_one_that_can(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    one.kv.hangs = {"renew"}
    await asyncio.sleep(10 * TTL)
    assert (len(one.terms), len(two.terms)) == (1, 1)
    assert two.leading


async def test_a_confirmed_renewal_is_checked_by_reading(cluster: Cluster) -> None:
    one = await cluster.add("one")
    one.kv.renewals_lie = True
    await cluster.add("two")
    cluster.depose()
    async with stopwatch(0, TTL / 5 + 0.1):
        await until(lambda: not one.leading)


async def test_a_raised_epoch_ends_a_term_that_writes_nothing(cluster: Cluster) -> None:
    one = await cluster.add("one")
    await cluster.raise_epoch()
    async with stopwatch(0, TTL / 5 + 0.2):
        await until(lambda: len(one.terms) == 2)
    assert EPOCH in one.terms[0].reason
    assert isinstance(await one.term.transact([Put("/m/a", b"")]), Committed)


async def test_the_work_has_ended_before_the_same_candidate_leads_again(cluster: Cluster) -> None:
    one = await cluster.add("one")

    async def slow_to_end(leadership: Leadership) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(3 * TTL)
            with pytest.raises(Deposed):
                await leadership.transact([Put("/m/a", b"")])

    one.work = slow_to_end
    for _ in range(3):
        cluster.depose()
        await asyncio.sleep(5 * TTL)
    assert len(one.terms) >= 3
    for ended, began in zip(one.ended, one.began[1:], strict=False):
        assert ended <= began
    one.work = one._forever
    await asyncio.sleep(5 * TTL)


async def test_work_may_still_write_while_its_leader_resigns(cluster: Cluster) -> None:
    one = await cluster.add("one")

    async def tidy(leadership: Leadership) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await leadership.transact([Put("/m/tidy", b"")])

    one.work = tidy
    cluster.depose()
    await until(lambda: len(one.terms) == 2)
    await one.resign()
    assert cluster.store.get("/m/tidy") is not None
    assert cluster.store.get(KEY) is None


# ------------------------------------------------------------------------------------------------- work that goes wrong


async def test_work_that_fails_lets_another_lead_and_says_why(cluster: Cluster) -> None:
    one = await cluster.add("one")
    two = await cluster.add("two")

    async def broken(leadership: Leadership) -> None:
        raise ZeroDivisionError("the cause")

    one.work = broken
    with structlog.testing.capture_logs() as logs:
        cluster.depose()
        await until(lambda: two.leading)
        await two.resign()
        await until(lambda: len(one.terms) == 3)
    failures = [entry for entry in logs if entry["event"] == "the leader's work failed; resigning"]
    assert {(entry["log_level"], entry["exc_info"]) for entry in failures} == {("error", True)}
    assert not one.task.done()


async def test_work_that_fails_again_and_again_is_tried_less_and_less_often(cluster: Cluster) -> None:
    one = await cluster.add("one")

    async def broken(leadership: Leadership) -> None:
        raise Unavailable("the cloud is away")

    one.work = broken
    cluster.depose()
    with structlog.testing.capture_logs() as logs:
        await asyncio.sleep(600)
    assert 15 < len(one.terms) < 60
    failures = [entry for entry in logs if entry["event"] == "the leader's work failed; resigning"]
    assert {(entry["log_level"], entry["reason"]) for entry in failures} == {("warning", "the cloud is away")}
    assert cluster.store.get(KEY) is None


@pytest.mark.parametrize("cancels_itself", [False, True])
async def test_work_that_returns_resigns(cluster: Cluster, cancels_itself: bool) -> None:
    one = await cluster.add("one")

    async def short(leadership: Leadership) -> None:
        if cancels_itself:
            raise asyncio.CancelledError

    one.work = short
    cluster.depose()
    await until(lambda: len(one.terms) == 2)
    await asyncio.sleep(0.1)
    assert cluster.store.get(KEY) is None
    one.work = one._forever
    await until(lambda: one.leading)


async def test_work_that_fails_while_it_is_cancelled_does_not_keep_a_candidate_from_resigning(cluster: Cluster) -> None:
    one = await cluster.add("one")

    async def stubborn(leadership: Leadership) -> None:
        async def child() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ZeroDivisionError

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(child())

    one.work = stubborn
    cluster.depose()
    await until(lambda: len(one.terms) == 2)
    await asyncio.sleep(1)
    async with stopwatch(0, 1):
        await one.resign()
    assert one.task.cancelled()
    assert cluster.store.get(KEY) is None


# ------------------------------------------------------------------------------------------------------------ the fence


async def test_what_a_leader_writes_carries_its_fence(cluster: Cluster) -> None:
    one = await cluster.add("one")
    assert isinstance(await one.term.transact([Put("/m/a", b"1")]), Committed)
    cluster.depose()
    with pytest.raises(Deposed, match=KEY):
        await one.term.transact([Put("/m/a", b"2")])
    item = cluster.store.get("/m/a")
    assert item is not None
    assert item.value == b"1"
    assert one.fenced == 1
    assert not one.leading


async def test_a_raised_epoch_fences_the_leader(cluster: Cluster) -> None:
    one = await cluster.add("one")
    await cluster.raise_epoch()
    with pytest.raises(Deposed, match=EPOCH):
        await one.term.transact([Put("/m/a", b"")])
    assert one.fenced == 1


async def test_an_epoch_that_appears_fences_a_leader_that_saw_none(cluster: Cluster) -> None:
    store = MemoryStore()
    one = Candidate(store, "one")
    cluster.candidates.append(one)
    await asyncio.sleep(0.1)
    assert isinstance(await one.term.transact([Put("/m/a", b"")]), Committed)
    await MemoryKV(store).transact([Put(EPOCH, b"1")])
    with pytest.raises(Deposed):
        await one.term.transact([Put("/m/a", b"")])


async def test_a_guard_of_the_callers_that_fails_deposes_nobody(cluster: Cluster) -> None:
    one = await cluster.add("one")
    outcome = await one.term.transact([Put("/m/a", b"")], [Guard("/m/a", mod_revision=77), Guard("/m/b", value=b"x")])
    assert outcome == Rejected(cluster.store.revision, {"/m/a": None, "/m/b": None})
    assert one.leading
    assert one.fenced == 0
    assert isinstance(await one.term.transact([Put("/m/a", b"")], [Guard("/m/a", create_revision=0)]), Committed)


async def test_the_fence_decides_first_when_the_callers_guard_fails_too(cluster: Cluster) -> None:
    one = await cluster.add("one")
    cluster.depose()
    with pytest.raises(Deposed):
        await one.term.transact([Put("/m/a", b"")], [Guard("/m/a", mod_revision=77)])


async def test_a_transaction_that_leaves_no_room_for_the_fence_is_refused_and_deposes_nobody(cluster: Cluster) -> None:
    one = await cluster.add("one")
    guards = [Guard(f"/m/{number}", create_revision=0) for number in range(MOST_OPERATIONS - 1)]
    with pytest.raises(Refused, match="at most 126"):
        await one.term.transact([Put("/m/a", b"")], guards)
    assert isinstance(await one.term.transact([Put("/m/a", b"")], guards[:-1]), Committed)
    assert one.leading


async def test_a_leader_that_was_frozen_writes_nothing_and_does_not_even_ask(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    asked = one.kv.calls["transact"]
    loop = asyncio.get_running_loop()
    loop.setup_looptime(start=loop.time() + 3 * TTL)  # type: ignore[attr-defined]
    with pytest.raises(Deposed, match="in time"):
        await one.term.transact([Put("/m/a", b"")])
    assert one.kv.calls["transact"] == asked
    await until(lambda: one.leading or two.leading)
    assert one.terms[0].reason


async def test_a_leader_whose_clock_stood_still_is_fenced_at_its_first_write(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    one.kv.hangs = {"renew", "revoke"}
    frozen = one.term
    await until(lambda: two.leading)
    frozen.until, frozen.reason = now() + TTL, ""
    with pytest.raises(Deposed):
        await frozen.transact([Put("/m/a", b"")])
    assert one.fenced == 1
    assert cluster.store.get("/m/a") is None


async def test_a_write_that_was_on_its_way_all_the_time_is_fenced_when_it_arrives(cluster: Cluster) -> None:
    one, two = await cluster.add("one"), await cluster.add("two")
    one.kv.late = asyncio.Event()
    writing = asyncio.create_task(one.term.transact([Put("/m/a", b"")]))
    await asyncio.sleep(0.1)
    one.kv.disconnect()
    await until(lambda: two.leading)
    one.kv.reconnect()
    one.kv.late.set()
    with pytest.raises(Deposed):
        await writing
    assert cluster.store.get("/m/a") is None


# --------------------------------------------------------------------------------------------------------- lost answers


async def test_a_campaign_whose_answer_is_lost_is_won_by_reading_back(cluster: Cluster) -> None:
    one = Candidate(cluster.store, "one")
    cluster.candidates.append(one)
    one.kv.answers_lost = 1
    async with stopwatch(0, 0.1):
        await until(lambda: one.leading)
    assert one.term.revision == cluster.held().create_revision
    assert [item.key for batch in cluster.store._state.log for item in batch.puts] == [EPOCH, KEY]
    assert isinstance(await one.term.transact([Put("/m/a", b"")]), Committed)


async def test_a_campaign_whose_request_is_lost_is_tried_again(cluster: Cluster) -> None:
    one = Candidate(cluster.store, "one")
    cluster.candidates.append(one)
    one.kv.requests_lost = 3
    async with stopwatch(0, 0.2):
        await until(lambda: one.leading)


async def test_a_campaign_that_cannot_be_read_back_leaves_no_key_to_wait_for(cluster: Cluster) -> None:
    one = Candidate(cluster.store, "one")
    cluster.candidates.append(one)
    one.kv.answers_lost = 1
    one.kv.delay = 0.1
    await until(lambda: cluster.store.get(KEY))
    one.kv.refuses = {"revoke", "get"}
    await asyncio.sleep(1)
    assert not one.leading
    assert cluster.held()
    one.kv.refuses, one.kv.delay = set(), 0.0
    async with stopwatch(0, 2.1):
        await until(lambda: one.leading)


# ------------------------------------------------------------------------------------------------------------ all of it


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_each_write_was_made_by_the_holder_at_its_revision(cluster: Cluster, seed: int) -> None:
    chance = random.Random(seed)
    committed = 0

    def writes(candidate: Candidate) -> Callable[[Leadership], Awaitable[None]]:
        async def work(leadership: Leadership) -> None:
            nonlocal committed
            while True:
                await asyncio.sleep(chance.random() / 2)
                try:
                    await leadership.transact([Put(f"/m/w/{candidate.name}", str(leadership.revision).encode())])
                    committed += 1
                except (Unavailable, Ambiguous):
                    continue

        return work

    candidates = [await cluster.add(name) for name in ("one", "two", "three")]
    for candidate in candidates:
        candidate.work = writes(candidate)
    cluster.depose()
    for _ in range(250):
        candidate = chance.choice(candidates)
        match chance.choices(
            ["away", "back", "hang", "slow", "lie", "depose", "epoch", "wait"], [6, 10, 4, 2, 3, 2, 1, 20]
        )[0]:
            case "away":
                candidate.kv.disconnect()
            case "back":
                candidate.kv.reconnect()
                candidate.kv.hangs, candidate.kv.delay, candidate.kv.renewals_lie = set(), 0.0, False
            case "hang":
                candidate.kv.hangs = set(chance.sample(["renew", "list", "transact", "get", "grant", "revoke"], 3))
            case "slow":
                candidate.kv.delay = chance.random()
            case "lie":
                candidate.kv.renewals_lie = True
            case "depose" if cluster.store.get(KEY) is not None:
                cluster.depose()
            case "epoch":
                await cluster.raise_epoch()
            case _:
                await asyncio.sleep(chance.random() * TTL)
    for candidate in candidates:
        candidate.kv.reconnect()
        candidate.kv.hangs, candidate.kv.delay, candidate.kv.renewals_lie = set(), 0.0, False
    # The longest pause of one whose work failed is half a minute.
    await asyncio.sleep(45)
    assert [candidate.leading for candidate in candidates].count(True) == 1

    terms = {term.revision: term.name for candidate in candidates for term in candidate.terms}
    holder, writes_seen = 0, 0
    for batch in cluster.store._state.log:
        for item in batch.puts:
            if item.key == KEY:
                assert holder == 0
                holder = item.create_revision
            elif item.key.startswith("/m/w/"):
                writes_seen += 1
                assert int(item.value) == holder
                assert item.key == f"/m/w/{terms[holder]}"
        if KEY in batch.deletes:
            holder = 0
    assert writes_seen >= committed > 100
    assert len(terms) > 5
