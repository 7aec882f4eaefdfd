"""The API's two ports: one for whoever has a credential, one for whoever has none yet."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from smc.api.access import OPERATOR, PROXY, VIEWER, Caller, authorise
from smc.api.backends import Backends
from smc.api.calls import Gate
from smc.api.denials import Denials
from smc.api.join_service import JoinService
from smc.api.limits import Limiter, Limits, Places, Rate
from smc.api.mesh_service import MeshService
from smc.api.status import AUTHORITY
from smc.certificates import admissions
from smc.certificates.authority import store_errors
from smc.certificates.credential import Credential
from smc.errors import Denied, Unavailable
from smc.metrics import Metrics
from smc.tls import ServerTLS, peer_leaf, peer_path, server_credentials

MESH_LIMITS = Limits(peer=Rate(200, 1000), overall=Rate(1000, 3000))
JOIN_LIMITS = Limits(peer=Rate(10, 100), overall=Rate(50, 300))
"""A machine may start many proxies at once, and they all come from its address."""
RARE: Mapping[tuple[str, str], Rate] = {
    (PROXY, "Renew"): Rate(0.25, 20),
    (PROXY, "Trust"): Rate(1, 30),
    (OPERATOR, "Renew"): Rate(1, 60),
    (VIEWER, "Renew"): Rate(1, 60),
}
"""By role and method, for one name: the leader signs at each Renew, and each Trust may be a write. The shortest life
that a credential may have makes a proxy renew every 4 s; one that starts over and over says each time whom it trusts.
People renew seldom, but many machines may have the credential of one name."""
REVOKED = "the revoked"
"""To whom is counted what all of them ask: neither who was let in again must pay for it, nor everybody else."""
MESH_MESSAGE = 4 * 1024 * 1024
JOIN_MESSAGE = 64 * 1024
MESH_CALLS, JOIN_CALLS = 256, 64
"""Calls that are being answered at one time."""
CALLS_OF_ONE = 64
"""Of MESH_CALLS: who waits for a long time in many must not keep out who wants to revoke him."""
DEADLINE = 20.0
"""Seconds for one call: a credential may wait 15 for the election of a leader."""
GRACE = 2.0
"""Seconds that calls in flight have when the servers stop."""


@dataclass(frozen=True, slots=True)
class Ports:
    api: int
    join: int


@asynccontextmanager
async def serving(
    backends: Backends,
    metrics: Metrics,
    *,
    api: str,
    join: str,
    mesh_limits: Limits = MESH_LIMITS,
    join_limits: Limits = JOIN_LIMITS,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Ports]:
    """Serve both ports for as long as the block runs; `api` and `join` are host:port, port 0 for any that is free.

    Raises:
        Unavailable: an address cannot be bound.
    """

    def of_credential(call: grpc.aio.ServicerContext[Any, Any]) -> tuple[str, Caller]:
        path = peer_path(call.auth_context(), backends.trust_domain, backends.now())
        leaf = peer_leaf(call.auth_context())
        caller = Caller(backends.trust_domain, path, f"{leaf.serial_number:x}", leaf.not_valid_after_utc.timestamp())
        mesh = backends.mesh()
        is_stolen = mesh is not None and mesh.refuses_credential(path, caller.serial)
        return REVOKED if is_stolen else path, caller

    def of_address(call: grpc.aio.ServicerContext[Any, Any]) -> tuple[str, str]:
        # ipv4:127.0.0.1:40000 without the port: whoever joins has no other name.
        address = call.peer().rpartition(":")[0]
        return address, address

    async def admit(caller: Caller) -> None:
        mesh = backends.mesh()
        if mesh is not None and not (why := mesh.refuses_credential(caller.path, caller.serial)):
            return
        if caller.role in (OPERATOR, VIEWER):
            # This Mesh may not know yet of a credential that was signed a moment ago; the store does.
            with store_errors("it cannot be told whether the credential is revoked"):
                await admissions.check_credential(backends.kv, backends.keys, caller.path, caller.serial)
        elif mesh is not None:
            raise Denied(why)

    async def admit_all(_address: str) -> None:
        """Whoever joins shows a token, and that says more."""

    rare = {of: Limiter(Limits(rate, mesh_limits.overall), clock) for of, rate in RARE.items()}

    def rarer(caller: Caller, method: str) -> float:
        limiter = rare.get((caller.role, method))
        return limiter.admit(caller.path) if limiter is not None else 0.0

    mesh_gate = Gate(
        "Mesh",
        of_credential,
        authorise,
        admit,
        Limiter(mesh_limits, clock),
        rarer,
        Places(CALLS_OF_ONE),
        DEADLINE,
        metrics,
        backends.unreachable_for,
        lambda: ((AUTHORITY, backends.credential().authority),),
    )
    join_gate = Gate(
        "Join",
        of_address,
        lambda _address, _method: None,
        admit_all,
        Limiter(join_limits, clock),
        lambda _address, _method: 0.0,
        Places(JOIN_CALLS),
        DEADLINE,
        metrics,
        backends.unreachable_for,
    )
    mesh_server = _server(MESH_MESSAGE, MESH_CALLS)
    mesh_server.add_generic_rpc_handlers((mesh_gate.open(MeshService(backends, Denials(clock)).methods()),))
    join_server = _server(JOIN_MESSAGE, JOIN_CALLS)
    join_server.add_generic_rpc_handlers((join_gate.open({"Join": JoinService(backends).join}),))

    mutual = server_credentials(presented(backends.credential, lambda c: c.chain), require_client=True)
    # With the root: who joins knows only a pin of its key, and has to find it.
    server_only = server_credentials(presented(backends.credential, Credential.chain_with_root), require_client=False)
    async with AsyncExitStack() as stops:  # both, even if the first is interrupted
        stops.push_async_callback(mesh_server.stop, GRACE)
        stops.push_async_callback(join_server.stop, GRACE)
        ports = Ports(_bind(mesh_server, api, mutual), _bind(join_server, join, server_only))
        await mesh_server.start()
        await join_server.start()
        yield ports


def presented(credential: Callable[[], Credential], chain: Callable[[Credential], str]) -> Callable[[], ServerTLS]:
    """What a server presents; the same object for the same credential."""
    last: tuple[Credential, ServerTLS] | None = None

    def current() -> ServerTLS:
        nonlocal last
        newest = credential()
        if last is None or last[0] is not newest:
            last = newest, ServerTLS(chain(newest), newest.key, newest.roots_pem)
        return last[1]

    return current


def _server(message: int, calls: int) -> grpc.aio.Server:
    return grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", message),
            ("grpc.max_send_message_length", -1),
            # A port that another process has must be an error, not a share of its calls.
            ("grpc.so_reuseport", 0),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_connection_age_ms", 30 * 60_000),
            ("grpc.max_connection_age_grace_ms", 60_000),
            ("grpc.max_concurrent_streams", 100),
        ],
        maximum_concurrent_rpcs=calls,
    )


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as e:
        raise Unavailable(
            f"{address} cannot be bound: {e}", hint="is another process there, or is it no address of this machine?"
        ) from None
    return port
