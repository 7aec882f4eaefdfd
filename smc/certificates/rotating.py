"""What rotates the mesh's authority: the leader, one fenced transaction from phase to phase, whoever asked for it.

All that is known of a rotation is in the store, so the next leader goes on where the last one was: before a transaction
nothing of it is there, and afterwards all of it. Whether an answer was lost shows when the store is read again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta

import structlog

from cluster import kv as store
from cluster.backoff import Backoff
from cluster.kv import KV, Committed, Delete, Guard, KeyValue, Operation, Put, Status
from smc.certificates import rotation as rules
from smc.certificates import x509
from smc.certificates.answering import Leadership
from smc.certificates.authority import (
    Authority,
    Stored,
    load_authority,
    load_epoch,
    load_mesh,
    load_stored,
    make_intermediate,
    make_root,
    pins,
    store_errors,
)
from smc.certificates.rotation import Found, Holder, Missing
from smc.certificates.sealing import Keyring
from smc.certificates.signers import Signer
from smc.codec import UnreadableRecord, decode, encode
from smc.errors import Conflict, Invalid, SmcError
from smc.keys import Keys
from smc.records import (
    CertificateRecord,
    IntermediateRecord,
    MemberRecord,
    Phase,
    RootRecord,
    Rotates,
    RotationRecord,
    SigningRecord,
    TokenRecord,
    TrustRecord,
)

LOOK_AGAIN = 0.5
"""Seconds between two looks at who is missing."""
IDLE = 3600.0
"""Seconds between two looks at whether something is due: the wall clock may be set."""
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
MOST_NAMED = 100
"""Who was left behind, in the record."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Acks:
    """What the replicas say of their streams, at this moment."""

    connected: frozenset[str]
    """`<namespace>/<workload>` of each proxy that has a stream."""
    lagging: Mapping[str, str] = field(default_factory=dict)
    """Why a proxy has not ACKed what was asked for."""
    behind: Mapping[str, str] = field(default_factory=dict)
    """Why nothing can be said of a replica's proxies."""
    out: frozenset[str] = frozenset()
    """The proxies that are revoked, and so take no part."""
    gone: Callable[[str, int], bool] = lambda _proxy, _revision: False
    """Whether a workload that was there at a revision of the store is known not to be there any more."""


Survey = Callable[[int], Awaitable[Acks]]
"""Who has ACKed everything up to a revision of the store; raises StoreError, or SmcError, when it is not known."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rotation is."""

    rotation: RotationRecord
    missing: tuple[Missing, ...]
    proxies: int
    """That count in this phase."""


# ------------------------------------------------------------------------------------------------------- for everybody


async def look(kv: KV, keys: Keys, survey: Survey, stored: Stored, *, ttl: timedelta, now: float) -> Progress:
    """Find out who is missing from `stored.rotation`, which is there.

    `ttl` is the life of a workload certificate: what a proxy may have got with the last breath of its credential.

    Raises:
        StoreError, SmcError: it is not known.
    """
    rotation = stored.rotation
    if rotation is None:
        raise ValueError("there is no rotation to look at")
    if rotation.phase in (Phase.REQUESTED, Phase.DONE):
        return Progress(rotation, (), 0)
    revision, outdated = max(stored.bundle_revision, stored.crl_revision), 0
    if rotation.phase is Phase.SIGNING:
        certificates = (await kv.list(keys.certificates)).items
        revision = max((item.mod_revision for item in certificates), default=revision)
        outdated = sum(not _is_signed_by(item, rotation.intermediate) for item in certificates)
    acks = await survey(revision)
    (signer,) = x509.load(stored.intermediates[rotation.intermediate].certificate)
    found = Found(
        frozenset(pins(stored.bundle.roots)),
        x509.key_id(signer),
        await _replicas(kv, keys, acks),
        await _proxies(kv, keys, acks, ttl, now),
        await _tokens(kv, keys, rotation.began) if rotation.of is Rotates.ROOT else 0,
        outdated,
        rotation.intermediate in stored.crl.issuers if stored.crl is not None else None,
    )
    counted = [proxy for proxy in found.proxies if proxy.connected or rotation.phase is not Phase.RETIRING]
    return Progress(rotation, rules.missing(rotation, found), len(counted))


def _is_signed_by(item: KeyValue, intermediate: int) -> bool:
    try:
        return decode(CertificateRecord, item.value, key=item.key).issuer == intermediate
    except UnreadableRecord:
        return False


async def _replicas(kv: KV, keys: Keys, acks: Acks) -> list[Holder]:
    found: list[Holder] = []
    for item in (await kv.list(keys.members)).items:
        name = item.key.removeprefix(keys.members)
        try:
            member = decode(MemberRecord, item.value, key=item.key)
        except UnreadableRecord as e:
            found.append(Holder(name, lag=str(e)))
        else:
            found.append(Holder(name, frozenset(member.roots), member.issuer, lag=acks.behind.get(name, "")))
    return found


async def _proxies(kv: KV, keys: Keys, acks: Acks, ttl: timedelta, now: float) -> list[Holder]:
    """Those that are connected, those that have joined lately, and those that were ready once and may still hold a
    certificate that is valid. Without the revoked: what a thief has must not hold up the next root.
    """
    told: dict[str, TrustRecord] = {}
    for item in (await kv.list(keys.trusts)).items:
        try:
            told[item.key.removeprefix(keys.trusts)] = decode(TrustRecord, item.value, key=item.key)
        except UnreadableRecord as e:
            _log.warning("what a proxy trusts cannot be read", key=item.key, reason=str(e))
    ready = {item.key.removeprefix(keys.readiness) for item in (await kv.list(keys.readiness)).items}
    joined = await _joined(kv, keys, acks)
    found: list[Holder] = []
    for name in sorted((ready | joined | acks.connected) - acks.out):
        record, connected = told.get(name), name in acks.connected
        if record is None:
            found.append(Holder(name, connected=connected, lag=acks.lagging.get(name, "")))
        elif connected or now < record.not_after + ttl.total_seconds():
            roots, lag = frozenset(record.roots), acks.lagging.get(name, "")
            found.append(Holder(name, roots, record.issuer, connected, lag))
    return found


async def _joined(kv: KV, keys: Keys, acks: Acks) -> frozenset[str]:
    """The proxies that have used a token lately: they have a credential, and their Envoys may be starting."""
    found = {item.key.removeprefix(keys.joins): item.mod_revision for item in (await kv.list(keys.joins)).items}
    return frozenset(name for name, revision in found.items() if not acks.gone(name, revision))


async def _tokens(kv: KV, keys: Keys, began: int) -> int:
    """Join tokens that nobody has used, and that were made before there was anything new."""
    old = [item for item in (await kv.list(keys.tokens)).items if item.create_revision <= began]
    return sum(not decode(TokenRecord, item.value, key="a token").used_by for item in old)


async def request(kv: KV, keys: Keys, of: Rotates, requester: str, *, force: bool, now: float) -> RotationRecord:
    """Ask the leader for a rotation, or join the one of that kind that is under way; returns it as it is now.

    `force` makes it leave behind whom it misses, from now on.

    Raises:
        Conflict: one of the other kind is under way.
        Invalid: the root's key is not here, so nothing can be signed with it.
        Unavailable, NotFound: the store does not answer, or has no such mesh.
    """
    while True:
        stored = await load_stored(kv, keys)
        running = stored.rotation
        if running is not None and running.phase is not Phase.DONE:
            if running.of is not of:
                raise Conflict(
                    f"a rotation of the {running.of.value} is under way, and is {running.phase.value}",
                    hint=f"wait until it is done: smc cert rotate --{running.of.value} shows it",
                )
            if not force or running.forced:
                return running
            wanted = replace(running, forced=now)
        else:
            if of is Rotates.INTERMEDIATE:
                _root_key(stored)
            wanted = RotationRecord(secrets.token_hex(8), of, requester, since=now, forced=now if force else 0.0)
        with store_errors("the rotation cannot be asked for"):
            outcome = await kv.transact([Put(keys.rotation, encode(wanted))], [_unchanged(keys, stored)])
        if isinstance(outcome, Committed):
            return wanted


def _unchanged(keys: Keys, stored: Stored) -> Guard:
    if stored.rotation is None:
        return Guard(keys.rotation, create_revision=0)
    return Guard(keys.rotation, mod_revision=stored.rotation_revision)


def _root_key(stored: Stored) -> tuple[RootRecord, bytes]:
    """The root that new intermediates are signed with, and its key as it is sealed.

    Raises:
        Invalid: its key is not in the store.
    """
    root = stored.root_of(stored.signing)
    if root.sealed_key is None:
        raise Invalid(
            f"the key of root {root.number} is not in the store, so no intermediate can be signed with it",
            hint="rotate the root: smc cert rotate --root makes one whose key is",
        )
    return root, root.sealed_key


# ------------------------------------------------------------------------------------------------------ for the leader


class Rotations:
    """Rotates during one term of leadership.

    `now` is the wall clock, in seconds since 1970; `ttl` says how long a workload certificate lives. `signing` is who
    signs as far as this term knows, and `switch` is told once it is another one.
    """

    def __init__(
        self,
        kv: KV,
        keys: Keys,
        keyring: Keyring,
        signer: Signer,
        leadership: Leadership,
        *,
        survey: Survey,
        now: Callable[[], float],
        ttl: Callable[[], timedelta],
        signing: Callable[[], Authority],
        switch: Callable[[Authority], None],
    ) -> None:
        self._kv = kv
        self._keys = keys
        self._keyring = keyring
        self._signer = signer
        self._leadership = leadership
        self._survey = survey
        self._now = now
        self._ttl = ttl
        self._signing = signing
        self._switch = switch
        self._told: Progress | None = None

    async def run(self) -> None:
        """Rotate whatever is asked for or due, until cancelled.

        Raises:
            whatever `leadership.transact` raises when this replica is no longer the leader.
        """
        retry = Backoff(FIRST_RETRY, LAST_RETRY)
        while True:
            try:
                stored = await load_stored(self._kv, self._keys)
                wait = await self._step(stored)
            except (store.Unavailable, store.Ambiguous, store.Refused, SmcError) as e:
                _log.warning("the authority cannot be rotated now; trying on", error=str(e))
                await retry.wait()
            else:
                retry.reset()
                if wait:
                    await self._changed(stored.at, wait)

    async def _changed(self, after: Status, seconds: float) -> None:
        """Wait until somebody asks for something, or so long."""
        # Whatever ends the watch, the store is read again.
        with suppress(TimeoutError, store.Unavailable, store.Compacted):
            async with (
                asyncio.timeout(seconds),
                aclosing(self._kv.watch(self._keys.rotation, after)) as batches,
            ):
                async for _ in batches:
                    return

    async def _step(self, stored: Stored) -> float:
        """Do the one thing that comes next, if it can be done; returns the seconds until the next look."""
        if stored.signing != self._signing().number:
            authority = await load_authority(self._kv, self._keys, self._keyring, self._signer)
            self._switch(authority)
            _log.info("another intermediate signs", intermediate=authority.number)
        now, running = self._now(), stored.rotation
        (signing,) = x509.load(stored.intermediates[stored.signing].certificate)
        if running is None or running.phase is Phase.DONE:
            (root,) = x509.load(stored.root_of(stored.signing).certificate)
            if (what := rules.due(root, signing, now)) is None:
                return min(IDLE, max(LOOK_AGAIN, rules.renew_at(signing) - now))
            running = RotationRecord(secrets.token_hex(8), what, "")
        if running.phase in (Phase.REQUESTED, Phase.DONE):
            await self._begin(stored, running)
            return 0.0
        progress = await look(self._kv, self._keys, self._survey, stored, ttl=self._ttl(), now=now)
        self._tell(progress)
        if progress.missing and not running.forced and rules.is_urgent(signing, now):
            _log.warning("the intermediate ends soon: the next one waits for nobody any more", rotation=running.id)
            await self._write(stored, replace(running, forced=now))
            return 0.0
        phase = rules.next_phase(running, progress.missing, now)
        if phase is None:
            return LOOK_AGAIN
        await self._enter(stored, running, phase, progress.missing)
        return 0.0

    async def _begin(self, stored: Stored, asked: RotationRecord) -> None:
        """Make what is new, and have it trusted."""
        now, keys = self._now(), self._keys
        mesh, epoch = await load_mesh(self._kv, keys), await load_epoch(self._kv, keys)
        operations: list[Operation] = []
        if asked.of is Rotates.ROOT:
            number = max(stored.roots) + 1
            root, root_handle = await make_root(self._signer, mesh.trust_domain, number, epoch, now)
            path = keys.ca("roots", number)
            made = RootRecord(number, x509.pem(root), self._keyring.seal(path, root_handle))
            bundle = replace(stored.bundle, roots=(*stored.bundle.roots, made.certificate))
            operations += [Put(path, encode(made)), Put(keys.bundle, encode(bundle))]
        else:
            record, sealed = _root_key(stored)
            number = record.number
            (root,) = x509.load(record.certificate)
            root_handle = self._keyring.open(keys.ca("roots", number), sealed)
        new = max(stored.intermediates) + 1
        intermediate, handle = await make_intermediate(
            self._signer, root, root_handle, mesh.trust_domain, new, epoch, now
        )
        path = keys.ca("intermediates", new)
        operations.append(
            Put(
                path,
                encode(IntermediateRecord(new, number, x509.pem(intermediate), self._keyring.seal(path, handle))),
            )
        )
        began = replace(asked, phase=Phase.PUBLISHING, since=now, intermediate=new, began=stored.at.revision)
        await self._write(stored, began, operations)

    async def _enter(self, stored: Stored, running: RotationRecord, phase: Phase, lacking: Sequence[Missing]) -> None:
        """Begin the next phase, and leave behind who is lacking."""
        operations: list[Operation] = []
        if phase is Phase.SIGNING:
            operations.append(Put(self._keys.signing, encode(SigningRecord(running.intermediate))))
        elif phase is Phase.RETIRING:
            operations += self._retired(stored)
        behind = (*running.left_behind, *(one.who for one in lacking))
        left_behind = tuple(sorted(set(behind)))[:MOST_NAMED]
        await self._write(stored, replace(running, phase=phase, since=self._now(), left_behind=left_behind), operations)

    def _retired(self, stored: Stored) -> Iterator[Operation]:
        """Nothing of the authority stays but who signs, and its root."""
        keys, root = self._keys, stored.root_of(stored.signing)
        if stored.bundle.roots != (root.certificate,):
            yield Put(keys.bundle, encode(replace(stored.bundle, roots=(root.certificate,))))
        yield from (Delete(keys.ca("intermediates", n)) for n in stored.intermediates if n != stored.signing)
        yield from (Delete(keys.ca("roots", n)) for n in stored.roots if n != root.number)

    async def _write(self, stored: Stored, wanted: RotationRecord, operations: Sequence[Operation] = ()) -> None:
        """One transaction: all that a phase begins with. If the store is not as it was read, it is read again."""
        guards = [_unchanged(self._keys, stored), Guard(self._keys.bundle, mod_revision=stored.bundle_revision)]
        outcome = await self._leadership.transact([*operations, Put(self._keys.rotation, encode(wanted))], guards)
        if isinstance(outcome, Committed):
            _log.info(
                "rotation",
                rotation=wanted.id,
                of=wanted.of.value,
                phase=wanted.phase.value,
                requester=wanted.requester,
                left_behind=list(wanted.left_behind),
            )

    def _tell(self, progress: Progress) -> None:
        """Log who is missing, when it has changed."""
        if progress.missing and progress != self._told:
            _log.info(
                "a rotation waits",
                rotation=progress.rotation.id,
                phase=progress.rotation.phase.value,
                missing=[f"{one.who}: {one.why}" for one in progress.missing[:10]],
            )
        self._told = progress
