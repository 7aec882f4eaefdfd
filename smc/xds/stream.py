"""One xDS stream as a state machine: no transport, no clock, no messages.

A stream works on one target, the Snapshot that its proxy should have, until the client has ACKed all of it, and only
then on the newest one that was offered meanwhile. What moves traffic follows what it moves traffic to, and what nothing
points to any more goes last; each step waits for the ACKs of the ones before it (make before break):

1. Clusters, followed at once by load assignments and secrets, because a Cluster's ACK may wait for them;
2. listeners, routes and virtual hosts, the removals of these last included;
3. removals: of listeners, then of Clusters, then of what these no longer ask for.

A name that the client asks for is answered at once, in any step, from the target. A stream that carries only some of
the types takes the same steps for these alone: nothing of the others is waited for. The rules are those of
https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol, and what Envoy was seen to need.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from sys import intern
from types import MappingProxyType
from typing import NamedTuple

from smc.errors import Invalid
from smc.xds import virtual_hosts
from smc.xds.held import Held, Told
from smc.xds.snapshot import Resource, Snapshot, Source, Type
from smc.xds.subscription import SWITCHED, Nack, Response, Subscription

WILDCARD = "*"

IDENTITY = "identity"
"""The secret without which a proxy accepts no traffic."""

STALLED_AFTER = 20.0
"""Seconds without an answer after which a client counts as stalled."""

PATIENCE = 3.0
"""Seconds, from the ACK of a Cluster or listener, in which the client should have asked for what that one warms on."""

MOST_NAMES = 50_000
"""The most names of one type that a client may ask for or say that it has."""

LONGEST_NAME = 256
"""Characters of a name that a client may ask for; what is served here has shorter ones."""

WILDCARDS = frozenset({Type.CLUSTER, Type.LISTENER, Type.VIRTUAL_HOST})
"""The types of which a client means all when its first request names none."""

_MADE = frozenset({Type.CLUSTER, Type.ENDPOINT, Type.SECRET})
"""What is made before traffic is moved to it."""

_REMOVED = SWITCHED, frozenset({Type.CLUSTER}), frozenset({Type.ENDPOINT, Type.SECRET})
"""In which order what nothing points to any more goes."""

_ALL = frozenset(Type)

_WARMING = frozenset({Type.CLUSTER, Type.LISTENER, Type.ROUTE})
"""What makes Envoy ask for more."""


class ProtocolError(Invalid):
    """The client said what no correct client says: end the stream."""


_NOTHING: Mapping[str, str] = MappingProxyType({})


class Request(NamedTuple):
    """What a client said, whatever the variant of the protocol."""

    type: Type
    subscribe: tuple[str, ...] = ()
    """As the client wrote it: "*", and in the first request of Clusters or listeners also nothing, asks for all."""
    unsubscribe: tuple[str, ...] = ()
    initial: Mapping[str, str] = _NOTHING
    """Name -> version of what it has from before; counts in the first request of its type only."""
    nonce: str = ""
    error: str | None = None
    """Why it refuses the response `nonce` (a NACK)."""
    resumed: bool = False
    """It has something of the type from before this stream, whether it can say what or not."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client refuses now."""

    type: Type
    names: tuple[str, ...]
    text: str
    """The client's own, shortened."""
    suspects: tuple[Source, ...]
    """The sources that changed since the client's last ACK of these names, newest first."""
    revision: int
    """The Mesh revision of what it refused."""


class Stream:
    """Call `to_send` after each `offer` and `receive`, and at `deadline`.

    Times are seconds on any clock that only grows.
    """

    def __init__(self, types: Iterable[Type] = Type) -> None:
        """`types` are what it carries."""
        self._subscriptions: dict[Type, Subscription] = {}
        self._unfinished: dict[Type, Subscription] = {}
        """Those that may have something to send or in flight: few, so that a change costs what it changes."""
        for type_ in types:  # routes before the virtual hosts that are parts of them
            routes = self._subscriptions.get(Type.ROUTE) if type_ is Type.VIRTUAL_HOST else None
            self._subscriptions[type_] = Subscription(type_, self._unfinished, routes)
        self._discovers = Type.VIRTUAL_HOST in self._subscriptions
        """It carries virtual hosts: they are not in the routes."""
        self._offered = Snapshot()
        """That which the target is made from."""
        self._target: Snapshot | None = None
        self._revision = 0
        self._pending: tuple[Snapshot, int] | None = None
        self.acked = 0
        """The newest Mesh revision of which the client has ACKed all that it asked for, but for `refusals`.

        It has nothing older; what it has not asked for yet it will get from this revision or a newer one.
        """
        self._versions: dict[Type, str] = {}
        self._unsettled: dict[Type, None] = {}
        """Those of which the client may have another set now."""
        self._idle = False
        """The sequence has ended, and nothing was said or sent since: nothing but an offer leads on."""
        self._asked = False
        """The client has asked for something since `to_send`."""
        self._awaited: dict[tuple[Type, str], set[tuple[Type, str]]] = {}
        """What the client should ask for next, and the Clusters and listeners that it needs it for."""
        self._patience: float | None = None
        """When the sequence goes on without it; None while its ACK has not come."""
        self._resumed_at: float | None = None
        self._listening = False
        self._refusals: tuple[Refusal, ...] | None = None
        """As they were told last; None: look again."""
        self._now = float("-inf")

    # ------------------------------------------------------------------------------------------------------ in and out

    def offer(self, snapshot: Snapshot, revision: int) -> None:
        """Let the client have `snapshot` of Mesh `revision` once it has what it is being sent now. The newest wins.

        On a stream that carries no virtual hosts, RouteConfigurations have theirs in them.
        """
        self._pending = snapshot, revision

    def receive(self, request: Request, now: float) -> None:
        """Take in what the client said.

        An answer with another nonce than that of the response in flight is late: it says nothing of what was sent
        since, but what it asks for counts.

        Raises:
            ProtocolError: nothing was taken in.
        """
        subscription = self._subscriptions.get(request.type)
        if subscription is None:
            raise ProtocolError(
                f"a stream of {_names(self._subscriptions)} is asked for a {request.type.name}",
                hint="ask the service of that type, or the aggregated one",
            )
        # Nearly always it asks for nothing: it is an ACK.
        asks = bool(request.subscribe or request.unsubscribe or request.initial)
        if asks:
            _check(request, subscription)
        self._now = now
        self._refusals = None
        self._idle = False
        first, subscription.heard = not subscription.heard, True
        flight = subscription.flight
        if flight is not None and flight.nonce == request.nonce:
            self._answered(subscription, flight, request.error)
        if asks or first:
            self._asked = True
            for name in request.unsubscribe:
                if name == WILDCARD:
                    subscription.end_wildcard()
                else:
                    subscription.unsubscribe(name)
            if request.unsubscribe and request.type is Type.ROUTE and self._discovers:
                self._subscriptions[Type.VIRTUAL_HOST].let_go()
            self._subscribe(subscription, request, first=first)
        self._proceed()

    def to_send(self, now: float) -> tuple[Response, ...]:
        """What goes out now, in this order. Each response is returned once, and is in flight from then on."""
        self._now = now
        self._refusals = None
        self._asked = False
        self._proceed()
        sent: list[Response] = []
        target, unfinished = self._target, self._unfinished
        if target is None or not unfinished:
            return ()
        # In the order of the types, of which an earlier one may make a later one unfinished.
        alone = len(unfinished) == 1 and _WARMING.isdisjoint(unfinished)
        for type_, subscription in tuple(unfinished.items()) if alone else self._subscriptions.items():
            if type_ not in unfinished:
                continue
            response = subscription.send(now)
            if response is not None:
                self._idle = False
                if type_ in _WARMING:
                    self._expect(type_, response.resources, target)
                sent.append(response)
            elif subscription.done:
                del unfinished[type_]
        return tuple(sent)

    # -------------------------------------------------------------------------------------------------- what is known

    def whole(self, type_: Type) -> tuple[Resource, ...]:
        """All that the client has of the type once it has taken in what is in flight, by name.

        For a variant whose responses say everything. Without what the client refuses: of that the last good one. What
        it has from before this stream, and was not sent on it, is not known here, and not in it.
        """
        subscription = self._subscriptions[type_]
        known = subscription.has.resources()
        if subscription.flight is not None:
            known.update((r.name, r) for r in subscription.flight.resources if subscription.wants(r.name))
            for name in subscription.flight.removed:
                known.pop(name, None)
        return tuple(found for _, found in sorted(known.items()) if isinstance(found, Resource))

    @property
    def deadline(self) -> float | None:
        """When `to_send` and `stalled` must be looked at again although nothing happened; None: never."""
        times = [sent_at + STALLED_AFTER for sent_at in self._unanswered()]
        if self._awaited and self._patience is not None:
            times.append(self._patience)
        if (introduced := self._introduction_ends) is not None:
            times.append(introduced)
        return min([time for time in times if time > self._now], default=None) if times else None

    @property
    def started(self) -> bool:
        """Something was offered; nothing is sent before."""
        return self._target is not None or self._pending is not None

    @property
    def rests(self) -> bool:
        """Nothing goes out, whatever the time, before something is offered or asked for."""
        return self._idle and self._pending is None and not self._asked

    @property
    def target(self) -> int:
        """The newest Mesh revision that was offered."""
        return self._pending[1] if self._pending is not None else self._revision

    @property
    def stalled(self) -> bool:
        """A response is unanswered for STALLED_AFTER. What depends on its ACK is withheld until that comes."""
        return any(sent_at + STALLED_AFTER <= self._now for sent_at in self._unanswered())

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """One for each NACK of which a name is still refused: not ACKed since, still wanted, and not changed back."""
        if self._refusals is None:
            self._refusals = tuple(self._refused())
        return self._refusals

    def _refused(self) -> Iterator[Refusal]:
        for subscription in self._subscriptions.values():
            if not subscription.refused:
                continue
            names: dict[Nack, list[str]] = {}
            for name, refused in subscription.refused.items():
                names.setdefault(refused.nack, []).append(name)
            for nack, refused_names in names.items():
                suspects = sorted(_suspects(subscription, refused_names), key=lambda s: (-s.mod_revision, s.manifest))
                names_ = tuple(sorted(refused_names))
                yield Refusal(subscription.type, names_, nack.text, tuple(suspects), nack.revision)

    @property
    def listening(self) -> bool:
        """The client had all listeners of a target once that it asked for, with what they warm on, and its identity.

        One of them is one by which its application is reached, if there are such. Who asks for listeners by name has
        its identity from elsewhere.
        What this stream does not carry is taken for granted: it may come from another replica.
        """
        return self._listening

    @property
    def resumed(self) -> bool:
        """The client has resources from before this stream."""
        return self._resumed_at is not None

    @property
    def versions(self) -> Mapping[Type, str]:
        """The version of the whole set that the client has ACKed last, by type."""
        return MappingProxyType(self._versions)

    # ------------------------------------------------------------------------------------------------------- requests

    def _subscribe(self, subscription: Subscription, request: Request, *, first: bool) -> None:
        # One string for all streams: each has said the name in a message of its own.
        names = dict.fromkeys(intern(name) for name in request.subscribe if name != WILDCARD)
        legacy = first and not request.subscribe and request.type in WILDCARDS
        wildcard = (legacy or WILDCARD in request.subscribe) and not subscription.wildcard
        initial = request.initial if first else {}
        if initial:
            if self._resumed_at is None:
                self._resumed_at = self._now
            for name, version in initial.items():
                if wildcard or name in names:
                    subscription.has.put(intern(name), Told(intern(version)))
        if first:
            subscription.introduce(names)
        for name in names:
            if name not in initial:
                subscription.subscribe(name)
            self._awaited.pop((request.type, name), None)
        if wildcard:
            subscription.begin_wildcard()
            self._awaited = {key: by for key, by in self._awaited.items() if key[0] is not request.type}
        if first:
            subscription.untold = request.resumed and not initial
            subscription.pay()
        if self._target is not None and (wildcard or initial):
            subscription.survey()
            if request.type is Type.ROUTE and (hosts := self._subscriptions.get(Type.VIRTUAL_HOST)) is not None:
                hosts.survey()  # if it has asked for these first

    def _answered(self, subscription: Subscription, response: Response, error: str | None) -> None:
        subscription.flight = None
        if subscription.type in _WARMING:
            self._patience = self._now + PATIENCE
        if error is None:
            subscription.accept(response.resources, response.removed)
            return
        for name in subscription.refuse(response, Nack(error, self._revision)):
            self._expect_no_more(subscription.type, name)

    # ------------------------------------------------------------------------------------------------------- sequence

    def _proceed(self) -> None:
        """Go as far as the ACKs allow; at the end of the sequence begin the next one."""
        while True:
            if self._target is not None and not self._idle:
                if not self._is_done():
                    return
                self._settle(self._target)
                self._idle = True
            if self._pending is None:
                return
            self._idle = False
            (self._offered, self._revision), self._pending = self._pending, None
            self._begin(self._offered if self._discovers else virtual_hosts.whole(self._offered))

    def _begin(self, snapshot: Snapshot) -> None:
        before, self._target = self._target, snapshot
        if before is None:
            for type_, subscription in self._subscriptions.items():
                self._unsettled[type_] = None
                subscription.target = snapshot.set_of(type_)
                subscription.survey()
            return
        for type_, names in snapshot.changed_since(before):
            if (concerned := self._subscriptions.get(type_)) is not None:
                self._unsettled[type_] = None
                concerned.follow(snapshot.set_of(type_), names)

    def _is_done(self) -> bool:
        """Release what may go next. True: there is nothing more, and all of it was answered."""
        if not self._is_quiet(_MADE):
            return False
        for subscription in self._unfinished.values():
            if not subscription.done:
                break
        else:  # as nearly always after an ACK
            return True
        for subscription in self._among(SWITCHED):
            subscription.switch()
        for types in _REMOVED:
            going = [subscription for subscription in self._among(types) if subscription.to_remove]
            if not going:
                continue
            if not self._is_quiet(_ALL):
                return False
            if types is not SWITCHED:
                if any(subscription.refused for subscription in self._of(SWITCHED)):
                    return True  # the last good listeners and routes keep what they point to
                if self._introduction_ends is not None and self._introduction_ends > self._now:
                    return False
            for subscription in going:
                subscription.remove()
        return self._is_quiet(_ALL)

    def _is_quiet(self, types: Container[Type]) -> bool:
        for type_, subscription in self._unfinished.items():
            if type_ in types and not subscription.quiet:
                return False
        return not self._is_waiting()

    def _among(self, types: Container[Type]) -> Iterator[Subscription]:
        """Those of these types that are unfinished."""
        return (subscription for type_, subscription in self._unfinished.items() if type_ in types)

    def _is_waiting(self) -> bool:
        """The client has yet to ask for what something that it was sent warms on."""
        if self._awaited and self._patience is not None and self._patience <= self._now:
            self._awaited.clear()
        return bool(self._awaited)

    @property
    def _introduction_ends(self) -> float | None:
        """Until when a client that came with resources may have listeners and routes of which it has not said so yet.

        None: it has said so, or it has nothing from before.
        """
        if self._resumed_at is None or all(subscription.heard for subscription in self._of(SWITCHED)):
            return None
        return self._resumed_at + PATIENCE

    def _expect(self, type_: Type, sent: Iterable[Resource], target: Snapshot) -> None:
        """Send what Envoy waits for and does not ask for again.

        It waits 15 s for the load assignment of a changed Cluster, and for ever for virtual hosts.
        """
        for resource in sent:
            for warm_type, warm_name in resource.warms:
                subscription = self._subscriptions.get(warm_type)
                if subscription is None:
                    continue
                if warm_type is Type.ENDPOINT:
                    subscription.refresh(warm_name)
                elif warm_type is Type.VIRTUAL_HOST:
                    for host in virtual_hosts.of_route(resource.name, target.of_type(warm_type)):
                        subscription.refresh(host)
                if not subscription.wants(warm_name):
                    self._awaited.setdefault((warm_type, warm_name), set()).add((type_, resource.name))
                    self._patience = None

    def _expect_no_more(self, type_: Type, name: str) -> None:
        for key, needed_for in list(self._awaited.items()):
            needed_for.discard((type_, name))
            if not needed_for:
                del self._awaited[key]

    def _settle(self, target: Snapshot) -> None:
        self.acked = self._revision
        for type_ in tuple(self._unsettled):
            subscription = self._subscriptions[type_]
            subscription.has.share(subscription.target)
            if subscription.heard and not (subscription.refused or subscription.to_remove):
                del self._unsettled[type_]
                self._versions[type_] = self._offered.set_of(type_).version
                if type_ is Type.ROUTE and not self._discovers:
                    self._versions[Type.VIRTUAL_HOST] = self._offered.set_of(Type.VIRTUAL_HOST).version
        self._listening = self._listening or self._is_listening(target)

    def _is_listening(self, target: Snapshot) -> bool:
        has = {type_: subscription.has for type_, subscription in self._subscriptions.items()}
        if Type.LISTENER not in has:
            return False
        asked = self._subscriptions[Type.LISTENER]
        there = target.of_type(Type.LISTENER)
        listeners = {name: listener for name, listener in there.items() if asked.wants(name)}
        return (
            bool(listeners)
            and (not asked.wildcard or Type.SECRET not in has or has[Type.SECRET].get(IDENTITY) is not None)
            and (any(ask.serves for ask in listeners.values()) or not any(one.serves for one in there.values()))
            and all(has[Type.LISTENER].get(name) is listener for name, listener in listeners.items())
            and all(_is_warm(listener, has) for listener in listeners.values())
        )

    def _of(self, types: Container[Type]) -> Iterator[Subscription]:
        return (subscription for type_, subscription in self._subscriptions.items() if type_ in types)

    def _unanswered(self) -> list[float]:
        """When each response that is in flight went out."""
        return [s.sent_at for s in self._unfinished.values() if s.flight is not None]


def _is_warm(resource: Resource | Told | None, has: Mapping[Type, Held]) -> bool:
    """The client has it, what that waits for, and so on. What it had before this stream waits for nothing."""
    if not isinstance(resource, Resource):
        return resource is not None
    return all(type_ not in has or _is_warm(has[type_].get(name), has) for type_, name in resource.warms)


def _suspects(subscription: Subscription, names: Iterable[str]) -> set[Source]:
    suspects: set[Source] = set()
    for name in names:
        resource, held = subscription.refused[name].resource, subscription.has.get(name)
        if resource is not None:
            suspects.update(set(resource.sources).difference(held.sources if held is not None else ()))
    return suspects


def _names(types: Iterable[Type]) -> str:
    return " and ".join(type_.name for type_ in types)


def _check(request: Request, subscription: Subscription) -> None:
    asked = subscription.count + len(request.subscribe)
    if max(asked, len(request.initial)) > MOST_NAMES:
        raise ProtocolError(
            f"more than {MOST_NAMES} {request.type.name} names on one stream",
            hint="ask for fewer names, or for all with the wildcard",
        )
    if not all(0 < len(name) <= LONGEST_NAME for names in (request.subscribe, request.initial) for name in names):
        raise ProtocolError(f"a {request.type.name} name is empty or longer than {LONGEST_NAME} characters")
