"""A slot holds the newest Snapshot and no other, and tells who listens. All in virtual time."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

import pytest

from smc.xds.slot import Offer, Slot
from smc.xds.snapshot import Snapshot

pytestmark = pytest.mark.looptime


def time() -> float:
    return asyncio.get_running_loop().time()


def offer(revision: int) -> Offer:
    return Offer(revision, time())


class Listening:
    """Notes what `see` sees whenever it decides, and "written" whenever it writes."""

    def __init__(self, see: Callable[[], object]) -> None:
        self._see = see
        self.seen: list[object] = []

    def decide(self) -> None:
        self.seen.append(self._see())

    def write(self) -> None:
        self.seen.append("written")


async def test_an_empty_slot_gives_nothing() -> None:
    slot = Slot()
    assert slot.take() is None
    assert not slot.waiting


async def test_the_newest_snapshot_wins() -> None:
    slot, newest = Slot(), Snapshot()
    slot.put(Snapshot(), offer(1))
    await asyncio.sleep(5)
    slot.put(newest, offer(2))
    assert slot.take() == (newest, Offer(2, 5.0))


async def test_an_offer_is_taken_once() -> None:
    slot = Slot()
    slot.put(Snapshot(), offer(1))
    assert slot.waiting
    assert slot.take() is not None
    assert slot.take() is None
    assert not slot.waiting


async def test_what_was_replaced_is_held_by_nobody() -> None:
    slot, first = Slot(), Snapshot()
    gone = weakref.ref(first)
    slot.put(first, offer(1))
    del first
    slot.put(Snapshot(), offer(2))
    assert gone() is None


@pytest.mark.parametrize(
    "what", [lambda s: (s.put(Snapshot(), offer(1)), s.write()), lambda s: s.end("moved"), lambda s: s.wake()]
)
async def test_who_listens_is_told_of_whatever_happens(what: Callable[[Slot], None]) -> None:
    slot, listener = Slot(), Listening(time)
    slot.listen(listener)
    asyncio.get_running_loop().call_later(3, what, slot)
    await asyncio.sleep(4)
    assert listener.seen == [0, "written", 3, "written"]


async def test_what_happened_before_anybody_listened_is_not_missed() -> None:
    slot, listener = Slot(), Listening(time)
    slot.put(Snapshot(), offer(1))
    slot.write()
    slot.wake()
    await asyncio.sleep(1)
    slot.listen(listener)
    await asyncio.sleep(1)
    assert listener.seen == [1, "written"]


async def test_what_is_put_is_decided_before_anything_else_happens_and_written_when_that_is_asked_for() -> None:
    slot = Slot()
    listener = Listening(lambda: slot.waiting)
    slot.listen(listener)
    await asyncio.sleep(1)
    assert listener.seen == [False, "written"]
    slot.put(Snapshot(), offer(1))
    assert listener.seen[2:] == [True]
    await asyncio.sleep(1)
    assert listener.seen[2:] == [True]
    slot.write()
    assert listener.seen[2:] == [True, "written"]


async def test_what_else_happens_at_once_is_told_once_and_not_in_the_middle_of_it() -> None:
    slot = Slot()
    listener = Listening(lambda: slot.ended)
    slot.listen(listener)
    slot.wake()
    slot.end("moved")
    assert listener.seen == []
    await asyncio.sleep(1)
    assert listener.seen == ["moved", "written"]


async def test_what_happens_while_it_is_told_is_told_again() -> None:
    slot = Slot()

    def see() -> None:
        if len(listener.seen) < 4:
            slot.wake()

    listener = Listening(see)
    slot.listen(listener)
    await asyncio.sleep(1)
    assert listener.seen == [None, "written"] * 3


async def test_the_first_reason_to_end_stays() -> None:
    slot = Slot()
    slot.end("the workload was removed")
    slot.end("another replica has fewer streams")
    assert slot.ended == "the workload was removed"
