"""Modes of policy: audit lets through and counts, enforcing denies at once again, permissive lets plaintext in.

What policy allows passes all the while, whatever the mode changes to.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually, module_mesh
from e2e.kit.prober import Probe, statuses
from smc.demo.apps import XFCC, document
from smc.demo.traffic import Caller

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

STORE = "bookstore-v1"
HOST = f"{STORE}.bookstore"
CLIENT = "spiffe://demo.smc.internal/ns/bookthief/sa/bookthief"


def _mode(mode: str, namespace: str = "bookstore") -> str:
    return f"""\
apiVersion: smc.io/v1alpha1
kind: NamespaceConfig
metadata: {{name: default, namespace: {namespace}}}
spec: {{mode: {mode}}}
"""


async def _denials(mesh: Mesh, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What `smc get denials` says, by workload and service or `plaintext`."""
    document = json.loads(await mesh.smc("get", "denials", "-o", "json", *arguments))
    return {(d["workload"], d["service"] or d["port"]): d for d in document["denials"]}


async def _counted(mesh: Mesh, workload: str, service: str, field: str, replica: str | None = None) -> int:
    server = ("--server", replica) if replica else ()
    found = await _denials(mesh, "-n", "bookstore", *server)
    return int(found.get((workload, service), {field: 0})[field])


async def _steal(mesh: Mesh, number: int, host: str = HOST) -> list[Probe]:
    """Requests that policy does not allow."""
    return await mesh.send(number, source="bookthief", host=host)


async def _switch(mesh: Mesh, mode: str) -> None:
    await mesh.apply(_mode(mode))
    await mesh.wait_synced()


@asynccontextmanager
async def _allowed_traffic(mesh: Mesh) -> AsyncIterator[None]:
    """Requests that policy allows, of which none may fail."""
    async with mesh.prober(url=f"http://{HOST}/books") as prober:
        await prober.more(100)
        yield
        await prober.more(100)
    prober.assert_clean(minimum=200)


async def test_audit_lets_through_what_enforcing_denies_and_both_are_counted(mesh: Mesh) -> None:
    admin = mesh.sidecar(STORE).admin
    listeners = await admin.stat("listener_manager.lds.update_success")
    async with _allowed_traffic(mesh):
        assert statuses(await _steal(mesh, 50)) == {403: 50}
        await _switch(mesh, "audit")
        passed = await _steal(mesh, 70)
        assert statuses(passed) == {200: 70}
        assert {probe.source for probe in passed} == {CLIENT}, "mutual TLS is required all the same"
        await _switch(mesh, "enforcing")
        assert statuses(await _steal(mesh, 30)) == {403: 30}
    assert await admin.stat("listener_manager.lds.update_success") == listeners, "no listener has changed"

    async def told() -> bool:
        found = (await _denials(mesh, "-n", "bookstore")).get((STORE, f"bookstore/{STORE}"))
        return found is not None and (found["denied"], found["wouldBeDenied"], found["mode"]) == (80, 70, "enforcing")

    await eventually(told, timeout=20, every=0.5, what="smc get denials tells all 150")
    assert not await _denials(mesh, "-n", "bookbuyer")
    table = await mesh.smc("get", "denials", "-A")
    assert table.splitlines()[0].split()[:4] == ["NAMESPACE", "WORKLOAD", "SERVICE", "PORT"]


async def test_every_replica_adds_up_what_each_was_told(mesh: Mesh) -> None:
    before = {
        store: await _counted(mesh, store, f"bookstore/{store}", "denied") for store in ("bookstore-v1", "bookstore-v2")
    }
    for store, number in (("bookstore-v1", 11), ("bookstore-v2", 22)):
        assert statuses(await _steal(mesh, number, f"{store}.bookstore")) == {403: number}
    for replica in mesh.replicas:

        async def all_told(server: str = replica.api) -> bool:
            return [
                await _counted(mesh, store, f"bookstore/{store}", "denied", server) - before[store]
                for store in ("bookstore-v1", "bookstore-v2")
            ] == [11, 22]

        await eventually(all_told, timeout=20, every=0.5, what=f"{replica.name} tells of both proxies")


async def test_a_replica_that_dies_takes_no_count_along_for_long(mesh: Mesh) -> None:
    counted = await _counted(mesh, STORE, f"bookstore/{STORE}", "denied")
    assert counted
    killed = mesh.replicas[0]
    await killed.kill()
    try:

        async def told_again() -> bool:
            assert statuses(await _steal(mesh, 1)) == {403: 1}
            found = await _counted(mesh, STORE, f"bookstore/{STORE}", "denied", mesh.replicas[1].api)
            return found > counted

        await eventually(told_again, timeout=40, every=1, what="another replica was told")
    finally:
        await killed.start()
        await mesh.wait_synced()


def _outsider(mesh: Mesh, *, keep_alive: bool = False) -> Caller:
    """Somebody without a proxy, who connects to the port that other proxies dial."""
    return Caller(f"{mesh.sidecar(STORE).address}:{INBOUND_PORT}", keep_alive=keep_alive)


async def _plaintext(caller: Caller, **headers: str) -> tuple[int, dict[str, Any]]:
    answer = await caller.request(f"http://{HOST}/books", headers=headers)
    return answer.status, document(answer)


async def test_permissive_lets_plaintext_in_and_enforcing_refuses_it_on_open_connections_at_once(mesh: Mesh) -> None:
    caller, stranger = _outsider(mesh, keep_alive=True), _outsider(mesh)
    try:
        assert (await _plaintext(stranger))[0] == 0, "enforcing: no TLS, no answer"
        async with _allowed_traffic(mesh):
            await _switch(mesh, "permissive")
            status, said = await _plaintext(
                caller, **{"x-forwarded-client-cert": "URI=spiffe://demo.smc.internal/ns/bookbuyer/sa/bookbuyer"}
            )
            assert status == 200
            assert not said.get(XFCC), "who speaks plaintext is nobody"
            assert statuses(await _steal(mesh, 20)) == {200: 20}

            await mesh.apply(_mode("enforcing"))

            async def refused() -> bool:
                return (await _plaintext(caller))[0] != 200

            await eventually(
                refused, timeout=10, what="the open connection is refused, long before it would have drained"
            )
            await mesh.wait_synced()
        assert (await _plaintext(stranger))[0] == 0
        assert statuses(await _steal(mesh, 20)) == {403: 20}
    finally:
        await caller.close()
        await stranger.close()

    async def told() -> bool:
        return (await _denials(mesh, "-n", "bookstore")).get((STORE, "plaintext"), {}).get("wouldBeDenied", 0) >= 1

    await eventually(told, timeout=20, every=0.5, what="plaintext is counted")


async def test_a_mode_that_is_not_understood_is_refused_where_it_is_written(mesh: Mesh) -> None:
    with pytest.raises(Exception, match=r'apply-\d+\.yaml:4:14: spec\.mode: "audti" is not known'):
        await mesh.apply(_mode("audti"))
    assert statuses(await _steal(mesh, 5)) == {403: 5}
