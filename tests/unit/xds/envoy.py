"""An Envoy in miniature: what it asks for, when it answers, and what breaks in it if it is told things out of order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from smc.xds.snapshot import Resource, Type
from smc.xds.stream import Request
from smc.xds.subscription import Response
from smc.xds.virtual_hosts import is_route
from tests.unit.xds.resources import (
    BAD,
    CLUSTER,
    ENDPOINT,
    LISTENER,
    ROUTE,
    SECRET,
    VIRTUAL_HOST,
    clusters_of,
    domains_of,
)


class Broken(AssertionError):
    """A request would have failed."""


@dataclass
class Envoy:
    """Survives its streams: `connect` begins one, `requests` is what it has to say on it.

    As seen of Envoy: a Cluster that is new or changed warms until its assignment and secrets arrive, anew for a
    changed one, and until then the answer to Clusters is withheld. Listeners are asked for once no Cluster warms; a
    listener that is new or changed warms until its routes are there, and the old one serves meanwhile. Of Clusters and
    listeners in one response the good ones are taken and the bad ones named; of other types the first bad one ends it.

    Virtual hosts are asked for once, all of them, with the first route that discovers some. Those of a route that is
    not there are let go; a route waits for the first of its own, and loses all when it is given up. They are taken all
    or none.
    """

    has: dict[Type, dict[str, Resource]] = field(default_factory=lambda: {type_: {} for type_ in Type})
    refused: dict[Type, dict[str, str]] = field(default_factory=lambda: {type_: {} for type_ in Type})
    """Name -> version."""
    requests: deque[Request] = field(default_factory=deque)
    told: int = 0
    """Resources on this stream."""

    def __post_init__(self) -> None:
        self._names: dict[Type, dict[str, None]] = {type_: {} for type_ in Type}
        self._warming: dict[str, set[tuple[Type, str]]] = {}
        self._withheld: deque[Request] = deque()
        self._listens = False
        self._discovers = False
        self._let_go: dict[str, str] = {}
        """Name -> version of virtual hosts that it was sent, says that it has, and has not."""
        self._lacks: set[str] = set()
        """Clusters that it never had in a form that it could take: nobody can help what is sent there."""

    def connect(self) -> None:
        self.requests.clear()
        self._withheld.clear()
        self._warming.clear()
        self.told = 0
        for refused in self.refused.values():
            refused.clear()
        late = (LISTENER, ROUTE, *((VIRTUAL_HOST,) if self._discovers else ())) if self._listens else ()
        for type_ in (CLUSTER, ENDPOINT, SECRET, *late):
            names = tuple(self._names[type_])
            if names or type_ in (CLUSTER, LISTENER, VIRTUAL_HOST):
                had = {name: resource.version for name, resource in self.has[type_].items()}
                if type_ is VIRTUAL_HOST:
                    had |= self._let_go
                self.requests.append(Request(type_, names, initial=had))

    def hear(self, response: Response) -> None:
        """Take in a response, and say what follows from it.

        Raises:
            Broken: traffic would have failed.
        """
        self.told += len(response.resources)
        type_, errors = response.type, []
        if type_ is VIRTUAL_HOST:
            self._hear_hosts(response)
            self._check()
            return
        for resource in response.resources:
            if BAD.encode() in resource.body:
                self.refused[type_][resource.name] = resource.version
                if type_ is CLUSTER:
                    self._lacks.add(resource.name)
                errors.append(f"{resource.name}: it is bad")
                if type_ not in (CLUSTER, LISTENER):
                    errors = ["something is bad"]  # and the rest is dropped
                    break
            else:
                had = self.has[type_].get(resource.name)
                if had is None or had.version != resource.version:  # else it is the last good one, once more
                    self.refused[type_].pop(resource.name, None)
                self._take(resource)
        for name in response.removed:
            self.refused[type_].pop(name, None)
            self._drop(type_, name)
        error = ", ".join(errors) if errors else None
        answer = Request(type_, nonce=response.nonce, error=error)
        (self._withheld if type_ is CLUSTER else self.requests).append(answer)
        self._settle()
        self._check()

    def _hear_hosts(self, response: Response) -> None:
        after = {name: host for name, host in self.has[VIRTUAL_HOST].items() if name not in response.removed}
        after |= {host.name: host for host in response.resources if self._is_discovering(_route_of(host.name))}
        domains = [(_route_of(name), domain) for name, host in after.items() for domain in domains_of(host)]
        bad = [host.name for host in response.resources if BAD.encode() in host.body]
        if bad:
            self.refused[VIRTUAL_HOST] |= {h.name: h.version for h in response.resources if h.name in bad}
            self.requests.append(Request(VIRTUAL_HOST, nonce=response.nonce, error="something is bad"))
            return
        if len(set(domains)) < len(domains):
            raise Broken(f"a domain occurs twice in {sorted(after)}: all are refused")
        for host in response.resources:
            cold = self._warming.keys() & set(clusters_of(host))
            if cold and host.name in self.has[VIRTUAL_HOST]:
                raise Broken(f"virtual host {host.name} moves traffic to {sorted(cold)} while these warm: 503")
            self.refused[VIRTUAL_HOST].pop(host.name, None)
            self._let_go.pop(host.name, None)
            if not self._is_discovering(_route_of(host.name)):
                self._let_go[host.name] = host.version
        for name in response.removed:
            self.refused[VIRTUAL_HOST].pop(name, None)
            self._let_go.pop(name, None)
        self.has[VIRTUAL_HOST] = after
        self.requests.append(Request(VIRTUAL_HOST, nonce=response.nonce))

    def _is_discovering(self, route: str) -> bool:
        found = self.has[ROUTE].get(route)
        return found is not None and is_route(found)

    @property
    def waiting(self) -> list[str]:
        """Routes that wait for the first of their virtual hosts."""
        there = {_route_of(name) for name in self.has[VIRTUAL_HOST]}
        return [name for name in self.has[ROUTE] if self._is_discovering(name) and name not in there]

    def lose(self, type_: Type, name: str) -> None:
        """It has this no more, and nobody could tell the server that it had it."""
        if type_ is CLUSTER:
            self._lacks.add(name)
        self._drop(type_, name)

    def patience_ends(self) -> None:
        """15 s: what still warms is used as it is."""
        self._warming.clear()
        self._settle()

    @property
    def wanted(self) -> dict[Type, dict[str, None]]:
        return self._names

    def _take(self, resource: Resource) -> None:
        type_, name = resource.type, resource.name
        before = self.has[type_].get(name)
        if type_ in (ENDPOINT, SECRET, ROUTE) and name not in self._names[type_]:
            return
        if type_ is ROUTE and before is not None:
            cold = self._warming.keys() & set(clusters_of(resource)) - set(clusters_of(before))
            if cold:
                raise Broken(f"route {name} moves traffic to {sorted(cold)} while these warm: 503")
        if type_ is ROUTE and before is not None and is_route(before) and not is_route(resource):
            raise Broken(f"route {name} is told to discover no more, which Envoy does not survive")
        self.has[type_][name] = resource
        if type_ is ROUTE and is_route(resource) and not self._discovers:
            self._discovers = True
            self.requests.append(Request(VIRTUAL_HOST))
        if type_ is CLUSTER:
            self._lacks.discard(name)
        if type_ is CLUSTER and (before is None or before.version != resource.version):
            self._warming[name] = {
                key for key in resource.warms if key[0] is ENDPOINT or key[1] not in self.has[key[0]]
            }
            self._ask(resource.warms)
        elif type_ is LISTENER:
            self._ask(resource.warms)
            self._give_up(ROUTE)
        self._warmed(type_, name)

    def _drop(self, type_: Type, name: str) -> None:
        if type_ is ROUTE:
            raise Broken(f"route {name} is removed, and the listener that waits for it waits for ever")
        had = self.has[type_].pop(name, None)
        self._warmed(type_, name)
        if had is not None and type_ is CLUSTER:
            self._warming.pop(name, None)
            self._give_up(ENDPOINT)
        elif had is not None and type_ is LISTENER:
            self._give_up(ROUTE)

    def _ask(self, keys: tuple[tuple[Type, str], ...]) -> None:
        for type_, name in keys:
            if name not in self._names[type_]:
                self._names[type_][name] = None
                self.requests.append(Request(type_, (name,)))

    def _give_up(self, type_: Type) -> None:
        """What nothing names any more."""
        owner = CLUSTER if type_ is ENDPOINT else LISTENER
        named = {name for found in self.has[owner].values() for of, name in found.warms if of is type_}
        if gone := tuple(name for name in self._names[type_] if name not in named):
            for name in gone:
                del self._names[type_][name]
                self.has[type_].pop(name, None)
                self.refused[type_].pop(name, None)
                if type_ is ROUTE:
                    self._give_up_hosts(name)
            self.requests.append(Request(type_, unsubscribe=gone))

    def _give_up_hosts(self, route: str) -> None:
        for name in [name for name in self.has[VIRTUAL_HOST] if _route_of(name) == route]:
            self._let_go[name] = self.has[VIRTUAL_HOST].pop(name).version

    def _warmed(self, type_: Type, name: str) -> None:
        for missing in self._warming.values():
            missing.discard((type_, name))

    def _settle(self) -> None:
        self._warming = {name: missing for name, missing in self._warming.items() if missing}
        if not self._warming:
            self.requests.extend(self._withheld)
            self._withheld.clear()
            if not self._listens:
                self._listens = True
                self.requests.append(Request(LISTENER))

    def _check(self) -> None:
        for name, found in (*self.has[ROUTE].items(), *self.has[VIRTUAL_HOST].items()):
            for cluster in clusters_of(found):
                if cluster not in self.has[CLUSTER] and cluster not in self._lacks:
                    raise Broken(f"{found.type.name} {name} sends traffic to {cluster}, which is not there: 503")


def _route_of(host: str) -> str:
    return host.rpartition("/")[0]
