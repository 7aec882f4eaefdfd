"""What a client has: as a dict of its own would say, and for next to nothing where others have the same."""

from __future__ import annotations

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.xds.held import LARGE, Held, Told
from smc.xds.snapshot import Resource, ResourceSet, Type
from tests.unit.xds.conversation import Conversation, running
from tests.unit.xds.resources import assignment, cluster

NAMES = "abcd"
ALL = {(name, body): assignment(name, body) for name in NAMES for body in "12"}
puts = st.one_of(
    st.sampled_from([(name, resource) for (name, _), resource in ALL.items()]),
    st.tuples(st.sampled_from(NAMES), st.sampled_from([None, Told("1")])),
)
whole = st.sets(st.sampled_from(sorted(ALL)), max_size=6).map(
    lambda keys: ResourceSet.of({name: ALL[name, body] for name, body in sorted(keys)}.values())
)
"""Sets that have some of the very same resources."""
SERVICES = [f"service-{number}" for number in range(300)]


def mesh(**changed: str) -> list[Resource]:
    named = {name.replace("-", "_"): name for name in SERVICES}
    return [of(name, changed.get(key, "1")) for of in (cluster, assignment) for key, name in named.items()]


def having(*resources: Resource) -> tuple[Held, ResourceSet]:
    """Both of these."""
    held = Held()
    for resource in resources:
        held.put(resource.name, resource)
    return held, ResourceSet.of(resources)


def found(talk: Conversation, type_: Type, name: str) -> bytes | None:
    """The body of what the stream says that its client has; None: nothing."""
    has = talk.stream._subscriptions[type_].has.get(name)
    return has.body if isinstance(has, Resource) else None


def own(talk: Conversation) -> dict[Type, int]:
    """How many resources of each type the stream keeps for itself."""
    return {type_: len(subscription.has._own) for type_, subscription in talk.stream._subscriptions.items()}


@given(st.lists(st.one_of(puts, whole, st.just("what it has")), max_size=30))
def test_whatever_is_put_and_shared_it_has_what_a_dict_would_have(
    steps: list[tuple[str, Resource | Told | None] | ResourceSet | str],
) -> None:
    held, expected = Held(), dict[str, Resource | Told]()
    for step in steps:
        if isinstance(step, ResourceSet):
            held.share(step)
        elif isinstance(step, str):
            if all(isinstance(kept, Resource) for kept in expected.values()):
                held.share(ResourceSet.of(kept for kept in expected.values() if isinstance(kept, Resource)))
                assert not held._own, "all of it is shared"
        else:
            name, put = step
            held.put(name, put)
            if put is None:
                expected.pop(name, None)
            else:
                expected[name] = put
        assert held.resources() == expected
        assert not any(held._common.resources.get(name) is kept for name, kept in held._own.items()), "it cannot grow"
        assert [held.get(name) for name in NAMES] == [expected.get(name) for name in NAMES]


def test_what_has_other_objects_under_the_same_names_is_not_the_same() -> None:
    held = Held()
    held.put("a", ALL["a", "1"])
    held.share(ResourceSet.of([ALL["a", "2"]]))
    assert held.resources() == {"a": ALL["a", "1"]}
    held.share(ResourceSet.of([assignment("a", "1")]))
    assert held.get("a") is ALL["a", "1"]


def test_as_many_differences_are_not_the_same_ones() -> None:
    held, before = having(ALL["a", "1"], ALL["b", "1"], ALL["c", "1"])
    held.share(before)
    held.put("b", ALL["b", "2"])
    held.put("c", ALL["c", "2"])
    held.share(ResourceSet.of([ALL["b", "2"], ALL["c", "1"]]))
    assert held.resources() == {"a": ALL["a", "1"], "b": ALL["b", "2"], "c": ALL["c", "2"]}


@pytest.mark.parametrize(
    "differing", [{"service-1": None}, {"service-1": assignment("service-1", "2")}, {"more": assignment("more")}]
)
def test_who_differs_in_little_keeps_that_alone_and_lets_go_of_the_set_before(
    differing: dict[str, Resource | None],
) -> None:
    held, before = having(*map(assignment, SERVICES))
    held.share(before)
    for name, put in differing.items():
        held.put(name, put)
    expected = held.resources()
    held.share(before.replacing([assignment("service-2", "2")]))
    assert held.resources() == expected
    assert held._own.keys() == {*differing, "service-2"}
    gone = weakref.ref(before)
    del before
    gc.collect()
    assert gone() is None


def test_who_differs_in_much_holds_no_set() -> None:
    held, before = having(*map(assignment, SERVICES))
    held.share(before)
    for name in SERVICES[len(SERVICES) // LARGE + 1 :]:
        held.put(name, None)
    expected = held.resources()
    later = before.replacing([assignment("service-299", "2")])
    held.share(later)
    gone = weakref.ref(before), weakref.ref(later)
    del before, later
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert held.resources() == expected


def test_who_has_little_of_what_there_is_is_not_compared_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held, _ = having(*map(assignment, SERVICES[:20]))
    monkeypatch.setattr(ResourceSet, "changed_since", lambda *_: pytest.fail("compared"))
    held.share(ResourceSet.of(map(assignment, SERVICES)))
    assert list(held.resources()) == SERVICES[:20]


def test_who_differs_in_much_is_compared_once_with_each_set(monkeypatch: pytest.MonkeyPatch) -> None:
    held, _ = having(*map(assignment, SERVICES))  # under these names, and other objects
    there = [ResourceSet.of(map(assignment, SERVICES)) for _ in range(2)]
    compared: list[ResourceSet] = []
    monkeypatch.setattr(ResourceSet, "changed_since", lambda of, _: compared.append(of) or tuple(SERVICES))
    for one in (there[0], there[0], there[1], there[1]):
        held.share(one)
    assert [there.index(one) for one in compared] == [0, 1]


def test_streams_in_sync_keep_nothing_for_themselves_however_large_the_mesh_is() -> None:
    talk = running(*mesh())
    assert not any(own(talk).values())
    talk.offer(*mesh(service_7="2", service_9="2"))
    talk.ack_all()
    assert found(talk, Type.ENDPOINT, "service-7") == found(talk, Type.CLUSTER, "service-9") == b"2"
    assert not any(own(talk).values())


def test_a_stream_that_came_with_all_that_there_is_keeps_nothing_for_itself() -> None:
    resources = mesh()
    talk = Conversation()
    talk.offer(*resources)
    for type_ in (Type.CLUSTER, Type.ENDPOINT):
        versions = {found.name: found.version for found in resources if found.type is type_}
        talk.ask(type_, "*", *(SERVICES if type_ is Type.ENDPOINT else ()), initial=versions)
    for type_ in (Type.SECRET, Type.LISTENER, Type.ROUTE, Type.VIRTUAL_HOST):
        talk.ask(type_)
    talk.ack_all()
    assert talk.wait(60) == []
    assert found(talk, Type.CLUSTER, "service-7") == b"1"
    assert not any(own(talk).values())


def test_a_stream_that_refuses_something_keeps_no_more_for_itself_than_that_and_what_it_waits_for() -> None:
    talk = running(*mesh())
    talk.offer(*mesh(), cluster("more", "bad"), assignment("more"))
    talk.nack(Type.CLUSTER, "more: no")
    talk.ack_all()
    for body in "23":
        talk.offer(*mesh(service_7=body), cluster("more", "bad"), assignment("more"))
        talk.ack_all()
    assert found(talk, Type.ENDPOINT, "service-7") == found(talk, Type.CLUSTER, "service-7") == b"3"
    assert found(talk, Type.CLUSTER, "more") is None
    assert own(talk) == {type_: int(type_ in (Type.CLUSTER, Type.ENDPOINT)) for type_ in Type}


def test_what_a_stream_does_not_ask_for_or_refuses_it_has_not_got() -> None:
    talk = running(*mesh())
    talk.ask(Type.ENDPOINT, drop=("service-3",))
    talk.offer(*mesh(service_3="2", service_4="bad"))
    talk.nack(Type.CLUSTER, "service-4: no")
    talk.ack_all()
    assert found(talk, Type.ENDPOINT, "service-3") is None
    assert found(talk, Type.CLUSTER, "service-4") == b"1", "the last good one"
    talk.offer(*mesh(service_3="2", service_4="3", service_5="4"))
    talk.wait(60)
    talk.ack_all()
    has = talk.stream._subscriptions[Type.ENDPOINT].has.resources()
    there = {name: b"1" for name in SERVICES if name != "service-3"}
    bodies = {name: kept.body for name, kept in has.items() if isinstance(kept, Resource)}
    assert bodies == {**there, "service-4": b"3", "service-5": b"4"}
