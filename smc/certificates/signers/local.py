"""The signer that needs no service: a key-encryption key in a file, and signing keys in this process while they sign.

The file is all that an operator has to bring to a new replica, and to keep safe beside a backup: with it and the store
every key of the mesh can be read, and without it none.
"""

from __future__ import annotations

import base64
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from smc.certificates import x509
from smc.errors import Conflict, Invalid, NotFound

_HEADER = b"smc-key-encryption-key-1:"
_KEK_BYTES = 32
_NONCE = 12
_FORMAT = b"\x01"
_PURPOSE = b"smc wrapped key"


@dataclass(frozen=True, slots=True)
class LocalSigner:
    """Wraps with AES-256-GCM under the key of `open` or `create`; a handle is the signing key in PKCS#8."""

    _kek: bytes = field(repr=False)
    name: str = "local"

    @classmethod
    def create(cls, path: Path) -> LocalSigner:
        """Make a random key-encryption key and write it to `path`, which must not exist, with mode 0600.

        Raises:
            Conflict: `path` exists.
            OSError: it cannot be written.
        """
        kek = os.urandom(_KEK_BYTES)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise Conflict(
                f"{path} exists, and a key-encryption key is never overwritten",
                hint="name another file, or move it away if no mesh needs it any more",
            ) from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(_HEADER + base64.b64encode(kek) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return cls(kek)

    @classmethod
    def open(cls, path: Path) -> LocalSigner:
        """Read the key-encryption key.

        Raises:
            NotFound: there is no such file.
            Invalid: others than its owner may read or write it, or it is no key-encryption key.
        """
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read(1024)
        except FileNotFoundError:
            raise NotFound(
                f"there is no key-encryption key at {path}", hint="smc init makes one; copy it from another replica"
            ) from None
        except OSError as e:
            raise Invalid(f"the key-encryption key at {path} cannot be read: {e.strerror}") from None
        if not stat.S_ISREG(mode) or stat.S_IMODE(mode) & 0o077:
            raise Invalid(
                f"the key-encryption key at {path} has mode {stat.S_IMODE(mode):04o}: others than its owner may use it",
                hint=f"chmod 600 {path}",
            )
        try:
            kek = base64.b64decode(text.strip().removeprefix(_HEADER), validate=True)
        except ValueError:
            kek = b""
        if not text.startswith(_HEADER) or len(kek) != _KEK_BYTES:
            raise Invalid(f"{path} is no key-encryption key", hint="use the file that smc init wrote")
        return cls(kek)

    async def new_key(self) -> bytes:
        return x509.private_pem(x509.new_key())

    async def public_key(self, handle: bytes) -> ec.EllipticCurvePublicKey:
        return self._load(handle).public_key()

    async def sign(self, handle: bytes, data: bytes) -> bytes:
        return self._load(handle).sign(data, ec.ECDSA(hashes.SHA256()))

    async def wrap(self, secret: bytes) -> bytes:
        if len(secret) > 64:
            raise Invalid(f"{len(secret)} bytes cannot be wrapped: at most 64")
        nonce = os.urandom(_NONCE)
        return _FORMAT + nonce + AESGCM(self._kek).encrypt(nonce, secret, _PURPOSE)

    async def unwrap(self, wrapped: bytes) -> bytes:
        if wrapped[:1] != _FORMAT or not 29 <= len(wrapped) <= 128:
            raise Invalid("the wrapped key is of an unknown format")
        try:
            return AESGCM(self._kek).decrypt(wrapped[1 : 1 + _NONCE], wrapped[1 + _NONCE :], _PURPOSE)
        except InvalidTag:
            raise Invalid(
                "the key-encryption key does not unwrap this mesh's data-encryption key",
                hint="use the key-encryption key that smc init wrote for this mesh",
            ) from None

    @staticmethod
    def _load(handle: bytes) -> ec.EllipticCurvePrivateKey:
        try:
            key = serialization.load_pem_private_key(handle, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
            raise Invalid("a signing key cannot be read", hint="is the mesh's signer still the one it was made with?")
        return key
