"""Whatever is given to the reader, it makes records of it or says why not. It never breaks, and never takes long."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from smc import smi
from smc.codec import decode, encode
from smc.demo import bookstore
from smc.manifests import OWN_KINDS, InvalidManifest, Manifest, noun, read_all
from smc.records import ManifestRecord

KINDS = (*OWN_KINDS, *smi.KINDS)
FUZZED = 10_000
SEED = 20_26

CONFIG = """\
apiVersion: smc.io/v1alpha1
kind: MeshConfig
metadata: {name: default, annotations: {note: "a\\tb"}}
spec: {meshDomain: a.b, egress: deny, accessLog: true, mode: enforcing, certificates: {workloadTTL: 24h}}
"""
WORKLOAD = """\
apiVersion: smc.io/v1alpha1
kind: Workload
metadata: {name: w, namespace: shop, labels: {app: w}}
spec:
  address: 10.0.0.1
  appAddress: 127.0.0.1
  serviceAccount: w
  ports: [{name: web, port: 8080}]
  services: [store]
  locality: {region: eu, zone: a, subZone: b}
  weight: 2
  reachableServices: [bank/pay, store]
"""
MATCHES = bookstore.split(1, 2).replace("spec:", "spec:\n  matches: [{kind: HTTPRouteGroup, name: bookstore}]", 1)
FIRST = """\
apiVersion: split.smi-spec.io/v1alpha1
kind: TrafficSplit
metadata: {name: store, namespace: shop}
spec: {service: store, backends: [{service: a, weight: 500m}, {service: b, weight: 0.5}, {service: c, weight: 1Ki}]}
---
apiVersion: access.smi-spec.io/v1alpha1
kind: TrafficTarget
metadata: {name: buyers, namespace: shop}
destination: {kind: ServiceAccount, name: store, port: 8080}
specs: [{kind: HTTPRouteGroup, name: routes, matches: [read]}, {kind: TCPRoute, name: ports}]
sources: [{kind: ServiceAccount, name: buyer, namespace: buyers}]
---
apiVersion: specs.smi-spec.io/v1alpha1
kind: HTTPRouteGroup
metadata: {name: routes, namespace: shop}
matches: [{name: read, pathRegex: /books, methods: [GET]}]
---
apiVersion: specs.smi-spec.io/v1alpha1
kind: TCPRoute
metadata: {name: ports, namespace: shop}
"""
LAST = """\
apiVersion: access.smi-spec.io/v1alpha4
kind: TrafficTarget
metadata: {name: buyers, namespace: shop}
spec:
  destination: {kind: IdentityBinding, group: access.smi-spec.io, name: tills}
  rules: [{kind: TCPRoute, name: ports}, {kind: UDPRoute, name: ports}]
  sources: [{kind: IdentityBinding, name: a, namespace: z}, {kind: ServiceAccount, name: b}]
---
apiVersion: access.smi-spec.io/v1alpha4
kind: IdentityBinding
metadata: {name: tills, namespace: shop}
spec:
  schemes:
    podLabelSelector: {matchLabels: {app: till}}
    spiffeIdentities: [books.example/ns/shop/sa/x, 'spiffe://far.example/host/7']
    serviceAccount: till
---
apiVersion: specs.smi-spec.io/v1alpha4
kind: TCPRoute
metadata: {name: ports, namespace: shop}
spec: {matches: {name: x, ports: [8080, 8081]}}
"""
GOOD = (
    *FIRST.split("---\n"),
    *LAST.split("---\n"),
    *(part for text in (bookstore.services(), bookstore.policy()) for part in text.split("---\n")),
    bookstore.split(1, 2),
    MATCHES,
    bookstore.split(1, 2).replace("v1alpha4", "v1alpha2"),
    CONFIG,
    WORKLOAD,
)
SPLICES = (
    "\t", "\n", "\r", " ", "  ", ":", ": ", "- ", "-", "---\n", "...\n", "[", "]", "{", "}", ",", "#", "'", '"', "|",
    "&a ", "*a", "!!str ", "!x ", "%", "@", "`", "?", "? ", "<<: ", "\\", "\\x00", "\x00", "\x07", "\u2028", "\ufeff",
    "é", "🙂", "null", "~", "true", "no", "0", "-1", "0.5", "1e999", "9" * 30, "9" * 5000, "0x10", ".inf", "1e99", "m",
    ">", "007", ".nan",
    "(", ")", "*", "(?=", "a{1001}", "(((((a{9}){9}){9}){9}){9})", "\\Q", ".*" * 600, "[" * 70, "{a: " * 70, "x" * 300,
    "\u202e", "10.0.0.1", "::1", "fe80::1%1", "24h", "999999999999h", "a/b/c", "..", "-", "kind: List",
    "TCPRoute",
)  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 80, 65536, 10**30, 0.5, 1e308, "", " ", "a", "A", "a.b", "*", "(", "\x00", "\ud800",
    "10.0.0.1", [], {}, [[]], [None], {"": ""}, {"a": {}}, ["a", "a"], [{}], "x" * 3000, "GET", "host", "24h", "80",
)  # fmt: skip


def outcome(text: str | bytes) -> tuple[ManifestRecord, ...]:
    """The records of a text; none when it is refused, with at least one finding that can be told."""
    try:
        return read_all(text, KINDS, file="fuzzed.yaml")
    except InvalidManifest as e:
        findings = e.findings
    assert 0 < len(findings) <= 100
    for finding in findings:
        assert finding.reason
        assert len(str(finding)) < 1500
        assert str(finding).isprintable()
    return ()


def hold(records: tuple[ManifestRecord, ...]) -> None:
    """What is taken can be stored, is the same when it is read again, and compiles."""
    for record in records:
        stored = decode(ManifestRecord, encode(record))
        assert stored == record
        assert noun(stored, KINDS) == noun(record, KINDS)
        rules = smi.compile(record.name.namespace, [Manifest(stored, 1)] if record.group in smi.GROUPS else [])
        assert "InvalidManifest" not in {problem.reason for problem in rules.problems}


def mutated(rng: random.Random, good: str) -> str | bytes:
    """A good manifest with some damage."""
    if rng.random() < 0.4:
        return damaged_tree(rng, good)
    text = good
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        to = min(len(text), at + rng.choice((0, 0, 1, 1, 3, 10, 50)))
        match rng.randrange(5):
            case 0:
                text = text[:at] + rng.choice(SPLICES) + text[to:]
            case 1:
                text = text[:at] + text[to:]
            case 2:
                text = text[:at] + text[at:to] * 2 + text[to:]
            case 3:
                other = rng.choice(GOOD)
                begin = rng.randrange(len(other))
                text = text[:at] + other[begin : begin + rng.randint(1, 80)] + text[to:]
            case _:
                text = text[:at] + chr(rng.randrange(0x250)) + text[to:]
    if rng.random() < 0.05:
        data = bytearray(text.encode())
        data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    return text


def damaged_tree(rng: random.Random, good: str) -> str:
    """JSON of the manifest with a value replaced, a key renamed, removed or added."""
    root = json.loads(json.dumps(read_all(good, KINDS, file="good.yaml")[0].object))
    for _ in range(rng.randint(1, 3)):
        places = list(inside(root))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0 | 1:
                holder[key] = deepcopy(rng.choice(VALUES))
            case 2:
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[rng.choice(("", "a", str(key).upper(), str(key) + "s", "\x00", "x" * 300))] = holder.pop(key)
            case _:
                holder.extend(holder[:])
    return json.dumps(root, ensure_ascii=False)


def inside(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (map or list, key or index) below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from inside(item)


def test_ten_thousand_damaged_manifests_are_read_or_refused_with_a_reason() -> None:
    rng = random.Random(SEED)
    taken = 0
    for number in range(FUZZED):
        text = mutated(rng, GOOD[number % len(GOOD)])
        records = outcome(text)
        hold(records)
        taken += bool(records)
    # Damage that is always seen, or never, would prove nothing.
    assert FUZZED * 0.02 < taken < FUZZED * 0.5


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.binary()))
@example("\ud800")
@example("? - a\n: - b")
@example("{1: {2: 3}, [4]: 5}")
@example("a" * 2000 + ": b")
@example("--- |\n  x\n--- >\n  y\n")
@example(b"\xfe\xff\x00a")
def test_any_text_is_read_or_refused_with_a_reason(text: str | bytes) -> None:
    hold(outcome(text))


DOCUMENTS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), DOCUMENTS, DOCUMENTS)
def test_any_tree_under_a_known_kind_is_read_or_refused_with_a_reason(
    kind: object, metadata: object, spec: object
) -> None:
    assert isinstance(kind, type(KINDS[0]))
    version = next(iter(kind.versions))
    root = {"apiVersion": f"{kind.group}/{version}", "kind": kind.name, "metadata": metadata, "spec": spec}
    hold(outcome(json.dumps(root)))
    hold(outcome(json.dumps(root | {"metadata": {"name": "default"}}, ensure_ascii=False)))
