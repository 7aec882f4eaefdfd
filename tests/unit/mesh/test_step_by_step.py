"""A Mesh built step by step is what one built from nothing is, and touches no more than what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from operator import methodcaller
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smc.envoy.snapshot import Generator
from smc.mesh import Mesh, Proxy, build
from smc.model import Protocol, Sidecar
from smc.records import BundleRecord, SyncedRecord
from tests.unit.envoy.nouns import open_key
from tests.unit.mesh import store
from tests.unit.mesh.store import KEYS, POLICIES, Store, endpoint, name

NAMESPACES = ("a", "b")
SERVICES = ("s", "t", "u")
WORKLOADS = ("w", "x", "y")
ACCOUNTS = ("s", "t")
SOURCES = ("files", "pods")
PORTS = (80, 81)
SPLIT = "split.smi-spec.io/TrafficSplit"
TARGET = "access.smi-spec.io/TrafficTarget"
BINDING = "access.smi-spec.io/IdentityBinding"
GROUP = "specs.smi-spec.io/HTTPRouteGroup"

TRAFFIC = "smc.io/TrafficPolicy"

Change = Callable[[Store], object]


def said(value: Any) -> Any:
    """What a value says, whatever objects it is made of."""
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, *(said(getattr(value, f.name)) for f in fields(value) if f.name not in HOW))
    if isinstance(value, tuple | list):
        return [said(item) for item in value]
    if isinstance(value, Mapping):
        return {key: said(item) for key, item in value.items()}
    return value


HOW = {"affected", "stages"}
"""What of a Mesh tells how it came about, and not what it is."""


def _quarantine(proxy: str, manifest: str, lift: bool, to: Store) -> None:
    """Leave out the version of the manifest that is there now, or what may have been one."""
    there = to.items.get(KEYS.manifest(manifest))
    revision = there.mod_revision if there is not None else 3
    key = KEYS.quarantine(name(proxy), manifest, revision)
    if lift and key in to.items:
        to.delete(key)
    else:
        to.quarantine(proxy, manifest, revision)


def _break(nth: int, to: Store) -> None:
    """Make a record unreadable."""
    keys = sorted(key for key in to.items if key not in (KEYS.mesh, KEYS.bundle, KEYS.crl))
    if keys:
        to.put(keys[nth % len(keys)], b"{}")


ADDRESSES = ("", "240.0.0.1", "240.0.0.2", "10.96.0.1", "fd00::1")
"""So few that services meet at them; an IPv6 address is as good as none."""
MODES = ("enforcing", "audit", "permissive")
KINDS = (
    "service", "service", "own service", "endpoints", "endpoints", "workload", "own workload", "own workload", "ready",
    "ready", "certificate", "certificate", "split", "split", "target", "bound", "binding",
    "ports", "group", "quarantine", "quarantine", "traffic", "address", "address",
    "config", "namespace config", "bundle", "synced", "broken",
    "revoked", "revoked", "revoked identity", "admitted", "listed", "listed",
    "revoked operator", "admitted operator", "leaving", "leaving",
)  # fmt: skip


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One write, of the kinds that a mesh sees, on so few names that they meet all the time."""

    def one(of: Sequence[Any]) -> Any:
        return draw(st.sampled_from(of))

    def some(of: Sequence[Any], least: int = 0) -> list[Any]:
        return draw(st.lists(st.sampled_from(of), min_size=least, max_size=3, unique=True))

    def number(most: int) -> int:
        return draw(st.integers(0, most))

    namespace, account, source = one(NAMESPACES), one(ACCOUNTS), one(SOURCES)
    short = one(SERVICES)
    service, workload, owner = f"{namespace}/{short}", f"{namespace}/{one(WORKLOADS)}", f"{namespace}/{account}"
    protocol = one(tuple(Protocol))
    sidecar = one(tuple(Sidecar))
    reachable = one((None, None, (), ("a/s", "b/t"), ("b/u",)))
    gone = number(3) == 0
    put: Change
    match one(KINDS):
        case "service":
            key = KEYS.service(source, name(service))
            ports = [(port, "8080") for port in some(PORTS, 1)]
            put = methodcaller(
                "offer_service", service, *ports, protocol=protocol, address=one(ADDRESSES), source=source
            )
        case "own service":
            key = KEYS.manifest(f"smc.io/Service/{service}")
            put = methodcaller(
                "apply",
                store.service_text(
                    service,
                    *some(PORTS, 1),
                    protocol=protocol.value,
                    address=one(ADDRESSES[:4:3]),
                ),
            )
        case "endpoints":
            key = KEYS.endpoints(source, name(service))
            found = [
                endpoint(f"{namespace}/{w}", one(ACCOUNTS), *((port, one((8080, 8081))) for port in some(PORTS, 1)))
                for w in some(WORKLOADS)
            ]
            put = methodcaller("offer_endpoints", service, *found, source=source)
        case "workload":
            key = KEYS.workload(source, name(workload))
            put = methodcaller("offer_workload", workload, account, reachable=reachable, source=source, sidecar=sidecar)
        case "own workload":
            key = KEYS.manifest(f"smc.io/Workload/{workload}")
            text = store.workload_text(
                workload,
                account,
                *some(SERVICES),
                reachable=reachable,
                labels=one(("{}", "{app: a}", "{app: b}")),
                sidecar=sidecar,
            )
            put = methodcaller("apply", text)
        case "leaving":
            revision = 1 + number(11)
            key = KEYS.leaving(name(workload), revision)
            put = methodcaller("leaves", workload, account, *some(SERVICES), revision=revision)
        case "ready":
            key = KEYS.ready(name(workload))
            put = methodcaller("ready", workload)
        case "certificate":
            key = KEYS.certificate(store.identity(owner))
            put = methodcaller("certify", owner, number=1 + number(1))
        case "split":
            split = f"{namespace}/{one(('one', 'two'))}"
            key = KEYS.manifest(f"{SPLIT}/{split}")
            weights = {other: number(2) for other in SERVICES if other != short}
            weights[one([*weights])] = 3
            put = methodcaller(
                "apply", store.split_text(split, short, *some(("all", "some")), **weights), created=float(number(2))
            )
        case "target":
            target = f"{namespace}/{one(('one', 'two'))}"
            key = KEYS.manifest(f"{TARGET}/{target}")
            callers = some(("a/s", "a/t", "b/s"), 1)
            destination = f"{account}{one(('', ', namespace: a', ', namespace: b'))}"
            text = store.target_text(target, destination, *callers, group=one(("all", "some")))
            if kind := one(("", "", "TCPRoute", "UDPRoute", "connections")):
                text = text.replace("rules: [", f"rules: [{{kind: {kind}, name: ports}}, ")
            if kind == "connections":
                text = text.replace(
                    text[text.index("rules: [") : text.index("]") + 1], "rules: [{kind: TCPRoute, name: ports}]"
                )
            put = methodcaller("apply", text)
        case "bound":
            target = f"{namespace}/{one(('one', 'two'))}"
            key = KEYS.manifest(f"{TARGET}/{target}")
            callers = some(("a/one", "a/two", "b/one"), 1)
            put = methodcaller("apply", store.bound_text(target, one(("one", "two")), *callers))
        case "binding":
            binding = f"{namespace}/{one(('one', 'two'))}"
            key = KEYS.manifest(f"{BINDING}/{binding}")
            schemes = [
                "podLabelSelector: {matchLabels: {app: a}}",
                f"spiffeIdentities: [{store.TRUST_DOMAIN}/ns/{namespace}/sa/{account}, far.example/x]",
                "serviceAccount: s",
            ]
            put = methodcaller("apply", store.binding_text(binding, f"{{{', '.join(some(schemes, 1))}}}"))
        case "ports":
            ports = f"{namespace}/ports"
            key = KEYS.manifest(f"specs.smi-spec.io/TCPRoute/{ports}")
            put = methodcaller("apply", store.ports_text(ports, *some((80, 81, 8080))))
        case "group":
            group = f"{namespace}/{one(('all', 'some'))}"
            key = KEYS.manifest(f"{GROUP}/{group}")
            put = methodcaller("apply", store.group_text(group, one(("/.*", "/x"))))
        case "quarantine":
            of = one((f"{SPLIT}/{namespace}/one", f"{TARGET}/{namespace}/one", f"{GROUP}/{namespace}/all", TRAFFIC))
            manifest = f"{of}/{namespace}/one" if of is TRAFFIC else of
            return partial(_quarantine, workload, manifest, gone)
        case "traffic":
            policy = f"{namespace}/{one(('one', 'two'))}"
            key = KEYS.manifest(f"{TRAFFIC}/{policy}")
            settings_ = ", ".join(some(("timeout: 1s", "rateLimit: {requests: 1}", "limits: {maxRequests: 1}"), 1))
            put = methodcaller("apply", store.traffic_text(policy, short, settings_), created=float(number(2)))
        case "config":
            key = KEYS.manifest("smc.io/MeshConfig/-/default")
            hosts = some(("s", "s.b.svc", "*.mesh.internal", "far.example:443"))
            smi = one(("{}", "{pathRegexAnchor: full}", "{crossNamespaceTargets: true}"))
            put = methodcaller("apply", store.config_text(one(("allow", "deny")), one(MODES), hosts, smi))
        case "namespace config":
            key = KEYS.manifest(f"smc.io/NamespaceConfig/{namespace}/default")
            put = methodcaller("apply", store.namespace_text(namespace, one(MODES)))
        case "address":
            key = KEYS.address(name(service))
            put = methodcaller("give_address", service, one(ADDRESSES[1:]))
        case "bundle":
            return methodcaller("put", KEYS.bundle, BundleRecord((f"ROOT {number(1)}",)))
        case "revoked":
            key = KEYS.revoked_proxy(name(workload))
            put = methodcaller("revoke", workload, owner)
        case "revoked identity":
            key = KEYS.revoked_identity(store.identity(owner))
            put = methodcaller("revoke_identity", owner)
        case "admitted":
            key = KEYS.admission(name(workload))
            put = methodcaller("admit", workload, *some(("a1", "a2"), 1))
        case "revoked operator":
            key = KEYS.revoked_credential(f"operator/{account}")
            put = methodcaller("revoke_credential", f"operator/{account}")
        case "admitted operator":
            key = KEYS.admitted_credential(f"operator/{account}")
            put = methodcaller("admit_credential", f"operator/{account}", *some(("a1", "a2"), 1))
        case "listed":
            key = KEYS.crl
            put = methodcaller("list_revoked", *((one(("a/s", "a/t", "b/s")), f) for f in some(("f1", "f2", "f3"))))
        case "synced":
            key = KEYS.synced(source)
            put = methodcaller("put", key, SyncedRecord(source))
        case _:
            return partial(_break, number(1000))
    return methodcaller("delete", key) if gone else put


def parts(proxy: Proxy) -> list[object]:
    out = proxy.outbound
    return [
        *out.upstreams, *out.assignments, *out.destinations, *proxy.inbound, proxy.policy, proxy.workload,
        *([] if proxy.certificate is None else [proxy.certificate]),
    ]  # fmt: skip


def check_identity(before: Mesh, now: Mesh) -> None:
    """What says the same is the same object."""
    for proxy in before.proxies.keys() & now.proxies.keys():
        was, is_ = before.proxies[proxy], now.proxies[proxy]
        if said(was) == said(is_):
            assert was is is_, proxy
        if said(was.outbound) == said(is_.outbound):
            assert was.outbound is is_.outbound
        known = {repr(said(part)): part for part in parts(was)}
        for part in parts(is_):
            assert known.get(repr(said(part)), part) is part
    if said(before.config) == said(now.config):
        assert before.config is now.config
    moved = {
        proxy
        for proxy in before.proxies.keys() | now.proxies.keys()
        if before.proxies.get(proxy) is not now.proxies.get(proxy)
    }
    if before.config is not now.config or before.bundle is not now.bundle or before.crl is not now.crl:
        moved |= before.proxies.keys() | now.proxies.keys()
    assert now.affected == moved
    for field in ("proxies", "manifests", "problems", "own_addresses", "departed", "admitted", "revoked_identities"):
        if dict(getattr(before, field)) == dict(getattr(now, field)):
            assert getattr(before, field) is getattr(now, field), field


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(steps=st.lists(st.lists(changes(), min_size=1, max_size=4), min_size=1, max_size=14))
def test_a_mesh_built_step_by_step_equals_one_built_from_nothing(steps: list[list[Change]]) -> None:
    written = Store()
    mesh = written.build()
    stepped = Generator(open_key)
    for step in steps:
        for change in step:
            change(written)
        before, told = mesh, said(mesh)
        view = written.view()
        mesh = build(before, view, POLICIES)
        again = build(before, view, POLICIES)
        assert (said(again), again.affected) == (said(mesh), mesh.affected), (
            "what is behind the Mesh before was changed"
        )
        assert said(before) == told, "the Mesh before was changed"
        check_identity(before, mesh)
        fresh = written.build()
        assert said(mesh) == said(fresh)
        made = Generator(open_key)
        for proxy in mesh.proxies:
            assert stepped.snapshot(mesh, proxy).versions == made.snapshot(fresh, proxy).versions
