"""What a client has of one type: one set for all who have the same, and for each of them what differs from it.

In a mesh of thousands of services nearly all streams have the same thousands of resources at nearly all times.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

from cluster.overlay import merged
from smc.xds.snapshot import EMPTY, Resource, ResourceSet, Source

LARGE = 8
"""A stream shares a set as long as no more than one in so many of its resources differ."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the client has from before this stream, as it says."""

    version: str
    sources: tuple[Source, ...] = ()
    """Unknown."""


class Held:
    """By name, what the client ACKed last, or said that it had when it came."""

    __slots__ = ("_common", "_own", "_unlike")

    def __init__(self) -> None:
        self._common = EMPTY
        self._own: dict[str, Resource | Told | None] = {}
        """All that differs from that. None: the client has not got it."""
        self._unlike: ref[ResourceSet] | None = None
        """The set in which too much differed last, so that nobody who refuses all has it compared at each request."""

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

    def resources(self) -> dict[str, Resource | Told]:
        """A copy of all of it."""
        return merged(self._common.resources, self._own)

    def share(self, common: ResourceSet) -> None:
        """Keep what the client has as `common`, which it should have, and what differs from it: mostly nothing.

        Costs what differs, and what has changed in `common` since the last time; nothing for the same set again. Where
        more than one in LARGE differs, all of it is kept apart, so that nobody holds a set for the little of it that he
        has.
        """
        if common is self._common or (self._unlike is not None and self._unlike() is common):
            return
        resources, alone = common.resources, self._common is EMPTY
        most = len(resources) // LARGE
        if alone and len(resources) - len(self._own) > most:
            return
        changed = common.changed_since(self._common)
        own = {
            name: found
            for name in dict.fromkeys((*self._own, *changed))
            if (found := self.get(name)) is not resources.get(name)
        }
        if len(own) <= most:
            self._common, self._own, self._unlike = common, own, None
            return
        self._unlike = ref(common)
        if not alone:
            self._common, self._own = EMPTY, merged(self._common.resources, self._own)
