"""How a client reaches a replica: whatever address it dials, by the name that every replica's certificate carries."""

from __future__ import annotations

import grpc
import grpc.aio

from smc.certificates import x509
from smc.certificates.credential import Credential

MAX_MESSAGE = 1024 * 1024

Option = tuple[str, str | int]


def channel_to(target: str, credential: Credential, *more: Option, max_message: int = MAX_MESSAGE) -> grpc.aio.Channel:
    """A channel to a replica, or to any of those in `target`; `more` are options beside the usual."""
    return grpc.aio.secure_channel(target, _mutual(credential), _options(credential, more, max_message))


def blocking_channel_to(
    target: str, credential: Credential, *more: Option, max_message: int = MAX_MESSAGE
) -> grpc.Channel:
    """As `channel_to`, for a program that has no event loop."""
    return grpc.secure_channel(target, _mutual(credential), _options(credential, more, max_message))


def channel_options(host: str, max_message: int = MAX_MESSAGE) -> list[Option]:
    """How all channels are set up; `host` is `x509.replica_host`, and `max_message` the most bytes of an answer."""
    return [
        ("grpc.ssl_target_name_override", host),
        ("grpc.max_receive_message_length", max_message),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def _mutual(credential: Credential) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        credential.roots_pem.encode(), credential.key.encode(), credential.chain.encode()
    )


def _options(credential: Credential, more: tuple[Option, ...], max_message: int) -> list[Option]:
    return [*channel_options(x509.replica_host(credential.trust_domain), max_message), *more]
