from __future__ import annotations

import json

import yaml

from smc.cli import denials
from smc.v1 import smc_pb2 as pb

NOW = 1_900_000_000.0
FOUND = (
    pb.Denial(workload="bank/till", port="bank/till|80", mode="enforcing", denied=12, since=NOW - 90, last=NOW - 30),
    pb.Denial(workload="shop/store-1", port="shop/store|80", mode="audit", would_be_denied=3, since=NOW, last=NOW),
    pb.Denial(workload="shop/store-1", port="plaintext", mode="permissive", would_be_denied=4, since=NOW, last=NOW),
)


def test_the_table_says_who_was_called_as_what_and_how_often_that_was_denied() -> None:
    assert denials.render(FOUND, "table", NOW) == (
        "NAMESPACE   WORKLOAD   SERVICE      PORT        MODE         DENIED   WOULD BE DENIED   LAST\n"
        "bank        till       bank/till    80          enforcing    12       0                 30s\n"
        "shop        store-1    shop/store   80          audit        0        3                 0s\n"
        "shop        store-1    -            plaintext   permissive   0        4                 0s"
    )


def test_the_wide_table_says_since_when() -> None:
    assert denials.render(FOUND[:1], "wide", NOW).endswith("30s    2030-03-17T17:45:10Z")


def test_data_has_numbers_and_times() -> None:
    document = json.loads(denials.render(FOUND, "json"))
    assert document["denials"][0] == {
        "namespace": "bank",
        "workload": "till",
        "service": "bank/till",
        "port": 80,
        "mode": "enforcing",
        "denied": 12,
        "wouldBeDenied": 0,
        "since": "2030-03-17T17:45:10Z",
        "last": "2030-03-17T17:46:10Z",
    }
    assert (document["denials"][2]["service"], document["denials"][2]["port"]) == (None, "plaintext")
    assert yaml.safe_load(denials.render(FOUND, "yaml"))["denials"][0]["wouldBeDenied"] == 0
