"""The story says what it saw: each claim can fail, and does when the mesh is not what the demo says it is."""

from __future__ import annotations

import asyncio
import io
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from smc.demo import bookstore
from smc.demo.bookstore import Placement
from smc.demo.figures import Figures
from smc.demo.local import LocalMesh
from smc.demo.processes import Ended
from smc.demo.show import line, picture
from smc.demo.story import BUYER, STORES, THIEF, Claim, Story
from smc.demo.wire import Roots

pytestmark = pytest.mark.looptime
RATE = 50
APART = 0.3
"""Seconds that may lie between what an application has counted and what an Envoy has, on a machine that is busy."""
READER, EAVESDROPPER = bookstore.READER.workload, bookstore.EAVESDROPPER.workload
TOLD_TRULY = "it goes on, --wait says that all have it, and they have"
NEW_ROOT = "every certificate on the wire leads to one new root, trusted alone"


class Machine:
    """A replica that can be killed and started."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = SimpleNamespace(alive=True, pid=4711)

    async def start(self) -> None:
        self.process.alive = True

    async def kill(self) -> None:
        self.process.alive = False

    async def until_ready(self) -> None:
        await asyncio.sleep(1)


@dataclass
class World:
    """A mesh of arithmetic: what it counts follows from the time and from how it is told to misbehave."""

    thief_gets: int = 403
    thief_reaches: float = 0.0
    denies: bool = True
    splits: bool = True
    elects: bool = True
    follows: bool = True
    reconnects: bool = True
    rotates: bool = True
    names_laggard: bool = True
    wait_lies: bool = False
    root_replaced: bool = True
    old_root_trusted: bool = False
    grpc_splits: bool = True
    grpc_denies: bool = True
    cuts_off: bool = True
    shuts_out: bool = True
    twin_is_hurt: bool = False
    told_apart: random.Random | None = None
    """Draws whether the applications or the Envoys are the later ones to say what they have counted."""
    hurt: Callable[[World], bool] = lambda _: False
    replicas: list[Machine] = field(default_factory=lambda: [Machine(f"replica-{n}") for n in range(3)])

    def __post_init__(self) -> None:
        self.share, self.serial, self.since = 0.0, "one", 0.0
        self.counts = Figures(Counter(), Counter(), Counter(), Counter(), Counter(), {}, {}, {})
        self.newcomers: list[str] = []
        self.sidecars = {workload: self.sidecar(workload) for workload in (BUYER, THIEF, *STORES)}
        self.revoked, self.stuck, self.asleep, self.root_serial = "", 0.0, False, "old"
        self.reading, self.quotes_share = False, 0.0

    def sidecar(self, workload: str) -> Any:
        async def stat(name: str) -> int:
            assert name == "control_plane.connected_state"
            if workload == self.revoked or (self.revoked and workload == STORES[0] and self.twin_is_hurt):
                return int(not self.cuts_off and workload == self.revoked)
            return int(self.reconnects)

        return SimpleNamespace(admin=SimpleNamespace(stat=stat), stopped=self._stopped)

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        self._count()
        self.stuck, self.asleep = self.share, True
        yield
        self._count()
        self.asleep = False

    async def apply_and_wait(self, text: str, seconds: float) -> Ended:
        await self.apply(text)
        if not self.asleep:
            return Ended(0, "", "")
        await asyncio.sleep(seconds)
        who = THIEF if self.names_laggard else BUYER
        return Ended(6, "", f"warning: {who} at replica-1: pending\nerror: after 2 s 3 of 4 proxies have ACKed it\n")

    async def roots(self) -> Roots:
        trusted = {"old", self.root_serial} if self.old_root_trusted else {self.root_serial}
        return Roots({"127.0.0.1:15010": self.root_serial}, {BUYER: frozenset(trusted)})

    async def ended(self, *arguments: str) -> Ended:
        assert arguments[:3] == ("cert", "rotate", "--root")
        await asyncio.sleep(2)
        self._count()
        self.root_serial = "new" if self.root_replaced else "old"
        return Ended(0, "", "")

    async def smc(self, *arguments: str) -> str:
        assert arguments[:3] == ("cert", "revoke", "--proxy")
        self._count()
        self.revoked = arguments[3]
        return ""

    def write(self, name: str, text: str) -> None:
        assert name == "quotes"
        assert "kind: Service" in text

    async def add_proxyless(self, *placements: Placement) -> None:
        assert {placement.sidecar for placement in placements} == {"grpc"}

    async def read(self, _: Placement, *, rate: float) -> None:
        assert rate == RATE
        self._count()
        self.reading = True

    async def apply(self, text: str) -> None:
        self._count()
        if weights := re.findall(r"weight: (\d+)", text):
            v1, v2 = map(int, weights)
            if "name: quotes" in text:
                self.quotes_share = v2 / (v1 + v2) if self.grpc_splits else 0.0
            else:
                self.share = v2 / (v1 + v2) if self.splits else 0.0
                self.stuck = self.stuck if self.asleep or self.wait_lies else self.share
        if "20s" in text and self.rotates:
            self.serial = "two"

    async def visit(self, _name: str, *, rate: float) -> None:
        assert rate == RATE

    async def add(self, placement: Placement) -> Any:
        self.newcomers.append(placement.workload)
        return self.sidecar(placement.workload)

    async def leader_key(self) -> tuple[str, int] | None:
        living = [n for n, replica in enumerate(self.replicas) if replica.process.alive or not self.elects]
        return (f"replica-{living[0]}", living[0] + 10) if living else None

    async def leader(self) -> Machine:
        key = await self.leader_key()
        assert key is not None
        return self.replicas[key[1] - 10]

    async def figures(self) -> Figures:
        found = self._counted()
        if self.told_apart is None:
            return found
        await asyncio.sleep(APART)
        later = self._counted()
        return (
            replace(later, denied=found.denied)
            if self.told_apart.random() < 0.5
            else replace(found, denied=later.denied)
        )

    def _counted(self) -> Figures:
        self._count()
        found = self.counts
        return Figures(
            Counter(found.sent),
            Counter(found.answered),
            Counter(found.failed),
            Counter(found.reached),
            Counter(found.denied),
            {},
            dict.fromkeys(self.sidecars, (self.serial,)),
            {},
        )

    def _count(self) -> None:
        now = asyncio.get_running_loop().time()
        requests = round((now - self.since) * RATE)
        self.since += requests / RATE
        counts = self.counts
        v2 = round(requests * self.share)
        counts.sent[BUYER] += requests
        if self.hurt(self) and requests:
            counts.failed[BUYER] += 1
            requests -= 1
        counts.answered[BUYER, 200, "v1"] += requests - v2
        counts.answered[BUYER, 200, "v2"] += v2
        counts.answered[THIEF, self.thief_gets, "v1" if self.thief_gets == 200 else ""] += requests
        tried_v2 = round(requests * self.stuck)
        if self.denies:
            counts.denied[STORES[0]] += requests - tried_v2
            counts.denied[STORES[1]] += tried_v2
        counts.reached[STORES[0], "spiffe://t/ns/bookthief/sa/bookthief"] += round(requests * self.thief_reaches)
        buyer = "spiffe://t/ns/bookbuyer/sa/bookbuyer"
        counts.reached[STORES[0], buyer] += requests - v2
        for newcomer in self.newcomers if self.follows else ():
            if newcomer != self.revoked or not self.shuts_out:
                counts.reached[newcomer, buyer] += v2 if "v2" in newcomer else requests - v2
        if self.reading:
            asked_v2 = round(requests * self.quotes_share)
            counts.answered[READER, "OK", "v1"] += requests - asked_v2
            counts.answered[READER, "OK", "v2"] += asked_v2
            refused = ("PERMISSION_DENIED", "") if self.grpc_denies else ("OK", "v1")
            counts.answered[EAVESDROPPER, *refused] += requests
            if not self.grpc_denies:
                counts.reached["quotes/quotes-v1", "spiffe://t/ns/quotes/sa/eavesdropper"] += requests


async def _told(world: World, chapter: str = "") -> list[Claim]:
    story = Story(cast(LocalMesh, world), rate=RATE)
    await story.begin()
    return [claim for told in story.chapters if chapter in told.title async for claim in told.tell()]


async def test_every_claim_holds_of_a_mesh_that_does_what_it_should() -> None:
    claims = await _told(World())
    assert [claim.text for claim in claims if not claim.held] == []
    assert len(claims) >= 30
    assert all(re.search(r"\d", claim.figure) for claim in claims)


@pytest.mark.parametrize("seed", range(5))
async def test_a_claim_of_both_holds_although_applications_and_envoys_count_to_different_moments(seed: int) -> None:
    claims = await _told(World(told_apart=random.Random(seed)))
    assert [claim.text for claim in claims if not claim.held] == []


@pytest.mark.parametrize(
    ("world", "claims"),
    [
        ({"thief_gets": 200}, {"the bookthief is denied"}),
        ({"thief_reaches": 0.1}, {"no request of the bookthief reached a bookstore"}),
        ({"denies": False}, {"it was the bookstore's Envoys that denied it", TOLD_TRULY}),
        (
            {"splits": False},
            {
                "traffic follows the split 50/50 within 1 s",
                "traffic follows the split 0/100 within 1 s",
                "a new endpoint still arrives",
                "all others have it meanwhile",
                TOLD_TRULY,
            },
        ),
        ({"elects": False}, {"another replica leads"}),
        ({"follows": False}, {"a new endpoint still arrives", "within 5 s it has no stream"}),
        ({"reconnects": False}, {"every Envoy found back", "its twin keeps its stream"}),
        ({"rotates": False}, {"every workload has another certificate"}),
        ({"names_laggard": False}, {"smc apply --wait names the one that does not answer, and why"}),
        ({"wait_lies": True}, {TOLD_TRULY}),
        ({"root_replaced": False}, {NEW_ROOT}),
        ({"old_root_trusted": True}, {NEW_ROOT}),
        ({"grpc_splits": False}, {"its calls follow the split 0/100 within 1 s"}),
        ({"grpc_denies": False}, {"the eavesdropper is denied", "no call of the eavesdropper reached a server's code"}),
        ({"cuts_off": False}, {"within 5 s it has no stream"}),
        ({"shuts_out": False}, {"after 5 s no request reaches it, and its twin serves them"}),
        ({"twin_is_hurt": True}, {"its twin keeps its stream"}),
    ],
)
async def test_a_claim_that_does_not_hold_is_named(world: dict[str, Any], claims: set[str]) -> None:
    assert {claim.text for claim in await _told(World(**world)) if not claim.held} == claims


@pytest.mark.parametrize(
    ("chapter", "when"),
    [
        ("bookbuyer", lambda world: world.since > 1),
        ("v1 to v2", lambda world: world.share == 0.5),
        ("leader", lambda world: world.newcomers),
        ("Every replica", lambda world: not any(replica.process.alive for replica in world.replicas)),
        ("rotate", lambda world: world.serial == "two"),
        ("stopped", lambda world: world.asleep),
        ("root", lambda world: world.root_serial == "new"),
        ("revoked", lambda world: world.revoked),
    ],
)
async def test_one_failed_request_is_told_in_every_chapter(chapter: str, when: Callable[[World], bool]) -> None:
    claims = await _told(World(hurt=when), chapter)
    assert "every request of the bookbuyer is answered" in {claim.text for claim in claims if not claim.held}


async def test_the_table_shows_verdicts_the_leader_the_dead_who_serves_whom_and_who_is_not_in_sync() -> None:
    world = World()
    world.share = 0.5
    before = await world.figures()
    await asyncio.sleep(1)
    pending = {BUYER: "", THIEF: "1 refused"}
    happened = replace(await world.figures() - before, heard={BUYER: "cluster/1/replica-2"}, pending=pending)
    await world.replicas[1].kill()
    mesh = SimpleNamespace(replicas=world.replicas, sidecars=world.sidecars, visitors=[BUYER, THIEF])
    console = Console(width=120, file=io.StringIO())

    console.print(picture(cast(LocalMesh, mesh), happened, "replica-2"))

    rows = [re.findall(r"[\w/.-]+", line) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["replica-1", "dead"] in rows
    assert ["replica-2", "pid", "4711", "yes"] in rows
    assert [BUYER, "50", "25", "25", "0", "0", "0"] in rows
    assert [THIEF, "0", "0", "0", "50", "0", "0"] in rows
    assert [BUYER, "replica-2", "yes", "one"] in rows
    assert [THIEF, "-", "no", "1", "refused", "one"] in rows


async def test_a_claim_and_its_figure_are_one_line_where_there_is_room() -> None:
    claim = Claim("it is so", held=True, figure="3 of 3")
    assert line(claim).plain == line(claim, 25).plain == "  ok    it is so   3 of 3"
    assert line(claim, 24).plain.splitlines() == ["  ok    it is so", "        3 of 3"]
    longest = [one for one in await _told(World()) for part in line(one, 80).plain.splitlines() if len(part) > 80]
    assert longest == []


async def test_the_table_says_what_happens_in_a_second_however_long_it_looked() -> None:
    world = World()
    before = await world.figures()
    await asyncio.sleep(3)
    mesh = SimpleNamespace(replicas=(), sidecars=(), visitors=[BUYER])
    console = Console(width=120, file=io.StringIO())

    console.print(picture(cast(LocalMesh, mesh), await world.figures() - before, "nobody", 3.0))

    assert re.search(rf"{BUYER}\W+50\W+50\W+0", console.file.getvalue())  # type: ignore[attr-defined]
