"""P3: replicas are byte-identical, however each came to know what is in the store.

One has seen every change as a View of its own, one missed most of them and lists again after a compaction, one starts
when all is there. Each is a process with a hash seed of its own: what is in sets and dictionaries has another order.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster.kv import KV, Delete, Put
from smc.model import Name
from smc.records import BundleRecord
from smc.xds.snapshot import Type
from tests.contract.etcd_server import Wire, etcds
from tests.unit.mesh.store import (
    KEYS,
    Store,
    config_text,
    endpoint,
    group_text,
    identity,
    namespace_text,
    split_text,
    target_text,
)

SEEDS = ("1", "4711", "2147483647")
FIRST = 2
"""The revision of the first write to a fresh etcd."""
PATIENCE = 60.0
"""Seconds that a process has for anything."""
SERVICES = ("bookstore", "bookstore-v1", "bookstore-v2", "warehouse", "warehouse-old", "checkout", "mail", "search")
SIDES = ("shop", "depot")
"""Namespaces."""


class Recorded(Store):
    """Keeps what is written, to be written to a real store one revision each, in this order.

    Revisions count from FIRST, so that a quarantine can say which one it means.
    """

    def __init__(self) -> None:
        self.written: list[Put | Delete] = []
        super().__init__()
        self.revision += FIRST - 1

    def put(self, key: str, record: object) -> int:
        revision = super().put(key, record)
        self.written.append(Put(key, self.items[key].value))
        return revision

    def delete(self, key: str) -> None:
        super().delete(key)
        self.written.append(Delete(key))


def history() -> tuple[list[Put | Delete], list[Put | Delete]]:
    """What a mesh goes through, in two halves: the same in every run, and in no order that a table would have."""
    store, order = Recorded(), random.Random(20)
    _all(store, order)
    _ghost(store)
    before, store.written = store.written, []
    _all(store, order)  # what is written twice changes, or stays as it is at another revision
    _exorcise(store)
    store.apply(config_text("deny"))
    return before, store.written


def _all(store: Recorded, order: random.Random) -> None:
    for write in _shuffled(order, (_services, _workloads, _policy, _certificates)):
        write(store, order)


def _services(store: Recorded, order: random.Random) -> None:
    for side in SIDES:
        for service in _shuffled(order, SERVICES):
            name = f"{side}/{service}"
            store.offer_service(name, (80, "8080"), *([(9090, "9090")] if service == "checkout" else []))
            backs = [
                endpoint(
                    f"{side}/{service}-{n}",
                    f"{service}-{n % 2}",
                    (80, 8080),
                    *([(9090, 9090)] if service == "checkout" else []),
                    weight=order.randint(1, 5),
                    address=f"10.0.{SIDES.index(side)}.{SERVICES.index(service) * 10 + n}",
                )
                for n in range(3)
            ]
            store.offer_endpoints(name, *backs)
    # A second source backs one of the services too.
    store.offer_endpoints("shop/mail", endpoint("shop/mail-cloud", "mail-0", (80, 8080)), source="cloud")
    store.offer_service("shop/mail", (80, "8080"), source="cloud")
    for source in ("files", "cloud"):
        store.sync(source)


def _workloads(store: Recorded, order: random.Random) -> None:
    everyone = [(side, service, n) for side in SIDES for service in SERVICES for n in range(3)]
    for side, service, n in _shuffled(order, everyone):
        workload = f"{side}/{service}-{n}"
        address = f"10.0.{SIDES.index(side)}.{SERVICES.index(service) * 10 + n}"
        reachable = ("depot/warehouse", "shop/bookstore", "shop/mail") if n == 2 else None
        store.offer_workload(workload, f"{service}-{n % 2}", reachable=reachable, address=address)
        if (service, n) != ("search", 1):
            store.ready(workload)
    store.offer_workload("shop/mail-cloud", "mail-0", source="cloud", address="10.9.9.9")
    store.ready("shop/mail-cloud")


def _policy(store: Recorded, order: random.Random) -> None:
    for side in _shuffled(order, SIDES):
        store.apply(group_text(f"{side}/all"))
        store.apply(group_text(f"{side}/pages", f"/page/{order.randint(1, 9)}/.*"))
        store.apply(split_text(f"{side}/bookstore", "bookstore", bookstore_v1=order.randint(1, 9), bookstore_v2=3))
        store.apply(split_text(f"{side}/warehouse", "warehouse", warehouse_old=order.randint(0, 4), search=1))
        # It is about the same root as another one: a Problem.
        store.apply(split_text(f"{side}/again", "bookstore", bookstore_v2=1))
        for service in _shuffled(order, SERVICES):
            for n in _shuffled(order, (0, 1)):
                callers = [f"{where}/{who}-{n}" for where in SIDES for who in SERVICES if who != service]
                order.shuffle(callers)
                for group in _shuffled(order, ("all", "pages")):
                    some = callers[:6] if group == "all" else callers[4:8]
                    store.apply(target_text(f"{side}/{group}-{service}-{n}", f"{service}-{n}", *some, group=group))
        # Nobody has ever heard of its group: a Problem.
        store.apply(target_text(f"{side}/nowhere", "mail-0", "shop/search-0", group="nothing"))
    refused = store.apply(target_text("shop/refused", "mail-0", "shop/checkout-0"))
    store.quarantine("shop/mail-1", "access.smi-spec.io/TrafficTarget/shop/refused", refused)
    store.apply(config_text(order.choice(["allow", "deny"]), order.choice(["enforcing", "audit"])))
    store.apply(namespace_text("depot", order.choice(["audit", "permissive"])))


def _certificates(store: Recorded, order: random.Random) -> None:
    accounts = [f"{side}/{service}-{n}" for side in SIDES for service in SERVICES for n in (0, 1)]
    for account in _shuffled(order, accounts):
        if account != "depot/search-0":
            store.certify(account, number=order.randint(1, 1000))
    store.put(KEYS.bundle, BundleRecord(("ROOT", f"ANOTHER {order.randint(1, 1000)}")))


def _ghost(store: Recorded) -> None:
    """What was there once, and is not in the end."""
    store.offer_service("shop/ghost", (80, "8080"))
    store.offer_endpoints("shop/ghost", endpoint("shop/ghost-0", "ghost", (80, 8080)))
    store.offer_workload("shop/ghost-0", "ghost")
    store.ready("shop/ghost-0")
    store.certify("shop/ghost")
    store.apply(target_text("shop/ghost", "mail-0", "shop/ghost"))
    store.apply(split_text("depot/ghost", "mail", search=1))


def _exorcise(store: Recorded) -> None:
    for key in (
        KEYS.manifest("split.smi-spec.io/TrafficSplit/depot/ghost"),
        KEYS.manifest("access.smi-spec.io/TrafficTarget/shop/ghost"),
        KEYS.certificate(identity("shop/ghost")),
        KEYS.ready(Name("shop", "ghost-0")),
        KEYS.workload("files", Name("shop", "ghost-0")),
        KEYS.endpoints("files", Name("shop", "ghost")),
        KEYS.service("files", Name("shop", "ghost")),
    ):
        store.delete(key)


def _shuffled(order: random.Random, what: Iterable[Any]) -> list[Any]:
    found = list(what)
    order.shuffle(found)
    return found


# ----------------------------------------------------------------------------------------------------------- processes


class Replica:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.seen: list[int] = []
        """The revisions of its Views so far."""

    async def until(self, revision: int) -> None:
        """Read what it says until it has built the View of `revision`."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while not self.seen or self.seen[-1] < revision:
                line = await self._process.stdout.readline()
                assert line, "the process ended"
                self.seen.append(int(line))

    async def report(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE):
            output, _ = await self._process.communicate(b"")
        assert self._process.returncode == 0
        *revisions, last = output.decode().splitlines()
        self.seen += map(int, revisions)
        found: dict[str, Any] = json.loads(last)
        return found


@asynccontextmanager
async def reading(endpoint_: str, seed: str) -> AsyncIterator[Replica]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.feature.reader", endpoint_, KEYS.mesh_name),
        env={**os.environ, "PYTHONHASHSEED": seed},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=64 * 1024 * 1024,
    )
    try:
        yield Replica(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _write(kv: KV, operations: list[Put | Delete], watching: Replica) -> int:
    """One revision each, the next once `watching` has built a View of it."""
    revision = 0
    for operation in operations:
        revision = (await kv.transact([operation])).revision
        await watching.until(revision)
    return revision


async def test_three_replicas_with_different_pasts_have_equal_bytes_under_equal_versions(tmp_path: Path) -> None:
    (first, *before), after = history()
    with etcds(tmp_path) as factory:
        server = factory.one()
        await server.until_ready()
        async with server.client() as kv:
            await kv.transact([first])  # there is a mesh
        async with (
            server.client() as kv,
            Wire(server.endpoint) as wire,
            reading(server.endpoint, SEEDS[0]) as every,
            reading(wire.endpoint, SEEDS[1]) as cut_off,
        ):
            await every.until(FIRST)
            revision = await _write(kv, before, every)
            await cut_off.until(revision)
            await wire.cut()
            revision = await _write(kv, after, every)
            await kv.compact(revision)
            await wire.open()
            await cut_off.until(revision)
            async with reading(server.endpoint, SEEDS[2]) as cold:
                await cold.until(revision)
                reports = [await replica.report() for replica in (every, cut_off, cold)]

    step_by_step, listed_again, at_once = reports
    assert len({report.pop("seed") for report in reports}) == 3
    assert every.seen == list(range(FIRST, FIRST + len(before + after) + 1))
    assert [report.pop("compactions") for report in reports] == [0, 1, 0]
    views = [report.pop("views") for report in reports]
    assert views[0] == len(before + after) + 1
    assert views[2] == 1

    proxies = step_by_step["proxies"]
    assert proxies.keys() == {
        *(f"{side}/{service}-{n}" for side in SIDES for service in SERVICES for n in range(3)),
        "shop/mail-cloud",
    }
    assert step_by_step["problems"]
    for type_ in Type:
        assert any(len(said[type_.name]["resources"]) > 1 for said in proxies.values()), f"there is hardly any {type_}"
    for other in (listed_again, at_once):
        for proxy, said in proxies.items():
            assert other["proxies"][proxy] == said, proxy
        assert other == step_by_step
