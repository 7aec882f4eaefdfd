"""How a credential that was revoked is let in again: with a token that was made since, and with what follows from it.

No clock tells what came first, the store's revisions do. A revocation refuses every credential of that path but those
in the record of admissions, which the leader writes in the transaction in which it answers. So what was signed
before stays refused, whatever the clocks of those say who have signed it.

A replica refuses whom its Mesh refuses, and may hear of a revocation a moment late. So what would outlast that moment
is guarded by what is returned here: another credential, a token, another revocation or the end of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509 as cx509

from cluster.kv import KV, Guard, KeyValue, Operation, Put
from smc.codec import UnreadableRecord, decode, encode
from smc.errors import Denied
from smc.keys import Keys
from smc.model import Name
from smc.records import AdmissionRecord, TokenRecord

MOST_ADMITTED = 100
"""Credentials of one path that count after it was revoked, the newest: who renews has no use for those before, and who
renews in a loop must not fill the store."""


def is_revocable(credential: str) -> bool:
    """Whether a credential can be revoked by its path. A replica's cannot: whoever unwraps the mesh's key is one."""
    return not credential.startswith("replica/")


def unchanged(key: str, item: KeyValue | None) -> Guard:
    """That what is stored at `key` is what was read."""
    return Guard(key, create_revision=0) if item is None else Guard(key, mod_revision=item.mod_revision)


async def check_token(kv: KV, keys: Keys, token: KeyValue, record: TokenRecord) -> Sequence[Guard]:
    """Check that neither whom the token is for nor who made it was revoked since; returns what that was decided on.

    Raises:
        Denied: one of them was.
        StoreError: as `KV.get`.
    """
    guards: list[Guard] = []
    for credential in dict.fromkeys((record.credential, record.author)):
        if not credential:
            continue  # An older version made it, and does not say who asked.
        key = keys.revoked_credential(credential)
        revoked = await kv.get(key)
        if revoked is not None and token.create_revision < revoked.mod_revision:
            raise Denied(f"{credential} was revoked after this token was made", hint="ask for a new token")
        guards.append(unchanged(key, revoked))
    return guards


async def check_credential(kv: KV, keys: Keys, credential: str, serial: str) -> Sequence[Guard]:
    """Check that a revocable credential was not revoked; returns what that was decided on.

    Raises:
        Denied: it was.
        StoreError: as `KV.get`.
    """
    key = keys.revoked_credential(credential)
    revoked = await kv.get(key)
    if revoked is not None and serial not in {one for one, _ in await admitted(kv, keys, credential, revoked)}:
        hint = "ask for a new token: smc token create"
        if not credential.startswith("proxy/"):
            hint = "smc login with a token from another operator; if there is none, smc recover"
        raise Denied(f"the credential of {credential} is revoked", hint=hint)
    return (unchanged(key, revoked),)


async def admit(
    kv: KV, keys: Keys, credential: str, revoked: KeyValue, leaf: cx509.Certificate, now: float
) -> tuple[Operation, Guard]:
    """What lets one more credential of this path in: to be written together with it.

    Raises:
        StoreError: as `KV.get`.
    """
    key = keys.admitted_credential(credential)
    there = await kv.get(key)
    before = [one for one in _read(there, credential, revoked) if one[1] > now]
    after = (*before[1 - MOST_ADMITTED :], (f"{leaf.serial_number:x}", leaf.not_valid_after_utc.timestamp()))
    return Put(key, encode(_record(credential, revoked, after))), unchanged(key, there)


async def admitted(kv: KV, keys: Keys, credential: str, revoked: KeyValue) -> Sequence[tuple[str, float]]:
    """(serial, not_after) of the credentials of this path that were signed since it was revoked.

    Raises:
        StoreError: as `KV.get`.
    """
    return _read(await kv.get(keys.admitted_credential(credential)), credential, revoked)


def _record(credential: str, revoked: KeyValue, credentials: tuple[tuple[str, float], ...]) -> AdmissionRecord:
    kind, _, name = credential.partition("/")
    if kind == "proxy":
        return AdmissionRecord(Name.parse(name), revoked.mod_revision, credentials)
    return AdmissionRecord(None, revoked.mod_revision, credentials, credential)


def _read(item: KeyValue | None, credential: str, revoked: KeyValue) -> tuple[tuple[str, float], ...]:
    """The credentials of a record; what cannot be read admits nobody."""
    if item is None:
        return ()
    try:
        record = decode(AdmissionRecord, item.value, key=item.key)
    except UnreadableRecord:
        return ()
    return record.credentials if record == _record(credential, revoked, record.credentials) else ()
