"""What the leader does about a revocation, in which order, and what the next leader makes of a half-done one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509 as cx509

from cluster.kv import Delete, Put
from smc.certificates import x509
from smc.certificates.authority import make_intermediate
from smc.certificates.issuing import BATCH, MOST_REPLACED, RETIRE_AFTER
from smc.certificates.revoking import IDLE, KEEP_EXPIRED, PATIENCE, SETTLE, Revoked
from smc.codec import decode, encode
from smc.model import Identity, Name
from smc.records import CertificateRecord, CrlRecord, IntermediateRecord, RevocationRecord, RootRecord
from tests.unit.certificates.issuer import BUYER, DAY, STORE, Mesh, half_life, now

pytestmark = pytest.mark.looptime

BAD, GOOD = Name("shop", "bad"), Name("shop", "good")


@asynccontextmanager
async def certified(*others: Identity) -> AsyncIterator[tuple[Mesh, CertificateRecord]]:
    """A mesh with a leader at work that wants STORE and these `others`, and STORE's first certificate."""
    mesh = await Mesh.make()
    mesh.want(STORE, *others)
    async with mesh.leading():
        yield mesh, await mesh.certified(STORE)


def want(mesh: Mesh, **changes: Any) -> None:
    """Have `mesh.wanted` otherwise in this, and as it was in all else."""
    mesh.wanted = replace(mesh.wanted, **changes)
    mesh.changed.set()


async def stored(mesh: Mesh) -> CertificateRecord:
    """STORE's record, which is there now."""
    record = await mesh.record(STORE)
    assert record is not None
    return record


async def crl(mesh: Mesh) -> CrlRecord:
    item = await mesh.kv.get(mesh.keys.crl)
    assert item is not None
    return decode(CrlRecord, item.value)


async def listed(mesh: Mesh) -> set[str]:
    """The serials on the lists, each of which is signed by its intermediate and says what is stored."""
    record = await crl(mesh)
    found: set[str] = set()
    for number, pem in zip(record.issuers, record.lists, strict=True):
        item = await mesh.kv.get(mesh.keys.ca("intermediates", number))
        assert item is not None
        (issuer,) = x509.load(decode(IntermediateRecord, item.value).certificate)
        parsed = cx509.load_pem_x509_crl(pem.encode())
        assert parsed.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
        assert parsed.issuer == issuer.subject
        assert parsed.last_update_utc == issuer.not_valid_before_utc
        assert parsed.next_update_utc == issuer.not_valid_after_utc
        on_it = {f"{one.serial_number:x}" for one in parsed}
        assert on_it == {o.certificate.serial for o in record.revoked if o.certificate.issuer == number}
        found |= on_it
    return found


async def revoke(mesh: Mesh, *others: Name, identity: Identity = STORE) -> int:
    """Revoke the proxy BAD, which had this identity as well as `others`; returns the revision."""
    record = RevocationRecord(BAD, identity, "", "", now())
    revision = (await mesh.kv.transact([Put(mesh.keys.revoked_proxy(BAD), encode(record))])).revision
    want(mesh, revoked=Revoked(since={identity: revision}, others={identity: frozenset(others)}))
    return revision


async def settled(mesh: Mesh, *serials: str) -> float:
    """Wait until these are listed; returns the seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not set(serials) <= await listed(mesh):
        assert loop.time() < began + 30, "they are not listed"
        await asyncio.sleep(0.05)
    return loop.time() - began


async def test_there_is_an_empty_list_before_anything_is_revoked() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        await asyncio.sleep(1)
        assert (await crl(mesh)).issuers == (1,)
        assert await listed(mesh) == set()


async def test_the_others_get_another_key_and_connect_with_it_before_the_old_one_is_listed() -> None:
    async with certified(BUYER) as (mesh, first):
        other = await mesh.certified(BUYER)
        mesh.lagging[str(GOOD)] = "pending"
        revision = await revoke(mesh, GOOD)
        second = await mesh.renewed(first)
        assert x509.load(second.chain)[0].public_key() != x509.load(first.chain)[0].public_key()
        assert (second.reconnect, [one.serial for one in second.replaced]) == ("", [first.serial])
        assert second.replaced[0].revision < revision
        await asyncio.sleep(0.5)
        assert (await stored(mesh)).reconnect == "", "the new key is not everywhere yet"
        mesh.lagging.clear()
        await asyncio.sleep(0.5)
        now_stored = await stored(mesh)
        assert (now_stored.serial, now_stored.reconnect) == (second.serial, second.serial)
        assert await listed(mesh) == set(), "they are connecting"
        await settled(mesh, first.serial)
        assert await listed(mesh) == {first.serial}
        assert await mesh.record(BUYER) == other, "nobody else is concerned"
        assert await mesh.record(STORE) == now_stored


async def test_the_certificates_before_the_last_are_listed_too_while_they_live() -> None:
    async with certified() as (mesh, first):
        second = await mesh.renewed(first)
        assert now() < first.not_after
        await revoke(mesh)
        await settled(mesh, first.serial, second.serial)
        assert (await stored(mesh)).serial not in await listed(mesh)


async def test_a_proxy_that_does_not_follow_holds_up_a_revocation_for_three_seconds_and_no_longer() -> None:
    async with certified() as (mesh, first):
        mesh.lagging[str(GOOD)] = "stalled"
        await revoke(mesh, GOOD)
        assert PATIENCE - 0.1 < await settled(mesh, first.serial) < PATIENCE + 0.5


async def test_who_lags_and_has_another_identity_is_not_waited_for() -> None:
    async with certified() as (mesh, first):
        mesh.lagging["shop/stranger"] = "stalled"
        await revoke(mesh, GOOD)
        assert await settled(mesh, first.serial) < SETTLE + 0.5


async def test_a_proxy_that_was_alone_with_its_key_is_waited_for_by_nobody() -> None:
    async with certified() as (mesh, first):
        await revoke(mesh)
        assert await settled(mesh, first.serial) < 0.3


@pytest.mark.parametrize("after", [0.0, 0.01, 0.2, 0.7, 1.2])
async def test_the_next_leader_ends_what_a_dead_one_began(after: float) -> None:
    async with certified() as (mesh, first):
        mesh.lagging[str(GOOD)] = "pending"
        await revoke(mesh, GOOD)
        asyncio.get_running_loop().call_later(0.5, mesh.lagging.clear)
        await asyncio.sleep(after)
    async with mesh.leading():
        await settled(mesh, first.serial)
        record = await stored(mesh)
        assert record.serial not in await listed(mesh)
        assert record.reconnect, "the others were told to connect anew"
        assert len(await listed(mesh)) == 1, "nothing was made twice"


async def test_whoever_is_revoked_between_two_writes_of_one_key_has_seen_that_key() -> None:
    async with certified() as (mesh, first):
        mesh.lagging[str(GOOD)] = "pending"
        await revoke(mesh, GOOD)
        second = await mesh.renewed(first)
        await revoke(mesh)  # the other one, just before the record is written with what tells it to connect anew
        await settled(mesh, first.serial, second.serial)
        assert (await stored(mesh)).serial not in {first.serial, second.serial}


async def test_a_second_look_at_a_revocation_changes_nothing() -> None:
    async with certified() as (mesh, first):
        await revoke(mesh)
        await settled(mesh, first.serial)
        before = (await mesh.kv.list(mesh.keys.root)).items
        want(mesh, identities=mesh.wanted.identities | {BUYER})
        await mesh.certified(BUYER)
        await asyncio.sleep(2 * IDLE)
        after = (await mesh.kv.list(mesh.keys.root)).items
        assert set(before) <= set(after)


async def test_a_revoked_identity_loses_its_record_at_once_and_gets_another_key_once_it_is_none_any_more() -> None:
    async with certified(BUYER) as (mesh, first):
        await mesh.certified(BUYER)
        want(mesh, identities=frozenset({BUYER}), revoked=Revoked(frozenset({STORE})))
        await settled(mesh, first.serial)
        assert await mesh.record(STORE) is None
        await asyncio.sleep(2 * RETIRE_AFTER)
        assert await mesh.record(STORE) is None
        mesh.want(STORE, BUYER)
        again = await mesh.certified(STORE)
        assert again.serial != first.serial
        assert await listed(mesh) == {first.serial}, "the old key stays out"
        assert again.reconnect == again.serial, "on connections that were made with the old one nothing is let through"
        assert (first.reconnect, (await mesh.certified(BUYER)).reconnect) == ("", "")


async def test_the_certificates_of_an_identity_that_no_workload_has_any_more_are_listed() -> None:
    async with certified(BUYER) as (mesh, first):
        mesh.want(BUYER)
        await asyncio.sleep(RETIRE_AFTER - 5)
        assert await listed(mesh) == set()
        await asyncio.sleep(10)
        assert await mesh.record(STORE) is None
        assert await listed(mesh) == {first.serial}


async def test_the_certificates_that_have_expired_are_listed_too_while_a_connection_may_still_have_them() -> None:
    async with certified() as (mesh, first):
        await asyncio.sleep(first.not_after - now() + KEEP_EXPIRED - 60)
        await revoke(mesh)
        await settled(mesh, first.serial)


async def test_so_are_those_of_a_revoked_identity() -> None:
    async with certified() as (mesh, first):
        await asyncio.sleep(first.not_after - now() + KEEP_EXPIRED - 60)
        want(mesh, identities=frozenset(), revoked=Revoked(frozenset({STORE})))
        await settled(mesh, first.serial)


async def test_so_are_those_of_an_identity_that_no_workload_has_any_more() -> None:
    async with certified() as (mesh, first):
        await asyncio.sleep(first.not_after - now() + KEEP_EXPIRED - RETIRE_AFTER - 60)
        mesh.want(BUYER)
        await asyncio.sleep(RETIRE_AFTER + 5)
        assert first.serial in await listed(mesh)


async def test_what_nobody_can_have_any_more_leaves_the_lists_and_takes_nothing_else_along() -> None:
    async with certified() as (mesh, first):
        await revoke(mesh)
        await settled(mesh, first.serial)
        await asyncio.sleep(2 * KEEP_EXPIRED)
        await revoke(mesh)
        second = await mesh.renewed(await mesh.certified(STORE))
        await revoke(mesh)
        await settled(mesh, second.serial)
        number = (await crl(mesh)).number
        await asyncio.sleep(first.not_after - now() + KEEP_EXPIRED - 60)
        assert {first.serial, second.serial} <= await listed(mesh)
        await asyncio.sleep(KEEP_EXPIRED + 60 + 2 * IDLE)
        assert first.serial not in await listed(mesh)
        assert (await crl(mesh)).number > number
        assert now() < second.not_after + KEEP_EXPIRED
        assert second.serial in await listed(mesh)


async def test_lives_that_are_very_short_leave_a_record_that_the_store_takes() -> None:
    mesh = await Mesh.make()
    mesh.want(STORE, ttl=timedelta(seconds=10))
    async with mesh.leading():
        first = await mesh.certified(STORE)
        await asyncio.sleep(1800)
        record = await stored(mesh)
        assert record.not_after > now()
        assert len(record.replaced) == MOST_REPLACED
        assert first.serial not in {one.serial for one in record.replaced}
        assert len(encode(record)) < 1024 * 1024 / BATCH


async def test_a_signer_that_fails_delays_a_revocation_and_drops_nothing() -> None:
    async with certified() as (mesh, first):
        await asyncio.sleep(1)
        mesh.signer.breaks(True)
        await revoke(mesh)
        await asyncio.sleep(20)
        assert await mesh.record(STORE) == first
        mesh.signer.breaks(False)
        await settled(mesh, first.serial)


async def test_an_ordinary_renewal_revokes_nothing_and_disturbs_no_connection() -> None:
    async with certified() as (mesh, record):
        for _ in range(4):
            before, record = record, await mesh.renewed(record)
            assert before.serial in {one.serial for one in record.replaced}
            assert all(one.not_after > now() - KEEP_EXPIRED - 1 for one in record.replaced)
            assert record.reconnect == ""
        assert len(record.replaced) <= 2
        assert await listed(mesh) == set()
    assert half_life(record) < record.not_after < now() + DAY.total_seconds() + 1


async def test_an_intermediate_has_a_list_from_when_it_is_there_until_it_would_have_ended() -> None:
    async with certified() as (mesh, first):
        await revoke(mesh)
        await settled(mesh, first.serial)
        before = await crl(mesh)
        path = mesh.keys.ca("intermediates", 2)
        await mesh.kv.transact([Put(path, encode(await another_intermediate(mesh, 2)))])
        await asyncio.sleep(0.1)
        after = await crl(mesh)
        assert (after.issuers, after.lists[0]) == ((1, 2), before.lists[0])
        assert await listed(mesh) == {first.serial}
        await mesh.kv.transact([Delete(path)])
        await asyncio.sleep(0.1)
        assert await crl(mesh) == after


async def another_intermediate(mesh: Mesh, number: int) -> IntermediateRecord:
    """Below the root that is there, with a key of its own."""
    root_path = mesh.keys.ca("roots", 1)
    item = await mesh.kv.get(root_path)
    assert item is not None
    record = decode(RootRecord, item.value)
    assert record.sealed_key is not None
    (root,) = x509.load(record.certificate)
    certificate, handle = await make_intermediate(
        mesh.signer, root, mesh.keyring.open(root_path, record.sealed_key), "mesh.example", number, 1, now()
    )
    sealed = mesh.keyring.seal(mesh.keys.ca("intermediates", number), handle)
    return IntermediateRecord(number, 1, x509.pem(certificate), sealed)
