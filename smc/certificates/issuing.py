"""The Certificate Issuer: what the leader signs, and when.

A certificate is one more record in the store: every replica serves it, also while there is no leader. Every write
carries the leader's fence, so a deposed leader may sign what it likes, and nobody will ever see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import structlog

from cluster import kv as store
from cluster.kv import KV, Delete, Guard, KeyValue, Put, Rejected
from smc.certificates import x509
from smc.certificates.answering import Answers, Leadership
from smc.certificates.authority import Authority, load_authority
from smc.certificates.revoking import Lists, Revoked, Revoking, in_use, issued
from smc.certificates.rotating import Rotations, Survey
from smc.certificates.sealing import Keyring
from smc.certificates.signers import Signer
from smc.codec import decode, encode
from smc.errors import Invalid, SmcError
from smc.keys import Keys
from smc.model import Identity, MeshConfig
from smc.records import CertificateRecord, CrlRecord

BATCH = 32
"""Certificates in one transaction: a new mesh of many identities costs few revisions, and no half of a revision."""
MOST_REPLACED = 160
"""Certificates before the last that a record knows of, so that a BATCH fits into a transaction: more than come together
until they are of no use, if each lives for a minute or longer.
"""
AT_A_TIME = 50
"""Certificates that are looked at before the streams have their turn: to open and check a stored one takes 0.15 ms."""
RETIRE_AFTER = 600.0
"""Seconds after which an identity that no workload has loses its certificate."""
FIRST_RETRY, LAST_RETRY = 1.0, 300.0
"""Seconds between the attempts for one identity: doubled each time."""
DEFAULTS = MeshConfig()
_LOOK_AGAIN = 60.0
"""Seconds: the wall clock may be set, so no wait for it is longer."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the newest Mesh asks of the Issuer."""

    identities: frozenset[Identity]
    """Every identity that a workload has, and that is not revoked."""
    workload_ttl: timedelta
    credential_ttl: timedelta
    revoked: Revoked = field(default_factory=Revoked)


@dataclass(slots=True)
class _Held:
    """What is known of one identity's certificate."""

    mod_revision: int = 0
    """Of its record; 0: there is none."""
    record: CertificateRecord | None = None
    """None: there is none, or one that cannot be used."""
    unwanted_since: float | None = None
    failures: int = 0
    not_until: float = 0.0
    """No attempt before this time."""

    def due(self, ttl: timedelta, issuer: int) -> float:
        """When to sign the next one, in seconds since 1970.

        A shorter `ttl` than it was made with counts at once, and so does another `issuer`: who signs now.
        """
        if self.record is None or self.record.issuer != issuer:
            return self.not_until
        made = x509.issued(self.record.not_before, self.record.not_after)
        end = min(self.record.not_after, made + ttl.total_seconds())
        return max(self.not_until, x509.renew_at(self.record.not_before, end, self.record.serial))


class Issuer:
    """Issues and renews a certificate for every identity, answers requests for credentials, and rotates who signs.

    `now` is the wall clock, in seconds since 1970. `survey` says who has ACKed what: see `rotating`. `issued` hears of
    each certificate that was signed and written: its kind is `workload`, or what a credential's path begins with.
    """

    def __init__(
        self,
        kv: KV,
        keys: Keys,
        keyring: Keyring,
        signer: Signer,
        now: Callable[[], float],
        survey: Survey,
        issued: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._kv = kv
        self._keys = keys
        self._keyring = keyring
        self._signer = signer
        self._now = now
        self._survey = survey
        self._issued = issued

    async def run(self, leadership: Leadership, wanted: AsyncIterable[Wanted]) -> None:
        """Work until cancelled or no longer the leader. Call it again for the next term.

        `wanted` yields what the newest Mesh asks for; until it has yielded once nothing is issued or retired: unknown
        is never none.

        Raises:
            NotFound, Invalid, Unavailable: the authority cannot be read.
            HistoryChanged: the store is another one than before.
            whatever `leadership.transact` raises when this replica is no longer the leader.
        """
        authority = await load_authority(self._kv, self._keys, self._keyring, self._signer)
        lists = Lists(self._kv, self._keys, self._keyring, self._signer, leadership, self._now)
        term = _Term(self._kv, self._keys, self._keyring, authority, lists, leadership, self._now, self._issued)
        revoking = Revoking(
            self._kv,
            self._keys,
            lists,
            leadership,
            survey=self._survey,
            now=self._now,
            make=term.make,
            written=term.forget,
        )
        answers = Answers(
            self._kv,
            self._keys,
            self._keyring,
            lambda: term.authority,
            leadership,
            self._now,
            lambda: term.credential_ttl,
            lambda: term.revoked.banned,
            self._issued,
        )
        rotations = Rotations(
            self._kv,
            self._keys,
            self._keyring,
            self._signer,
            leadership,
            survey=self._survey,
            now=self._now,
            ttl=lambda: term.workload_ttl,
            signing=lambda: term.authority,
            switch=term.switch,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(term.follow(wanted, revoking.want), name="issuer: wanted")
            tasks.create_task(revoking.run(), name="issuer: revocations")
            tasks.create_task(term.keep_certificates(), name="issuer: certificates")
            tasks.create_task(answers.run(), name="issuer: requests")
            tasks.create_task(rotations.run(), name="issuer: rotation")


class _Term:
    """The certificates during one term of leadership."""

    def __init__(
        self,
        kv: KV,
        keys: Keys,
        keyring: Keyring,
        authority: Authority,
        lists: Lists,
        leadership: Leadership,
        now: Callable[[], float],
        issued: Callable[[str], None],
    ) -> None:
        self._kv = kv
        self._keys = keys
        self._keyring = keyring
        self._lists = lists
        self.authority = authority
        self._leadership = leadership
        self._now = now
        self._issued = issued
        self._wanted: Wanted | None = None
        self._wake = asyncio.Event()
        self._held: dict[Identity, _Held] = {}
        self._known = False
        """Whether `_held` is what the store holds."""

    @property
    def credential_ttl(self) -> timedelta:
        return self._wanted.credential_ttl if self._wanted is not None else DEFAULTS.credential_ttl

    @property
    def workload_ttl(self) -> timedelta:
        return self._wanted.workload_ttl if self._wanted is not None else DEFAULTS.workload_certificate_ttl

    @property
    def revoked(self) -> Revoked:
        return self._wanted.revoked if self._wanted is not None else Revoked()

    def forget(self, _identity: Identity) -> None:
        """Somebody else of this term has written a certificate."""
        self._known = False
        self._wake.set()

    def switch(self, authority: Authority) -> None:
        """From now on this one signs, and what another one has signed is to be signed anew."""
        self.authority = authority
        self._wake.set()

    async def follow(self, wanted: AsyncIterable[Wanted], revoked: Callable[[Revoked], None]) -> None:
        """Take in what is wanted, and pass on who is revoked."""
        async for self._wanted in wanted:
            revoked(self._wanted.revoked)
            self._wake.set()

    async def keep_certificates(self) -> None:
        while True:
            self._wake.clear()
            wait = _LOOK_AGAIN
            try:
                if not self._known:
                    self._known = True
                    await self._load()
                if self._wanted is not None:
                    wait = await self._step(self._wanted)
            except (store.Unavailable, store.Ambiguous) as e:
                # What the store holds is unknown now: read it again.
                _log.warning("certificates cannot be kept", error=str(e))
                self._known = False
                wait = FIRST_RETRY
            except _Changed:
                self._known = False
                wait = 0.0
            if wait > 0:
                await self._wait(wait)

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(min(seconds, _LOOK_AGAIN)):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _load(self) -> None:
        """Read what the store holds; what an identity's attempts have come to is kept."""
        listing = await self._kv.list(self._keys.certificates)
        found: dict[Identity, _Held] = {}
        for number, item in enumerate(listing.items):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)
            namespace, _, account = item.key.removeprefix(self._keys.certificates).partition("/")
            identity = Identity(namespace, account)
            found[identity] = _Held(item.mod_revision, self._usable(identity, item))
        for identity, before in self._held.items():
            held = found.setdefault(identity, _Held())
            held.unwanted_since, held.failures, held.not_until = (
                before.unwanted_since,
                before.failures,
                before.not_until,
            )
        self._held = found

    def _usable(self, identity: Identity, item: KeyValue) -> CertificateRecord | None:
        try:
            record = decode(CertificateRecord, item.value, key=item.key)
            self._keyring.open(item.key, record.sealed_key)
            found = x509.uri(x509.load(record.chain)[0])
        except Invalid as e:
            error = str(e)
        else:
            if record.identity == identity and found == identity.uri(self.authority.trust_domain):
                return record
            error = f"it is for {found!r}"
        _log.error("a stored certificate cannot be used and is made anew", identity=str(identity), error=error)
        return None

    async def _step(self, wanted: Wanted) -> float:
        """Do what is due; returns the seconds until something is due again, 0 if it already is."""
        now = self._now()
        for identity in wanted.identities:
            self._held.setdefault(identity, _Held()).unwanted_since = None
        retired: list[Identity] = []
        next_ = now + _LOOK_AGAIN
        for identity, held in self._held.items():
            if identity not in wanted.identities:
                held.unwanted_since = now if held.unwanted_since is None else held.unwanted_since
                if held.unwanted_since + RETIRE_AFTER <= now:
                    retired.append(identity)
                else:
                    next_ = min(next_, held.unwanted_since + RETIRE_AFTER)
        dues: list[tuple[float, Identity]] = []
        for number, identity in enumerate(self._kept(wanted, retired)):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)
            dues.append((self._held[identity].due(wanted.workload_ttl, self.authority.number), identity))
        dues.sort()
        due = [identity for at, identity in dues if at <= now]
        next_ = min([next_, *(at for at, _ in dues[len(due) : len(due) + 1])])
        if retired:
            await self._retire(retired[:BATCH])
        if due:
            await self._issue(due[:BATCH], wanted.workload_ttl)
        if retired or due:
            return 0.0
        # A millisecond more than to the moment itself, so that rounding never wakes it just before.
        return next_ - now + 0.001

    def _kept(self, wanted: Wanted, retired: Sequence[Identity]) -> Sequence[Identity]:
        """Whose certificates are kept good: of all that have one, until it is taken away. A rotation waits for all that
        are stored, and whoever comes back in time must not be given one of an authority that is gone.
        """
        out = {*retired, *wanted.revoked.identities}
        return [
            identity
            for identity, held in self._held.items()
            if identity in wanted.identities or (held.mod_revision and identity not in out)
        ]

    async def _issue(self, identities: Sequence[Identity], ttl: timedelta) -> None:
        made: list[CertificateRecord] = []
        listed: frozenset[Identity] | None = None
        for identity in identities:
            # A local signer never waits for anything, and the streams must not wait for the whole batch.
            await asyncio.sleep(0)
            held = self._held[identity]
            try:
                if held.record is not None:
                    made.append(await self.make(held.record, held.mod_revision))
                else:
                    listed = await self._listed() if listed is None else listed
                    made.append(await self._first(identity, ttl, anew=identity in listed))
            except SmcError as e:
                self._failed(identity, str(e))
        if not made:
            return
        operations = [Put(self._keys.certificate(r.identity), encode(r)) for r in made]
        guards = [self._unchanged(r.identity) for r in made]
        try:
            outcome = await self._leadership.transact(operations, guards)
        except store.Refused as e:
            for record in made:
                self._failed(record.identity, str(e))
            return
        if isinstance(outcome, Rejected):
            raise _Changed
        for record in made:
            # Whatever the ttl, one identity is never signed for in a loop.
            self._held[record.identity] = _Held(outcome.revision, record, not_until=self._now() + FIRST_RETRY)
            self._issued("workload")
            _log.info(
                "certificate issued",
                identity=str(record.identity),
                serial=record.serial,
                issuer=record.issuer,
                not_after=record.not_after,
            )

    async def make(self, before: CertificateRecord, revision: int) -> CertificateRecord:
        """The certificate, with a new key, that takes the place of the one that was written at `revision`.

        Raises:
            Expired, Unavailable, Invalid: as `Authority.issue`.
        """
        now = self._now()
        made = await self._make(before.identity, self.workload_ttl)
        replaced = tuple(one for one in issued(before, revision) if in_use(one, now))
        return replace(made, replaced=replaced[-MOST_REPLACED:], reconnect=before.reconnect)

    async def _first(self, identity: Identity, ttl: timedelta, *, anew: bool) -> CertificateRecord:
        """The certificate of an identity that has none. With `anew` its proxies are to connect anew with it: their old
        connections were made with certificates that are revoked, so nothing that is asked on them is let through.
        """
        made = await self._make(identity, ttl)
        return replace(made, reconnect=made.serial) if anew else made

    async def _listed(self) -> frozenset[Identity]:
        """The identities of which certificates are revoked."""
        item = await self._kv.get(self._keys.crl)
        revoked = decode(CrlRecord, item.value, key=item.key).revoked if item is not None else ()
        return frozenset(one.identity for one in revoked)

    async def _make(self, identity: Identity, ttl: timedelta) -> CertificateRecord:
        key = x509.new_key()
        authority = self.authority
        uri = identity.uri(authority.trust_domain)
        leaf, chain = await authority.issue(key.public_key(), uri, now=self._now(), ttl=ttl)
        return CertificateRecord(
            identity=identity,
            chain=chain,
            sealed_key=self._keyring.seal(self._keys.certificate(identity), x509.private_pem(key)),
            serial=f"{leaf.serial_number:x}",
            not_before=leaf.not_valid_before_utc.timestamp(),
            not_after=leaf.not_valid_after_utc.timestamp(),
            issuer=authority.number,
        )

    async def _retire(self, identities: Sequence[Identity]) -> None:
        """Nobody has them any more, so nobody should show what they had."""
        stored = [identity for identity in identities if self._held[identity].mod_revision]
        if stored:
            now = self._now()
            outcome = await self._lists.revoke(
                [
                    (identity, one)
                    for identity in stored
                    for held in (self._held[identity],)
                    if held.record is not None
                    for one in issued(held.record, held.mod_revision)
                    if in_use(one, now)
                ],
                [Delete(self._keys.certificate(identity)) for identity in stored],
                [self._unchanged(identity) for identity in stored],
            )
            if isinstance(outcome, Rejected):
                raise _Changed
            _log.info("certificates retired", identities=[str(identity) for identity in stored])
        for identity in identities:
            del self._held[identity]

    def _unchanged(self, identity: Identity) -> Guard:
        """A transaction whose answer was lost may be applied late: it must not replace what came after it."""
        revision = self._held[identity].mod_revision
        key = self._keys.certificate(identity)
        return Guard(key, mod_revision=revision) if revision else Guard(key, create_revision=0)

    def _failed(self, identity: Identity, error: str) -> None:
        held = self._held[identity]
        wait = min(FIRST_RETRY * 2**held.failures, LAST_RETRY)
        held.failures = min(held.failures + 1, 16)
        held.not_until = self._now() + wait
        _log.error("a certificate cannot be issued", identity=str(identity), error=error, retry_in=wait)


class _Changed(Exception):
    """A record is not what it was when it was read."""
