"""What a proxy should have: resources by type and name, each with a version that is a hash of its content.

Nothing here depends on a clock, a replica or a hash seed, so two replicas that read the same records hold equal bytes
under equal versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from types import MappingProxyType
from typing import TypeAlias
from weakref import WeakKeyDictionary, ref

_PREFIX = "type.googleapis.com/"


class Type(Enum):
    """The resource types, by type URL, in the order in which a cold Envoy asks for them."""

    CLUSTER = _PREFIX + "envoy.config.cluster.v3.Cluster"
    ENDPOINT = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
    SECRET = _PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
    LISTENER = _PREFIX + "envoy.config.listener.v3.Listener"
    ROUTE = _PREFIX + "envoy.config.route.v3.RouteConfiguration"
    VIRTUAL_HOST = _PREFIX + "envoy.config.route.v3.VirtualHost"

    # Members are singletons; Enum's own hash is a call into Python on every look-up.
    __hash__ = object.__hash__


@cache
def short(type_: Type) -> str:
    """How people call a type: `Cluster`, `ClusterLoadAssignment`."""
    return type_.value.rpartition(".")[2]


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """A manifest at the revision that a resource was made from: whom to tell, and whom to suspect, after a NACK."""

    manifest: str
    """`<group>/<kind>/<namespace>/<name>`, as in the manifest's key."""
    mod_revision: int


@dataclass(frozen=True, eq=False)
class Resource:
    """One resource, serialised once. Two Resources with equal `type`, `name` and `version` have equal `body`."""

    type: Type
    name: str
    body: bytes
    """The serialised message, without its Any."""
    sources: tuple[Source, ...] = ()
    """Sorted. Not part of the version: the same bytes from another manifest are the same resource."""
    warms: tuple[tuple[Type, str], ...] = ()
    """What Envoy waits for before it uses this: a Cluster's assignment and secrets, a Listener's routes and secrets."""
    serves: bool = False
    """A Listener by which others reach the application."""

    @cached_property
    def version(self) -> str:
        return hashlib.blake2b(self.body, digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class ResourceSet:
    """All resources of one type that a proxy should have. Snapshots share it: the same object means the same set.

    Never changed once made. `resources` is sorted by name.
    """

    resources: MappingProxyType[str, Resource]

    @classmethod
    def of(cls, resources: Iterable[Resource]) -> ResourceSet:
        """Sort by name.

        Raises:
            ValueError: two resources have the same name.
        """
        named: dict[str, Resource] = {}
        for resource in sorted(resources, key=lambda r: r.name):
            if resource.name in named:
                raise ValueError(f"two {resource.type.name} resources are called {resource.name}")
            named[resource.name] = resource
        return cls(MappingProxyType(named))

    def replacing(self, resources: Iterable[Resource]) -> ResourceSet:
        """The same with these in the place of those of their names, all of which it has."""
        return ResourceSet(MappingProxyType(self.resources | {found.name: found for found in resources}))

    @cached_property
    def version(self) -> str:
        """A hash of the names and versions in it."""
        digest = hashlib.blake2b(digest_size=8)
        for name, resource in self.resources.items():
            digest.update(f"{name}\0{resource.version}\0".encode())
        return digest.hexdigest()

    def changed_since(self, before: ResourceSet) -> tuple[str, ...]:
        """The names that were added, changed or removed, sorted. Compared once for all who hold these two sets."""
        known = self._changes.get(before)
        if known is None:
            added_or_changed = self.resources.items() - before.resources.items()
            removed = before.resources.keys() - self.resources.keys()
            known = self._changes[before] = tuple(sorted({name for name, _ in added_or_changed} | removed))
        return known

    @cached_property
    def _changes(self) -> WeakKeyDictionary[ResourceSet, tuple[str, ...]]:
        return WeakKeyDictionary()


EMPTY = ResourceSet(MappingProxyType({}))

Change: TypeAlias = tuple[Type, tuple[str, ...]]
"""A type of which the set is another one, and the names in it that were added, changed or removed."""

Changes: TypeAlias = tuple[Change, ...]
"""One for each such type, in the order of the types."""


class Layer:
    """The sets of some types. Snapshots share it: the same object means that none of these differs. Never changed."""

    __slots__ = ("__weakref__", "_known", "sets")

    def __init__(self, sets: Mapping[Type, ResourceSet] = MappingProxyType({})) -> None:
        self.sets = sets
        self._known: tuple[ref[Layer], Changes] | None = None
        """What was asked for last."""

    def changed_since(self, before: Layer) -> Changes:
        """How it differs. Compared once for all who go from the one to the other, as nearly all do."""
        known = self._known
        if known is None or known[0]() is not before:
            known = self._known = ref(before), tuple(_differences(before.sets, self.sets))
        return known[1]


_NO_LAYER = Layer()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that one proxy should have. Proxies with equal inputs share one object, and the same one means "nothing new".

    A type is in one of the two layers.
    """

    own: Layer = _NO_LAYER
    """What few other proxies have."""
    shared: Layer = _NO_LAYER
    """What many have: a change of that alone is found once for them all."""

    @classmethod
    def of(cls, resources: Iterable[Resource]) -> Snapshot:
        """Group by type, each sorted by name.

        Raises:
            ValueError: two resources have the same type and name.
        """
        grouped: dict[Type, list[Resource]] = {}
        for resource in resources:
            grouped.setdefault(resource.type, []).append(resource)
        return cls(Layer({type_: ResourceSet.of(found) for type_, found in grouped.items()}))

    @property
    def sets(self) -> Mapping[Type, ResourceSet]:
        return {**self.own.sets, **self.shared.sets}

    def set_of(self, type_: Type) -> ResourceSet:
        found = self.shared.sets.get(type_)
        return found if found is not None else self.own.sets.get(type_, EMPTY)

    def of_type(self, type_: Type) -> Mapping[str, Resource]:
        return self.set_of(type_).resources

    def changed_since(self, before: Snapshot) -> Changes:
        """How it differs."""
        if self.own is before.own:
            return self.shared.changed_since(before.shared)
        return tuple(_differences(before.sets, self.sets))

    @cached_property
    def versions(self) -> Mapping[Type, str]:
        """A version for each type's whole set (`system_version_info`; the state-of-the-world version)."""
        return {type_: self.set_of(type_).version for type_ in Type}


def _differences(before: Mapping[Type, ResourceSet], now: Mapping[Type, ResourceSet]) -> Iterator[Change]:
    for type_ in Type:
        was, is_ = before.get(type_, EMPTY), now.get(type_, EMPTY)
        if is_ is not was:
            yield type_, is_.changed_since(was)
