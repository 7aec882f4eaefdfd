"""The leader's half of a request for a credential: believe it or not, sign, and write the answer with the fence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol
from weakref import WeakValueDictionary

import structlog

from cluster import kv as store
from cluster.kv import KV, Guard, KeyValue, Operation, Outcome, Put, Rejected, Status
from smc.certificates import admissions, requests, x509
from smc.certificates.authority import Authority
from smc.certificates.sealing import Keyring
from smc.codec import decode, encode
from smc.errors import Invalid, SmcError, Unavailable
from smc.keys import Keys
from smc.model import Identity, Name
from smc.records import AnswerRecord, RequestRecord

CONCURRENT = 16
"""Requests that are being answered at one time."""
_FIRST_RETRY = 1.0

_log = structlog.get_logger(__name__)


class Leadership(Protocol):
    """The right to write, as it is granted to the leader."""

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        """As `KV.transact`, with the fence added; raises once this replica is no longer the leader."""
        ...


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers requests during one term of leadership.

    `now` is the wall clock in seconds since 1970; `authority` is who signs now, and `ttl` says how long a credential
    lives that is signed now.
    """

    _kv: KV
    _keys: Keys
    _keyring: Keyring
    _authority: Callable[[], Authority]
    _leadership: Leadership
    _now: Callable[[], float]
    _ttl: Callable[[], timedelta]
    _banned: Callable[[], Mapping[Name, Identity]]
    """The proxies of identities that are revoked."""
    _issued: Callable[[str], None]
    _admitting: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary, init=False)
    """By path of a revoked credential. Each of its admissions replaces the one before: at once all but one would be in
    vain, and who is not even revoked would wait for their next attempts.
    """

    async def run(self) -> None:
        """Answer every request that is there or comes, until cancelled."""
        slots = asyncio.Semaphore(CONCURRENT)
        async with asyncio.TaskGroup() as tasks:

            async def start(item: KeyValue) -> None:
                await slots.acquire()
                tasks.create_task(self._answer(item)).add_done_callback(lambda _: slots.release())

            while True:
                try:
                    answered = {
                        i.key.removeprefix(self._keys.answers) for i in (await self._kv.list(self._keys.answers)).items
                    }
                    listing = await self._kv.list(self._keys.requests)
                    for item in listing.items:
                        if item.key.removeprefix(self._keys.requests) not in answered:
                            await start(item)
                    after = Status(listing.cluster_id, listing.revision)
                    async with aclosing(self._kv.watch(self._keys.requests, after)) as batches:
                        async for batch in batches:
                            for item in batch.puts:
                                await start(item)
                except (store.Unavailable, store.Compacted) as e:
                    _log.warning("requests for credentials cannot be followed", error=str(e))
                await asyncio.sleep(_FIRST_RETRY)

    async def _answer(self, item: KeyValue) -> None:
        """Answer one request, however often the store has to be asked, while its lease lives."""
        id_ = item.key.removeprefix(self._keys.requests)
        log = _log.bind(request=id_)
        if not item.lease:
            log.warning("a request for a credential was ignored", error="it has no lease")
            return
        wait = _FIRST_RETRY
        try:
            async with asyncio.timeout(requests.LEASE):
                while True:
                    try:
                        await self._attempt(id_, item, log)
                        return
                    except (store.Unavailable, store.Ambiguous, SmcError) as e:
                        log.warning("a request for a credential cannot be answered yet", error=str(e), retry_in=wait)
                    await asyncio.sleep(wait)
                    wait *= 2
        except TimeoutError:
            log.warning("a request for a credential ran out of time")
        except store.LeaseLost:
            log.info("a request for a credential ended before it was answered")
        except store.Refused as e:
            log.warning("a request for a credential cannot be answered", error=str(e))

    async def _attempt(self, id_: str, item: KeyValue, log: structlog.typing.FilteringBoundLogger) -> None:
        """Sign, or say why not, and write the answer.

        Raises:
            SmcError: it cannot be signed now.
            StoreError: as `KV.transact`.
        """
        authority = self._authority()
        try:
            request = self._believed(id_, item)
            uri = x509.credential_uri(authority.trust_domain, request.credential)
            key = x509.load_public(request.public_key)
            revoked = await self._revoked(request.credential, item)
        except Invalid as e:
            log.warning("a request for a credential is refused", error=str(e))
            await self._write(id_, item, AnswerRecord(id_, error=str(e)))
            return
        log = log.bind(credential=uri, requester=request.requester)
        path = request.credential
        async with nullcontext() if revoked is None else self._admitting.setdefault(path, asyncio.Lock()):
            leaf, chain = await authority.issue(key, uri, now=self._now(), ttl=self._ttl())
            operations: list[Operation] = []
            guards: list[Guard] = []
            if admissions.is_revocable(path):
                guards.append(admissions.unchanged(self._keys.revoked_credential(path), revoked))
            if revoked is not None:
                admission, guard = await admissions.admit(self._kv, self._keys, path, revoked, leaf, self._now())
                operations.append(admission)
                guards.append(guard)
            if await self._write(id_, item, AnswerRecord(id_, chain), operations, guards):
                self._issued(path.split("/")[0])
                log.info("credential issued", serial=f"{leaf.serial_number:x}")

    async def _write(
        self,
        id_: str,
        item: KeyValue,
        answer: AnswerRecord,
        operations: Sequence[Operation] = (),
        guards: Sequence[Guard] = (),
    ) -> bool:
        """Whether this is the answer: False if there is one already, or nobody waits any more.

        Raises:
            Unavailable: a guard does not hold.
            StoreError: as `KV.transact`.
        """
        open_ = [Guard(item.key, mod_revision=item.mod_revision), Guard(self._keys.answer(id_), create_revision=0)]
        answered = Put(self._keys.answer(id_), encode(answer), item.lease)
        outcome = await self._leadership.transact([answered, *operations], [*open_, *guards])
        if isinstance(outcome, Rejected) and any(not guard.holds(outcome.found[guard.key]) for guard in guards):
            raise Unavailable("who asks was revoked, or let in again, meanwhile")
        return not isinstance(outcome, Rejected)

    async def _revoked(self, credential: str, request: KeyValue) -> KeyValue | None:
        """The revocation since which its holder is let in with what this request asks for; None if there is none.

        Raises:
            Invalid: it was revoked after it was asked for, or is a proxy's whose identity is.
        """
        if not admissions.is_revocable(credential):
            return None
        kind, _, name = credential.partition("/")
        proxy = Name.parse(name) if kind == "proxy" else None
        if proxy is not None and (identity := self._banned().get(proxy)):
            raise Invalid(f"the identity {identity} of {proxy} is revoked")
        revoked = await self._kv.get(self._keys.revoked_credential(credential))
        # Whoever asks on behalf of what is revoked has seen a token, or a credential, that was made since.
        if revoked is not None and request.mod_revision < revoked.mod_revision:
            raise Invalid(f"{credential} was revoked", hint="ask for a new token")
        return revoked

    def _believed(self, id_: str, item: KeyValue) -> RequestRecord:
        request = decode(RequestRecord, item.value, key=item.key)
        if request.id != id_ or not requests.is_proven(self._keyring, request):
            raise Invalid("the request carries no valid proof: no replica of this mesh made it")
        return request
