"""Every command in the README does what the README says.

The blocks are taken as they stand, as `e2e.kit.reader` does it: 192.0.2.x, and 127.0.0.1 where the store's application
listens, each become a loopback address of this run's own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from e2e.kit import invariants
from e2e.kit.mesh import eventually
from e2e.kit.reader import Reader
from smc.demo import programs
from smc.demo.addresses import Addresses
from smc.demo.apps import XFCC
from smc.demo.processes import Children
from smc.demo.programs import App, Etcd, find_etcd
from tests.documentation import ROOT, Block, blocks

_MAKE = re.compile(r"`(make [^`]+)`")
ETCD, REPLICA, APPLICATION = "192.0.2.10", "192.0.2.11", "127.0.0.1"


def _readme(kind: str) -> list[Block]:
    return [block for block in blocks(ROOT / "README.md") if block.kind == kind]


COMMANDS = [line for block in _readme("sh") for line in block.commands]
MAKE = [line for line in COMMANDS if line.startswith("make ")]
REAL = [line for line in COMMANDS if line not in MAKE]


NO_MAKE = {"MAKEFLAGS": "", "MAKELEVEL": "0"}
"""A make that runs these tests must not speak in the makes that they run."""


@pytest.fixture
async def children(tmp_path: Path) -> AsyncIterator[Children]:
    async with Children(tmp_path) as running:
        yield running


def test_the_readme_says_how_to_run_the_demo_the_tests_and_a_mesh() -> None:
    assert MAKE == ["make demo", "make test"]
    said = {" ".join(line.split()[:2]) for line in REAL}
    assert said == {
        *("smc init", "smc serve", "smc apply", "smc token", "smc proxy", "smc describe"),
        "curl --proxy",
    }, "what is new here must be run below as well"


@pytest.mark.parametrize("line", [*MAKE, *_MAKE.findall((ROOT / "README.md").read_text())])
async def test_what_make_is_asked_for_it_would_do(line: str, children: Children) -> None:
    """Only asked: the tests run themselves by `make test`, and the demo has a test of its own."""
    would = await children.run(line, ["/usr/bin/env", "-C", str(ROOT), *line.split(), "-n"], env=NO_MAKE)
    *_, last = would.splitlines()
    wanted = {"make demo": " -m smc demo|/smc demo", "make test": "/python -X dev -m pytest"}
    (target,) = [name for name in wanted if line.startswith(name)]
    assert re.search(wanted[target], last), would
    arguments = line.removeprefix(target).strip().rpartition("=")[2]
    assert last.rstrip().endswith(arguments)


async def test_a_mesh_is_made_by_the_readme_alone(children: Children, tmp_path: Path) -> None:
    (manifests,) = _readme("yaml")
    lines = iter(REAL)
    with Addresses() as addresses:
        home = tmp_path / "home"
        home.mkdir()
        reader = Reader(children, addresses, home)
        etcd = Etcd(children, await find_etcd(), [reader.at(ETCD)])
        store = programs.bookstore(children, "store", reader.at(APPLICATION), "v1")
        await etcd.start()
        await store.start()
        (home / "shop.yaml").write_text(reader.here(manifests.text))

        printed = await reader.type(next(lines))
        assert "mesh default made for the trust domain mesh.example.com" in printed
        assert (home / "kek").stat().st_mode & 0o777 == 0o600

        replica = await reader.leave_running(next(lines))

        async def ready() -> bool:
            return await children.answers(f"http://{reader.at(REPLICA)}:15014/readyz")

        await replica.until(ready, "/readyz said yes", timeout=30)

        printed = await reader.type(next(lines))
        assert printed.splitlines() == [
            *("service/store created", "workload/store-1 created", "workload/buyer-1 created"),
            *("httproutegroup/store created", "traffictarget/buyer-to-store created"),
        ]

        for name in ("store-1", "buyer-1"):
            assert await reader.type(next(lines)) == ""
            assert (home / f"{name}.token").read_text().strip()
        for name in ("store-1", "buyer-1"):
            process = await reader.leave_running(next(lines))
            file = home / name / "ready"
            await process.until(_exists(file), "its Envoy was ready", timeout=30)

        await _talk(reader, store, next(lines))

        printed = await reader.type(next(lines))
        states = {row.split()[0]: row.split()[2] for row in printed.splitlines()[1:]}
        assert states == {"shop/store-1": "synced", "shop/buyer-1": "synced"}
        printed = await reader.type(next(lines))
        assert "Name:        buyer-to-store" in printed
        assert "Problems:    none" in printed
        assert "Refused by:  no proxy" in printed

        assert list(lines) == []
        assert reader.typed == REAL, "every command, in the order of the README"
        for process in reversed(reader.background):
            await process.stop()
        assert [process.returncode for process in reader.background] == [0, 0, 0], "each ends when it is asked to"
        values = [(key, value) for key, (value, _) in (await etcd.read()).items()]
        await children.stop()
        invariants.check_logs(children.logs)
        invariants.check_store(values, etcd.directories)


async def _talk(reader: Reader, store: App, curl: str) -> None:
    """Through the sidecars: what policy allows, and what it does not."""
    buyer, seller = (f"spiffe://mesh.example.com/ns/shop/sa/{name}" for name in ("buyer", "store"))

    async def answered() -> bool:
        return (await reader.try_out(curl + " -s -o /dev/null -w '%{http_code}'")) == "200"

    # A new endpoint is known to its callers once its own proxy has said that it listens.
    await eventually(answered, timeout=10, what="the store answers")
    before = (await store.counters())["total"]
    printed = await reader.type(curl)
    assert '"version": "v1"' in printed
    assert f"By={seller}" in printed
    assert f"URI={buyer}" in printed
    assert XFCC in printed
    assert (await store.counters())["total"] == before + 1

    denied = curl.replace("/books", "/admin") + " -s -w ' %{http_code}'"
    assert denied != curl
    assert (await reader.try_out(denied)).endswith(" 403")
    assert (await store.counters())["total"] == before + 1, "the store hears nothing of it"


def _exists(file: Path) -> Callable[[], Awaitable[bool]]:
    async def there() -> bool:
        return await asyncio.to_thread(file.exists)

    return there
