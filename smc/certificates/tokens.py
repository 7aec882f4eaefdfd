"""Join tokens: one secret of 256 bits that turns one key into one credential, once.

The store keeps its hash only, under a lease. The printed token carries a pin of each root that the mesh trusts, so that
who holds it knows whom to trust before anything else is known. While one root takes the place of another these are two:
the token is good whichever of them a replica shows.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster import kv as store
from cluster.kv import KV, Guard, KeyValue, Operation, Put, Rejected
from smc.certificates import admissions, requests, x509
from smc.certificates.authority import load_pins, store_errors
from smc.certificates.sealing import Keyring
from smc.codec import decode, encode
from smc.errors import Conflict, Denied, Expired, Invalid, Unauthenticated
from smc.keys import Keys
from smc.model import Name
from smc.records import JoinedRecord, TokenRecord

MAX_TTL = 600.0
JOINED = 600.0
"""Seconds for which a proxy that has joined is waited for although nobody has seen it: its Envoy may be starting."""
_SECRET_BYTES = 32
_PAUSE = 0.02
"""Seconds before what lost a race looks who has won."""
_FORM = re.compile(r"smc-([A-Za-z0-9_-]{43})((?:\.[0-9a-f]{64}){1,8})")


@dataclass(frozen=True, slots=True)
class Token:
    """A join token, taken apart."""

    secret: bytes = field(repr=False)
    pins: tuple[str, ...]
    """SHA-256 of a root's public key (SubjectPublicKeyInfo), in hexadecimal; one or more."""

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read `smc-<secret, base64url>.<pin, hexadecimal>`, or with more pins, each after a dot.

        Raises:
            Invalid: not of that form. The text is not repeated.
        """
        match = _FORM.fullmatch(text.strip()) if len(text) < 1024 else None
        if match is None:
            raise Invalid(
                "this is no join token: it must read smc-<43 characters>.<64 hexadecimal digits>",
                hint="copy all of what smc token create printed",
            )
        return cls(base64.urlsafe_b64decode(match[1] + "="), tuple(match[2].split(".")[1:]))

    def text(self) -> str:
        """What is printed, once."""
        return ".".join((f"smc-{base64.urlsafe_b64encode(self.secret).decode().rstrip('=')}", *self.pins))

    @property
    def sha256(self) -> str:
        """Under what it is stored, in hexadecimal."""
        return hashlib.sha256(self.secret).hexdigest()


async def create_token(
    kv: KV,
    keys: Keys,
    keyring: Keyring,
    credential: str,
    *,
    ttl: float,
    now: float,
    author: str = "",
    guards: Sequence[Guard] = (),
) -> tuple[str, float]:
    """Make a token for one credential path; returns its text and when it expires, in seconds since 1970.

    `ttl` is in seconds, at most `MAX_TTL`; 0 means that. `author` is the path of the credential of who asks for it, and
    `guards` are what it was decided on that they may.

    Raises:
        Conflict: a guard does not hold any more.
        Invalid: a bad path or `ttl`.
        NotFound: there is no such mesh.
        Unavailable: the store does not answer.
    """
    x509.check_credential(credential)
    if credential.startswith("replica/"):
        raise Invalid(f"{credential!r} needs no token", hint="a replica proves itself by its key-encryption key")
    ttl = ttl or MAX_TTL
    if not 1 <= ttl <= MAX_TTL:
        raise Invalid(f"a token cannot live for {ttl:g} s", hint=f"1 to {MAX_TTL:g} s")
    token = Token(secrets.token_bytes(_SECRET_BYTES), await load_pins(kv, keys))
    expires = now + ttl
    with store_errors("the token cannot be created"):
        lease = await kv.grant(ttl)
        # Should the answer be lost, the token that nobody has seen ends with its lease.
        record = TokenRecord(credential, expires, author=author)
        record = replace(record, proof=keyring.proof(*_proven(token, record)))
        outcome = await kv.transact([Put(keys.token(token.sha256), encode(record), lease)], guards)
    if isinstance(outcome, Rejected):
        raise Conflict(f"what {author} may has changed meanwhile", hint="ask again")
    return token.text(), expires


async def redeem(
    kv: KV,
    keys: Keys,
    keyring: Keyring,
    token: Token,
    public_key: x509.PublicKey,
    *,
    now: float,
    timeout: float = requests.TIMEOUT,
) -> tuple[str, str]:
    """Turn a token into a credential for `public_key`; returns the credential's path and the chain in PEM.

    One transaction marks the token as used by this key and writes the request, and that a proxy joins. The same key may
    ask again until the token expires and gets the same answer, or another one once that is gone; no other key ever gets
    one.

    Raises:
        Unauthenticated: no such token, or expired and gone, or made by nobody who has the data-encryption key.
        Expired: it is past its time by this replica's clock.
        Denied: another key has used it, or whom it is for, or who made it, was revoked after that.
        Invalid: the leader refuses; the text says why.
        Unavailable: the store does not answer, or no leader does within `timeout` seconds. Trying again is safe.
    """
    try:
        with store_errors("the token cannot be redeemed"):
            async with asyncio.timeout(timeout):
                id_, credential = await _use(kv, keys, keyring, token, public_key, now)
                return credential, await requests.answer(kv, keys, id_)
    except TimeoutError:
        raise requests.no_leader(timeout) from None


async def _use(
    kv: KV, keys: Keys, keyring: Keyring, token: Token, public_key: x509.PublicKey, now: float
) -> tuple[str, str]:
    """Mark the token and write the request; returns the request's id and the credential's path."""
    user = x509.fingerprint(public_key)
    id_ = hashlib.sha256(f"{token.sha256} {user}".encode()).hexdigest()[:32]
    lease = joined = 0
    while True:
        item, record = _check(await kv.get(keys.token(token.sha256)), keyring, token, user, now)
        not_revoked = await admissions.check_token(kv, keys, item, record)
        if record.used_by and await kv.get(keys.request(id_)) is not None:
            return id_, record.credential
        lease = lease or await kv.grant(requests.LEASE)
        request = requests.make_request(
            keyring, id_, record.credential, x509.public_der(public_key), f"token:{token.sha256[:8]}"
        )
        operations: list[Operation] = [Put(keys.request(id_), encode(request), lease)]
        if not record.used_by:
            operations.append(Put(item.key, encode(replace(record, used_by=user)), item.lease))
            kind, _, name = record.credential.partition("/")
            if kind == "proxy":
                joined = joined or await kv.grant(JOINED)
                proxy = Name.parse(name)
                operations.append(Put(keys.joined(proxy), encode(JoinedRecord(proxy)), joined))
        guards = [
            Guard(item.key, mod_revision=item.mod_revision),
            Guard(keys.request(id_), create_revision=0),
            *not_revoked,
        ]
        try:
            outcome = await kv.transact(operations, guards)
        except store.Ambiguous:
            continue
        except store.LeaseLost:
            lease = joined = 0
            continue
        if not isinstance(outcome, Rejected):
            return id_, record.credential
        await asyncio.sleep(_PAUSE)


def _check(
    item: KeyValue | None, keyring: Keyring, token: Token, user: str, now: float
) -> tuple[KeyValue, TokenRecord]:
    if item is None:
        raise Unauthenticated("there is no such token, or it has expired", hint="ask for a new token")
    record = decode(TokenRecord, item.value, key="a token")
    if not keyring.proves(record.proof, *_proven(token, record)):
        # Else whoever can write to the store would be whoever he likes.
        raise Unauthenticated("no replica of this version made this token", hint="ask for a new token")
    if record.expires <= now:
        raise Expired("the token has expired", hint="ask for a new token")
    if record.used_by and not hmac.compare_digest(record.used_by, user):
        raise Denied("the token was used by another key", hint="ask for a new token")
    return item, record


def _proven(token: Token, record: TokenRecord) -> tuple[bytes, ...]:
    """What is never changed of a token that is stored."""
    said = (token.sha256, record.credential, repr(float(record.expires)), record.author)
    return (b"smc join token", *(part.encode() for part in said))
