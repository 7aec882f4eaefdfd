"""A mesh begins by one transaction, once."""

from __future__ import annotations

import asyncio

import pytest

from cluster.kv import Ambiguous, Committed
from cluster.memory import MemoryKV
from smc.certificates import x509
from smc.certificates.authority import load_authority, load_keyring, load_pins
from smc.certificates.initialise import initialise
from smc.certificates.signers.local import LocalSigner
from smc.errors import Conflict, Invalid, NotFound
from smc.keys import Keys
from tests.unit.certificates.issuer import START

KEYS = Keys("default")
SIGNER = LocalSigner(b"k" * 32)


async def test_a_new_mesh_is_whole_after_one_revision() -> None:
    kv = MemoryKV()
    before = (await kv.status()).revision
    operator = await initialise(kv, KEYS, SIGNER, "mesh.example", START)
    assert (await kv.status()).revision == before + 1
    found = {item.key.removeprefix(KEYS.root) for item in (await kv.list(KEYS.root)).items}
    assert found == {
        "mesh", "epoch", "ca/dek/00000001", "ca/roots/00000001", "ca/intermediates/00000001", "ca/bundle",
            "ca/signing",
    }  # fmt: skip
    operator.check(START)
    assert operator.uri == "spiffe://mesh.example/operator/admin"
    keyring = await load_keyring(kv, KEYS, SIGNER)
    authority = await load_authority(kv, KEYS, keyring, SIGNER)
    assert (authority.number, authority.epoch) == (1, 1)
    assert await load_pins(kv, KEYS) == (x509.pin(x509.load(operator.roots[0])[0]),)


async def test_no_private_key_lies_open_in_the_store() -> None:
    kv = MemoryKV()
    operator = await initialise(kv, KEYS, SIGNER, "mesh.example", START)
    values = b"".join(item.value for item in (await kv.list("")).items)
    assert b"PRIVATE" not in values
    assert operator.key.splitlines()[1].encode() not in values
    assert b"UFJJVkFURSBLRVk" not in values, "not in base64 either"


async def test_a_mesh_that_exists_is_left_as_it_is() -> None:
    kv = MemoryKV()
    await initialise(kv, KEYS, SIGNER, "mesh.example", START)
    before = (await kv.list("")).items
    with pytest.raises(Conflict, match="exists already, for the trust domain"):
        await initialise(kv, KEYS, SIGNER, "other.example", START)
    assert (await kv.list("")).items == before
    await initialise(kv, Keys("second"), SIGNER, "other.example", START)


async def test_of_many_at_once_one_wins() -> None:
    kv = MemoryKV()
    results = await asyncio.gather(
        *(initialise(kv, KEYS, SIGNER, "mesh.example", START) for _ in range(10)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["Conflict"] * 9 + ["Credential"]


async def test_a_lost_answer_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = MemoryKV()
    really = kv.transact

    async def lost(*args: object, **kwargs: object) -> Committed:
        await really(*args, **kwargs)  # type: ignore[arg-type]
        raise Ambiguous("the answer was lost")

    monkeypatch.setattr(kv, "transact", lost)
    (await initialise(kv, KEYS, SIGNER, "mesh.example", START)).check(START)


async def test_the_wrong_key_encryption_key_opens_nothing() -> None:
    kv = MemoryKV()
    with pytest.raises(NotFound, match="smc init"):
        await load_keyring(kv, KEYS, SIGNER)
    await initialise(kv, KEYS, SIGNER, "mesh.example", START)
    with pytest.raises(Invalid, match="does not unwrap"):
        await load_keyring(kv, KEYS, LocalSigner(b"x" * 32))
    with pytest.raises(Invalid, match="wrapped by the signer 'local'"):
        await load_keyring(kv, KEYS, LocalSigner(b"k" * 32, "azure_keyvault"))


async def test_a_bad_trust_domain_or_name_writes_nothing() -> None:
    kv = MemoryKV()
    for trust_domain, operator in (("Mesh", "admin"), ("mesh.example", "../x")):
        with pytest.raises(Invalid):
            await initialise(kv, KEYS, SIGNER, trust_domain, START, operator=operator)
    assert (await kv.list("")).items == ()
