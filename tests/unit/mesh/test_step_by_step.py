"""A Mesh built step by step is what one built from nothing is, and touches no more than what changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smc.envoy.snapshot import Generator
from smc.mesh import Mesh, Proxy, build
from smc.model import Name, Protocol
from smc.records import BundleRecord, SyncedRecord
from tests.unit.envoy.nouns import open_key
from tests.unit.mesh import store
from tests.unit.mesh.store import KEYS, POLICIES, Store, endpoint

NAMESPACES = ("a", "b")
SERVICES = ("s", "t", "u")
WORKLOADS = ("w", "x", "y")
ACCOUNTS = ("s", "t")
SPLIT = "split.smi-spec.io/TrafficSplit"
TARGET = "access.smi-spec.io/TrafficTarget"
GROUP = "specs.smi-spec.io/HTTPRouteGroup"

Change = Callable[[Store], None]


def said(value: Any) -> Any:
    """What a value says, whatever objects it is made of."""
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, *(said(getattr(value, f.name)) for f in fields(value) if f.name not in HOW))
    if isinstance(value, tuple | list):
        return [said(item) for item in value]
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: said(item) for key, item in value.items()}
    return value


HOW = {"affected", "stages"}
"""What of a Mesh tells how it came about, and not what it is."""


def _on(*arguments: Any, change: Callable[..., object]) -> Change:
    return lambda to: void(change(to, *arguments))


def void(_: object) -> None:
    return None


def _delete(to: Store, key: str) -> None:
    if key in to.items:
        to.delete(key)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One write, of the kinds that a mesh sees, on so few names that they meet all the time."""
    one = lambda of: draw(st.sampled_from(of))  # noqa: E731
    namespace, service, workload, account = one(NAMESPACES), one(SERVICES), one(WORKLOADS), one(ACCOUNTS)
    source = one(("files", "pods"))
    service_name, workload_name = f"{namespace}/{service}", f"{namespace}/{workload}"
    protocol = one((Protocol.HTTP, Protocol.GRPC))
    ports = draw(st.lists(st.sampled_from([80, 81]), min_size=1, unique=True))
    reachable = one((None, None, (), ("a/s", "b/t"), ("b/u",)))
    backed = draw(st.lists(st.sampled_from(SERVICES), max_size=2, unique=True))
    gone = draw(st.integers(0, 3)) == 0
    kind = one(
        ("service", "service", "own service", "endpoints", "endpoints", "workload", "own workload", "own workload", "ready", "ready",
         "certificate", "certificate", "split", "split", "target", "group", "quarantine", "quarantine", "config", "bundle", "synced", "broken")
    )  # fmt: skip
    match kind:
        case "service":
            key = KEYS.service(source, Name(namespace, service))
            put = lambda to: to.offer_service(
                service_name, *((p, "8080") for p in ports), protocol=protocol, source=source
            )  # noqa: E731
        case "own service":
            key = KEYS.manifest(f"smc.io/Service/{service_name}")
            put = lambda to: to.apply(store.service_text(service_name, *ports, protocol=protocol.value))  # noqa: E731
        case "endpoints":
            key = KEYS.endpoints(source, Name(namespace, service))
            found = [
                endpoint(f"{namespace}/{w}", one(ACCOUNTS), *((p, one((8080, 8081))) for p in ports))
                for w in draw(st.lists(st.sampled_from(WORKLOADS), unique=True))
            ]
            put = lambda to: to.offer_endpoints(service_name, *found, source=source)  # noqa: E731
        case "workload":
            key = KEYS.workload(source, Name(namespace, workload))
            put = lambda to: to.offer_workload(workload_name, account, reachable=reachable, source=source)  # noqa: E731
        case "own workload":
            key = KEYS.manifest(f"smc.io/Workload/{workload_name}")
            put = lambda to: to.apply(store.workload_text(workload_name, account, *backed, reachable=reachable))  # noqa: E731
        case "ready":
            key = KEYS.ready(Name(namespace, workload))
            put = lambda to: to.ready(workload_name)  # noqa: E731
        case "certificate":
            key = KEYS.certificate(store.identity(f"{namespace}/{account}"))
            number = draw(st.integers(1, 2))
            put = lambda to: to.certify(f"{namespace}/{account}", number=number)  # noqa: E731
        case "split":
            split, root = one(("one", "two")), service
            key = KEYS.manifest(f"{SPLIT}/{namespace}/{split}")
            weights = {s: draw(st.integers(0, 2)) for s in SERVICES if s != root}
            weights[one([*weights])] = 3
            put = lambda to: to.apply(store.split_text(f"{namespace}/{split}", root, **weights), created=draw_created)  # noqa: E731
            draw_created = float(draw(st.integers(0, 2)))
        case "target":
            target = one(("one", "two"))
            key = KEYS.manifest(f"{TARGET}/{namespace}/{target}")
            sources = draw(st.lists(st.sampled_from(["a/s", "a/t", "b/s"]), min_size=1, unique=True))
            group = one(("all", "some"))
            put = lambda to: to.apply(store.target_text(f"{namespace}/{target}", account, *sources, group=group))  # noqa: E731
        case "group":
            group = one(("all", "some"))
            key = KEYS.manifest(f"{GROUP}/{namespace}/{group}")
            path = one(("/.*", "/x"))
            put = lambda to: to.apply(store.group_text(f"{namespace}/{group}", path))  # noqa: E731
        case "quarantine":
            manifest = one((f"{SPLIT}/{namespace}/one", f"{TARGET}/{namespace}/one", f"{GROUP}/{namespace}/all"))

            def quarantine(to: Store) -> None:
                there = to.items.get(KEYS.manifest(manifest))
                revision = there.mod_revision if there is not None else 3
                key = KEYS.quarantine(Name(namespace, workload), manifest, revision)
                if gone and key in to.items:
                    to.delete(key)
                else:
                    to.quarantine(workload_name, manifest, revision)

            return quarantine
        case "config":
            key = KEYS.manifest("smc.io/MeshConfig/-/default")
            egress = one(("allow", "deny"))
            text = f"apiVersion: smc.io/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\nspec: {{egress: {egress}}}\n"
            put = lambda to: to.apply(text)  # noqa: E731
        case "bundle":
            number = draw(st.integers(1, 2))
            return lambda to: void(to.put(KEYS.bundle, BundleRecord((f"ROOT {number}",))))
        case "synced":
            key = KEYS.synced(source)
            put = lambda to: to.put(key, SyncedRecord(source))  # noqa: E731
        case _:
            index = draw(st.integers(0, 1000))

            def broken(to: Store) -> None:
                keys = sorted(k for k in to.items if k not in (KEYS.mesh, KEYS.bundle))
                if keys:
                    to.put(keys[index % len(keys)], b"{}")

            return broken
    return (lambda to: _delete(to, key)) if gone else (lambda to: void(put(to)))


def parts(proxy: Proxy) -> list[object]:
    out = proxy.outbound
    return [
        *out.upstreams, *out.assignments, *out.destinations, *proxy.inbound, proxy.policy, proxy.workload,
        *([] if proxy.certificate is None else [proxy.certificate]),
    ]  # fmt: skip


def check_identity(before: Mesh, now: Mesh) -> None:
    """What says the same is the same object."""
    for name in before.proxies.keys() & now.proxies.keys():
        was, is_ = before.proxies[name], now.proxies[name]
        if said(was) == said(is_):
            assert was is is_, name
        if said(was.outbound) == said(is_.outbound):
            assert was.outbound is is_.outbound
        known = {repr(said(part)): part for part in parts(was)}
        for part in parts(is_):
            assert known.get(repr(said(part)), part) is part
    if said(before.config) == said(now.config):
        assert before.config is now.config
    moved = {
        name
        for name in before.proxies.keys() | now.proxies.keys()
        if before.proxies.get(name) is not now.proxies.get(name)
    }
    if before.config is not now.config or before.bundle is not now.bundle:
        moved |= before.proxies.keys() | now.proxies.keys()
    assert now.affected == moved


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(steps=st.lists(st.lists(changes(), min_size=1, max_size=4), min_size=1, max_size=14))
def test_a_mesh_built_step_by_step_equals_one_built_from_nothing(steps: list[list[Change]]) -> None:
    written = Store()
    mesh = written.build()
    written.view()
    stepped = Generator(open_key)
    for step in steps:
        for change in step:
            change(written)
        before, told = mesh, said(mesh)
        mesh = build(before, written.view(), POLICIES)
        assert said(before) == told, "the Mesh before was changed"
        check_identity(before, mesh)
        fresh = written.build()
        assert said(mesh) == said(fresh)
        made = Generator(open_key)
        for name in mesh.proxies:
            assert stepped.snapshot(mesh, name).versions == made.snapshot(fresh, name).versions
