"""One Envoy refuses what all others take: only it goes without, everybody else moves on, and the operator is told."""

from __future__ import annotations

from collections import Counter

import pytest

from e2e.kit.mesh import INBOUND_PORT, Mesh, eventually, module_mesh
from e2e.kit.prober import statuses
from smc.demo import bookstore
from smc.demo.programs import Sidecar

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

ODD = bookstore.store("v1", 1)
"""A second bookstore-v1, whose Envoy takes smaller regular expressions than SMC lets through."""
SHORT, LONG = "/archive/[a-z]+", "/archive/[a-z]{150}"
PAGE = "/archive/" + "p" * 150
"""Both expressions match it."""


def _archive(expression: str) -> str:
    return f"""
apiVersion: specs.smi-spec.io/v1alpha4
kind: HTTPRouteGroup
metadata:
  name: archive
  namespace: bookstore
spec:
  matches:
    - name: archive
      pathRegex: {expression}
      methods: [GET]
"""


TARGET = """
apiVersion: access.smi-spec.io/v1alpha3
kind: TrafficTarget
metadata:
  name: bookbuyer-to-archive
  namespace: bookstore
spec:
  destination:
    kind: ServiceAccount
    name: bookstore-v1
    namespace: bookstore
  rules:
    - kind: HTTPRouteGroup
      name: archive
  sources:
    - kind: ServiceAccount
      name: bookbuyer
      namespace: bookbuyer
"""


ALL = ("bookstore-v1", ODD.name)


async def _reached(mesh: Mesh, path: str, number: int = 200) -> dict[str, int]:
    """Ask bookstore-v1 for a page that it does not have; returns how many requests each of its workloads let through.

    What its proxy lets through the application answers with 404.
    """

    async def seen(name: str) -> int:
        requests = (await mesh.app(name).counters())["requests"]
        return sum(entry["count"] for entry in requests if entry["path"] == path)

    before = {name: await seen(name) for name in ALL}
    probes = await mesh.send(number, path, host="bookstore-v1.bookstore")
    reached = {name: await seen(name) - before[name] for name in ALL}
    passed = sum(reached.values())
    assert statuses(probes) == Counter({404: passed, 403: number - passed}) - Counter(), "let through, or denied"
    return reached


async def _until_reached(mesh: Mesh, path: str, wanted: set[str], timeout: float = 10) -> None:
    """Until exactly these workloads let the path through."""

    async def so() -> bool:
        found = await _reached(mesh, path, 40)
        return {name for name in ALL if found[name]} == wanted

    await eventually(so, timeout=timeout, what=f"{path} is let through by exactly {sorted(wanted)}")


async def _refusals(sidecar: Sidecar) -> int:
    """How often its Envoy has refused a configuration since it was started."""
    kinds = r"^(cluster_manager\.cds|listener_manager\.lds|cluster\..+|http\..+\.rds\..+|sds\..+)\.update_rejected$"
    return sum((await sidecar.admin.stats(kinds)).values())


async def test_what_one_envoy_refuses_is_kept_from_it_alone(mesh: Mesh) -> None:
    odd = await mesh.add(ODD, "--re2-max-program-size", "100")
    await mesh.apply(_archive(SHORT) + "---" + TARGET)
    await mesh.wait_synced()
    async with mesh.prober(rate=150) as prober:
        await _until_reached(mesh, PAGE, {*ALL})
        assert {await _refusals(sidecar) for sidecar in mesh.sidecars.values()} == {0}

        # It alone refuses, and it alone goes without.
        await mesh.apply(_archive(LONG))
        await _until_reached(mesh, PAGE, {"bookstore-v1"})
        await mesh.wait_synced()
        refused = {workload: await _refusals(sidecar) for workload, sidecar in mesh.sidecars.items()}
        assert refused.pop(odd.workload) > 0
        assert set(refused.values()) == {0}
        assert await _reached(mesh, "/archive/p") == dict.fromkeys(ALL, 0), "everybody has left the old rule"
        found = await _reached(mesh, PAGE)
        assert (found["bookstore-v1"] > 0, found[ODD.name]) == (True, 0), "what is left out is denied"

        # The operator reads it at the manifest and at the proxy, in Envoy's words.
        words = f"regex '(?:{LONG}).*' RE2 program size of"
        described = await mesh.smc("describe", "httproutegroup", "archive", "-n", "bookstore")
        assert f"it is left out for proxy {odd.workload}, which refuses it: {words}" in described
        refused_by = described.partition("Refused by:")[2].partition("Reached:")[0]
        assert f"{odd.workload}  RouteConfiguration inbound|8080" in refused_by
        assert words in refused_by
        assert "max program size of 100" in refused_by
        for other in ("bookstore/bookstore-v1 ", "bookstore/bookstore-v2 "):
            assert other not in refused_by
        states = {str(proxy["name"]): proxy for proxy in await mesh.proxies()}
        assert {name for name, proxy in states.items() if proxy["refused"]} == {odd.workload}
        (refusal,) = states[odd.workload]["refused"]
        assert refusal["resource"] == "inbound|8080"
        assert refusal["text"].startswith("specs.smi-spec.io/HTTPRouteGroup/bookstore/archive is left out: ")
        assert words in refusal["text"]

        # Everything else goes on changing there: other rules of the same resource, and services.
        await mesh.apply(bookstore.policy().replace("/books(/[0-9]+)?", "/(books|shelves)(/[0-9]+)?"))
        await _until_reached(mesh, "/shelves", {*ALL})
        clusters = await odd.admin.clusters()
        newcomer = await mesh.add(bookstore.store("v2", 1))

        async def known() -> bool:
            now = await odd.admin.clusters()
            return {host.address for host in now["bookstore/bookstore-v2|80"]} == {
                *(host.address for host in clusters["bookstore/bookstore-v2|80"]),
                f"{newcomer.address}:{INBOUND_PORT}",
            }

        await eventually(known, timeout=10, what="the odd proxy knows a new endpoint")
        assert (await _reached(mesh, PAGE))[ODD.name] == 0

        # Writing the manifest anew ends it.
        await mesh.apply(_archive(SHORT))
        await _until_reached(mesh, PAGE, {*ALL})
        assert "Refused by:  no proxy" in await mesh.smc("describe", "httproutegroup", "archive", "-n", "bookstore")
        await mesh.wait_synced()
        assert not any(proxy["refused"] for proxy in await mesh.proxies())
        await prober.until(3000)
    prober.assert_clean(minimum=3000)
