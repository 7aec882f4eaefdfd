"""A sealed value opens in its own place only, and a proof needs the key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.certificates.sealing import Keyring, new_dek
from smc.errors import Invalid

DEK = new_dek()
RING = Keyring("mesh-1", {1: DEK})
A, B = "/smc/default/certificates/shop/a", "/smc/default/certificates/shop/b"


@given(path=st.text(max_size=60), secret=st.binary(max_size=300))
def test_what_was_sealed_opens(path: str, secret: bytes) -> None:
    sealed = RING.seal(path, secret)
    assert RING.open(path, sealed) == secret
    assert len(secret) < 8 or secret not in sealed


def test_equal_secrets_do_not_look_equal() -> None:
    assert RING.seal(A, b"secret") != RING.seal(A, b"secret")


def test_two_values_swapped_between_keys_are_refused() -> None:
    at_a, at_b = RING.seal(A, b"key of a"), RING.seal(B, b"key of b")
    for path, sealed in ((A, at_b), (B, at_a)):
        with pytest.raises(Invalid, match="altered, or sealed for another place"):
            RING.open(path, sealed)


def test_a_value_of_another_mesh_or_another_key_is_refused() -> None:
    sealed = RING.seal(A, b"secret")
    for ring in (Keyring("mesh-2", {1: DEK}), Keyring("mesh-1", {1: new_dek()})):
        with pytest.raises(Invalid, match="altered"):
            ring.open(A, sealed)
    with pytest.raises(Invalid, match="needs data-encryption key 1"):
        Keyring("mesh-1", {2: DEK}).open(A, sealed)


def test_the_number_of_the_key_is_sealed_too() -> None:
    both = Keyring("mesh-1", {1: DEK, 2: DEK})
    sealed = bytearray(RING.seal(A, b"secret"))
    sealed[4] = 2
    with pytest.raises(Invalid, match="altered"):
        both.open(A, bytes(sealed))


@given(at=st.integers(0, 38), bit=st.integers(0, 7))
def test_any_bit_that_is_turned_is_noticed(at: int, bit: int) -> None:
    sealed = bytearray(RING.seal(A, b"secret"))
    sealed[at] ^= 1 << bit
    with pytest.raises(Invalid):
        RING.open(A, bytes(sealed))


@given(st.binary(max_size=60))
def test_whatever_bytes_come_the_answer_is_a_refusal(noise: bytes) -> None:
    with pytest.raises(Invalid):
        RING.open(A, noise)
    assert not RING.proves(noise, b"id")


def test_the_newest_key_seals_and_the_older_ones_still_open() -> None:
    old = RING.seal(A, b"secret")
    rotated = Keyring("mesh-1", {1: DEK, 2: new_dek()})
    assert rotated.open(A, old) == b"secret"
    with pytest.raises(Invalid, match="needs data-encryption key 2"):
        RING.open(A, rotated.seal(A, b"secret"))
    assert rotated.proves(RING.proof(b"id"), b"id")


def test_a_proof_is_over_exactly_its_parts() -> None:
    proof = RING.proof(b"id", b"proxy/a/b")
    assert RING.proves(proof, b"id", b"proxy/a/b")
    for parts in ((b"id", b"proxy/a/c"), (b"idp", b"roxy/a/b"), (b"id",), (b"id", b"proxy/a/b", b"")):
        assert not RING.proves(proof, *parts)
    assert not Keyring("mesh-1", {1: new_dek()}).proves(proof, b"id", b"proxy/a/b")
    assert not Keyring("mesh-2", {1: DEK}).proves(proof, b"id", b"proxy/a/b")


def test_a_sealed_value_is_no_proof_and_a_proof_is_no_sealed_value() -> None:
    with pytest.raises(Invalid, match="format 2"):
        RING.open(A, RING.proof(b"id"))
    assert not RING.proves(RING.seal(A, b"id"), b"id")


def test_no_key_is_in_the_text_of_a_keyring() -> None:
    assert DEK.hex() not in repr(RING)
    assert repr(DEK) not in repr(RING)


def test_a_keyring_without_a_whole_key_is_refused() -> None:
    for deks in ({}, {1: b"short"}, {0: DEK}):
        with pytest.raises(Invalid, match="keyring"):
            Keyring("mesh-1", deks)
