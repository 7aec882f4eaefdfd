"""How manifests are read: what is taken, what is refused, and in which words."""

# ruff: noqa: E501 - what a user is told stands on one line

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from textwrap import dedent

import pytest

from smc import smi
from smc.codec import decode, encode
from smc.demo import bookstore
from smc.errors import Invalid, NotFound
from smc.manifests import (
    MAX_DOCUMENT,
    MAX_TEXT,
    OWN_KINDS,
    Finding,
    InvalidManifest,
    documents,
    find,
    mesh_config,
    noun,
    read,
    read_all,
    service,
    workload,
)
from smc.model import (
    Egress,
    EgressHost,
    Identity,
    Locality,
    MeshConfig,
    Mode,
    Name,
    NamespaceConfig,
    PathAnchor,
    PolicyOptions,
    Protocol,
    Service,
    ServicePort,
    Workload,
    WorkloadPort,
)
from smc.records import ManifestRecord

KINDS = (*OWN_KINDS, *smi.KINDS)

SPLIT = """\
apiVersion: split.smi-spec.io/v1alpha4
kind: TrafficSplit
metadata:
  name: bookstore
  namespace: shop
spec:
  service: bookstore
  backends:
    - service: bookstore-v1
      weight: 50
    - service: bookstore-v2
      weight: 50
"""
SERVICE = """\
apiVersion: smc.io/v1alpha1
kind: Service
metadata: {name: store, namespace: shop}
spec: {ports: [{port: 80}]}
"""


def own(kind: str, spec: str, metadata: str = "{name: it}") -> ManifestRecord:
    text = f"apiVersion: smc.io/v1alpha1\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n"
    return read(text, OWN_KINDS, file="own.yaml")


def refusal(text: str | bytes, *, line: int = 1) -> str:
    """All that is said about a text, as a user sees it."""
    with pytest.raises(InvalidManifest) as caught:
        read_all(text, KINDS, file="x.yaml", line=line)
    return str(caught.value)


def refused(kind: str, spec: str, metadata: str = "{name: it}") -> str:
    """Why the one mistake in a manifest of ours is refused, without its place."""
    with pytest.raises(InvalidManifest) as caught:
        own(kind, spec, metadata)
    (finding,) = caught.value.findings
    return f"{finding.field}: {finding.reason}" + (f" ({finding.hint})" if finding.hint else "")


# ------------------------------------------------------------------------------------------------------------- records


def test_a_manifest_becomes_a_record_with_everything_that_was_written() -> None:
    text = "# who gets what\n" + SPLIT
    assert read(text, KINDS, file="split.yaml", author="spiffe://td/operator/ann", now=12.5) == ManifestRecord(
        group="split.smi-spec.io",
        version="v1alpha4",
        kind="TrafficSplit",
        name=Name("shop", "bookstore"),
        object={
            "apiVersion": "split.smi-spec.io/v1alpha4",
            "kind": "TrafficSplit",
            "metadata": {"name": "bookstore", "namespace": "shop"},
            "spec": {
                "service": "bookstore",
                "backends": [{"service": "bookstore-v1", "weight": 50}, {"service": "bookstore-v2", "weight": 50}],
            },
        },
        text=text,
        file="split.yaml",
        line=1,
        created=12.5,
        author="spiffe://td/operator/ann",
    )


def test_json_is_read_as_well() -> None:
    record = read(SPLIT, KINDS, file="x")
    for indent in (None, 2, "\t"):
        again = read(json.dumps(record.object, indent=indent), KINDS, file="x")
        assert (again.id, again.object) == (record.id, record.object)


def test_bytes_are_read_as_utf_8_with_or_without_a_mark() -> None:
    text = SPLIT.replace("namespace: shop", 'namespace: shop\n  annotations: {note: "é 漢 🙂"}')
    assert read(text.encode(), KINDS, file="x") == read(text, KINDS, file="x")
    assert read(b"\xef\xbb\xbf" + text.encode(), KINDS, file="x") == read(text, KINDS, file="x")


def test_a_record_survives_the_store() -> None:
    for text in (SPLIT, SERVICE):
        record = read(text, KINDS, file="x")
        assert noun(decode(ManifestRecord, encode(record)), KINDS) == noun(record, KINDS)


def test_without_a_namespace_it_is_the_default_one() -> None:
    assert own("Service", "{ports: [{port: 80}]}").name == Name("default", "it")


def test_every_document_of_a_file_knows_its_text_and_its_first_line() -> None:
    text = f"# comment\n---\n# one\n{SERVICE}---\n---\n{SPLIT}...\n"
    one, two = read_all(text, KINDS, file="x.yaml")
    assert (one.line, one.text) == (3, f"# one\n{SERVICE}")
    assert (two.line, two.text) == (10, f"{SPLIT}...\n")


def test_lines_count_from_where_the_text_begins_in_its_file() -> None:
    assert read(SERVICE, KINDS, file="x", line=40).line == 40
    assert refusal(SERVICE.replace("80", "0"), line=40) == "x.yaml:43:23: spec.ports[0].port: 0 is not from 1 to 65535"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_way_to_end_a_line_counts_as_one_line(end: str) -> None:
    text = f"# one\n{SERVICE}---\n{SPLIT}".replace("\n", end)
    assert [(r.line, r.text) for r in read_all(text, KINDS, file="x")] == [
        (1, f"# one\n{SERVICE}".replace("\n", end)),
        (7, SPLIT.replace("\n", end)),
    ]
    assert refusal(text.replace("port: 80", "port: 0")).startswith("x.yaml:5:23: ")


def test_documents_can_be_told_apart_without_knowing_their_kinds() -> None:
    found = documents("a: 1\n---\nb: [2]\n", file="x")
    assert [(d.line, d.text) for d in found] == [(1, "a: 1\n"), (3, "b: [2]\n")]


def test_one_manifest_is_not_two() -> None:
    with pytest.raises(InvalidManifest, match="x:6:1: a second document, where one is taken"):
        read(f"{SERVICE}---\n{SPLIT}", KINDS, file="x", line=1)


def test_the_demos_manifests_are_read() -> None:
    texts = (bookstore.services(), bookstore.policy(), bookstore.split(100, 0))
    assert [len(read_all(text, KINDS, file="x")) for text in texts] == [3, 3, 1]
    for placement in bookstore.BOOKSTORE:
        stored = workload(read(bookstore.workload(placement, "127.1.2.3"), KINDS, file="x"))
        assert (str(stored.name), stored.address) == (placement.workload, "127.1.2.3")


# ------------------------------------------------------------------------------------------------- what a user is told


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        (
            "weight: 50\n",
            "wieght: 50\n",
            'x.yaml:10:7: spec.backends[0].wieght: unknown field (did you mean "weight"?)\n'
            'x.yaml:12:7: spec.backends[1].wieght: unknown field (did you mean "weight"?)',
        ),
        ("kind: TrafficSplit", "kind: trafficsplit", 'x.yaml:2:7: kind: "trafficsplit" is not known (did you mean "TrafficSplit"?)'),
        ("kind: TrafficSplit", "kind: List", "x.yaml:2:7: kind: lists are not taken (write each item as a document of its own, after a line ---)"),
        (
            "kind: TrafficSplit",
            "kind: Deployment",
            'x.yaml:2:7: kind: "Deployment" is not known '
            "(known are HTTPRouteGroup, IdentityBinding, MeshConfig, NamespaceConfig, Service, TCPRoute, "
            "TrafficPolicy, TrafficSplit, TrafficTarget, UDPRoute, Workload)",
        ),
        (
            "v1alpha4",
            "v1alpha5",
            'x.yaml:1:13: apiVersion: TrafficSplit is not known in version "split.smi-spec.io/v1alpha5" '
            "(known are split.smi-spec.io/v1alpha1, split.smi-spec.io/v1alpha2, split.smi-spec.io/v1alpha3, "
            "split.smi-spec.io/v1alpha4)",
        ),
        ("apiVersion:", "apiversion:", 'x.yaml:1:1: apiversion: unknown field (did you mean "apiVersion"?)'),
        ("kind: TrafficSplit\n", "", "x.yaml:1:1: kind: is missing (add kind)"),
        ("metadata:\n  name: bookstore\n  namespace: shop\n", "", "x.yaml:1:1: metadata: is missing (add metadata)"),
        ("  name: bookstore\n", "", "x.yaml:4:3: metadata.name: is missing (add name)"),
        (
            "name: bookstore\n",
            "name: Book_Store\n",
            'x.yaml:4:9: metadata.name: "Book_Store" is no DNS name: lower-case letters, digits, hyphens and dots, '
            'at most 253 (write "book-store")',
        ),
        (
            "namespace: shop",
            "namespace: a.b",
            'x.yaml:5:14: metadata.namespace: "a.b" is no DNS label: lower-case letters, digits and hyphens, at most 63',
        ),
        ("namespace: shop", "uid: 7", "x.yaml:5:3: metadata.uid: unknown field (it means nothing here: remove it)"),
        (
            "service: bookstore\n",
            "service: 123\n",
            'x.yaml:7:12: spec.service: must be a string, not the number 123 (put it into quotes: "123")',
        ),
        (
            "service: bookstore\n",
            "service:\n",
            "x.yaml:7:11: spec.service: must be a string, and is empty (give it a value, or remove the line)",
        ),
        (
            "    - service: bookstore-v1",
            "\t- service: bookstore-v1",
            "x.yaml:9:1: a tab character, which YAML does not take as indentation (indent with spaces)",
        ),
        (
            "weight: 50\n    -",
            "weight: 50\n      weight: 60\n    -",
            "x.yaml:11:7: spec.backends[0].weight: duplicate key (it is on line 10 too)",
        ),
        (
            "bookstore-v1",
            "*v1",
            "x.yaml:9:16: spec.backends[0].service: *v1: aliases are not taken (write the value out, or quote it)\n"
            "and the rest",
        ),
        (
            "bookstore-v1",
            "&v1 bookstore-v1",
            "x.yaml:9:16: spec.backends[0].service: &v1: anchors are not taken (remove it, or quote the value)",
        ),
        (
            "bookstore-v1",
            "!env bookstore-v1",
            'x.yaml:9:16: spec.backends[0].service: "!env": tags are not taken (remove it; quotes make a string)',
        ),
        (
            "bookstore-v1",
            '"bookstore-v1',
            "x.yaml:13:1: it is neither YAML nor JSON: found unexpected end of stream while scanning a quoted scalar "
            "(a quote that opens on line 9 is not closed)",
        ),
        (
            "bookstore-v1",
            "{{ .Values.v1 }}",
            "x.yaml:9:17: spec.backends[0].service: a list or map as a key (a value with {{ in it needs quotes)",
        ),
        (
            "service: bookstore\n",
            "service: a: b\n",
            "x.yaml:7:13: it is neither YAML nor JSON: mapping values are not allowed in this context "
            "(check the indentation; a value with ': ' in it needs quotes)",
        ),
        (
            "bookstore-v1",
            '"a\\x1b[31mb"',
            'x.yaml:9:16: spec.backends[0].service: control character U+001B in "a\\x1b[31mb" (remove it)',
        ),
        ("spec:", "status: {}\nspec:", "x.yaml:6:1: status: unknown field (the control plane tells the status: remove it)"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place_its_field_its_reason_and_what_to_do(
    was: str, becomes: str, told: str
) -> None:
    assert was in SPLIT
    assert refusal(SPLIT.replace(was, becomes)) == told.removesuffix("\nand the rest")


def test_every_mistake_of_every_document_is_told_at_once_in_the_order_of_the_file() -> None:
    broken_split = SPLIT.replace("50", "0.5").replace("shop", "Shop")
    broken_service = SERVICE.replace("80", "99999")
    assert refusal(f"{broken_service}---\n{SERVICE}---\n{broken_split}") == dedent(
        """\
        x.yaml:4:23: spec.ports[0].port: 99999 is not from 1 to 65535
        x.yaml:15:14: metadata.namespace: "Shop" is no DNS label: lower-case letters, digits and hyphens, at most 63 (write "shop")
        x.yaml:20:15: spec.backends[0].weight: 0.5 is not a whole number (write an integer from 0 to 1000000)
        x.yaml:22:15: spec.backends[1].weight: 0.5 is not a whole number (write an integer from 0 to 1000000)"""
    )


def test_the_exception_carries_the_findings_and_is_one_of_what_is_invalid() -> None:
    with pytest.raises(Invalid) as caught:
        read(SPLIT.replace("50", "x"), KINDS, file="x.yaml")
    error = caught.value
    assert isinstance(error, InvalidManifest)
    reason = 'must be an integer, not the string "x"'
    assert error.findings == (
        Finding("x.yaml", 10, 15, "spec.backends[0].weight", reason),
        Finding("x.yaml", 12, 15, "spec.backends[1].weight", reason),
    )
    assert error.message == f"x.yaml:10:15: spec.backends[0].weight: {reason}, and 1 more"


def test_who_makes_very_many_mistakes_is_told_the_first_hundred() -> None:
    text = SPLIT + "".join(f"    - service: v{n}\n      weight: x\n" for n in range(90)) + "x: 1\n" * 50
    with pytest.raises(InvalidManifest) as caught:
        read(text, KINDS, file="x")
    assert len(caught.value.findings) == 100


def test_the_same_object_twice_in_a_file_is_refused() -> None:
    assert refusal(f"{SERVICE}---\n{SERVICE}") == (
        "x.yaml:6:1: Service shop/store is in the file twice (it begins on line 1 too)"
    )


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n---\n", b"", "null", "~"])
def test_a_file_without_a_manifest_is_refused(text: str | bytes) -> None:
    assert "there is no manifest in it" in refusal(text) or "a manifest is a map" in refusal(text)


@pytest.mark.parametrize("text", ["hello", "- a", "[]", "1", "'null'"])
def test_a_manifest_is_a_map(text: str) -> None:
    assert refusal(text) == "x.yaml:1:1: a manifest is a map (it begins with apiVersion, kind and metadata)"


def test_what_is_shown_of_a_value_is_short_and_harmless() -> None:
    told = refusal(SPLIT.replace("namespace: shop", 'namespace: "' + "\\u202eA" * 1000 + '"'))
    assert len(told) < 300
    assert told.isprintable()
    told = refusal(SPLIT.replace("namespace", "'n" + "\u200b" * 1000 + "'"))
    assert len(told) < 1000
    assert told.isprintable()


# ------------------------------------------------------------------------------------------------------------- scalars


@pytest.mark.parametrize("word", ["no", "on", "y", "off", "yes", "1_000", "12-30", "0x1f", "2026-01-01"])
def test_what_only_older_yaml_takes_for_something_else_is_a_string(word: str) -> None:
    text = SERVICE.replace("metadata: {", f"metadata: {{labels: {{a: {word}, {word}: b}}, ")
    labels = read(text, KINDS, file="x").object["metadata"]["labels"]
    assert labels == {"a": word, word: "b"}


@pytest.mark.parametrize("word", ["true", "False", "null", "~", "1", "-1", "0.5", "1e3", ".5", "007", "9" * 5000])
def test_what_is_no_string_is_never_taken_for_one(word: str) -> None:
    text = SERVICE.replace("metadata: {", f"metadata: {{labels: {{a: {word}}}, ")
    assert "metadata.labels.a: must be a string" in refusal(text)


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "'true'", "1", "y"])
def test_a_boolean_is_true_or_false(word: str) -> None:
    assert refused("MeshConfig", f"{{accessLog: {word}}}", "{name: default}").startswith(
        "spec.accessLog: must be a boolean"
    )


def test_a_key_that_is_no_string_is_refused() -> None:
    text = SERVICE.replace("metadata: {", "metadata: {labels: {1: a}, ")
    assert refusal(text) == "x.yaml:3:21: metadata.labels: the key \"1\" is not a string (write '1')"


# -------------------------------------------------------------------------------------------------------------- bounds


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_lists_and_maps_may_be_64_deep_and_no_deeper() -> None:
    assert len(documents(nested(64), file="x")) == 1
    with pytest.raises(InvalidManifest, match="more than 64 lists and maps are within each other"):
        documents(nested(65), file="x")


@pytest.mark.parametrize("bomb", ["[" * 500_000, "{a: " * 200_000, "- " * 500_000, "? " * 500_000, "[" * 900])
def test_a_bomb_of_depth_is_refused(bomb: str) -> None:
    with pytest.raises(InvalidManifest):
        documents(bomb, file="x")


def test_a_document_may_have_10000_values_and_no_more() -> None:
    assert len(documents(f"[{'1,' * 9_999}]", file="x")) == 1
    with pytest.raises(InvalidManifest, match="more than 10000 values"):
        documents(f"[{'1,' * 10_000}]", file="x")


def test_a_document_may_have_1_MiB_and_no_more() -> None:  # noqa: N802
    fits = SERVICE + "#" + "x" * (MAX_DOCUMENT - len(SERVICE) - 1)
    assert read(fits, KINDS, file="x").text == fits
    for too_large in (fits + "x", fits[:-1] + "é"):
        with pytest.raises(InvalidManifest, match="more than 1048576 bytes"):
            read(too_large, KINDS, file="x")
        with pytest.raises(InvalidManifest, match="more than 1048576 bytes"):
            read_all(f"{too_large}\n---\n{SPLIT}", KINDS, file="x")


def test_one_document_that_is_too_large_is_told_once_and_says_nothing_of_the_others() -> None:
    bomb = f"a: [{'1,' * 600_000}]"
    assert refusal(f"{SERVICE.replace('80', '0')}---\n{bomb}\n---\n{SPLIT}") == (
        "x.yaml:4:23: spec.ports[0].port: 0 is not from 1 to 65535\n"
        "x.yaml:6:19999: a[9997]: the document has more than 10000 values (split it into several manifests)"
    )


def test_a_file_is_bounded_in_bytes_documents_and_values() -> None:
    with pytest.raises(InvalidManifest, match="8388609 bytes, at most 8388608 are read"):
        read_all(b"#" * (MAX_TEXT + 1), KINDS, file="x")
    with pytest.raises(InvalidManifest, match="more than 1000 documents"):
        documents("---\na: 1\n" * 1001, file="x")
    with pytest.raises(InvalidManifest, match="more than 200000 values"):
        documents(f"---\n[{'1,' * 5_000}]\n" * 41, file="x")


def test_an_alias_bomb_is_refused_before_it_is_built() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(InvalidManifest, match="anchors are not taken"):
        documents("\n".join(lines), file="x")


def test_merge_keys_are_refused() -> None:
    assert "unknown field" in refusal(SERVICE.replace("spec: {", "spec: {<<: {a: b}, "))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"a: \xff", "x.yaml:1:4: it is not UTF-8: byte 0xff (save it as UTF-8)"),
        ("kind: a\n\n  b\x07", "x.yaml:3:4: control character \\x07 (remove it)"),
        ("a: \x00", "x.yaml:1:4: control character \\x00 (remove it)"),
        ("a: \x85", "x.yaml:1:4: control character \\x85 (remove it)"),
        ("a: \ud800", "x.yaml:1:4: control character \\ud800 (remove it)"),
        ("\n%YAML 1.1\n--- {}\n", "x.yaml:2:1: YAML directives are not taken (remove the line that begins with %)"),
    ],
)
def test_what_no_manifest_may_hold_is_refused(text: str | bytes, told: str) -> None:
    assert refusal(text).splitlines()[0] == told


# ----------------------------------------------------------------------------------------------------------- our kinds


def test_a_mesh_config_says_what_the_mesh_is_set_to() -> None:
    spec = """{meshDomain: corp.mesh, egress: deny, egressHosts: [example.com, "*.Example.com.:443"], accessLog: false,
      mode: audit, certificates: {workloadTTL: 1h30m, credentialTTL: 90s},
      smi: {pathRegexAnchor: full, crossNamespaceTargets: true}}"""
    record = own("MeshConfig", spec, "{name: default}")
    assert record.id == "smc.io/MeshConfig/-/default"
    assert mesh_config(record) == MeshConfig(
        mesh_domain="corp.mesh",
        egress=Egress.DENY,
        egress_hosts=(EgressHost("*.example.com", 443), EgressHost("example.com")),
        mode=Mode.AUDIT,
        policy=PolicyOptions(PathAnchor.FULL, cross_namespace=True),
        access_log=False,
        workload_certificate_ttl=timedelta(minutes=90),
        credential_ttl=timedelta(seconds=90),
    )


def test_what_a_mesh_config_does_not_say_is_the_default() -> None:
    assert mesh_config(own("MeshConfig", "{}", "{name: default}")) == MeshConfig()
    assert mesh_config(own("MeshConfig", "{certificates: {}}", "{name: default}")) == MeshConfig()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{mode: audti}", 'spec.mode: "audti" is not known (did you mean "audit"?)'),
        ("{mode: off}", 'spec.mode: "off" is not known (known are audit, enforcing, permissive)'),
        (
            "{egressHosts: [a.b, A.b.]}",
            "spec.egressHosts[1]: a.b is in the list twice (it is at spec.egressHosts[0] too)",
        ),
        ("{egressHosts: ['*']}", 'spec.egressHosts[0]: "*" is every host (write egress: allow)'),
        ("{egress: alow}", 'spec.egress: "alow" is not known (did you mean "allow"?)'),
        ("{certificates: {workloadTTL: 9s}}", "spec.certificates.workloadTTL: 9s is not from 10s to 720h"),
        (
            "{certificates: {workloadTTL: 1d}}",
            'spec.certificates.workloadTTL: "1d" is no duration (write one such as "24h", "1h30m" or "90s")',
        ),
        (
            "{certificates: {credentialTTL: 24}}",
            'spec.certificates.credentialTTL: must be a string, not the number 24 (put it into quotes: "24")',
        ),
        ("{meshDomain: mesh_internal}", 'spec.meshDomain: "mesh_internal" is no domain: DNS labels with dots between them, at most 100 characters (write "mesh-internal")'),
        ("{meshDomain: a..b}", 'spec.meshDomain: "a..b" is no domain: DNS labels with dots between them, at most 100 characters'),
    ],
)  # fmt: skip
def test_a_mesh_config_that_could_not_be_obeyed_is_refused(spec: str, told: str) -> None:
    assert refused("MeshConfig", spec, "{name: default}") == told


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("http://a.b", "is no host: it has a /"),
        ("a.*.b", "is no host"),
        ("*a.b", "is no host"),
        ("a_b.c", "is no host"),
        ("", "is no host"),
        ("[::1]:80", "has no port from 1 to 65535 after its colon"),
        ("a.b:", "has no port from 1 to 65535 after its colon"),
        ("a.b:0", "has no port from 1 to 65535 after its colon"),
        ("a.b:65536", "has no port from 1 to 65535 after its colon"),
    ],
)
def test_an_egress_host_is_a_name_or_a_suffix_with_a_port_or_without(host: str, why: str) -> None:
    hint = 'write one such as "example.com", "*.example.com" or "example.com:443"'
    assert refused("MeshConfig", f'{{egressHosts: ["{host}"]}}', "{name: default}") == (
        f'spec.egressHosts[0]: "{host}" {why} ({hint})'
    )


def test_a_namespace_config_says_the_mode_of_its_namespace() -> None:
    record = own("NamespaceConfig", "{mode: permissive}", "{name: default, namespace: shop}")
    assert noun(record, OWN_KINDS) == NamespaceConfig("shop", Mode.PERMISSIVE)


def test_there_is_one_namespace_config_in_each_namespace() -> None:
    assert refused("NamespaceConfig", "{mode: audit}", "{name: mine, namespace: shop}") == (
        'metadata.name: "mine": there is one NamespaceConfig in each namespace (call it default)'
    )
    one = "apiVersion: smc.io/v1alpha1\nkind: NamespaceConfig\nmetadata: {name: default}\nspec: {mode: audit}\n"
    assert refusal(f"{one}---\n{one}") == (
        "x.yaml:6:1: NamespaceConfig default/default is in the file twice (it begins on line 1 too)"
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{}", "spec.mode: is missing (add mode)"),
        ("{mode: Audit}", 'spec.mode: "Audit" is not known (did you mean "audit"?)'),
        ("{mode: audit, egress: deny}", 'spec.egress: unknown field (only mode is known)'),
    ],
)  # fmt: skip
def test_a_namespace_config_that_could_not_be_obeyed_is_refused(spec: str, told: str) -> None:
    assert refused("NamespaceConfig", spec, "{name: default}") == told


def test_there_is_one_mesh_config_and_it_has_no_namespace() -> None:
    assert refused("MeshConfig", "{}", "{name: mine}") == (
        'metadata.name: "mine": there is one MeshConfig (call it default)'
    )
    assert refused("MeshConfig", "{}", "{name: default, namespace: shop}") == (
        'metadata.namespace: "shop": this kind is mesh-wide and has no namespace (remove the line)'
    )


def test_a_service_has_ports() -> None:
    record = own("Service", "{ports: [{port: 9000, protocol: grpc, targetPort: api}, {port: 80}]}")
    assert service(record) == Service(
        Name("default", "it"), (ServicePort(80, Protocol.HTTP, "80"), ServicePort(9000, Protocol.GRPC, "api"))
    )


def test_a_service_may_have_an_address_of_its_own() -> None:
    assert service(own("Service", "{ports: [{port: 80}], address: 10.96.0.7}")).address == "10.96.0.7"
    assert service(own("Service", "{ports: [{port: 80}]}")).address == ""


@pytest.mark.parametrize("protocol", Protocol)
def test_a_port_of_a_service_speaks_a_protocol(protocol: Protocol) -> None:
    record = own("Service", f"{{ports: [{{port: 80, protocol: {protocol.value}}}]}}")
    assert service(record).ports == (ServicePort(80, protocol, "80"),)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{ports: []}", "spec.ports: the list is empty, and at least one is needed"),
        ("{}", "spec.ports: is missing (add ports)"),
        ("{ports: [{port: 80}, {port: 80}]}", "spec.ports[1]: port 80 is in the list twice (it is at spec.ports[0] too)"),
        ("{ports: [{port: 0}]}", "spec.ports[0].port: 0 is not from 1 to 65535"),
        ("{ports: [{port: 65536}]}", "spec.ports[0].port: 65536 is not from 1 to 65535"),
        ("{ports: [{port: '80'}]}", 'spec.ports[0].port: must be an integer, not the string "80" (remove the quotes: 80)'),
        (
            "{ports: [{port: 80, targetPort: '80'}]}",
            'spec.ports[0].targetPort: "80" is no port name: it has no letter (remove the quotes: 80)',
        ),
        ("{ports: [{port: 80, targetPort: 70000}]}", "spec.ports[0].targetPort: 70000 is not from 1 to 65535"),
        (
            "{ports: [{port: 80, targetPort: true}]}",
            "spec.ports[0].targetPort: must be a port number or name, not the boolean true",
        ),
        (
            "{ports: [{port: 80, targetPort: Web_1}]}",
            'spec.ports[0].targetPort: "Web_1" is no port name: lower-case letters, digits and hyphens, at most 15',
        ),
        (
            "{ports: [{port: 80, protocol: udp}]}",
            'spec.ports[0].protocol: "udp" is not taken: UDP does not go through the proxies '
            "(known are grpc, http, http2, tcp)",
        ),
        ("{ports: [{port: 80, protocol: HTTP}]}", 'spec.ports[0].protocol: "HTTP" is not known (did you mean "http"?)'),
        (
            "{ports: [{port: 80}], address: bookstore}",
            'spec.address: "bookstore" is no IP address (names are not resolved: write the address)',
        ),
        (
            "{ports: [{port: 80}], address: 'fd00::7'}",
            'spec.address: "fd00::7" is an IPv6 address, and only IPv4 is intercepted '
            "(leave the address out to have a virtual one)",
        ),
        (
            "{ports: [{port: 80}], address: 127.0.0.7}",
            'spec.address: "127.0.0.7" means another machine to each caller (leave the address out to have a virtual one)',
        ),
        (
            "{ports: [{port: 80}], selector: {app: x}}",
            "spec.selector: unknown field (Workloads name their services: spec.services of the Workload)",
        ),
    ],
)  # fmt: skip
def test_a_service_that_nobody_could_call_is_refused(spec: str, told: str) -> None:
    assert refused("Service", spec) == told


def test_a_service_is_called_by_a_dns_label() -> None:
    assert refused("Service", "{ports: [{port: 80}]}", "{name: a.b}").startswith('metadata.name: "a.b" is no DNS label')


def test_a_service_of_kubernetes_is_told_from_ours() -> None:
    assert refusal("apiVersion: v1\nkind: Service\nmetadata: {name: a}\n") == (
        'x.yaml:1:13: apiVersion: Service is not known in version "v1" (write smc.io/v1alpha1)'
    )


def test_a_workload_says_where_it_is_who_it_is_and_what_it_backs() -> None:
    spec = """{
      address: "2001:DB8:0::1", appAddress: 10.0.0.7, serviceAccount: store.v1, weight: 3,
      ports: [{port: 8080}, {port: 9090, name: metrics}], services: [store-v1, store],
      locality: {region: eu, zone: eu-1, subZone: rack.2}, reachableServices: [z/pay, ledger, ledger.x/y]}"""
    with pytest.raises(InvalidManifest, match=r"ledger\.x"):
        own("Workload", spec)
    record = own("Workload", spec.replace(", ledger.x/y", ""), "{name: w.1, namespace: shop, labels: {b: '2', a: ''}}")
    assert workload(record) == Workload(
        name=Name("shop", "w.1"),
        address="2001:db8::1",
        identity=Identity("shop", "store.v1"),
        app_address="10.0.0.7",
        labels=(("a", ""), ("b", "2")),
        ports=(WorkloadPort("", 8080), WorkloadPort("metrics", 9090)),
        services=("store", "store-v1"),
        locality=Locality("eu", "eu-1", "rack.2"),
        weight=3,
        reachable=(Name("shop", "ledger"), Name("z", "pay")),
    )


def test_what_a_workload_does_not_say_is_the_default() -> None:
    expected = Workload(Name("default", "it"), "10.1.1.1", Identity("default", "a"))
    assert workload(own("Workload", "{address: 10.1.1.1, serviceAccount: a}")) == expected


def test_reaching_nothing_is_not_the_same_as_reaching_everything() -> None:
    nothing = workload(own("Workload", "{address: 10.1.1.1, serviceAccount: a, reachableServices: []}"))
    assert nothing.reachable == ()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("weight: 0", "spec.weight: 0 is not from 1 to 10000"),
        ("weight: 1.5", "spec.weight: 1.5 is not a whole number (write an integer from 1 to 10000)"),
        ("services: store", 'spec.services: must be a list, not the string "store" (write [store])'),
        ("services: [a, a]", "spec.services[1]: a is in the list twice (it is at spec.services[0] too)"),
        ("ports: [{port: 80}, {port: 80}]", "spec.ports[1]: port 80 is in the list twice (it is at spec.ports[0] too)"),
        (
            "ports: [{port: 80, name: a}, {port: 81, name: a}]",
            "spec.ports[1]: a second port is called a (give each a name of its own)",
        ),
        ("locality: {subzone: a}", 'spec.locality.subzone: unknown field (did you mean "subZone"?)'),
        ("locality: {zone: a b}", 'spec.locality.zone: "a b" names no place: letters, digits and ._- , at most 63'),
        ("reachableServices: [a/b/c]", 'spec.reachableServices[0]: "a/b" is no DNS label: lower-case letters, digits and hyphens, at most 63'),
        ("appAddress: localhost", 'spec.appAddress: "localhost" is no IP address (names are not resolved: write the address)'),
        ("adress: 10.0.0.1", 'spec.adress: unknown field (did you mean "address"? It is there already)'),
    ],
)  # fmt: skip
def test_a_workload_with_a_mistake_is_refused(more: str, told: str) -> None:
    assert refused("Workload", f"{{address: 10.1.1.1, serviceAccount: a, {more}}}") == told


@pytest.mark.parametrize(
    "address", ["10.0.0", "10.0.0.256", "010.0.0.1", "10.0.0.1/8", "0.0.0.0", "'::'", "224.0.0.1", "'ff02::1'",
                "255.255.255.255", "'fe80::1%eth0'", "host.local", "'10.0.0.1 '", "''", "'1'"],
)  # fmt: skip
def test_an_address_is_that_of_one_machine(address: str) -> None:
    assert refused("Workload", f"{{address: {address}, serviceAccount: a}}").startswith("spec.address: ")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ("{a: 1}", 'metadata.labels.a: must be a string, not the number 1 (put it into quotes: "1")'),
        ("{a b: c}", 'metadata.labels["a b"]: "a b" is no key of a label (letters, digits and ._- , after at most one prefix and /)'),
        ("{a: b c}", 'metadata.labels.a: "b c" is no value of a label: letters, digits and ._- , at most 63'),
        ("[a]", "metadata.labels: must be a map, not a list (remove the '- ')"),
    ],
)  # fmt: skip
def test_labels_are_those_of_kubernetes(labels: str, told: str) -> None:
    assert refused("Service", "{ports: [{port: 80}]}", f"{{name: it, labels: {labels}}}") == told


# ------------------------------------------------------------------------------------------------------ stored objects


def test_a_stored_manifest_that_is_not_what_its_key_says_is_refused() -> None:
    """Whoever could write to the store could otherwise let one namespace speak for another."""
    record = own("Service", "{ports: [{port: 80}]}")
    for other in (
        replace(record, name=Name("shop", "it")),
        replace(record, name=Name("default", "other")),
        replace(record, kind="Workload"),
        replace(record, group="other.io"),
        replace(record, version="v9"),
    ):
        with pytest.raises(InvalidManifest, match=r"it says that it is smc\.io/Service/default/it"):
            service(other)


def test_a_stored_manifest_that_is_not_taken_any_more_is_told_by_its_fields() -> None:
    record = own("Service", "{ports: [{port: 80}]}")
    broken = replace(record, object={**record.object, "spec": {"ports": [{"port": 0}], "x": None}})
    with pytest.raises(InvalidManifest) as caught:
        service(broken)
    assert [(f.line, f.field) for f in caught.value.findings] == [(0, "spec.x"), (0, "spec.ports[0].port")]


def test_a_stored_object_that_is_too_deep_is_refused() -> None:
    deep: list[object] = []
    for _ in range(500):
        deep = [deep]
    record = own("Service", "{ports: [{port: 80}]}")
    with pytest.raises(InvalidManifest, match="within each other"):
        service(replace(record, object={**record.object, "spec": deep}))


def test_a_manifest_is_not_taken_for_one_of_another_kind() -> None:
    with pytest.raises(TypeError, match=re.escape("smc.io/Service/default/it is a Service, not a Workload")):
        workload(own("Service", "{ports: [{port: 80}]}"))


# --------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("ts", "TrafficSplit"),
        ("TrafficSplit", "TrafficSplit"),
        ("trafficsplits", "TrafficSplit"),
        ("trafficsplits.split.smi-spec.io", "TrafficSplit"),
        ("tt", "TrafficTarget"),
        ("htr", "HTTPRouteGroup"),
        ("svc", "Service"),
        ("WORKLOADS", "Workload"),
        ("mc", "MeshConfig"),
        ("nc", "NamespaceConfig"),
    ],
)
def test_a_kind_is_found_by_any_of_its_names(word: str, kind: str) -> None:
    assert find(KINDS, word).name == kind


def test_a_kind_that_is_not_there_is_told_with_the_nearest_one() -> None:
    with pytest.raises(NotFound) as caught:
        find(KINDS, "trafficsplitz")
    assert str(caught.value) == 'no kind of manifest is called "trafficsplitz" (did you mean "trafficsplit"?)'


def test_no_two_kinds_share_a_name() -> None:
    words = [word for kind in KINDS for word in kind.words]
    assert len(words) == len(set(words))
