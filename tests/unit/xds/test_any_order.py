"""Whatever is offered, answered, refused and cut off, in any order: no request fails, and all end with the newest."""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
from envoy.service.discovery.v3 import discovery_pb2
from google.rpc import status_pb2
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from smc.xds import sotw
from smc.xds.snapshot import Resource, Snapshot, Type
from smc.xds.stream import Request, Stream
from smc.xds.subscription import Response, empty_route
from smc.xds.virtual_hosts import OTHERS, route_of, whole
from tests.unit.xds.envoy import Envoy
from tests.unit.xds.resources import (
    BAD,
    CLUSTER,
    ENDPOINT,
    LISTENER,
    ROUTE,
    SECRET,
    VIRTUAL_HOST,
    assignment,
    cluster,
    discovering,
    layered,
    listener,
    route,
    secret,
    virtual_host,
)

NAMES = ("a", "b", "c", "d")
BODIES = st.sampled_from(("1", "2", "3", "4", "5", "6", f"{BAD}1", f"{BAD}2"))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Consistent ones: a route sends traffic to Clusters that are there, a listener's routes are there."""
    clusters = draw(st.sets(st.sampled_from(NAMES)))
    found: list[Resource] = [secret("identity", draw(BODIES) if draw(st.integers(0, 3)) == 3 else "1")]
    for name in sorted(clusters):
        found.append(cluster(name, draw(BODIES), secrets=("identity",)))
        if draw(st.integers(0, 9)):
            found.append(assignment(name, draw(BODIES)))
    for name in sorted(draw(st.sets(st.sampled_from(("in", "out", "more"))))):
        behind = draw(st.lists(st.sampled_from(sorted(clusters)), unique=True)) if clusters else []
        found.append(route(name, *behind, mark=draw(BODIES)))
        found.append(listener(name, draw(BODIES)))
    for name in sorted(draw(st.sets(st.sampled_from(("odd", "moved"))))):
        found += [listener(name, draw(BODIES)), discovering(name), virtual_host(name, OTHERS)]
        hosts = draw(st.permutations(NAMES))
        for nth, host in enumerate(hosts[: draw(st.integers(0, 3))]):
            behind = draw(st.lists(st.sampled_from(sorted(clusters)), unique=True)) if clusters else []
            # Nobody can help whoever wants the domain of one that stays as it is because it is refused.
            taken = {"domain": f"domain{nth}"} if name == "moved" else {"mark": draw(BODIES)}
            found.append(virtual_host(name, host, *behind, **taken))
    return layered(found)


class Streams(RuleBasedStateMachine):
    """One Envoy, whose responses and requests take their time on the wire, and moves between replicas."""

    types: tuple[Type, ...] = tuple(Type)

    def __init__(self) -> None:
        super().__init__()
        self.envoy = Envoy()
        self.now = 0.0
        self.snapshot = Snapshot()
        self.revision = 0
        self.in_flight: dict[Type, str] = {}
        self.responses: deque[Response] = deque()
        self._connect()

    def _connect(self) -> None:
        self.stream = Stream(self.types)
        self.in_flight.clear()
        self.responses.clear()
        self.envoy.connect()
        self.stream.offer(self.snapshot, self.revision)

    def _send(self) -> None:
        for response in self.stream.to_send(self.now):
            assert response.type not in self.in_flight, "two in flight"
            assert response.resources or response.removed or response.nonce == "1", "says nothing"
            assert len({r.name for r in response.resources}.union(response.removed)) == len(response.resources) + len(
                response.removed
            )
            self.in_flight[response.type] = response.nonce
            self.responses.append(self._put(response))

    def _put(self, response: Response) -> Response:
        """What the server says, as it is on the wire."""
        return response

    def _heard(self, response: Response) -> Response:
        """What was on the wire, as the client understands it."""
        return response

    def _read(self, request: Request) -> Request:
        """What the client says, as the server understands it."""
        return request

    @rule(snapshot=snapshots())
    def the_mesh_changes(self, snapshot: Snapshot) -> None:
        self.snapshot, self.revision = snapshot, self.revision + 1
        self.stream.offer(snapshot, self.revision)
        self._send()

    @rule(data=st.data())
    def endpoints_change(self, data: st.DataObject) -> None:
        changed = [
            assignment(r.name, data.draw(BODIES)) if r.type is ENDPOINT else r
            for type_ in Type
            for r in self.snapshot.of_type(type_).values()
        ]
        self.the_mesh_changes(layered(changed))

    @precondition(lambda self: self.responses)
    @rule(count=st.integers(1, 3))
    def a_response_arrives(self, count: int) -> None:
        for _ in range(min(count, len(self.responses))):
            self.envoy.hear(self._heard(self.responses.popleft()))

    @precondition(lambda self: self.envoy.requests)
    @rule(count=st.integers(1, 3))
    def a_request_arrives(self, count: int) -> None:
        for _ in range(min(count, len(self.envoy.requests))):
            request = self._read(self.envoy.requests.popleft())
            if self.in_flight.get(request.type) == request.nonce:
                del self.in_flight[request.type]
            self.stream.receive(request, self.now)
            self._send()

    @precondition(lambda self: self.in_flight)
    @rule()
    def a_late_answer_arrives(self) -> None:
        for type_ in Type:
            if type_ in self.in_flight:
                self.stream.receive(Request(type_, nonce="0", error="late"), self.now)
                self._send()

    @rule()
    def it_comes_back_to_another_replica(self) -> None:
        self._connect()

    @rule(seconds=st.sampled_from((0.01, 0.5, 1.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._send()

    @rule(snapshot=snapshots())
    def it_comes_back_to_a_replica_that_knows_more(self, snapshot: Snapshot) -> None:
        self._settle()
        self.snapshot, self.revision = snapshot, self.revision + 1
        self._connect()

    @rule()
    def it_comes_back_to_one_that_knows_the_same(self) -> None:
        self._settle()
        self._connect()
        self._settle()
        if not any(self.envoy.refused.values()):
            assert self.envoy.told == 0, "it was sent what it had"

    @invariant()
    def acked_is_never_ahead(self) -> None:
        assert self.stream.acked <= self.stream.target == self.revision

    def _exchange(self) -> None:
        """Until nobody has anything to say."""
        for _ in range(1_000):
            self._send()
            if self.responses:
                self.a_response_arrives(1)
            elif self.envoy.requests:
                self.a_request_arrives(1)
            elif (deadline := self.stream.deadline) is not None and not self.in_flight:
                self.now = deadline
            elif self.in_flight.keys() == {CLUSTER} and (self.envoy.refused[ENDPOINT] or self.envoy.refused[SECRET]):
                self.now += 15
                self.envoy.patience_ends()
            else:
                return
        raise AssertionError("they talk for ever")

    def _settle(self) -> None:
        self._exchange()
        assert not self.in_flight, "an Envoy waits for what it is not sent"
        self._check_that_it_has_everything()

    def teardown(self) -> None:
        self._settle()

    def _check_that_it_has_everything(self) -> None:
        assert self.stream.acked == self.revision
        assert not self.envoy.waiting, "they wait for ever"
        snapshot = self.snapshot if VIRTUAL_HOST in self.types else whole(self.snapshot)
        refused = {(r.type, name) for r in self.stream.refusals for name in r.names}
        assert refused == {
            (type_, name)
            for type_ in Type
            for name, resource in snapshot.of_type(type_).items()
            if self.envoy.refused[type_].get(name) == resource.version
            and (type_ in (CLUSTER, LISTENER) or name in self.envoy.wanted[type_] or _is_wanted(name, self.envoy))
        }
        routes_refused = any(type_ in (LISTENER, ROUTE, VIRTUAL_HOST) for type_, _ in refused)
        for type_ in Type:
            wanted = {
                name: resource.version
                for name, resource in snapshot.of_type(type_).items()
                if type_ in (CLUSTER, LISTENER) or _is_wanted(name, self.envoy) or name in self.envoy.wanted[type_]
            }
            if type_ is ROUTE:
                wanted = {name: empty_route(name).version for name in self.envoy.wanted[ROUTE]} | wanted
            has = {name: resource.version for name, resource in self.envoy.has[type_].items()}
            for of, name in refused:
                if of is type_:
                    assert BAD.encode() in snapshot.of_type(type_)[name].body
                    wanted.pop(name, None)
                    has.pop(name, None)
            if routes_refused and type_ in (CLUSTER, ENDPOINT, SECRET):
                has = {name: version for name, version in has.items() if name in wanted}
            assert has == wanted, type_.name
        if SECRET in {type_ for type_, names in self.envoy.has.items() if names} and not routes_refused:
            assert self.stream.listening or not self.envoy.has[LISTENER]


def _is_wanted(host: str, envoy: Envoy) -> bool:
    """As a virtual host: with its route."""
    return route_of(host) in envoy.wanted[ROUTE]


class StatesOfTheWorld(Streams):
    """The same, in the variant that says everything each time, and cannot say what a client had that comes back."""

    types = sotw.TYPES

    def _connect(self) -> None:
        self.decoder = sotw.Decoder()
        self.asked: dict[Type, dict[str, None]] = {}
        self.answered: dict[Type, str] = {}
        super()._connect()
        self.returning = True
        self._settle()
        self.returning = False

    def it_comes_back_to_one_that_knows_the_same(self) -> None:
        """Not a rule here: it is sent everything."""

    def _put(self, response: Response) -> Response:
        return response._replace(resources=sotw.contents(response, self.stream.whole), removed=())

    def _heard(self, response: Response) -> Response:
        type_, told = response.type, {found.name: found for found in response.resources}
        if type_ is ENDPOINT:
            gone = [name for name, found in told.items() if found.body == sotw.no_endpoints(name).body]
            left = tuple(found for name, found in told.items() if name not in gone)
            return response._replace(resources=left, removed=tuple(gone))
        if type_ not in (CLUSTER, LISTENER):
            return response
        gone = [name for name in self.envoy.has[type_] if name not in told]
        for name in gone:
            if self.returning or name in self.envoy.refused[type_]:
                self.envoy.lose(type_, name)
        return response._replace(removed=tuple(name for name in gone if name in self.envoy.has[type_]))

    def _read(self, request: Request) -> Request:
        type_ = request.type
        asked = self.asked.setdefault(type_, {})
        asked.update(dict.fromkeys(request.subscribe))
        for name in request.unsubscribe:
            asked.pop(name, None)
        nonce = self.answered[type_] = request.nonce or self.answered.get(type_, "")
        message = discovery_pb2.DiscoveryRequest(
            type_url=type_.value,
            resource_names=asked,
            response_nonce=nonce,
            version_info="before" if request.initial else "",
            error_detail=status_pb2.Status(code=13, message=request.error) if request.error else None,
        )
        return self.decoder.request(message)


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestStatesOfTheWorld = StatesOfTheWorld.TestCase
TestStatesOfTheWorld.settings = TestStreams.settings
