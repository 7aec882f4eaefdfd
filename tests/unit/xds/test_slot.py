"""A slot holds the newest Snapshot and no other, and tells who listens. All in virtual time."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

import pytest

from smc.xds.slot import Slot
from smc.xds.snapshot import Snapshot

pytestmark = pytest.mark.looptime


def time() -> float:
    return asyncio.get_running_loop().time()


async def test_an_empty_slot_gives_nothing() -> None:
    slot = Slot()
    assert slot.take() is None
    assert not slot.waiting


async def test_the_newest_snapshot_wins() -> None:
    slot, newest = Slot(), Snapshot()
    slot.put(Snapshot(), 1)
    await asyncio.sleep(5)
    slot.put(newest, 2)
    offer = slot.take()
    assert offer is not None
    assert (offer.snapshot, offer.revision, offer.at) == (newest, 2, 5.0)


async def test_an_offer_is_taken_once() -> None:
    slot = Slot()
    slot.put(Snapshot(), 1)
    assert slot.waiting
    assert slot.take() is not None
    assert slot.take() is None
    assert not slot.waiting


async def test_what_was_replaced_is_held_by_nobody() -> None:
    slot, first = Slot(), Snapshot()
    gone = weakref.ref(first)
    slot.put(first, 1)
    del first
    slot.put(Snapshot(), 2)
    assert gone() is None


@pytest.mark.parametrize("what", [lambda s: s.put(Snapshot(), 1), lambda s: s.end("moved"), lambda s: s.wake()])
async def test_who_listens_is_told_of_whatever_happens(what: Callable[[Slot], None]) -> None:
    slot, told = Slot(), list[float]()
    slot.listen(lambda: told.append(time()))
    asyncio.get_running_loop().call_later(3, what, slot)
    await asyncio.sleep(4)
    assert told == [0, 3]


async def test_what_happened_before_anybody_listened_is_not_missed() -> None:
    slot, told = Slot(), list[float]()
    slot.wake()
    await asyncio.sleep(1)
    slot.listen(lambda: told.append(time()))
    await asyncio.sleep(1)
    assert told == [1]


async def test_what_is_put_is_told_before_anything_else_happens() -> None:
    slot, told = Slot(), list[bool]()
    slot.listen(lambda: told.append(slot.waiting))
    await asyncio.sleep(1)
    slot.put(Snapshot(), 1)
    assert told == [False, True]


async def test_what_else_happens_at_once_is_told_once_and_not_in_the_middle_of_it() -> None:
    slot, told = Slot(), list[str]()
    slot.listen(lambda: told.append(slot.ended))
    slot.wake()
    slot.end("moved")
    assert told == []
    await asyncio.sleep(1)
    assert told == ["moved"]


async def test_what_happens_while_it_is_told_is_told_again() -> None:
    slot, told = Slot(), list[float]()

    def listener() -> None:
        told.append(time())
        if len(told) < 3:
            slot.wake()

    slot.listen(listener)
    await asyncio.sleep(1)
    assert len(told) == 3


async def test_the_first_reason_to_end_stays() -> None:
    slot = Slot()
    slot.end("the workload was removed")
    slot.end("another replica has fewer streams")
    assert slot.ended == "the workload was removed"
