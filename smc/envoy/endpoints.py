"""EDS: where the proxies behind a cluster are. An endpoint's port is its proxy's; SNI says which service is meant.

An application without a proxy is dialled at its own port. It knows nothing of the path by which a proxy says that its
application is alive, so no health check is sent there: a connection that fails puts it out.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2

from smc.envoy import messages, names
from smc.model import Assignment, Endpoint
from smc.xds.snapshot import Resource, Type


def load_assignment(assignment: Assignment) -> Resource:
    """Endpoints by locality; weights keep their proportions over the whole assignment."""
    name = names.cluster(assignment.service, assignment.port)
    found = sorted(assignment.endpoints, key=lambda e: (e.locality, e.workload))
    weighed = zip(found, messages.ratio([max(1, e.weight) for e in found]), strict=True) if found else ()
    localities = []
    for locality, group in groupby(weighed, key=lambda pair: pair[0].locality):
        pairs = list(group)
        localities.append(
            endpoint_components_pb2.LocalityLbEndpoints(
                locality=base_pb2.Locality(region=locality.region, zone=locality.zone, sub_zone=locality.sub_zone),
                # Envoy needs no weight on a locality; other xDS clients ignore a locality without one.
                load_balancing_weight=messages.uint32(sum(weight for _, weight in pairs)),
                lb_endpoints=[
                    endpoint_components_pb2.LbEndpoint(
                        endpoint=_dialled(endpoint, assignment.port), load_balancing_weight=messages.uint32(weight)
                    )
                    for endpoint, weight in pairs
                ],
            )
        )
    message = endpoint_pb2.ClusterLoadAssignment(cluster_name=name, endpoints=localities)
    return messages.resource(Type.ENDPOINT, name, message)


def _dialled(endpoint: Endpoint, port: int) -> Any:
    if not endpoint.proxyless:
        return endpoint_components_pb2.Endpoint(address=messages.socket_address(endpoint.address, names.INBOUND_PORT))
    return endpoint_components_pb2.Endpoint(
        address=messages.socket_address(endpoint.address, dict(endpoint.ports)[port]),
        health_check_config=endpoint_components_pb2.Endpoint.HealthCheckConfig(disable_active_health_check=True),
    )
