"""What applications that speak xDS themselves are told: gRPC's own clients and servers, without a proxy beside them.

The rules are those of every other workload, in the words that gRPC knows. As observed with grpcio 1.85:

- It asks for a Listener by the very text of its target, `xds:///<host>:<port>`, and then for what that one names; only
  by name, in the state of the world. So there is a Listener for each spelling of a service, and one RouteConfiguration
  for all of them.
- It checks the server's SPIFFE ID only by `match_subject_alt_names`. The typed matchers, which Envoy wants, it ignores,
  and with them alone it takes any certificate of the mesh.
- A server cannot be told whose certificates to take: TLS takes whatever the mesh's authority has signed, an operator's
  credential too, and only RBAC tells workloads from others.
- Secrets come from files, by the certificate provider `PROVIDER` of its bootstrap. It cannot be told of a list of
  revoked certificates, and no header says which certificate a peer has shown. So a proxy that is revoked goes on to
  reach such servers until its certificate ends, unless its identity is revoked.
- A server asks for a Listener by the address that it listens on, as the application wrote it.
- A split by weight, retries (by gRPC's words for them) and faults work as elsewhere; a limit on rates, audit's counters
  and outlier detection by answers do not.
- The conditions of a split see the path with its query, and what the application itself sends: no method, `host`,
  `te`, `user-agent` or header that ends in `-bin`. A server's policy sees all of them but `te`. To both, the values of
  a header are one, joined by commas, and nothing is normalised.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import base_pb2
from envoy.config.listener.v3 import api_listener_pb2, listener_components_pb2, listener_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, tls_pb2

from smc.envoy import http, messages, names, routes, tls, traffic
from smc.envoy.bootstrap import CERTIFICATE, KEY, ROOTS
from smc.model import Destination, Inbound, Upstream, Workload
from smc.xds.snapshot import Resource, Type

PROVIDER = "mesh"
"""The certificate provider in the bootstrap: the workload's certificate and key, and the roots."""

VARIABLE = "GRPC_XDS_BOOTSTRAP"
"""Of the program's environment: where its bootstrap is."""

SERVER_LISTENER = "grpc/server?xds.resource.listening_address="
"""How the name of a server's Listener begins; its address follows."""

_ANY_ADDRESS = ("0.0.0.0", "[::]")  # noqa: S104 - the application's words, nothing is bound here
_Hcm = http_connection_manager_pb2.HttpConnectionManager


def bootstrap(node_id: str, xds: str, files: str) -> dict[str, Any]:
    """GRPC's bootstrap (`GRPC_XDS_BOOTSTRAP`): `xds` is the target of the control plane, in plaintext; `files` the
    directory of the workload's certificate.
    """
    watched = {
        "certificate_file": f"{files}/{CERTIFICATE}",
        "private_key_file": f"{files}/{KEY}",
        "ca_certificate_file": f"{files}/{ROOTS}",
        "refresh_interval": "1s",
    }
    return {
        "xds_servers": [{"server_uri": xds, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}],
        "node": {"id": node_id},
        "certificate_providers": {PROVIDER: {"plugin_name": "file_watcher", "config": watched}},
        "server_listener_resource_name_template": f"{SERVER_LISTENER}%s",
    }


def listeners(destination: Destination, mesh_domain: str, *, same_namespace: bool) -> tuple[Resource, ...]:
    """One for each way in which a target may spell the service port."""
    filters = [http.filter_(traffic.FAULT, fault_pb2.HTTPFault()), _router()]
    manager = _Hcm(rds=http.fetched(names.cluster(destination.service, destination.port)), http_filters=filters)
    api = api_listener_pb2.ApiListener(api_listener=messages.packed(manager))
    hosts = names.hosts(destination.service, mesh_domain, same_namespace=same_namespace)
    return tuple(
        messages.resource(Type.LISTENER, name, listener_pb2.Listener(name=name, api_listener=api))
        for host in hosts
        for name in names.domains(host, destination.port)
    )


def route(destination: Destination) -> Resource:
    """Where requests to a service port go."""
    return routes.alone(names.cluster(destination.service, destination.port), _posted(destination))


def _posted(destination: Destination) -> Destination:
    """With every condition on the method decided: each call is a POST, and where gRPC routes it sees no method."""
    branches = []
    for branch in destination.branches:
        able = (match for match in branch.matches if not match.methods or "POST" in match.methods)
        if matches := tuple(replace(match, methods=()) for match in able):
            branches.append(replace(branch, matches=matches))
    return replace(destination, branches=tuple(branches))


def cluster(noun: Upstream, trust_domain: str, mesh_domain: str) -> Resource:
    """A port of a service: whoever answers must be exactly one of its identities; none means nobody."""
    name = names.cluster(noun.service, noun.port)
    context = tls_pb2.UpstreamTlsContext(
        common_tls_context=_presented(), sni=names.sni(noun.service, noun.port, mesh_domain)
    )
    context.common_tls_context.validation_context.match_subject_alt_names.extend(
        tls.exactly(noun.identities, trust_domain)
    )
    message = cluster_pb2.Cluster(
        name=name,
        type=cluster_pb2.Cluster.EDS,
        eds_cluster_config=cluster_pb2.Cluster.EdsClusterConfig(eds_config=messages.ads()),
        lb_policy=cluster_pb2.Cluster.ROUND_ROBIN,
        transport_socket=_secured(context),
    )
    sources = []
    if noun.treatment is not None:
        sources = [noun.treatment.source]
        limits = noun.treatment.policy.limits
        if limits is not None and limits.requests is not None:
            thresholds = circuit_breaker_pb2.CircuitBreakers.Thresholds(max_requests=messages.uint32(limits.requests))
            message.circuit_breakers.thresholds.append(thresholds)
    return messages.resource(Type.CLUSTER, name, message, sources=sources)


def server_listeners(workload: Workload, inbound: Inbound) -> tuple[Resource, ...]:
    """One for each address that the application may listen on; policy is in the route of the port."""
    denied = filter_pb2.RBAC(rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW))
    manager = _Hcm(
        rds=http.fetched(names.inbound_route(inbound.port)), http_filters=[http.filter_(routes.RBAC, denied), _router()]
    )
    context = tls_pb2.DownstreamTlsContext(common_tls_context=_presented(), require_client_certificate=messages.TRUE)
    chain = listener_components_pb2.FilterChain(
        filters=[http.network_filter(manager)],
        transport_socket=_secured(context),
    )
    return tuple(
        messages.resource(
            Type.LISTENER,
            name,
            listener_pb2.Listener(
                name=name,
                address=messages.socket_address(address.strip("[]"), inbound.port),
                traffic_direction=base_pb2.INBOUND,
                filter_chains=[chain],
            ),
            serves=True,
        )
        for address in dict.fromkeys((_bracketed(workload.address), _bracketed(workload.app_address), *_ANY_ADDRESS))
        for name in (f"{SERVER_LISTENER}{address}:{inbound.port}",)
    )


def _presented() -> Any:
    provider = common_pb2.CertificateProviderPluginInstance(instance_name=PROVIDER)
    return tls_pb2.CommonTlsContext(
        tls_certificate_provider_instance=provider,
        validation_context=common_pb2.CertificateValidationContext(ca_certificate_provider_instance=provider),
    )


def _secured(context: Any) -> Any:
    return base_pb2.TransportSocket(name="envoy.transport_sockets.tls", typed_config=messages.packed(context))


def _router() -> Any:
    return http.filter_("envoy.filters.http.router", router_pb2.Router())


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
