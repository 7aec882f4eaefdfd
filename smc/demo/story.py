"""What the demo shows, as claims with figures. Each chapter does something to the mesh while the visitors go on.

Figures come from the applications and the Envoys; of SMC only its processes and its key in etcd are looked at.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from smc.demo import bookstore
from smc.demo.figures import Figures, is_fair
from smc.demo.local import LocalMesh

BUYER, THIEF = "bookbuyer/bookbuyer", "bookthief/bookthief"
STORES = ("bookstore/bookstore-v1", "bookstore/bookstore-v2")
SETTLE = 1.0
"""Seconds after which a change of policy must be in force."""
PATIENCE = 30.0
"""Seconds that anything slower may take."""
DOWN = 5.0
"""Seconds for which there is no control plane at all."""
LAG = 4.0
"""Seconds for which `--wait` waits for a proxy that does not answer."""
LAGGING = 6
"""What `smc apply --wait` ends with then."""
OUT = 5.0
"""Seconds after which a proxy that was revoked must be out."""
_LAGGARD = re.compile(r"^warning: (\S+) at \S+: (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that the demo says of the mesh, and whether it was so."""

    text: str
    held: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Chapter:
    name: str
    title: str
    tell: Callable[[], AsyncIterator[Claim]]


CHAPTERS = ("policy", "shift", "leader", "everyone", "rotation", "laggard", "root", "grpc", "revocation")
"""Their names, in order. None needs what another one did."""


class Story:
    """Walks a mesh through its chapters. `rate` is what each visitor asks for, in requests a second."""

    def __init__(self, mesh: LocalMesh, *, rate: float = 50.0, look: float = 4.0) -> None:
        """`look`: seconds for which traffic is counted before something is said about it."""
        self._mesh = mesh
        self._rate = rate
        self._look = look

    @property
    def chapters(self) -> tuple[Chapter, ...]:
        """To be told in this order."""
        titles = (
            ("Only the bookbuyer may buy", self.policy),
            ("Traffic moves from v1 to v2", self.shift),
            ("The leader is killed", self.leader),
            ("Every replica is killed, and comes back", self.everyone),
            ("Certificates rotate", self.rotation),
            ("An Envoy is stopped, and waited for", self.laggard),
            ("The root is replaced", self.root),
            ("gRPC programs without an Envoy", self.grpc),
            ("One of two proxies of an identity is revoked", self.revocation),
        )
        return tuple(Chapter(name, title, tell) for name, (title, tell) in zip(CHAPTERS, titles, strict=True))

    async def begin(self) -> None:
        """All traffic to v1, and the visitors come. Returns once the bookbuyer is served."""
        await self._mesh.apply(bookstore.split(100, 0))
        await self._mesh.visit("bookbuyer", rate=self._rate)
        await self._mesh.visit("bookthief", rate=self._rate)

        async def served() -> bool:
            happened = await self._watch(0.5)
            return set(happened.statuses(BUYER)) == {200}

        await self._until(served)

    async def policy(self) -> AsyncIterator[Claim]:
        # Nobody is asked at the same moment as anybody else: what was tried meanwhile was denied between wider looks.
        first = await self._mesh.figures()
        happened = await self._watch(self._look)
        around = await self._mesh.figures() - first
        yield _unhurt(happened)
        tried = happened.statuses(THIEF)
        yield Claim("the bookthief is denied", set(tried) == {403}, f"its requests by status: {_listed(tried)}")
        # What was under way at the first of them was denied before, and is told after.
        denied, spare = sum(around.denied[store] for store in STORES), 5
        yield Claim(
            "it was the bookstore's Envoys that denied it",
            denied >= tried.total() - spare > 0,
            f"{tried.total()} tried, meanwhile {denied} denied by their RBAC filters",
        )
        reached = happened.reached_by("/ns/bookthief/")
        yield Claim("no request of the bookthief reached a bookstore", reached == 0, f"{reached} reached one")

    async def shift(self) -> AsyncIterator[Claim]:
        for v1, v2 in ((100, 0), (50, 50), (0, 100)):
            before = await self._mesh.figures()
            await self._mesh.apply(bookstore.split(v1, v2))
            await asyncio.sleep(SETTLE)
            found = (await self._watch(self._look)).versions(BUYER)
            yield Claim(
                f"traffic follows the split {v1}/{v2} within {SETTLE:g} s",
                is_fair(found["v1"], found.total(), v1 / (v1 + v2)),
                f"{found['v1']} to v1, {found['v2']} to v2",
            )
            yield _unhurt(await self._mesh.figures() - before)

    async def leader(self) -> AsyncIterator[Claim]:
        mesh = self._mesh
        before, key = await mesh.figures(), await mesh.leader_key()
        killed = await mesh.leader()
        await killed.kill()

        async def elected() -> bool:
            now = await mesh.leader_key()
            return now is not None and now != key

        took = await self._until(elected)
        successor = await mesh.leader() if took is not None else None
        yield Claim(
            "another replica leads",
            successor is not None and successor is not killed,
            f"{killed.name} killed, {successor.name} after {took:.1f} s" if successor else f"none in {PATIENCE:g} s",
        )
        newcomer = bookstore.store("v2", 1)
        await mesh.add(newcomer)

        async def reached() -> int:
            return _served(await mesh.figures(), newcomer.workload)

        async def found() -> bool:
            return await reached() > 0

        await self._until(found)
        requests = await reached()
        yield Claim("a new endpoint still arrives", requests > 0, f"{requests} requests reached {newcomer.workload}")
        await killed.start()
        await killed.until_ready()
        yield _unhurt(await mesh.figures() - before)

    async def everyone(self) -> AsyncIterator[Claim]:
        mesh = self._mesh
        before = await mesh.figures()
        async with asyncio.TaskGroup() as tasks:
            for replica in mesh.replicas:
                tasks.create_task(replica.kill())
        alive = sum(replica.process.alive for replica in mesh.replicas)
        happened = await self._watch(DOWN)
        answers = happened.statuses(BUYER)
        yield Claim(
            "traffic flows without any control plane",
            alive == 0 and set(answers) == {200},
            f"{alive} replicas alive for {DOWN:g} s, answers by status: {_listed(answers)}",
        )
        for replica in mesh.replicas:
            await replica.start()
        for replica in mesh.replicas:
            await replica.until_ready()

        count = 0

        async def all_connected() -> bool:
            nonlocal count
            states = [sidecar.admin.stat("control_plane.connected_state") for sidecar in mesh.sidecars.values()]
            count = sum(await asyncio.gather(*states))
            return count == len(mesh.sidecars)

        await self._until(all_connected)
        yield Claim("every Envoy found back", count == len(mesh.sidecars), f"{count} of {len(mesh.sidecars)} connected")
        yield _unhurt(await mesh.figures() - before)

    async def rotation(self) -> AsyncIterator[Claim]:
        mesh = self._mesh
        before = await mesh.figures()
        # Whatever is older than half of its life is renewed.
        await mesh.apply(bookstore.mesh_config("20s"))

        def renewed(now: Figures) -> int:
            return sum(bool(now.serials[name]) and now.serials[name] != before.serials[name] for name in mesh.sidecars)

        async def all_renewed() -> bool:
            return renewed(await mesh.figures()) == len(mesh.sidecars)

        await self._until(all_renewed)
        await mesh.apply(bookstore.mesh_config("24h"))
        happened = await self._watch(self._look)
        now = await mesh.figures()
        yield Claim(
            "every workload has another certificate",
            renewed(now) == len(mesh.sidecars),
            f"{renewed(now)} of {len(mesh.sidecars)} Envoys present another serial number",
        )
        yield _unhurt(happened)
        yield _unhurt(now - before)

    async def laggard(self) -> AsyncIterator[Claim]:
        mesh = self._mesh
        await mesh.apply(bookstore.split(100, 0))
        before = await mesh.figures()
        with mesh.sidecar(THIEF).stopped():
            ended = await mesh.apply_and_wait(bookstore.split(0, 100), LAG)
            ahead = (await self._watch(0.5)).versions(BUYER)
        named = _LAGGARD.findall(ended.errors)
        yield Claim(
            "smc apply --wait names the one that does not answer, and why",
            ended.code == LAGGING and [who for who, _ in named] == [THIEF],
            f"exit code {ended.code}, {', '.join(f'{who}: {why}' for who, why in named) or 'nobody named'}",
        )
        yield Claim(
            "all others have it meanwhile",
            ahead["v1"] == 0 < ahead["v2"],
            f"requests of the bookbuyer: {ahead['v1']} to v1, {ahead['v2']} to v2",
        )
        again = await mesh.apply_and_wait(bookstore.split(0, 100), PATIENCE / 2)
        await asyncio.sleep(SETTLE)  # what it had sent on before then has been denied as well
        denied = (await self._watch(1.0)).denied
        old, new = (sum(count for name, count in denied.items() if name.startswith(store)) for store in STORES)
        yield Claim(
            "it goes on, --wait says that all have it, and they have",
            again.code == 0 and old == 0 < new,
            f"exit code {again.code}; requests of the bookthief denied by v1: {old}, by v2: {new}",
        )
        yield _unhurt(await mesh.figures() - before)

    async def root(self) -> AsyncIterator[Claim]:
        mesh = self._mesh
        before, old = await mesh.figures(), await mesh.roots()
        ended = await mesh.ended("cert", "rotate", "--root", "--timeout", f"{PATIENCE - 5:g}s")
        now = await mesh.roots()
        shown = sum(bool(root) and root not in old.all for root in now.shown.values())
        trusting = sum(bool(roots) and not roots & old.all for roots in now.trusted.values())
        yield Claim(
            "every certificate on the wire leads to one new root, trusted alone",
            len(now.all) == 1 and (shown, trusting) == (len(now.shown), len(now.trusted)),
            f"{shown} of {len(now.shown)} ports show it, {trusting} of {len(now.trusted)} Envoys trust it alone; "
            f"exit code {ended.code}",
        )
        await asyncio.sleep(self._look / 2)
        yield _unhurt(await mesh.figures() - before)

    async def grpc(self) -> AsyncIterator[Claim]:
        mesh = self._mesh
        reader, stranger = bookstore.READER.workload, bookstore.EAVESDROPPER.workload
        mesh.write("quotes", bookstore.quotes_services())
        await mesh.apply(bookstore.quotes_policy())
        await mesh.apply(bookstore.split(100, 0, "quotes"))
        await mesh.add_proxyless(*bookstore.QUOTES)
        for placement in (bookstore.READER, bookstore.EAVESDROPPER):
            await mesh.read(placement, rate=self._rate)

        async def served() -> bool:
            return set((await self._watch(0.5)).statuses(reader)) == {"OK"}

        await self._until(served)
        before = await mesh.figures()
        for v1, v2 in ((100, 0), (0, 100)):
            await mesh.apply(bookstore.split(v1, v2, "quotes"))
            await asyncio.sleep(SETTLE)
            found = (await self._watch(self._look / 2)).versions(reader)
            yield Claim(
                f"its calls follow the split {v1}/{v2} within {SETTLE:g} s",
                is_fair(found["v1"], found.total(), v1 / (v1 + v2)),
                f"{found['v1']} to v1, {found['v2']} to v2",
            )
        happened = await mesh.figures() - before
        answers, refused = happened.statuses(reader), happened.statuses(stranger)
        yield Claim("every call of the reader is answered", set(answers) == {"OK"}, _listed(answers))
        yield Claim("the eavesdropper is denied", set(refused) == {"PERMISSION_DENIED"}, _listed(refused))
        reached = (await mesh.figures()).reached_by("/sa/eavesdropper")
        yield Claim("no call of the eavesdropper reached a server's code", reached == 0, f"{reached} reached it")

    async def revocation(self) -> AsyncIterator[Claim]:
        mesh, loop = self._mesh, asyncio.get_running_loop()
        twin, second = STORES[0], bookstore.store("v1", 1)
        await mesh.apply(bookstore.split(100, 0))
        sidecar = await mesh.add(second)

        async def reached() -> bool:
            return _served(await self._watch(0.5), second.workload) > 0

        await self._until(reached)
        before = await mesh.figures()
        served = _served(before, second.workload)
        await mesh.smc("cert", "revoke", "--proxy", second.workload, "--reason", "it was stolen")
        start = loop.time()

        async def cut_off() -> bool:
            return await sidecar.admin.stat("control_plane.connected_state") == 0

        stream = await self._until(cut_off)
        yield Claim(
            f"within {OUT:g} s it has no stream",
            served > 0 and stream is not None and stream <= OUT,
            f"{served} requests served before, {'still there' if stream is None else f'cut off after {stream:.1f} s'}",
        )
        await asyncio.sleep(max(0.0, start + OUT - loop.time()))
        happened = await self._watch(self._look / 2)
        theirs, its = (_served(happened, workload) for workload in (twin, second.workload))
        yield Claim(
            f"after {OUT:g} s no request reaches it, and its twin serves them",
            its == 0 < theirs,
            f"{its} reached {second.workload}, {theirs} reached {twin}",
        )
        stays = 0

        async def connected() -> bool:
            nonlocal stays
            stays = await mesh.sidecar(twin).admin.stat("control_plane.connected_state")
            return stays == 1

        await self._until(connected)  # it may just be moving to another replica
        yield Claim("its twin keeps its stream", stays == 1, f"{stays} stream of {twin}")
        yield _unhurt(await mesh.figures() - before)

    async def _watch(self, seconds: float) -> Figures:
        """What happens in the next seconds."""
        before = await self._mesh.figures()
        await asyncio.sleep(seconds)
        return await self._mesh.figures() - before

    async def _until(self, check: Callable[[], Awaitable[bool]]) -> float | None:
        """Ask until it is so; the seconds that it took, or None: not within PATIENCE. The claim says which."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    if await check():
                        return loop.time() - start
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return None


def _unhurt(happened: Figures) -> Claim:
    answers = happened.statuses(BUYER)
    failed = happened.failed[BUYER]
    return Claim(
        "every request of the bookbuyer is answered",
        set(answers) == {200} and failed == 0,
        f"{failed} of {happened.sent[BUYER]} failed, answers by status: {_listed(answers)}",
    )


def _served(happened: Figures, workload: str) -> int:
    return sum(count for (store, _), count in happened.reached.items() if store == workload)


def _listed(counts: dict[int | str, int]) -> str:
    return ", ".join(f"{status}: {count}" for status, count in sorted(counts.items(), key=str)) or "none"
