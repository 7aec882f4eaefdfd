"""What real Envoys do with a request is what the manifests say, in whatever mesh.

Random meshes of services, splits, permissions and bindings of every version, one after the other, around four sidecars
that stay. Each request goes through the caller's Envoy and the server's to an application that says who it is, and the
outcome must be one that `tests/oracle.py`, which shares nothing with SMC, thinks possible.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from e2e.kit.invariants import seeded
from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually
from smc.demo.bookstore import Placement
from smc.demo.local import Plan
from smc.demo.traffic import Answer, Caller
from tests.drawn import APP_PORTS, BANK, PLACES, SHOP, Drawn, Place
from tests.oracle import Oracle, Outcome, Request

MESHES = 52
REQUESTS = 40
"""For each mesh."""
FEWEST = 20
"""Of each outcome. The rarest, a service that nobody backs, comes 166 times, give or take 40."""

NOTHING_LEAVES = {
    "apiVersion": "smc.io/v1alpha1",
    "kind": "MeshConfig",
    "metadata": {"name": "default"},
    "spec": {"egress": "deny"},
}


class Shop(Mesh):
    """A mesh whose workloads are manifests too, so that `--wait` covers them."""

    async def place(self, namespace: str, name: str, account: str) -> Place:
        place = Place(namespace, name, account, self._addresses.take())
        await self.apply(json.dumps(Drawn.workload(place, services=[], team="red")))
        await self._join(Placement(namespace, name, account), place.address)
        return place

    async def draw(self, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> None:
        """Replace one mesh by the next; returns once every Envoy has it and finds every endpoint healthy."""
        left = {_id(document) for document in after}
        if gone := [document for document in before if _id(document) not in left]:
            await self._write("delete", gone)
        await self._write("apply", after)
        oracle = Oracle(after)
        addresses = {_name(d): d["spec"]["address"] for d in after if d["kind"] == "Workload"}
        wanted = {
            f"{service[0]}/{service[1]}|{port}": {
                f"{addresses[workload]}:{INBOUND_PORT}" for workload, _ in oracle.endpoints(service, port)
            }
            for service, port in oracle.service_ports()
        }

        async def known() -> bool:
            for sidecar in self.sidecars.values():
                clusters = await sidecar.admin.clusters()
                found = {
                    name: {host.address for host in hosts if host.healthy}
                    for name, hosts in clusters.items()
                    if name.startswith((f"{SHOP}/", f"{BANK}/"))
                }
                if found != wanted:
                    return False
            return True

        await eventually(known, timeout=20, what="every Envoy finds every endpoint healthy")

    async def _write(self, verb: str, documents: Sequence[dict[str, Any]]) -> None:
        path = self.directory / "drawn.yaml"
        await asyncio.to_thread(path.write_text, "\n---\n".join(json.dumps(document) for document in documents))
        await self.smc(verb, "-f", str(path), "--wait")


def _id(document: dict[str, Any]) -> tuple[str, str, str]:
    return document["kind"], *_name(document)


def _name(document: dict[str, Any]) -> tuple[str, str]:
    return document["metadata"]["namespace"], document["metadata"]["name"]


@asynccontextmanager
async def _application(place: Place) -> AsyncIterator[None]:
    """Answers every request on both ports with who and where it is."""

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        port = request.transport.get_extra_info("sockname")[1]
        return web.json_response({"workload": [place.namespace, place.name], "port": port})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        for port in APP_PORTS:
            await web.TCPSite(runner, place.address, port).start()
        yield
    finally:
        await runner.cleanup()


def _outcome(answer: Answer) -> Outcome:
    if answer.status != 200:
        return Outcome(answer.status)
    said = json.loads(answer.body)
    return Outcome(200, tuple(said["workload"]), said["port"])


async def _asked(shop: Shop, callers: dict[str, Caller], request: Request) -> Outcome:
    headers = dict(request.headers)
    host = headers.pop("host")
    caller = callers["/".join(request.source)]
    return _outcome(await caller.request(f"http://{host}{request.path}", request.method, headers))


@pytest.mark.timeout(900)
async def test_envoys_do_what_the_manifests_say() -> None:
    choice = seeded()
    async with (
        Shop(Plan(replicas=1, workloads=(), manifests=(json.dumps(NOTHING_LEAVES),))) as shop,
        AsyncExitStack() as open_,
    ):
        places = tuple([await shop.place(*place) for place in PLACES])
        for place in places:
            await open_.enter_async_context(_application(place))
        callers = {workload: Caller(s.outbound, keep_alive=True) for workload, s in shop.sidecars.items()}
        for caller in callers.values():
            open_.push_async_callback(caller.close)
        before: Sequence[dict[str, Any]] = ()
        seen: Counter[int] = Counter()
        for number in range(MESHES):
            drawn = Drawn(choice, number, places)
            oracle = Oracle(drawn.documents)
            await shop.draw(before, drawn.documents)
            before = drawn.documents
            for request in [drawn.request() for _ in range(REQUESTS)]:
                possible = oracle.outcomes(request)
                found = await _asked(shop, callers, request)
                seen[found.status] += 1
                assert found in possible, (
                    f"mesh {number}: {request} came to {found}, not to one of {sorted(possible)}; "
                    f"the manifests are {json.dumps(drawn.documents, indent=1)}"
                )
    assert seen.total() >= 2000
    assert min(seen[status] for status in (200, 403, 502, 503)) >= FEWEST, f"too few of a kind to say anything: {seen}"
