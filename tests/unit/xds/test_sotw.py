"""The state-of-the-world variant: its messages, against the generated classes, and what a stream says in them."""

from __future__ import annotations

from typing import Any

import pytest
from envoy.service.discovery.v3 import discovery_pb2
from google.rpc import status_pb2

from smc.xds import sotw
from smc.xds.snapshot import Resource, ResourceSet, Type
from smc.xds.stream import ProtocolError, Request, Stream
from smc.xds.subscription import Response
from tests.unit.xds.resources import (
    CLUSTER,
    ENDPOINT,
    LISTENER,
    ROUTE,
    SECRET,
    assignment,
    cluster,
    layered,
    listener,
    resource,
    route,
    secret,
    static,
)


def asking(type_: Type, *names: str, **more: Any) -> Any:
    return discovery_pb2.DiscoveryRequest(type_url=type_.value, resource_names=names, **more)


class TestWhatARequestSays:
    def test_is_how_it_differs_from_the_one_before(self) -> None:
        decoder = sotw.Decoder()
        assert decoder.request(asking(ENDPOINT, "a", "b")) == Request(ENDPOINT, ("a", "b"))
        assert decoder.request(asking(ENDPOINT, "b", "c", response_nonce="1")) == Request(
            ENDPOINT, ("c",), ("a",), nonce="1"
        )
        assert decoder.request(asking(ENDPOINT, "b", "c", response_nonce="2")) == Request(ENDPOINT, nonce="2")
        assert decoder.request(asking(ENDPOINT)) == Request(ENDPOINT, (), ("b", "c"))

    def test_each_type_counts_by_itself(self) -> None:
        decoder = sotw.Decoder()
        decoder.request(asking(ENDPOINT, "a"))
        assert decoder.request(asking(SECRET, "a")) == Request(SECRET, ("a",))

    @pytest.mark.parametrize("type_", [CLUSTER, LISTENER])
    def test_no_names_at_first_and_ever_after_are_all_clusters_or_listeners(self, type_: Type) -> None:
        decoder = sotw.Decoder()
        assert decoder.request(asking(type_)) == Request(type_, ("*",))
        assert decoder.request(asking(type_, response_nonce="1")) == Request(type_, nonce="1")

    @pytest.mark.parametrize("type_", [ENDPOINT, SECRET, ROUTE])
    def test_no_names_of_another_type_are_none(self, type_: Type) -> None:
        assert sotw.Decoder().request(asking(type_)) == Request(type_)

    @pytest.mark.parametrize("name", ["a", "*"])
    def test_once_there_were_names_no_names_are_none(self, name: str) -> None:
        decoder = sotw.Decoder()
        decoder.request(asking(CLUSTER, name))
        assert decoder.request(asking(CLUSTER)) == Request(CLUSTER, (), (name,))

    def test_names_end_the_wildcard(self) -> None:
        decoder = sotw.Decoder()
        decoder.request(asking(CLUSTER))
        assert decoder.request(asking(CLUSTER, "a")) == Request(CLUSTER, ("a",), ("*",))
        assert decoder.request(asking(CLUSTER, "a", "*")) == Request(CLUSTER, ("*",))

    def test_an_error_makes_it_a_nack(self) -> None:
        refused = asking(CLUSTER, response_nonce="7", error_detail=status_pb2.Status(code=3, message="no"))
        assert sotw.Decoder().request(refused).error == "no"
        assert sotw.Decoder().request(asking(CLUSTER, error_detail=status_pb2.Status(code=3))).error is not None

    def test_a_version_at_first_means_that_it_has_what_it_names_nobody_knows_which(self) -> None:
        decoder = sotw.Decoder()
        assert decoder.request(asking(CLUSTER, version_info="v")) == Request(CLUSTER, ("*",), resumed=True)
        assert decoder.request(asking(ROUTE, "a", version_info="v")) == Request(
            ROUTE, ("a",), initial={"a": ""}, resumed=True
        )

    def test_a_later_version_is_that_of_what_it_acks(self) -> None:
        decoder = sotw.Decoder()
        assert not decoder.request(asking(ROUTE, "a")).resumed
        later = decoder.request(asking(ROUTE, "a", "b", version_info="v", response_nonce="1"))
        assert later == Request(ROUTE, ("b",), nonce="1")

    def test_a_type_that_is_not_served_is_an_error_that_says_so(self) -> None:
        message = discovery_pb2.DiscoveryRequest(type_url="type.googleapis.com/envoy.service.runtime.v3.Runtime")
        with pytest.raises(ProtocolError, match=r"runtime\.v3\.Runtime' is not served here"):
            sotw.Decoder().request(message)

    def test_resource_locators_are_an_error(self) -> None:
        message = asking(CLUSTER)
        message.resource_locators.add(name="xdstp://x/y")
        with pytest.raises(ProtocolError, match="locators"):
            sotw.Decoder().request(message)


class TestAMessage:
    def test_is_written_whole(self) -> None:
        given = Response(ROUTE, (route("a", mark="one"), route("b", mark="two")), (), "v", "3")
        message = discovery_pb2.DiscoveryResponse.FromString(sotw.Encoder("replica-1").encode(given, lambda _: ()))
        assert [(r.type_url, r.value) for r in message.resources] == [(ROUTE.value, b"one"), (ROUTE.value, b"two")]
        assert (message.type_url, message.version_info, message.nonce) == (ROUTE.value, "v", "3")
        assert message.control_plane.identifier == "replica-1"

    def test_has_each_resource_encoded_once_and_forgotten_with_it(self) -> None:
        encoder = sotw.Encoder("replica-1")
        given = Response(ENDPOINT, (assignment("a"),), (), "v", "1")
        assert encoder.encode(given, lambda _: ()) == encoder.encode(given, lambda _: ())
        assert len(encoder._encoded) == 1
        del given
        assert len(encoder._encoded) == 0


class Conversation:
    """What the server says is a list of lines: the type, then the body of each resource, which begins with its name."""

    def __init__(self, *types: Type) -> None:
        self.stream = Stream(types or sotw.TYPES)
        self.now = 100.0
        self.asked: dict[Type, tuple[str, ...]] = {}
        self.last: dict[Type, Any] = {}
        self._decoder = sotw.Decoder()
        self._encoder = sotw.Encoder("replica-1")
        self._revision = 0

    def offer(self, *resources: Resource) -> list[str]:
        self._revision += 1
        self.stream.offer(layered(resources), self._revision)
        return self._hear()

    def ask(self, type_: Type, *names: str, nonce: str = "", **more: Any) -> list[str]:
        """Names are all that it asks for."""
        self.asked[type_] = names
        self.stream.receive(self._decoder.request(asking(type_, *names, response_nonce=nonce, **more)), self.now)
        return self._hear()

    def ack(self, *types: Type) -> list[str]:
        return [
            line
            for type_ in types
            for line in self.ask(type_, *self.asked[type_], nonce=self.last[type_].nonce, version_info="accepted")
        ]

    def nack(self, type_: Type, text: str) -> list[str]:
        error = status_pb2.Status(code=13, message=text)
        return self.ask(type_, *self.asked[type_], nonce=self.last[type_].nonce, error_detail=error)

    def wait(self, seconds: float) -> list[str]:
        self.now += seconds
        return self._hear()

    def _hear(self) -> list[str]:
        lines = []
        for response in self.stream.to_send(self.now):
            message = discovery_pb2.DiscoveryResponse.FromString(self._encoder.encode(response, self.stream.whole))
            self.last[response.type] = message
            lines.append(" ".join((response.type.name, *(_said(found.value) for found in message.resources))))
        return lines


def _said(body: bytes) -> str:
    return f"{body[2:].decode()}=empty" if body.startswith(b"\n") else body.decode()


SHOP = (
    cluster("a", "a1", secrets=("identity",)),
    assignment("a", "a1"),
    secret("identity", "identity1"),
    listener("out", "out1"),
    route("out", "a", mark="out1"),
)


def but(*changed: Resource) -> tuple[Resource, ...]:
    return tuple({(r.type, r.name): r for r in (*SHOP, *changed)}.values())


def without(*gone: Resource) -> tuple[Resource, ...]:
    return tuple(r for r in SHOP if r not in gone)


def running(*resources: Resource) -> Conversation:
    """An Envoy that has all of `resources`, and whose server has nothing more to say."""
    talk = Conversation()
    talk.offer(*resources)
    for type_ in sotw.TYPES:
        names = sorted(found.name for found in resources if found.type is type_)
        said = talk.ask(type_, *(() if type_ in (CLUSTER, LISTENER) else names))
        while said:
            said = talk.ack(type_)
    assert talk.wait(60) == []
    return talk


class TestClustersAndListeners:
    def test_each_response_has_all_of_them(self) -> None:
        talk = running(*but(static("b", "b1"), listener("in", "in1", routes=())))
        assert talk.offer(*but(static("b", "b2"), listener("in", "in2", routes=()))) == ["CLUSTER a1 b2"]
        assert talk.ack(CLUSTER) == ["LISTENER in2 out1"]

    def test_what_is_removed_is_left_out_once_nothing_points_to_it(self) -> None:
        talk = running(*but(static("old", "old1"), route("out", "old", mark="out1")))
        moved = but(static("new", "new1"), route("out", "new", mark="out2"))
        assert talk.offer(*moved) == ["CLUSTER a1 new1 old1"], "the union of both"
        assert talk.ack(CLUSTER) == ["ROUTE out2:new"]
        assert talk.wait(60) == []
        assert talk.ack(ROUTE) == ["CLUSTER a1 new1"]
        assert talk.ack(CLUSTER) == []
        assert talk.stream.acked == 2

    def test_a_listener_is_left_out_before_the_cluster_behind_it(self) -> None:
        talk = running(*SHOP)
        assert talk.offer() == ["LISTENER", "ROUTE out=empty"]
        assert talk.ack(LISTENER) == []
        assert talk.ack(ROUTE) == ["CLUSTER"]

    def test_the_version_is_that_of_what_is_in_the_response(self) -> None:
        talk = running(static("old", "old1"))
        talk.offer(static("new", "new1"))
        union = ResourceSet.of([static("old", "old1"), static("new", "new1")]).version
        assert talk.last[CLUSTER].version_info == union
        talk.ack(CLUSTER)
        assert talk.last[CLUSTER].version_info == ResourceSet.of([static("new", "new1")]).version

    def test_of_what_is_refused_the_last_good_one_stays_in_it(self) -> None:
        talk = running(static("a", "a1"), static("b", "b1"))
        assert talk.offer(static("a", "a2"), static("b", "b1"), static("c", "c1")) == ["CLUSTER a2 b1 c1"]
        assert talk.nack(CLUSTER, "a: no, c: no") == []
        assert talk.offer(static("a", "a2"), static("b", "b2"), static("c", "c1")) == ["CLUSTER a1 b2"]
        assert [refusal.names for refusal in talk.stream.refusals] == [("a", "c")]
        talk.ack(CLUSTER)
        assert talk.offer(static("a", "a3"), static("b", "b2"), static("c", "c1")) == ["CLUSTER a3 b2"]
        assert talk.ack(CLUSTER) == []

    def test_who_asks_for_some_by_name_gets_all_of_those(self) -> None:
        talk = Conversation()
        talk.offer(static("a", "a1"), static("b", "b1"), static("c", "c1"))
        assert talk.ask(CLUSTER, "a", "none") == ["CLUSTER a1"]
        talk.ack(CLUSTER)
        assert talk.ask(CLUSTER, "a", "b", nonce="1") == ["CLUSTER a1 b1"]
        talk.ack(CLUSTER)
        assert talk.ask(CLUSTER, "b", nonce="2") == []
        assert talk.offer(static("a", "a2"), static("b", "b2"), static("c", "c2")) == ["CLUSTER b2"]

    def test_who_asks_for_listeners_before_clusters_is_not_kept_waiting(self) -> None:
        """As clients without a proxy do."""
        talk = Conversation()
        talk.offer(*SHOP)
        assert talk.ask(LISTENER, "out") == ["LISTENER out1"]
        talk.ack(LISTENER)
        assert talk.ask(ROUTE, "out") == ["ROUTE out1:a"]
        talk.ack(ROUTE)
        assert talk.ask(CLUSTER, "a") == ["CLUSTER a1"]
        assert talk.ask(ENDPOINT, "a") == ["ENDPOINT a1"]


class TestOtherTypes:
    def test_only_what_changed_is_sent(self) -> None:
        talk = running(*but(cluster("b", "b1"), assignment("b", "b1")))
        assert talk.offer(*but(cluster("b", "b1"), assignment("b", "b2"))) == ["ENDPOINT b2"]

    def test_only_what_is_newly_asked_for_is_answered(self) -> None:
        talk = running(*but(cluster("b", "b1"), assignment("b", "b1")))
        assert talk.offer(*but(cluster("b", "b1"), assignment("b", "b1"), assignment("c", "c1"))) == []
        assert talk.ask(ENDPOINT, "a", "b", "c", nonce="1") == ["ENDPOINT c1"]

    def test_an_assignment_that_does_not_exist_is_one_without_endpoints(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(ENDPOINT, "a", "later", nonce="1") == ["ENDPOINT later=empty"]
        talk.ack(ENDPOINT)
        assert talk.offer(*but(assignment("later", "later1"))) == ["ENDPOINT later1"]

    def test_a_secret_that_does_not_exist_is_left_out_and_sent_when_it_exists(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(SECRET, "identity", "later", nonce="1") == ["SECRET"]
        assert talk.ack(SECRET) == []
        assert talk.offer(*but(secret("later", "later1"))) == ["SECRET later1"]

    def test_a_route_that_ceases_to_exist_is_emptied(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*without(SHOP[4])) == ["ROUTE out=empty"]

    def test_a_changed_cluster_without_its_assignment_warms_for_15_seconds(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*but(cluster("a", "a2", secrets=("identity",)))) == ["CLUSTER a2", "ENDPOINT a1"]

    def test_also_when_that_is_gone(self) -> None:
        talk = running(*SHOP)
        changed = (cluster("a", "a2", secrets=("identity",)), *without(SHOP[0], SHOP[1]))
        assert talk.offer(*changed) == ["CLUSTER a2", "ENDPOINT a=empty"]

    def test_the_others_of_the_set_have_not_changed_and_are_not_sent_again(self) -> None:
        talk = running(*but(cluster("b", "b1"), assignment("b", "b1")))
        changed = but(cluster("b", "b2"), assignment("b", "b1"))
        assert talk.offer(*changed) == ["CLUSTER a1 b2", "ENDPOINT b1"]

    def test_an_old_nonce_acks_nothing_but_its_names_count(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*but(assignment("a", "a2"), assignment("b", "b1"))) == ["ENDPOINT a2"]
        old = str(int(talk.last[ENDPOINT].nonce) - 1)
        assert talk.ask(ENDPOINT, "a", "b", nonce=old) == []
        assert talk.stream.acked == 1
        assert talk.ack(ENDPOINT) == ["ENDPOINT b1"]

    def test_a_request_that_changes_nothing_is_not_answered(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(ENDPOINT, "a", nonce=talk.last[ENDPOINT].nonce) == []

    def test_what_is_refused_is_not_sent_again(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(route("out", "a", mark="out2")))
        assert talk.nack(ROUTE, "out: no") == []
        assert talk.ack(ROUTE) == []
        assert talk.offer(*but(route("out", "a", mark="out2"), static("b", "b1"))) == ["CLUSTER a1 b1"]
        assert talk.ack(CLUSTER) == []


class TestComingBack:
    def back(self, talk: Conversation) -> list[str]:
        """An Envoy that has resources of each type from another stream asks for all at once."""
        said = []
        for type_, names in (
            (CLUSTER, ()),
            (ENDPOINT, ("a",)),
            (SECRET, ("identity",)),
            (LISTENER, ()),
            (ROUTE, ("out",)),
        ):
            said += talk.ask(type_, *names, version_info="before")
        return said

    def test_everything_is_sent_and_what_moves_traffic_follows_what_it_is_moved_to(self) -> None:
        talk = Conversation()
        talk.offer(*SHOP)
        assert self.back(talk) == ["CLUSTER a1", "ENDPOINT a1", "SECRET identity1"]
        assert talk.ack(ENDPOINT, SECRET) == []
        assert talk.ack(CLUSTER) == ["LISTENER out1", "ROUTE out1:a"]
        assert talk.ack(LISTENER, ROUTE) == []
        assert talk.stream.acked == 1

    def test_a_missing_route_is_emptied(self) -> None:
        talk = Conversation()
        self.back(talk)
        talk.offer(*without(SHOP[4]))
        assert talk.ack(CLUSTER, ENDPOINT, SECRET) == ["LISTENER out1"]
        assert talk.ack(LISTENER) == ["ROUTE out=empty"]

    def test_what_it_refuses_again_is_left_out_once_it_is_removed(self) -> None:
        """The Envoy has the last good one still, and nobody here knows."""
        talk = Conversation()
        talk.offer(static("a", "a1"), static("b", "b2"))
        assert talk.ask(CLUSTER, version_info="before") == ["CLUSTER a1 b2"]
        assert talk.nack(CLUSTER, "b: no") == []
        assert talk.wait(3) == []
        assert talk.offer(static("a", "a1")) == ["CLUSTER a1"]
        talk.ack(CLUSTER)
        assert talk.stream.acked == 2


def test_a_stream_of_one_type_waits_for_no_other() -> None:
    talk = Conversation(CLUSTER)
    talk.offer(*but(static("old", "old1")))
    assert talk.ask(CLUSTER) == ["CLUSTER a1 old1"]
    assert talk.ack(CLUSTER) == []
    assert talk.stream.acked == 1, "although it never asks for endpoints here"
    assert talk.offer(*SHOP) == ["CLUSTER a1"]


def test_a_type_that_a_stream_does_not_carry_is_refused() -> None:
    talk = Conversation(CLUSTER)
    with pytest.raises(ProtocolError, match="a stream of CLUSTER is asked for a ROUTE"):
        talk.ask(ROUTE, "out")


def test_a_stream_of_listeners_alone_says_that_they_are_acked_and_others_never() -> None:
    for type_ in sotw.TYPES:
        talk = Conversation(type_)
        talk.offer(*SHOP)
        talk.ask(
            type_, *(() if type_ in (CLUSTER, LISTENER) else (found.name for found in SHOP if found.type is type_))
        )
        assert not talk.stream.listening
        talk.ack(type_)
        assert talk.stream.acked == 1
        assert talk.stream.listening is (type_ is LISTENER)


def test_resources_of_another_type_do_not_get_in_each_others_way() -> None:
    talk = running(resource(SECRET, "a", "a1"), static("a", "a2"))
    assert talk.offer(resource(SECRET, "a", "a3"), static("a", "a2")) == ["SECRET a3"]
