"""What `Revoke` writes, what `Certificates` tells of it, and what the API is to whoever is revoked."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace as with_fields

import grpc
import grpc.aio
import pytest

from cluster.kv import Put
from smc.certificates import x509
from smc.model import Identity, MeshConfig, Name
from smc.records import (
    AdmissionRecord,
    CertificateRecord,
    CrlRecord,
    IssuedCertificate,
    ReadyRecord,
    RevocationRecord,
    RevokedCertificate,
    decode,
    encode,
)
from smc.v1 import smc_pb2 as pb
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import Replica, call, running

BUYER, TWIN = Name("shop", "buyer"), Name("shop", "twin")
HAD = Identity("shop", "buyer")
Code = grpc.StatusCode


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    """Two proxies of one identity."""
    async with running() as replica:
        twin = proxy(TWIN)
        twin = with_fields(twin, workload=with_fields(twin.workload, identity=HAD))
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
        ({}, Code.INVALID_ARGUMENT, "name either a proxy or an identity"),
        ({"proxy": "shop/a", "identity": "shop/a"}, Code.INVALID_ARGUMENT, "name either a proxy or an identity"),
        ({"proxy": "buyer"}, Code.INVALID_ARGUMENT, "'buyer' names no proxy (use <namespace>/<workload>)"),
        ({"identity": "a/b/c"}, Code.INVALID_ARGUMENT, "'a/b/c' names no identity"),
        ({"proxy": "../x"}, Code.INVALID_ARGUMENT, "names no proxy"),
        ({"proxy": "shop/buyer", "undo": True}, Code.NOT_FOUND, "proxy shop/buyer is not revoked"),
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
    gone = IssuedCertificate("0b", 1, "ee", now - 100, revision - 1)
    await put(
        replica, item.key, with_fields(decode(CertificateRecord, item.value), replaced=(gone, older), written=revision)
    )
    assert [(c.serial, c.state) for c in (await listed(replica)).certificates] == [
        (serial, "current"),
        ("0a", "replaced"),
    ]
    await revoke(replica, proxy="shop/buyer")
    (one,) = (await listed(replica)).revocations
    assert list(one.outstanding) == ["0a", serial]
    crl = CrlRecord(4, (1,), ("LIST",), (RevokedCertificate(HAD, older, now),))
    await put(replica, replica.keys.crl, crl)
    found = await listed(replica)
    assert [(c.serial, c.state) for c in found.certificates] == [(serial, "current"), ("0a", "revoked")]
    assert (found.crl_number, list(found.revocations[0].outstanding)) == (4, [serial])
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
