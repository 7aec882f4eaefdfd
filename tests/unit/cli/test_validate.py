from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from smc import plugins
from smc.cli.documents import split
from smc.cli.program import program
from smc.cli.validate import FOLLOWS, HERE, RUNNING, check, locate
from smc.manifests import documents

SERVICES = b"""\
apiVersion: smc.io/v1alpha1
kind: Service
metadata: {name: bookstore, namespace: shop}
spec:
  ports: [{port: 80}]
---
apiVersion: smc.io/v1alpha1
kind: Service
metadata: {name: bookstore-1, namespace: shop}
spec:
  ports: [{port: 80}]
"""
SPLIT = b"""\
apiVersion: split.smi-spec.io/v1alpha4
kind: TrafficSplit
metadata: {name: bookstore, namespace: shop}
spec:
  service: bookstore
  backends:
  - service: bookstore-1
    weight: 90
  - service: bookstore-2
    weight: 10
"""
BROKEN = b"""\
# a comment
apiVersion: smc.io/v1alpha1
kind: Service
metadata: {name: bookstore, namespace: shop}
spec:
  ports:
  - port: 99999
  - port: eighty
"""


def smc(*arguments: str, stdin: bytes = b"") -> Result:
    environment = {"SMC_CREDENTIAL": "/nowhere", "NO_COLOR": "1"}
    return CliRunner().invoke(program, ["validate", *arguments], input=stdin, env=environment, prog_name="smc")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop").mkdir()
    return tmp_path / "shop"


def test_what_is_in_order_says_nothing_and_ends_with_0(shop: Path) -> None:
    (shop / "services.yaml").write_bytes(SERVICES)
    result = smc("-f", "shop")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "2 manifests, 0 errors, 0 warnings\n")


def test_the_bookstore_of_the_demo_is_in_order() -> None:
    result = smc("-f", str(Path(plugins.__file__).parent / "demo" / "bookstore" / "policy.yaml"))
    assert result.exit_code == 0, result.stdout


def test_every_finding_is_a_line_that_editors_can_read_with_what_to_do_below(shop: Path) -> None:
    (shop / "one.yaml").write_bytes(BROKEN + b"---\n" + BROKEN.replace(b"kind: Service", b"kind: Servise"))
    result = smc("-f", "shop/one.yaml")
    assert result.exit_code == 1
    first, second, third, hint = result.stdout.splitlines()
    assert first.startswith("shop/one.yaml:7:11: error: spec.ports[0].port: ")
    assert second.startswith("shop/one.yaml:8:11: error: spec.ports[1].port: ")
    assert third == 'shop/one.yaml:12:7: error: kind: "Servise" is not known [InvalidManifest]'
    assert hint == '  what to do: did you mean "Service"?'
    assert result.stderr == "2 manifests, 3 errors, 0 warnings\n"


def test_what_the_files_do_not_hold_is_a_warning_at_the_place_that_names_it() -> None:
    result = smc("-f", "-", stdin=SERVICES + b"---\n" + SPLIT)
    assert result.exit_code == 0
    line, hint = result.stdout.splitlines()
    assert line.startswith("-:21:14: warning: spec.backends[1].service: there is no service shop/bookstore-2")
    assert line.endswith(" [BackendNotFound]")
    assert hint == "  what to do: these files do not hold it; if the mesh does, all is well"


def test_strict_fails_for_warnings_too() -> None:
    assert smc("-f", "-", "--strict", stdin=SERVICES + b"---\n" + SPLIT).exit_code == 1
    assert smc("-f", "-", "--strict", stdin=SERVICES).exit_code == 0


def test_what_has_no_effect_in_any_mesh_is_an_error(shop: Path) -> None:
    (shop / "a.yaml").write_bytes(SPLIT)
    (shop / "b.yaml").write_bytes(SPLIT.replace(b"name: bookstore,", b"name: another,"))
    (shop / "c.yaml").write_bytes(SERVICES + b"---\n" + SERVICES.replace(b"bookstore", b"bookstore-2"))
    result = smc("-f", "shop")
    assert result.exit_code == 1
    errors = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, result.stdout
    assert errors[0].startswith("shop/b.yaml:5:12: error: spec.service: shop/bookstore is split by shop/bookstore")
    assert errors[0].endswith(" [Conflict]")


def test_a_manifest_that_is_given_twice_is_told_where_it_was_before(shop: Path) -> None:
    (shop / "a.yaml").write_bytes(SERVICES)
    (shop / "b.yaml").write_bytes(b"\n" + SERVICES)
    result = smc("-f", "shop")
    assert result.exit_code == 1
    assert "shop/b.yaml:2:1: error: Service bookstore is given twice" in result.stdout, result.stdout
    assert "the first is at shop/a.yaml:1: remove one" in result.stdout


def test_what_only_a_mesh_at_work_can_know_is_not_told() -> None:
    workload = b"""\
---
apiVersion: smc.io/v1alpha1
kind: Workload
metadata: {name: store-1, namespace: shop}
spec: {address: 192.0.2.21, serviceAccount: store, services: [bookstore]}
"""
    assert check(list(split(SERVICES + workload, "f")), plugins.kinds(), plugins.policies()) == ()


def test_a_namespace_is_for_manifests_that_name_none() -> None:
    unplaced = SERVICES.replace(b", namespace: shop", b"") + b"---\n" + SPLIT.replace(b", namespace: shop", b"")
    assert "no service books/bookstore-2" in smc("-f", "-", "-n", "books", stdin=unplaced).stdout
    assert smc("-f", "-", "-n", "shop", stdin=SERVICES).exit_code == 0
    other = smc("-f", "-", "-n", "books", stdin=SERVICES)
    assert other.exit_code == 1
    assert other.stdout.startswith("-:3:40: error: metadata.namespace: it names its own namespace, and books was asked")
    assert smc("-f", "-", "-n", "No Name", stdin=SERVICES).exit_code == 2


def test_json_has_every_finding_as_data() -> None:
    data = json.loads(smc("-f", "-", "-o", "json", stdin=BROKEN).stdout)
    assert data["documents"] == 1
    assert [(f["severity"], f["line"], f["column"], f["field"]) for f in data["findings"]] == [
        ("error", 7, 11, "spec.ports[0].port"),
        ("error", 8, 11, "spec.ports[1].port"),
    ]
    assert json.loads(smc("-f", "-", "-o", "json", stdin=SERVICES).stdout)["findings"] == []


def test_sarif_has_the_shape_that_the_standard_asks_for(shop: Path) -> None:
    """What SARIF 2.1.0 requires (sections 3.13, 3.14, 3.18, 3.27 to 3.30), and what viewers need beside it."""
    (shop / "a b.yaml").write_bytes(BROKEN)
    (shop / "empty.json").write_bytes(b'{"apiVersion": "smc.io/v1alpha1"')
    result = smc("-f", "shop", "-f", "-", "-o", "sarif", stdin=SERVICES + b"---\n" + SPLIT)
    assert result.exit_code == 1
    log = json.loads(result.stdout)
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "smc"
    rules = [rule["id"] for rule in driver["rules"]]
    assert rules == sorted(set(rules)) == ["BackendNotFound", "InvalidManifest"]
    assert run["columnKind"] in {"utf16CodeUnits", "unicodeCodePoints"}
    for found in run["results"]:
        assert set(found) == {"ruleId", "ruleIndex", "level", "message", "locations"}
        assert rules[found["ruleIndex"]] == found["ruleId"]
        assert found["level"] in {"none", "note", "warning", "error"}
        assert found["message"]["text"]
        (location,) = found["locations"]
        region = location["physicalLocation"].get("region", {})
        assert all(isinstance(n, int) and n >= 1 for n in region.values())
        assert set(region) <= {"startLine", "startColumn"}
    at = [r["locations"][0]["physicalLocation"] for r in run["results"]]
    assert at[0] == {"artifactLocation": {"uri": "shop/a%20b.yaml"}, "region": {"startLine": 7, "startColumn": 11}}
    assert {a["artifactLocation"]["uri"] for a in at} == {"shop/a%20b.yaml", "shop/empty.json", "-"}
    assert json.loads(smc("-f", "-", "-o", "sarif", stdin=SERVICES).stdout)["runs"][0]["results"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [((), 2, "-f is missing"), (("-f", "/nowhere"), 3, "no file"), (("-f", "-"), 3, "no manifest")],
)
def test_what_cannot_be_read_is_no_finding(arguments: tuple[str, ...], code: int, said: str) -> None:
    result = smc(*arguments)
    assert result.exit_code == code
    assert said in result.stderr


def test_a_field_that_is_not_there_is_told_at_the_nearest_above_it() -> None:
    (document,) = documents(b'spec:\n  a: [1, {"b c": 2}]\n', file="f")
    places = {
        field: (at.line, at.column)
        for field in ("", "spec.a[1]", 'spec.a[1]["b c"]', "spec.a[7].x", "spec.b", "nothing")
        for at in [locate(document.root, field)]
    }
    assert places == {
        "": (1, 1),
        "spec.a[1]": (2, 10),
        'spec.a[1]["b c"]': (2, 18),
        "spec.a[7].x": (2, 6),
        "spec.b": (2, 3),
        "nothing": (1, 1),
    }


TARGET = b"""\
apiVersion: access.smi-spec.io/v1alpha3
kind: TrafficTarget
metadata: {name: buyer-to-store, namespace: shop}
spec:
  destination: {kind: ServiceAccount, name: store, namespace: shop}
  rules: [{kind: HTTPRouteGroup, name: store, matches: [books]}]
  sources: [{kind: ServiceAccount, name: buyer, namespace: shop}]
"""
ROUTES = b"""\
---
apiVersion: specs.smi-spec.io/v1alpha4
kind: HTTPRouteGroup
metadata: {name: store, namespace: shop}
spec: {matches: [{name: others, pathRegex: "/others", methods: [GET]}]}
"""


def test_what_is_missed_in_a_manifest_that_the_files_hold_is_an_error() -> None:
    alone = smc("-f", "-", stdin=TARGET)
    assert alone.exit_code == 0
    assert {"[RouteGroupNotFound]", "[GrantsNothing]"} <= set(alone.stdout.split())
    together = smc("-f", "-", stdin=TARGET + ROUTES)
    assert together.exit_code == 1
    (error,) = (line for line in together.stdout.splitlines() if ": error: " in line)
    assert error.startswith("-:6:57: error: spec.rules[0].matches[0]: HTTPRouteGroup store has no match books")


def test_every_reason_that_is_told_in_another_way_is_one_that_exists() -> None:
    root = Path(plugins.__file__).parent
    text = "".join(path.read_text() for folder in ("mesh", "smi") for path in (root / folder).glob("*.py"))
    assert [reason for reason in RUNNING | FOLLOWS | HERE if f'"{reason}"' not in text] == []
