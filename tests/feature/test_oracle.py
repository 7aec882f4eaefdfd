"""`smc explain` says of any request what the manifests say, in whatever mesh: the same as `tests/oracle.py`, which real
Envoys are held against too.
"""

from __future__ import annotations

import json
import random

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from smc.envoy.requests import Request as Asked
from smc.errors import NotFound
from smc.explaining import Explanation, Verdict, explain
from smc.mesh import Mesh
from smc.model import Name
from smc.records import MeshRecord
from tests.drawn import PLACES, TRUST_DOMAIN, Drawn, Place
from tests.oracle import DENIED, NOBODY, NOWHERE, Oracle, Outcome, Request
from tests.unit.mesh.store import KEYS, Store

REQUESTS = 40
"""For each mesh."""

HERE = tuple(Place(*place, f"127.0.9.{n}") for n, place in enumerate(PLACES, start=1))


def mesh_of(drawn: Drawn) -> Mesh:
    """In which every workload is ready."""
    store = Store()
    store.put(KEYS.mesh, MeshRecord("m", TRUST_DOMAIN, "1"))
    for created, document in enumerate(drawn.documents):
        store.apply(json.dumps(document), created=float(created))
    store.certify(*{f"{place.namespace}/{place.account}" for place in HERE})
    store.ready(*(f"{place.namespace}/{place.name}" for place in HERE))
    return store.build()


def said(mesh: Mesh, request: Request) -> frozenset[Outcome]:
    """What `explain` thinks possible."""
    asked = Asked(request.method, request.path, tuple(request.headers.items()))
    try:
        found = explain(mesh, Name(*request.source), Name(*request.service), asked, request.port)
    except NotFound:
        return frozenset({NOWHERE})
    if found.verdict is Verdict.NOWHERE:
        return frozenset({NOBODY})
    outcomes = frozenset(_outcomes(found))
    allowed = {outcome.status == 200 for outcome in outcomes}
    assert found.verdict is {(True,): Verdict.ALLOWED, (False,): Verdict.DENIED}.get(tuple(allowed), Verdict.SOME)
    return outcomes


def _outcomes(found: Explanation) -> set[Outcome]:
    outcomes = set()
    for server in (server for way in found.ways for server in way.servers):
        assert server.by or server.misses or not server.allowed, "an answer has its reason"
        name = (server.workload.namespace, server.workload.name)
        outcomes.add(Outcome(200, name, server.app_port) if server.allowed else DENIED)
    return outcomes


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
@example(seed=1643)  # no service is left
def test_explain_says_of_every_request_what_the_manifests_say(seed: int) -> None:
    drawn = Drawn(random.Random(seed), 0, HERE)
    oracle, mesh = Oracle(drawn.documents), mesh_of(drawn)
    for request in [drawn.request() for _ in range(REQUESTS)]:
        assert said(mesh, request) == oracle.outcomes(request), request
