"""The hosts that egress lets through and that services answer to, or have as their address. The service wins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from smc.hosts import hosts
from smc.manifests import MESH_WIDE
from smc.manifests.own import CONFIG_NAME, GROUP
from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.sources import Sources
from smc.mesh.tables import Index, Tables
from smc.model import EgressHost, MeshConfig, Name, Problem, Service, Severity

_MESH_CONFIG = f"{GROUP}/MeshConfig/{MESH_WIDE}/{CONFIG_NAME}"


@dataclass(slots=True)
class EgressHosts(Tables):
    services: Index[EgressHost, Name] = field(default_factory=Index)
    """host -> the services that answer to it, in a namespace at least, or are dialled at it"""

    def update(self, records: Records, sources: Sources, problems: Problems) -> None:
        config = records.config
        anew = bool(records.configs.changed)
        if not anew and not (config.egress_hosts and sources.services.changed):
            return
        if anew:
            self.services = Index()
        wanted = {(host.host, host.port): host for host in config.egress_hosts}
        for name in sources.services.rows if anew else sources.services.changed:
            before = None if anew else sources.services.was(name)
            now = sources.services.get(name)
            self.services.move(name, _answering(before, config, wanted), _answering(now, config, wanted))
        problems.report("egress", CONFIG_NAME, self._taken(config))

    def _taken(self, config: MeshConfig) -> Iterable[Problem]:
        for host in config.egress_hosts:
            if services := sorted(self.services.of(host)):
                message = (
                    f"{host} is service {services[0]}, and that is where requests to it go: remove it from the list"
                )
                yield Problem(_MESH_CONFIG, "HostIsService", message, "spec.egressHosts", Severity.WARNING.value)


def _answering(
    service: Service | None, config: MeshConfig, wanted: dict[tuple[str, int | None], EgressHost]
) -> list[EgressHost]:
    if service is None or not wanted:
        return []
    spelled = (*hosts(service.name, config.mesh_domain, same_namespace=True), service.address)
    ports = (None, *(port.number for port in service.ports))
    return [wanted[host, port] for host in spelled for port in ports if (host, port) in wanted]
