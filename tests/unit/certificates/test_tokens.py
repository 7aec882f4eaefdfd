"""A token turns one key into one credential, once, whoever dies meanwhile. All in virtual time."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from cluster import kv as store
from cluster.kv import Delete, Guard, Operation, Outcome, Put
from cluster.memory import MemoryKV
from smc.certificates import requests, x509
from smc.certificates.authority import load_pins
from smc.certificates.requests import replica_credential, request_credential
from smc.certificates.tokens import Token, create_token, redeem
from smc.codec import decode, encode
from smc.errors import Denied, Expired, Invalid, SmcError, Unauthenticated, Unavailable
from smc.records import AnswerRecord, RequestRecord, TokenRecord
from tests.unit.certificates.issuer import Mesh, now

pytestmark = pytest.mark.looptime
PATH = "proxy/shop/buyer"


async def token_of(mesh: Mesh, ttl: float = 600) -> Token:
    text, _ = await create_token(mesh.kv, mesh.keys, mesh.keyring, PATH, ttl=ttl, now=now())
    return Token.parse(text)


async def use(mesh: Mesh, token: Token, key: x509.PublicKey, timeout: float = 15) -> tuple[str, str]:
    return await redeem(mesh.kv, mesh.keys, mesh.keyring, token, key, now=now(), timeout=timeout)


def new_public() -> x509.PublicKey:
    return x509.new_key().public_key()


async def test_a_token_becomes_a_credential_of_the_path_that_it_was_made_for() -> None:
    mesh = await Mesh.make()
    key = new_public()
    async with mesh.leading():
        path, chain = await use(mesh, await token_of(mesh), key)
    assert path == PATH
    x509.check_answer(chain, key, f"spiffe://mesh.example/{PATH}", mesh.operator.roots, now())
    assert x509.dns_names(x509.load(chain)[0]) == ()


async def test_of_fifty_keys_at_once_exactly_one_gets_in() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        token = await token_of(mesh)
        keys = [new_public() for _ in range(50)]
        results = await asyncio.gather(*(use(mesh, token, key) for key in keys), return_exceptions=True)
        assert len((await mesh.kv.list(mesh.keys.requests)).items) == 1
    winners = [(key, result) for key, result in zip(keys, results, strict=True) if isinstance(result, tuple)]
    assert len(winners) == 1
    assert sum(isinstance(result, Denied) for result in results) == 49
    key, (_, chain) = winners[0]
    assert x509.load(chain)[0].public_key() == key


async def test_the_same_key_may_ask_again_and_gets_the_same_answer() -> None:
    mesh = await Mesh.make()
    key = new_public()
    async with mesh.leading():
        token = await token_of(mesh)
        first = await use(mesh, token, key)
        assert await use(mesh, token, key) == first
        await asyncio.sleep(300)
        again = await use(mesh, token, key)
        assert again != first, "the first answer is gone with its lease"
        with pytest.raises(Denied):
            await use(mesh, token, new_public())


async def test_a_caller_that_went_away_before_the_answer_finds_it_later() -> None:
    mesh = await Mesh.make()
    key, token = new_public(), None
    token = await token_of(mesh)
    task = asyncio.create_task(use(mesh, token, key))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    async with mesh.leading():
        await asyncio.sleep(1)
    # No leader any more: the answer is there already.
    assert (await use(mesh, token, key))[0] == PATH


async def test_a_request_that_a_dead_leader_left_is_answered_by_the_next() -> None:
    mesh = await Mesh.make()
    key, token = new_public(), await token_of(mesh)
    mesh.signer.breaks(True)
    async with mesh.leading():
        task = asyncio.create_task(use(mesh, token, key))
        await asyncio.sleep(2)
    mesh.signer.breaks(False)
    async with mesh.leading():
        assert (await task)[0] == PATH


async def test_without_a_leader_it_is_unavailable_in_time_and_a_retry_works() -> None:
    mesh = await Mesh.make()
    key, token = new_public(), await token_of(mesh)
    begun = now()
    with pytest.raises(Unavailable, match="no leader signed the credential within 5 s"):
        await use(mesh, token, key, timeout=5)
    assert now() - begun == pytest.approx(5)
    async with mesh.leading():
        assert (await use(mesh, token, key))[0] == PATH


async def test_a_token_ends_with_its_time() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        token = await token_of(mesh, ttl=30)
        with pytest.raises(Expired, match="ask for a new token"):
            await redeem(mesh.kv, mesh.keys, mesh.keyring, token, new_public(), now=now() + 31)
        await asyncio.sleep(31)
        with pytest.raises(Unauthenticated, match="no such token, or it has expired"):
            await use(mesh, token, new_public())


async def test_a_token_that_never_was_is_refused() -> None:
    mesh = await Mesh.make()
    token = Token(b"x" * 32, await load_pins(mesh.kv, mesh.keys))
    with pytest.raises(Unauthenticated):
        await use(mesh, token, new_public())


async def test_the_store_holds_the_hash_of_a_token_only() -> None:
    mesh = await Mesh.make()
    token = await token_of(mesh)
    everything = b"".join(item.key.encode() + item.value for item in (await mesh.kv.list("")).items)
    encoded = token.text()[4:47].encode()
    for secret in (token.secret, encoded, token.secret.hex().encode(), base64.b64encode(token.secret)):
        assert secret not in everything
    assert token.sha256.encode() in everything
    assert token.pins == await load_pins(mesh.kv, mesh.keys)


@pytest.mark.parametrize(
    "forged",
    [{"proof": b""}, {"credential": "operator/mallory"}, {"expires": 2e9}, {"author": ""}],
    ids=["nothing proves it", "for somebody else", "for longer", "by somebody else"],
)
async def test_who_can_only_write_to_the_store_makes_no_token_and_nothing_else_of_one(forged: dict[str, Any]) -> None:
    mesh = await Mesh.make()
    text, _ = await create_token(mesh.kv, mesh.keys, mesh.keyring, PATH, ttl=60, now=now(), author="operator/ann")
    token = Token.parse(text)
    item = await mesh.kv.get(mesh.keys.token(token.sha256))
    assert item is not None
    await mesh.kv.transact([Put(item.key, encode(replace(decode(TokenRecord, item.value), **forged)), item.lease)])
    async with mesh.leading():
        with pytest.raises(Unauthenticated, match="no replica of this version made this token"):
            await use(mesh, token, new_public())
    assert not (await mesh.kv.list(mesh.keys.requests)).items


async def test_the_record_of_a_token_is_worth_nothing_under_another_secret() -> None:
    mesh = await Mesh.make()
    token = await token_of(mesh)
    own = Token(b"m" * 32, token.pins)
    item = await mesh.kv.get(mesh.keys.token(token.sha256))
    assert item is not None
    await mesh.kv.transact([Put(mesh.keys.token(own.sha256), item.value, item.lease)])
    async with mesh.leading():
        with pytest.raises(Unauthenticated, match="no replica"):
            await use(mesh, own, new_public())
        assert await use(mesh, token, new_public())


@pytest.mark.parametrize(
    ("path", "ttl"), [("ns/a/sa/b", 60), ("replica/a", 60), ("proxy/a", 60), (PATH, 601), (PATH, -1), (PATH, 0.5)]
)
async def test_no_token_is_made_for_another_path_or_for_longer(path: str, ttl: float) -> None:
    mesh = await Mesh.make()
    with pytest.raises(Invalid):
        await create_token(mesh.kv, mesh.keys, mesh.keyring, path, ttl=ttl, now=now())


_32_BYTES = st.binary(min_size=32, max_size=32)


@given(secret=_32_BYTES, pins=st.lists(_32_BYTES, min_size=1, max_size=8))
def test_a_token_is_read_as_it_was_printed(secret: bytes, pins: list[bytes]) -> None:
    token = Token(secret, tuple(pin.hex() for pin in pins))
    assert Token.parse(token.text() + "\n") == token
    assert token.text()[4:47] not in repr(token)


@given(st.text(max_size=300))
def test_no_other_text_is_a_token_and_it_is_not_repeated(text: str) -> None:
    with pytest.raises(Invalid) as refused:
        Token.parse("smc-SECRET" + text)
    assert "SECRET" not in str(refused.value)


class Unsure(MemoryKV):
    """Loses the answer of the first transactions, one applied and one not."""

    lost = 0

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        if any("/requests/" in operation.key for operation in operations):
            self.lost += 1
            if self.lost == 1:
                raise store.Ambiguous("the question was lost")
            if self.lost == 2:
                await super().transact(operations, guards)
                raise store.Ambiguous("the answer was lost")
        return await super().transact(operations, guards)


async def test_a_store_that_loses_questions_and_answers_costs_nothing_but_time() -> None:
    mesh = await Mesh.make(Unsure())
    key = new_public()
    async with mesh.leading():
        assert (await use(mesh, await token_of(mesh), key))[0] == PATH
    assert isinstance(mesh.kv, Unsure)
    assert mesh.kv.lost == 2


async def test_a_deposed_leader_answers_nobody() -> None:
    mesh = await Mesh.make()
    key, token = new_public(), await token_of(mesh)
    async with mesh.leading() as task:
        await asyncio.sleep(1)
        await mesh.elect()
        with pytest.raises(Unavailable, match="no leader"):
            await use(mesh, token, key, timeout=5)
        assert (await mesh.kv.list(mesh.keys.answers)).items == ()
        assert task.done()


# --- requests without a token


async def test_a_replica_makes_its_own_key_and_gets_the_name_of_replicas() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        credential = await replica_credential(mesh.kv, mesh.keys, mesh.keyring, "a", now=now())
    credential.check(now())
    assert mesh.issued == ["replica"]
    leaf = x509.load(credential.chain)[0]
    assert credential.uri == "spiffe://mesh.example/replica/a"
    assert x509.dns_names(leaf) == ("replica.mesh.example",)
    assert (await mesh.kv.list(mesh.keys.requests)).items == ()
    assert (await mesh.kv.list(mesh.keys.answers)).items == ()


async def test_many_requests_are_answered_together() -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        chains = await asyncio.gather(
            *(
                request_credential(mesh.kv, mesh.keys, mesh.keyring, f"proxy/shop/w{n}", new_public(), "test")
                for n in range(60)
            )
        )
    uris = {x509.uri(x509.load(chain)[0]) for chain in chains}
    assert uris == {f"spiffe://mesh.example/proxy/shop/w{n}" for n in range(60)}


async def ask(mesh: Mesh, record: RequestRecord, *, id_: str = "") -> AnswerRecord | None:
    lease = await mesh.kv.grant(60)
    id_ = id_ or record.id
    await mesh.kv.transact([Put(mesh.keys.request(id_), encode(record), lease)])
    await asyncio.sleep(5)
    item = await mesh.kv.get(mesh.keys.answer(id_))
    return decode(AnswerRecord, item.value) if item else None


async def test_who_can_only_write_to_the_store_gets_nothing_signed() -> None:
    mesh = await Mesh.make()
    key = x509.public_der(new_public())
    good = requests.make_request(mesh.keyring, "1", PATH, key, "test")
    forged = [
        replace(good, credential="operator/admin"),
        replace(good, public_key=x509.public_der(new_public())),
        replace(good, requester="somebody else"),
        replace(good, id="2"),
        replace(good, proof=b""),
    ]
    with structlog.testing.capture_logs() as logs:
        async with mesh.leading():
            for n, record in enumerate(forged):
                answer = await ask(mesh, replace(record, id=f"f{n}") if record.id == "1" else record)
                assert answer is not None
                assert answer.chain == ""
                assert "no valid proof" in answer.error
            moved = await ask(mesh, good, id_="elsewhere")
            assert moved is not None
            assert moved.chain == ""
    assert not [entry for entry in logs if entry["event"] == "credential issued"]


@pytest.mark.parametrize("path", ["ns/shop/sa/buyer", "root/a", "operator/../x"])
async def test_even_a_proven_request_gets_no_other_kind_of_name(path: str) -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        answer = await ask(mesh, requests.make_request(mesh.keyring, "1", path, x509.public_der(new_public()), "test"))
    assert answer is not None
    assert (answer.chain, "names no credential" in answer.error) == ("", True)


async def test_a_refusal_reaches_the_one_who_asked() -> None:
    mesh = await Mesh.make()
    weak = ec.generate_private_key(ec.SECP256K1()).public_key()
    async with mesh.leading():
        with pytest.raises(Invalid, match="secp256k1"):
            await request_credential(mesh.kv, mesh.keys, mesh.keyring, PATH, weak, "test")


async def test_garbage_among_the_requests_stops_nobody() -> None:
    mesh = await Mesh.make()
    lease = await mesh.kv.grant(60)
    await mesh.kv.transact([Put(mesh.keys.request("bad"), b"\xff", lease), Put(mesh.keys.request("open"), b"{}")])
    async with mesh.leading():
        await request_credential(mesh.kv, mesh.keys, mesh.keyring, PATH, new_public(), "test")
        assert await mesh.kv.get(mesh.keys.answer("open")) is None, "what has no lease is not answered"
        await mesh.kv.transact([Delete(mesh.keys.request("open"))])


async def test_a_forged_answer_is_not_taken_for_a_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = await Mesh.make()
    async with mesh.leading():
        other = await replica_credential(mesh.kv, mesh.keys, mesh.keyring, "b", now=now())

    async def forge() -> None:
        while not (found := (await mesh.kv.list(mesh.keys.requests)).items):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        id_ = found[0].key.removeprefix(mesh.keys.requests)
        await mesh.kv.transact([Put(mesh.keys.answer(id_), encode(AnswerRecord(id_, other.chain)))])

    task = asyncio.create_task(forge())
    with pytest.raises(Invalid, match="another key"):
        await replica_credential(mesh.kv, mesh.keys, mesh.keyring, "a", now=now())
    await task


async def test_neither_log_nor_error_nor_store_holds_a_token_or_a_key() -> None:
    mesh = await Mesh.make()
    said: list[str] = []
    with structlog.testing.capture_logs() as logs:
        async with mesh.leading():
            token = await token_of(mesh)
            for key in (new_public(), new_public()):
                try:
                    await use(mesh, token, key)
                except SmcError as e:
                    said.append(str(e))
        said.append(json.dumps(logs, default=repr))
    assert len(said) == 2
    for text in said:
        assert token.text()[4:47] not in text
        assert token.sha256 not in text
        assert "PRIVATE" not in text
    assert f"token:{token.sha256[:8]}" in said[-1]
