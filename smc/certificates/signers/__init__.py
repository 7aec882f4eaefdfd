"""Where the mesh's own keys are: what everything that holds one must be able to do.

A signer makes signing keys and names each by a *handle*, a few bytes that mean something to it alone: a key service's
handle is the name of a key that never leaves the service, the local signer's is the key itself. So a handle is as
secret as a key: it is stored sealed, and reaches no log. The data-encryption key that seals it is wrapped by the
signer.
"""

from __future__ import annotations

from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec


class Signer(Protocol):
    """Holds keys, or reaches the service that does. Every call may be cancelled.

    Raises (each call): Unavailable when the service does not answer; Invalid when it answers that it cannot.
    """

    @property
    def name(self) -> str:
        """What the record of a wrapped key calls it: another signer refuses to unwrap."""
        ...

    async def new_key(self) -> bytes:
        """Make a P-256 signing key and return its handle."""
        ...

    async def public_key(self, handle: bytes) -> ec.EllipticCurvePublicKey:
        """The public half of a signing key."""
        ...

    async def sign(self, handle: bytes, data: bytes) -> bytes:
        """Sign `data` as ECDSA with SHA-256; returns an ECDSA-Sig-Value in DER."""
        ...

    async def wrap(self, secret: bytes) -> bytes:
        """Encrypt up to 64 bytes under the key-encryption key, with integrity."""
        ...

    async def unwrap(self, wrapped: bytes) -> bytes:
        """Decrypt what `wrap` made.

        Raises:
            Invalid: altered, or wrapped under another key-encryption key.
        """
        ...
