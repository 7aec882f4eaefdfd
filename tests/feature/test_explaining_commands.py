"""What `explain`, `diff`, `proxy config` and `describe` say of a real mesh, through the API of a replica."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from cluster.mirror import Mirror
from smc import plugins
from smc.api.backends import ProxyStatus
from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.cli.program import program
from smc.cli.session import Config
from smc.envoy.snapshot import Generator
from smc.metrics import Metrics
from smc.model import Identity, Name
from smc.pipeline import Pipeline
from smc.records import CertificateRecord, Nack, ReadyRecord
from smc.xds.snapshot import Type
from tests.unit.api.replica import TRUST_DOMAIN, Replica, running
from tests.unit.bookshop import KEYS, SOURCE, Shop, service, workload
from tests.unit.xds.replica import until

HOST = "outbound/bookstore.shop|80"
SPLIT = """\
apiVersion: split.smi-spec.io/v1alpha4
kind: TrafficSplit
metadata: {name: bookstore, namespace: shop}
spec: {service: bookstore, backends: [{service: bookstore-v2, weight: %d}, {service: bookstore-v1, weight: 1}]}
"""
TARGET = "access.smi-spec.io/TrafficTarget/shop/buyer-to-bookstore"


@dataclass
class Desk:
    replica: Replica
    shop: Shop
    pipeline: Pipeline
    home: Path
    keys: list[bytes] = field(default_factory=list)
    """The private keys of the mesh, as PEM."""

    async def smc(self, *arguments: str, stdin: str = "") -> Result:
        environment = {"SMC_CREDENTIAL": str(self.home), "NO_COLOR": "1"}

        def run() -> Result:
            return CliRunner().invoke(program, list(arguments), input=stdin, env=environment, prog_name="smc")

        return await asyncio.to_thread(run)

    async def built(self) -> None:
        """Return once the mesh has everything that was written."""
        await self.pipeline.admit(resumed=True)
        self.replica.mesh = self.pipeline.mesh

    async def certify(self, *names: str) -> None:
        for name in names:
            identity, key = Identity("shop", name), x509.new_key()
            made = await self.replica.certified(identity.uri(TRUST_DOMAIN), key)
            self.keys.append(made.key.encode())
            path = KEYS.certificate(identity)
            sealed = self.replica.backends.keyring.seal(path, made.key.encode())
            await self.shop.put(path, CertificateRecord(identity, made.chain, sealed, "1", 0.0, made.not_after, 1))
            await self.shop.put(KEYS.ready(Name("shop", name)), ReadyRecord(Name("shop", name)))

    def versions(self, name: str) -> dict[str, str]:
        """Of what a proxy should have now, by short type."""
        assert self.pipeline.mesh is not None
        found = Generator(self._open).snapshot(self.pipeline.mesh, Name("shop", name))
        return {type_.value.rpartition(".")[2]: version for type_, version in found.versions.items()}

    def _open(self, record: CertificateRecord) -> bytes:
        return self.replica.backends.keyring.open(KEYS.certificate(record.identity), record.sealed_key)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    with capture_logs():
        async with running() as replica, asyncio.TaskGroup() as tasks:
            shop = Shop(replica.kv)
            await shop.observe(
                *(service(name) for name in ("bookstore", "bookstore-v1", "bookstore-v2")),
                *(workload(name) for name in ("buyer", "thief")),
                *(workload(name, "bookstore", name) for name in ("bookstore-v1", "bookstore-v2")),
            )
            await shop.routes("/books")
            await shop.allow("buyer", "bookstore-v1", name="buyer-to-bookstore")
            pipeline = Pipeline(
                Mirror(replica.kv, KEYS.root, KEYS.feeds_mesh),
                plugins.policies(),
                Generator(lambda _: b"").snapshot,
                sources=frozenset({SOURCE}),
                max_staleness=3600.0,
                metrics=Metrics(),
            )
            replica.imagine = pipeline.imagine
            found = Desk(replica, shop, pipeline, tmp_path / "home")
            await found.certify("buyer", "thief", "bookstore-v1", "bookstore-v2")
            credentials.write(found.home, replica.operator)
            Config((replica.api,), "default").write(found.home)
            running_ = tasks.create_task(pipeline.run())
            await until(lambda: pipeline.ready)
            await found.built()
            yield found
            running_.cancel()


# ------------------------------------------------------------------------------------------------------------- explain


async def test_explain_names_the_workloads_the_manifest_and_where_it_is_written(desk: Desk) -> None:
    result = await desk.smc("explain", "shop/buyer", "bookstore-v1.shop", "--path", "/books?page=2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == dedent("""\
        allowed
          from    shop/buyer, as shop/buyer
          to      shop/bookstore-v1 port 80 (http)
          request GET /books?page=2
                  host: bookstore-v1.shop
        100.0% to shop/bookstore-v1 port 80
            allowed at shop/bookstore-v1, as shop/bookstore-v1, port 8080
              by traffictarget/shop/buyer-to-bookstore  policy.yaml:1
    """)


async def test_explain_says_what_is_missing_and_ends_with_1(desk: Desk) -> None:
    result = await desk.smc("explain", "sa:shop/buyer", "shop/bookstore-v1", "--path", "/", "--method", "POST")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-4:] == [
        "100.0% to shop/bookstore-v1 port 80",
        "    denied at shop/bookstore-v1, as shop/bookstore-v1, port 8080",
        "      not by traffictarget/shop/buyer-to-bookstore  policy.yaml:1",
        "          the path / does not match (?:/books).*",
    ]


async def test_explain_follows_a_split(desk: Desk) -> None:
    await desk.shop.apply(SPLIT % 3)
    await desk.built()
    result = await desk.smc("explain", "shop/buyer", "shop/bookstore", "--path", "/books")
    assert result.exit_code == 1
    assert result.stdout.startswith("allowed by some\n")
    assert "split by  trafficsplit/shop/bookstore  policy.yaml:1\n" in result.stdout
    assert re.findall(r" *([\d.]+%) to (\S+)", result.stdout) == [
        ("25.0%", "shop/bookstore-v1"),
        ("75.0%", "shop/bookstore-v2"),
    ]
    data = json.loads((await desk.smc("explain", "shop/buyer", "shop/bookstore", "-o", "json")).stdout)
    assert data["verdict"] == "denied"
    assert [way["share"] for way in data["ways"]] == [0.25, 0.75]


TREATED = """\
apiVersion: smc.io/v1alpha1
kind: TrafficPolicy
metadata: {name: bookstore-v1, namespace: shop}
spec:
  service: bookstore-v1
  fault: {delay: {duration: 10ms, percent: 0.5}, abort: {status: 503}}
  limits: {maxRequests: 7}
  rateLimit: {requests: 100, burst: 200}
"""


async def test_explain_says_what_a_traffic_policy_does_and_where_it_is_written(desk: Desk) -> None:
    await desk.shop.apply(TREATED)
    await desk.built()
    result = await desk.smc("explain", "shop/buyer", "bookstore-v1.shop", "--path", "/books")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[5:] == [
        "treated by trafficpolicy/shop/bookstore-v1  policy.yaml:1",
        "  0.5% wait 10 ms before they are sent",
        "  100% are answered 503, and not sent",
        "100.0% to shop/bookstore-v1 port 80",
        "    treated by trafficpolicy/shop/bookstore-v1  policy.yaml:1",
        "      may be at most 7 requests at a time; beyond it the caller's proxy answers 503",
        "    allowed at shop/bookstore-v1, as shop/bookstore-v1, port 8080",
        "      by traffictarget/shop/buyer-to-bookstore  policy.yaml:1",
        "      treated by trafficpolicy/shop/bookstore-v1  policy.yaml:1",
        "        may be at most 100 each 1 s, 200 at once, of all callers; beyond it 429",
    ]
    data = json.loads((await desk.smc("explain", "shop/buyer", "shop/bookstore-v1", "-o", "json")).stdout)
    assert [(effect["kind"], effect["share"]) for effect in data["effects"]] == [
        ("fault.delay", 0.005),
        ("fault.abort", 1.0),
    ]


async def test_what_explain_cannot_answer_has_an_exit_code_of_its_own(desk: Desk) -> None:
    assert (await desk.smc("explain", "shop/nobody", "shop/bookstore")).exit_code == 3
    assert (await desk.smc("explain", "nobody", "shop/bookstore")).exit_code == 7
    assert (await desk.smc("explain", "shop/buyer", "shop/bookstore", "--header", "x")).exit_code == 2


# ---------------------------------------------------------------------------------------------------------------- diff


async def test_diff_says_what_apply_then_does(desk: Desk) -> None:
    result = await desk.smc("diff", "-f", "-", "-o", "json", stdin=SPLIT % 3)
    assert result.exit_code == 1, result.stderr
    data = json.loads(result.stdout)
    assert data["changes"] == [{"manifest": "split.smi-spec.io/TrafficSplit/shop/bookstore", "change": "created"}]
    (difference,) = data["differences"]
    assert difference["proxies"] == [f"shop/{name}" for name in ("bookstore-v1", "bookstore-v2", "buyer", "thief")]
    (resource,) = difference["resources"]
    assert (resource["type"], resource["name"], resource["change"]) == ("VirtualHost", HOST, "changed")
    before = await configured(desk, "buyer", "virtual-host", HOST)
    assert resource["before"] == before
    await desk.shop.apply(SPLIT % 3)
    await desk.built()
    after = await configured(desk, "buyer", "virtual-host", HOST)
    assert resource["after"] == after != before
    again = await desk.smc("diff", "-f", "-", stdin=SPLIT % 3)
    assert (again.exit_code, again.stdout) == (0, "trafficsplit/shop/bookstore would be unchanged\n")


async def configured(desk: Desk, proxy: str, type_: str, name: str) -> Any:
    result = await desk.smc("proxy", "config", f"shop/{proxy}", "--type", type_, "--name", name, "-o", "json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["resources"]
    return found["message"]


async def test_diff_is_read_as_a_difference(desk: Desk) -> None:
    await desk.shop.apply(SPLIT % 3)
    await desk.built()
    result = await desk.smc("diff", "-f", "-", stdin=SPLIT % 4)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[:5] == [
        "trafficsplit/shop/bookstore would be configured",
        "",
        "4 proxies would be sent something else",
        "",
        "=== shop/bookstore-v1, shop/bookstore-v2, shop/buyer, shop/thief",
    ]
    assert lines[5] == f"changed VirtualHost {HOST}  from trafficsplit/shop/bookstore"
    assert [line.split() for line in lines if line[0:1] in "+-" and line.strip("+-")] == [
        ["-", "weight:", "3"],
        ["+", "weight:", "4"],
    ]


async def test_diff_of_a_deletion_and_the_problems_that_come(desk: Desk) -> None:
    group = "apiVersion: specs.smi-spec.io/v1alpha4\nkind: HTTPRouteGroup\n"
    group += "metadata: {name: everything, namespace: shop}\nspec: {matches: [{name: all, pathRegex: /x}]}\n"
    result = await desk.smc("diff", "-f", "-", "--delete", stdin=group)
    assert result.exit_code == 1
    assert "httproutegroup/shop/everything would be deleted\n" in result.stdout
    assert "=== shop/bookstore-v1\nchanged RouteConfiguration inbound|8080  from " in result.stdout
    assert "Problems that would come:\n  traffictarget/shop/buyer-to-bookstore" in result.stdout
    assert "RouteGroupNotFound" in result.stdout
    await desk.built()
    assert (await desk.smc("get", "httproutegroup", "everything", "-n", "shop")).exit_code == 0, "nothing was deleted"


async def test_diff_disturbs_nothing(desk: Desk) -> None:
    before, versions = desk.pipeline.mesh, desk.versions("buyer")
    await desk.smc("diff", "-f", "-", stdin=SPLIT % 3)
    assert desk.pipeline.mesh is before
    assert desk.versions("buyer") == versions
    await desk.shop.apply(SPLIT % 9)
    await desk.built()
    direct = await configured(desk, "buyer", "virtual-host", HOST)
    assert "9" in json.dumps(direct)


async def test_a_document_that_is_refused_is_no_difference(desk: Desk, tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(SPLIT.replace("weight: %d", "weight: -1"))
    two.write_text("\n" + (SPLIT % 1).replace("kind: TrafficSplit", "kind: TrafficSplitt"))
    result = await desk.smc("diff", "-f", str(one), "-f", str(two))
    assert (result.exit_code, result.stdout) == (7, "")
    assert f"{one}:4:" in result.stderr
    assert f"{two}:3:" in result.stderr
    missing = await desk.smc("diff", "-f", "-", "--delete", stdin=SPLIT % 1)
    assert (missing.exit_code, missing.stdout) == (3, "")


async def test_a_workload_that_would_come_shows_what_its_proxy_would_get(desk: Desk) -> None:
    text = "apiVersion: smc.io/v1alpha1\nkind: Workload\nmetadata: {name: new, namespace: shop}\n"
    text += "spec: {address: 127.0.9.9, serviceAccount: new, services: [bookstore]}\n"
    data = json.loads((await desk.smc("diff", "-f", "-", "-o", "json", stdin=text)).stdout)
    ((added,),) = ([d for d in data["differences"] if d["proxies"] == ["shop/new"]],)
    assert {r["change"] for r in added["resources"]} == {"added"}
    assert any(problem["problem"]["reason"] == "NotReady" for problem in data["come"])


# -------------------------------------------------------------------------------------------------------- proxy config


async def test_config_is_yaml_with_versions_and_says_what_is_acked_and_what_is_refused(desk: Desk) -> None:
    versions = desk.versions("buyer")
    nack = Nack(Name("shop", "buyer"), Type.VIRTUAL_HOST.value, (HOST,), "no\nway", (), 1)
    acked = {"Cluster": versions["Cluster"], "RouteConfiguration": "0123"}
    desk.replica.streams = [ProxyStatus(Name("shop", "buyer"), "", 0.0, 7, 7, "nacked", acked, (nack,))]
    result = await desk.smc("proxy", "config", "shop/buyer")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "connected to replica-1\n" in result.stdout.splitlines(keepends=True)[0]
    assert f"# Cluster {versions['Cluster']}: ACKed\n" in result.stdout
    assert f"# RouteConfiguration {versions['RouteConfiguration']}: it has ACKed 0123\n" in result.stdout
    assert f"# Listener {versions['Listener']}: it has ACKed none\n" in result.stdout
    assert "\n# REFUSED: no way\n" in result.stdout
    names = {d.get("name") or d.get("cluster_name") for d in yaml.safe_load_all(result.stdout) if d}
    assert {"outbound", "shop/bookstore|80", "identity", "bundle"} <= names


async def test_config_of_a_proxy_that_is_not_connected_says_so(desk: Desk) -> None:
    result = await desk.smc("proxy", "config", "shop/thief", "--type", "secret")
    assert result.exit_code == 0
    assert "connected to no replica" in result.stderr
    assert (await desk.smc("proxy", "config", "shop/none")).exit_code == 3
    assert (await desk.smc("proxy", "config", "shop/thief", "--name", "none")).exit_code == 3


# ------------------------------------------------------------------------------------------------------------ describe


async def test_describe_names_the_proxies_that_a_manifest_reached(desk: Desk) -> None:
    mesh = desk.pipeline.mesh
    assert mesh is not None
    desk.replica.reached = mesh.revision
    desk.replica.streams = [ProxyStatus(Name("shop", "bookstore-v1"), "", 0.0, mesh.revision, mesh.revision, "synced")]
    result = await desk.smc("describe", "traffictarget", "buyer-to-bookstore", "-n", "shop")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("Reached:     1 of 1 proxies have ACKed it\n  shop/bookstore-v1  acked\n")
    desk.replica.streams = []
    result = await desk.smc("describe", "httproutegroup", "everything", "-n", "shop")
    assert result.stdout.endswith("Reached:     0 of 1 proxies have ACKed it\n  shop/bookstore-v1  disconnected\n")


# ------------------------------------------------------------------------------------------------------------- secrets


async def test_no_output_has_a_private_key_in_it(desk: Desk) -> None:
    text = "apiVersion: smc.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {egress: deny}\n"
    outputs = [
        (await desk.smc(*command, stdin=text)).output
        for name in ("buyer", "bookstore-v1")
        for command in (
            ("proxy", "config", f"shop/{name}"),
            ("proxy", "config", f"shop/{name}", "-o", "json"),
            ("proxy", "config", f"shop/{name}", "--type", "secret"),
            ("diff", "-f", "-"),
            ("diff", "-f", "-", "-o", "json"),
            ("explain", f"shop/{name}", "shop/bookstore", "-o", "json"),
        )
    ]
    whole = "\n".join(outputs)
    assert "[redacted]" in whole
    assert "BEGIN CERTIFICATE" in whole
    assert "PRIVATE KEY" not in whole
    for key in desk.keys:
        for line in key.decode().splitlines()[1:-1]:
            assert line not in whole
    # Nor in base64, as a message in JSON has bytes.
    assert "LS0tLS1CRUdJTi" not in whole
