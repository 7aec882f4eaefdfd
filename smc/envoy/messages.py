"""The few message parts that every kind of resource is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any

from envoy.config.core.v3 import address_pb2, config_source_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import BoolValue, UInt32Value

from smc.xds.snapshot import Resource, Source, Type

TRUE = BoolValue(value=True)
FALSE = BoolValue(value=False)
UINT32_MAX = 2**32 - 1


def packed(message: Message) -> AnyMessage:
    packed_ = AnyMessage()
    packed_.Pack(message, deterministic=True)
    return packed_


def serialised(message: Message) -> bytes:
    """Equal messages give equal bytes, in every process. Concatenated, such bytes are the messages merged."""
    return message.SerializeToString(deterministic=True)


def resource(
    type_: Type,
    name: str,
    body: Message | bytes,
    *,
    sources: Iterable[tuple[str, int]] = (),
    warms: tuple[tuple[Type, str], ...] = (),
    serves: bool = False,
) -> Resource:
    return Resource(
        type_,
        name,
        body if isinstance(body, bytes) else serialised(body),
        tuple(Source(*source) for source in sorted(set(sources))),
        warms,
        serves,
    )


def seconds(value: float) -> Duration:
    whole = int(value)
    return Duration(seconds=whole, nanos=round((value - whole) * 1e9))


def uint32(value: int) -> UInt32Value:
    return UInt32Value(value=value)


def socket_address(address: str, port: int) -> Any:
    return address_pb2.Address(socket_address=address_pb2.SocketAddress(address=address, port_value=port))


def ads() -> Any:
    """Fetch it on the stream that everything comes on."""
    return config_source_pb2.ConfigSource(
        ads=config_source_pb2.AggregatedConfigSource(), resource_api_version=config_source_pb2.V3
    )


def ratio(weights: Sequence[int]) -> list[int]:
    """The same proportions in the smallest numbers, none below 1, with a sum that fits in 32 bits.

    Equal ratios give equal bytes, and no weight that a user may write overflows what Envoy accepts.
    """
    divisor = gcd(*weights) or 1
    small = [weight // divisor for weight in weights]
    total = sum(small)
    limit = UINT32_MAX - len(small)
    return small if total <= limit else [max(1, weight * limit // total) for weight in small]
