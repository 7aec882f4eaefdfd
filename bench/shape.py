"""The mesh that is benchmarked, as records: how many of everything, and who is told of what.

Every workload is an endpoint of one service and may have a stream. Three services are special: one is told to the first
workload only, one to the workloads of the first service, one to nobody. All others are told to everybody, and the
traffic to the second of them is split between its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from cluster.kv import Put
from smc import endpoints
from smc.codec import encode
from smc.errors import Invalid
from smc.keys import Keys
from smc.model import (
    Endpoints,
    Identity,
    Name,
    Protocol,
    Service,
    ServicePort,
    Workload,
    WorkloadPort,
)
from smc.records import ManifestRecord, ReadyRecord, SyncedRecord

SOURCE = "bench"
"""The registry's source: none of the replica's own informers, so nobody writes it but the benchmark."""
NAMESPACES = 10
MANY = 100
"""Load assignments that change at once, if there are as many: they fit into one transaction."""
APP_PORT = 8080


class Change(Enum):
    """What is changed again and again."""

    ALL = "all"
    """One endpoint of a service that everybody is told of."""
    ONE = "one"
    """The same of one that one workload is told of."""
    FEW = "few"
    """Of one that the workloads of one service are told of."""
    NONE = "none"
    """And of one that nobody is."""
    MANY = "many"
    """One endpoint of each of MANY services that everybody is told of."""
    SPLIT = "split"
    """One weight of a split that everybody has."""


@dataclass(frozen=True)
class Shape:
    services: int
    endpoints: int
    """Of each service."""
    streams: int
    reach: int | None = None
    """Of how many services each workload with a stream is told, of others than the next; None: all of the same."""
    told: int | None = None
    """Of how many these are; None: of all but the special ones."""

    def __post_init__(self) -> None:
        if self.services < 6:
            raise Invalid(
                f"{self.services} services are too few: one, few and nobody are told of three, three are in a split"
            )
        if self.told is not None and not 3 <= self.told <= self.services - 3:
            raise Invalid(f"told of {self.told} services: from the 3 of the split to {self.services - 3}")
        if not 1 <= self.endpoints <= 250:
            raise Invalid(f"{self.endpoints} endpoints of a service: from 1 to 250")
        if not self.endpoints < self.streams <= self.services * self.endpoints:
            raise Invalid(
                f"{self.streams} streams: more than the endpoints of one service ({self.endpoints}), "
                f"and at most one for each workload ({self.services * self.endpoints})"
            )

    @cached_property
    def names(self) -> tuple[Name, ...]:
        """Of the services."""
        return tuple(Name(f"ns-{max(0, n - 2) % NAMESPACES}", f"svc-{n:03}") for n in range(self.services))

    def concerned(self, what: Change) -> int:
        """How many of the streams a change is pushed to."""
        return {Change.ONE: 1, Change.FEW: self.endpoints, Change.NONE: 0}.get(what, self.streams)

    @cached_property
    def workloads(self) -> tuple[Workload, ...]:
        """In the order in which they get a stream: those of the first service first."""
        return tuple(
            Workload(
                name=Name(service.namespace, f"{service.name}-{m:03}"),
                address=f"10.{n // 250}.{n % 250}.{m + 1}",
                identity=self._identity(service, m),
                ports=(WorkloadPort("", APP_PORT),),
                services=(service.name,),
                # Those without a stream are told of nothing: nobody asks.
                reachable=self._reachable(n, m) if n * self.endpoints + m < self.streams else (),
            )
            for n, service in enumerate(self.names)
            for m in range(self.endpoints)
        )

    @cached_property
    def _ordinary(self) -> tuple[Name, ...]:
        """The services that everybody is told of, or some of them."""
        return self.names[:-3][: self.told]

    def _reachable(self, service: int, number: int) -> tuple[Name, ...]:
        one, few, _ = self.names[-3:]
        if service:
            return self._told[service]
        return tuple(sorted((*self._told[0], few, *((one,) if number == 0 else ()))))

    @cached_property
    def _told(self) -> tuple[tuple[Name, ...], ...]:
        """Which of these the workloads of each service are told of."""
        names = self._ordinary
        everything = tuple(sorted(names))
        return tuple(
            everything if self.reach is None else tuple(sorted((names * 2)[n % len(names) :][: self.reach]))
            for n in range(self.services)
        )

    def _identity(self, service: Name, number: int) -> Identity:
        """Two a service, each of half its workloads; one a namespace if the mesh is large."""
        if self.reach is not None:
            return Identity(service.namespace, "default")
        return Identity(service.namespace, f"{service.name}-{'ab'[number * 2 // self.endpoints]}")

    @property
    def proxies(self) -> tuple[Name, ...]:
        """Those that have a stream."""
        return tuple(workload.name for workload in self.workloads[: self.streams])

    @cached_property
    def identities(self) -> tuple[Identity, ...]:
        """All that a workload has."""
        return tuple(sorted({workload.identity for workload in self.workloads}))

    @cached_property
    def _services(self) -> tuple[Service, ...]:
        port = ServicePort(80, Protocol.HTTP, str(APP_PORT))
        return tuple(Service(name, (port,)) for name in self.names)

    @cached_property
    def _endpoints(self) -> Mapping[Name, Endpoints]:
        manifests = {workload.name: SOURCE for workload in self.workloads}
        found, problems = endpoints.join(self._services, self.workloads, manifest_of_workload=manifests)
        if problems:
            raise AssertionError(f"the mesh is not what it should be: {problems[0]}")
        return {one.service: one for one in found}

    @property
    def size(self) -> int:
        """How many records there are."""
        return 2 * len(self.names) + 2 * len(self.workloads) + 2

    def records(self, keys: Keys) -> Iterator[Put]:
        """What is in the store once every workload has been ready; without certificates, which the leader makes."""
        for service in self._services:
            yield Put(keys.service(SOURCE, service.name), encode(service))
            yield Put(keys.endpoints(SOURCE, service.name), encode(self._endpoints[service.name]))
        for workload in self.workloads:
            yield Put(keys.workload(SOURCE, workload.name), encode(workload))
            yield Put(keys.ready(workload.name), encode(ReadyRecord(workload.name)))
        yield self._split(keys, 0)
        yield Put(keys.synced(SOURCE), encode(SyncedRecord(SOURCE)))

    def change(self, keys: Keys, what: Change, number: int) -> tuple[Put, ...]:
        """The writes, for one transaction; each number from 0 on makes another one of a kind."""
        first, _root, *others = self._ordinary
        match what:
            case Change.ALL:
                return (self._reweighted(keys, first, number),)
            case Change.MANY:
                return tuple(self._reweighted(keys, name, number) for name in (first, *others)[:MANY])
            case Change.ONE:
                return (self._reweighted(keys, self.names[-3], number),)
            case Change.FEW:
                return (self._reweighted(keys, self.names[-2], number),)
            case Change.NONE:
                return (self._reweighted(keys, self.names[-1], number),)
            case Change.SPLIT:
                return (self._split(keys, 1 + number),)

    def _reweighted(self, keys: Keys, service: Name, number: int) -> Put:
        """One endpoint of `service` gets another weight."""
        before = self._endpoints[service]
        first, *others = before.endpoints
        changed = replace(before, endpoints=(replace(first, weight=2 + number), *others))
        return Put(keys.endpoints(SOURCE, service), encode(changed))

    def _split(self, keys: Keys, weight: int) -> Put:
        """The manifest that splits the second service's traffic between its neighbours: 100 to `weight`."""
        one, root, other = self.names[:3]
        backends = [{"service": one.name, "weight": 100}, {"service": other.name, "weight": weight}]
        record = ManifestRecord(
            group="split.smi-spec.io",
            version="v1alpha4",
            kind="TrafficSplit",
            name=root,
            object={
                "apiVersion": "split.smi-spec.io/v1alpha4",
                "kind": "TrafficSplit",
                "metadata": {"name": root.name, "namespace": root.namespace},
                "spec": {"service": root.name, "backends": backends},
            },
            text="",
            file="bench",
            line=1,
            created=0.0,
            author="bench",
        )
        return Put(keys.manifest(record.id), encode(record))
