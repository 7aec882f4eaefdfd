"""One stream, rule by rule; what Envoy was seen to trip over is a class of its own."""

from __future__ import annotations

import pytest

from smc.xds import stream as limits
from smc.xds.snapshot import Resource, Source, Type
from smc.xds.stream import WILDCARDS, ProtocolError, Request, Stream
from smc.xds.subscription import LONGEST_TEXT
from tests.unit.xds.conversation import Conversation, running
from tests.unit.xds.resources import (
    CLUSTER,
    ENDPOINT,
    LISTENER,
    ROUTE,
    SECRET,
    VIRTUAL_HOST,
    assignment,
    cluster,
    listener,
    resource,
    route,
    secret,
    source,
    static,
)

SHOP = (
    cluster("a", secrets=("identity",)),
    assignment("a"),
    secret("identity"),
    listener("outbound"),
    route("outbound", "a"),
)
"""One of each."""


def but(*changed: Resource) -> tuple[Resource, ...]:
    """SHOP with these instead of, or besides, its own."""
    mine = {(r.type, r.name): r for r in (*SHOP, *changed)}
    return tuple(mine.values())


def without(*gone: Resource) -> tuple[Resource, ...]:
    names = {(r.type, r.name) for r in gone}
    return tuple(r for r in SHOP if (r.type, r.name) not in names)


class TestWhatAClientAsksFor:
    def test_nothing_is_sent_before_the_first_offer(self) -> None:
        talk = Conversation()
        assert talk.ask(CLUSTER) == []
        assert talk.ask(ENDPOINT, "a") == []
        assert not talk.stream.started
        assert talk.offer(*SHOP) == ["CLUSTER a=1", "ENDPOINT a=1"]
        assert talk.stream.started

    @pytest.mark.parametrize("type_", [CLUSTER, LISTENER])
    def test_a_first_request_without_names_asks_for_all_clusters_or_listeners(self, type_) -> None:
        talk = Conversation()
        talk.offer(resource(type_, "x"), resource(type_, "y"))
        assert talk.ask(type_) == [f"{type_.name} x=1 y=1"]

    @pytest.mark.parametrize("type_", [CLUSTER, LISTENER])
    def test_a_star_asks_for_all(self, type_) -> None:
        talk = Conversation()
        talk.offer(resource(type_, "x"), resource(type_, "y"))
        assert talk.ask(type_, "*") == [f"{type_.name} x=1 y=1"]

    @pytest.mark.parametrize("type_", [CLUSTER, LISTENER])
    def test_a_star_is_answered_although_there_is_nothing_whatever_was_asked_for_before(self, type_) -> None:
        talk = Conversation()
        talk.offer()
        for request in (Request(type_, ("x",)), Request(type_, unsubscribe=("x",))):
            talk.stream.receive(request, 0.0)
        assert talk.stream.to_send(0.0) == ()
        assert talk.ask(type_, "*") == [type_.name]

    @pytest.mark.parametrize("type_", [ENDPOINT, SECRET, ROUTE])
    def test_a_first_request_without_names_asks_for_nothing_of_another_type(self, type_) -> None:
        talk = Conversation()
        talk.offer(resource(type_, "x"))
        assert talk.ask(type_) == []

    def test_a_later_request_without_names_asks_for_nothing(self) -> None:
        talk = Conversation()
        talk.offer(cluster("x"), cluster("y"))
        assert talk.ask(CLUSTER, "x") == ["CLUSTER x=1"]
        talk.ack(CLUSTER)
        assert talk.ask(CLUSTER) == []
        assert talk.offer(cluster("x"), cluster("y", "2")) == []

    def test_giving_up_the_star_leaves_what_was_asked_for_by_name(self) -> None:
        talk = Conversation()
        talk.offer(static("x"), static("y"))
        talk.ask(CLUSTER, "*", "x")
        talk.ack(CLUSTER)
        assert talk.ask(CLUSTER, drop=("*",)) == []
        assert talk.offer(static("x", "2"), static("y", "2")) == ["CLUSTER x=2"]

    def test_a_legacy_wildcard_is_given_up_by_a_star_too(self) -> None:
        talk = running(static("x"))
        talk.ask(CLUSTER, drop=("*",))
        assert talk.offer(static("x", "2")) == []
        assert talk.ask(CLUSTER, "*") == ["CLUSTER x=2"]

    def test_a_name_given_up_under_the_wildcard_is_answered_with_what_the_wildcard_makes_of_it(self) -> None:
        talk = Conversation()
        talk.offer(static("x"))
        talk.ask(CLUSTER, "*", "x", "gone")
        talk.ack(CLUSTER)
        assert talk.ask(CLUSTER, drop=("x", "gone")) == ["CLUSTER x=1 -gone"]

    def test_a_name_is_answered_even_if_the_client_has_it(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(ENDPOINT, "a") == ["ENDPOINT a=1"]

    def test_a_name_that_was_given_up_is_forgotten(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(ENDPOINT, drop=("a",)) == []
        assert talk.offer(*but(assignment("a", "2"))) == []
        assert talk.ask(ENDPOINT, "a") == ["ENDPOINT a=2"]

    def test_what_was_in_flight_when_it_was_given_up_is_not_taken_as_had(self) -> None:
        talk = Conversation()
        talk.offer(static("x"))
        assert talk.ask(CLUSTER, "*") == ["CLUSTER x=1"]
        talk.ask(CLUSTER, drop=("*",))
        talk.ack(CLUSTER)
        assert talk.ask(CLUSTER, "*") == ["CLUSTER x=1"]

    def test_a_request_with_neither_nonce_nor_names_changes_nothing(self) -> None:
        talk = running(*SHOP)
        assert [line for type_ in (CLUSTER, ENDPOINT, SECRET, LISTENER, ROUTE) for line in talk.ask(type_)] == []

    @pytest.mark.parametrize("type_", [CLUSTER, LISTENER])
    def test_a_wildcard_with_nothing_to_send_gets_exactly_one_empty_response(self, type_) -> None:
        talk = Conversation()
        talk.offer()
        assert talk.ask(type_) == [type_.name]
        assert talk.ack(type_) == []
        assert talk.offer() == []
        assert talk.ask(type_, drop=("*",)) == talk.ask(type_, "*") == []

    def test_names_beyond_any_measure_are_an_error_and_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "MOST_NAMES", 3)
        talk = Conversation()
        talk.offer(*SHOP)
        with pytest.raises(ProtocolError, match="more than 3 ENDPOINT names"):
            talk.ask(ENDPOINT, "a", "b", "c", "d")
        with pytest.raises(ProtocolError, match="more than 3 CLUSTER names"):
            talk.ask(CLUSTER, initial={str(n): "1" for n in range(4)})
        with pytest.raises(ProtocolError, match="longer than"):
            talk.ask(ENDPOINT, "a" * 257)
        with pytest.raises(ProtocolError, match="empty"):
            talk.ask(ENDPOINT, "")
        assert talk.hear() == []
        assert talk.ask(ENDPOINT, "a", "b", "c") == ["ENDPOINT a=1 -b -c"]

    def test_a_refusals_text_is_kept_in_part(self) -> None:
        talk = Conversation()
        talk.offer(*(static(f"c{n}") for n in range(4)))
        talk.ask(CLUSTER, "*")
        for _ in range(8):  # it blames nobody, so each is tried by itself
            talk.nack(CLUSTER, "x" * 1_000_000)
        texts = {refused.nack.text for refused in talk.stream._subscriptions[CLUSTER].refused.values()}
        assert len(talk.stream.refusals) == 4
        assert {len(text) for text in texts} == {LONGEST_TEXT}

    def test_nonces_count_by_type(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2")))
        assert talk.last(ENDPOINT).nonce == "2"
        assert talk.last(CLUSTER).nonce == "1"

    def test_a_response_says_the_version_of_the_whole_set(self) -> None:
        talk = running(*SHOP)
        before = talk.stream.versions
        talk.offer(*but(assignment("a", "2")))
        told = talk.last(ENDPOINT).version
        assert told != before[ENDPOINT] == talk.stream.versions[ENDPOINT]
        talk.ack(ENDPOINT)
        assert talk.stream.versions[ENDPOINT] == told
        assert talk.stream.versions[CLUSTER] == before[CLUSTER]


class TestWhatDoesNotExist:
    @pytest.mark.parametrize("type_", [ENDPOINT, SECRET])
    def test_an_assignment_or_secret_is_answered_as_removed_at_once_and_sent_when_it_exists(self, type_) -> None:
        talk = running(*SHOP)
        assert talk.ask(type_, "later") == [f"{type_.name} -later"]
        assert talk.ack(type_) == []
        assert talk.offer(*but(resource(type_, "later"))) == [f"{type_.name} later=1"]

    def test_a_cluster_or_listener_asked_for_by_name_is_answered_as_removed(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(CLUSTER, "none") == ["CLUSTER -none"]
        assert talk.ask(LISTENER, "none") == ["LISTENER -none"]

    def test_a_route_is_answered_empty_and_sent_when_it_exists(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(ROUTE, "later") == ["ROUTE later=empty"]
        talk.ack(ROUTE)
        assert talk.offer(*but(route("later", "a"))) == ["ROUTE later=to:a"]

    def test_a_route_that_ceases_to_exist_is_emptied(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*without(route("outbound"))) == ["ROUTE outbound=empty"]
        talk.ack(ROUTE)
        assert talk.stream.acked == 2

    def test_an_assignment_that_ceases_to_exist_is_told_as_removed_once(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*without(assignment("a"))) == ["ENDPOINT -a"]
        assert talk.ack(ENDPOINT) == []
        assert talk.offer(*without(assignment("a"), secret())) == ["SECRET -identity"]


class TestMakeBeforeBreak:
    def test_a_pure_endpoint_change_is_sent_at_once_and_alone(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*but(assignment("a", "2"))) == ["ENDPOINT a=2"]
        assert talk.stream.acked == 1
        assert talk.ack(ENDPOINT) == []
        assert talk.stream.acked == 2

    def test_a_route_waits_until_its_new_cluster_has_been_asked_for_and_has_endpoints(self) -> None:
        talk = running(*SHOP)
        grown = but(cluster("b"), assignment("b"), route("outbound", "a", "b"))
        assert talk.offer(*grown) == ["CLUSTER b=1"]
        assert talk.ack(CLUSTER) == []
        assert talk.ask(ENDPOINT, "b") == ["ENDPOINT b=1"]
        assert talk.ack(ENDPOINT) == ["ROUTE outbound=to:a:b"]
        assert talk.stream.acked == 1
        talk.ack(ROUTE)
        assert talk.stream.acked == 2

    def test_the_endpoints_are_answered_although_the_cluster_is_not_acked(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(cluster("b"), assignment("b"), route("outbound", "b")))
        assert talk.ask(ENDPOINT, "b") == ["ENDPOINT b=1"]
        assert talk.ack(ENDPOINT) == []
        assert talk.ack(CLUSTER) == ["ROUTE outbound=to:b"]

    def test_a_first_secret_is_waited_for_like_endpoints(self) -> None:
        talk = running(static("plain"), listener("outbound"), route("outbound", "plain"))
        secured = resource(CLUSTER, "tls", warms=((SECRET, "identity"),))
        talk.offer(static("plain"), secured, secret(), listener("outbound"), route("outbound", "tls"))
        assert talk.ack(CLUSTER) == []
        assert talk.ask(SECRET, "identity") == ["SECRET identity=1"]
        assert talk.ack(SECRET) == ["ROUTE outbound=to:tls"]

    def test_a_client_that_never_asks_for_the_endpoints_holds_the_rest_up_for_three_seconds(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(cluster("b"), assignment("b"), route("outbound", "b")))
        talk.now += 2
        assert talk.ack(CLUSTER) == []
        assert talk.stream.deadline == talk.now + 3
        assert talk.wait(2.9) == []
        assert talk.wait(0.1) == ["ROUTE outbound=to:b"]

    def test_patience_does_not_run_before_the_cluster_is_acked(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(cluster("b"), assignment("b"), route("outbound", "b")))
        assert talk.wait(15) == []
        assert talk.ack(CLUSTER) == []
        assert talk.wait(3) == ["ROUTE outbound=to:b"]

    def test_a_changed_secret_goes_with_the_clusters_and_before_the_routes(self) -> None:
        talk = running(*SHOP)
        changed = but(static("b"), secret("identity", "2"), route("outbound", "b"))
        assert talk.offer(*changed) == ["CLUSTER b=1", "SECRET identity=2"]
        assert talk.ack(CLUSTER) == []
        assert talk.ack(SECRET) == ["ROUTE outbound=to:b"]

    def test_removals_wait_until_the_routes_are_acked(self) -> None:
        talk = running(*but(static("old"), route("outbound", "old")))
        assert talk.offer(*SHOP) == ["ROUTE outbound=to:a"]
        assert talk.wait(19) == []
        assert talk.ack(ROUTE) == ["CLUSTER -old"]
        talk.ack(CLUSTER)
        assert talk.stream.acked == 2

    def test_a_removal_waits_for_the_route_of_a_changed_listener(self) -> None:
        talk = running(*but(static("old"), route("outbound", "old")))
        moved = (*without(listener("outbound"), route("outbound")), listener("outbound", "2", routes=("new",)))
        assert talk.offer(*moved, route("new", "a")) == ["LISTENER outbound=2"]
        assert talk.ack(LISTENER) == []
        assert talk.ask(ROUTE, "new", drop=("outbound",)) == ["ROUTE new=to:a"]
        assert talk.ack(ROUTE) == ["CLUSTER -old"]

    def test_listeners_go_before_the_clusters_behind_them_and_these_before_their_endpoints(self) -> None:
        talk = running(*SHOP)
        assert talk.offer() == ["LISTENER -outbound", "ROUTE outbound=empty"]
        assert talk.ack(LISTENER) == []
        assert talk.ack(ROUTE) == ["CLUSTER -a"]
        assert talk.ack(CLUSTER) == ["ENDPOINT -a", "SECRET -identity"]

    def test_endpoints_that_went_with_their_cluster_need_no_word(self) -> None:
        talk = running(*but(cluster("b"), assignment("b")))
        assert talk.offer(*SHOP) == ["CLUSTER -b"]
        talk.ask(ENDPOINT, drop=("b",))
        assert talk.ack(CLUSTER) == []
        assert talk.stream.acked == 2

    def test_a_target_is_finished_before_the_next_and_only_the_newest_is_next(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*but(assignment("a", "2"))) == ["ENDPOINT a=2"]
        assert talk.offer(*but(assignment("a", "3"))) == []
        assert talk.offer(*but(assignment("a", "4"))) == []
        assert (talk.stream.target, talk.stream.acked) == (4, 1)
        assert talk.ack(ENDPOINT) == ["ENDPOINT a=4"]
        assert (talk.stream.target, talk.stream.acked) == (4, 2)
        talk.ack(ENDPOINT)
        assert (talk.stream.target, talk.stream.acked) == (4, 4)

    def test_an_offer_that_changes_nothing_is_acked_by_itself(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*SHOP) == []
        assert talk.stream.acked == 2

    def test_what_is_asked_for_anew_is_answered_at_once_in_any_step(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(cluster("a", "2"), secret("bundle"), route("outbound", "a", mark="new"), route("more", "a")))
        assert talk.ask(SECRET, "bundle") == ["SECRET bundle=1"]
        assert talk.ask(ROUTE, "more") == ["ROUTE more=to:a"]

    def test_asking_again_does_not_move_a_route_before_its_cluster(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(static("b"), route("outbound", "b")))
        assert talk.ask(ROUTE, "outbound") == []
        assert talk.ack(CLUSTER) == ["ROUTE outbound=to:b"]

    def test_one_response_of_a_type_is_in_flight(self) -> None:
        talk = Conversation()
        talk.offer(*SHOP)
        assert talk.ask(SECRET, "identity") == ["SECRET identity=1"]
        assert talk.ask(SECRET, "x") == talk.ask(SECRET, "y") == []
        assert talk.ack(SECRET) == ["SECRET -x -y"]


class TestAClientThatDoesNotAnswer:
    def test_is_stalled_after_twenty_seconds_and_until_it_answers(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2")))
        assert talk.stream.deadline == talk.now + 20
        talk.wait(19.9)
        assert not talk.stream.stalled
        talk.wait(0.1)
        assert talk.stream.stalled
        assert talk.stream.deadline is None
        talk.ack(ENDPOINT)
        assert not talk.stream.stalled

    def test_gets_no_removal_however_long_it_takes(self) -> None:
        talk = running(*but(static("old"), route("outbound", "old")))
        talk.offer(*SHOP)
        assert talk.wait(20) == talk.wait(3600) == []
        assert talk.offer(*SHOP) == []
        assert talk.ack(ROUTE) == ["CLUSTER -old"]

    def test_is_in_no_hurry_while_nothing_is_in_flight(self) -> None:
        talk = running(*SHOP)
        assert talk.stream.deadline is None
        assert not talk.stream.stalled

    @pytest.mark.parametrize("nonce", ["1", "17", "x"])
    def test_a_late_nonce_is_no_ack_but_what_it_asks_for_counts(self, nonce: str) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2")))
        assert talk.ask(ENDPOINT, "b", nonce=nonce) == []
        assert talk.stream.acked == 1
        assert talk.ack(ENDPOINT) == ["ENDPOINT -b"]

    def test_a_late_nack_refuses_nothing(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2")))
        talk.stream.receive(Request(ENDPOINT, nonce="1", error="too late"), talk.now)
        assert talk.stream.refusals == ()
        talk.ack(ENDPOINT)
        assert talk.stream.acked == 2


class TestRefusal:
    def test_the_rest_proceeds_and_the_last_good_one_stays(self) -> None:
        talk = running(*SHOP)
        changed = but(cluster("a", "2"), cluster("bad"), static("good"), route("outbound", "good"))
        assert talk.offer(*changed) == ["CLUSTER a=2 bad=1 good=1", "ENDPOINT a=1"]
        talk.ack(ENDPOINT)
        assert talk.nack(CLUSTER, "Error adding/updating cluster(s) bad: no such thing") == ["ROUTE outbound=to:good"]
        talk.ack(ROUTE)
        assert talk.stream.acked == 2
        (refusal,) = talk.stream.refusals
        assert (refusal.type, refusal.names, refusal.revision) == (CLUSTER, ("bad",), 2)
        assert refusal.text == "Error adding/updating cluster(s) bad: no such thing"

    def test_what_was_refused_is_not_sent_again_until_it_changes(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(listener("outbound", "2")))
        talk.nack(LISTENER, "address in use")
        assert talk.offer(*but(listener("outbound", "2"), assignment("a", "2"))) == ["ENDPOINT a=2"]
        talk.ack(ENDPOINT)
        assert talk.stream.refusals
        assert talk.offer(*but(listener("outbound", "3"), assignment("a", "2"))) == ["LISTENER outbound=3"]
        talk.ack(LISTENER)
        assert talk.stream.refusals == ()

    def test_it_ends_when_the_target_goes_back_to_what_the_client_has(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(listener("outbound", "2")))
        talk.nack(LISTENER, "address in use")
        assert talk.offer(*SHOP) == []
        assert talk.stream.refusals == ()

    def test_it_ends_when_nobody_wants_it_any_more(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2")))
        talk.nack(ENDPOINT, "malformed")
        assert talk.stream.refusals
        talk.ask(ENDPOINT, drop=("a",))
        assert talk.stream.refusals == ()

    def test_a_name_that_was_refused_and_ceases_to_exist_is_told_as_removed_so_that_nothing_waits_for_it(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("b")))
        talk.ask(ENDPOINT, "b")
        talk.nack(ENDPOINT, "malformed")
        assert talk.offer(*SHOP) == ["ENDPOINT -b"]

    def test_who_asks_again_for_what_it_refused_gets_the_last_good_one(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2")))
        talk.nack(ENDPOINT, "malformed")
        assert talk.ask(ENDPOINT, "a") == ["ENDPOINT a=1"]
        talk.ack(ENDPOINT)
        assert talk.stream.refusals

    def test_who_asks_again_for_what_it_refused_and_never_had_gets_nothing(self) -> None:
        talk = running(*SHOP)
        talk.ask(ENDPOINT, "b")
        talk.ack(ENDPOINT)
        talk.offer(*but(assignment("b")))
        talk.nack(ENDPOINT, "malformed")
        assert talk.ask(ENDPOINT, "b") == []

    def test_the_last_good_route_keeps_the_clusters_that_it_may_point_to(self) -> None:
        talk = running(*but(static("old"), route("outbound", "old")))
        talk.offer(*SHOP)
        assert talk.nack(ROUTE, "program too large") == []
        assert talk.stream.acked == 2
        assert talk.offer(*but(route("outbound", "a", mark="fixed"))) == ["ROUTE outbound=fixed:a"]
        assert talk.ack(ROUTE) == ["CLUSTER -old"]

    def test_several_in_one_text_are_one_refusal(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(static("b"), static("c"), static("d")))
        talk.nack(CLUSTER, "Error adding/updating cluster(s) d: too long, b: too short")
        (refusal,) = talk.stream.refusals
        assert refusal.names == ("b", "d")

    def test_a_name_within_another_name_is_not_blamed(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(static("shop/x|80"), static("shop/x|8080"), static("my-shop/x|8080")))
        talk.nack(CLUSTER, "Error adding/updating cluster(s) shop/x|8080: no")
        assert talk.stream.refusals[0].names == ("shop/x|8080",)

    def test_of_thousands_of_names_each_that_is_not_blamed_is_looked_at_once(self) -> None:
        class Counted(str):
            __slots__ = ()
            compared = 0
            __hash__ = str.__hash__

            def __eq__(self, other: object) -> bool:
                Counted.compared += 1
                return str.__eq__(self, other)

        many = [static(Counted(f"c{number}")) for number in range(2_000)]
        talk = Conversation()
        talk.ask(CLUSTER)
        talk.offer(*many)
        Counted.compared = 0
        talk.nack(CLUSTER, "c7: bad")
        assert Counted.compared < 20 * len(many)
        (refusal,) = talk.stream.refusals
        assert refusal.names == ("c7",)
        assert len(talk.stream.whole(CLUSTER)) == len(many) - 1

    def test_a_name_that_is_only_mentioned_in_the_reason_of_another_is_not_blamed(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(listener("outbound", "2"), listener("inbound", routes=())))
        talk.nack(LISTENER, "Error adding/updating listener(s) inbound: has the address of outbound")
        assert talk.stream.refusals[0].names == ("inbound",)

    def test_a_text_without_names_is_resolved_by_trying_the_halves(self) -> None:
        eight = [assignment(f"e{n}") for n in range(8)]
        talk = running(*SHOP, *eight)
        worse = [assignment(f"e{n}", "2") for n in range(8)]
        assert talk.offer(*SHOP, *worse) == ["ENDPOINT e0=2 e1=2 e2=2 e3=2 e4=2 e5=2 e6=2 e7=2"]
        tried = 0
        while talk.unanswered():
            tried += 1
            bad = any(found.name == "e5" for found in talk.last(ENDPOINT).resources)
            talk.nack(ENDPOINT, "malformed IP address") if bad else talk.ack(ENDPOINT)
        assert talk.stream.refusals[0].names == ("e5",)
        assert tried == 7
        assert talk.stream.acked == 2
        assert talk.offer(*SHOP, *worse[:5], assignment("e5", "3"), *worse[6:]) == ["ENDPOINT e5=3"]

    def test_of_routes_what_is_not_blamed_is_sent_again_because_envoy_may_have_dropped_it(self) -> None:
        talk = running(*but(route("inbound|80", "a")))
        talk.offer(*but(route("inbound|80", "a", mark="x"), route("outbound", "a", mark="y")))
        assert talk.nack(ROUTE, "duplicate domain in route outbound") == ["ROUTE inbound|80=x:a"]
        talk.ack(ROUTE)
        assert talk.stream.acked == 2
        assert talk.stream.refusals[0].names == ("outbound",)

    def test_a_client_that_refuses_everything_is_told_each_thing_a_few_times_only(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER)
        talk.offer(*(static(f"c{n}") for n in range(16)))
        told = 0
        while talk.unanswered():
            told += len(talk.last(CLUSTER).resources)
            talk.nack(CLUSTER, "no")
        assert told == 16 * 5
        assert len({name for refusal in talk.stream.refusals for name in refusal.names}) == 16
        assert talk.wait(60) == []

    def test_the_empty_response_may_be_refused_too(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER)
        assert talk.offer() == ["CLUSTER"]
        assert talk.nack(CLUSTER, "why?") == []
        assert talk.offer(static("a")) == ["CLUSTER a=1"]

    def test_a_removal_may_be_refused(self) -> None:
        talk = running(*but(static("b")))
        assert talk.offer(*SHOP) == ["CLUSTER -b"]
        assert talk.nack(CLUSTER, "no") == []
        assert talk.stream.acked == 2
        assert talk.stream.refusals[0].names == ("b",)
        assert talk.offer(*but(static("b", "2"))) == ["CLUSTER b=2"]
        talk.ack(CLUSTER)
        assert talk.stream.refusals == ()

    def test_the_text_is_bounded(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2")))
        talk.nack(ENDPOINT, "x" * 100_000)
        assert talk.stream.refusals[0].text == "x" * 4_096

    def test_a_refused_cluster_is_not_waited_for(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(cluster("b"), assignment("b"), static("c"), route("outbound", "c")))
        assert talk.nack(CLUSTER, "cluster b: no") == ["ROUTE outbound=to:c"]

    def test_suspects_are_the_sources_that_changed_since_the_last_ack_newest_first(self) -> None:
        old, stays, newer, newest = source("x", 3), source("y", 4), source("x", 7), source("z", 9)
        talk = running(*but(route("outbound", "a", sources=(old, stays))))
        talk.offer(*but(route("outbound", "a", mark="new", sources=(newer, stays, newest))))
        talk.nack(ROUTE, "no")
        assert talk.stream.refusals[0].suspects == (newest, newer)

    def test_what_the_client_never_had_makes_all_its_sources_suspects(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("b", "1", source("x", 3), source("y", 4))))
        talk.ask(ENDPOINT, "b")
        talk.nack(ENDPOINT, "no")
        assert talk.stream.refusals[0].suspects == (source("y", 4), source("x", 3))

    def test_suspects_follow_the_manifests_that_made_the_same_bytes(self) -> None:
        talk = running(*SHOP)
        talk.offer(*but(assignment("a", "2", source("x", 3))))
        talk.nack(ENDPOINT, "no")
        assert talk.offer(*but(assignment("a", "2", source("x", 8)))) == []
        assert talk.stream.refusals[0].suspects == (source("x", 8),)

    def test_the_same_bytes_from_another_manifest_were_acked_with_it(self) -> None:
        talk = running(*but(assignment("a", "1", source("x", 3))))
        assert talk.offer(*but(assignment("a", "1", source("x", 8)))) == []
        talk.offer(*but(assignment("a", "2", source("x", 8), source("y", 9))))
        talk.nack(ENDPOINT, "no")
        assert talk.stream.refusals[0].suspects == (source("y", 9),)


class TestReconnecting:
    def resume(self, *had: Resource, wildcard: bool = True) -> Conversation:
        """An Envoy that comes from another replica with `had`."""
        talk = Conversation()
        for type_ in Type:
            initial = {found.name: found.version for found in had if found.type is type_}
            names = () if type_ in WILDCARDS else tuple(initial)
            talk.ask(type_, *names, initial=initial)
        return talk

    def test_what_the_client_has_is_not_sent_and_the_wildcards_get_one_empty_answer(self) -> None:
        talk = self.resume(*SHOP)
        assert talk.offer(*SHOP) == ["CLUSTER", "LISTENER"]
        assert talk.stream.acked == 1
        assert talk.ack(CLUSTER, LISTENER) == []
        assert talk.wait(60) == []

    def test_only_what_changed_is_sent_and_in_order(self) -> None:
        talk = self.resume(*SHOP)
        changed = but(static("b"), route("outbound", "b"))
        assert talk.offer(*changed) == ["CLUSTER b=1", "LISTENER"]
        talk.ack(LISTENER)
        assert talk.ack(CLUSTER) == ["ROUTE outbound=to:b"]

    def test_what_was_removed_meanwhile_is_told_routes_and_listeners_first(self) -> None:
        talk = self.resume(*but(static("b"), listener("old"), route("old", "b")))
        assert talk.offer(*SHOP) == ["LISTENER -old", "ROUTE old=empty"]
        talk.ack(LISTENER)
        assert talk.ack(ROUTE) == ["CLUSTER -b"]
        talk.ack(CLUSTER)
        assert talk.stream.acked == 1

    def test_no_cluster_is_removed_before_the_client_has_said_which_routes_it_has(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER, initial={"a": SHOP[0].version, "b": static("b").version})
        assert talk.offer(*SHOP) == []
        assert talk.ask(LISTENER, initial={"outbound": listener("outbound").version}) == ["LISTENER"]
        assert talk.ack(LISTENER) == []
        assert talk.ask(ROUTE, "outbound", initial={"outbound": "to b"}) == ["ROUTE outbound=to:a"]
        assert talk.ack(ROUTE) == []
        assert talk.ask(VIRTUAL_HOST, initial={"outbound/b": "to b"}) == ["VIRTUAL_HOST -outbound/b"]
        assert talk.ack(VIRTUAL_HOST) == ["CLUSTER -b"]

    def test_a_client_that_has_no_routes_holds_removals_up_for_three_seconds(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER, initial={"a": SHOP[0].version, "b": static("b").version})
        assert talk.offer(*SHOP) == []
        assert talk.stream.deadline == talk.now + 3
        assert talk.wait(2.9) == []
        assert talk.wait(0.1) == ["CLUSTER -b"]

    def test_an_assignment_that_was_removed_meanwhile_is_told_as_removed(self) -> None:
        talk = self.resume(*SHOP)
        assert talk.offer(*without(assignment("a"))) == ["CLUSTER", "ENDPOINT -a", "LISTENER"]

    def test_an_empty_route_that_it_has_is_current(self) -> None:
        first = running(*SHOP)
        first.ask(ROUTE, "later")
        (empty,) = first.last(ROUTE).resources
        talk = self.resume(*SHOP, empty)
        assert talk.offer(*SHOP) == ["CLUSTER", "LISTENER"]

    def test_what_it_asks_for_and_does_not_have_is_answered(self) -> None:
        talk = Conversation()
        talk.offer(*SHOP)
        assert talk.ask(ENDPOINT, "a", "b", initial={"a": assignment("a").version}) == ["ENDPOINT -b"]

    def test_a_type_may_come_after_the_sequence_is_done(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER, initial={"a": SHOP[0].version})
        assert talk.offer(*SHOP) == ["CLUSTER"]
        talk.ack(CLUSTER)
        assert talk.ask(LISTENER, initial={"outbound": "old", "gone": "1"}) == ["LISTENER outbound=1"]
        talk.ack(LISTENER)
        assert talk.ask(ROUTE, "outbound", initial={"outbound": "old"}) == ["ROUTE outbound=to:a"]
        assert talk.ack(ROUTE) == ["LISTENER -gone"]

    def test_later_initial_versions_do_not_count(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(ENDPOINT, "a", initial={"a": assignment("a").version}) == ["ENDPOINT a=1"]

    def test_a_resumed_stream_says_so(self) -> None:
        assert self.resume(*SHOP).stream.resumed
        assert not running(*SHOP).stream.resumed

    def test_a_changed_cluster_has_its_assignment_sent_although_the_client_has_it(self) -> None:
        talk = self.resume(*SHOP)
        assert talk.offer(*but(cluster("a", "2"))) == ["CLUSTER a=2", "ENDPOINT a=1", "LISTENER"]

    def test_also_when_it_asks_for_the_assignment_only_after_the_cluster_was_sent(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER, initial={"a": SHOP[0].version})
        assert talk.offer(*but(cluster("a", "2"))) == ["CLUSTER a=2"]
        assert talk.ask(ENDPOINT, "a", initial={"a": assignment("a").version}) == ["ENDPOINT a=1"]

    def test_the_sources_of_what_it_has_are_all_suspects(self) -> None:
        talk = self.resume(*SHOP)
        talk.offer(*but(assignment("a", "2", Source("m", 1))))
        talk.nack(ENDPOINT, "no")
        assert talk.stream.refusals[0].suspects == (Source("m", 1),)


class TestListening:
    def test_means_that_listeners_routes_and_identity_are_acked(self) -> None:
        talk = Conversation()
        talk.ask(LISTENER)
        talk.offer(*but(static("a")))
        heard = []
        for type_, name in ((ROUTE, "outbound"), (SECRET, "identity")):
            talk.ack_all()
            heard.append(talk.stream.listening)
            talk.ask(type_, name)
            heard.append(talk.stream.listening)
        assert heard == [False] * 4
        talk.ack(SECRET)
        assert talk.stream.listening

    def test_not_while_a_listener_lacks_its_route(self) -> None:
        talk = running(*SHOP[:3])
        talk.offer(*SHOP)
        talk.ack(LISTENER)
        talk.wait(60)
        assert not talk.stream.listening
        talk.ask(ROUTE, "outbound")
        talk.ack(ROUTE)
        assert talk.stream.listening

    def test_not_while_the_identity_does_not_exist(self) -> None:
        talk = running(*without(secret()))
        assert not talk.stream.listening
        talk.offer(*SHOP)
        talk.ack(SECRET)
        assert talk.stream.listening

    def test_not_while_a_listener_is_refused(self) -> None:
        talk = running(*SHOP[:3], route("outbound", "a"))
        talk.offer(*SHOP)
        talk.nack(LISTENER, "address in use")
        assert not talk.stream.listening

    def test_once_is_enough(self) -> None:
        talk = running(*SHOP)
        assert talk.stream.listening
        talk.offer(*but(listener("outbound", "2")))
        talk.nack(LISTENER, "no")
        assert talk.stream.listening

    def test_a_resumed_envoy_listens(self) -> None:
        talk = TestReconnecting().resume(*SHOP)
        talk.offer(*SHOP)
        assert talk.stream.listening


class TestTrapsOfEnvoy:
    """Each was seen on the wire."""

    def test_a_changed_cluster_without_its_assignment_warms_for_15_seconds(self) -> None:
        talk = running(*SHOP)
        assert talk.offer(*but(cluster("a", "2"))) == ["CLUSTER a=2", "ENDPOINT a=1"]
        talk.ack(ENDPOINT)
        talk.ack(CLUSTER)
        assert talk.stream.acked == 2

    def test_the_assignment_follows_its_cluster_even_if_one_is_in_flight(self) -> None:
        talk = running(*SHOP)
        talk.ask(ENDPOINT, "a")
        assert talk.offer(*but(cluster("a", "2"))) == []
        assert talk.ack(ENDPOINT) == ["CLUSTER a=2", "ENDPOINT a=1"]

    def test_the_assignment_follows_a_cluster_that_was_asked_for_again(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(CLUSTER, "a") == ["CLUSTER a=1", "ENDPOINT a=1"]

    def test_a_changed_cluster_whose_assignment_is_gone_is_not_left_to_warm(self) -> None:
        talk = running(*SHOP)
        changed = (cluster("a", "2"), *without(cluster("a"), assignment("a")))
        assert talk.offer(*changed) == ["CLUSTER a=2", "ENDPOINT -a"]

    def test_a_route_before_its_warm_cluster_answers_503(self) -> None:
        talk = running(*SHOP)
        assert "ROUTE" not in " ".join(talk.offer(*but(static("b"), route("outbound", "b"))))
        assert talk.wait(60) == []
        assert talk.ack(CLUSTER) == ["ROUTE outbound=to:b"]

    def test_a_cluster_removed_before_the_route_answers_503(self) -> None:
        talk = running(*but(static("b"), route("outbound", "b")))
        assert "CLUSTER" not in " ".join(talk.offer(*SHOP))

    def test_a_missing_route_answered_as_removed_blocks_the_listener_for_ever(self) -> None:
        talk = running(*SHOP)
        assert talk.ask(ROUTE, "missing") == ["ROUTE missing=empty"]

    def test_a_type_that_is_never_answered_costs_15_seconds_of_start(self) -> None:
        talk = Conversation()
        talk.offer()
        assert talk.ask(CLUSTER) == ["CLUSTER"]
        assert talk.ask(LISTENER) == ["LISTENER"]
        assert talk.ask(SECRET, "identity") == ["SECRET -identity"]
        assert talk.ask(ENDPOINT, "a") == ["ENDPOINT -a"]

    def test_secrets_are_asked_for_one_by_one(self) -> None:
        talk = Conversation()
        talk.offer(secret("identity"), secret("bundle"))
        assert talk.ask(SECRET, "identity") == ["SECRET identity=1"]
        assert talk.ask(SECRET, "bundle") == []
        assert talk.ack(SECRET) == ["SECRET bundle=1"]

    def test_a_cluster_ack_is_withheld_while_it_warms_and_nothing_that_it_warms_on_waits_for_that(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER)
        assert talk.offer(*SHOP) == ["CLUSTER a=1"]
        assert talk.ask(SECRET, "identity") == ["SECRET identity=1"]
        assert talk.ask(ENDPOINT, "a") == ["ENDPOINT a=1"]
        assert talk.ack(SECRET, ENDPOINT) == []
        assert talk.ack(CLUSTER) == []
        assert talk.ask(LISTENER) == ["LISTENER outbound=1"]


def test_a_stream_of_which_nothing_was_asked_has_nothing_to_send() -> None:
    stream = Stream()
    assert stream.to_send(0.0) == ()
    assert (stream.target, stream.acked, stream.deadline, stream.started) == (0, 0, None, False)
