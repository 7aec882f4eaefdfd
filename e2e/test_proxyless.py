"""gRPC programs without a proxy beside them are in the mesh like all others: told by xDS, judged, known by identity."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from e2e.kit.mesh import Mesh, eventually
from smc.cli.session import Session
from smc.demo import programs
from smc.demo.apps import APP_PORT, CONTROL_PORT
from smc.demo.bookstore import Placement
from smc.demo.figures import is_fair
from smc.demo.local import Plan
from smc.demo.processes import Process, ProcessFailed
from smc.proxy.program import WORKLOAD
from smc.v1 import smc_pb2 as pb
from tests.drawn import Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

PORT = APP_PORT
TARGET = f"xds:///quotes.shop:{PORT}"
GET, DELETE = "/shop.Quotes/Get", "/shop.Quotes/Delete"


def _manifest(group: str, kind: str, name: str, spec: dict[str, Any], namespace: str = "shop") -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": group, "kind": kind, "metadata": metadata, "spec": spec}


def _service(name: str) -> dict[str, Any]:
    return _manifest("smc.io/v1alpha1", "Service", name, {"ports": [{"port": PORT, "protocol": "grpc"}]})


def _policy(*methods: str) -> list[dict[str, Any]]:
    """The caller may call these, of both versions."""
    account = {"kind": "ServiceAccount", "namespace": "shop"}
    matches = [{"name": f"m{n}", "pathRegex": f"{method}$", "methods": ["*"]} for n, method in enumerate(methods)]
    return [
        _manifest("specs.smi-spec.io/v1alpha4", "HTTPRouteGroup", "quotes", {"matches": matches}),
        _manifest(
            "access.smi-spec.io/v1alpha3",
            "TrafficTarget",
            "quotes",
            {
                "destination": account | {"name": "quotes"},
                "rules": [{"kind": "HTTPRouteGroup", "name": "quotes"}],
                "sources": [account | {"name": "caller"}],
            },
        ),
    ]


def _split(v1: int, v2: int) -> dict[str, Any]:
    backends = [{"service": f"quotes-{version}", "weight": weight} for version, weight in (("v1", v1), ("v2", v2))]
    return _manifest(
        "split.smi-spec.io/v1alpha4", "TrafficSplit", "quotes", {"service": "quotes", "backends": backends}
    )


class Programs(Mesh):
    """A mesh of gRPC programs alone."""

    _control = itertools.count(CONTROL_PORT)

    async def program(self, name: str, account: str, services: Sequence[str] = ()) -> Place:
        """A workload without Envoy: its `smc proxy run --grpc` is ready when this returns."""
        place = Place("shop", name, account, self._addresses.take())
        spec = {"address": place.address, "serviceAccount": account, "services": list(services), "sidecar": "grpc"}
        await self.write_all(_manifest("smc.io/v1alpha1", "Workload", name, spec))
        await self._join_proxyless(Placement("shop", name, account), place.address)
        return place

    async def write_all(self, *documents: dict[str, Any], wait: bool = False) -> None:
        await self.smc("apply", "-f", await self._listed(documents), *(["--wait"] if wait else []))

    async def delete_all(self, *documents: dict[str, Any]) -> None:
        await self.smc("delete", "-f", await self._listed(documents))

    async def _listed(self, documents: Sequence[dict[str, Any]]) -> str:
        path = self.directory / "programs.yaml"
        await asyncio.to_thread(path.write_text, "\n---\n".join(json.dumps(document) for document in documents))
        return str(path)

    async def serve(self, place: Place, version: str) -> Process:
        """Run the program of a workload that serves."""
        app = programs.quotes(self.children, place.name, self.proxyless[f"shop/{place.name}"], version)
        await app.start()
        return app.process

    async def ask(self, place: Place, method: str) -> Asking:
        """Run one more program of a workload, which calls 50 times a second."""
        control = next(self._control)
        app = programs.reader(
            self.children,
            f"{place.name}-{control}",
            self.proxyless[f"shop/{place.name}"],
            rate=50,
            target=TARGET,
            method=method,
            control_port=control,
        )
        await app.start()
        return Asking(app.process)


class Asking:
    """What the calls of a program that asks have come to."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._read = 0

    def all(self) -> list[dict[str, Any]]:
        lines = self.process.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def next(self, number: int) -> list[dict[str, Any]]:
        """So many that are answered from now on."""
        before = len(self.all())
        await eventually(lambda: len(self.all()) >= before + number, timeout=30, what=f"{number} more calls")
        return self.all()[before : before + number]

    async def until(self, wanted: set[Any], key: str = "version", number: int = 20) -> None:
        async def so() -> bool:
            return {answer.get(key, answer["status"]) for answer in await self.next(number)} == wanted

        await eventually(so, timeout=30, what=f"calls come to {wanted}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Programs]:
    async with Programs(Plan(workloads=(), manifests=())) as running:
        await running.write_all(*map(_service, ("quotes", "quotes-v1", "quotes-v2")))
        for version in ("v1", "v2"):
            place = await running.program(f"quotes-{version}", "quotes", ("quotes", f"quotes-{version}"))
            await running.serve(place, version)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def caller(mesh: Programs) -> AsyncIterator[Asking]:
    """It calls 50 times a second from the first test to the last."""
    place = await mesh.program("caller", "caller")
    await mesh.write_all(*_policy(GET))
    asking = await mesh.ask(place, GET)
    await asking.until({"v1", "v2"}, number=40)
    yield asking


async def test_both_ends_know_each_other_by_identity(mesh: Programs, caller: Asking) -> None:
    found = await caller.next(50)
    assert {answer["caller"] for answer in found} == {"spiffe://demo.smc.internal/ns/shop/sa/caller"}
    # And the caller takes nobody else for the service: the servers get another identity, and it is not told.
    stranger = await mesh.program("stranger", "stranger")
    server = await mesh.serve(stranger, "stranger")
    endpoint = {"address": stranger.address, "serviceAccount": "quotes", "services": ["quotes-v2"], "sidecar": "grpc"}
    await mesh.write_all(_manifest("smc.io/v1alpha1", "Workload", "impostor", endpoint))
    assert {answer["version"] for answer in await caller.next(100)} == {"v1", "v2"}
    await server.kill()


CASES: Mapping[str, tuple[Sequence[tuple[str, str]], dict[str, Any]]] = {
    "plain": ((), {}),
    "post": ((), {"methods": ["POST"]}),
    "get": ((), {"methods": ["GET"]}),
    "twice": ((("x-a", "a"), ("x-a", "b")), {"headers": {"x-a": "a,b"}}),
    "last": ((("x-a", "a"), ("x-a", "b")), {"headers": {"x-a": "b"}}),
    "underscore": ((("x_a", "v"),), {"headers": {"x_a": "v"}}),
    "internal": ((("x-envoy-internal", "v"),), {"headers": {"x-envoy-internal": "v"}}),
    "certificate": ((("x-forwarded-client-cert", "v"),), {"headers": {"x-forwarded-client-cert": "v"}}),
    "space": ((("x-a", " v "),), {"headers": {"x-a": "v"}}),
    "type": ((), {"headers": {"content-type": "application/grpc"}}),
    "trailers": ((), {"headers": {"te": "trailers"}}),
    "agent": ((), {"headers": {"user-agent": ".*grpc.*"}}),
    "host": ((), {"headers": {"host": f"quotes.shop:{PORT}"}}),
    "id": ((), {"headers": {"x-request-id": ".*"}}),
    "scheme": ((), {"headers": {"x-forwarded-proto": ".*"}}),
    "query": ((), {}),
    "dots": ((), {}),
}
"""What is sent, and what a match asks for beside the path, which is the name; `query` and `dots` are sent with them."""

CALLING = """
import grpc, json, sys
target, cases = sys.argv[1], json.loads(sys.argv[2])
credentials = grpc.xds_channel_credentials(grpc.local_channel_credentials())
with grpc.secure_channel(target, credentials) as channel:
    for path, metadata in cases:
        try:
            answer = channel.unary_unary(path)(b"", metadata=metadata, timeout=10, wait_for_ready=True)
            print(json.loads(answer)["version"])
        except grpc.RpcError as e:
            print(e.code().name)
"""


async def test_explain_says_of_a_programs_calls_what_becomes_of_them(mesh: Programs, caller: Asking) -> None:
    """Every case once as what policy asks for, under /judged, and once as a condition that leads to v2, under /led."""
    matches, splits = [{"name": "led", "pathRegex": "/led/"}], []
    for name, (_, asked) in CASES.items():
        matches.append({"name": name, "pathRegex": f"/judged/{name}$"} | asked)
        condition = [{"name": name, "pathRegex": f"/led/{name}$"} | asked]
        splits.append(_manifest("specs.smi-spec.io/v1alpha4", "HTTPRouteGroup", name, {"matches": condition}))
        backends = {"service": "quotes", "backends": [{"service": "quotes-v2", "weight": 1}]}
        backends["matches"] = [{"kind": "HTTPRouteGroup", "name": name}]
        splits.append(_manifest("split.smi-spec.io/v1alpha4", "TrafficSplit", name, backends))
    account = {"kind": "ServiceAccount", "namespace": "shop"}
    target = {
        "destination": account | {"name": "quotes"},
        "rules": [{"kind": "HTTPRouteGroup", "name": "cases"}],
        "sources": [account | {"name": "caller"}],
    }
    policy = [
        _manifest("specs.smi-spec.io/v1alpha4", "HTTPRouteGroup", "cases", {"matches": matches}),
        _manifest("access.smi-spec.io/v1alpha3", "TrafficTarget", "cases", target),
    ]
    # Whoever is led nowhere else comes to v1, so that it is seen who was.
    await mesh.write_all(*splits, *policy, _split(1, 0), wait=True)
    calls = [
        (f"/{kind}/{'x/../' if name == 'dots' else ''}{name}{'?x=1' if name == 'query' else ''}", metadata)
        for name, (metadata, _) in CASES.items()
        for kind in ("judged", "led")
    ]
    said = await asyncio.to_thread(_explained, mesh.credential, calls)
    await caller.until({"v1"})
    bootstrap = mesh.proxyless["shop/caller"].bootstrap
    printed = await mesh.children.run(
        "calls",
        [sys.executable, "-c", CALLING, TARGET, json.dumps(calls)],
        env={"GRPC_XDS_BOOTSTRAP": str(bootstrap)},
    )
    assert dict(zip(calls, printed.split(), strict=True)) == dict(zip(calls, said, strict=True))
    assert set(said) == {"v1", "v2", "PERMISSION_DENIED"}
    await mesh.delete_all(*splits, *policy, _split(1, 0))
    await mesh.write_all(*_policy(GET), wait=True)
    await caller.until({"v1", "v2"})


def _explained(credential: Path, calls: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> list[str]:
    """Who answers each call of the caller's, or PERMISSION_DENIED."""
    found = []
    with contextlib.closing(Session(credential, ())) as session:
        for path, metadata in calls:
            headers = [pb.Header(name=name, value=value) for name, value in metadata]
            request = pb.ExplainRequest(caller="shop/caller", service="shop/quotes", path=path, headers=headers)
            answer = session.call("Explain", request)
            (way,) = answer.ways
            known = {"allowed": way.service.rpartition("-")[2], "denied": "PERMISSION_DENIED"}
            found.append(known[answer.verdict])
    return found


async def test_what_policy_does_not_allow_the_server_refuses(mesh: Programs, caller: Asking) -> None:
    place = await mesh.program("other", "other")
    for asker, method in ((place, GET), (Place("shop", "caller", "caller", ""), DELETE)):
        asking = await mesh.ask(asker, method)
        found = await asking.next(40)
        assert {(answer["status"], answer["error"]) for answer in found} == {
            ("PERMISSION_DENIED", "Unauthorized RPC rejected")
        }
        if method == DELETE:
            await mesh.write_all(*_policy(GET, DELETE), wait=True)
            await asking.until({"OK"}, key="status")
            await mesh.write_all(*_policy(GET), wait=True)
            await asking.until({"PERMISSION_DENIED"}, key="status")
        await asking.process.kill()


async def test_where_policy_is_only_counted_every_workload_may_call(mesh: Programs, caller: Asking) -> None:
    asking = await mesh.ask(Place("shop", "caller", "caller", ""), DELETE)
    await asking.until({"PERMISSION_DENIED"}, key="status")
    for mode, status in (("audit", "OK"), ("enforcing", "PERMISSION_DENIED")):
        await mesh.write_all(_manifest("smc.io/v1alpha1", "NamespaceConfig", "default", {"mode": mode}), wait=True)
        await asking.until({status}, key="status")
    await asking.process.kill()


async def test_a_split_moves_calls_that_go_on_without_a_failure(mesh: Programs, caller: Asking) -> None:
    await mesh.write_all(_split(90, 10), wait=True)
    await caller.next(50)
    counted = Counter(answer["version"] for answer in await caller.next(500))
    assert is_fair(counted["v2"], 500, 0.1), counted
    for v1, v2, left in ((0, 100, {"v2"}), (100, 0, {"v1"})):
        await mesh.write_all(_split(v1, v2), wait=True)
        await caller.until(left)
    assert Counter(answer["status"] for answer in caller.all()).keys() == {"OK"}


async def test_whichever_replica_dies_calls_go_on_and_news_arrive(mesh: Programs, caller: Asking) -> None:
    for replica, split, left in (
        (mesh.replicas[0], _split(0, 100), {"v2"}),
        (mesh.replicas[1], _split(100, 0), {"v1"}),
    ):
        await replica.process.kill()
        await eventually(partial(_written, mesh, split), timeout=60, every=1, what="policy can be written")
        await caller.until(left)
        await replica.start()
        await replica.until_ready()
    assert Counter(answer["status"] for answer in caller.all()).keys() == {"OK"}


async def _written(mesh: Programs, document: dict[str, Any]) -> bool:
    try:
        await mesh.write_all(document)
    except ProcessFailed:
        return False
    return True


async def test_certificates_are_replaced_while_calls_go_on(mesh: Programs, caller: Asking) -> None:
    files = [
        mesh.proxyless[f"shop/{name}"].directory / WORKLOAD / "certificate.pem" for name in ("caller", "quotes-v1")
    ]
    before = [await asyncio.to_thread(Path.read_text, path) for path in files]
    config = {"certificates": {"workloadTTL": "20s"}}
    document = {"apiVersion": "smc.io/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "default"}, "spec": config}
    await mesh.write_all(document)

    def replaced() -> bool:
        return all(path.read_text() != text for path, text in zip(files, before, strict=True))

    await eventually(replaced, timeout=30, what="both have another certificate")
    # New connections show it, and are taken: a replica of a service that was away comes back under the new one.
    await asyncio.sleep(25)  # longer than the life of a certificate
    assert {answer["status"] for answer in await caller.next(50)} == {"OK"}
    assert Counter(answer["status"] for answer in caller.all()).keys() == {"OK"}
