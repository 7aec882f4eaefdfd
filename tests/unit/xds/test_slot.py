"""A slot holds the newest Snapshot and no other, and wakes who waits. All in virtual time."""

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
async def test_who_waits_is_woken_by_whatever_happens(what: Callable[[Slot], None]) -> None:
    slot = Slot()
    asyncio.get_running_loop().call_later(3, what, slot)
    await slot.changed(None)
    assert time() == 3


async def test_what_happened_before_the_wait_is_not_missed() -> None:
    slot = Slot()
    slot.wake()
    await slot.changed(None)
    assert time() == 0


async def test_each_change_wakes_once() -> None:
    slot = Slot()
    slot.put(Snapshot(), 1)
    slot.put(Snapshot(), 2)
    await slot.changed(None)
    await slot.changed(9)
    assert time() == 9


async def test_nothing_happens_until_the_deadline() -> None:
    slot = Slot()
    await slot.changed(7)
    assert time() == 7
    await slot.changed(2)
    assert time() == 7, "a deadline that has passed is no wait"


async def test_the_first_reason_to_end_stays() -> None:
    slot = Slot()
    slot.end("the workload was removed")
    slot.end("another replica has fewer streams")
    assert slot.ended == "the workload was removed"


async def test_cancelling_a_wait_is_not_swallowed() -> None:
    waiting = asyncio.create_task(Slot().changed(100))
    await asyncio.sleep(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
