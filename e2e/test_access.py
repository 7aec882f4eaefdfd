"""Nothing is allowed before there is policy; then exactly what it allows, and the server's Envoy is who refuses.

Each refusal is counted by the RBAC filter of the server's Envoy and has no line in the application's own log; its twin,
which differs in the one thing that policy names, passes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from e2e.kit.mesh import Mesh, eventually, module_mesh
from e2e.kit.prober import Probe, statuses
from smc.demo import bookstore
from smc.demo.local import Plan

mesh = module_mesh(Plan(manifests=()))
pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = 500
SERVER = "bookstore-v1"
"""Asked by its own service, so that one Envoy and one application see every request."""


@dataclass(frozen=True)
class Asked:
    path: str = "/books"
    source: str = "bookbuyer"
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of some requests, as three parties have it."""

    probes: list[Probe]
    allowed: int
    denied: int
    """By the server's Envoy."""
    logged: list[dict[str, object]]
    """By the application."""


async def _ask(mesh: Mesh, asked: Asked, number: int = REQUESTS) -> Outcome:
    admin, log = mesh.sidecar(SERVER).admin, mesh.app(SERVER).access_log
    assert log is not None
    lines = len(log.read_text().splitlines())
    allowed, denied = await admin.verdicts()
    probes = await mesh.send(
        number, asked.path, source=asked.source, host=f"{SERVER}.bookstore", method=asked.method, headers=asked.headers
    )
    allowed_after, denied_after = await admin.verdicts()
    logged = [json.loads(line) for line in log.read_text().splitlines()[lines:]]
    return Outcome(probes, allowed_after - allowed, denied_after - denied, logged)


async def _refused(mesh: Mesh, asked: Asked, number: int = REQUESTS) -> None:
    found = await _ask(mesh, asked, number)
    assert statuses(found.probes) == {403: number}
    assert (found.allowed, found.denied) == (0, number), "it was the server's Envoy, by its RBAC filter"
    assert found.logged == [], "no application has seen any of it"


async def _passed(mesh: Mesh, asked: Asked) -> None:
    found = await _ask(mesh, asked)
    assert statuses(found.probes) == {200: REQUESTS}
    assert (found.allowed, found.denied) == (REQUESTS, 0)
    client = f"spiffe://demo.smc.internal/ns/{asked.source}/sa/{asked.source}"
    server = f"spiffe://demo.smc.internal/ns/bookstore/sa/{SERVER}"
    assert {(p.source, p.destination) for p in found.probes} == {(client, server)}
    assert len(found.logged) == REQUESTS
    seen = {(line["method"], line["path"], line["client"], line["status"]) for line in found.logged}
    assert seen == {(asked.method, asked.path, client, 200)}


async def test_nothing_is_allowed_before_there_is_a_traffictarget(mesh: Mesh) -> None:
    await mesh.wait_synced()
    for source in ("bookbuyer", "bookthief"):
        await _refused(mesh, Asked(source=source))
    rules, _, targets = bookstore.policy().partition("---\n")
    await mesh.apply(rules)
    await mesh.wait_synced()
    # What requests may look like says nothing of who may send them.
    await _refused(mesh, Asked())

    await mesh.apply(targets)

    async def allowed() -> bool:
        return statuses((await _ask(mesh, Asked(), 10)).probes) == {200: 10}

    await eventually(allowed, timeout=10, what="the bookbuyer may read")


BUY = Asked("/buy", method="POST", headers={"x-membership": "gold"})


@pytest.mark.parametrize(
    ("refused", "twin"),
    [
        pytest.param(Asked("/admin"), Asked("/books"), id="path"),
        pytest.param(Asked(method="DELETE"), Asked(method="GET"), id="method"),
        pytest.param(Asked("/buy", method="POST"), BUY, id="header missing"),
        pytest.param(Asked("/buy", method="POST", headers={"x-membership": "bronze"}), BUY, id="header of other value"),
        pytest.param(Asked(source="bookthief"), Asked(source="bookbuyer"), id="identity"),
    ],
)
async def test_what_policy_does_not_name_is_refused_and_its_twin_passes(
    mesh: Mesh, refused: Asked, twin: Asked
) -> None:
    await _refused(mesh, refused)
    await _passed(mesh, twin)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(Asked("/books/../admin"), id="dots"),
        pytest.param(Asked("/books/%2e%2e/admin"), id="escaped dots"),
        pytest.param(Asked("//admin"), id="doubled slash"),
        pytest.param(Asked("/admin?/books"), id="query"),
        pytest.param(Asked("/buy", method="POST", headers={"x_membership": "gold"}), id="underscore"),
        pytest.param(
            Asked(
                source="bookthief",
                headers={"x-forwarded-client-cert": "URI=spiffe://demo.smc.internal/ns/bookbuyer/sa/bookbuyer"},
            ),
            id="identity in a header",
        ),
    ],
)
async def test_no_other_spelling_of_what_is_refused_passes(mesh: Mesh, asked: Asked) -> None:
    await _refused(mesh, asked, 20)
