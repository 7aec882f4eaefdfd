"""How secrets rest in the store: sealed with a data-encryption key, and bound to the one place that they belong to.

Whoever reads the store, or a backup of it, sees no key; whoever can only write to it cannot move a sealed value from
one key path to another, nor ask for a credential.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from smc.errors import Invalid

DEK_BYTES = 32
_HEAD = struct.Struct(">BI")
_SEALED, _PROOF = 1, 2
_NONCE, _TAG = 12, 16


def new_dek() -> bytes:
    """A random data-encryption key for AES-256."""
    return os.urandom(DEK_BYTES)


@dataclass(frozen=True, slots=True)
class Keyring:
    """The data-encryption keys of one mesh, by number. The newest seals; each opens what it has sealed.

    A sealed value is one byte of format (1), four of the key's number, a nonce of 12, and AES-256-GCM's output with its
    tag of 16. The associated data are the mesh id, the key path and the key's number.
    """

    mesh_id: str
    deks: Mapping[int, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.deks or not all(len(d) == DEK_BYTES and 0 < n < 2**32 for n, d in self.deks.items()):
            raise Invalid(f"a keyring needs at least one data-encryption key of {DEK_BYTES} bytes, numbered from 1")

    def seal(self, path: str, secret: bytes) -> bytes:
        """Encrypt `secret` for the key `path` of the store."""
        number = max(self.deks)
        nonce = os.urandom(_NONCE)
        return (
            _HEAD.pack(_SEALED, number)
            + nonce
            + AESGCM(self.deks[number]).encrypt(nonce, secret, self._place(path, number))
        )

    def open(self, path: str, sealed: bytes) -> bytes:
        """Decrypt what `seal` made for the same path.

        Raises:
            Invalid: not a sealed value, of an unknown key, altered, or sealed for another place.
        """
        number = self._number(_SEALED, sealed, path)
        nonce, rest = sealed[_HEAD.size : _HEAD.size + _NONCE], sealed[_HEAD.size + _NONCE :]
        if len(rest) < _TAG:
            raise Invalid(f"the sealed value at {path} is cut short")
        try:
            return AESGCM(self.deks[number]).decrypt(nonce, rest, self._place(path, number))
        except InvalidTag:
            raise Invalid(
                f"the sealed value at {path} was altered, or sealed for another place",
                hint="restore it from a backup, and find out who can write to the store",
            ) from None

    def proof(self, *parts: bytes) -> bytes:
        """A MAC over `parts` that only a holder of the newest key can make."""
        number = max(self.deks)
        return _HEAD.pack(_PROOF, number) + self._mac(number, parts)

    def proves(self, proof: bytes, *parts: bytes) -> bool:
        """Whether `proof` was made over exactly these parts by a holder of one of the keys. Takes constant time."""
        try:
            number = self._number(_PROOF, proof, "a request")
        except Invalid:
            return False
        return hmac.compare_digest(proof[_HEAD.size :], self._mac(number, parts))

    def _number(self, form: int, value: bytes, path: str) -> int:
        if len(value) < _HEAD.size:
            raise Invalid(f"the sealed value at {path} is cut short")
        found, number = _HEAD.unpack_from(value)
        if found != form:
            raise Invalid(f"the sealed value at {path} has format {found}; this version reads {form}")
        if number not in self.deks:
            raise Invalid(
                f"the sealed value at {path} needs data-encryption key {number}, which this replica does not have",
                hint="restart the replica to read the keys again",
            )
        return int(number)

    def _place(self, path: str, number: int) -> bytes:
        return _framed((b"smc sealed value", self.mesh_id.encode(), path.encode(), str(number).encode()))

    def _mac(self, number: int, parts: tuple[bytes, ...]) -> bytes:
        derived = HKDF(
            hashes.SHA256(), DEK_BYTES, salt=None, info=_framed((b"smc proof", self.mesh_id.encode()))
        ).derive(self.deks[number])
        return hmac.digest(derived, _framed(parts), hashlib.sha256)


def _framed(parts: tuple[bytes, ...]) -> bytes:
    """The parts with their lengths: no two different lists of parts have the same bytes."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)
