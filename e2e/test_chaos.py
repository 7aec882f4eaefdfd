"""Ten minutes of random faults under traffic: no request fails that policy allows, and none passes that it denies.

Three things go on at once, in an order that one seed draws: faults of replicas, of etcd and of Envoys; changes of
policy; and what has to do with trust: certificates, who joins, who leaves, who is revoked. Requests of nine kinds are
sent all the time, each once, and every answer is held to a model of the rules (`kit/verdicts.py`).

What a right answer is:

- A change is in doubt from before `smc apply` is started until its `--wait` has returned, every proxy is connected and
  in sync, and MARGIN has gone by. Meanwhile the old and the new rule may be met, and nothing else. `--wait` alone is
  not enough here: it says openly that it does not wait for a proxy that is connected to no replica, and faults make
  such.
- A killed Envoy takes along what is in its hands. So each service has a TrafficPolicy that asks for retries, as who
  runs idempotent requests would write it: a server's Envoy may then be killed, stopped or ended without a failure.
- A caller's own Envoy is the only way that it has: nothing is asked from before it is killed until another one in its
  place says that it is ready.
- A revoked proxy is shut out within seconds, and the others of its identity have seconds to follow; who does not is
  refused on purpose, until it does. So whoever is revoked while others share the identity, is so between two faults.
- Who is shut out hears of nothing. Let in again, it goes by the routes from before until it is known to be in sync.

Once a minute everything pauses but the traffic, and the mesh has to come to rest: `smc check` finds nothing in error,
all proxies are in sync, one replica leads, and nothing is in quarantine. The logs are looked at once, at the end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from e2e.kit import invariants
from e2e.kit.mesh import Mesh, eventually
from e2e.kit.story import Done, Pulse, Run, story, table
from e2e.kit.verdicts import History, Lane, Question, Rules, Wrong
from smc.demo import bookstore, programs
from smc.demo.bookstore import Placement
from smc.demo.local import MESH, Plan
from smc.demo.processes import ProcessFailed
from smc.demo.programs import Replica, Sidecar

SECONDS = float(os.environ.get("E2E_CHAOS_SECONDS", "60"))
"""A minute for who waits for it; `EVERYTHING` in `.ci/run`, to find what no other test does."""
ROUND = 60.0
"""Seconds between two times that the mesh has to come to rest."""
EVERYTHING = 600.0
"""Seconds in which every action has its turn; on a machine that needs longer for it, this goes on until it had."""
PATIENCE = 120.0
"""Seconds that anything may take here before it counts as never: how fast things are is for other tests to say."""
MARGIN = 1.0
"""Seconds from when every proxy has ACKed a change until no request can meet the old rule: Envoy's workers take it over
in milliseconds, and on a busy machine an answer may be read late."""
ANSWER = 60.0
"""Seconds that an answer may take: a stopped Envoy answers once it goes on, and this process may be late itself."""
AGAIN = r"ended with [56]:"
"""What `smc` says when nobody answers, or somebody lags behind."""
NOT_THERE = "ended with 3:"
"""What it says at the second attempt to take away what the first one has taken away before it failed."""
LIFE = "2m"
"""The short life of workload certificates: renewed after a minute, which no time without a control plane lasts here."""

BUYER = bookstore.BOOKBUYER
SECOND_BUYER = Placement("bookbuyer", "bookbuyer-2", "bookbuyer")
THIEF = bookstore.BOOKTHIEF
READER = Placement("bookreader", "bookreader", "bookreader")
CALLERS = (BUYER, SECOND_BUYER, THIEF, READER)
SERVERS = tuple(bookstore.store(version, number) for version in ("v1", "v2") for number in (0, 1))
VERSIONS = ("v1", "v2")
GRANTED = frozenset((caller.service_account, version) for caller in (BUYER, READER) for version in VERSIONS)


def _questions() -> Iterable[Question]:
    def ask(caller: Placement, host: str, rate: float, **rest: Any) -> Question:
        return Question(caller.workload, caller.service_account, host, rate, **rest)

    yield ask(BUYER, "bookstore", 20)
    yield ask(BUYER, "bookstore", 10, connections="new")
    yield ask(BUYER, "bookstore", 10, tester=True)
    yield ask(BUYER, "bookstore-v1", 10, connections="new")
    yield ask(BUYER, "bookstore", 10, path="/admin")
    yield ask(SECOND_BUYER, "bookstore-v2", 10)
    yield ask(THIEF, "bookstore", 15)
    yield ask(THIEF, "bookstore-v2", 10, connections="new")
    yield ask(READER, "bookstore", 15)


# --------------------------------------------------------------------------------------------------------- manifests


def _target(account: str, version: str) -> str:
    rule = {"kind": "HTTPRouteGroup", "name": "bookstore", "matches": ["books"]}
    return _manifest(
        "access.smi-spec.io/v1alpha3", "TrafficTarget", f"{account}-to-{version}",
        destination={"kind": "ServiceAccount", "name": f"bookstore-{version}", "namespace": "bookstore"},
        rules=[rule],
        sources=[{"kind": "ServiceAccount", "name": account, "namespace": account}],
    )  # fmt: skip


def _routes(name: str, *matches: dict[str, Any]) -> str:
    return _manifest("specs.smi-spec.io/v1alpha4", "HTTPRouteGroup", name, matches=list(matches))


def _mode(mode: str) -> str:
    return _manifest("smc.io/v1alpha1", "NamespaceConfig", "default", mode=mode)


def _treatment(service: str, **more: Any) -> str:
    retries = {"attempts": 3, "on": ["connect-failure", "refused-stream", "reset"]}
    return _manifest("smc.io/v1alpha1", "TrafficPolicy", service, service=service, retries=retries, **more)


def _manifest(api_version: str, kind: str, name: str, **spec: Any) -> str:
    metadata = {"name": name, "namespace": "bookstore"}
    return json.dumps({"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec})


BOOKS = _routes(
    "bookstore",
    {"name": "books", "pathRegex": "/books", "methods": ["GET"]},
    {"name": "admin", "pathRegex": "/admin", "methods": ["GET"]},
)
TESTERS = _routes("testers", {"name": "testers", "headers": [{"x-tester": "yes"}]})
TESTERS_SPLIT = _manifest(
    "split.smi-spec.io/v1alpha4", "TrafficSplit", "testers",
    service="bookstore",
    matches=[{"kind": "HTTPRouteGroup", "name": "testers"}],
    backends=[{"service": "bookstore-v2", "weight": 1}],
)  # fmt: skip
SERVICES = ("bookstore", "bookstore-v1", "bookstore-v2")
FIRST = (BOOKS, TESTERS, *(_target(*grant) for grant in sorted(GRANTED)), *(_treatment(name) for name in SERVICES))


# ------------------------------------------------------------------------------------------------------------- world


class PatientMesh(Mesh):
    """Whose operator tries the same again when told that nobody answers, or that somebody lags behind."""

    async def smc(self, *arguments: str) -> str:
        return (await self.attempts(*arguments))[0]

    async def attempts(self, *arguments: str) -> tuple[str, int]:
        """What the command printed, and at which attempt.

        Raises:
            ProcessFailed: it was refused, or PATIENCE has gone by.
        """
        settings = {"SMC_MESH": MESH, "SMC_CREDENTIAL": str(self.credential), "NO_COLOR": "1"}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        for attempt in itertools.count(1):
            try:
                output = await self.children.run(
                    f"smc {' '.join(arguments)}", programs.smc(*arguments), env=settings, timeout=PATIENCE
                )
            except ProcessFailed as e:
                if attempt > 1 and NOT_THERE in str(e):
                    return "", attempt
                if not re.search(AGAIN, str(e)) or loop.time() > deadline:
                    raise
            else:
                return output, attempt
            await asyncio.sleep(0.5)
        raise AssertionError("it counts for ever")

    async def revision(self) -> int:
        """Of the store, once it answers."""
        found = 0

        async def answers() -> bool:
            nonlocal found
            url = f"http://{self.etcd.endpoints[0]}/v3/kv/range"
            try:
                async with self.children.http.post(url, json={"key": "Lw==", "count_only": True}) as answer:
                    found = int((await answer.json())["header"]["revision"])
            except (aiohttp.ClientError, TimeoutError):
                return False
            return True

        await eventually(answers, timeout=PATIENCE, every=0.2, what="etcd answers")
        return found


class World:
    """The mesh, the rules that hold for it, and what all actions share."""

    def __init__(self, mesh: PatientMesh) -> None:
        self.mesh = mesh
        self.history = History(Rules(grants=GRANTED))
        self.lanes: list[Lane] = []
        self.out: set[str] = set()
        """Workloads whose proxies are revoked, or on their way out: nobody waits for them."""
        self.servers = {placement.workload for placement in SERVERS}
        """Workloads that every caller should have as endpoints."""
        self.calm = asyncio.Lock()
        """Held during each fault, and by whoever needs that there is none."""
        self.actions: list[Done] = []
        self.start = self.now
        """When the first request was sent, on the loop's clock; until then, when this was made."""
        self._files = 0

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def change(self, changes: dict[str, Any], *command: str) -> float:
        """Run a command after which other rules hold; returns the seconds until they did."""
        begun = self.now
        self.history.begin(begun, changes)
        before = await self.mesh.revision()
        _, attempts = await self.mesh.attempts(*command, "--wait=60s")
        await self.settled(before if attempts == 1 else None)
        took = self.now - begun
        await asyncio.sleep(MARGIN)
        self.history.settle(self.now, changes)
        return took

    async def apply(self, changes: dict[str, Any], *manifests: str) -> float:
        return await self.change(changes, "apply", "-f", await self._file(*manifests))

    async def _file(self, *manifests: str) -> str:
        self._files += 1
        path = self.mesh.directory / f"chaos-{self._files}.yaml"
        await asyncio.to_thread(path.write_text, "\n---\n".join(manifests))
        return str(path)

    async def settled(self, before: int | None = None) -> float:
        """Every proxy is connected and has ACKed all that was written until now; returns the seconds that it took.

        Where one was not, it may since have come to a replica that is behind, or its replica was stopped and is in sync
        with what it knows: then something more is written, and waited for as a whole. So it is but for what was waited
        for already; `before` is the store's revision before that was written.
        """
        begun = self.now
        if before is None or not await self._in_sync(before):
            before = await self.mesh.revision()
            barrier = _routes("barrier", {"name": "nothing", "pathRegex": f"/{self._files}", "methods": ["GET"]})
            await self.mesh.smc("apply", "-f", await self._file(barrier), "--wait=60s")
            await self.until(lambda: self._in_sync(before), "every proxy is in sync", every=1.0)
        return self.now - begun

    async def _in_sync(self, after: int) -> bool:
        """Whether every proxy has ACKed something newer than a revision of the store, and all that there is."""
        found = json.loads(await self.mesh.smc("proxy", "status", "-o", "json"))["proxies"]
        acked = {str(one["name"]): int(one["acked"]) for one in found if one["state"] == "synced"}
        return all(acked.get(workload, 0) > after for workload in self.mesh.sidecars.keys() - self.out)

    async def whole(self) -> bool:
        """Whether every caller's Envoy has every server's as an endpoint, and finds it well."""
        wanted = {self.mesh.sidecars[workload].address for workload in self.servers}
        for caller in CALLERS:
            if caller.workload in self.out:
                continue
            try:
                clusters = await self.mesh.sidecars[caller.workload].admin.clusters()
            except (aiohttp.ClientError, TimeoutError):
                return False
            hosts = clusters.get("bookstore/bookstore|80", ())
            if not wanted <= {host.address.partition(":")[0] for host in hosts if host.healthy}:
                return False
        return True

    async def until(self, check: Callable[[], Awaitable[bool]], what: str, *, every: float = 0.2) -> float:
        return await eventually(check, timeout=PATIENCE, every=every, what=what)

    @asynccontextmanager
    async def held(self, workload: str) -> AsyncIterator[None]:
        """The requests of one caller."""
        async with AsyncExitStack() as stack:
            for lane in self.lanes:
                if lane.question.caller == workload:
                    await stack.enter_async_context(lane.held())
            yield

    @property
    def wrong(self) -> list[Wrong]:
        return [one for lane in self.lanes for one in lane.wrong]

    def assert_right(self) -> None:
        wrong = len(self.wrong)
        assert not wrong, f"{wrong} wrong answers"

    async def at_rest(self) -> None:
        """The mesh comes to what it should be while nothing is done to it."""
        rest = Done("come_to_rest", self.now)
        self.actions.append(rest)
        for replica in self.mesh.replicas:
            await replica.until_ready(PATIENCE)
        await self.settled()
        await self.until(self.whole, "every caller has every server")
        rest.converged = self.now - rest.begun
        assert json.loads(await self.mesh.smc("check", "-o", "json"))["ok"]
        stored = await self.mesh.etcd.read(f"/smc/{MESH}/")
        quarantined = [key for key in stored if key.startswith(f"/smc/{MESH}/quarantine/")]
        assert not quarantined
        assert await self.mesh.leader_key() is not None
        self.assert_right()
        rest.took = self.now - rest.begun


Action = Callable[[], Awaitable[float]]
"""Returns the seconds that the mesh had to converge."""


class Track:
    """Takes one action after the other, until it is told to end: all of them in an order of chance, and again."""

    PAUSE = (0.5, 3.0)
    """Seconds between two actions."""

    def __init__(self, world: World, choice: random.Random) -> None:
        self.world, self.mesh = world, world.mesh
        self.choice = choice
        self._left: list[Action] = []
        """Of this turn."""
        self._doing = Done("", 0.0)

    def actions(self) -> Sequence[Action]:
        raise NotImplementedError

    def possible(self, _action: Action) -> bool:
        """Whether it can be taken now."""
        return True

    def _next(self) -> Action:
        found = next(filter(self.possible, self._left), None)
        if found is None:
            self._left = list(self.actions())
            self.choice.shuffle(self._left)
            found = next(filter(self.possible, self._left))
        self._left.remove(found)
        return found

    def _to(self, *what: object) -> None:
        """Say to whom the action is done, and how."""
        self._doing.to = " ".join([self._doing.to, *map(str, what)]).strip()

    def _seconds(self, least: float, most: float) -> float:
        """So long that something lasts, by chance."""
        seconds = self.choice.uniform(least, most)
        self._to(f"for {seconds:.1f} s")
        return seconds

    async def run(self, until: float) -> None:
        while self.world.now < until:
            action = self._next()
            self._doing = done = Done(action.__name__, self.world.now)
            self.world.actions.append(done)
            done.converged = await action()
            done.took = self.world.now - done.begun
            self.world.assert_right()
            await asyncio.sleep(self.choice.uniform(*self.PAUSE))


# ------------------------------------------------------------------------------------------------------------ faults


class Faults(Track):
    """Of replicas, of etcd, of Envoys: one at a time, each until the mesh has got over it."""

    def actions(self) -> Sequence[Action]:
        return (
            self.kill_replicas, self.stop_replicas, self.restart_replica, self.kill_all_replicas, self.stop_etcd,
            self.kill_server_envoy, self.end_server_envoy, self.stop_server_envoy, self.kill_server_sidecar,
            self.kill_caller_envoy, self.stop_caller_envoy, self.restart_caller_sidecar,
        )  # fmt: skip

    async def kill_replicas(self) -> float:
        return await self._kill(await self._some())

    async def kill_all_replicas(self) -> float:
        return await self._kill(self.mesh.replicas)

    async def _kill(self, replicas: Sequence[Replica]) -> float:
        async with self.world.calm:
            self._to(*(replica.name for replica in replicas))
            pids = [replica.process.pid for replica in replicas]
            async with asyncio.TaskGroup() as tasks:
                for replica in replicas:
                    tasks.create_task(replica.kill())
            assert not any(replica.process.alive for replica in replicas)
            await asyncio.sleep(self._seconds(0, 8))
            for replica in replicas:
                await replica.start()
            assert not {replica.process.pid for replica in replicas} & set(pids)
            return await self._recovered()

    async def stop_replicas(self) -> float:
        async with self.world.calm:
            replicas = await self._some(most=3)
            self._to(*(replica.name for replica in replicas))
            for replica in replicas:
                replica.process.pause()
            await asyncio.sleep(self._seconds(1, 12))
            for replica in replicas:
                replica.process.resume()
            return await self._recovered()

    async def restart_replica(self) -> float:
        async with self.world.calm:
            (replica,) = await self._some(most=1)
            self._to(replica.name)
            replica.process.terminate()
            await replica.process.wait()
            assert replica.process.returncode == 0
            await replica.start()
            return await self._recovered()

    async def stop_etcd(self) -> float:
        async with self.world.calm:
            (member,) = self.mesh.etcd.members
            member.pause()
            await asyncio.sleep(self._seconds(1, 8))
            member.resume()
            return await self._recovered()

    async def kill_server_envoy(self) -> float:
        return await self._end(self._server(), signal.SIGKILL)

    async def end_server_envoy(self) -> float:
        return await self._end(self._server(), signal.SIGTERM)

    async def _end(self, sidecar: Sidecar, number: signal.Signals) -> float:
        async with self.world.calm:
            await self._replace(sidecar, number)
            return await self._recovered()

    async def kill_caller_envoy(self) -> float:
        sidecar = self._caller()
        async with self.world.calm:
            async with self.world.held(sidecar.workload):
                await self._replace(sidecar, signal.SIGKILL)
            return await self._recovered()

    async def stop_server_envoy(self) -> float:
        return await self._stop(self._server())

    async def stop_caller_envoy(self) -> float:
        """What is asked meanwhile is answered once it goes on."""
        return await self._stop(self._caller())

    async def _stop(self, sidecar: Sidecar) -> float:
        async with self.world.calm:
            with sidecar.stopped():
                await asyncio.sleep(self._seconds(1, 6))
            return await self._recovered()

    async def kill_server_sidecar(self) -> float:
        """`smc proxy run` itself; its Envoy dies with it."""
        async with self.world.calm:
            sidecar = self._server()
            await sidecar.process.kill()
            await sidecar.process.start()
            await sidecar.until_ready(PATIENCE)
            return await self._recovered()

    async def restart_caller_sidecar(self) -> float:
        sidecar = self._caller()
        async with self.world.calm:
            async with self.world.held(sidecar.workload):
                await sidecar.process.stop()
                await sidecar.process.start()
                await sidecar.until_ready(PATIENCE)
            return await self._recovered()

    async def _replace(self, sidecar: Sidecar, number: signal.Signals) -> None:
        """Its Envoy ends by this signal, and another one in its place is ready."""
        pid = sidecar.envoy_pid
        assert pid
        os.kill(pid, number)

        async def back() -> bool:
            return sidecar.envoy_pid not in (0, pid) and (sidecar.directory / "ready").exists()

        await self.world.until(back, f"{sidecar.workload} has another Envoy")

    async def _recovered(self) -> float:
        begun = self.world.now
        for replica in self.mesh.replicas:
            await replica.until_ready(PATIENCE)
        await self.world.settled()
        await self.world.until(self.world.whole, "every caller has every server")
        return self.world.now - begun

    async def _some(self, most: int = 2) -> list[Replica]:
        """Some replicas, half of the time with the one that leads."""
        leader = await self.mesh.leader(PATIENCE)
        others = [replica for replica in self.mesh.replicas if replica is not leader]
        self.choice.shuffle(others)
        found = [leader, *others] if self.choice.random() < 0.5 else [*others, leader]
        return found[: self.choice.randint(1, most)]

    def _server(self) -> Sidecar:
        return self._one_of(SERVERS)

    def _caller(self) -> Sidecar:
        """One that is never shut out: its proxy would not become ready again."""
        return self._one_of((BUYER, SECOND_BUYER, THIEF))

    def _one_of(self, placements: Sequence[Placement]) -> Sidecar:
        workload = self.choice.choice(placements).workload
        self._to(workload)
        return self.mesh.sidecars[workload]


# ------------------------------------------------------------------------------------------------------------ policy


class Policy(Track):
    """Who may do what, where requests go, and how they are treated."""

    def actions(self) -> Sequence[Action]:
        return (
            self.grant_or_withdraw, self.grant_or_withdraw, self.weigh, self.weigh, self.send_testers_elsewhere,
            self.change_mode, self.treat, self.add_service, self.break_file,
        )  # fmt: skip

    async def grant_or_withdraw(self) -> float:
        account = self.choice.choice((THIEF, THIEF, READER, BUYER)).service_account
        grant = (account, self.choice.choice(VERSIONS))
        grants = self.world.history.newest.grants
        self._to(*grant, "withdrawn" if grant in grants else "granted")
        if grant in grants:
            name = f"{account}-to-{grant[1]}"
            return await self.world.change(
                {"grants": grants - {grant}}, "delete", "traffictarget", name, "-n", "bookstore"
            )
        return await self.world.apply({"grants": grants | {grant}}, _target(*grant))

    async def weigh(self) -> float:
        weights = self.choice.choice(((100, 0), (0, 100), (50, 50), (1, 9), None))
        self._to(weights)
        if weights is not None:
            return await self.world.apply({"weights": weights}, bookstore.split(*weights))
        if self.world.history.newest.weights is None:
            return 0.0
        return await self.world.change({"weights": None}, "delete", "trafficsplit", "bookstore", "-n", "bookstore")

    async def send_testers_elsewhere(self) -> float:
        self._to(not self.world.history.newest.testers)
        if self.world.history.newest.testers:
            return await self.world.change({"testers": False}, "delete", "trafficsplit", "testers", "-n", "bookstore")
        return await self.world.apply({"testers": True}, TESTERS_SPLIT)

    async def change_mode(self) -> float:
        enforced = not self.world.history.newest.enforced
        mode = "enforcing" if enforced else self.choice.choice(("audit", "permissive"))
        self._to(mode)
        return await self.world.apply({"enforced": enforced}, _mode(mode))

    async def treat(self) -> float:
        more = self.choice.choice(
            (
                {},
                {"timeout": "60s"},
                {"fault": {"delay": {"duration": "100ms", "percent": 20}}},
                {"limits": {"maxRequests": 1000}},
                {"healthCheck": {"interval": "500ms"}},
            )
        )
        service = self.choice.choice(SERVICES)
        self._to(service, json.dumps(more))
        return await self.world.apply({}, _treatment(service, **more))

    async def add_service(self) -> float:
        """A service that nobody asks for comes and goes, as files."""
        text = bookstore.services().partition("---")[0].replace("name: bookstore", "name: annex")
        self.mesh.write("annex", text)
        begun = self.world.now
        await self.world.until(lambda: self._knows_annex(True), "the new service is there")
        converged = self.world.now - begun
        self.mesh.write("annex", None)
        await self.world.until(lambda: self._knows_annex(False), "the new service is gone")
        return converged

    async def _knows_annex(self, there: bool) -> bool:
        try:
            clusters = await self.mesh.sidecars[BUYER.workload].admin.clusters()
        except (aiohttp.ClientError, TimeoutError):
            return False
        return ("bookstore/annex|80" in clusters) == there

    async def break_file(self) -> float:
        """A file of a server is no YAML for a while: what it said before goes on."""
        placement = self.choice.choice(SERVERS)
        self._to(placement.workload)
        self.mesh.write(placement.workload, "apiVersion: [smc.io\n")
        await asyncio.sleep(self._seconds(1, 6))
        self.mesh.write(
            placement.workload, bookstore.workload(placement, self.mesh.sidecars[placement.workload].address)
        )
        return 0.0


# ------------------------------------------------------------------------------------------------------------- trust


class Trust(Track):
    """Certificates and their issuers, who joins, who leaves, who is revoked."""

    MOST = 2
    """Newcomers at a time."""

    def __init__(self, world: World, choice: random.Random) -> None:
        super().__init__(world, choice)
        self._newcomers: list[Placement] = []
        self._number = 10
        self._short = False

    def actions(self) -> Sequence[Action]:
        return (
            self.rotate_intermediate, self.rotate_root, self.change_certificate_life, self.join, self.join, self.leave,
            self.revoke_newcomer, self.revoke_identity, self.revoke_caller,
        )  # fmt: skip

    def possible(self, action: Action) -> bool:
        if action == self.join:
            return len(self._newcomers) < self.MOST
        return action not in (self.leave, self.revoke_newcomer) or bool(self._newcomers)

    async def rotate_intermediate(self) -> float:
        return await self._rotate("--intermediate")

    async def rotate_root(self) -> float:
        return await self._rotate("--root")

    async def _rotate(self, of: str) -> float:
        begun = self.world.now
        lines = await self.mesh.smc("cert", "rotate", of, "--timeout", "110s", "-o", "json")
        last = json.loads(lines.splitlines()[-1])
        assert last["done"]
        assert last["leftBehind"] == []
        return self.world.now - begun

    async def change_certificate_life(self) -> float:
        self._short = not self._short
        self._to(LIFE if self._short else "24h")
        return await self.world.apply({}, bookstore.mesh_config(LIFE if self._short else "24h"))

    async def join(self) -> float:
        self._number += 1
        placement = self.choice.choice(
            (
                bookstore.store("v1", self._number),
                bookstore.store("v2", self._number),
                Placement("bookbuyer", f"bookbuyer-{self._number}", "bookbuyer"),
            )
        )
        self._to(placement.workload)
        begun = self.world.now
        await self.mesh.add(placement)
        self._newcomers.append(placement)
        if placement.version:
            self.world.servers.add(placement.workload)
            await self.world.until(self.world.whole, "every caller has the newcomer")
        return self.world.now - begun

    async def leave(self) -> float:
        placement = self._choose()
        async with self.world.calm:
            return await self._take_away(placement)

    async def revoke_newcomer(self) -> float:
        """Others share its identity: they and their callers lose nothing, and it gets nothing more."""
        placement = self._choose()
        workload = placement.workload
        async with self.world.calm:
            await self.mesh.send(4, source=workload)  # whatever comes of it: it has connections from then on
            self.world.out.add(workload)
            self.world.servers.discard(workload)
            begun = self.world.now
            await self.mesh.smc("cert", "revoke", "--proxy", workload, "--wait=60s")
            await self.world.settled()
            took = self.world.now - begun
            await asyncio.sleep(MARGIN + self._seconds(0, 2))
            if not placement.version:  # a server still reaches itself
                passed = [one for one in await self.mesh.send(20, source=workload) if one.status == 200]
                assert not passed, f"{len(passed)} of 20 requests of {workload}, which is revoked, were let through"
            await self._take_away(placement)
        return took

    async def revoke_identity(self) -> float:
        account = READER.service_account
        identity = ("--identity", f"{READER.namespace}/{account}")
        self.world.out.add(READER.workload)
        took = await self.world.change({"revoked": frozenset({account})}, "cert", "revoke", *identity)
        await asyncio.sleep(self._seconds(1, 5))
        return took + await self._let_in("cert", "revoke", *identity, "--undo")

    async def revoke_caller(self) -> float:
        """The only one of its identity; it joins again with another token.

        It does so between two faults: a proxy that finds no replica when it starts goes on with what it has, which is
        right for all but a revoked one.
        """
        sidecar = self.mesh.sidecars[READER.workload]
        self.world.out.add(READER.workload)
        took = await self.world.change(
            {"revoked": frozenset({READER.service_account})}, "cert", "revoke", "--proxy", READER.workload
        )
        await asyncio.sleep(self._seconds(1, 5))
        token = (await self.mesh.smc("token", "create", f"proxy/{READER.workload}")).strip()
        async with self.world.held(READER.workload), self.world.calm:
            self.world.history.begin(self.world.now, {"revoked": frozenset()})
            await sidecar.process.stop()
            sidecar.process.env["SMC_TOKEN"] = token
            await sidecar.process.start()
            await sidecar.until_ready(PATIENCE)
        return took + await self._passes_again()

    async def _let_in(self, *command: str) -> float:
        self.world.history.begin(self.world.now, {"revoked": frozenset()})
        await self.mesh.smc(*command)
        return await self._passes_again()

    async def _passes_again(self) -> float:
        """The reader's proxy is as the others again: it is in sync, and has every server."""
        begun = self.world.now
        self.world.out.discard(READER.workload)
        await self.world.settled()
        await self.world.until(self.world.whole, "who was let in again has every server")
        await self.world.until(self._uses_all, "who was let in again uses what it was sent")
        took = self.world.now - begun
        await asyncio.sleep(MARGIN)
        self.world.history.settle(self.world.now, {"revoked": None})
        return took

    async def _uses_all(self) -> bool:
        """A Cluster is in use only once it has connected anew to every endpoint."""
        return not await self.mesh.sidecars[READER.workload].admin.pending()

    def _choose(self) -> Placement:
        placement = self._newcomers.pop(self.choice.randrange(len(self._newcomers)))
        self._to(placement.workload)
        return placement

    async def _take_away(self, placement: Placement) -> float:
        """The file goes first; who was told by it goes once no caller has it any more."""
        workload = placement.workload
        self.world.out.add(workload)
        self.world.servers.discard(workload)
        address = self.mesh.sidecars[workload].address
        begun = self.world.now
        self.mesh.write(workload, None)
        if placement.version:
            await self.world.until(lambda: self._forgotten(address), f"no caller has {workload}")
        took = self.world.now - begun
        await asyncio.sleep(MARGIN)
        await self.mesh.sidecars.pop(workload).process.stop()
        if placement.version:
            await self.mesh.apps.pop(workload).process.stop()
        return took

    async def _forgotten(self, address: str) -> bool:
        for caller in CALLERS:
            if caller.workload in self.world.out:
                continue
            try:
                clusters = await self.mesh.sidecars[caller.workload].admin.clusters()
            except (aiohttp.ClientError, TimeoutError):
                return False
            if any(host.address.startswith(f"{address}:") for hosts in clusters.values() for host in hosts):
                return False
        return True


@pytest.mark.timeout(SECONDS * 2 + 900)
async def test_no_request_is_judged_wrongly_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        run = Run("e2e/test_chaos.py", invariants.seed(), SECONDS)
    chance = random.Random(run.seed)
    world = World(PatientMesh(Plan(workloads=(*CALLERS, *SERVERS), manifests=FIRST, patience=PATIENCE)))
    tracks = [track(world, random.Random(chance.random())) for track in (Faults, Policy, Trust)]
    pulse = Pulse()
    try:
        async with world.mesh, pulse:
            await world.settled()
            await world.until(world.whole, "every caller has every server")
            world.start = world.now
            await _hurt(world, tracks)
            world.assert_right()
        assert sum(lane.certain for lane in world.lanes) > 0.5 * sum(lane.answered for lane in world.lanes)
    except BaseException:
        sys.stdout.write(f"{story(run, world.actions, world.wrong, start=world.start, now=world.now)}\n")
        raise
    finally:
        with capsys.disabled():
            sys.stdout.write(f"{table(world.actions, world.lanes)}\n{pulse.told(world.start)}\n")


async def _hurt(world: World, tracks: Sequence[Track]) -> None:
    """All tracks at once while requests are sent, a ROUND after the other."""
    async with AsyncExitStack() as lanes:
        for question in _questions():
            proxy = world.mesh.sidecar(question.caller).outbound
            lane = Lane(question, proxy, world.history, timeout=ANSWER)
            world.lanes.append(await lanes.enter_async_context(lane))
        while (left := world.start + SECONDS - world.now) > 0 or (SECONDS >= EVERYTHING and _missing(world, tracks)):
            until = world.now + (min(ROUND, left) if left > 0 else ROUND)
            async with asyncio.TaskGroup() as tasks:
                for track in tracks:
                    tasks.create_task(track.run(until), name=type(track).__name__)
            await world.at_rest()


def _missing(world: World, tracks: Sequence[Track]) -> set[str]:
    """Actions that were never taken."""
    actions = {action.__name__ for track in tracks for action in track.actions()}
    return actions - {one.name for one in world.actions}
