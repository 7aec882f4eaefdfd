from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from smc.cli import denials
from smc.cli.get import get
from smc.cli.watching import Change
from smc.v1 import smc_pb2 as pb

NOW = 1_900_000_000.0
FOUND = (
    pb.Denial(workload="bank/till", port="bank/till|80", mode="enforcing", denied=12, since=NOW - 90, last=NOW - 30),
    pb.Denial(workload="shop/store-1", port="shop/store|80", mode="audit", would_be_denied=3, since=NOW, last=NOW),
    pb.Denial(workload="shop/store-1", port="plaintext", mode="permissive", would_be_denied=4, since=NOW, last=NOW),
    pb.Denial(workload="shop/store-1", port="tcp", mode="enforcing", denied=5, since=NOW, last=NOW),
)


def test_the_table_says_who_was_called_as_what_and_how_often_that_was_denied() -> None:
    assert denials.render(FOUND, "table", NOW) == (
        "NAMESPACE   WORKLOAD   SERVICE      PORT        MODE         DENIED   WOULD BE DENIED   LAST\n"
        "bank        till       bank/till    80          enforcing    12       0                 30s\n"
        "shop        store-1    shop/store   80          audit        0        3                 0s\n"
        "shop        store-1    -            plaintext   permissive   0        4                 0s\n"
        "shop        store-1    -            tcp         enforcing    5        0                 0s"
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
    assert (document["denials"][3]["service"], document["denials"][3]["port"]) == (None, "tcp")
    assert yaml.safe_load(denials.render(FOUND, "yaml"))["denials"][0]["wouldBeDenied"] == 0


# ----------------------------------------------------------------------------------------------------------- --watch


@dataclass
class Asked:
    """Answers one question after the other."""

    answers: list[pb.DenialsResponse]

    def call(self, _method: str, _request: Any, *, timeout: float = 0.0) -> pb.DenialsResponse:
        return self.answers.pop(0)


def test_changes_are_rows_and_what_is_forgotten_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    tell = denials._teller("table")
    tell([(Change.ADDED, FOUND[0])])
    tell([(Change.MODIFIED, FOUND[1]), (Change.DELETED, FOUND[0])])
    tell([(Change.DELETED, FOUND[1])])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["NAMESPACE", "WORKLOAD", "SERVICE"]
    assert (first.split()[1], second.split()[1]) == ("till", "store-1")


def test_each_change_is_a_json_document_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    denials._teller("json")([(Change.ADDED, FOUND[0]), (Change.DELETED, FOUND[1])])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["type"], line["denial"]["workload"]) for line in found] == [("ADDED", "till"), ("DELETED", "store-1")]


def test_a_replica_that_does_not_answer_takes_nothing_along_and_is_named_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = pb.DenialsResponse(denials=FOUND[:1], unreachable=["replica-2"])
    session: Any = Asked([pb.DenialsResponse(denials=FOUND), missing, missing, pb.DenialsResponse(denials=FOUND[:1])])
    look = denials._looker(session, pb.DenialsRequest())
    all_ = look({})
    assert len(all_) == len(FOUND)
    assert look(all_) == all_
    assert look(all_) == all_
    assert len(look(all_)) == 1
    assert capsys.readouterr().err.count("replica-2") == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("denials", "store"), "denials have no names"),
        (("denials", "-o", "name"), "denials have no names of their own"),
    ],
)
def test_denials_have_no_names(arguments: tuple[str, ...], why: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(get, [*arguments, "--credential", str(tmp_path), "--server", "127.0.0.1:1"])
    assert found.exit_code == 2
    assert why in found.output
