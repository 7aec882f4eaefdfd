"""How a replica gets a credential signed that only the leader can sign: it asks in the store, and is answered there.

Whoever can only write to the store cannot ask: a request carries a proof under the data-encryption key. Request and
answer share a lease, so nothing is left of either.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import aclosing, suppress

from cluster import kv as store
from cluster.kv import KV, Guard, Put, Rejected, Status
from smc.certificates import x509
from smc.certificates.authority import load_mesh, load_roots, store_errors
from smc.certificates.credential import Credential
from smc.certificates.sealing import Keyring
from smc.codec import decode, encode
from smc.errors import Conflict, Invalid, Unavailable
from smc.keys import Keys
from smc.records import AnswerRecord, RequestRecord

LEASE = 60.0
"""Seconds that a request and its answer live."""
TIMEOUT = 15.0
"""Seconds to wait for an answer: a dead leader's lease and the election of the next take 10 to 12."""


def make_request(keyring: Keyring, id_: str, credential: str, public_key: bytes, requester: str) -> RequestRecord:
    """A request with its proof."""
    return RequestRecord(
        id_, credential, public_key, requester, keyring.proof(*_proven(id_, credential, public_key, requester))
    )


def is_proven(keyring: Keyring, request: RequestRecord) -> bool:
    """Whether somebody who holds the data-encryption key made exactly this request."""
    return keyring.proves(
        request.proof, *_proven(request.id, request.credential, request.public_key, request.requester)
    )


async def request_credential(
    kv: KV,
    keys: Keys,
    keyring: Keyring,
    credential: str,
    public_key: x509.PublicKey,
    requester: str,
    *,
    guards: Sequence[Guard] = (),
    timeout: float = TIMEOUT,
) -> str:
    """Have the leader sign `public_key` for the credential path `credential`; returns the chain in PEM.

    Whether `requester` may have it is for the caller to decide before; `guards` are what that was decided on. Trying
    again is safe. When cancelled, the request's lease ends what is left.

    Raises:
        Conflict: a guard does not hold any more.
        Invalid: a bad path, or the leader refuses; the text says why.
        Unavailable: the store does not answer, or no leader does within `timeout` seconds.
    """
    x509.check_credential(credential)
    id_ = secrets.token_hex(16)
    request = make_request(keyring, id_, credential, x509.public_der(public_key), requester)
    try:
        with store_errors("the credential cannot be requested"):
            async with asyncio.timeout(timeout):
                lease = await kv.grant(LEASE)
                # If its fate is unknown, the answer will tell.
                with suppress(store.Ambiguous):
                    outcome = await kv.transact(
                        [Put(keys.request(id_), encode(request), lease)],
                        [Guard(keys.request(id_), create_revision=0), *guards],
                    )
                    if isinstance(outcome, Rejected):
                        raise Conflict(f"what {credential} may have has changed meanwhile", hint="ask again")
                chain = await answer(kv, keys, id_)
                with suppress(store.StoreError):
                    await kv.revoke(lease)
                return chain
    except TimeoutError:
        raise no_leader(timeout) from None


async def answer(kv: KV, keys: Keys, id_: str) -> str:
    """Wait for the answer to a request, for as long as it takes; returns the chain in PEM.

    Raises:
        Invalid: the leader refuses; the text says why.
        StoreError: as the store's `list` and `watch` do.
    """
    key = keys.answer(id_)
    listing = await kv.list(key)
    for item in listing.items:
        if item.key == key:
            return _chain(item)
    async with aclosing(kv.watch(key, Status(listing.cluster_id, listing.revision))) as batches:
        async for batch in batches:
            for item in batch.puts:
                if item.key == key:
                    return _chain(item)
    raise store.Unavailable("the watch ended")


async def replica_credential(
    kv: KV, keys: Keys, keyring: Keyring, name: str, *, now: float, timeout: float = TIMEOUT
) -> Credential:
    """Make a key and get this replica's own credential: who can write to the store and unwrap its key is a replica.

    Raises:
        Invalid, Unavailable: as `request_credential`; also Invalid if the answer is not what was asked for.
    """
    mesh = await load_mesh(kv, keys)
    uri = x509.credential_uri(mesh.trust_domain, f"replica/{name}")
    key = x509.new_key()
    chain = await request_credential(kv, keys, keyring, f"replica/{name}", key.public_key(), uri, timeout=timeout)
    roots = await load_roots(kv, keys)
    x509.check_answer(chain, key.public_key(), uri, roots, now)
    return Credential(uri, chain, x509.private_pem(key).decode(), roots)


def no_leader(timeout: float) -> Unavailable:
    return Unavailable(
        f"no leader signed the credential within {timeout:g} s", hint="try again: the mesh may be electing a leader"
    )


def _chain(item: store.KeyValue) -> str:
    record = decode(AnswerRecord, item.value, key=item.key)
    if record.error:
        raise Invalid(record.error)
    return record.chain


def _proven(id_: str, credential: str, public_key: bytes, requester: str) -> tuple[bytes, ...]:
    return (b"smc credential request", id_.encode(), credential.encode(), public_key, requester.encode())
