"""What a client has of one type: one set for all who have the same, and for each of them what differs from it.

In a mesh of thousands of services nearly all streams have the same thousands of resources at nearly all times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from smc.xds.snapshot import EMPTY, Resource, ResourceSet, Source


@dataclass(frozen=True, slots=True)
class Told:
    """What the client has from before this stream, as it says."""

    version: str
    sources: tuple[Source, ...] = ()
    """Unknown."""


class Held:
    """By name, what the client ACKed last, or said that it had when it came."""

    __slots__ = ("_common", "_own")

    def __init__(self) -> None:
        self._common = EMPTY
        self._own: dict[str, Resource | Told | None] = {}
        """All that differs from that. None: the client has not got it."""

    def get(self, name: str) -> Resource | Told | None:
        """None: the client has nothing under `name`."""
        own = self._own
        return own[name] if name in own else self._common.resources.get(name)

    def put(self, name: str, found: Resource | Told | None) -> None:
        """What it has under `name` from now on; None: nothing."""
        if self._common.resources.get(name) is found:
            self._own.pop(name, None)
        else:
            self._own[name] = found

    def __iter__(self) -> Iterator[str]:
        """The names, as they are now."""
        return iter(self.resources())

    def resources(self) -> dict[str, Resource | Told]:
        """All of it."""
        common: MappingProxyType[str, Resource | Told] = self._common.resources
        held = common.copy()
        for name, found in self._own.items():
            if found is None:
                del held[name]
            else:
                held[name] = found
        return held

    def share(self, common: ResourceSet) -> None:
        """Keep `common` in place of what the client has, if it is the same: the very objects, and no others.

        Costs what differs from the set that was shared before. Who has something else keeps all of it to himself, and
        is asked no more than how many they are until these are as many as in `common`.
        """
        is_alone = self._common is EMPTY
        if self._makes_up(common.resources if is_alone else common.changed_since(self._common), common.resources):
            self._common, self._own = common, {}
        elif not is_alone:
            self._common, self._own = EMPTY, {**self.resources()}

    def _makes_up(self, differing: Mapping[str, Resource] | tuple[str, ...], resources: Mapping[str, Resource]) -> bool:
        own = self._own
        return len(differing) == len(own) and all(
            name in own and own[name] is resources.get(name) for name in differing
        )
