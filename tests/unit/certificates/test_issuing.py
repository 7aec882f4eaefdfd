"""What the leader signs, when, and that nothing of it is seen once it is no longer the leader. All in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import pytest
import structlog

from cluster import kv as store
from cluster.kv import Guard, Operation, Outcome, Put
from cluster.memory import MemoryKV
from smc.certificates import x509
from smc.certificates.issuing import AT_A_TIME, LAST_RETRY, RETIRE_AFTER, Issuer
from smc.certificates.revoking import Revoked
from smc.certificates.sealing import Keyring
from smc.codec import encode
from smc.model import Identity
from tests.unit.certificates.issuer import BUYER, DAY, START, STORE, Deposed, Mesh, half_life, now

pytestmark = pytest.mark.looptime


async def test_every_identity_gets_a_certificate_that_opens_and_leads_to_the_root() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER, STORE)
    async with mesh.leading():
        for identity in (BUYER, STORE):
            record = await mesh.certified(identity)
            leaf = x509.load(record.chain)[0]
            assert x509.uri(leaf) == identity.uri("mesh.example")
            x509.check_chain(x509.load(record.chain), x509.load(mesh.operator.roots[0]), now())
            pem = mesh.keyring.open(mesh.keys.certificate(identity), record.sealed_key)
            assert b"PRIVATE KEY" in pem
            assert f"{leaf.serial_number:x}" == record.serial
            assert leaf.serial_number >> 96 == 1
            assert record.not_after == leaf.not_valid_after_utc.timestamp()
            assert x509.dns_names(leaf) == ()


async def test_a_certificate_is_renewed_at_half_life_again_and_again() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
        for _ in range(4):
            due = half_life(record)
            record = await mesh.renewed(record)
            assert due <= now() <= due + 5
    assert now() > START + 1.5 * 86400


async def test_the_next_leader_keeps_what_is_good_and_renews_on_time() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
    async with mesh.leading():
        await asyncio.sleep(half_life(record) - now() - 60)
        assert await mesh.record(BUYER) == record
        await asyncio.sleep(120)
        assert await mesh.record(BUYER) != record


async def test_what_fell_due_while_there_was_no_leader_is_renewed_at_once() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
    await asyncio.sleep(0.9 * 86400)
    begun = now()
    async with mesh.leading():
        await mesh.renewed(record)
    assert now() - begun <= 2


async def test_a_deposed_leader_signs_nothing_that_anybody_sees() -> None:
    mesh = await Mesh.make()
    async with mesh.leading() as task:
        await asyncio.sleep(1)
        await mesh.elect()
        before = (await mesh.kv.list(mesh.keys.root)).items
        mesh.want(BUYER)
        await asyncio.wait([task])
        assert (await mesh.kv.list(mesh.keys.root)).items == before
        with pytest.raises(ExceptionGroup) as stopped:
            task.result()
        assert stopped.group_contains(Deposed)


async def test_nothing_is_issued_or_retired_before_it_is_known_what_is_wanted() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)

    async def never() -> object:
        await asyncio.Event().wait()
        yield

    issuer = Issuer(mesh.kv, mesh.keys, mesh.keyring, mesh.signer, now, mesh.survey)
    task = asyncio.create_task(issuer.run(await mesh.elect(), never()))  # type: ignore[arg-type]
    await asyncio.sleep(3 * 86400)
    task.cancel()
    await asyncio.wait([task])
    assert await mesh.record(BUYER) == record


async def test_an_identity_loses_its_record_ten_minutes_after_its_last_workload() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER, STORE)
    async with mesh.leading():
        await mesh.certified(BUYER)
        await asyncio.sleep(100)
        mesh.want(STORE)
        await asyncio.sleep(RETIRE_AFTER - 1)
        assert await mesh.record(BUYER) is not None
        await asyncio.sleep(3)
        assert await mesh.record(BUYER) is None
        assert await mesh.record(STORE) is not None


async def test_an_identity_that_comes_back_in_time_keeps_its_certificate() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
        for _ in range(5):
            mesh.want()
            await asyncio.sleep(RETIRE_AFTER - 10)
            mesh.want(BUYER)
            await asyncio.sleep(10)
        assert await mesh.record(BUYER) == record


async def test_a_shorter_life_counts_for_what_is_already_issued() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
        await asyncio.sleep(3600)
        mesh.want(BUYER, ttl=timedelta(minutes=10))
        fresh = await mesh.renewed(record)
        assert fresh.not_after - fresh.not_before == 720
        begun = now()
        await mesh.renewed(fresh)
        assert 240 <= now() - begun <= 362


async def test_while_the_signer_fails_each_identity_is_tried_less_often_and_the_old_certificate_stays() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
        await asyncio.sleep(half_life(record) - now() - 1)
        mesh.signer.attempts.clear()
        mesh.signer.breaks(True)
        await asyncio.sleep(3600)
        gaps = [b - a for a, b in zip(mesh.signer.attempts, mesh.signer.attempts[1:], strict=False)]
        assert [round(gap) for gap in gaps[:6]] == [1, 2, 4, 8, 16, 32]
        assert max(gaps) <= LAST_RETRY + 1
        assert await mesh.record(BUYER) == record
        mesh.signer.breaks(False)
        begun = now()
        await mesh.renewed(record)
        assert now() - begun <= LAST_RETRY + 1


@pytest.mark.parametrize("damage", ["garbage", "swapped", "another name"])
async def test_a_record_that_cannot_be_used_is_made_anew(damage: str) -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER, STORE)
    async with mesh.leading():
        buyer, shop = await mesh.certified(BUYER), await mesh.certified(STORE)
    bad = {
        "garbage": b"{}",
        "swapped": encode(replace(buyer, sealed_key=shop.sealed_key)),
        "another name": encode(replace(buyer, chain=shop.chain)),
    }[damage]
    await mesh.kv.transact([Put(mesh.keys.certificate(BUYER), bad)])
    async with mesh.leading():
        await asyncio.sleep(1)
    record = await mesh.record(BUYER)
    assert record is not None
    mesh.keyring.open(mesh.keys.certificate(BUYER), record.sealed_key)
    assert x509.uri(x509.load(record.chain)[0]) == BUYER.uri("mesh.example")
    assert await mesh.record(STORE) == shop


class Unsure(MemoryKV):
    """Loses the answer of every second transaction that writes a certificate, or its question."""

    count = 0

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        if any("/certificates/" in operation.key for operation in operations):
            self.count += 1
            if self.count % 4 == 1:
                raise store.Ambiguous("the question was lost")
            if self.count % 4 == 2:
                raise store.Unavailable("no quorum")
            if self.count % 4 == 3:
                await super().transact(operations, guards)
                raise store.Ambiguous("the answer was lost")
        return await super().transact(operations, guards)


async def test_a_store_that_loses_questions_and_answers_costs_a_retry() -> None:
    mesh = await Mesh.make(Unsure())
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
        await asyncio.sleep(60)
        assert await mesh.record(BUYER) == record, "an answer that was lost is not signed for twice"
        await mesh.renewed(record)


class Late(MemoryKV):
    """Applies the first certificate only when another one has long been written in its place."""

    held: tuple[Sequence[Operation], Sequence[Guard]] | None = None

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        if self.held is None and any("/certificates/" in operation.key for operation in operations):
            self.held = operations, guards
            raise store.Ambiguous("the answer did not come")
        return await super().transact(operations, guards)


async def test_a_transaction_that_is_applied_late_replaces_nothing() -> None:
    kv = Late()
    mesh = await Mesh.make(kv)
    mesh.want(BUYER)
    async with mesh.leading():
        record = await mesh.certified(BUYER)
        assert kv.held is not None
        await kv.transact(*kv.held)
        assert await mesh.record(BUYER) == record


class Unlisted(MemoryKV):
    """Takes no list of revoked certificates but the first, so that nothing revoked is ever taken away."""

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        if any(operation.key.endswith("/ca/crl") and guards[0].create_revision != 0 for operation in operations):
            raise store.Unavailable("it takes no lists")
        return await super().transact(operations, guards)


async def test_the_certificate_of_a_revoked_identity_is_never_renewed_however_long_it_stays() -> None:
    mesh = await Mesh.make(Unlisted())
    mesh.want(BUYER, STORE, ttl=timedelta(minutes=5))
    async with mesh.leading():
        before = {identity: await mesh.certified(identity) for identity in (BUYER, STORE)}
        await asyncio.sleep(1)
        mesh.wanted = replace(mesh.wanted, identities=frozenset({BUYER}), revoked=Revoked(frozenset({STORE})))
        mesh.changed.set()
        await asyncio.sleep(240)
        assert await mesh.record(STORE) == before[STORE]
        assert await mesh.record(BUYER) != before[BUYER]


async def test_two_hundred_identities_take_few_revisions() -> None:
    mesh = await Mesh.make()
    identities = [Identity("shop", f"a{n}") for n in range(200)]
    mesh.want(*identities)
    async with mesh.leading():
        before = (await mesh.kv.status()).revision
        await asyncio.sleep(5)
        assert len((await mesh.kv.list(mesh.keys.certificates)).items) == 200
        assert (await mesh.kv.status()).revision - before <= 8


class Opened(Keyring):
    """Counts what it opens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "count", 0)

    def open(self, path: str, sealed: bytes) -> bytes:
        object.__setattr__(self, "count", self.count + 1)
        return super().open(path, sealed)


async def test_the_event_loop_goes_on_while_many_certificates_are_made_and_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = 0

    def judging(*of: float | str) -> float:
        nonlocal judged
        judged += 1
        return real(*of)

    real = x509.renew_at
    monkeypatch.setattr(x509, "renew_at", judging)
    mesh = await Mesh.make()
    mesh.keyring = opened = Opened(mesh.keyring.mesh_id, mesh.keyring.deks)
    mesh.want(*(Identity("shop", f"a{n}") for n in range(200)))
    most = [0, 0, 0]
    for _ in range(2):
        async with mesh.leading():
            before = [len(mesh.signer.attempts), opened.count, judged]
            for _ in range(1000):
                await asyncio.sleep(0)
                now_ = [len(mesh.signer.attempts), opened.count, judged]
                most = [max(m, n - b) for m, n, b in zip(most, now_, before, strict=True)]
                before = now_
    assert len((await mesh.kv.list(mesh.keys.certificates)).items) == 200
    assert most == [1, AT_A_TIME, AT_A_TIME]


async def test_the_log_says_what_was_issued_and_holds_no_key() -> None:
    mesh = await Mesh.make()
    mesh.want(BUYER)
    with structlog.testing.capture_logs() as logs:
        async with mesh.leading():
            record = await mesh.certified(BUYER)
            await asyncio.sleep(1)
    assert mesh.issued == ["workload"]
    (issued,) = [entry for entry in logs if entry["event"] == "certificate issued"]
    assert (issued["identity"], issued["serial"]) == (str(BUYER), record.serial)
    pem = mesh.keyring.open(mesh.keys.certificate(BUYER), record.sealed_key).decode()
    assert not [line for line in pem.splitlines() if line in str(logs)]
    assert timedelta(seconds=record.not_after - record.not_before) == DAY + x509.BACKDATE
