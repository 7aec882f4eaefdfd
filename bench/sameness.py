"""What one changed endpoint leaves as it was, in this process: which proxies keep the very Snapshot that they had.

A Snapshot that is the same object is never looked at by a stream: this is why a change costs what it concerns. The
times are of one thread that has a core for itself, without etcd, gRPC or streams.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.figures import Spread
from bench.shape import Change, Shape
from cluster.kv import KeyValue, Put, View
from smc import plugins
from smc.codec import encode
from smc.envoy.snapshot import Generator
from smc.keys import Keys
from smc.mesh import Mesh, build
from smc.model import Name
from smc.records import BundleRecord, CertificateRecord, MeshRecord
from smc.xds.snapshot import Snapshot, Type


@dataclass(frozen=True, slots=True)
class Kept:
    """What a change of one endpoint came to, in the worst of all rounds."""

    concerned: int
    """The proxies that are told of the service."""
    same: int
    """Proxies that kept the same Snapshot object."""
    new: int
    """Proxies with another one."""
    shared: int
    """How many different sets of load assignments these have between them."""
    build_ms: Spread
    """View -> Mesh."""
    snapshots_ms: Spread
    """Mesh -> the Snapshots of the affected proxies."""


def measure(shape: Shape, rounds: int) -> Mapping[str, Kept]:
    """Make each change of an endpoint so many times."""
    keys = Keys("bench")
    items: dict[str, KeyValue] = {}
    records = [*shape.records(keys), *_authority(shape, keys)]
    view = _view(items, records, revision=1)
    policies = plugins.policies()
    generator = Generator(lambda record: record.sealed_key)
    mesh = build(None, view, policies)
    snapshots = {name: generator.snapshot(mesh, name) for name in shape.proxies}
    found: dict[str, Kept] = {}
    revision = 1
    for what in (Change.ALL, Change.ONE, Change.FEW, Change.NONE, Change.MANY):
        build_ms: list[float] = []
        snapshots_ms: list[float] = []
        worst: tuple[int, int] = (0, 0)
        for number in range(rounds):
            revision += 1
            view = _view(items, shape.change(keys, what, number), revision=revision)
            started = time.perf_counter()
            mesh = build(mesh, view, policies)
            built = time.perf_counter()
            made = _made(generator, mesh, snapshots)
            snapshots_ms.append((time.perf_counter() - built) * 1000)
            build_ms.append((built - started) * 1000)
            new = [made[name] for name in shape.proxies if made[name] is not snapshots[name]]
            shared = {id(snapshot.sets[Type.ENDPOINT]) for snapshot in new}
            worst = max(worst, (len(new), len(shared)))
            snapshots = made
        found[what.value] = Kept(
            shape.concerned(what),
            len(snapshots) - worst[0],
            *worst,
            Spread.of(build_ms),
            Spread.of(snapshots_ms),
        )
    return found


def _made(generator: Generator, mesh: Mesh, before: Mapping[Name, Snapshot]) -> dict[Name, Snapshot]:
    return {name: generator.snapshot(mesh, name) if name in mesh.affected else had for name, had in before.items()}


def _authority(shape: Shape, keys: Keys) -> list[Put]:
    """What the leader would have issued: texts in place of certificates, which nobody reads here."""
    return [
        Put(keys.mesh, encode(MeshRecord("00", "bench.smc.internal", "1"))),
        Put(keys.bundle, encode(BundleRecord(("root",)))),
        *(
            Put(
                keys.certificate(identity),
                encode(CertificateRecord(identity, f"chain of {identity}", b"key", "1", 0.0, 4e9, 1)),
            )
            for identity in shape.identities
        ),
    ]


def _view(items: dict[str, KeyValue], puts: Sequence[Put], *, revision: int) -> View:
    """The next View: what is put, over what is there."""
    for put in puts:
        before = items.get(put.key)
        items[put.key] = KeyValue(put.key, put.value, before.create_revision if before else revision, revision)
    return View(1, 1, revision, dict(items), frozenset(put.key for put in puts))
