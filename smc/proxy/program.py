"""What stands beside a gRPC program in place of Envoy: its bootstrap, its certificate in files, and its way to xDS.

The program opens its xDS streams to a socket in the proxy's directory, and each is passed on, as it is, to a replica,
over mutual TLS. So the program needs neither the credential nor the replicas' addresses, both of which change, and when
a replica dies it finds the next one: gRPC itself can do neither with certificates that name no host. Who may open the
socket is the proxy to the control plane; it is for the directory's owner alone.

The certificate is asked for by SDS. It lies with its key and the mesh's roots behind one symbolic link, so that a
program never reads a key of one and a certificate of the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import structlog
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.message import DecodeError

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential, give_to_owner
from smc.channels import channel_to
from smc.envoy import names, proxyless
from smc.errors import Invalid
from smc.proxy import enrolment
from smc.proxy.enrolment import Enrolment
from smc.proxy.settings import Exit, ProxyFailed
from smc.xds.snapshot import Type

BOOTSTRAP, SOCKET, WORKLOAD = "grpc-bootstrap.json", "xds.sock", "workload"

FIRST_RETRY, LAST_RETRY = 0.1, 2.0
"""Seconds between two attempts to reach a replica: doubled each time, give or take half."""
MOST_STREAMS = 100
"""That a program may have open at a time."""

_ADS = "envoy.service.discovery.v3.AggregatedDiscoveryService"
_METHOD = "StreamAggregatedResources"
_SDS = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
_LONGEST_SOCKET = 103
"""Bytes that every system takes as the path of a socket."""
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
]

Who = Callable[[], tuple[Credential, Enrolment]]
"""The credential and the mesh as they are now."""

_log = structlog.get_logger(__name__)


async def serve(directory: Path, who: Who, *, news: asyncio.Event, ready: Callable[[], None]) -> None:
    """Serve the program until cancelled. `news` is set when the workload's secrets have changed.

    `ready` is called once the program finds all that it needs.

    Raises:
        ProxyFailed: the directory cannot be written, or its path is too long for a socket.
    """
    at = os.path.abspath(directory)  # noqa: ASYNC240 - it asks the disk nothing
    socket = Path(at, SOCKET)
    if len(os.fsencode(socket)) > _LONGEST_SOCKET:
        raise ProxyFailed(
            Exit.FAILED, f"{at} is too long for the path of a socket", hint="use a directory with a shorter path"
        )
    document = proxyless.bootstrap(who()[1].proxy, f"unix://{socket}", f"{at}/{WORKLOAD}")
    try:
        enrolment.write_file(directory / BOOTSTRAP, json.dumps(document, indent=1) + "\n")
    except OSError as e:
        raise ProxyFailed(Exit.FAILED, f"{directory} cannot be written: {e.strerror}") from None
    held = asyncio.Event()
    async with _relaying(socket, who), asyncio.TaskGroup() as tasks:
        tasks.create_task(_keep_secrets(directory / WORKLOAD, who, news, held), name="proxy: secrets")
        await held.wait()
        ready()


# ------------------------------------------------------------------------------------------------------------ the relay


@asynccontextmanager
async def _relaying(socket: Path, who: Who) -> AsyncIterator[None]:
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        maximum_concurrent_rpcs=MOST_STREAMS,
    )

    async def pass_on(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async with _replica(who) as channel:
            call: Any = channel.stream_stream(f"/{_ADS}/{_METHOD}")(requests)  # type: ignore[arg-type]
            try:
                async for response in call:
                    yield response
            except grpc.aio.AioRpcError as e:
                await context.abort(e.code(), e.details() or "")
            finally:
                call.cancel()

    handler: Any = grpc.stream_stream_rpc_method_handler(pass_on)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_ADS, {_METHOD: handler}),))
    _listen(server, socket)
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


def _listen(server: grpc.aio.Server, socket: Path) -> None:
    """Have `server` listen where nobody but the directory's owner may knock, in place of whoever did before.

    Raises:
        ProxyFailed: it cannot.
    """
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix://{socket}")
        give_to_owner(socket, socket.parent)
    except (RuntimeError, OSError) as e:
        raise ProxyFailed(Exit.FAILED, f"nothing can listen at {socket}: {e}") from None
    finally:
        os.umask(before)


@asynccontextmanager
async def _replica(who: Who) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to any replica; it goes on to the next one by itself while it has not reached any."""
    credential, enrolled = who()
    addresses = list(enrolled.xds_addresses)
    random.shuffle(addresses)
    # A target is of one family.
    is_six = addresses[0].startswith("[")
    same = ",".join(address for address in addresses if address.startswith("[") == is_six)
    target = f"{'ipv6' if is_six else 'ipv4'}:{same}"
    async with channel_to(target, credential, *_KEEPALIVE) as channel:
        yield channel


# ---------------------------------------------------------------------------------------------------------- the secrets


async def _keep_secrets(directory: Path, who: Who, news: asyncio.Event, held: asyncio.Event) -> None:
    """Keep in `directory` what the control plane says; `held` is set once it is all there."""
    wait = FIRST_RETRY
    while True:
        try:
            async with _replica(who) as channel:
                async for identity, roots in _secrets(channel, who()[1].proxy):
                    credentials.write(directory, _as_credential(identity, roots))
                    wait = FIRST_RETRY
                    news.set()
                    held.set()
            reason = "the replica ended the stream"
        except grpc.aio.AioRpcError as e:
            reason = f"{e.code().name}: {(e.details() or '')[:300]}"
        except (Invalid, OSError, ValueError, DecodeError) as e:
            reason = str(e)
        _log.warning("the workload's secrets are not kept fresh", reason=reason, retry_in=round(wait, 1))
        await asyncio.sleep(wait * (0.5 + random.random()))  # noqa: S311
        wait = min(wait * 2, LAST_RETRY)


async def _secrets(channel: grpc.aio.Channel, node_id: str) -> AsyncIterator[tuple[Any, Any]]:
    """The workload's certificate and the roots, together, each time that one of them has changed."""
    call: Any = channel.stream_stream(
        _SDS,
        request_serializer=discovery_pb2.DiscoveryRequest.SerializeToString,
        response_deserializer=discovery_pb2.DiscoveryResponse.FromString,
    )()
    request = discovery_pb2.DiscoveryRequest(type_url=Type.SECRET.value, resource_names=[names.IDENTITY, names.BUNDLE])
    request.node.id = node_id
    held: dict[str, Any] = {}
    try:
        await call.write(request)
        while (response := await call.read()) is not grpc.aio.EOF:
            before = dict(held)
            for packed in response.resources:
                secret = secret_pb2.Secret()
                packed.Unpack(secret)
                held[secret.name] = secret
            if held != before and held.keys() == {names.IDENTITY, names.BUNDLE}:
                yield held[names.IDENTITY].tls_certificate, held[names.BUNDLE].validation_context
            request.version_info, request.response_nonce = response.version_info, response.nonce
            await call.write(request)
    finally:
        call.cancel()


def _as_credential(identity: Any, roots: Any) -> Credential:
    """What is kept in files in one piece: a workload's certificate as well as a credential."""
    chain = identity.certificate_chain.inline_bytes.decode()
    trusted = tuple(x509.pem(c) for c in x509.load(roots.trusted_ca.inline_bytes.decode()))
    return Credential(x509.uri(x509.load(chain)[0]), chain, identity.private_key.inline_bytes.decode(), trusted)
