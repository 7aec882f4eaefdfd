"""Both sides of a stream in words, so that a test reads as what is said on the wire."""

from __future__ import annotations

from collections.abc import Mapping

from smc.xds.snapshot import Resource, Type
from smc.xds.stream import WILDCARDS, Request, Stream
from smc.xds.subscription import Response, empty_route
from smc.xds.virtual_hosts import is_route
from tests.unit.xds.resources import clusters_of, layered, mark_of


class Conversation:
    """What the server says in answer is a list of lines: the type, then `name=body` or `-name` for what is removed."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.now = 100.0
        self._last: dict[Type, Response] = {}
        self._resources: tuple[Resource, ...] = ()
        self._revision = 0

    def offer(self, *resources: Resource, revision: int | None = None) -> list[str]:
        """Everything that there should be."""
        self._resources = resources
        self._revision = self._revision + 1 if revision is None else revision
        self.stream.offer(layered(resources), self._revision)
        return self.hear()

    def hear(self) -> list[str]:
        responses = self.stream.to_send(self.now)
        self._last.update({response.type: response for response in responses})
        return [_line(response) for response in responses]

    def wait(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.hear()

    def ask(
        self,
        type_: Type,
        *names: str,
        drop: tuple[str, ...] = (),
        initial: Mapping[str, str] | None = None,
        nonce: str = "",
    ) -> list[str]:
        return self._say(Request(type_, names, drop, initial or {}, nonce))

    def ack(self, *types: Type) -> list[str]:
        """ACK the last response of each type; what is said after the last ACK, or between, is returned."""
        return [line for type_ in types for line in self._say(Request(type_, nonce=self._last[type_].nonce))]

    def nack(self, type_: Type, text: str) -> list[str]:
        return self._say(Request(type_, nonce=self._last[type_].nonce, error=text))

    def last(self, type_: Type) -> Response:
        return self._last[type_]

    def ack_all(self) -> list[str]:
        """Say yes to everything until the server has no more to say."""
        lines: list[str] = []
        while pending := self.unanswered():
            for type_ in pending:
                lines += self.ack(type_)
        return lines

    def unanswered(self) -> list[Type]:
        return [type_ for type_, s in self.stream._subscriptions.items() if s.flight is not None]

    def _say(self, request: Request) -> list[str]:
        self.stream.receive(request, self.now)
        return self.hear()


def running(*resources: Resource) -> Conversation:
    """An Envoy that has all of `resources`, the way it comes to have them, and whose server has nothing more to say."""
    talk = Conversation()
    talk.ask(Type.CLUSTER)
    talk.offer(*resources)
    talk.ack_all()
    named = {(found.type, found.name) for found in resources}.union(*(found.warms for found in resources))
    for type_ in (Type.ENDPOINT, Type.SECRET, Type.LISTENER, Type.ROUTE, Type.VIRTUAL_HOST):
        names = sorted(name for of, name in named if of is type_)
        if type_ is not Type.VIRTUAL_HOST or names:
            talk.ask(type_, *(() if type_ in WILDCARDS else names))
        talk.ack_all()
    assert talk.wait(60) == []
    return talk


def _line(response: Response) -> str:
    said = [f"{resource.name}={_said(resource)}" for resource in response.resources]
    return " ".join([response.type.name, *said, *(f"-{name}" for name in response.removed)])


def _said(resource: Resource) -> str:
    if resource.type is Type.VIRTUAL_HOST:
        return ":".join((mark_of(resource), *clusters_of(resource)))
    if resource.type is Type.ROUTE and resource.body == empty_route(resource.name).body:
        return "empty"
    return "discovering" if is_route(resource) else resource.body.decode()
