"""A mesh whose hosts are network namespaces and whose applications have no proxy setting: the kernel redirects them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

from e2e.kit.mesh import Mesh
from e2e.kit.namespaces import TIMEOUT, Host, Namespaces
from smc.demo import bookstore, programs
from smc.demo.apps import CONTROL_PORT
from smc.demo.bookstore import Placement
from smc.demo.envoy_admin import ADMIN_PORT
from smc.demo.local import Plan
from smc.demo.processes import Process
from smc.demo.programs import App, Sidecar

NOT_INTERCEPTED = tuple(part for port in (ADMIN_PORT, CONTROL_PORT) for part in ("--exclude-inbound-port", str(port)))
"""What the test itself asks on every host."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What curl says of one request."""

    exit: int
    """7: refused; 28: nothing came in time; 52, 56: closed without an answer."""
    status: int
    """0: no answer."""
    body: str
    address: str
    """Whom it connected to, as it saw it."""
    seconds: float

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


async def curl(host: Host, url: str, *arguments: str, uid: int = 0, timeout: float = 10.0) -> Answer:
    """One request of a program on `host` that knows of no proxy."""
    form = '\n{"status": "%{http_code}", "address": "%{remote_ip}", "seconds": %{time_total}}'
    done = await host.run(
        *("curl", "--silent", "--noproxy", "*", "--max-time", f"{timeout:g}", "--write-out", form, *arguments, url),
        uid=uid,
        timeout=timeout + TIMEOUT,
    )
    body, _, last = done.out.rpartition("\n")
    found = json.loads(last)
    return Answer(done.code, int(found["status"]), body, found["address"], found["seconds"])


class InterceptedMesh(Mesh):
    """The control plane in this namespace, on a bridge; workloads are added, each on a host of its own."""

    def __init__(self, plan: Plan) -> None:
        """`plan` has no workloads."""
        super().__init__(plan)
        self.network = Namespaces()
        self._addresses = self.network
        self.hosts: dict[str, Host] = {}
        """By the workload's name; hosts without a proxy are in `network` alone."""
        # Envoys of another user go through it; what is secret in it has a mode of its own.
        self.directory.chmod(0o711)

    async def intercept(self, host: Host, placement: Placement, *arguments: str) -> Sidecar:
        """Make `host` one of a workload: its application if it has one, then its proxy, which is ready on return.

        `arguments` are given to its `smc proxy run --intercept`.
        """
        self.hosts[placement.name] = host
        self.write(placement.workload, bookstore.workload(replace(placement, sidecar="intercepted"), host.address))
        if placement.version:
            app = programs.bookstore(self.children, placement.workload, host.address, placement.version)
            self.apps[placement.workload] = app
            await self._start_inside(host, app)
        sidecar = programs.sidecar(
            self.children,
            placement.workload,
            host.address,
            token=(await self.smc("token", "create", f"proxy/{placement.workload}")).strip(),
            join=[replica.join for replica in self.replicas],
            arguments=(
                *("--intercept", *NOT_INTERCEPTED, "--admin", f"{host.address}:{ADMIN_PORT}"),
                *("--envoy-log", str(self.logs / f"envoy-{placement.name}.log"), *arguments),
            ),
            env=dict(self.plan.proxy_env),
        )
        self.sidecars[placement.workload] = sidecar
        sidecar.process.argv = tuple(host.command(*sidecar.process.argv))
        await sidecar.process.start()
        await sidecar.until_ready()
        return sidecar

    async def visit_intercepted(self, name: str, *, rate: float, url: str) -> App:
        """Start `bookbuyer` or `bookthief` on its host, without any setting of a proxy."""
        host = self.hosts[name]
        visitor = programs.visitor(self.children, name, host.address, proxy="", rate=rate, url=url)
        del visitor.process.env["http_proxy"]
        self.visitors[self.sidecar(name).workload] = visitor
        await self._start_inside(host, visitor)
        return visitor

    async def plain(self, host: Host, *arguments: str) -> Process:
        """Start `e2e.kit.plain` on a host; its log is what it was asked."""
        number = sum(process.role == "plain" for process in self.children.processes)
        argv = host.command(sys.executable, "-m", "e2e.kit.plain", *arguments)
        process = self.children.process(f"plain-{number}", argv, role="plain")
        await process.start()

        async def serves() -> bool:
            return '"serving"' in process.log_tail()

        await process.until(serves, "it served", timeout=programs.START)
        return process

    @staticmethod
    async def _start_inside(host: Host, app: App) -> None:
        app.process.argv = tuple(host.command(*app.process.argv))
        await app.start()
