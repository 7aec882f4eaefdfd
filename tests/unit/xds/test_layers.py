"""Two layers of a Snapshot, and what a stream hears of a change in either."""

from __future__ import annotations

import gc
import weakref

from smc.xds.snapshot import Layer, ResourceSet, Snapshot, Type
from smc.xds.stream import Request, Stream
from smc.xds.virtual_hosts import whole
from tests.unit.xds.conversation import running
from tests.unit.xds.resources import (
    CLUSTER,
    ENDPOINT,
    VIRTUAL_HOST,
    assignment,
    cluster,
    discovering,
    layered,
    static,
    virtual_host,
)

STORE, BOOKS = cluster("store"), cluster("books")


def layer(*sets: ResourceSet) -> Layer:
    return Layer({next(iter(found.resources.values())).type: found for found in sets})


def test_two_layers_differ_in_the_types_of_which_the_sets_do() -> None:
    same = ResourceSet.of([static("a")])
    before, after = layer(same, ResourceSet.of([assignment("x")])), layer(same, ResourceSet.of([assignment("x", "2")]))
    assert after.changed_since(before) == ((ENDPOINT, ("x",)),)
    assert layer(same).changed_since(before) == ((ENDPOINT, ("x",)),)
    assert after.changed_since(after) == ()


def test_each_is_told_how_a_layer_differs_from_that_which_it_had() -> None:
    now = layer(ResourceSet.of([assignment("a", "2"), assignment("b", "2")]))
    for _ in range(2):
        assert now.changed_since(Layer()) == ((ENDPOINT, ("a", "b")),)
        assert now.changed_since(now) == ()


def test_a_layer_is_compared_once_for_all_who_had_the_same() -> None:
    before, now = layer(ResourceSet.of([assignment("a")])), layer(ResourceSet.of([assignment("a", "2")]))
    assert now.changed_since(before) is now.changed_since(before)


def test_a_layer_does_not_keep_the_one_before() -> None:
    before, now = layer(ResourceSet.of([assignment("a")])), layer(ResourceSet.of([assignment("a", "2")]))
    now.changed_since(before)
    gone = weakref.ref(before)
    del before
    gc.collect()
    assert gone() is None


def test_streams_that_come_to_one_snapshot_from_different_ones_are_each_sent_what_they_lack() -> None:
    one = running(STORE, BOOKS, assignment("store"), assignment("books"))
    other = running(STORE, BOOKS, assignment("store", "2"), assignment("books", "2"))
    goal = assignment("store", "2"), assignment("books")
    assert one.offer(STORE, BOOKS, *goal) == ["ENDPOINT store=2"]
    assert other.offer(STORE, BOOKS, *goal) == ["ENDPOINT books=1"]


def test_a_change_in_the_shared_layer_alone_is_sent() -> None:
    talk = running(STORE, assignment("store"))
    assert talk.offer(STORE, assignment("store", "2")) == ["ENDPOINT store=2"]


def test_a_change_in_the_own_layer_alone_is_sent() -> None:
    given = assignment("store")
    talk = running(STORE, given)
    assert talk.offer(cluster("store", "2"), given) == ["CLUSTER store=2", "ENDPOINT store=1"]


def test_a_change_in_both_layers_is_sent() -> None:
    talk = running(STORE, assignment("store"), static("local"))
    assert talk.offer(STORE, assignment("store", "2"), static("local", "2")) == ["CLUSTER local=2", "ENDPOINT store=2"]


def test_whole_routes_take_only_the_virtual_hosts_from_the_shared_layer() -> None:
    made = whole(layered([STORE, assignment("store"), discovering("out"), virtual_host("out", "others", domain="*")]))
    assert set(made.of_type(ENDPOINT)) == {"store"}
    assert not made.of_type(VIRTUAL_HOST)


def test_a_stream_that_carries_one_type_follows_it_through_both_layers() -> None:
    stream = Stream([Type.ENDPOINT])
    stream.offer(layered([STORE, assignment("store")]), 1)
    stream.receive(Request(ENDPOINT, ("store",)), 0)
    (first,) = stream.to_send(0)
    stream.receive(Request(ENDPOINT, nonce=first.nonce), 0)
    stream.offer(layered([cluster("store", "2"), assignment("store", "2")]), 2)
    (second,) = stream.to_send(0)
    assert [resource.body for resource in second.resources] == [b"2"]


def test_a_type_is_found_in_the_layer_that_has_it() -> None:
    made = layered([STORE, assignment("store")])
    assert set(made.own.sets) == {CLUSTER}
    assert set(made.shared.sets) == {ENDPOINT}
    assert [set(made.of_type(type_)) for type_ in (CLUSTER, ENDPOINT, VIRTUAL_HOST)] == [{"store"}, {"store"}, set()]
    assert Snapshot().changed_since(made) == ((CLUSTER, ("store",)), (ENDPOINT, ("store",)))
