"""Resources as people read them: the messages of Envoy's API as plain data, without anything that is secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from google.protobuf.json_format import MessageToDict

from smc.xds.snapshot import Resource, Type

REDACTED = "[redacted]"
_MESSAGES: Mapping[Type, Any] = {
    Type.CLUSTER: cluster_pb2.Cluster,
    Type.ENDPOINT: endpoint_pb2.ClusterLoadAssignment,
    Type.SECRET: secret_pb2.Secret,
    Type.LISTENER: listener_pb2.Listener,
    Type.ROUTE: route_pb2.RouteConfiguration,
    Type.VIRTUAL_HOST: route_components_pb2.VirtualHost,
}


def plain(resource: Resource) -> dict[str, Any]:
    """The message, with the names of its fields as Envoy's documentation has them; PEM is text, and no key is in it."""
    message = _MESSAGES[resource.type].FromString(resource.body)
    if resource.type is not Type.SECRET:
        return _as_dict(message)
    # Everything that may hold a key goes; what is public is put back as text.
    public = secret_pb2.Secret(name=message.name)
    if message.HasField("tls_certificate"):
        chain = message.tls_certificate.certificate_chain.inline_bytes
        public.tls_certificate.certificate_chain.inline_string = chain.decode(errors="replace")
        public.tls_certificate.private_key.inline_string = REDACTED
    elif message.HasField("validation_context"):
        known = message.validation_context
        public.validation_context.trusted_ca.inline_string = known.trusted_ca.inline_bytes.decode(errors="replace")
        if known.HasField("crl"):
            public.validation_context.crl.inline_string = known.crl.inline_bytes.decode(errors="replace")
    return _as_dict(public)


def _as_dict(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
