"""Which endpoints a service has, from workloads that say which services they back."""

from __future__ import annotations

from collections.abc import Iterable

from smc.model import Endpoint, Endpoints, Name, Problem, Service, Sidecar, Workload


def join(
    services: Iterable[Service], workloads: Iterable[Workload], *, manifest_of_workload: dict[Name, str]
) -> tuple[tuple[Endpoints, ...], tuple[Problem, ...]]:
    """Match each workload's `services` with the services of its namespace.

    A service gets an Endpoints even when nothing backs it: nobody is not the same as unknown. A service that does not
    exist (yet), and a target port that the workload does not have, are Problems of the workload.
    """
    known = {service.name: service for service in services}
    backing: dict[Name, list[Endpoint]] = {name: [] for name in known}
    problems: list[Problem] = []
    for workload in sorted(workloads, key=lambda w: w.name):
        manifest = manifest_of_workload[workload.name]
        for index, short in enumerate(workload.services):
            name = Name(workload.name.namespace, short)
            field = f"spec.services[{index}]"
            service = known.get(name)
            if service is None:
                message = f"workload {workload.name} backs {name}, which does not exist: create it or correct the name"
                problems.append(Problem(manifest, "ServiceNotFound", message, field))
                continue
            ports: list[tuple[int, int]] = []
            for port in service.ports:
                number = _resolve(port.target, workload)
                if number is None:
                    message = (
                        f"service {name} port {port.number} wants port {port.target} of workload {workload.name}, "
                        f"which has {_ports(workload)}: it receives nothing on that port"
                    )
                    problems.append(Problem(manifest, "PortNotFound", message, field))
                else:
                    ports.append((port.number, number))
            if ports:
                backing[name].append(
                    Endpoint(
                        workload.name,
                        workload.address,
                        workload.identity,
                        tuple(sorted(ports)),
                        workload.locality,
                        workload.weight,
                        workload.sidecar is Sidecar.GRPC,
                    )
                )
    return tuple(Endpoints(name, tuple(found)) for name, found in sorted(backing.items())), tuple(problems)


def _resolve(target: str, workload: Workload) -> int | None:
    if target.isdigit():
        number = int(target)
        return number if not workload.ports or any(p.number == number for p in workload.ports) else None
    return next((p.number for p in workload.ports if p.name == target), None)


def _ports(workload: Workload) -> str:
    return ", ".join(f"{p.name or '-'}={p.number}" for p in workload.ports) or "no named ports"
