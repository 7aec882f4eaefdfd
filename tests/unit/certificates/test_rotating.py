"""The authority is rotated whatever happens to the leader, and at no revision is anything signed that is not trusted.

All in virtual time, on a store in memory; the proxies and replicas are told apart by what they are slow in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import structlog

from cluster import kv as store
from cluster.kv import Delete, Guard, Operation, Outcome, Put, Status
from cluster.memory import MemoryKV
from smc.certificates import authority, making, rotating, tokens, x509
from smc.certificates.authority import Trust, follow_trust, load_roots, load_stored, pins
from smc.certificates.issuing import RETIRE_AFTER
from smc.certificates.requests import request_credential
from smc.certificates.rotating import Progress
from smc.certificates.rotation import FORCED_AFTER
from smc.codec import decode, encode
from smc.errors import Conflict, Invalid
from smc.model import Identity, Name
from smc.records import (
    BundleRecord,
    CertificateRecord,
    MemberRecord,
    Phase,
    ReadyRecord,
    RootRecord,
    Rotates,
    RotationRecord,
    TrustRecord,
)
from tests.unit.certificates.issuer import BUYER, DAY, STORE, Mesh, now

pytestmark = pytest.mark.looptime

OPERATOR = "spiffe://mesh.example/operator/admin"
SLOW = 3.0
"""Seconds that a holder of a credential takes to follow."""


@dataclass
class Holders:
    """Replicas and proxies that trust what the bundle says, and renew their credentials once another one signs."""

    mesh: Mesh
    proxies: list[Name] = field(default_factory=lambda: [Name("shop", "buyer"), Name("shop", "store")])
    replicas: Sequence[str] = ("replica-1", "replica-2")
    asleep: set[str] = field(default_factory=set)
    """Who does nothing of it."""

    async def run(self) -> None:
        for proxy in self.proxies:
            await self.mesh.kv.transact([Put(self.mesh.keys.ready(proxy), encode(ReadyRecord(proxy)))])
            self.mesh.connected.add(str(proxy))
        async with aclosing(follow_trust(self.mesh.kv, self.mesh.keys)) as changes:
            async for trust in changes:
                await self.follow(trust)

    async def follow(self, trust: Trust) -> None:
        for who in (*self.proxies, *self.replicas):
            if str(who) not in self.asleep:
                await self.say(who, trust)
                await asyncio.sleep(SLOW / 4)

    async def say(self, who: Name | str, trust: Trust, *, not_after: float | None = None) -> None:
        keys, known = self.mesh.keys, pins(trust.roots)
        if isinstance(who, Name):
            record = TrustRecord(who, known, trust.signer, now() + 86400 if not_after is None else not_after)
            await self.mesh.kv.transact([Put(keys.trust(who), encode(record))])
        else:
            member = MemberRecord(who, "", "", "", (1,), True, 0, "0.1.0", known, trust.signer)
            await self.mesh.kv.transact([Put(keys.members + who, encode(member))])


@dataclass
class Rotating:
    """A mesh of two identities with everybody in it who follows, and no leader yet."""

    mesh: Mesh
    holders: Holders

    async def stored(self) -> RotationRecord:
        found = (await load_stored(self.mesh.kv, self.mesh.keys)).rotation
        assert found is not None
        return found

    async def ask(self, of: Rotates, *, force: bool = False) -> RotationRecord:
        return await rotating.request(self.mesh.kv, self.mesh.keys, of, OPERATOR, force=force, now=now())

    async def progress(self) -> Progress:
        stored = await load_stored(self.mesh.kv, self.mesh.keys)
        return await rotating.look(self.mesh.kv, self.mesh.keys, self.mesh.survey, stored, ttl=DAY, now=now())

    async def until(self, phase: Phase, id_: str = "", within: float = 120) -> RotationRecord:
        async with asyncio.timeout(within):
            while True:
                found = (await load_stored(self.mesh.kv, self.mesh.keys)).rotation
                if found is not None and found.phase is phase and id_ in ("", found.id):
                    return found
                await asyncio.sleep(0.1)

    async def missing(self) -> dict[str, str]:
        return {one.who: one.why for one in (await self.progress()).missing}

    async def root_of(self, identity: Identity) -> str:
        """The pin of the root that a stored certificate leads to."""
        record = await self.mesh.record(identity)
        assert record is not None
        stored = await load_stored(self.mesh.kv, self.mesh.keys)
        roots = [x509.load(root.certificate)[0] for root in stored.roots.values()]
        return x509.pin(x509.check_chain(x509.load(record.chain), roots, now()))

    async def check_whole(self, of: Rotates, before: frozenset[str]) -> None:
        """All is of the new authority, and nothing is left of the old one."""
        stored = await load_stored(self.mesh.kv, self.mesh.keys)
        (root,) = stored.roots.values()
        assert list(stored.intermediates) == [stored.signing]
        assert stored.bundle == BundleRecord((root.certificate,))
        assert (pins(stored.bundle.roots) == tuple(before)) == (of is Rotates.INTERMEDIATE)
        for identity in (BUYER, STORE):
            record = await self.mesh.record(identity)
            assert record is not None
            assert record.issuer == stored.signing
            assert (await self.root_of(identity),) == pins(stored.bundle.roots)
        assert all(x509.pem(*x509.load(one.certificate)) == one.certificate for one in stored.roots.values())


@asynccontextmanager
async def rotatable(kv: MemoryKV | None = None, **holders: object) -> AsyncIterator[Rotating]:
    mesh = await Mesh.make(kv)
    mesh.want(BUYER, STORE)
    following = Holders(mesh, **holders)  # type: ignore[arg-type]
    watching = asyncio.create_task(watch_over(mesh))
    running = asyncio.create_task(following.run())
    try:
        yield Rotating(mesh, following)
        assert not running.done()
        assert not watching.done() or watching.result()
    finally:
        for task in (running, watching):
            task.cancel()
        await asyncio.wait((running, watching))


async def watch_over(mesh: Mesh) -> None:
    """At every revision: what signs leads to a root that is trusted, and so does every certificate that is served."""
    keys, seen = mesh.keys, Status((await mesh.kv.status()).cluster_id, 0)
    items: dict[str, bytes] = {}
    async with aclosing(mesh.kv.watch(keys.root, seen)) as batches:
        async for batch in batches:
            items.update((item.key, item.value) for item in batch.puts)
            for key in batch.deletes:
                items.pop(key, None)
            trusted = [c for text in decode(BundleRecord, items[keys.bundle]).roots for c in x509.load(text)]
            for key, value in items.items():
                if key.startswith(keys.certificates):
                    x509.check_chain(x509.load(decode(CertificateRecord, value).chain), trusted, now(), times=False)
            rotation = decode(RotationRecord, items[keys.rotation]) if keys.rotation in items else None
            if rotation is not None and rotation.phase is Phase.SIGNING and not rotation.forced:
                members = [decode(MemberRecord, v) for k, v in items.items() if k.startswith(keys.members)]
                ready = {k.removeprefix(keys.readiness) for k in items if k.startswith(keys.readiness)}
                told = [decode(TrustRecord, items[keys.trusts + name]) for name in ready - mesh.out]
                alive = [one for one in told if now() < one.not_after + DAY.total_seconds()]
                assert all({x509.pin(c) for c in trusted} <= set(one.roots) for one in (*members, *alive))


BOTH = pytest.mark.parametrize("of", list(Rotates))


# ------------------------------------------------------------------------------------------------------- the whole way


@BOTH
async def test_everything_is_signed_anew_and_nothing_is_left_of_what_was(of: Rotates) -> None:
    async with rotatable() as r, r.mesh.leading():
        before = frozenset(pins(await load_roots(r.mesh.kv, r.mesh.keys)))
        await r.mesh.certified(STORE)
        asked = await r.ask(of)
        done = await r.until(Phase.DONE, asked.id)
        assert (done.requester, done.left_behind) == (OPERATOR, ())
        await r.check_whole(of, before)


async def test_the_phases_follow_each_other_and_each_says_who_is_missing() -> None:
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        await asyncio.sleep(10)
        r.holders.asleep = {"shop/store", "replica-2"}
        await r.ask(Rotates.ROOT)
        await r.until(Phase.PUBLISHING)
        await asyncio.sleep(600)
        why = "does not trust the new root yet"
        assert await r.missing() == {"replica-2": why, "shop/store": why}
        assert len(await load_roots(r.mesh.kv, r.mesh.keys)) == 2
        trust = await anext(follow_trust(r.mesh.kv, r.mesh.keys))
        for who in ("replica-2", Name("shop", "store")):
            await r.holders.say(who, trust)
        await r.until(Phase.SIGNING)
        await asyncio.sleep(600)
        why = "shows a credential of the old authority"
        assert await r.missing() == {"replica-2": why, "shop/store": why}
        assert {await r.root_of(BUYER), await r.root_of(STORE)} <= {*trust_pins(trust)} - {
            pins(r.mesh.operator.roots)[0]
        }
        trust = await anext(follow_trust(r.mesh.kv, r.mesh.keys))
        for who in ("replica-2", Name("shop", "store")):
            await r.holders.say(who, trust)
        await r.until(Phase.RETIRING)
        await asyncio.sleep(600)
        why = "trusts the old root as well"
        assert await r.missing() == {"replica-2": why, "shop/store": why}
        trust = await anext(follow_trust(r.mesh.kv, r.mesh.keys))
        for who in ("replica-2", Name("shop", "store")):
            await r.holders.say(who, trust)
        assert (await r.until(Phase.DONE)).left_behind == ()


def trust_pins(trust: Trust) -> tuple[str, ...]:
    return pins(trust.roots)


async def test_whoever_has_not_acked_is_waited_for_with_the_reason() -> None:
    async with rotatable() as r, r.mesh.leading():
        r.mesh.lagging["shop/buyer"] = "stalled"
        await r.ask(Rotates.ROOT)
        await asyncio.sleep(600)
        assert await r.missing() == {"shop/buyer": "stalled"}
        assert (await r.stored()).phase is Phase.PUBLISHING
        r.mesh.lagging.clear()
        await r.until(Phase.DONE)


async def test_credentials_are_signed_by_the_new_intermediate_as_soon_as_it_signs() -> None:
    async with rotatable() as r, r.mesh.leading():
        await r.ask(Rotates.ROOT)
        await r.until(Phase.DONE)
        key = x509.new_key().public_key()
        chain = await request_credential(r.mesh.kv, r.mesh.keys, r.mesh.keyring, "operator/eve", key, "test")
        roots = await load_roots(r.mesh.kv, r.mesh.keys)
        x509.check_answer(chain, key, "spiffe://mesh.example/operator/eve", roots, now())
        with pytest.raises(Invalid, match="does not lead to a root"):
            x509.check_answer(chain, key, "spiffe://mesh.example/operator/eve", r.mesh.operator.roots, now())


# --------------------------------------------------------------------------------------------------- a leader is killed


class Killed(Exception):
    """As if the process were gone."""


class Deadly(MemoryKV):
    """What the leader writes; at its write number `at` it is killed, before or after it is applied."""

    def __init__(self, of: MemoryKV, at: int, *, applied: bool) -> None:
        super().__init__(of.store)
        self.at, self.applied, self.writes = at, applied, 0

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        self.writes += 1
        if self.writes == self.at and not self.applied:
            raise Killed
        outcome = await super().transact(operations, guards)
        if self.writes == self.at:
            raise Killed
        return outcome


WRITES = 6
"""Of a leader, for a rotation of two identities: made, listed, signs, certificates, retired, done."""


@BOTH
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(1, WRITES + 1))
async def test_the_next_leader_goes_on_wherever_the_last_one_was_killed(of: Rotates, at: int, applied: bool) -> None:
    async with rotatable() as r:
        before = frozenset(pins(await load_roots(r.mesh.kv, r.mesh.keys)))
        async with r.mesh.leading():
            await r.mesh.certified(STORE)
        asked = await r.ask(of)
        deadly = Deadly(r.mesh.kv, at, applied=applied)  # type: ignore[arg-type]
        fenced = replace(await r.mesh.elect(), kv=deadly)
        async with r.mesh.leading(kv=deadly, fenced=fenced) as task:
            await asyncio.wait([task], timeout=120)
            assert isinstance(task.exception(), ExceptionGroup), "it was killed"
            assert deadly.writes == at
        async with r.mesh.leading():
            done = await r.until(Phase.DONE, asked.id)
        assert done.left_behind == ()
        await r.check_whole(of, before)


async def test_a_leader_that_is_not_killed_writes_no_more_than_that() -> None:
    async with rotatable() as r:
        async with r.mesh.leading():
            await r.mesh.certified(STORE)
        await r.ask(Rotates.ROOT)
        counting = Deadly(r.mesh.kv, 0, applied=True)  # type: ignore[arg-type]
        fenced = replace(await r.mesh.elect(), kv=counting)
        async with r.mesh.leading(kv=counting, fenced=fenced):
            await r.until(Phase.DONE)
            await asyncio.sleep(300)
        assert counting.writes == WRITES


class Lossy(MemoryKV):
    """Applies what concerns a rotation, and loses every answer to it."""

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        outcome = await super().transact(operations, guards)
        if any(one.key.endswith("ca/rotation") for one in operations) and guards[0].key.endswith("ca/rotation"):
            raise store.Ambiguous("the answer did not come")
        return outcome


@BOTH
async def test_answers_that_are_lost_cost_time_alone(of: Rotates) -> None:
    async with rotatable() as r:
        before = frozenset(pins(await load_roots(r.mesh.kv, r.mesh.keys)))
        asked = await r.ask(of)
        async with r.mesh.leading():
            await r.mesh.certified(STORE)
        lossy = Lossy(r.mesh.kv.store)  # type: ignore[attr-defined]
        fenced = replace(await r.mesh.elect(), kv=lossy)
        async with r.mesh.leading(kv=lossy, fenced=fenced):
            await r.until(Phase.DONE, asked.id, within=600)
            await r.check_whole(of, before)


# -------------------------------------------------------------------------------------------------------- who is away


async def test_a_proxy_that_is_away_is_named_and_waited_for_until_nothing_of_it_can_be_valid() -> None:
    async with rotatable() as r:
        away = Name("shop", "store")
        async with r.mesh.leading():
            await r.mesh.certified(STORE)
            await asyncio.sleep(10)
            r.mesh.connected.discard(str(away))
            r.holders.asleep.add(str(away))
            await r.ask(Rotates.ROOT)
            await asyncio.sleep(60)
            assert await r.missing() == {str(away): "connected to no replica"}
        # Its credential's life, and then that of a certificate which it got with that: one day each.
        await asyncio.sleep(47.5 * 3600)
        async with r.mesh.leading():
            await asyncio.sleep(60)
            assert await r.missing() == {str(away): "connected to no replica"}
        await asyncio.sleep(0.5 * 3600)
        async with r.mesh.leading():
            await r.until(Phase.DONE)


@pytest.mark.parametrize("connected", [False, True], ids=["it is gone", "a replica is behind, and it says nothing"])
async def test_whoever_is_revoked_holds_no_rotation_up(connected: bool) -> None:
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        await asyncio.sleep(10)
        r.holders.asleep.add("shop/store")
        if not connected:
            r.mesh.connected.discard("shop/store")
        await r.ask(Rotates.ROOT)
        await asyncio.sleep(60)
        assert list(await r.missing()) == ["shop/store"]
        r.mesh.out.add("shop/store")
        assert (await r.until(Phase.DONE)).left_behind == ()


async def test_a_forced_rotation_says_whom_it_left_behind() -> None:
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        r.mesh.connected.discard("shop/store")
        r.holders.asleep.add("shop/store")
        asked = await r.ask(Rotates.ROOT)
        await asyncio.sleep(600)
        assert (await r.stored()).phase is Phase.PUBLISHING
        joined = await r.ask(Rotates.ROOT, force=True)
        assert joined.id == asked.id, "it is the one that is under way"
        done = await r.until(Phase.DONE, asked.id, within=3 * FORCED_AFTER + 30)
        assert done.left_behind == ("shop/store",)


async def test_a_workload_that_is_gone_is_not_waited_for() -> None:
    async with rotatable() as r, r.mesh.leading():
        gone = Name("shop", "store")
        await asyncio.sleep(10)
        r.mesh.connected.discard(str(gone))
        r.holders.asleep.add(str(gone))
        await r.mesh.kv.transact([Delete(r.mesh.keys.ready(gone))])
        await r.ask(Rotates.ROOT)
        assert (await r.until(Phase.DONE)).left_behind == ()


@BOTH
async def test_the_certificate_of_an_identity_that_nobody_has_any_more_is_not_waited_for(of: Rotates) -> None:
    async with rotatable() as r, r.mesh.leading():
        before = await r.mesh.certified(STORE)
        r.mesh.want(BUYER)  # the last workload of the store's is deleted
        asked = await r.ask(of)
        await r.until(Phase.DONE, asked.id, within=60)
        kept = await r.mesh.record(STORE)
        assert kept is not None
        assert kept.issuer != before.issuer, "should it come back, what it is given leads to what is trusted"
        r.mesh.want(BUYER, STORE)
        await asyncio.sleep(5)
        assert await r.mesh.record(STORE) == kept
        r.mesh.want(BUYER)
        await asyncio.sleep(RETIRE_AFTER + 5)
        assert await r.mesh.record(STORE) is None
        crl = (await load_stored(r.mesh.kv, r.mesh.keys)).crl
        assert crl is not None
        assert kept.serial in {one.certificate.serial for one in crl.revoked}


@pytest.mark.parametrize(
    ("of", "phase"),
    [
        (Rotates.ROOT, Phase.PUBLISHING),
        (Rotates.ROOT, Phase.SIGNING),
        (Rotates.ROOT, Phase.RETIRING),
        (Rotates.INTERMEDIATE, Phase.PUBLISHING),
        (Rotates.INTERMEDIATE, Phase.SIGNING),
    ],
)
async def test_a_workload_that_is_deleted_in_any_phase_is_not_waited_for(of: Rotates, phase: Phase) -> None:
    gone = Name("shop", "store")
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        await asyncio.sleep(10)
        asked = await r.ask(of)
        await r.until(phase, asked.id)
        r.holders.asleep.add(str(gone))
        r.mesh.connected.discard(str(gone))
        await r.mesh.kv.transact([Delete(r.mesh.keys.ready(gone)), Delete(r.mesh.keys.trust(gone))])
        r.mesh.want(BUYER)
        assert (await r.until(Phase.DONE, asked.id, within=60)).left_behind == ()
        await asyncio.sleep(RETIRE_AFTER + 5)
        assert await r.mesh.record(STORE) is None


async def test_a_token_that_pins_the_old_root_alone_holds_the_new_one_up_until_it_is_used_or_ends() -> None:
    async with rotatable() as r, r.mesh.leading():
        text, expires = await tokens.create_token(
            r.mesh.kv, r.mesh.keys, r.mesh.keyring, "proxy/shop/new", ttl=300, now=now()
        )
        await r.ask(Rotates.ROOT)
        await r.until(Phase.PUBLISHING)
        await asyncio.sleep(60)
        (who,) = await r.missing()
        assert who == "1 join tokens"
        later, _ = await tokens.create_token(
            r.mesh.kv, r.mesh.keys, r.mesh.keyring, "proxy/shop/newer", ttl=600, now=now()
        )
        assert len(tokens.Token.parse(text).pins) == 1
        assert tokens.Token.parse(later).pins == pins(await load_roots(r.mesh.kv, r.mesh.keys)), "either root will do"
        await r.until(Phase.DONE, within=400)
        assert now() > expires


# ------------------------------------------------------------------------------------------------- who has just joined


async def joins(r: Rotating, proxy: Name, *, ttl: float = tokens.MAX_TTL) -> Trust:
    """A proxy gets its credential for a token and says so, and its Envoy is yet to begin. Returns what it holds."""
    kv, keys = r.mesh.kv, r.mesh.keys
    text, _ = await tokens.create_token(kv, keys, r.mesh.keyring, f"proxy/{proxy}", ttl=ttl, now=now())
    _, chain = await tokens.redeem(
        kv, keys, r.mesh.keyring, tokens.Token.parse(text), x509.new_key().public_key(), now=now()
    )
    held = Trust(await load_roots(kv, keys), x509.key_id(x509.load(chain)[1]), frozenset())
    await r.holders.say(proxy, held)
    return held


@pytest.mark.parametrize(
    ("of", "phase"),
    [
        (Rotates.ROOT, None),
        (Rotates.ROOT, Phase.PUBLISHING),
        (Rotates.ROOT, Phase.SIGNING),
        (Rotates.INTERMEDIATE, None),
        (Rotates.INTERMEDIATE, Phase.SIGNING),
    ],
)
async def test_who_joins_before_the_end_of_a_phase_is_named_and_waited_for_until_its_envoy_has_begun(
    of: Rotates, phase: Phase | None
) -> None:
    late = Name("shop", "late")
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        await asyncio.sleep(10)
        if phase is None:
            await joins(r, late)
            asked = await r.ask(of)
        else:
            asked = await r.ask(of)
            await r.until(phase, asked.id)
            await joins(r, late)
        await asyncio.sleep(120)
        assert (await r.stored()).phase in (Phase.PUBLISHING, Phase.SIGNING)
        assert await r.missing() == {str(late): "connected to no replica"}
        r.mesh.connected.add(str(late))
        r.holders.proxies.append(late)
        newest = authority.trust(await load_stored(r.mesh.kv, r.mesh.keys))
        await r.holders.say(late, newest)
        assert (await r.until(Phase.DONE, asked.id)).left_behind == ()


async def test_who_joins_while_what_is_old_retires_has_what_is_new_and_holds_nothing_up() -> None:
    late = Name("shop", "late")
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        asked = await r.ask(Rotates.ROOT)
        await r.until(Phase.RETIRING, asked.id)
        held = await joins(r, late)
        await r.until(Phase.DONE, asked.id)
        newest = authority.trust(await load_stored(r.mesh.kv, r.mesh.keys))
        assert (held.roots, held.signer) == (newest.roots, newest.signer)


async def test_who_has_joined_and_never_begins_is_waited_for_ten_minutes_however_soon_its_token_ends() -> None:
    late = Name("shop", "late")
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        await joins(r, late, ttl=20)
        joined = now()
        asked = await r.ask(Rotates.ROOT)
        await asyncio.sleep(tokens.JOINED - 30)
        assert list(await r.missing()) == [str(late)]
        await r.until(Phase.DONE, asked.id)
        assert now() > joined + tokens.JOINED - 5


async def test_who_has_joined_and_whose_workload_is_deleted_is_not_waited_for() -> None:
    late = Name("shop", "late")
    async with rotatable() as r, r.mesh.leading():
        await r.mesh.certified(STORE)
        await joins(r, late)
        r.mesh.gone.add(str(late))
        asked = await r.ask(Rotates.ROOT)
        assert (await r.until(Phase.DONE, asked.id, within=60)).left_behind == ()


# --------------------------------------------------------------------------------------------------- who asks, and when


async def test_two_who_ask_at_once_get_one_rotation() -> None:
    async with rotatable() as r:
        asked = await asyncio.gather(*(r.ask(Rotates.ROOT) for _ in range(5)))
        assert len({one.id for one in asked}) == 1
        async with r.mesh.leading():
            await r.until(Phase.DONE, asked[0].id)
            again = await r.ask(Rotates.ROOT)
            assert again.id != asked[0].id, "the next one is another one"


async def test_who_asks_for_the_other_kind_is_told_what_is_under_way() -> None:
    async with rotatable() as r:
        await r.ask(Rotates.ROOT)
        with pytest.raises(Conflict, match="a rotation of the root is under way, and is requested"):
            await r.ask(Rotates.INTERMEDIATE)


async def test_an_intermediate_below_a_root_whose_key_is_elsewhere_is_refused_with_what_to_do() -> None:
    async with rotatable() as r:
        key = r.mesh.keys.ca("roots", 1)
        item = await r.mesh.kv.get(key)
        assert item is not None
        record = replace(decode(RootRecord, item.value), sealed_key=None)
        await r.mesh.kv.transact([Put(key, encode(record))])
        with pytest.raises(Invalid, match="the key of root 1 is not in the store") as e:
            await r.ask(Rotates.INTERMEDIATE)
        assert "smc cert rotate --root" in e.value.hint
        asked = await r.ask(Rotates.ROOT)
        async with r.mesh.leading():
            await r.until(Phase.DONE, asked.id)


LIFE = making.INTERMEDIATE_TTL.total_seconds()


async def test_an_intermediate_is_rotated_by_itself_at_half_its_life_and_no_certificate_is_ever_short() -> None:
    async with rotatable() as r:
        for turn in range(1, 4):
            await asyncio.sleep(0.39 * LIFE)
            async with r.mesh.leading():
                await asyncio.sleep(60)
                assert (await load_stored(r.mesh.kv, r.mesh.keys)).signing == turn, "not before it is due"
            await asyncio.sleep(0.22 * LIFE)
            async with r.mesh.leading():
                await asyncio.sleep(120)
                done = await r.stored()
                assert (done.phase, done.of, done.requester) == (Phase.DONE, Rotates.INTERMEDIATE, "")
                record = await r.mesh.record(BUYER)
                assert record is not None
                assert record.issuer == turn + 1
                assert record.not_after - x509.issued(record.not_before, record.not_after) == 86400


async def test_nobody_holds_up_the_next_intermediate_for_longer_than_the_last_one_can_spare() -> None:
    async with rotatable() as r:
        r.mesh.lagging["shop/buyer"] = "stalled"
        async with r.mesh.leading():
            await asyncio.sleep(10)
            asked = await r.ask(Rotates.ROOT)
            await r.until(Phase.PUBLISHING, asked.id)
        await asyncio.sleep(0.7 * LIFE)
        async with r.mesh.leading():
            await asyncio.sleep(60)
            assert (await r.stored()).phase is Phase.PUBLISHING
        await asyncio.sleep(0.06 * LIFE)
        async with r.mesh.leading():
            found = await r.until(Phase.SIGNING, asked.id)
        assert found.left_behind == ("shop/buyer",)


async def test_the_log_says_how_far_it_is_and_holds_no_key() -> None:
    with structlog.testing.capture_logs() as logs:
        async with rotatable() as r, r.mesh.leading():
            await r.ask(Rotates.ROOT)
            await r.until(Phase.DONE)
    phases = [line["phase"] for line in logs if line["event"] == "rotation"]
    assert phases == ["publishing", "signing", "retiring", "done"]
    assert [line["missing"] for line in logs if line["event"] == "a rotation waits"]
    assert "PRIVATE KEY" not in str(logs)
