"""A mesh for tests: the demo's, with a prober, and with the invariants checked when it ends."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import pytest_asyncio

from e2e.kit import invariants
from e2e.kit.prober import Connections, Probe, Prober, send
from smc.demo.local import LocalMesh, Plan

INBOUND_PORT = 15003
BOOKS = "http://bookstore.bookstore/books"


class Mesh(LocalMesh):
    """A real mesh while it is open.

    It ends with the checks of `invariants`, on its logs and on etcd. What it leaves on disk is kept, and its place
    printed, when it failed: the logs of all processes are in `<directory>/logs`.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="smc-e2e-")), plan)
        self.tracebacks: set[str] = set()
        """Names of logs in which a traceback is no failure, because the test asked for it."""

    async def __aenter__(self) -> Self:
        """Returns once every Envoy knows every endpoint: what is asked from then on finds somebody."""
        try:
            await super().__aenter__()
        except BaseException:
            self._say_where()
            raise
        try:
            await eventually(self._all_known, timeout=30, every=0.1, what="every Envoy knows every endpoint")
        except BaseException as e:
            await self.__aexit__(type(e), e, e.__traceback__)
            raise
        return self

    async def _all_known(self) -> bool:
        wanted = {
            (f"{placement.namespace}/{service}|80", f"{self.sidecars[placement.workload].address}:{INBOUND_PORT}")
            for placement in self.plan.workloads
            for service in placement.services
        }
        found = await asyncio.gather(*(sidecar.admin.clusters() for sidecar in self.sidecars.values()))
        return all(
            wanted <= {(name, host.address) for name, hosts in clusters.items() for host in hosts} for clusters in found
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            values = await self._values() if kind is None else []
        finally:
            await super().__aexit__(kind, error, trace)
        try:
            await asyncio.to_thread(invariants.check_logs, self.logs, expected=self.tracebacks)
            await asyncio.to_thread(invariants.check_store, values, self.etcd.directories)
        except AssertionError:
            self._say_where()
            raise
        if kind is None:
            await asyncio.to_thread(shutil.rmtree, self.directory)
        else:
            self._say_where()

    async def _values(self) -> list[tuple[str, bytes]]:
        if not any(member.alive for member in self.etcd.members):
            return []
        return [(key, value) for key, (value, _) in (await self.etcd.read()).items()]

    def _say_where(self) -> None:
        sys.stdout.write(f"the logs of every process are in {self.logs}\n")

    def prober(
        self,
        source: str = "bookbuyer",
        *,
        url: str = BOOKS,
        rate: float = 100.0,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        connections: Connections = "kept",
        expect: int = 200,
        timeout: float = 10.0,
    ) -> Prober:
        """Requests as `source` makes them, through its own sidecar; enter it to begin."""
        return Prober(
            self.sidecar(source).outbound,
            url,
            rate=rate,
            method=method,
            headers=headers,
            connections=connections,
            expect=expect,
            timeout=timeout,
        )

    async def send(
        self,
        number: int,
        path: str = "/books",
        *,
        source: str = "bookbuyer",
        host: str = "bookstore.bookstore",
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        connections: Connections = "kept",
    ) -> list[Probe]:
        """So many requests, as fast as they go, each once."""
        proxy = self.sidecar(source).outbound
        return await send(
            number, proxy, f"http://{host}{path}", method=method, headers=headers, connections=connections
        )

    async def seen_by_apps(self) -> dict[str, int]:
        """How many requests each application has counted, by its workload."""
        counters = await asyncio.gather(*(app.counters() for app in self.apps.values()))
        return {name: int(found["total"]) for name, found in zip(self.apps, counters, strict=True)}


async def eventually(check: Callable[[], Any], *, timeout: float, what: str, every: float = 0.02) -> float:
    """Ask `check` (which may be a coroutine function) until it is true; returns the seconds that it took.

    Raises:
        AssertionError: not within `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        took = loop.time() - start
        if found:
            return took
        assert took < timeout, f"not within {timeout:g} s: {what}"
        await asyncio.sleep(every)


def module_mesh(plan: Plan | None = None, *, tracebacks: Iterable[str] = ()) -> Any:
    """A fixture: one mesh for all tests of a file, which run on the module's event loop."""

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    async def mesh(request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
        failed = request.session.testsfailed
        running = Mesh(plan)
        running.tracebacks.update(tracebacks)
        async with running:
            yield running
            if request.session.testsfailed > failed:
                kept = running.directory.with_name(running.directory.name + "-logs")
                shutil.copytree(running.logs, kept)
                terminal = request.config.pluginmanager.get_plugin("terminalreporter")
                assert terminal is not None
                terminal.write_line(f"\nthe logs of every process are in {kept}")

    return mesh
