"""The mesh that is benchmarked, as records: how many of everything, and who is told of what.

Every workload is an endpoint of one service and may have a stream. Two services are special: `few` is told to the
workloads of the first service only, `nobody` to none. All others are told to everybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from cluster.kv import Put
from smc import endpoints
from smc.errors import Invalid
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
from smc.records import Keys, ReadyRecord, SyncedRecord, encode

SOURCE = "bench"
"""The registry's source: none of the replica's own informers, so nobody writes it but the benchmark."""
NAMESPACES = 10
APP_PORT = 8080


@dataclass(frozen=True)
class Shape:
    services: int
    endpoints: int
    """Of each service."""
    streams: int

    def __post_init__(self) -> None:
        if self.services < 3:
            raise Invalid(f"{self.services} services are too few: two are told to few and to nobody, so at least 3")
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
        return tuple(Name(f"ns-{n % NAMESPACES}", f"svc-{n:03}") for n in range(self.services))

    @property
    def everybody(self) -> Name:
        return self.names[0]

    @property
    def few(self) -> Name:
        return self.names[-2]

    @property
    def nobody(self) -> Name:
        return self.names[-1]

    def concerned(self, service: Name) -> int:
        """How many of the streams are told of `service`."""
        return {self.few: self.endpoints, self.nobody: 0}.get(service, self.streams)

    @cached_property
    def workloads(self) -> tuple[Workload, ...]:
        """In the order in which they get a stream: those of the first service first."""
        told = tuple(sorted(self.names[:-2]))
        told_first = tuple(sorted(self.names[:-1]))
        return tuple(
            Workload(
                name=Name(service.namespace, f"{service.name}-{m:03}"),
                address=f"10.{n // 250}.{n % 250}.{m + 1}",
                identity=Identity(service.namespace, f"{service.name}-{'ab'[m * 2 // self.endpoints]}"),
                ports=(WorkloadPort("", APP_PORT),),
                services=(service.name,),
                reachable=told_first if n == 0 else told,
            )
            for n, service in enumerate(self.names)
            for m in range(self.endpoints)
        )

    @property
    def proxies(self) -> tuple[Name, ...]:
        """Those that have a stream."""
        return tuple(workload.name for workload in self.workloads[: self.streams])

    @cached_property
    def identities(self) -> tuple[Identity, ...]:
        """Two a service, each of half its workloads."""
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

    def records(self, keys: Keys) -> Iterator[Put]:
        """What is in the store once every workload has been ready; without certificates, which the leader makes."""
        for service in self._services:
            yield Put(keys.service(SOURCE, service.name), encode(service))
            yield Put(keys.endpoints(SOURCE, service.name), encode(self._endpoints[service.name]))
        for workload in self.workloads:
            yield Put(keys.workload(SOURCE, workload.name), encode(workload))
            yield Put(keys.ready(workload.name), encode(ReadyRecord(workload.name)))
        yield Put(keys.synced(SOURCE), encode(SyncedRecord(SOURCE)))

    def change(self, keys: Keys, service: Name, number: int) -> Put:
        """One endpoint of `service` gets another weight; each number from 0 on makes another one."""
        before = self._endpoints[service]
        first, *others = before.endpoints
        changed = replace(before, endpoints=(replace(first, weight=2 + number), *others))
        return Put(keys.endpoints(SOURCE, service), encode(changed))
