"""Where requests to each service port go, by the Splits and by what their backends are in the mesh.

A backend gets its share of a port's traffic if it is a service that has the port and somebody ready behind it; the
shares of the others grow in proportion. If no backend is left, the root's own endpoints get all of it, as without the
split. A split is not followed further: a backend's traffic goes to its own endpoints.

A root may have several splits that are for some requests each, and one for the others. One that has no backend left is
as if it were not there.

A port that speaks TCP is split by connection: conditions on requests do not count there, and a backend's port has to
speak TCP too, as no HTTP port of a root may lead to a backend's TCP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from smc.manifests import Rules
from smc.mesh.compiled import Compiled, Scope
from smc.mesh.problems import Problems
from smc.mesh.served import Served, by_name
from smc.mesh.tables import Index, Table, Tables, kept
from smc.model import Branch, Destination, Name, Problem, Protocol, Severity, Split, Target, Upstream

Destinations = tuple[Destination, ...]
"""Of one service, by its ports."""

WHOLE = 1000
"""The weight of an only target."""

_ROOT = "spec.service"


@dataclass(slots=True)
class Splits(Tables):
    splits: Table[Name, tuple[Split, ...]] = field(default_factory=Table)
    """root -> the splits that count for it, in the order in which a request tries them"""
    destinations: Table[Name, Destinations] = field(default_factory=Table)
    """For every service, in the order of the services."""
    unsplit: Table[Name, Destinations] = field(default_factory=Table)
    """The same as if there were no split, in no order."""

    offers: Index[Name, Scope] = field(default_factory=Index)
    """root -> whose rules split it"""
    roots: Index[Name, Name] = field(default_factory=Index)
    """backend -> the roots of the splits that count and name it"""

    by_manifest: Index[str, Name] = field(default_factory=Index)
    """manifest -> the roots with a split that counts and was compiled from it"""

    def update(self, compiled: Compiled, served: Served, problems: Problems) -> None:
        self._choose(compiled, problems)
        touched = dict.fromkeys((*self.splits.changed, *served.upstreams.changed))
        for backend in dict.fromkeys((*touched, *served.assignments.changed)):
            touched.update(dict.fromkeys(self.roots.of(backend)))
        for name in touched:
            self._direct(name, served, problems)
        self.destinations.sort(by_name)

    def _choose(self, compiled: Compiled, problems: Problems) -> None:
        """Of several splits of one root for every request, from different policy APIs, the first API's counts."""
        roots: dict[Name, None] = {}
        splits: dict[Scope, dict[Name, tuple[Split, ...]]] = {}
        for scope in compiled.rules.changed:
            was, now = compiled.rules.was(scope), compiled.rules.get(scope)
            before, splits[scope] = _by_root(was), _by_root(now)
            self.offers.move(scope, before, splits[scope])
            roots.update(dict.fromkeys(r for r in before | splits[scope] if before.get(r) != splits[scope].get(r)))
        for root in roots:
            scopes = sorted(self.offers.of(root))
            for scope in scopes:
                if scope not in splits:
                    splits[scope] = _by_root(compiled.rules[scope])
            found = [split for scope in scopes for split in splits[scope][root]]
            of_all = [split for split in found if not split.matches]
            counting = (*(split for split in found if split.matches), *of_all[:1])
            before_ = self.splits.get(root) or ()
            self.roots.move(root, _backends(before_), _backends(counting))
            self.by_manifest.move(root, _manifests(before_), _manifests(counting))
            self.splits.put(root, counting or None)
            conflicts = [
                _problem(other, "Conflict", f"{root} is split by {of_all[0].manifest}: delete one of the two", _ROOT)
                for other in of_all[1:]
            ]
            problems.report("split conflict", root, conflicts)

    def _direct(self, name: Name, served: Served, problems: Problems) -> None:
        splits = self.splits.get(name) or ()
        upstreams = served.upstreams.get(name)
        found: list[Problem] = []
        own: list[Destination] | None = None
        directed = None
        if upstreams is not None:
            before = {d.port: d for d in self.unsplit.get(name) or ()}
            own = [kept(before.get(u.port), _unsplit(u)) for u in upstreams]
            before = {d.port: d for d in self.destinations.get(name) or ()}
            shares = [
                (split, self._shares(split, _applicable(split, upstreams, found), served, found)) for split in splits
            ]
            directed = [kept(before.get(d.port), _directed(d, shares)) if splits else d for d in own]
        else:
            missing = f"there is no service {name}: create it"
            found = [_problem(split, "ServiceNotFound", missing, _ROOT) for split in splits]
        problems.report("split", name, found)
        self.unsplit.put(name, tuple(own) if own is not None else None)
        self.destinations.put(name, tuple(directed) if directed is not None else None)

    def _shares(
        self, split: Split, root: Sequence[Upstream], served: Served, found: list[Problem]
    ) -> Mapping[int, Sequence[Target]]:
        """The targets of each port that has any."""
        ports = [upstream.port for upstream in root]
        weights: defaultdict[tuple[int, Name], int] = defaultdict(int)
        for index, backend in enumerate(split.backends):
            for port in self._usable(split, index, root, served, found):
                weights[port, Name(split.root.namespace, backend.service)] += backend.weight
        shares: defaultdict[int, list[Target]] = defaultdict(list)
        for (port, name), weight in weights.items():
            if weight:
                shares[port].append(Target(name, port, weight))
        instead = "it goes where other requests go" if split.matches else f"{split.root}'s own endpoints get it"
        if not any(backend.weight for backend in split.backends):
            message = f"every weight is 0, so no backend takes the traffic and {instead}: raise one of them"
            found.append(_problem(split, "NoWeight", message, "spec.backends"))
        elif left := [port for port in ports if port not in shares]:
            message = f"no backend can take the traffic of port {_list(left)}, so {instead}"
            found.append(_problem(split, "NoBackend", message, "spec.backends"))
        return shares

    def _usable(
        self, split: Split, index: int, root: Sequence[Upstream], served: Served, found: list[Problem]
    ) -> Iterable[int]:
        """The ports that a backend can take traffic of; why it cannot take the others is told in `found`."""
        backend = split.backends[index]
        name = Name(split.root.namespace, backend.service)

        def problem(reason: str, message: str, severity: Severity = Severity.ERROR) -> None:
            found.append(_problem(split, reason, message, f"spec.backends[{index}].service", severity))

        if name == split.root:
            problem("SelfReference", f"{name} is the root of this split, and gets nothing as a backend of its own")
            return ()
        upstreams = served.upstreams.get(name)
        if upstreams is None:
            problem("BackendNotFound", f"there is no service {name}, so it gets no traffic: create it")
            return ()
        if name in self.splits:
            message = f"{name} is split too, by {self.splits[name][0].manifest}; a split is not followed from another"
            problem("NotFollowed", f"{message}: this one's share goes to {name}'s own endpoints", Severity.WARNING)
        has = {upstream.port: upstream for upstream in upstreams}
        if missing := [upstream.port for upstream in root if upstream.port not in has]:
            message = f"{name} has no port {_list(missing)}, which {split.root} has, so it gets no traffic of it"
            problem("BackendPortNotFound", f"{message}: add the port to {name}")
        ports = []
        for upstream in root:
            there = has.get(upstream.port)
            if there is not None and _is_tcp(there) is _is_tcp(upstream):
                ports.append(upstream.port)
            elif there is not None:
                message = (
                    f"{name} port {there.port} speaks {there.protocol.value}, and {split.root}'s "
                    f"{upstream.protocol.value}, so it gets no traffic of it: make them equal"
                )
                problem("BackendProtocolConflict", message)
        served_by = {a.port for a in served.assignments[name] if a.endpoints}
        if backend.weight and (idle := [port for port in ports if port not in served_by]):
            message = f"nothing behind {name} port {_list(idle)} is ready, so the other backends get its share"
            problem("BackendNotReady", message)
        return [port for port in ports if port in served_by]


def _unsplit(upstream: Upstream) -> Destination:
    itself = Target(upstream.service, upstream.port, WHOLE)
    return Destination(
        upstream.service, upstream.port, (itself,), protocol=upstream.protocol, treatment=upstream.treatment
    )


def _is_tcp(upstream: Upstream) -> bool:
    return upstream.protocol is Protocol.TCP


def _applicable(split: Split, root: Sequence[Upstream], found: list[Problem]) -> Sequence[Upstream]:
    """The ports of the root that the split is for."""
    if not split.matches or not (left := [upstream.port for upstream in root if _is_tcp(upstream)]):
        return root
    message = f"{split.root} port {_list(left)} speaks TCP, where there are no requests to match"
    http = [upstream for upstream in root if not _is_tcp(upstream)]
    severity = Severity.WARNING if http else Severity.ERROR
    found.append(_problem(split, "MatchesOfTCP", f"{message}: the split is not for it", "spec.matches", severity))
    return http


def _directed(own: Destination, shares: Sequence[tuple[Split, Mapping[int, Sequence[Target]]]]) -> Destination:
    """What the splits, in their order, make of a port that would go to the root's own endpoints."""
    branches: list[Branch] = []
    targets = own.targets
    sources: set[tuple[str, int]] = set()
    for split, by_port in shares:
        if found := tuple(sorted(by_port.get(own.port, ()))):
            sources.update(split.versions)
            if split.matches:
                branches.append(Branch(split.matches, found, split.versions))
            else:
                targets = found
    if not sources:
        return own
    return replace(own, targets=targets, sources=tuple(sorted(sources)), branches=tuple(branches))


def _by_root(rules: Rules | None) -> dict[Name, tuple[Split, ...]]:
    found: dict[Name, tuple[Split, ...]] = {}
    for split in rules.splits if rules is not None else ():
        found[split.root] = (*found.get(split.root, ()), split)
    return found


def _backends(splits: Iterable[Split]) -> list[Name]:
    return [Name(split.root.namespace, b.service) for split in splits for b in split.backends]


def _manifests(splits: Iterable[Split]) -> list[str]:
    return [manifest for split in splits for manifest, _ in split.versions]


def _list(ports: Iterable[int]) -> str:
    return ", ".join(map(str, ports))


def _problem(split: Split, reason: str, message: str, where: str, severity: Severity = Severity.ERROR) -> Problem:
    return Problem(split.manifest, reason, message, where, severity.value)
