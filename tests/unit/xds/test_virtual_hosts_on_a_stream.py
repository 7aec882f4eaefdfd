"""Routes that discover their virtual hosts, on one stream, rule by rule; what Envoy was seen to trip over says so."""

from __future__ import annotations

from smc.xds.snapshot import Resource, Snapshot
from smc.xds.stream import Request, Stream
from smc.xds.virtual_hosts import OTHERS
from tests.unit.xds.conversation import Conversation, running
from tests.unit.xds.resources import (
    CLUSTER,
    LISTENER,
    ROUTE,
    SECRET,
    VIRTUAL_HOST,
    clusters_of,
    discovering,
    listener,
    route,
    static,
    virtual_host,
)


class TestVirtualHosts:
    """Of routes that discover them. What is said of one is its mark, and the Clusters behind it."""

    OTHERS = virtual_host("app", OTHERS)
    WEB = (static("a"), listener("app"), discovering("app"), OTHERS, virtual_host("app", "x", "a"))

    def but(self, *changed: Resource) -> tuple[Resource, ...]:
        return tuple({(r.type, r.name): r for r in (*self.WEB, *changed)}.values())

    def test_are_asked_for_all_at_once_and_answered_at_once(self) -> None:
        talk = Conversation()
        talk.offer(*self.WEB)
        talk.ask(CLUSTER)
        talk.ack_all()
        talk.ask(LISTENER)
        talk.ask(ROUTE, "app")
        assert talk.ask(VIRTUAL_HOST) == ["VIRTUAL_HOST app/others=1 app/x=1:a"]

    def test_a_changed_one_is_sent_alone(self) -> None:
        talk = running(*self.WEB)
        assert talk.offer(*self.but(virtual_host("app", "x"))) == ["VIRTUAL_HOST app/x=1"]

    def test_one_is_sent_once_what_it_moves_traffic_to_is_there(self) -> None:
        talk = running(*self.WEB)
        assert talk.offer(*self.but(static("b"), virtual_host("app", "x", "b"))) == ["CLUSTER b=1"]
        assert talk.ack(CLUSTER) == ["VIRTUAL_HOST app/x=1:b"]

    def test_one_that_is_removed_goes_before_what_it_moved_traffic_to(self) -> None:
        talk = running(*self.WEB)
        assert talk.offer(*self.WEB[1:4]) == ["VIRTUAL_HOST -app/x"]
        assert talk.ack(VIRTUAL_HOST) == ["CLUSTER -a"]

    def test_one_that_is_removed_goes_with_the_one_that_takes_its_domains(self) -> None:
        """Trap: Envoy refuses all virtual hosts while two have the same domain."""
        talk = running(*self.WEB)
        heir = virtual_host("app", "y", domain="x")
        assert talk.offer(*self.WEB[:4], heir) == ["VIRTUAL_HOST app/y=1 -app/x"]

    def test_they_follow_a_route_that_is_asked_for_again(self) -> None:
        """Trap: Envoy does not ask for them again, and its listener waits for one of them for ever."""
        talk = running(*self.WEB)
        talk.ask(ROUTE, drop=("app",))
        assert talk.ask(ROUTE, "app") == ["ROUTE app=discovering", "VIRTUAL_HOST app/others=1 app/x=1:a"]

    def test_they_follow_no_route_but_their_own(self) -> None:
        talk = running(*self.but(discovering("app|80"), virtual_host("app|80", OTHERS), listener("app|80")))
        talk.ask(ROUTE, drop=("app|80",))
        assert talk.ask(ROUTE, "app|80") == ["ROUTE app|80=discovering", "VIRTUAL_HOST app|80/others=1"]

    def test_none_comes_before_its_route(self) -> None:
        """Trap: Envoy lets it go, and says to the next replica that it has it. Where a stream ends between the route
        and what follows it, nobody would send it again, and the listener waits for it for ever.
        """
        talk = running(*self.WEB)
        assert talk.offer(*self.but(listener("app|80"), discovering("app|80"), virtual_host("app|80", OTHERS))) == [
            "LISTENER app|80=1"
        ]
        assert talk.ack(LISTENER) == []
        assert talk.ask(ROUTE, "app|80") == ["ROUTE app|80=discovering", "VIRTUAL_HOST app|80/others=1"]

    def test_who_has_the_route_already_is_sent_those_that_did_not_follow_it(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER, initial={"a": static("a").version})
        talk.ask(LISTENER, initial={"app": listener("app").version})
        talk.ask(ROUTE, "app", initial={"app": discovering("app").version})
        talk.ask(VIRTUAL_HOST, initial={"app/x": self.WEB[4].version})
        assert talk.offer(*self.WEB) == ["CLUSTER", "LISTENER", "VIRTUAL_HOST app/others=1"]

    def test_what_changed_comes_to_who_asks_for_them_before_it_asks_for_its_route(self) -> None:
        talk = Conversation()
        talk.offer(*self.WEB)
        talk.ask(CLUSTER, initial={"a": static("a").version})
        talk.ask(LISTENER, initial={"app": listener("app").version})
        talk.ack_all()
        assert talk.ask(VIRTUAL_HOST, initial={"app/others": self.OTHERS.version, "app/x": "another"}) == []
        assert talk.ask(ROUTE, "app", initial={"app": discovering("app").version}) == ["VIRTUAL_HOST app/x=1:a"]

    def test_what_was_refused_of_them_is_not_refused_any_more_once_the_route_is_given_up(self) -> None:
        bad = virtual_host("app|80", "x", mark="2")
        talk = running(
            *self.but(
                discovering("app|80"), virtual_host("app|80", OTHERS), virtual_host("app|80", "x"), listener("app|80")
            )
        )
        talk.offer(*self.but(discovering("app|80"), virtual_host("app|80", OTHERS), bad, listener("app|80")))
        talk.nack(VIRTUAL_HOST, "missing ): (")
        assert talk.stream.refusals
        talk.ask(ROUTE, drop=("app|80",))
        assert not talk.stream.refusals
        assert talk.ask(ROUTE, "app|80") == [
            "ROUTE app|80=discovering",
            "VIRTUAL_HOST app|80/others=1 app|80/x=2",
        ], "of which the last good one is gone"

    def test_a_removal_waits_until_the_client_has_asked_for_them(self) -> None:
        talk = running(static("old"), listener("app"), route("app", "old"))
        assert talk.offer(*self.WEB) == ["CLUSTER a=1"]
        assert talk.ack(CLUSTER) == ["ROUTE app=discovering"]
        assert talk.ack(ROUTE) == []
        assert talk.ask(VIRTUAL_HOST) == ["VIRTUAL_HOST app/others=1 app/x=1:a"]
        assert talk.ack(VIRTUAL_HOST) == ["CLUSTER -old"]

    def test_a_route_that_is_gone_loses_them_and_goes_on_discovering(self) -> None:
        """Trap: Envoy forgets that it has subscribed when a route discovers no more, but not that it was told."""
        talk = running(*self.WEB)
        assert talk.offer(static("a")) == ["LISTENER -app", "VIRTUAL_HOST -app/others -app/x"]

    def test_a_route_that_is_gone_goes_on_discovering_at_another_replica(self) -> None:
        talk = Conversation()
        talk.ask(CLUSTER, initial={"a": static("a").version})
        talk.ask(ROUTE, "app", initial={"app": discovering("app").version})
        assert not [line for line in talk.offer(static("a")) if line.startswith("ROUTE")]

    def test_a_route_that_was_never_there_is_empty(self) -> None:
        talk = running(*self.WEB)
        assert talk.ask(ROUTE, "more") == ["ROUTE more=empty"]

    def test_who_comes_back_is_sent_what_changed_and_told_what_is_gone(self) -> None:
        talk = Conversation()
        had = {"app/others": self.OTHERS.version, "app/x": "another", "app/gone": "1"}
        talk.ask(CLUSTER, initial={"a": static("a").version})
        talk.ask(LISTENER, initial={"app": listener("app").version})
        talk.ask(ROUTE, "app", initial={"app": discovering("app").version})
        talk.ask(VIRTUAL_HOST, initial=had)
        assert talk.offer(*self.WEB) == ["CLUSTER", "LISTENER", "VIRTUAL_HOST app/x=1:a -app/gone"]

    def test_a_bad_one_keeps_no_other_from_changing(self) -> None:
        """Envoy takes all virtual hosts of a response or none, and may not say which is bad."""
        talk = running(*self.WEB)
        talk.offer(*self.but(virtual_host("app", "x", mark="2"), virtual_host("app", "y")))
        assert talk.nack(VIRTUAL_HOST, "missing ): (") == ["VIRTUAL_HOST app/x=2"]
        assert talk.nack(VIRTUAL_HOST, "missing ): (") == ["VIRTUAL_HOST app/y=1"]
        assert talk.ack(VIRTUAL_HOST) == []
        (refusal,) = talk.stream.refusals
        assert (refusal.type, refusal.names) == (VIRTUAL_HOST, ("app/x",))
        assert talk.stream.acked == 2

    def test_in_parts_a_domain_is_free_before_another_takes_it(self) -> None:
        talk = running(*self.WEB)
        talk.offer(*self.WEB[:4], virtual_host("app", "y", domain="x"), virtual_host("app", "z", mark="2"))
        assert talk.nack(VIRTUAL_HOST, "missing ): (") == ["VIRTUAL_HOST -app/x"]
        assert talk.ack(VIRTUAL_HOST) == ["VIRTUAL_HOST app/y=1 app/z=2"]

    def test_a_proxy_does_not_listen_before_its_routes_have_one(self) -> None:
        talk = Conversation()
        talk.offer(*self.WEB)
        talk.ask(CLUSTER)
        talk.ack_all()
        talk.ask(LISTENER)
        talk.ask(SECRET)
        talk.ask(ROUTE, "app")
        talk.ack_all()
        talk.wait(60)
        assert not talk.stream.listening
        talk.ask(VIRTUAL_HOST)
        talk.ack_all()
        assert talk.stream._subscriptions[VIRTUAL_HOST].has.get("app/others") is not None

    def test_are_in_the_routes_of_a_stream_that_does_not_carry_them(self) -> None:
        stream = Stream([ROUTE])
        stream.offer(Snapshot.of(self.WEB), 1)
        stream.receive(Request(ROUTE, ("app",)), 0.0)
        (response,) = stream.to_send(0.0)
        (found,) = response.resources
        assert clusters_of(found) == ("a",)
        stream.receive(Request(ROUTE, nonce=response.nonce), 0.0)
        changed = Snapshot.of(self.but(virtual_host("app", "x", "b")))
        stream.offer(changed, 2)
        (response,) = stream.to_send(0.0)
        assert [clusters_of(found) for found in response.resources] == [("b",)]
        stream.receive(Request(ROUTE, nonce=response.nonce), 0.0)
        assert stream.acked == 2
        assert stream.versions == {type_: changed.versions[type_] for type_ in (ROUTE, VIRTUAL_HOST)}
