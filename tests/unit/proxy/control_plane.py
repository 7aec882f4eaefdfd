"""A join port and an API with real TLS, whose answers the test decides."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio

from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import JoinServicer, MeshServicer, add_JoinServicer_to_server, add_MeshServicer_to_server
from tests.unit.certificates.authority import DAY, TestAuthority

Answer = Callable[[pb.Credential, Any], Any]


@dataclass
class ControlPlane(JoinServicer, MeshServicer):
    ca: TestAuthority
    joins: list[pb.JoinRequest] = field(default_factory=list)
    renewals: list[str] = field(default_factory=list)
    failures: list[tuple[grpc.StatusCode, str, str]] = field(default_factory=list)
    """(status, text, `smc-error`) of the next calls; after them all succeed."""
    path: str = "proxy/shop/buyer"
    ttl: timedelta = DAY
    signed_ago: float = 0.0
    api: str = ""
    told: list[pb.TrustRequest] = field(default_factory=list)
    newest: TestAuthority | None = None
    """Who signs now, if it is not `ca`: trusted beside it, until `retired` is `ca`."""
    retired: TestAuthority | None = None

    async def Join(  # noqa: N802
        self, request: pb.JoinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.Credential:
        self.joins.append(request)
        return await self._answer(request.csr, context)

    async def Renew(  # noqa: N802
        self, request: pb.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.Credential:
        (peer,) = context.auth_context()["peer_spiffe_id"]
        self.renewals.append(peer.decode())
        return await self._answer(request.csr, context)

    async def Trust(  # noqa: N802
        self, request: pb.TrustRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TrustResponse:
        if not request.roots:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no roots")
        self.told.append(request)
        newest = self.newest or self.ca
        roots = [x509.pem(ca.root) for ca in (self.ca, newest) if ca is not self.retired]
        return pb.TrustResponse(
            roots=list(dict.fromkeys(roots)), renew=request.issuer != x509.key_id(newest.intermediate)
        )

    async def _answer(self, csr: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Credential:
        if self.failures:
            code, text, kind = self.failures.pop(0)
            await context.abort(code, text, (("smc-error", kind),) if kind else ())
        ca = self.newest or self.ca
        leaf = ca.leaf(self.path, x509.requested_key(csr), now=time.time() - self.signed_ago, ttl=self.ttl)
        return pb.Credential(
            chain=x509.pem(leaf, ca.intermediate),
            roots=list(dict.fromkeys(x509.pem(one.root) for one in (self.ca, ca) if one is not self.retired)),
            trust_domain=self.ca.trust_domain,
            mesh="default",
            mesh_domain="mesh.internal",
            xds_addresses=["127.0.0.1:15128"],
            api_addresses=[self.api or "127.0.0.1:1"],
            address="127.0.0.1",
            app_address="127.0.0.1",
        )


@asynccontextmanager
async def serving(
    plane: ControlPlane, credential: Credential, chain: str = "", *, mutual: bool = False
) -> AsyncIterator[str]:
    """Serve both services; yields host:port. `chain` is what is presented, else leaf, intermediate and root."""
    server = grpc.aio.server()
    add_JoinServicer_to_server(plane, server)  # type: ignore[no-untyped-call]
    add_MeshServicer_to_server(plane, server)  # type: ignore[no-untyped-call]
    tls = grpc.ssl_server_credentials(
        [(credential.key.encode(), (chain or credential.chain_with_root()).encode())],
        credential.roots_pem.encode() if mutual else None,
        require_client_auth=mutual,
    )
    port = server.add_secure_port("127.0.0.1:0", tls)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
