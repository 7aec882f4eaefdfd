"""What `Revoke` writes, what `Certificates` tells of it, and what the API is to whoever is revoked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace as with_fields
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.kv import Put
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.certificates.revoking import KEEP_EXPIRED
from smc.codec import decode, encode
from smc.model import Identity, MeshConfig, Name
from smc.records import (
    AdmissionRecord,
    CertificateRecord,
    CrlRecord,
    IssuedCertificate,
    ReadyRecord,
    RevocationRecord,
    RevokedCertificate,
)
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import SERVICE, UNREACHABLE, Replica, ask_to_join, call, calling, running

BUYER, TWIN = Name("shop", "buyer"), Name("shop", "twin")
HAD = Identity("shop", "buyer")
Code = grpc.StatusCode


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    """Two proxies of one identity."""
    async with running() as replica:
        twin = proxy(TWIN)
        twin = twin._replace(workload=with_fields(twin.workload, identity=HAD))
        replica.mesh = mesh(MeshConfig(), {BUYER: proxy(BUYER), TWIN: twin})
        yield replica


async def revoke(replica: Replica, **fields: object) -> pb.RevokeResponse:
    answer: pb.RevokeResponse = await call(replica, replica.operator, "Revoke", pb.RevokeRequest(**fields))  # type: ignore[arg-type]
    return answer


async def refused(replica: Replica, **fields: object) -> tuple[Code, str]:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await revoke(replica, **fields)
    return e.value.code(), e.value.details() or ""


async def listed(replica: Replica, namespace: str = "") -> pb.CertificatesResponse:
    request = pb.CertificatesRequest(namespace=namespace)
    answer: pb.CertificatesResponse = await call(replica, replica.operator, "Certificates", request)
    return answer


async def put(replica: Replica, key: str, record: object) -> int:
    return (await replica.kv.transact([Put(key, encode(record))])).revision


async def certify(replica: Replica, *, life: float = 3600.0) -> tuple[str, int]:
    """Store a certificate of the identity; returns its serial and revision."""
    key = x509.new_key()
    credential = await replica.certified(HAD.uri("mesh.example"), key)
    (leaf, *_) = x509.load(credential.chain)
    serial, now = f"{leaf.serial_number:x}", time.time()
    record = CertificateRecord(HAD, credential.chain, b"sealed", serial, now, now + life, 1)
    return serial, await put(replica, replica.keys.certificate(HAD), record)


async def test_a_revoked_proxy_is_one_record_and_has_to_show_anew_that_it_listens(replica: Replica) -> None:
    await put(replica, replica.keys.ready(BUYER), ReadyRecord(BUYER))
    answer = await revoke(replica, proxy="shop/buyer", reason="stolen")
    assert (list(answer.proxies), answer.others) == (["shop/buyer"], 1)
    item = await replica.kv.get(replica.keys.revoked_proxy(BUYER))
    assert item is not None
    assert item.mod_revision == answer.resource_version == answer.revocation.resource_version
    record = decode(RevocationRecord, item.value)
    assert (record.proxy, record.identity, record.reason) == (BUYER, HAD, "stolen")
    assert record.author == replica.operator.uri
    assert await replica.kv.get(replica.keys.ready(BUYER)) is None


async def test_revoking_again_writes_nothing_until_the_proxy_was_let_in_again(replica: Replica) -> None:
    first = await revoke(replica, proxy="shop/buyer", reason="stolen")
    again = await revoke(replica, proxy="shop/buyer", reason="really")
    assert (again.resource_version, again.revocation.reason) == (0, "stolen")
    admission = AdmissionRecord(BUYER, first.resource_version, (("a1", time.time() + 100),))
    await put(replica, replica.keys.admission(BUYER), admission)
    assert [one.admitted for one in (await listed(replica)).revocations] == [True]
    later = await revoke(replica, proxy="shop/buyer", reason="again")
    assert later.resource_version > first.resource_version
    assert [one.admitted for one in (await listed(replica)).revocations] == [False]


async def test_a_proxy_that_the_mesh_does_not_have_is_revoked_by_its_name(replica: Replica) -> None:
    answer = await revoke(replica, proxy="shop/gone")
    assert (answer.revocation.proxy, answer.revocation.identity, answer.others) == ("shop/gone", "", 0)


async def test_an_identity_is_revoked_with_all_its_proxies_and_taken_back(replica: Replica) -> None:
    answer = await revoke(replica, identity="shop/buyer")
    assert list(answer.proxies) == ["shop/buyer", "shop/twin"]
    assert await replica.kv.get(replica.keys.revoked_identity(HAD)) is not None
    undone = await revoke(replica, identity="shop/buyer", undo=True)
    assert undone.resource_version > answer.resource_version
    assert not undone.HasField("revocation")
    assert await replica.kv.get(replica.keys.revoked_identity(HAD)) is None
    assert not (await listed(replica)).revocations


async def test_what_is_taken_back_takes_its_admissions_along(replica: Replica) -> None:
    first = await revoke(replica, proxy="shop/buyer")
    await put(replica, replica.keys.admission(BUYER), AdmissionRecord(BUYER, first.resource_version, (("a1", 9e9),)))
    await revoke(replica, proxy="shop/buyer", undo=True)
    assert not (await replica.kv.list(replica.keys.revocations)).items


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({}, Code.INVALID_ARGUMENT, "name a proxy, an identity, or the credential of an operator or a viewer"),
        ({"proxy": "shop/a", "identity": "shop/a"}, Code.INVALID_ARGUMENT, "and one alone"),
        ({"identity": "shop/a", "credential": "operator/ann"}, Code.INVALID_ARGUMENT, "and one alone"),
        ({"proxy": "buyer"}, Code.INVALID_ARGUMENT, "'buyer' names no proxy (use <namespace>/<workload>)"),
        ({"identity": "a/b/c"}, Code.INVALID_ARGUMENT, "'a/b/c' names no identity"),
        ({"proxy": "../x"}, Code.INVALID_ARGUMENT, "names no proxy"),
        ({"credential": "ann"}, Code.INVALID_ARGUMENT, "'ann' names no operator and no viewer (use operator/<name> or"),
        ({"credential": "operator/Ann"}, Code.INVALID_ARGUMENT, "names no operator and no viewer"),
        ({"credential": "operator/viewer/ann"}, Code.INVALID_ARGUMENT, "names no operator and no viewer"),
        ({"credential": "proxy/shop/buyer"}, Code.INVALID_ARGUMENT, "names no operator and no viewer"),
        (
            {"credential": "replica/replica-1"},
            Code.INVALID_ARGUMENT,
            "replica/replica-1 cannot be revoked (whoever has",
        ),
        ({"proxy": "shop/buyer", "undo": True}, Code.NOT_FOUND, "proxy shop/buyer is not revoked (smc cert list shows"),
        ({"identity": "shop/buyer", "undo": True}, Code.NOT_FOUND, "identity shop/buyer is not revoked"),
        ({"credential": "viewer/ann", "undo": True}, Code.NOT_FOUND, "viewer ann is not revoked"),
    ],
)
async def test_what_names_nobody_is_refused(replica: Replica, fields: dict[str, object], code: Code, text: str) -> None:
    found, said = await refused(replica, **fields)
    assert found is code
    assert text in said
    assert not (await replica.kv.list(replica.keys.revocations)).items


async def test_certificates_are_current_replaced_or_revoked_and_a_revocation_says_what_is_outstanding(
    replica: Replica,
) -> None:
    serial, revision = await certify(replica)
    now = time.time()
    item = await replica.kv.get(replica.keys.certificate(HAD))
    assert item is not None
    older = IssuedCertificate("0a", 1, "ff", now + 100, revision - 1)
    gone = IssuedCertificate("0b", 1, "ee", now - KEEP_EXPIRED - 100, revision - 1)
    ended = IssuedCertificate("0c", 1, "dd", now - 100, revision - 1)
    await put(
        replica,
        item.key,
        with_fields(decode(CertificateRecord, item.value), replaced=(gone, ended, older), written=revision),
    )
    assert [(c.serial, c.state) for c in (await listed(replica)).certificates] == [
        (serial, "current"),
        ("0a", "replaced"),
    ]
    await revoke(replica, proxy="shop/buyer")
    (one,) = (await listed(replica)).revocations
    assert list(one.outstanding) == ["0c", "0a", serial], "a connection may be open that was made with it"
    crl = CrlRecord(4, (1,), ("LIST",), (RevokedCertificate(HAD, older, now),))
    await put(replica, replica.keys.crl, crl)
    found = await listed(replica)
    assert [(c.serial, c.state) for c in found.certificates] == [(serial, "current"), ("0a", "revoked")]
    assert (found.crl_number, list(found.revocations[0].outstanding)) == (4, ["0c", serial])
    assert not (await listed(replica, "other")).certificates
    assert not (await listed(replica, "other")).revocations


async def test_a_revoked_proxy_cannot_renew_also_where_the_mesh_has_not_heard_of_it_yet(replica: Replica) -> None:
    buyer = await replica.signed("proxy/shop/buyer")
    request = pb.RenewRequest(csr=x509.request(x509.new_key()))
    assert await call(replica, buyer, "Renew", request)
    await revoke(replica, proxy="shop/buyer")
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, buyer, "Renew", request)
    assert (e.value.code(), "shop/buyer is revoked" in (e.value.details() or "")) == (Code.PERMISSION_DENIED, True)


async def test_a_proxy_that_the_mesh_refuses_is_asked_nothing_else(replica: Replica) -> None:
    buyer = await replica.signed("proxy/shop/buyer")
    replica.mesh = with_fields(replica.mesh, admitted={BUYER: ()})
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, buyer, "ReportDenials", pb.ReportDenialsRequest())
    assert (e.value.code(), "is revoked" in (e.value.details() or "")) == (Code.PERMISSION_DENIED, True)


# ----------------------------------------------------------------------------------------------- operators and viewers

ANN, VIC = "operator/ann", "viewer/vic"
LIST = pb.ListRequest(group="smc.io", kind="Service")


async def refuses(replica: Replica, credential: Credential, method: str, request: Any) -> str:
    """What the credential is told; it is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, credential, method, request)
    assert e.value.code() is Code.PERMISSION_DENIED, e.value.details()
    return e.value.details() or ""


def knows(replica: Replica, path: str, *serials: str) -> None:
    """This replica's Mesh has heard that it is revoked, and what was signed for it since."""
    replica.mesh = with_fields(replica.mesh, revoked_credentials={path: serials})


async def joined(replica: Replica, path: str, author: Credential) -> Credential:
    made = await call(replica, author, "CreateToken", pb.CreateTokenRequest(credential=path))
    key = x509.new_key()
    answer = await ask_to_join(replica, made.token, x509.request(key))
    uri = x509.credential_uri("mesh.example", path)
    return Credential(uri, answer.chain, x509.private_pem(key).decode(), tuple(answer.roots))


@pytest.mark.parametrize("path", [ANN, VIC])
async def test_a_revoked_operator_or_viewer_is_one_record_that_is_listed_and_taken_back(
    replica: Replica, path: str
) -> None:
    answer = await revoke(replica, credential=path, reason="lost")
    assert (list(answer.proxies), answer.others) == ([], 0)
    item = await replica.kv.get(replica.keys.revoked_credential(path))
    assert item is not None
    record = decode(RevocationRecord, item.value)
    assert (record.credential, record.proxy, record.identity, record.reason) == (path, None, None, "lost")
    (one,) = (await listed(replica)).revocations
    assert (one.credential, one.proxy, one.identity, one.author, one.reason) == (
        path, "", "", replica.operator.uri, "lost"
    )  # fmt: skip
    assert one == answer.revocation
    assert not (await listed(replica, "shop")).revocations, "it is of no namespace"
    assert (await revoke(replica, credential=path)).resource_version == 0, "it was revoked before"
    await revoke(replica, credential=path, undo=True)
    assert not (await replica.kv.list(replica.keys.revocations)).items


@pytest.mark.parametrize(
    ("path", "method", "request_"),
    [
        (ANN, "List", LIST),
        (ANN, "Apply", pb.ApplyRequest(document=SERVICE, file="shop.yaml", line=1)),
        (ANN, "Renew", pb.RenewRequest(csr=x509.request(x509.new_key()))),
        (VIC, "List", LIST),
        (VIC, "Proxies", pb.ProxiesRequest()),
        (VIC, "Renew", pb.RenewRequest(csr=x509.request(x509.new_key()))),
    ],
)
async def test_every_call_of_whoever_the_mesh_refuses_is_refused_and_nobody_elses(
    replica: Replica, path: str, method: str, request_: Any
) -> None:
    stolen, other = await replica.signed(path), await replica.signed(f"{path}-2")
    await call(replica, stolen, method, request_)
    await revoke(replica, credential=path)
    knows(replica, path)
    said = await refuses(replica, stolen, method, request_)
    assert said == (
        f"the credential of {path} is revoked (smc login with a token from another operator; if there is none, "
        "smc recover)"
    )
    await call(replica, other, method, request_)


async def test_a_connection_that_is_open_is_refused_its_next_call(replica: Replica) -> None:
    stolen = await replica.signed(ANN)
    async with calling(replica.api, stolen) as channel:
        stub = MeshStub(channel)  # type: ignore[no-untyped-call]
        await stub.List(LIST, timeout=20)
        await revoke(replica, credential=ANN)
        knows(replica, ANN)
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await stub.List(LIST, timeout=20)
    assert e.value.code() is Code.PERMISSION_DENIED


async def test_a_call_that_is_open_ends_when_its_caller_is_revoked(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smc.api.calls.LOOK_AGAIN", 0.02)
    began, ended = asyncio.Event(), asyncio.Event()

    async def for_ever(_key: str) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    stolen = await replica.signed(VIC)
    request = pb.GetRequest(group="smc.io", kind="Service", namespace="shop", name="x")
    with monkeypatch.context() as patch:
        patch.setattr(replica.kv, "get", for_ever, raising=False)
        asking = asyncio.create_task(refuses(replica, stolen, "Get", request))
        await began.wait()
        await asyncio.sleep(0.1)
        assert not asking.done()
    await revoke(replica, credential=VIC)
    knows(replica, VIC)
    assert "viewer/vic is revoked" in await asking
    await ended.wait()


async def test_a_replica_whose_mesh_is_behind_writes_nothing_that_would_outlast_the_revocation(
    replica: Replica,
) -> None:
    stolen = await replica.signed(ANN)
    await revoke(replica, credential=ANN)
    await call(replica, stolen, "List", LIST)  # this replica has not heard of it yet
    token = pb.CreateTokenRequest(credential="operator/accomplice")
    assert "is revoked" in await refuses(replica, stolen, "CreateToken", token)
    undo = pb.RevokeRequest(credential=ANN, undo=True)
    assert "is revoked" in await refuses(replica, stolen, "Revoke", undo)
    assert "is revoked" in await refuses(replica, stolen, "Revoke", pb.RevokeRequest(credential="operator/admin"))
    renew = pb.RenewRequest(csr=x509.request(x509.new_key()))
    assert "is revoked" in await refuses(replica, stolen, "Renew", renew)
    apply = pb.ApplyRequest(document=SERVICE, file="shop.yaml", line=1)
    assert "is revoked" in await refuses(replica, stolen, "Apply", apply)
    await call(replica, replica.operator, "Apply", apply)
    delete = pb.DeleteRequest(group="smc.io", kind="Service", namespace="shop", name="bookstore")
    assert "is revoked" in await refuses(replica, stolen, "Delete", delete)
    assert "is revoked" in await refuses(replica, stolen, "Rotate", pb.RotateRequest(of="root", force=True))
    assert len((await replica.kv.list(replica.keys.manifests)).items) == 1
    assert await replica.kv.get(replica.keys.rotation) is None
    assert not (await replica.kv.list(replica.keys.tokens)).items
    assert [one.credential for one in (await listed(replica)).revocations] == [ANN]


async def test_a_replica_without_a_mesh_asks_the_store_who_is_revoked(replica: Replica) -> None:
    stolen, other = await replica.signed(ANN), await replica.signed(VIC)
    await revoke(replica, credential=ANN)
    replica.mesh = None
    assert "is revoked" in await refuses(replica, stolen, "List", LIST)
    await call(replica, other, "List", LIST)
    replica.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, other, "Proxies", pb.ProxiesRequest())
    assert (e.value.code(), "cannot be told whether" in (e.value.details() or "")) == (Code.UNAVAILABLE, True)


async def test_a_new_token_lets_it_in_again_at_once_and_what_was_stolen_stays_out(replica: Replica) -> None:
    stolen = await replica.signed(ANN)
    await revoke(replica, credential=ANN)
    knows(replica, ANN)
    anew = await joined(replica, ANN, replica.operator)
    await call(replica, anew, "List", LIST)  # though this Mesh has not heard of it yet
    assert [one.admitted for one in (await listed(replica)).revocations] == [True]
    renewed = await call(replica, anew, "Renew", pb.RenewRequest(csr=x509.request(x509.new_key())))
    assert renewed.chain
    await refuses(replica, stolen, "List", LIST)
    # Should it be lost again, it is revoked again.
    assert (await revoke(replica, credential=ANN)).resource_version
    await refuses(replica, anew, "List", LIST)


async def test_an_operator_may_revoke_itself_and_only_others_lead_back(replica: Replica) -> None:
    ann = await replica.signed(ANN)
    answer = await call(replica, ann, "Revoke", pb.RevokeRequest(credential=ANN))
    assert answer.revocation.author == ann.uri
    knows(replica, ANN)
    await refuses(replica, ann, "Revoke", pb.RevokeRequest(credential=ANN, undo=True))
    await revoke(replica, credential=ANN, undo=True)
    replica.mesh = with_fields(replica.mesh, revoked_credentials={})
    await call(replica, ann, "List", LIST)


async def test_a_viewer_revokes_nobody(replica: Replica) -> None:
    vic = await replica.signed(VIC)
    for path in (ANN, VIC):
        said = await refuses(replica, vic, "Revoke", pb.RevokeRequest(credential=path))
        assert "that takes the role operator" in said


async def test_a_revocation_of_an_operator_that_cannot_be_read_is_listed_by_its_key(replica: Replica) -> None:
    await replica.kv.transact([Put(replica.keys.revoked_credential(ANN), b"{}")])
    await replica.kv.transact([Put(replica.keys.admitted_credential(ANN), b"?")])
    (one,) = (await listed(replica)).revocations
    assert (one.credential, one.admitted, "has format None" in one.reason) == (ANN, False, True)
