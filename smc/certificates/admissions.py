"""How a proxy that was revoked is let in again: with a token that was made since, and with what follows from it.

No clock tells what came first, the store's revisions do. A revocation refuses every credential of its proxy but those
in the record of admissions, which the leader writes in the transaction in which it answers. So what was signed
before stays refused, whatever the clocks of those say who have signed it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509 as cx509

from cluster.kv import KV, Guard, KeyValue, Operation, Put
from smc.errors import Denied
from smc.model import Name
from smc.records import AdmissionRecord, Keys, UnreadableRecord, decode, encode


def unchanged(key: str, item: KeyValue | None) -> Guard:
    """That what is stored at `key` is what was read."""
    return Guard(key, create_revision=0) if item is None else Guard(key, mod_revision=item.mod_revision)


async def check_token(kv: KV, keys: Keys, credential: str, token: KeyValue) -> Sequence[Guard]:
    """Check that the token was made after the proxy that it is for was revoked; returns what that was decided on.

    Raises:
        Denied: it was made before.
        StoreError: as `KV.get`.
    """
    kind, _, name = credential.partition("/")
    if kind != "proxy":
        return ()
    key = keys.revoked_proxy(Name.parse(name))
    revoked = await kv.get(key)
    if revoked is not None and token.create_revision < revoked.mod_revision:
        raise Denied(f"{name} was revoked after this token was made", hint="ask for a new token")
    return (unchanged(key, revoked),)


async def check_credential(kv: KV, keys: Keys, proxy: Name, serial: str) -> Sequence[Guard]:
    """Check that a proxy's credential was not revoked; returns what that was decided on.

    Raises:
        Denied: it was.
        StoreError: as `KV.get`.
    """
    key = keys.revoked_proxy(proxy)
    revoked = await kv.get(key)
    if revoked is not None and serial not in {one for one, _ in await admitted(kv, keys, proxy, revoked)}:
        raise Denied(f"the credential of {proxy} is revoked", hint="ask for a new token: smc token create")
    return (unchanged(key, revoked),)


async def admit(
    kv: KV, keys: Keys, proxy: Name, revoked: KeyValue, leaf: cx509.Certificate, now: float
) -> tuple[Operation, Guard]:
    """What lets a proxy in with one more credential: to be written together with the credential.

    Raises:
        StoreError: as `KV.get`.
    """
    key = keys.admission(proxy)
    there = await kv.get(key)
    before = [one for one in _read(there, proxy, revoked) if one[1] > now]
    after = (*before, (f"{leaf.serial_number:x}", leaf.not_valid_after_utc.timestamp()))
    return Put(key, encode(AdmissionRecord(proxy, revoked.mod_revision, after))), unchanged(key, there)


async def admitted(kv: KV, keys: Keys, proxy: Name, revoked: KeyValue) -> Sequence[tuple[str, float]]:
    """(serial, not_after) of the credentials that were signed for a proxy since it was revoked.

    Raises:
        StoreError: as `KV.get`.
    """
    return _read(await kv.get(keys.admission(proxy)), proxy, revoked)


def _read(item: KeyValue | None, proxy: Name, revoked: KeyValue) -> Sequence[tuple[str, float]]:
    """The credentials of a record; what cannot be read admits nobody."""
    if item is None:
        return ()
    try:
        record = decode(AdmissionRecord, item.value, key=item.key)
    except UnreadableRecord:
        return ()
    return record.credentials if (record.proxy, record.revocation) == (proxy, revoked.mod_revision) else ()
