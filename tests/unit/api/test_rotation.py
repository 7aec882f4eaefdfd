"""What proxies say of their credentials, and what operators hear of a rotation, over the API with real TLS."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace as with_fields
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.kv import Put
from smc.api.status import AUTHORITY
from smc.certificates import authority, x509
from smc.certificates.credential import Credential
from smc.codec import decode, encode
from smc.model import Identity, MeshConfig, Name
from smc.records import (
    IntermediateRecord,
    JoinedRecord,
    Phase,
    ReadyRecord,
    Rotates,
    RotationRecord,
    SigningRecord,
    TrustRecord,
)
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import Replica, call, calling, details, running

BUYER = Name("shop", "buyer")


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    async with running() as replica:
        replica.mesh = mesh(MeshConfig(), {BUYER: proxy(BUYER)})
        yield replica


def said(credential: Credential) -> pb.TrustRequest:
    return pb.TrustRequest(roots=credential.pins, issuer=credential.issuer)


async def kept(replica: Replica) -> tuple[TrustRecord, int]:
    item = await replica.kv.get(replica.keys.trust(BUYER))
    assert item is not None
    return decode(TrustRecord, item.value), item.mod_revision


async def another_signs(replica: Replica) -> None:
    """A second intermediate, made of the first: only its number and its key id count here."""
    stored = await authority.load_stored(replica.kv, replica.keys)
    stored_mesh = await authority.load_mesh(replica.kv, replica.keys)
    root, handle = await authority.make_root(
        replica.signer_authority.signer, stored_mesh.trust_domain, 2, 1, time.time()
    )
    made, _ = await authority.make_intermediate(
        replica.signer_authority.signer, root, handle, stored_mesh.trust_domain, 2, 1, time.time()
    )
    record = IntermediateRecord(2, stored.signing, x509.pem(made), b"")
    await replica.kv.transact(
        [
            Put(replica.keys.ca("intermediates", 2), encode(record)),
            Put(replica.keys.signing, encode(SigningRecord(2))),
        ]
    )


async def test_what_a_proxy_says_is_kept_and_written_again_only_when_it_is_something_else(replica: Replica) -> None:
    credential = await replica.signed(f"proxy/{BUYER}")
    answer = await call(replica, credential, "Trust", said(credential))
    assert (tuple(answer.roots), answer.renew) == (replica.operator.roots, False)
    record, revision = await kept(replica)
    assert record == TrustRecord(BUYER, credential.pins, credential.issuer, credential.not_after)
    await call(replica, credential, "Trust", said(credential))
    assert await kept(replica) == (record, revision)
    await call(replica, credential, "Trust", pb.TrustRequest(roots=["0" * 64], issuer="ab"))
    assert (await kept(replica))[0].roots == ("0" * 64,)


async def test_of_a_workload_that_is_gone_nothing_is_kept(replica: Replica) -> None:
    credential = await replica.signed("proxy/shop/gone")
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, credential, "Trust", said(credential))
    assert e.value.code() == grpc.StatusCode.NOT_FOUND
    assert await replica.kv.get(replica.keys.trust(Name("shop", "gone"))) is None


async def test_a_proxy_hears_that_another_intermediate_signs(replica: Replica) -> None:
    credential = await replica.signed(f"proxy/{BUYER}")
    await another_signs(replica)
    assert (await call(replica, credential, "Trust", said(credential))).renew


@pytest.mark.parametrize("roots", [[], ["short"], ["0" * 64] * 17])
async def test_what_no_proxy_can_trust_is_refused(replica: Replica, roots: list[str]) -> None:
    credential = await replica.signed(f"proxy/{BUYER}")
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, credential, "Trust", pb.TrustRequest(roots=roots))
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await replica.kv.get(replica.keys.trust(BUYER)) is None


async def rotation(replica: Replica) -> Any:
    return await call(replica, replica.operator, "Rotation", pb.RotationRequest())


async def test_a_rotation_is_asked_for_once_and_force_may_be_added(replica: Replica) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await rotation(replica)
    assert e.value.code() == grpc.StatusCode.NOT_FOUND
    first = await call(replica, replica.operator, "Rotate", pb.RotateRequest(of="root"))
    assert (first.phase, first.of, first.forced) == ("requested", "root", False)
    assert first.requester == replica.operator.uri
    second = await call(replica, replica.operator, "Rotate", pb.RotateRequest(of="root", force=True))
    assert (second.id, second.forced) == (first.id, True)
    assert (await rotation(replica)).forced
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, replica.operator, "Rotate", pb.RotateRequest(of="intermediate"))
    assert e.value.code() == grpc.StatusCode.ABORTED
    assert "a rotation of the root is under way" in details(e.value).message


@pytest.mark.parametrize("of", ["", "leaf"])
async def test_what_is_no_authority_cannot_be_rotated(replica: Replica, of: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, replica.operator, "Rotate", pb.RotateRequest(of=of))
    assert details(e.value).message.endswith("cannot be rotated: intermediate or root can")


async def test_every_replica_can_say_who_is_missing(replica: Replica) -> None:
    record = RotationRecord("1", Rotates.ROOT, "", Phase.PUBLISHING, time.time(), intermediate=1)
    ready = encode(ReadyRecord(BUYER))
    await replica.kv.transact([Put(replica.keys.rotation, encode(record)), Put(replica.keys.ready(BUYER), ready)])
    found = await rotation(replica)
    assert [(one.kind, one.who, one.why) for one in found.missing] == [("proxy", str(BUYER), "connected to no replica")]
    assert (found.proxies, found.lacking, found.done) == (1, 1, False)


async def test_who_has_just_joined_is_missing_unless_a_later_mesh_has_no_such_workload(replica: Replica) -> None:
    record = RotationRecord("1", Rotates.ROOT, "", Phase.PUBLISHING, time.time(), intermediate=1)
    new = Name("shop", "new")
    await replica.kv.transact([Put(replica.keys.rotation, encode(record))])
    at = (await replica.kv.transact([Put(replica.keys.joined(new), encode(JoinedRecord(new)))])).revision
    for revision, missing in ((at - 1, [str(new)]), (at + 1, [])):
        replica.mesh = with_fields(replica.mesh, revision=revision)
        assert [one.who for one in (await rotation(replica)).missing] == missing
    replica.mesh = with_fields(replica.mesh, proxies={BUYER: proxy(BUYER), new: proxy(new)})
    assert [one.who for one in (await rotation(replica)).missing] == [str(new)]


@pytest.mark.parametrize("how", [{"admitted": {BUYER: ()}}, {"revoked_identities": {Identity("shop", "buyer"): True}}])
async def test_a_revoked_proxy_and_those_of_a_revoked_identity_are_not_missing(
    replica: Replica, how: dict[str, Any]
) -> None:
    record = RotationRecord("1", Rotates.ROOT, "", Phase.PUBLISHING, time.time(), intermediate=1)
    ready = encode(ReadyRecord(BUYER))
    await replica.kv.transact([Put(replica.keys.rotation, encode(record)), Put(replica.keys.ready(BUYER), ready)])
    replica.mesh = with_fields(replica.mesh, **how)
    found = await rotation(replica)
    assert (list(found.missing), found.proxies) == ([], 0)


async def test_an_answer_says_by_which_authority_the_replica_goes(replica: Replica) -> None:
    async with calling(replica.api, replica.operator) as channel:
        asked = MeshStub(channel).Proxies(pb.ProxiesRequest(local=True))  # type: ignore[no-untyped-call]
        await asked
        told = dict(await asked.trailing_metadata())
    assert told[AUTHORITY] == replica.credential.authority == replica.operator.authority
