"""What a client wants, has and is being sent of one resource type, whatever the variant of the protocol.

One response of a type is in flight at a time: what comes due meanwhile goes in the next one, so a client that is slow
to answer costs no memory, and a refusal is of known names. Envoy withholds answers of Clusters while they warm, never
those of the types that they warm on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

from smc.xds import virtual_hosts
from smc.xds.held import Held
from smc.xds.snapshot import EMPTY, Resource, ResourceSet, Type

_PARTIAL = frozenset({Type.CLUSTER, Type.LISTENER})
"""Of these Envoy applies what is good in a response that it refuses; of the others it may have dropped the rest."""

SWITCHED = frozenset({Type.LISTENER, Type.ROUTE, Type.VIRTUAL_HOST})
"""What moves traffic, and so is sent only after what it moves traffic to."""

_SEARCHED = 16 * 1024
"""How much of a refusal's text is searched for names, in characters."""

LONGEST_TEXT = 4_096
"""What is kept of a refusal's text, in characters."""

_WORD = re.compile(r"[\w|/.\-]+")
"""What a name of ours looks like in a text."""


_FIRST: WeakValueDictionary[int, frozenset[str]] = WeakValueDictionary()
"""Sets of names that streams have begun with, by their hashes: nearly all begin with the same."""


class Response(NamedTuple):
    """What a client is told of one type, whatever the variant of the protocol."""

    type: Type
    resources: tuple[Resource, ...]
    removed: tuple[str, ...]
    version: str
    """Of the whole set of the type in the target."""
    nonce: str


@dataclass(frozen=True, slots=True, eq=False)
class Nack:
    """One refusal, shared by all the names in it."""

    text: str
    revision: int


@dataclass(frozen=True, slots=True)
class Refused:
    nack: Nack
    resource: Resource | None
    """None: it is the removal that was refused."""


class Subscription:
    """The state of one type on one stream."""

    def __init__(
        self, type_: Type, unfinished: MutableMapping[Type, Subscription], routes: Subscription | None = None
    ) -> None:
        """
        Args:
            unfinished: where it puts itself when there may be something to send, so that nobody need ask the others. It
                stays there at least until it is `done`.
            routes: those that virtual hosts are a part of: who has not asked for a route wants none of its own.
        """
        self.type = type_
        self.target = EMPTY
        """What the proxy should have of the type."""
        self._unfinished = unfinished
        self._routes = routes
        self.heard = False
        """The client has asked for this type."""
        self.untold = False
        """It has some of them from before this stream, and did not say which."""
        self.wildcard = False
        self._first: frozenset[str] = frozenset()
        """Asked for by name, whether they exist or not, in the first request; shared by all who have begun alike."""
        self._later: dict[str, None] = {}
        """Asked for since."""
        self.has = Held()
        self.refused: dict[str, Refused] = {}
        self.flight: Response | None = None
        """What it has not answered yet."""
        self.sent_at = 0.0
        """When that went out."""
        self.due: dict[str, None] = {}
        """To be answered from the target in the next response; ordered."""
        self.to_switch: dict[str, None] = {}
        """To be changed once what it points to is there."""
        self.to_remove: dict[str, None] = {}
        """To be removed once nothing points to it."""
        self._apart: list[tuple[str, ...]] = []
        """Parts of refused responses, each to be sent by itself to find out which name is refused."""
        self._owed: dict[str, None] = {}
        """To be sent if the client's first request names them, even if it has them."""
        self._greeted = False
        self._nonces = 0

    # ---------------------------------------------------------------------------------------------------- what it wants

    def wants(self, name: str) -> bool:
        if name in self._first or name in self._later:
            return True
        return self.wildcard and (self._routes is None or self._routes.wants(virtual_hosts.route_of(name)))

    def asked(self, name: str) -> bool:
        """By name."""
        return name in self._first or name in self._later

    @property
    def count(self) -> int:
        """How many names were asked for."""
        return len(self._first) + len(self._later)

    def introduce(self, names: Iterable[str]) -> None:
        """The names of the first request, which are yet to be answered."""
        first = frozenset(names)
        known = _FIRST.setdefault(hash(first), first)
        self._first = known if known == first else first

    def subscribe(self, name: str) -> None:
        """Answer a name that the client asks for, unless the answer waits for its turn already."""
        if name not in self._first:
            self._later[name] = None
        if name not in self.to_switch and name not in self.to_remove:
            self._owe((name,))

    def pay(self) -> None:
        """Answer what was owed before the client first asked for anything."""
        self._owe(filter(self.wants, self._owed))
        self._owed.clear()

    def unsubscribe(self, name: str) -> None:
        """A name that the wildcard still covers is answered: only so does the client learn whether it does."""
        if not self.asked(name):
            return
        if name in self._first:
            self._later, self._first = dict.fromkeys((*self._first, *self._later)), frozenset()
        del self._later[name]
        if self.wildcard:
            self._owe((name,))
        else:
            self._forget(name)

    def begin_wildcard(self) -> None:
        """Ask for everything. The first time that is answered even if there is nothing."""
        self.wildcard = True
        self._unfinished[self.type] = self

    def end_wildcard(self) -> None:
        self.wildcard = False
        self.let_go()

    def let_go(self) -> None:
        """Forget what is not wanted any more, as the client does."""
        for name in {*self.has.resources(), *self.due, *self.to_switch, *self.to_remove, *self.refused}:
            if not self.wants(name):
                self._forget(name)

    def _forget(self, name: str) -> None:
        self.has.put(name, None)
        for names in (self.due, self.to_switch, self.to_remove, self.refused):
            names.pop(name, None)

    def wanted(self, name: str) -> Resource | None:
        """What the client should have under `name`; None: it should have nothing.

        A RouteConfiguration that somebody asks for always exists, if need be without a virtual host: Envoy ignores
        its removal, and a listener that waits for it would wait for ever. One that discovers its virtual hosts stays as
        it is, and loses these.
        """
        resource = self.target.resources.get(name)
        if resource is None and self.type is Type.ROUTE and self.asked(name):
            held = self.has.get(name)
            if held is not None and held.version == (discovering := virtual_hosts.route(name)).version:
                return discovering
            return empty_route(name)
        return resource

    # ----------------------------------------------------------------------------------------------- what is sent when

    def follow(self, target: ResourceSet, changed: Iterable[str]) -> None:
        """Plan for another target, which differs from the one before in what is `changed`."""
        self.target = target
        for name in changed:
            if self.wants(name):
                self.plan(name)

    def survey(self) -> None:
        """Plan for everything that the client wants."""
        has = self.has.resources()
        for name in {**self.target.resources, **has} if self.wildcard else has:
            if self.wants(name):
                self.plan(name)

    def plan(self, name: str) -> None:
        """Decide when the client is told how `name` differs from what it has, if it does."""
        self._unfinished[self.type] = self
        if self.to_switch or self.to_remove:
            self.to_switch.pop(name, None)
            self.to_remove.pop(name, None)
        wanted, held, refused = self.wanted(name), self.has.get(name), self.refused.get(name)
        if wanted is None:
            self.refused.pop(name, None)
            # Something may wait for an answer, or it may have an older one still.
            if held is not None or (refused is not None and (self.asked(name) or self.untold)):
                # A virtual host goes with the change by which another one takes its domains: no two may have the same.
                goes_early = self.type is Type.VIRTUAL_HOST and virtual_hosts.has_route(name, self.target.resources)
                (self.to_switch if goes_early else self.to_remove)[name] = None
        elif held is not None and held.version == wanted.version:
            self.has.put(name, wanted)
            self.refused.pop(name, None)
        elif refused is not None and _refuses(refused, wanted):
            self.refused[name] = Refused(refused.nack, wanted)  # the same bytes, perhaps from other manifests
        elif name in self.due:
            pass
        elif name not in self.target.resources:
            self.to_remove[name] = None
        elif self.type in SWITCHED:
            self.to_switch[name] = None
        else:
            self.due[name] = None

    def switch(self) -> None:
        self.due.update(self.to_switch)
        self.to_switch.clear()

    def remove(self) -> None:
        self.due.update(self.to_remove)
        self.to_remove.clear()

    def refresh(self, name: str) -> None:
        """Send `name` again if it is wanted, and if the client is yet to ask for the type, then when it does."""
        if self.wants(name):
            self.to_switch.pop(name, None)
            self.to_remove.pop(name, None)
            self._owe((name,))
        elif not self.heard:
            self._owed[name] = None

    def _owe(self, names: Iterable[str]) -> None:
        self.due.update(dict.fromkeys(names))
        self._unfinished[self.type] = self

    @property
    def quiet(self) -> bool:
        """Nothing is on its way, and nothing is about to be."""
        return not (self.due or self._apart or self.flight)

    @property
    def done(self) -> bool:
        """Quiet, and nothing waits for its turn."""
        return not (self.due or self._apart or self.flight or self.to_switch or self.to_remove)

    def send(self, now: float) -> Response | None:
        """What goes out next, which is in flight from now on; None while there is nothing, or one is in flight."""
        if self.flight is not None:
            return None
        while self.due or self._apart:
            names: Iterable[str]
            if self._apart:
                names = filter(self.wants, self._apart.pop())
            else:
                names, self.due = self.due, {}
            resources, removed = self._compose(names)
            if resources or removed:
                return self._launch(resources, removed, now)
        if self.wildcard and not self._greeted and self.type in _PARTIAL and not (self.to_switch or self.to_remove):
            return self._launch((), (), now)
        return None

    def _compose(self, names: Iterable[str]) -> tuple[list[Resource], list[str]]:
        """What is refused is not sent again: whoever asks gets the last good one, or nothing if its body is unknown."""
        resources: list[Resource] = []
        removed: list[str] = []
        for name in names:
            wanted = self.wanted(name)
            if wanted is None:
                removed.append(name)
            elif not (self.refused and _refuses(self.refused.get(name), wanted)):
                resources.append(wanted)
            elif isinstance(held := self.has.get(name), Resource):
                resources.append(held)
        return resources, removed

    def _launch(self, resources: Iterable[Resource], removed: Iterable[str], now: float) -> Response:
        self._greeted = True
        self._nonces += 1
        self.flight = Response(self.type, tuple(resources), tuple(removed), self.target.version, str(self._nonces))
        self.sent_at = now
        return self.flight

    # --------------------------------------------------------------------------------------------------- what came back

    def accept(self, resources: Iterable[Resource], removed: Iterable[str]) -> None:
        """The client has taken in a response that says so, or this part of it."""
        for name in removed:
            self.has.put(name, None)
            self.refused.pop(name, None)
        for resource in resources:
            name = resource.name
            if self.wants(name):
                if self.refused and self.has.get(name) is not resource:  # else it is the last good one, sent once more
                    self.refused.pop(name, None)
                self.has.put(name, resource)

    def refuse(self, response: Response, nack: Nack) -> tuple[str, ...]:
        """The names that the client refuses. Those of which that is not certain are tried again by themselves."""
        resources = {resource.name: resource for resource in response.resources}
        names = *response.removed, *resources  # in their parts, domains are free before they are taken
        blamed = accused(nack.text, names) if len(names) > 1 else names
        nack = Nack(nack.text[:LONGEST_TEXT], nack.revision)
        if names and not blamed:
            half = len(names) // 2
            self._apart += [names[half:], names[:half]]
            return ()
        good = dict.fromkeys(names)
        for name in blamed:
            del good[name]
        if self.type in _PARTIAL:
            self.accept(
                (resource for resource in response.resources if resource.name in good),
                (name for name in response.removed if name in good),
            )
        elif good:
            self._apart.append(tuple(good))
        for name in filter(self.wants, blamed):
            self.refused[name] = Refused(nack, resources.get(name))
        return tuple(blamed)


def _refuses(refused: Refused | None, resource: Resource) -> bool:
    return refused is not None and refused.resource is not None and refused.resource.version == resource.version


def accused(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that a refusal's text blames: followed by a colon, as Envoy lists them, or else mentioned.

    The text is read once, however many names there are: who writes it may choose both.
    """
    mentioned, listed = set(), set()
    for match in _WORD.finditer(text[:_SEARCHED]):
        word = match[0].rstrip(".")  # the end of a sentence
        mentioned.add(word)
        if text.startswith(":", match.start() + len(word)):
            listed.add(word)
    return tuple(name for name in names if name in listed) or tuple(name for name in names if name in mentioned)


def empty_route(name: str) -> Resource:
    """A RouteConfiguration that routes nothing."""
    return Resource(Type.ROUTE, name, virtual_hosts.named(name))
