"""Envoys that speak the state of the world, or ask several services, are served as well as the others."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually
from e2e.kit.prober import Prober
from smc.demo import bookstore
from smc.demo.local import Plan
from smc.proxy import envoy

pytestmark = pytest.mark.asyncio(loop_scope="module")

AGGREGATED = ("bookbuyer/bookbuyer", "bookstore/bookstore-v1")
"""State of the world, all types on one stream."""
APART = "bookstore/bookstore-v2"
"""State of the world, and a stream each for Clusters, for listeners and for all else."""
APART_DELTA = "bookthief/bookthief"
"""The same as deltas."""

WRAPPER = """#!{python}
import json, os, sys

at = sys.argv.index("--config-path") + 1
with open(sys.argv[at]) as file:
    bootstrap = json.load(file)
node, dynamic = bootstrap["node"]["id"], bootstrap["dynamic_resources"]
if node != {apart_delta!r}:
    dynamic["ads_config"]["api_type"] = "GRPC"
if node in ({apart!r}, {apart_delta!r}):
    for config in ("cds_config", "lds_config"):
        del dynamic[config]["ads"]
        dynamic[config]["api_config_source"] = dynamic["ads_config"]
sys.argv[at] = os.path.join(os.path.dirname(sys.argv[at]), "changed.json")
with open(sys.argv[at], "w") as file:
    json.dump(bootstrap, file)
os.execv({envoy!r}, [{envoy!r}, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def wrapper() -> Iterator[str]:
    """An Envoy that changes its bootstrap before it starts."""
    with tempfile.TemporaryDirectory(prefix="smc-e2e-") as directory:
        path = Path(directory) / "envoy"
        path.write_text(
            WRAPPER.format(python=sys.executable, envoy=envoy.find("", {}), apart=APART, apart_delta=APART_DELTA)
        )
        path.chmod(0o755)
        yield str(path)


async def _api_types(mesh: Mesh, workload: str) -> tuple[str, ...]:
    """Over which kinds of streams its Envoy is configured: of all else, of Clusters and of listeners."""
    (dynamic,) = [
        config["bootstrap"]["dynamic_resources"]
        for config in await mesh.sidecars[workload].admin.config_dump()
        if "bootstrap" in config
    ]
    sources = (
        dynamic["ads_config"],
        *(dynamic[name].get("api_config_source") for name in ("cds_config", "lds_config")),
    )
    return tuple(source["api_type"] for source in sources if source)


async def _until(prober: Prober, found: Any, what: str) -> None:
    """Until the last 20 answers are as `found` says of them."""

    async def so() -> bool:
        await prober.more(20)
        return bool(found(prober.probes[-20:]))

    await eventually(so, timeout=10, what=what)


def _policy(*visitors: str) -> str:
    kept = "    - kind: ServiceAccount\n      name: bookbuyer\n      namespace: bookbuyer\n"
    return bookstore.policy().replace(kept, "".join(kept.replace("bookbuyer", name) for name in visitors))


async def test_splits_policy_and_endpoints_change_without_a_failure(wrapper: str) -> None:
    async with Mesh(Plan(proxy_env=(("SMC_ENVOY", wrapper),))) as mesh:
        assert {workload: await _api_types(mesh, workload) for workload in mesh.sidecars} == {
            **dict.fromkeys(AGGREGATED, ("GRPC",)),
            APART: ("GRPC",) * 3,
            APART_DELTA: ("DELTA_GRPC",) * 3,
        }
        await mesh.wait_synced()
        rows = Counter(str(proxy["name"]) for proxy in await mesh.proxies())
        assert rows == {**dict.fromkeys(AGGREGATED, 1), APART: 3, APART_DELTA: 3}, "each stream is one of its own"

        async with mesh.prober(rate=150) as buyer, mesh.prober("bookthief", rate=50, expect=403) as thief:
            for v1, v2 in ((100, 0), (0, 100), (50, 50)):
                await mesh.apply(bookstore.split(v1, v2))
                wanted = {version for version, weight in (("v1", v1), ("v2", v2)) if weight}
                await _until(
                    buyer, lambda last, wanted=wanted: {p.version for p in last} == wanted, f"the split {v1}:{v2}"
                )

            for visitors, status in ((("bookbuyer", "bookthief"), 200), (("bookbuyer",), 403)):
                await mesh.apply(_policy(*visitors))
                await _until(thief, lambda last, status=status: {p.status for p in last} == {status}, f"all {status}")

            # A new endpoint, a new service, and the service's end.
            newcomer = await mesh.add(bookstore.store("v1", 1))
            mesh.write("more", _service("more"))
            known = f"{newcomer.address}:{INBOUND_PORT}"
            for workload in (*AGGREGATED, APART, APART_DELTA):
                admin = mesh.sidecars[workload].admin

                async def has_both(admin: Any = admin) -> bool:
                    clusters = await admin.clusters()
                    return "bookstore/more|80" in clusters and known in {
                        host.address for host in clusters["bookstore/bookstore|80"]
                    }

                await eventually(has_both, timeout=20, what=f"{workload} knows a new endpoint and a new service")
            mesh.write("more", None)
            for workload in (*AGGREGATED, APART, APART_DELTA):
                admin = mesh.sidecars[workload].admin

                async def gone(admin: Any = admin) -> bool:
                    return "bookstore/more|80" not in await admin.clusters()

                await eventually(gone, timeout=20, what=f"{workload} has let the service go")

            # The replica that serves the caller dies; what it is sent by another changes nothing.
            serving = await mesh.replica_of("bookbuyer")
            assert serving is not None
            await serving.process.kill()

            async def elsewhere() -> bool:
                return await mesh.replica_of("bookbuyer") not in (None, serving)

            await eventually(elsewhere, timeout=20, what="the caller is served by another replica")
            await mesh.apply(bookstore.split(100, 0))
            await _until(buyer, lambda last: {p.version for p in last} == {"v1"}, "a change through another replica")
            await buyer.until(3000)
        buyer.assert_clean(minimum=3000)
        assert {p.status for p in thief.probes} == {200, 403}
        for workload in (*AGGREGATED, APART, APART_DELTA):
            assert await mesh.sidecars[workload].admin.pending() == "", workload


def _service(name: str) -> str:
    return json.dumps(
        {
            "apiVersion": "smc.io/v1alpha1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "bookstore"},
            "spec": {"ports": [{"port": 80, "targetPort": 8080, "protocol": "http"}]},
        }
    )
