"""A Snapshot as JSON to read, and as a configuration that an Envoy takes without a control plane."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from google.protobuf.json_format import MessageToDict

from smc.envoy.bootstrap import bootstrap
from smc.model import Workload
from smc.xds.snapshot import Resource, Snapshot, Type
from smc.xds.virtual_hosts import whole
from tests.unit.envoy.nouns import TRUST_DOMAIN

MESSAGES = {
    Type.CLUSTER: cluster_pb2.Cluster,
    Type.ENDPOINT: endpoint_pb2.ClusterLoadAssignment,
    Type.SECRET: secret_pb2.Secret,
    Type.LISTENER: listener_pb2.Listener,
    Type.ROUTE: route_pb2.RouteConfiguration,
    Type.VIRTUAL_HOST: route_components_pb2.VirtualHost,
}


def message(resource: Resource) -> Any:
    return MESSAGES[resource.type].FromString(resource.body)


def plain(resource: Resource) -> dict[str, Any]:
    return MessageToDict(message(resource), preserving_proto_field_name=True)


def golden(snapshot: Snapshot) -> str:
    document = {
        type_.name: {
            name: {
                "message": plain(resource),
                "sources": [f"{s.manifest}@{s.mod_revision}" for s in resource.sources],
                "warms": [f"{wanted.name} {other}" for wanted, other in resource.warms],
            }
            for name, resource in snapshot.of_type(type_).items()
        }
        for type_ in Type
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


class Standalone:
    """Files in `directory` that one Envoy runs on: our bootstrap without xDS, and everything else beside it.

    With `watched`, load assignments and routes are files that Envoy reads again when they are replaced.
    """

    def __init__(self, directory: Path, workload: Workload, secrets: dict[str, Any], *, watched: bool) -> None:
        self.directory = directory
        self.workload = workload
        self.path = directory / "bootstrap.json"
        self._secrets = secrets
        self._watched = watched

    def write(self, snapshot: Snapshot) -> None:
        snapshot = whole(snapshot)
        for type_ in (Type.ENDPOINT, Type.ROUTE):
            for resource in snapshot.of_type(type_).values():
                self.put(resource)
        document = json.loads(
            bootstrap(self.workload.name, self.workload.address, ["127.0.0.1:1"], TRUST_DOMAIN, "/nowhere")
        )
        del document["dynamic_resources"]
        static = document["static_resources"]
        static["clusters"] = [c for c in static["clusters"] if c["name"] != "xds"]
        static["secrets"] = [{"name": name, **secret} for name, secret in self._secrets.items()]
        for type_, key in ((Type.CLUSTER, "clusters"), (Type.LISTENER, "listeners")):
            for name, resource in snapshot.of_type(type_).items():
                static[key].append(self._standing_alone(plain(resource), name, snapshot))
        self._replace(self.path, document)

    def put(self, resource: Resource) -> None:
        typed = {"@type": resource.type.value, **plain(resource)}
        self._replace(self._file(resource.type, resource.name), {"resources": [typed]})

    def _file(self, type_: Type, name: str) -> Path:
        return self.directory / f"{type_.name}-{name.replace('/', '_').replace('|', '_')}.json"

    def _replace(self, path: Path, document: dict[str, Any]) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(document))
        new.replace(path)

    def _source(self, type_: Type, name: str) -> dict[str, Any]:
        return {"path_config_source": {"path": str(self._file(type_, name))}, "resource_api_version": "V3"}

    def _standing_alone(self, value: Any, name: str, snapshot: Snapshot) -> Any:
        """`value` with every reference to the stream replaced by what it refers to."""
        if isinstance(value, list):
            return [self._standing_alone(item, name, snapshot) for item in value]
        if not isinstance(value, dict):
            return value
        changed = {}
        for key, item in value.items():
            if key == "rds" and not self._watched:
                changed["route_config"] = plain(snapshot.of_type(Type.ROUTE)[item["route_config_name"]])
            elif key == "rds":
                changed[key] = item | {"config_source": self._source(Type.ROUTE, item["route_config_name"])}
            elif key == "eds_config":
                changed[key] = self._source(Type.ENDPOINT, name)
            elif key == "sds_config":
                continue
            else:
                changed[key] = self._standing_alone(item, name, snapshot)
        return changed
