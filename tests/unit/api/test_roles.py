from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
import pytest

from smc.api.access import OPERATOR, PROXY, REPLICA, ROLES, VIEWER
from smc.certificates import x509
from smc.v1 import smc_pb2 as pb
from tests.unit.api.replica import SERVICE, Replica, call, calling, details, running
from tests.unit.certificates.authority import TestAuthority

PATHS = {OPERATOR: "operator/ann", VIEWER: "viewer/vic", PROXY: "proxy/shop/buyer", REPLICA: "replica/replica-9"}
REQUESTS: dict[str, Any] = {
    "Apply": pb.ApplyRequest(document=SERVICE, file="service.yaml", line=1),
    "Get": pb.GetRequest(group="smc.io", kind="Service", namespace="shop", name="none"),
    "List": pb.ListRequest(group="smc.io", kind="Service"),
    "Delete": pb.DeleteRequest(group="smc.io", kind="Service", namespace="shop", name="none"),
    "Proxies": pb.ProxiesRequest(),
    "Wait": pb.WaitRequest(),
    "Acks": pb.AcksRequest(),
    "Denials": pb.DenialsRequest(),
    "ReportDenials": pb.ReportDenialsRequest(),
    "Explain": pb.ExplainRequest(caller="shop/buyer", service="shop/bookstore"),
    "Diff": pb.DiffRequest(),
    "Config": pb.ConfigRequest(proxy="shop/buyer"),
    "Reach": pb.GetRequest(group="smc.io", kind="Service", namespace="shop", name="none"),
    "CreateToken": pb.CreateTokenRequest(credential="operator/new"),
    "Certificates": pb.CertificatesRequest(),
    "Revoke": pb.RevokeRequest(proxy="shop/nobody"),
    "Renew": pb.RenewRequest(),
    "Trust": pb.TrustRequest(),
    "Rotate": pb.RotateRequest(of="root"),
    "Rotation": pb.RotationRequest(),
}


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    async with running() as replica:
        replica.mesh = None
        yield replica


@pytest.mark.parametrize(("role", "method"), list(itertools.product(PATHS, ROLES)))
async def test_a_role_may_call_what_the_table_says_and_nothing_else(replica: Replica, role: str, method: str) -> None:
    credential = await replica.signed(PATHS[role])
    try:
        await call(replica, credential, method, REQUESTS[method])
        code = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as e:
        code = e.code()
        if code == grpc.StatusCode.PERMISSION_DENIED:
            told = details(e)
            assert f"spiffe://mesh.example/{PATHS[role]} may not call {method}" in told.message
            assert told.hint
    allowed = role in ROLES[method]
    assert (code != grpc.StatusCode.PERMISSION_DENIED) == allowed
    assert code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL)


async def test_a_method_that_the_service_does_not_have_is_unimplemented(replica: Replica) -> None:
    async with calling(replica.api, replica.operator) as channel:
        method = channel.unary_unary("/smc.v1.Mesh/Restart")
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await method(b"", timeout=20)
    assert e.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def refused(replica: Replica, credential: Any, *, roots: str = "") -> grpc.aio.AioRpcError:
    async with calling(replica.api, credential, roots=roots or replica.operator.roots_pem) as channel:
        stub = channel.unary_unary(
            "/smc.v1.Mesh/List",
            request_serializer=pb.ListRequest.SerializeToString,
            response_deserializer=pb.ListResponse.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await stub(REQUESTS["List"], timeout=20)
        return e.value


async def test_nobody_gets_in_without_a_certificate(replica: Replica) -> None:
    assert (await refused(replica, None)).code() == grpc.StatusCode.UNAVAILABLE


async def test_nobody_gets_in_with_a_certificate_of_another_authority(replica: Replica) -> None:
    stranger = TestAuthority.make(now=time.time()).credential("operator/ann", now=time.time())
    assert (await refused(replica, stranger)).code() == grpc.StatusCode.UNAVAILABLE


async def test_an_expired_credential_is_refused(replica: Replica) -> None:
    expired = await replica.signed("operator/ann", ttl=timedelta(seconds=-1))
    assert (await refused(replica, expired)).code() == grpc.StatusCode.UNAVAILABLE


async def test_a_connection_that_outlives_its_credential_is_refused(replica: Replica) -> None:
    short = await replica.signed("operator/ann", ttl=timedelta(minutes=2))
    async with calling(replica.api, short) as channel:
        stub = channel.unary_unary(
            "/smc.v1.Mesh/List",
            request_serializer=pb.ListRequest.SerializeToString,
            response_deserializer=pb.ListResponse.FromString,
        )
        await stub(REQUESTS["List"], timeout=20)
        replica.clock += 200
        try:
            with pytest.raises(grpc.aio.AioRpcError) as e:
                await stub(REQUESTS["List"], timeout=20)
        finally:
            replica.clock -= 200
    assert e.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "has expired" in details(e.value).message


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("spiffe://mesh.example/ns/shop/sa/buyer", grpc.StatusCode.PERMISSION_DENIED),
        ("spiffe://mesh.example/operator/ann/bob", grpc.StatusCode.PERMISSION_DENIED),
        ("spiffe://mesh.example/root/ann", grpc.StatusCode.PERMISSION_DENIED),
        # The authority is good for its own trust domain only, so TLS says no before we do.
        ("spiffe://mesh.example.evil/operator/ann", grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_only_a_credential_of_this_trust_domain_says_who_calls(
    replica: Replica, uri: str, code: grpc.StatusCode
) -> None:
    odd = await replica.certified(uri, x509.new_key())
    assert (await refused(replica, odd)).code() == code


async def test_what_the_metadata_claims_counts_for_nothing(replica: Replica) -> None:
    viewer = await replica.signed("viewer/vic")
    claims = (("x-forwarded-client-cert", "URI=spiffe://mesh.example/operator/ann"), ("role", "operator"))
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, viewer, "Apply", REQUESTS["Apply"], metadata=claims)
    assert e.value.code() == grpc.StatusCode.PERMISSION_DENIED
