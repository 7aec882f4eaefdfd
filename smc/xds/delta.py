"""The incremental variant of the protocol: its messages, as what a Stream takes and gives."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.any_pb2 import Any as AnyMessage

from smc.xds import messages
from smc.xds.snapshot import Resource, Type
from smc.xds.stream import Request
from smc.xds.subscription import Response

MOST_SHARED = 48 * 1024 * 1024
"""Bytes of memory for the responses that are kept for the next stream that is sent the same."""

MOST_MARKS = 100_000
"""Of how much is remembered that it was written once."""

_EACH = 512
"""Bytes of memory that a response takes that is kept, and each resource and name in it, however short they are."""

_NONCE = b"\x2a"
"""In front of a nonce and its length: field 5 of a response."""


DISCOVERS = (1, 37)
"""The first version of Envoy that discovers virtual hosts on the aggregated stream; older ones refuse such a route."""


def types(node: Any) -> tuple[Type, ...]:
    """Those that this variant has a way to speak of to an envoy.config.core.v3.Node.

    Whoever is no Envoy, or does not say which, is told of no virtual host: they are in the routes then.
    """
    version = node.user_agent_build_version.version
    discovers = node.user_agent_name == "envoy" and (version.major_number, version.minor_number) >= DISCOVERS
    return tuple(type_ for type_ in Type if discovers or type_ is not Type.VIRTUAL_HOST)


_ACKS = {b"\x12" + bytes((len(type_.value),)) + type_.value.encode(): type_ for type_ in Type}
"""What a request begins with that says its type and nothing before it: field 2, and its length."""


def acknowledgement(data: bytes) -> Request | None:
    """The request `data` if it is an ACK that says nothing else, as nearly all are; None: look what it is.

    Every protobuf library writes its two fields in this way, and so reading one takes no parser.
    """
    nonce_at = 4 + data[1] if len(data) > 1 else 0
    type_ = _ACKS.get(data[: nonce_at - 2])
    nonce = data[nonce_at:]
    if type_ is None or not nonce.isascii() or data[nonce_at - 2 : nonce_at] != bytes((0x32, len(nonce) & 0x7F)):
        return None
    return Request(type_, nonce=nonce.decode()) if len(nonce) < 0x80 else None


def request(message: Any) -> Request:
    """Of an envoy.service.discovery.v3.DeltaDiscoveryRequest. Its node is not looked at.

    Raises:
        ProtocolError: a type that is not served, or names that are not plain ones.
    """
    type_ = messages.type_of(message)
    messages.no_locators(message.resource_locators_subscribe, message.resource_locators_unsubscribe)
    return Request(
        type_,
        tuple(message.resource_names_subscribe),
        tuple(message.resource_names_unsubscribe),
        dict(message.initial_resource_versions),
        message.response_nonce,
        messages.error_of(message),
        resumed=bool(message.initial_resource_versions),
    )


class Encoder:
    """Writes DeltaDiscoveryResponses.

    What is written for a second time is kept for all streams that share the encoder: an encoded Resource, and a
    response, of which only the nonce differs, which is a part of its own.
    """

    def __init__(self, identifier: str) -> None:
        """
        Args:
            identifier: `control_plane.identifier` of every response.
        """
        self._control_plane = base_pb2.ControlPlane(identifier=identifier)
        self._encoded: WeakKeyDictionary[Resource, bytes] = WeakKeyDictionary()
        self._written_once: set[int] = set()
        """Hashes of what was written once so far: a proxy's own listeners and routes are sent to no other."""
        self._shared: dict[tuple[Type, str, tuple[Resource, ...], tuple[str, ...]], bytes] = {}
        self._held = 0
        """Bytes of memory that these take."""

    def encode(self, response: Response) -> tuple[bytes, bytes]:
        """The serialised message, in two parts of which the first is shared."""
        nonce = response.nonce.encode()
        return self._without_nonce(response), b"".join((_NONCE, bytes((len(nonce),)), nonce))

    def _without_nonce(self, response: Response) -> bytes:
        if response.type is Type.SECRET:
            return self._write(response)  # a key that was replaced is not kept
        key = response.type, response.version, response.resources, response.removed
        written = self._shared.get(key)
        if written is None:
            written = self._write(response)
            if self._is_new(key):
                return written
            # Whoever asks for what does not exist is answered with what nobody else has: so each resource is taken for
            # one that is there only because it is kept here, once as it was made, once encoded, and in the response.
            cost = 3 * len(written) + _EACH * (1 + len(response.resources) + len(response.removed))
            self._held += cost
            if self._held > MOST_SHARED:
                self._shared.clear()
                self._held = cost
            self._shared[key] = written
        return written

    def _is_new(self, key: Hashable) -> bool:
        mark = hash(key)
        if mark in self._written_once:
            return False
        if len(self._written_once) >= MOST_MARKS:
            self._written_once.clear()
        self._written_once.add(mark)
        return True

    def _write(self, response: Response) -> bytes:
        message = discovery_pb2.DeltaDiscoveryResponse(
            system_version_info=response.version,
            type_url=response.type.value,
            removed_resources=response.removed,
            control_plane=self._control_plane,
        )
        # Concatenated messages are one, with the elements of their repeated fields in a row.
        return b"".join((message.SerializeToString(), *map(self._resource, response.resources)))

    def _resource(self, resource: Resource) -> bytes:
        encoded = self._encoded.get(resource)
        if encoded is None:
            body = AnyMessage(type_url=resource.type.value, value=resource.body)
            element = discovery_pb2.Resource(name=resource.name, version=resource.version, resource=body)
            encoded = discovery_pb2.DeltaDiscoveryResponse(resources=[element]).SerializeToString()
            if not self._is_new(resource):
                self._encoded[resource] = encoded
        return encoded
