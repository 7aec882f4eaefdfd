"""What `smc diff` says of a change is what proxies get when it is applied, and `smc explain` agrees with the wire."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

from e2e.kit.mesh import Mesh, module_mesh
from e2e.kit.prober import statuses
from smc.demo import bookstore, programs
from smc.demo.processes import ProcessFailed

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

HOST = "outbound/bookstore.bookstore|80"
BUYER, THIEF = "bookbuyer/bookbuyer", "bookthief/bookthief"


async def _configured(mesh: Mesh, proxy: str, type_: str, name: str) -> Any:
    found = json.loads(await mesh.smc("proxy", "config", proxy, "--type", type_, "--name", name, "-o", "json"))
    (type_found,), (resource,) = found["types"], found["resources"]
    assert type_found["acked"] == type_found["version"], "a proxy that has ACKed all of it"
    return resource["message"]


async def test_what_diff_says_is_what_the_proxies_then_have(mesh: Mesh) -> None:
    path = mesh.directory / "split.yaml"
    await asyncio.to_thread(path.write_text, bookstore.split(100, 0))
    await mesh.smc("apply", "-f", str(path), "--wait=30s")
    before = await _configured(mesh, BUYER, "virtual-host", HOST)
    await asyncio.to_thread(path.write_text, bookstore.split(10, 90))
    async with mesh.prober() as prober:
        with pytest.raises(ProcessFailed) as e:
            await mesh.smc("diff", "-f", str(path))
        assert "ended with 1" in str(e.value)
        assert await _configured(mesh, BUYER, "virtual-host", HOST) == before, "nothing was applied"
    assert statuses(prober.probes) == {200: len(prober.probes)}
    code, text = await _diff(mesh, str(path))
    assert code == 1
    told = {proxy: d["resources"] for d in json.loads(text)["differences"] for proxy in d["proxies"]}
    (resource,) = told[BUYER]
    assert (resource["type"], resource["name"], resource["before"]) == ("VirtualHost", HOST, before)
    await mesh.smc("apply", "-f", str(path), "--wait=30s")
    assert await _configured(mesh, BUYER, "virtual-host", HOST) == resource["after"]
    assert (await _diff(mesh, str(path)))[0] == 0


async def _diff(mesh: Mesh, path: str) -> tuple[int, str]:
    """The exit code and what it prints."""
    environment = os.environ | {"SMC_CREDENTIAL": str(mesh.credential)}
    command = programs.smc("diff", "-f", path, "-o", "json")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def test_explain_says_what_a_request_then_meets(mesh: Mesh) -> None:
    allowed = await mesh.smc("explain", BUYER, "bookstore.bookstore", "--path", "/books")
    assert allowed.startswith("allowed\n")
    assert statuses(await mesh.send(20)) == {200: 20}
    with pytest.raises(ProcessFailed) as e:
        await mesh.smc("explain", THIEF, "bookstore.bookstore", "--path", "/books")
    assert "ended with 1" in str(e.value)
    assert statuses(await mesh.send(20, source="bookthief")) == {403: 20}
