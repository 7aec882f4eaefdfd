"""How two sets differ."""

from __future__ import annotations

import gc

from envoy.config.route.v3 import route_pb2
from google.protobuf.message import Message

from smc.xds.snapshot import EMPTY, ResourceSet
from smc.xds.subscription import accused, empty_route
from tests.unit.xds.resources import assignment


def test_a_set_names_what_was_added_changed_and_removed_since_another() -> None:
    same = assignment("same")
    before = ResourceSet.of([same, assignment("changed"), assignment("removed")])
    after = ResourceSet.of([same, assignment("changed", "2"), assignment("added")])
    assert after.changed_since(before) == ("added", "changed", "removed")
    assert after.changed_since(EMPTY) == ("added", "changed", "same")


def test_two_sets_are_compared_once_for_all_streams() -> None:
    before, after = ResourceSet.of([assignment("a")]), ResourceSet.of([assignment("a", "2")])
    assert after.changed_since(before) is after.changed_since(before)


def test_the_older_set_is_not_kept_alive() -> None:
    before, after = ResourceSet.of([assignment("a")]), ResourceSet.of([assignment("a", "2")])
    after.changed_since(before)
    del before
    gc.collect()
    assert len(after._changes) == 0


def test_an_empty_route_is_a_route_configuration_with_nothing_but_its_name() -> None:
    for name in ("outbound", "inbound|80", "ü" * 100, "x" * 20_000):
        message: Message = route_pb2.RouteConfiguration.FromString(empty_route(name).body)
        assert message == route_pb2.RouteConfiguration(name=name)


def test_a_text_accuses_only_whole_names() -> None:
    names = ("shop/x|80", "shop/x|8080", "x|80", "out", "out.more")
    assert accused("Error adding/updating cluster(s) shop/x|80: bad, out.more: worse", names) == (
        "shop/x|80",
        "out.more",
    )
    assert accused("there is a fault in out.", names) == ("out",)
    assert accused("nothing to see", names) == ()
