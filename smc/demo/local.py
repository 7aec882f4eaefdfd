"""A whole mesh on this machine: etcd, replicas, sidecars and applications, each on a loopback address of its own.

All of it is real and started as users do: `smc init`, `smc serve`, `smc token create`, `smc proxy run`, `smc apply`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from smc.demo import bookstore, programs
from smc.demo.addresses import Addresses
from smc.demo.bookstore import Placement
from smc.demo.figures import Figures
from smc.demo.processes import Children, Ended, ProcessFailed
from smc.demo.programs import App, Etcd, EtcdProgram, Joined, Proxyless, Replica, Sidecar
from smc.demo.wire import Roots
from smc.errors import NotFound

MESH = "demo"
TRUST_DOMAIN = "demo.smc.internal"
CLI = 30.0
"""Seconds that one `smc` command may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a mesh is made of."""

    replicas: int = 3
    etcd_members: int = 1
    workloads: tuple[Placement, ...] = bookstore.BOOKSTORE
    manifests: tuple[str, ...] = (bookstore.policy(),)
    """Applied once everything runs."""
    replica_env: tuple[tuple[str, str], ...] = (("SMC_LEASE_TTL", "5s"),)
    proxy_env: tuple[tuple[str, str], ...] = ()
    patience: float = programs.START
    """Seconds that a proxy has to join and to get ready."""


class LocalMesh:
    """A mesh that runs while this is open. Enter it to start everything; leaving ends every process.

    The directory is the caller's: it holds the logs, and the private keys of a mesh that is gone.
    """

    def __init__(
        self, directory: Path, plan: Plan | None = None, *, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """`progress` is told of each step of the start."""
        self.plan = plan or Plan()
        self.directory = directory
        self.files = directory / "files"
        """What the leader reads Services and Workloads from."""
        self.etcd: Etcd
        self.replicas: list[Replica] = []
        self.sidecars: dict[str, Sidecar] = {}
        """By `<namespace>/<workload>`."""
        self.proxyless: dict[str, Proxyless] = {}
        """The same of gRPC programs, which have no Envoy."""
        self.apps: dict[str, App] = {}
        """By `<namespace>/<workload>`; only of those that serve something."""
        self.visitors: dict[str, App] = {}
        """By `<namespace>/<workload>`."""
        self.children = Children(directory)
        self._addresses = Addresses()
        self._progress = progress
        self._stack = AsyncExitStack()
        self._applied = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._addresses)
            await stack.enter_async_context(self.children)
            await self._start(await programs.find_etcd())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    @property
    def logs(self) -> Path:
        return self.children.logs

    async def _start(self, program: EtcdProgram) -> None:
        plan = self.plan
        self.files.mkdir(parents=True)
        self.etcd = Etcd(self.children, program, [self._addresses.take() for _ in range(plan.etcd_members)])
        kek = self.directory / "kek"
        for n in range(plan.replicas):
            self.replicas.append(
                programs.replica(
                    self.children,
                    f"replica-{n}",
                    self._addresses.take(),
                    etcd=self.etcd,
                    mesh=MESH,
                    kek_file=kek,
                    files=self.files,
                    env=dict(plan.replica_env),
                )
            )
        placed = [(placement, self._addresses.take()) for placement in plan.workloads]
        self.write("services", bookstore.services())
        for placement, address in placed:
            self.write(placement.workload, bookstore.workload(placement, address))
        self._progress(f"starting etcd {program.version}, {plan.etcd_members} member(s)")
        await self.etcd.start()
        self._progress("making the mesh: smc init")
        servers = [part for replica in self.replicas for part in ("--server", replica.api)]
        await self.smc(
            *("init", "--etcd", ",".join(self.etcd.endpoints), "--trust-domain", TRUST_DOMAIN),
            *("--kek-file", str(kek), "--out", str(self.credential), *servers),
        )
        self._progress(f"starting {plan.replicas} replicas: smc serve")
        await _together(
            *(self._start_replica(replica) for replica in self.replicas),
            *(self._start_store(placement, address) for placement, address in placed if placement.version),
        )
        self._progress(f"starting {len(placed)} sidecars: smc token create, smc proxy run")
        await _together(*(self._join(placement, address) for placement, address in placed))
        self._progress("applying policy: smc apply")
        for manifest in plan.manifests:
            await self.apply(manifest)

    @staticmethod
    async def _start_replica(replica: Replica) -> None:
        await replica.start()
        await replica.until_ready()

    async def _start_store(self, placement: Placement, address: str) -> None:
        app = programs.bookstore(self.children, placement.workload, address, placement.version)
        self.apps[placement.workload] = app
        await app.start()

    async def _join(self, placement: Placement, address: str, arguments: Sequence[str] = ()) -> None:
        sidecar = programs.sidecar(
            self.children,
            placement.workload,
            address,
            token=await self._token(placement),
            join=[replica.join for replica in self.replicas],
            arguments=arguments,
            env=dict(self.plan.proxy_env),
        )
        self.sidecars[placement.workload] = sidecar
        await self._until_joined(sidecar)

    async def _token(self, placement: Placement) -> str:
        return (await self.smc("token", "create", f"proxy/{placement.workload}")).strip()

    async def _until_joined(self, one: Joined) -> None:
        await one.process.start()
        await one.until_ready(self.plan.patience)

    @property
    def credential(self) -> Path:
        """The directory of the operator's credential."""
        return self.directory / "operator"

    async def add(self, placement: Placement, *arguments: str) -> Sidecar:
        """One more workload, with its application if it has one; ready when this returns.

        `arguments` are given to its `smc proxy run`.
        """
        address = self._addresses.take()
        if placement.version:
            await self._start_store(placement, address)
        self.write(placement.workload, bookstore.workload(placement, address))
        await self._join(placement, address, arguments)
        return self.sidecars[placement.workload]

    async def add_proxyless(self, *placements: Placement) -> None:
        """Workloads of gRPC programs, at once. Those that have a version serve quotes; all are ready at the return."""

        async def add(placement: Placement) -> None:
            address = self._addresses.take()
            self.write(placement.workload, bookstore.workload(placement, address))
            one = await self._join_proxyless(placement, address)
            if placement.version:
                app = programs.quotes(self.children, placement.workload, one, placement.version)
                self.apps[placement.workload] = app
                await app.start()

        await _together(*map(add, placements))

    async def _join_proxyless(self, placement: Placement, address: str) -> Proxyless:
        one = programs.proxyless(
            self.children,
            placement.workload,
            address,
            token=await self._token(placement),
            join=[replica.join for replica in self.replicas],
            env=dict(self.plan.proxy_env),
        )
        self.proxyless[placement.workload] = one
        await self._until_joined(one)
        return one

    async def read(self, placement: Placement, *, rate: float) -> None:
        """Start the gRPC program of a placement that asks for quotes so many times a second."""
        beside = self.proxyless[placement.workload]
        app = programs.reader(self.children, placement.workload, beside, rate=rate, target=bookstore.QUOTES_TARGET)
        self.visitors[placement.workload] = app
        await app.start()

    async def visit(self, name: str, *, rate: float = 20.0) -> App:
        """Start `bookbuyer` or `bookthief` beside its sidecar: so many requests a second to the bookstore."""
        sidecar = self.sidecar(name)
        visitor = programs.visitor(self.children, name, sidecar.address, proxy=sidecar.outbound, rate=rate)
        self.visitors[sidecar.workload] = visitor
        await visitor.start()
        return visitor

    async def figures(self) -> Figures:
        """All counters of this moment; the difference of two says what happened in between."""
        admins = {workload: sidecar.admin for workload, sidecar in self.sidecars.items()}
        return await Figures.take(self.visitors, self.apps, admins)

    async def roots(self) -> Roots:
        """Which roots are in use on the TLS ports of replicas and of applications' Envoys, and who trusts which."""
        ports: dict[str, str | None] = {}
        for replica in self.replicas:
            ports |= dict.fromkeys((replica.join, replica.xds, replica.api))
        for workload, sidecar in self.sidecars.items():
            if workload in self.apps:
                ports[sidecar.inbound] = bookstore.SNI
        return await Roots.take(ports, {workload: sidecar.admin for workload, sidecar in self.sidecars.items()})

    def write(self, name: str, text: str | None) -> None:
        """Put one file into the informer's directory, by rename; None takes it away."""
        path = self.files / f"{name.replace('/', '_')}.yaml"
        if text is None:
            path.unlink()
            return
        new = path.with_suffix(".new")
        new.write_text(text)
        new.rename(path)

    async def smc(self, *arguments: str) -> str:
        """Run one `smc` command as the operator, and return what it printed.

        Raises:
            ProcessFailed: it ended with another code than 0; with its standard error.
        """
        name = " ".join(("smc", *arguments[:2]))
        return await self.children.run(name, programs.smc(*arguments), env=self._operator, timeout=CLI)

    async def ended(self, *arguments: str) -> Ended:
        """Run one `smc` command as the operator, whatever comes of it.

        Raises:
            ProcessFailed: it does not end.
        """
        name = " ".join(("smc", *arguments[:2]))
        return await self.children.ended(name, programs.smc(*arguments), env=self._operator, timeout=CLI)

    @property
    def _operator(self) -> dict[str, str]:
        return {"SMC_MESH": MESH, "SMC_CREDENTIAL": str(self.credential), "NO_COLOR": "1"}

    async def apply(self, text: str) -> str:
        """`smc apply -f`; returns what it printed."""
        return await self.smc("apply", "-f", await self._written(text))

    async def apply_and_wait(self, text: str, seconds: float) -> Ended:
        """`smc apply -f --wait`, for at most so many seconds, whatever comes of it."""
        return await self.ended("apply", "-f", await self._written(text), f"--wait={seconds:g}s")

    async def _written(self, text: str) -> str:
        self._applied += 1
        path = self.directory / f"apply-{self._applied}.yaml"
        await asyncio.to_thread(path.write_text, text)
        return str(path)

    async def leader_key(self) -> tuple[str, int] | None:
        """(value, create_revision) of the leader's key in etcd; None while nobody leads."""
        found = (await self.etcd.read(f"/smc/{MESH}/leader")).get(f"/smc/{MESH}/leader")
        return (found[0].decode(), found[1]) if found else None

    async def leader(self, timeout: float = programs.START) -> Replica:
        """The replica that leads, as etcd has it.

        Raises:
            ProcessFailed: there is none within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    key = await self.leader_key()
                    for replica in self.replicas:
                        if key is not None and replica.name in key[0]:
                            return replica
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ProcessFailed(f"no leader within {timeout:g} s; logs are in {self.logs}") from None

    async def serving(self) -> dict[str, str]:
        """Which control plane each proxy last heard, as its Envoy says; by workload."""
        found = await asyncio.gather(*(sidecar.admin.identifier() for sidecar in self.sidecars.values()))
        return dict(zip(self.sidecars, found, strict=True))

    async def replica_of(self, name: str) -> Replica | None:
        """The replica that the sidecar of `name` last heard, as its Envoy says; None if none."""
        identifier = await self.sidecar(name).admin.identifier()
        return next((replica for replica in self.replicas if replica.name in identifier), None)

    async def proxies(self) -> list[dict[str, Any]]:
        """`smc proxy status -o json`."""
        document = json.loads(await self.smc("proxy", "status", "-o", "json"))
        found: list[dict[str, Any]] = document["proxies"]
        return found

    async def wait_synced(self, workloads: Sequence[str] | None = None, timeout: float = programs.START) -> None:
        """Until SMC says of each workload's proxy that it has ACKed all that it should have.

        Raises:
            ProcessFailed: not within `timeout` seconds; with the state of each.
        """
        wanted = set(self.sidecars if workloads is None else workloads)
        states: dict[str, str] = {}
        try:
            async with asyncio.timeout(timeout):
                while True:
                    states = {str(proxy["name"]): str(proxy["state"]) for proxy in await self.proxies()}
                    if all(states.get(workload) == "synced" for workload in wanted):
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise ProcessFailed(f"not in sync within {timeout:g} s: {states}; logs are in {self.logs}") from None

    def sidecar(self, name: str) -> Sidecar:
        """By `<namespace>/<workload>`, or by the workload's name alone.

        Raises:
            NotFound: there is none.
        """
        for workload, sidecar in self.sidecars.items():
            if name in (workload, workload.partition("/")[2]):
                return sidecar
        raise NotFound(f"no sidecar {name!r}", hint=f"there are {', '.join(self.sidecars)}")

    def app(self, name: str) -> App:
        """As `sidecar`."""
        for workload, app in self.apps.items():
            if name in (workload, workload.partition("/")[2]):
                return app
        raise NotFound(f"no application {name!r}", hint=f"there are {', '.join(self.apps)}")


async def _together(*work: Coroutine[Any, Any, None]) -> None:
    """All at once. The first failure ends the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for one in work:
                tasks.create_task(one)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
