"""What takes the mesh's own certificates out of the world before they end: the leader, whoever asked for it.

Workloads of one identity share a key. So when one of them is revoked, first the others get another key, and connect
anew with it; then the certificates of the old one are listed, which ends what is left of it: new connections at the
handshake, open ones with their next request. Who does not follow in time is left behind, so that nobody can hold
up a revocation.

All that is known of it is in the store, so the next leader goes on where the last one was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

import structlog

from cluster import kv as store
from cluster.backoff import Backoff
from cluster.kv import KV, Committed, Delete, Guard, KeyValue, Operation, Outcome, Put
from smc.certificates import admissions, making, x509
from smc.certificates.answering import Leadership
from smc.certificates.authority import load_stored
from smc.certificates.rotating import Survey
from smc.certificates.sealing import Keyring
from smc.certificates.signers import Signer
from smc.codec import decode, encode
from smc.errors import SmcError
from smc.keys import Keys
from smc.model import Identity, Name
from smc.records import CertificateRecord, CrlRecord, IntermediateRecord, IssuedCertificate, RevokedCertificate

PATIENCE = 3.0
"""Seconds that all proxies of an identity have to take its new key and to connect with it."""
SETTLE = 1.0
"""Seconds after a proxy has ACKed that it is to connect anew until it has: it dials every endpoint first."""
LOOK_AGAIN = 0.1
"""Seconds between two looks at who is missing."""
IDLE = 60.0
"""Seconds between two looks at whether the lists are still what they should be."""
KEEP_EXPIRED = 3900.0
"""Seconds after its end for which a certificate counts: a handshake alone looks at that, and a server's Envoy ends a
connection an hour after it. Clocks differ, too.
"""
FIRST_RETRY, LAST_RETRY = 0.5, 30.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Revoked:
    """Who is, as the newest Mesh has it."""

    identities: frozenset[Identity] = frozenset()
    """As a whole."""
    since: Mapping[Identity, int] = field(default_factory=dict)
    """Of the identity of a revoked proxy: the revision at which the last of them was."""
    others: Mapping[Identity, frozenset[Name]] = field(default_factory=dict)
    """The proxies that have such an identity now and may."""
    banned: Mapping[Name, Identity] = field(default_factory=dict)
    """The proxies of `identities`."""


# ------------------------------------------------------------------------------------------------------- for everybody


def issued(record: CertificateRecord, revision: int) -> tuple[IssuedCertificate, ...]:
    """The certificate that is stored since `revision`, and before it those that it has replaced.

    Raises:
        Invalid: it cannot be read.
    """
    newest = IssuedCertificate(
        record.serial,
        record.issuer,
        x509.certificate_fingerprint(x509.load(record.chain)[0]),
        record.not_after,
        record.written or revision,
    )
    return (*record.replaced, newest)


def in_use(certificate: IssuedCertificate, now: float) -> bool:
    """Whether somebody may still have a connection that was made with it."""
    return certificate.not_after + KEEP_EXPIRED > now


def outstanding(
    record: CertificateRecord, revision: int, crl: CrlRecord | None, since: int, now: float
) -> tuple[IssuedCertificate, ...]:
    """What of an identity was issued before the revision `since`, may be in use, and is not listed yet.

    `record` is stored since `revision`.
    """
    listed = {one.certificate.serial for one in crl.revoked} if crl is not None else set[str]()
    return tuple(
        one
        for one in issued(record, revision)
        if one.revision < since and in_use(one, now) and one.serial not in listed
    )


# ------------------------------------------------------------------------------------------------------ for the leader


class Lists:
    """Writes `ca/crl` during one term of leadership, and nobody else does.

    `now` is the wall clock, in seconds since 1970.
    """

    def __init__(
        self,
        kv: KV,
        keys: Keys,
        keyring: Keyring,
        signer: Signer,
        leadership: Leadership,
        now: Callable[[], float],
    ) -> None:
        self._kv = kv
        self._keys = keys
        self._keyring = keyring
        self._signer = signer
        self._leadership = leadership
        self._now = now
        self._writing = asyncio.Lock()

    async def cover(self) -> None:
        """Have a list of every intermediate that there is, and on none of them what has long been of no use.

        Raises:
            StoreError, SmcError: as `revoke`.
        """
        await self.revoke(())

    async def revoke(
        self,
        certificates: Iterable[tuple[Identity, IssuedCertificate]],
        operations: Sequence[Operation] = (),
        guards: Sequence[Guard] = (),
    ) -> Outcome | None:
        """List these certificates, and apply the operations in the same transaction; None if there is nothing to do.

        Raises:
            StoreError: as `Leadership.transact`.
            SmcError: the authority cannot be read, or the signer failed.
        """
        async with self._writing:
            item = await self._kv.get(self._keys.crl)
            before = decode(CrlRecord, item.value, key=item.key) if item is not None else None
            after = await self._next(before, certificates)
            writes = list(operations)
            conditions = list(guards)
            if after != before:
                writes.append(Put(self._keys.crl, encode(after)))
                conditions.append(admissions.unchanged(self._keys.crl, item))
            return await self._leadership.transact(writes, conditions) if writes else None

    async def _next(
        self, before: CrlRecord | None, certificates: Iterable[tuple[Identity, IssuedCertificate]]
    ) -> CrlRecord:
        now = self._now()
        stored = await load_stored(self._kv, self._keys)
        revoked = {one.certificate.serial: one for one in before.revoked} if before is not None else {}
        if any(not in_use(one.certificate, now - KEEP_EXPIRED) for one in revoked.values()):
            # Rarely, and then all that can go: each new list is sent to every proxy.
            revoked = {serial: one for serial, one in revoked.items() if in_use(one.certificate, now)}
        for identity, certificate in certificates:
            revoked.setdefault(certificate.serial, RevokedCertificate(identity, certificate, now))
        known = dict(zip(before.issuers, before.lists, strict=True)) if before is not None else {}
        lists: dict[int, str] = {}
        for number in sorted({*known, *stored.intermediates}):
            on_it = {one.certificate.serial for one in revoked.values() if one.certificate.issuer == number}
            if number in known and on_it == x509.listed(known[number]):
                if number in stored.intermediates or x509.list_ends(known[number]) > now:
                    lists[number] = known[number]
            elif number in stored.intermediates:
                one_more = before.number + 1 if before is not None else 1
                ours = [one for one in revoked.values() if one.certificate.issuer == number]
                lists[number] = await self._sign(stored.intermediates[number], ours, one_more)
            # Else whoever shows a certificate of one that is gone is refused, as nobody can list what is revoked of it.
        everything = tuple(sorted(revoked.values()))
        after = CrlRecord(0, tuple(lists), tuple(lists.values()), everything)
        if before is not None and replace(before, number=0) == after:
            return before
        return replace(after, number=before.number + 1 if before is not None else 1)

    async def _sign(self, record: IntermediateRecord, revoked: Sequence[RevokedCertificate], number: int) -> str:
        (issuer,) = x509.load(record.certificate)
        handle = self._keyring.open(self._keys.ca("intermediates", record.number), record.sealed_key)
        unsigned = making.revocation_list(
            issuer, [(int(one.certificate.serial, 16), one.time) for one in revoked], number=number
        )
        return x509.list_pem(unsigned.signed(await self._signer.sign(handle, unsigned.data)), issuer)


Make = Callable[[CertificateRecord, int], Awaitable[CertificateRecord]]
"""Makes the certificate, with a new key, that takes the place of the one that is stored since a revision."""


class Revoking:
    """Carries out revocations during one term of leadership.

    `written` is told of each identity whose record was written here.
    """

    def __init__(
        self,
        kv: KV,
        keys: Keys,
        lists: Lists,
        leadership: Leadership,
        *,
        survey: Survey,
        now: Callable[[], float],
        make: Make,
        written: Callable[[Identity], None],
    ) -> None:
        self._kv = kv
        self._keys = keys
        self._lists = lists
        self._leadership = leadership
        self._survey = survey
        self._now = now
        self._make = make
        self._written = written
        self._revoked = Revoked()
        self._wake = asyncio.Event()

    def want(self, revoked: Revoked) -> None:
        """Hear who is revoked now."""
        self._revoked = revoked
        self._wake.set()

    async def run(self) -> None:
        """Carry out what is asked for, each identity by itself, until cancelled.

        Raises:
            whatever `leadership.transact` raises when this replica is no longer the leader.
        """
        at_work: dict[Identity, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_lists(), name="revoking: lists")
            while True:
                self._wake.clear()
                revoked = self._revoked
                for identity in sorted({*revoked.identities, *revoked.since}):
                    if identity not in at_work:
                        task = at_work[identity] = tasks.create_task(self._carry_out(identity))

                        def ended(_: object, identity: Identity = identity, seen: Revoked = revoked) -> None:
                            del at_work[identity]
                            if self._revoked is not seen:
                                self._wake.set()  # What it may have missed.

                        task.add_done_callback(ended)
                await self._wake.wait()

    async def _keep_lists(self) -> None:
        """Cover every intermediate, as soon as it is there: before that nobody may sign with it."""
        prefix = self._keys.ca_prefix("intermediates")
        retry = Backoff(FIRST_RETRY, LAST_RETRY)
        while True:
            try:
                at = await self._kv.status()
                await self._lists.cover()
                retry.reset()
                with suppress(TimeoutError, store.Compacted):
                    async with asyncio.timeout(IDLE), aclosing(self._kv.watch(prefix, at)) as batches:
                        await anext(batches)
            except (store.Unavailable, store.Ambiguous, store.Refused, SmcError) as e:
                _log.warning("the lists of revoked certificates cannot be kept; trying on", error=str(e))
                await retry.wait()

    async def _carry_out(self, identity: Identity) -> None:
        """Do all that the revocations ask of one identity's key, however long the store or the signer fail."""
        retry = Backoff(FIRST_RETRY, LAST_RETRY)
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            revoked = self._revoked
            try:
                if identity in revoked.identities:
                    done = await self._ban(identity)
                else:
                    done = await self._replace(identity, revoked, deadline)
            except (store.Unavailable, store.Ambiguous, store.Refused, SmcError) as e:
                _log.error("a revocation cannot be carried out yet", identity=str(identity), error=str(e))
                await retry.wait()
            else:
                if done:
                    return

    async def _read(self, identity: Identity) -> tuple[KeyValue, CertificateRecord] | None:
        item = await self._kv.get(self._keys.certificate(identity))
        return (item, decode(CertificateRecord, item.value, key=item.key)) if item is not None else None

    async def _ban(self, identity: Identity) -> bool:
        """List whatever the identity has, and take its record away. False: it was written meanwhile."""
        found = await self._read(identity)
        if found is None:
            return True
        item, record = found
        outcome = await self._lists.revoke(
            [(identity, one) for one in issued(record, item.mod_revision) if in_use(one, self._now())],
            [Delete(item.key)],
            [Guard(item.key, mod_revision=item.mod_revision)],
        )
        if not isinstance(outcome, Committed):
            return False
        self._written(identity)
        _log.info("the certificates of a revoked identity are listed", identity=str(identity))
        return True

    async def _replace(self, identity: Identity, revoked: Revoked, deadline: float) -> bool:
        """Replace the key if a revoked proxy has it, and list its certificates. False: look again."""
        since = revoked.since.get(identity, 0)
        found = await self._read(identity)
        crl = await self._kv.get(self._keys.crl)
        listed = decode(CrlRecord, crl.value, key=crl.key) if crl is not None else None
        if found is None:
            return True
        item, record = found
        if not (old := outstanding(record, item.mod_revision, listed, since, self._now())):
            return True
        known = issued(record, item.mod_revision)
        if known[-1].revision < since:
            return await self._write(item, await self._make(record, item.mod_revision), "another key")
        others = revoked.others.get(identity, frozenset())
        await self._acked(item.mod_revision, others, deadline)
        if not any(one.serial == record.reconnect and one.revision > since for one in known):
            again = replace(record, reconnect=record.serial, written=known[-1].revision)
            return await self._write(item, again, "connections with it")
        await asyncio.sleep(max(0.0, min(SETTLE, deadline - asyncio.get_running_loop().time())) if others else 0.0)
        guards = [Guard(item.key, mod_revision=item.mod_revision)]
        outcome = await self._lists.revoke([(identity, one) for one in old], guards=guards)
        serials = [one.serial for one in old]
        _log.info("certificates of a revoked proxy are listed", identity=str(identity), serials=serials)
        return isinstance(outcome, Committed)

    async def _write(self, item: KeyValue, record: CertificateRecord, what: str) -> bool:
        await self._leadership.transact(
            [Put(item.key, encode(record))], [Guard(item.key, mod_revision=item.mod_revision)]
        )
        self._written(record.identity)
        _log.info("an identity of a revoked proxy gets " + what, identity=str(record.identity), serial=record.serial)
        return False

    async def _acked(self, revision: int, proxies: Collection[Name], deadline: float) -> None:
        """Return once each of these proxies that is connected has ACKed the revision, or at the deadline."""
        loop = asyncio.get_running_loop()
        while proxies:
            missing: Collection[str] = ("?",)
            try:
                async with asyncio.timeout_at(deadline):
                    acks = await self._survey(revision)
            except TimeoutError:
                pass
            except (store.StoreError, SmcError) as e:
                missing = (str(e),)
            else:
                lagging = sorted(str(name) for name in proxies if str(name) in acks.lagging)
                missing = [*lagging, *(f"those of {replica}" for replica in sorted(acks.behind))]
                if not missing:
                    return
            if loop.time() >= deadline:
                _log.warning("a revocation leaves proxies behind that do not follow", missing=list(missing))
                return
            await asyncio.sleep(LOOK_AGAIN)
