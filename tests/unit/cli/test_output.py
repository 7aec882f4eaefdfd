from __future__ import annotations

import json

import pytest
import yaml

from smc.cli import describe, get, proxy
from smc.cli.say import clean, exit_code
from smc.cli.session import with_port
from smc.cli.table import age, table
from smc.errors import Conflict, Denied, Exhausted, Expired, Invalid, NotFound, SmcError, Unauthenticated, Unavailable
from smc.manifests import OWN_KINDS, find
from smc.v1 import smc_pb2 as pb

NOW = 1_900_000_000.0
SERVICE = find(OWN_KINDS, "service")


def bookstore() -> pb.Object:
    manifest = {
        "apiVersion": "smc.io/v1alpha1",
        "kind": "Service",
        "metadata": {"name": "bookstore", "namespace": "shop"},
        "spec": {"ports": [{"port": 80}, {"port": 81, "protocol": "grpc"}]},
    }
    return pb.Object(
        group="smc.io",
        version="v1alpha1",
        kind="Service",
        namespace="shop",
        name="bookstore",
        json=json.dumps(manifest),
        file="shop.yaml",
        line=3,
        created=NOW - 3 * 3600,
        author="spiffe://mesh.example/operator/ann",
        resource_version=42,
    )


def troubled() -> pb.Object:
    o = bookstore()
    o.name = "bookstore-2"
    o.problems.add(reason="NoEndpoints", message="nobody backs it: apply a Workload", field="spec", severity="error")
    o.problems.add(reason="NotBuiltYet", message="wait", severity="warning")
    o.nacks.add(
        proxy="shop/buyer",
        type_url="type.googleapis.com/envoy.config.listener.v3.Listener",
        resource="outbound",
        text="regex 'a' RE2 program size of 101 > max program size of 100",
        resource_version=42,
    )
    return o


def test_the_table_of_services() -> None:
    dialled = bookstore()
    dialled.address = "240.0.0.7"
    text = get.render([dialled, troubled()], SERVICE, "table", now=NOW)
    assert text == (
        "NAME          PORTS              ADDRESS     STATUS                                     AGE\n"
        "bookstore     80/http, 81/grpc   240.0.0.7   ok                                         3h\n"
        "bookstore-2   80/http, 81/grpc   -           1 problem, 1 warning, refused by 1 proxy   3h"
    )


def test_the_wide_table_with_namespaces() -> None:
    text = get.render([bookstore()], SERVICE, "wide", with_namespace=True, now=NOW)
    assert text == (
        "NAMESPACE   NAME        PORTS              ADDRESS   STATUS   AGE   VERSION   WRITTEN IN    AUTHOR\n"
        "shop        bookstore   80/http, 81/grpc   -         ok       3h    42        shop.yaml:3   ann"
    )


def test_names_can_be_given_to_other_commands() -> None:
    assert get.render([bookstore(), troubled()], SERVICE, "name") == "service/bookstore\nservice/bookstore-2"


def test_json_of_one_is_an_object_and_of_several_a_list() -> None:
    one = json.loads(get.render([troubled()], SERVICE, "json", single=True))
    assert one["metadata"] == {
        "name": "bookstore-2",
        "namespace": "shop",
        "creationTimestamp": "2030-03-17T14:46:40Z",
        "resourceVersion": "42",
    }
    assert one["status"]["problems"][0]["reason"] == "NoEndpoints"
    assert one["status"]["refusedBy"][0]["proxy"] == "shop/buyer"
    many = json.loads(get.render([bookstore(), troubled()], SERVICE, "json"))
    assert (many["kind"], len(many["items"])) == ("List", 2)


def test_yaml_can_be_applied_again() -> None:
    text = get.render([bookstore(), troubled()], SERVICE, "yaml")
    assert list(yaml.safe_load_all(text)) == [json.loads(bookstore().json)] * 2
    assert text.startswith("# version 42, created 2030-03-17T14:46:40Z, by spiffe://mesh.example/operator/ann; ok\n")


def test_a_manifest_of_another_shape_is_shown_with_question_marks() -> None:
    o = bookstore()
    o.json = '{"spec": {"ports": 7}}'
    assert "bookstore   ?       ?         ok" in get.render([o], SERVICE, "table", now=NOW)


def test_a_description_says_all_that_the_mesh_has_to_say() -> None:
    reach = pb.ReachResponse(proxies=24, acked=22)
    reach.reached.add(proxy="shop/buyer", state="nacked: Listener outbound: no\nreally")
    reach.reached.add(proxy="shop/far", state="disconnected")
    for number in range(22):
        reach.reached.add(proxy=f"shop/p{number:02}", state="acked")
    assert describe.text(troubled(), reach, now=NOW) == (
        "Name:        bookstore-2\n"
        "Namespace:   shop\n"
        "Kind:        Service (smc.io/v1alpha1)\n"
        "Created:     2030-03-17 14:46:40 UTC (3h ago)\n"
        "Author:      spiffe://mesh.example/operator/ann\n"
        "Written in:  shop.yaml:3\n"
        "Version:     42\n"
        "spec:\n"
        "  ports:\n"
        "  - port: 80\n"
        "  - port: 81\n"
        "    protocol: grpc\n"
        "Problems:\n"
        "  error  NoEndpoints  spec\n"
        "    nobody backs it: apply a Workload\n"
        "  warning  NotBuiltYet\n"
        "    wait\n"
        "Refused by:\n"
        "  shop/buyer  Listener outbound  (version 42)\n"
        "    regex 'a' RE2 program size of 101 > max program size of 100\n"
        "Reached:     22 of 24 proxies have ACKed it\n"
        "  shop/buyer  nacked: Listener outbound: no really\n"
        "  shop/far  disconnected\n" + "".join(f"  shop/p{number:02}  acked\n" for number in range(18)) + "  and 4 more"
    )


def test_a_virtual_address_is_told_from_one_that_is_written() -> None:
    o = bookstore()
    assert "Address:" not in describe.text(o, pb.ReachResponse(), now=NOW)
    o.address = "240.0.0.7"
    virtual = "\nAddress:     240.0.0.7 (virtual: where intercepted applications dial it)\nspec:\n"
    assert virtual in describe.text(o, pb.ReachResponse(), now=NOW)
    assert json.loads(get.render([o], SERVICE, "json", single=True))["status"]["address"] == "240.0.0.7"
    manifest = json.loads(o.json)
    manifest["spec"]["address"] = "240.0.0.7"
    o.json = json.dumps(manifest)
    assert "\nAddress:     240.0.0.7\nspec:\n" in describe.text(o, pb.ReachResponse(), now=NOW)


def test_what_no_proxy_has_is_said() -> None:
    told = describe.text(troubled(), pb.ReachResponse(), now=NOW)
    assert told.endswith("Reached:     no proxy has anything that comes from it by name")


def test_the_table_of_proxies_ends_with_what_they_refuse() -> None:
    buyer = pb.Proxy(
        name="shop/buyer",
        replica="replica-1",
        identity="spiffe://mesh.example/ns/shop/sa/buyer",
        connected=NOW - 90,
        revision=7,
        acked=6,
        state="nacked",
        versions={"Cluster": "0123456789abcdef", "Listener": "ff"},
    )
    buyer.nacks.add(proxy="shop/buyer", type_url="x.Listener", resource="outbound", text="no")
    assert proxy.render([buyer], [], "table", now=NOW) == (
        "PROXY        REPLICA     STATE    REVISION   ACKED   CDS        EDS   SDS   LDS   RDS   VHDS   CONNECTED\n"
        "shop/buyer   replica-1   nacked   7          6       01234567   -     -     ff    -     -      90s\n"
        "\n"
        "Refused:\n"
        "  shop/buyer  Listener outbound\n"
        "    no"
    )
    data = json.loads(proxy.render([buyer], [pb.Replica(name="replica-1", leader=True)], "json"))
    assert data["proxies"][0]["state"] == "nacked"
    assert data["replicas"][0]["leader"] is True


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (86400 * 3, "3d")]
)
def test_ages_have_one_unit(seconds: int, shown: str) -> None:
    assert age(NOW - seconds, NOW) == shown
    assert age(0, NOW) == "-"


def test_columns_are_as_wide_as_what_they_show() -> None:
    assert table(["A", "B"], [["本", "x"], ["", "y"]]) == "A    B\n本   x\n-    y"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Invalid, 1),
        (Conflict, 1),
        (NotFound, 3),
        (Denied, 4),
        (Unauthenticated, 4),
        (Expired, 4),
        (Unavailable, 5),
        (Exhausted, 5),
    ],
)
def test_every_error_has_its_exit_code(error: type[SmcError], code: int) -> None:
    assert exit_code(error("x")) == code


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("192.0.2.1", "192.0.2.1:15129"),
        ("192.0.2.1:1", "192.0.2.1:1"),
        ("host", "host:15129"),
        ("::1", "[::1]:15129"),
        ("[::1]", "[::1]:15129"),
        ("[::1]:7", "[::1]:7"),
    ],
)
def test_a_server_without_a_port_is_at_the_apis_port(given: str, meant: str) -> None:
    assert with_port(given) == meant


def test_a_foreign_text_cannot_steer_the_terminal() -> None:
    assert clean("a\x07b\r\x1b[2J\u202ec\n\td") == "a�b��[2J�c\n\td"
