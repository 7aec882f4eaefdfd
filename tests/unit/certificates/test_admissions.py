"""Who was revoked is let in again by what was made since, and by nothing that was made before. All in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.kv import Guard, KeyValue, Operation, Outcome, Put
from cluster.memory import MemoryKV
from smc.certificates import admissions, x509
from smc.certificates.answering import CONCURRENT
from smc.certificates.requests import request_credential
from smc.certificates.revoking import Revoked
from smc.certificates.tokens import Token, create_token, redeem
from smc.codec import decode, encode
from smc.errors import Conflict, Denied, Invalid
from smc.model import Identity, Name
from smc.records import AdmissionRecord, RevocationRecord, TokenRecord
from tests.unit.certificates.issuer import Mesh, now

pytestmark = pytest.mark.looptime

PROXY = Name("shop", "buyer")
PATH = f"proxy/{PROXY}"
ANN = "operator/ann"
HOLDERS = pytest.mark.parametrize("path", [PATH, ANN, "viewer/ann"])


async def token_of(mesh: Mesh, path: str = PATH, author: str = "operator/admin") -> Token:
    text, _ = await create_token(mesh.kv, mesh.keys, mesh.keyring, path, ttl=600, now=now(), author=author)
    return Token.parse(text)


async def join(mesh: Mesh, token: Token, key: x509.PublicKey | None = None) -> str:
    """Returns the serial of the credential."""
    public = key or x509.new_key().public_key()
    _, chain = await redeem(mesh.kv, mesh.keys, mesh.keyring, token, public, now=now())
    return f"{x509.load(chain)[0].serial_number:x}"


async def renew(mesh: Mesh, serial: str, path: str = PATH) -> str:
    """As the API does for the holder of a credential."""
    guards = await admissions.check_credential(mesh.kv, mesh.keys, path, serial)
    chain = await request_credential(
        mesh.kv, mesh.keys, mesh.keyring, path, x509.new_key().public_key(), "itself", guards=guards
    )
    return f"{x509.load(chain)[0].serial_number:x}"


async def revoke(mesh: Mesh, path: str = PATH) -> None:
    proxy, credential = (PROXY, "") if path == PATH else (None, path)
    record = RevocationRecord(proxy, None, "", "", now(), credential)
    await mesh.kv.transact([Put(mesh.keys.revoked_credential(path), encode(record))])


@HOLDERS
async def test_a_credential_from_before_is_not_renewed_and_one_from_after_is_again_and_again(path: str) -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        before = await join(mesh, await token_of(mesh, path))
        before = await renew(mesh, before, path)
        await revoke(mesh, path)
        with pytest.raises(Denied, match=f"{path} is revoked"):
            await renew(mesh, before, path)
        after = await join(mesh, await token_of(mesh, path))
        for _ in range(3):
            after = await renew(mesh, after, path)
        with pytest.raises(Denied):
            await renew(mesh, before, path)


@HOLDERS
async def test_a_second_revocation_ends_what_was_let_in_after_the_first(path: str) -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        await revoke(mesh, path)
        after = await join(mesh, await token_of(mesh, path))
        await revoke(mesh, path)
        with pytest.raises(Denied):
            await renew(mesh, after, path)
        assert await renew(mesh, await join(mesh, await token_of(mesh, path)), path)


@HOLDERS
async def test_a_token_from_before_the_revocation_lets_nobody_in_used_or_not(path: str) -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        unused, used = await token_of(mesh, path), await token_of(mesh, path)
        key = x509.new_key().public_key()
        serial = await join(mesh, used, key)
        await revoke(mesh, path)
        with pytest.raises(Denied, match="was revoked after this token was made"):
            await join(mesh, unused)
        with pytest.raises(Denied, match="was revoked after this token was made"):
            await join(mesh, used, key)
        with pytest.raises(Denied):
            await renew(mesh, serial, path)


async def test_a_token_ends_with_whoever_made_it_before_being_revoked() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        before = await token_of(mesh, "operator/accomplice", author=ANN)
        await revoke(mesh, ANN)
        with pytest.raises(Denied, match="operator/ann was revoked after this token was made"):
            await join(mesh, before)
        # Who has been let in again may let in others again.
        assert await join(mesh, await token_of(mesh, "operator/friend", author=ANN))


async def test_a_token_that_does_not_say_who_made_it_is_good() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        assert await join(mesh, await token_of(mesh, ANN, author=""))


async def test_no_token_is_made_by_whoever_is_revoked_meanwhile() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        serial = await join(mesh, await token_of(mesh, ANN))
        guards = await admissions.check_credential(mesh.kv, mesh.keys, ANN, serial)
        await revoke(mesh, ANN)
        with pytest.raises(Conflict):
            await create_token(mesh.kv, mesh.keys, mesh.keyring, ANN, ttl=600, now=now(), author=ANN, guards=guards)
        (used,) = (await mesh.kv.list(mesh.keys.tokens)).items
        assert decode(TokenRecord, used.value).author == "operator/admin"


@HOLDERS
async def test_who_asked_before_and_is_answered_after_is_refused(path: str) -> None:
    mesh = await Mesh.make()
    token = await token_of(mesh, path)
    joining = asyncio.create_task(join(mesh, token))
    await asyncio.sleep(1)  # the request is written, and nobody leads
    await revoke(mesh, path)
    async with mesh.leading():
        with pytest.raises(Invalid, match=f"{path} was revoked"):
            await joining


async def test_the_key_encryption_key_lets_in_whoever_was_revoked() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        await revoke(mesh, ANN)
        # As smc recover does.
        key = x509.new_key().public_key()
        chain = await request_credential(mesh.kv, mesh.keys, mesh.keyring, ANN, key, "key-encryption key")
        assert await renew(mesh, f"{x509.load(chain)[0].serial_number:x}", ANN)


async def test_a_revocation_between_the_check_and_the_request_is_noticed() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        serial = await join(mesh, await token_of(mesh))
        guards = await admissions.check_credential(mesh.kv, mesh.keys, PATH, serial)
        await revoke(mesh)
        with pytest.raises(Conflict):
            await request_credential(
                mesh.kv, mesh.keys, mesh.keyring, PATH, x509.new_key().public_key(), "itself", guards=guards
            )


class Racing:
    """A store in which a proxy is revoked just before the leader's answer is written."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.raced = False

    def __getattr__(self, name: str) -> object:
        return getattr(self.mesh.kv, name)

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        if not self.raced and any(operation.key.startswith(self.mesh.keys.answers) for operation in operations):
            self.raced = True
            await revoke(self.mesh)
        return await self.mesh.kv.transact(operations, guards)


async def test_a_revocation_in_the_middle_of_an_answer_wins() -> None:
    mesh = await Mesh.make()
    token = await token_of(mesh)
    racing = replace(mesh, kv=Racing(mesh))  # type: ignore[arg-type]
    async with racing.leading():
        with pytest.raises(Invalid, match="shop/buyer was revoked"):
            await join(mesh, token)


async def test_nothing_is_signed_for_a_proxy_of_a_revoked_identity() -> None:
    mesh = await Mesh.make()
    mesh.wanted = replace(mesh.wanted, revoked=Revoked(banned={PROXY: Identity("shop", "buyer")}))
    async with mesh.leading():
        await asyncio.sleep(0.1)
        with pytest.raises(Invalid, match="the identity shop/buyer of shop/buyer is revoked"):
            await join(mesh, await token_of(mesh))


@HOLDERS
async def test_whoever_renews_in_a_loop_fills_no_record(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admissions, "MOST_ADMITTED", 3)
    mesh = await Mesh.make()
    async with mesh.leading():
        await revoke(mesh, path)
        first = serial = await join(mesh, await token_of(mesh, path))
        for _ in range(5):
            serial = await renew(mesh, serial, path)
        item = await mesh.kv.get(mesh.keys.admitted_credential(path))
        assert item is not None
        assert len(decode(AdmissionRecord, item.value).credentials) == 3
        with pytest.raises(Denied):
            await renew(mesh, first, path)
        assert await renew(mesh, serial, path)


class Slow(MemoryKV):
    """Answers after a moment, as a store does, so that many are asking at once."""

    async def get(self, key: str) -> KeyValue | None:
        await asyncio.sleep(0.003)
        return await super().get(key)

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        await asyncio.sleep(0.003)
        return await super().transact(operations, guards)


@HOLDERS
async def test_who_was_let_in_again_and_asks_many_times_at_once_is_answered_and_nobody_waits_for_it(path: str) -> None:
    mesh = await Mesh.make(Slow())
    async with mesh.leading():
        await revoke(mesh, path)
        serial = await join(mesh, await token_of(mesh, path))
        async with asyncio.timeout(3), asyncio.TaskGroup() as many:
            for _ in range(3 * CONCURRENT):
                many.create_task(renew(mesh, serial, path))
            await asyncio.sleep(0.1)
            assert await join(mesh, await token_of(mesh, "proxy/shop/store"))


async def test_an_admission_that_cannot_be_read_admits_nobody() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        await revoke(mesh)
        serial = await join(mesh, await token_of(mesh))
        await mesh.kv.transact([Put(mesh.keys.admission(PROXY), b"{}")])
        with pytest.raises(Denied):
            await renew(mesh, serial)
        assert await renew(mesh, await join(mesh, await token_of(mesh)))
