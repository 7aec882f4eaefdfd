"""The state-of-the-world variant of the protocol: its messages, as what a Stream takes and gives.

A request says all that the client asks for, a response of Clusters or listeners all that there is: what is left out is
given up, or removed. So each response of these has what the client holds already, and what is to be removed stays in it
until the Stream says that its time has come. Of the other types a response may say only what is new.

What the variant has no words for:

- A client that comes back does not say what it has. It is sent everything, and what was removed while it was away is
  gone with the first response, whatever still points to it. Of what it refuses again the last good one is not known
  here: that is gone with the response after.
- That a secret does not exist. Envoy waits 15 s for it, or until it does.
- That a load assignment does not exist. It is answered with one that has no endpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from smc.xds import messages
from smc.xds.snapshot import Resource, ResourceSet, Type
from smc.xds.stream import WILDCARD, WILDCARDS, Request
from smc.xds.subscription import Response

_WHOLE = frozenset({Type.CLUSTER, Type.LISTENER})
"""Of these a client removes what a response leaves out."""

TYPES = tuple(type_ for type_ in Type if type_ is not Type.VIRTUAL_HOST)
"""Those that there are in this variant: virtual hosts are discovered in the other one only."""

_UNKNOWN = ""
"""The version of what a client has and cannot tell; no resource has it."""


class Decoder:
    """Reads the DiscoveryRequests of one stream: each is told by how it differs from the one before."""

    def __init__(self) -> None:
        self._asked: dict[Type, dict[str, None]] = {}
        self._named: set[Type] = set()
        """Asked for by name once, so that no names mean nothing from then on."""

    def request(self, message: Any) -> Request:
        """Of an envoy.service.discovery.v3.DiscoveryRequest. Its node is not looked at.

        Raises:
            ProtocolError: a type that is not served, or names that are not plain ones.
        """
        type_ = messages.type_of(message)
        messages.no_locators(message.resource_locators)
        asked: dict[str, None] = dict.fromkeys(message.resource_names)
        if asked:
            self._named.add(type_)
        elif type_ in WILDCARDS and type_ not in self._named:
            asked = {WILDCARD: None}
        before, self._asked[type_] = self._asked.get(type_), asked
        # A client that has something of the type repeats, on a new stream, the version that it accepted last.
        resumed = before is None and bool(message.version_info)
        return Request(
            type_,
            tuple(name for name in asked if before is None or name not in before),
            tuple(name for name in before or () if name not in asked),
            {name: _UNKNOWN for name in asked if name != WILDCARD} if resumed else {},
            message.response_nonce,
            messages.error_of(message),
            resumed=resumed,
        )


def contents(response: Response, whole: Callable[[Type], Iterable[Resource]]) -> tuple[Resource, ...]:
    """What a message must have in it to say what `response` says.

    Args:
        whole: all that the client has of a type once it has taken in `response`.
    """
    if response.type in _WHOLE:
        return tuple(whole(response.type))
    if response.type is Type.ENDPOINT:
        return (*response.resources, *map(no_endpoints, response.removed))
    return response.resources


def no_endpoints(name: str) -> Resource:
    """A load assignment that assigns nothing."""
    return Resource(Type.ENDPOINT, name, endpoint_pb2.ClusterLoadAssignment(cluster_name=name).SerializeToString())


class Encoder:
    """Writes DiscoveryResponses. A Resource is encoded once, for all streams that share the encoder."""

    def __init__(self, identifier: str) -> None:
        """
        Args:
            identifier: `control_plane.identifier` of every response.
        """
        self._control_plane = base_pb2.ControlPlane(identifier=identifier)
        self._encoded: WeakKeyDictionary[Resource, bytes] = WeakKeyDictionary()

    def encode(self, response: Response, whole: Callable[[Type], Iterable[Resource]]) -> bytes:
        """The serialised message; `whole` is that of `contents`."""
        resources = contents(response, whole)
        message = discovery_pb2.DiscoveryResponse(
            version_info=ResourceSet.of(resources).version if response.type in _WHOLE else response.version,
            type_url=response.type.value,
            nonce=response.nonce,
            control_plane=self._control_plane,
        )
        # Concatenated messages are one, with the elements of their repeated fields in a row.
        return b"".join((message.SerializeToString(), *map(self._resource, resources)))

    def _resource(self, resource: Resource) -> bytes:
        encoded = self._encoded.get(resource)
        if encoded is None:
            body = AnyMessage(type_url=resource.type.value, value=resource.body)
            encoded = discovery_pb2.DiscoveryResponse(resources=[body]).SerializeToString()
            self._encoded[resource] = encoded
        return encoded
