"""The Service Registry: the one place where what a mesh consists of is written.

Operators' manifests are written by any replica, one at a time, each over the version that was just read. What an
informer observed is written by the leader alone, with its fence, as the difference to what is there. Either way a lost
answer is settled by a guard and never by hope: each write names the version that it replaces, so of two attempts at
most one can be applied, however late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import structlog

from cluster import kv as store
from cluster.election import Leadership
from cluster.kv import KV, Ambiguous, Committed, Delete, Guard, KeyValue, Operation, Put
from smc import telemetry
from smc.codec import UnreadableRecord, decode, encode, equal
from smc.errors import Conflict, Invalid, NotFound
from smc.keys import Keys
from smc.manifests import OWN_KINDS, InvalidManifest, noun
from smc.manifests.own import GROUP
from smc.model import Endpoints, Name, Observation, Problem, Service, Workload
from smc.records import ManifestRecord, SyncedRecord

CHUNK_OPERATIONS = 100
"""In one transaction of `replace`; with the fence it stays below what the store allows."""
CHUNK_BYTES = 1024 * 1024
"""Of one transaction of `replace`, and of one record in it."""
MOST_PROBLEMS = 100
"""In one `synced` record."""
LIST_AGAIN = 300.0
"""Seconds after which what the leader remembers of a source is read again: an operator's own hand may have written."""
LEAVING = 20.0
"""Seconds for which a workload still serves what it has left: by then its callers have heard of it, or are stalled."""
ATTEMPTS = 5
"""At one write, when others write the same or the store's answer is lost."""

_WRITTEN, _DELETED = "smc.written", "smc.deleted"
"""Attributes of the span."""

log = structlog.get_logger(__name__)
tracer = telemetry.tracer(__name__)


class Outcome(Enum):
    """What a write of a manifest came to."""

    CREATED = "created"
    CONFIGURED = "configured"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Written:
    outcome: Outcome
    revision: int
    """The mod_revision of the stored manifest; of a dry run that of what it would replace, 0 for nothing."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """What `replace` had to do, in records; `synced` is not counted."""

    written: int = 0
    deleted: int = 0
    unchanged: int = 0


class Registry:
    """Writes below `manifests/`, `registry/` and `leaving/`. Belongs to one event loop.

    Any number may write to one store: what one remembers guards what it writes, so a wrong memory is rejected, and read
    again.
    """

    def __init__(self, kv: KV, keys: Keys) -> None:
        self._kv = kv
        self._keys = keys
        self._remembered: dict[str, _Memory] = {}
        """By source, so that a change costs no reading of what did not change."""

    # ------------------------------------------------------------------------------------------------------ manifests

    async def put_manifest(
        self, record: ManifestRecord, *, expected: int | None, traceparent: str, dry_run: bool
    ) -> Written:
        """Create or replace a manifest; when it returns, the manifest is in the store for good.

        One that says the same as what is stored is left alone, wherever it comes from. What is replaced keeps its
        `created`: the first write decides which of two manifests is the older. `expected` is the mod_revision that it
        must have (0: it must not be there), None for whatever is there.

        Raises:
            Conflict: it is at another version than `expected`; without one, it was changed ATTEMPTS times meanwhile.
            Unavailable, Refused: the store did not take it, and nothing was written.
            Ambiguous: the store's answers were lost, and the manifest may yet be written.
        """
        key = self._keys.manifest(record.id)
        for _ in range(ATTEMPTS):
            found = await self._find(record.id, expected)
            stored = _readable(found)
            if found is not None and stored is not None and says_the_same(stored, record):
                return Written(Outcome.UNCHANGED, found.mod_revision)
            outcome = Outcome.CONFIGURED if found else Outcome.CREATED
            if dry_run:
                return Written(outcome, found.mod_revision if found else 0)
            new = replace(record, created=stored.created) if stored else record
            left = await self._left(record, stored, found, traceparent) if stored and found else []
            revision = await self._write(Put(key, encode(new, traceparent=traceparent)), found, left)
            if revision is not None:
                return Written(outcome, revision)
        raise _contended(record.id)

    async def delete_manifest(self, manifest: str, *, expected: int | None) -> int:
        """Delete `<group>/<kind>/<namespace>/<name>`; returns a revision at which it is gone.

        Raises:
            NotFound: there is none.
            Conflict, Unavailable, Refused, Ambiguous: as `put_manifest`.
        """
        for _ in range(ATTEMPTS):
            found = await self._find(manifest, None)
            if found is None:
                raise NotFound(f"there is no {manifest}")
            _check(manifest, found, expected)
            revision = await self._write(Delete(found.key), found)
            if revision is not None:
                return revision
        raise _contended(manifest)

    async def _find(self, manifest: str, expected: int | None) -> KeyValue | None:
        found = await self._kv.get(self._keys.manifest(manifest))
        _check(manifest, found, expected)
        return found

    async def _left(
        self, record: ManifestRecord, stored: ManifestRecord, found: KeyValue, traceparent: str
    ) -> Sequence[Operation]:
        """What is written beside a manifest that is a Workload, and leaves what it has served."""
        was, now = _workload(stored), _workload(record)
        if was is None or now is None or not _leaves(was, now):
            return []
        key, value = self._keys.leaving(was.name, found.mod_revision), encode(was, traceparent=traceparent)
        return [Put(key, value, await self._kv.grant(LEAVING))]

    async def _write(
        self, operation: Operation, found: KeyValue | None, beside: Sequence[Operation] = ()
    ) -> int | None:
        """Write over what was found and over nothing else; None: it was changed, and nothing was written."""
        guard = Guard(operation.key, mod_revision=_version(found))
        try:
            outcome = await self._kv.transact([operation, *beside], [guard])
        except Ambiguous as e:
            return await self._settle(operation, guard, beside, e)
        return outcome.revision if isinstance(outcome, Committed) else None

    async def _settle(self, operation: Operation, guard: Guard, beside: Sequence[Operation], lost: Ambiguous) -> int:
        """Find out what became of a transaction whose answer was lost, by sending it again.

        If the first one was applied, the guard of the second does not hold and shows what is there; if the second one
        is applied, the guard of the first can never hold again.

        Raises:
            Ambiguous: no answer came, or it was changed since by somebody else.
        """
        for _ in range(ATTEMPTS):
            try:
                outcome = await self._kv.transact([operation, *beside], [guard])
            except Ambiguous:
                continue
            except store.StoreError as e:
                # This attempt wrote nothing; the one before it may have.
                raise lost from e
            if isinstance(outcome, Committed):
                return outcome.revision
            now = outcome.found[operation.key]
            if isinstance(operation, Delete) and now is None:
                return outcome.revision
            if isinstance(operation, Put) and now is not None and now.value == operation.value:
                return now.mod_revision
            break
        raise lost

    # --------------------------------------------------------------------------------------------- what was observed

    async def replace(
        self, leadership: Leadership, source: str, observation: Observation, *, traceparent: str = ""
    ) -> Replaced:
        """Make everything below `registry/<source>/` say exactly what was observed, and `synced` that it does.

        While the observation has something `unknown`, nothing is taken away: no record is deleted, and a service keeps
        the endpoints of workloads that were not observed.

        Only what differs is written, in transactions of CHUNK_OPERATIONS at most: the workloads that are gone first,
        then what is new or changed, then what is gone, `synced` last. A service and its endpoints change at one
        revision. A record above CHUNK_BYTES is left as it is, and becomes a Problem. Cancelled or failed half-way it
        can be repeated; a source that was not whole before is not `synced` until it is.

        No proxy is told that it serves less before its callers can have heard of that. One whose workload goes keeps
        what it has from the moment at which the workload is gone, and so that comes first. For one that leaves services
        and stays, what it was is kept beside what it is for LEAVING seconds, `leaving/…`.

        What is there is listed once in a term, after whatever failed, and when the last listing is older than
        LIST_AGAIN. Otherwise it is what was written last: the leader alone writes here.

        Raises:
            Deposed: another replica leads; nothing more was written.
            Invalid: the observation names something twice.
            Conflict: somebody else writes below `registry/<source>/`.
            Unavailable, Refused, Ambiguous: the store does not take it now.
        """
        with tracer.start_as_current_span("smc.replace", attributes={telemetry.SOURCE: source}) as span:
            # Comparing every record takes a while in a large mesh, and the streams must not wait for it.
            wanted = await asyncio.to_thread(_wanted, self._keys, source, observation)
            memory = self._remembered.setdefault(source, _Memory())
            lost: Ambiguous | None = None
            for _ in range(ATTEMPTS):
                stored = await self._stored(leadership, source, memory)
                difference = await asyncio.to_thread(
                    _difference, self._keys, source, stored, wanted, observation, traceparent
                )
                try:
                    written = await _write_all(leadership, await self._with_left(difference), stored)
                except Ambiguous as e:
                    log.warning(
                        "what was written is unknown and is read again", **{telemetry.SOURCE: source, "error": str(e)}
                    )
                    lost = e
                    continue
                if written is None:
                    continue
                memory.stored = {**difference.stays, **written}
                memory.term = leadership
                span.set_attribute(_WRITTEN, difference.counts.written)
                span.set_attribute(_DELETED, difference.counts.deleted)
                return difference.counts
            raise lost or Conflict(
                f"what {source} observed was changed by somebody else {ATTEMPTS} times while it was written",
                hint=f"only the leader writes below {self._keys.source(source)}",
            )

    async def _with_left(self, difference: _Difference) -> _Difference:
        """With what is written beside the workloads that leave what they have served."""
        if not difference.left:
            return difference
        lease = await self._kv.grant(LEAVING)
        left = {key: replace(put, lease=lease) for key, put in difference.left.items()}
        changes = [(*unit, *(left[o.key] for o in unit if o.key in left)) for unit in difference.changes]
        return replace(difference, changes=tuple(changes))

    async def _stored(self, leadership: Leadership, source: str, memory: _Memory) -> Mapping[str, _Stored]:
        """What a source has in the store, from memory if that can be trusted. Nobody trusts it while it is written."""
        now = asyncio.get_running_loop().time()
        term, memory.term = memory.term, None
        if term is not leadership or now >= memory.until:
            listing = await self._kv.list(self._keys.source(source))
            memory.stored = await asyncio.to_thread(_recognised, listing.items, memory.stored)
            memory.until = now + LIST_AGAIN
        return memory.stored


# ------------------------------------------------------------------------------------------------------------ manifests


def _version(item: KeyValue | None) -> int:
    return item.mod_revision if item else 0


def _check(manifest: str, found: KeyValue | None, expected: int | None) -> None:
    if expected is None or _version(found) == expected:
        return
    if found is None:
        raise Conflict(f"{manifest} does not exist, expected was version {expected}", hint="it was deleted meanwhile")
    wanted = f"version {expected}" if expected else "none"
    raise Conflict(
        f"{manifest} is at version {found.mod_revision}, expected was {wanted}", hint="read it again, then decide"
    )


def _contended(manifest: str) -> Conflict:
    return Conflict(f"{manifest} was changed by others {ATTEMPTS} times while it was written", hint="try again")


def _readable(item: KeyValue | None) -> ManifestRecord | None:
    if item is None:
        return None
    try:
        return decode(ManifestRecord, item.value, key=item.key)
    except UnreadableRecord as e:
        # Writing it anew is what mends it.
        log.warning("a stored manifest cannot be read", key=item.key, error=str(e))
        return None


def _workload(record: ManifestRecord) -> Workload | None:
    if (record.group, record.kind) != (GROUP, "Workload"):
        return None
    try:
        said = noun(record, OWN_KINDS)
    except InvalidManifest:
        return None
    return said if isinstance(said, Workload) else None


def _leaves(was: Workload, now: Workload) -> bool:
    """Whether a workload may not serve any more what it did."""
    return was.ports != now.ports or not set(was.services) <= set(now.services)


def says_the_same(stored: ManifestRecord, record: ManifestRecord) -> bool:
    """Whether the manifest itself is equal, however and wherever it was written down."""
    return (stored.version, stored.object) == (record.version, record.object)


# ---------------------------------------------------------------------------------------------------- what was observed

_Record = Service | Endpoints | Workload
_Unit = tuple[Operation, ...]
"""What changes at one revision."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A value in the store."""

    mod_revision: int
    value: bytes
    record: _Record | None = None
    """What it says; None as long as nobody had to know."""


@dataclass(slots=True)
class _Memory:
    """What a source has in the store, by key, as far as is known here."""

    stored: Mapping[str, _Stored] = field(default_factory=dict)
    term: Leadership | None = None
    """In which it is to be trusted, for its leader wrote it; None: it has to be read again."""
    until: float = 0.0
    """No longer than this, by the loop's clock."""


@dataclass(frozen=True, slots=True)
class _Difference:
    departures: tuple[_Unit, ...]
    """Each list in the order in which it is written."""
    changes: tuple[_Unit, ...]
    deletions: tuple[_Unit, ...]
    synced: tuple[_Unit, ...]
    counts: Replaced
    stays: Mapping[str, _Stored]
    """By key, what is there and is not deleted."""
    records: Mapping[str, _Record]
    """By key, what the changes say."""
    left: Mapping[str, Put]
    """By key of a workload that leaves what it has served: what it was, to be written with a lease."""


def _recognised(items: Iterable[KeyValue], before: Mapping[str, _Stored]) -> Mapping[str, _Stored]:
    """What was listed, by key; a value that was there before says what it said then."""
    found: dict[str, _Stored] = {}
    for item in items:
        known = before.get(item.key)
        record = known.record if known is not None and known.value == item.value else None
        found[item.key] = _Stored(item.mod_revision, item.value, record)
    return found


def _wanted(keys: Keys, source: str, observation: Observation) -> Sequence[Mapping[str, _Record]]:
    """The records by key, in units: workloads one by one, then each service with its endpoints."""
    workloads = [{keys.workload(source, w.name): w} for w in sorted(observation.workloads, key=lambda w: w.name)]
    services: dict[Name, dict[str, _Record]] = {}
    for service in observation.services:
        services.setdefault(service.name, {})[keys.service(source, service.name)] = service
    for endpoints in observation.endpoints:
        services.setdefault(endpoints.service, {})[keys.endpoints(source, endpoints.service)] = endpoints
    units: list[Mapping[str, _Record]] = [*workloads, *(services[name] for name in sorted(services))]
    distinct = len({key for unit in units for key in unit})
    observed = len(observation.workloads) + len(observation.services) + len(observation.endpoints)
    if distinct != observed:
        raise Invalid(
            f"the observation of {source} has {observed} objects under {distinct} names",
            hint="this is a fault of the informer",
        )
    return units


def _difference(
    keys: Keys,
    source: str,
    stored: Mapping[str, _Stored],
    wanted: Sequence[Mapping[str, _Record]],
    observation: Observation,
    traceparent: str,
) -> _Difference:
    synced = keys.synced(source)
    if observation.unknown:
        wanted = _with_what_may_be_there(wanted, stored, frozenset(w.name for w in observation.workloads))
    changes: list[_Unit] = []
    too_large: list[Problem] = []
    unchanged = 0
    stays = dict(stored)
    records: dict[str, _Record] = {}
    left: dict[str, Put] = {}
    for unit in wanted:
        puts: list[Operation] = []
        for key, record in unit.items():
            there = stored.get(key)
            if there is not None and (there.record == record or equal(there.value, record)):
                unchanged += 1
                if there.record is None:
                    stays[key] = replace(there, record=record)
                continue
            put = Put(key, encode(record, traceparent=traceparent))
            if len(put.value) > CHUNK_BYTES:
                too_large.append(_too_large(source, key.removeprefix(keys.source(source)), len(put.value)))
            else:
                puts.append(put)
                records[key] = record
                if there is not None and isinstance(record, Workload):
                    was = _was(there)
                    if was is not None and _leaves(was, record):
                        left[key] = Put(
                            keys.leaving(was.name, there.mod_revision), encode(was, traceparent=traceparent)
                        )
        if puts:
            changes.append(tuple(puts))
    known = {synced}.union(*wanted)
    gone = [] if observation.unknown else [key for key in stored if key not in known]
    for key in gone:
        del stays[key]
    departures, deletions = _deletions(keys, source, gone)
    record_ = SyncedRecord(source, tuple(sorted([*observation.problems, *too_large]))[:MOST_PROBLEMS])
    is_new = synced not in stored or not equal(stored[synced].value, record_)
    return _Difference(
        departures=departures,
        changes=tuple(changes),
        deletions=deletions,
        synced=((Put(synced, encode(record_, traceparent=traceparent)),),) if is_new else (),
        counts=Replaced(sum(map(len, changes)), len(gone), unchanged),
        stays=stays,
        records=records,
        left=left,
    )


def _with_what_may_be_there(
    wanted: Sequence[Mapping[str, _Record]], stored: Mapping[str, _Stored], observed: Collection[Name]
) -> Sequence[Mapping[str, _Record]]:
    """The same, and each service keeps the endpoints that it has of workloads that were not observed."""
    return [
        {
            key: _joined(record, stored[key].value, observed)
            if isinstance(record, Endpoints) and key in stored
            else record
            for key, record in unit.items()
        }
        for unit in wanted
    ]


def _joined(endpoints: Endpoints, stored: bytes, observed: Collection[Name]) -> Endpoints:
    try:
        before = decode(Endpoints, stored)
    except UnreadableRecord:
        return endpoints
    kept = [endpoint for endpoint in before.endpoints if endpoint.workload not in observed]
    return replace(endpoints, endpoints=tuple(sorted([*endpoints.endpoints, *kept])))


def _was(stored: _Stored) -> Workload | None:
    try:
        return decode(Workload, stored.value)
    except UnreadableRecord:
        return None


def _deletions(keys: Keys, source: str, gone: Iterable[str]) -> tuple[tuple[_Unit, ...], tuple[_Unit, ...]]:
    """Of workloads, and of all else, in units of what has one namespace and name."""
    workloads: list[_Unit] = []
    units: dict[tuple[str, ...], list[Operation]] = {}
    for key in sorted(gone):
        if key.startswith(keys.workloads(source)):
            workloads.append((Delete(key),))
        else:
            units.setdefault(tuple(key.rsplit("/", 2)[1:]), []).append(Delete(key))
    return tuple(workloads), tuple(tuple(unit) for unit in units.values())


def _too_large(source: str, what: str, size: int) -> Problem:
    message = (
        f"the record of {what} has {size} bytes, at most {CHUNK_BYTES} can be stored: what was stored of it before "
        "stays in effect; split the service"
    )
    return Problem(f"{source}:{what}", "TooLarge", message)


async def _write_all(
    leadership: Leadership, difference: _Difference, stored: Mapping[str, _Stored]
) -> Mapping[str, _Stored] | None:
    """Write all in this order; returns what is new in the store, by key.

    None: something is not what it was when it was listed or written last.
    """
    written: dict[str, _Stored] = {}
    for chunk in _chunks((*difference.departures, *difference.changes, *difference.deletions, *difference.synced)):
        guards = [Guard(o.key, mod_revision=stored[o.key].mod_revision if o.key in stored else 0) for o in chunk]
        outcome = await leadership.transact(chunk, guards)
        if not isinstance(outcome, Committed):
            return None
        for o in chunk:
            if isinstance(o, Put) and not o.lease:  # what has one goes by itself
                written[o.key] = _Stored(outcome.revision, o.value, difference.records.get(o.key))
    return written


def _chunks(units: Iterable[_Unit]) -> Iterator[Sequence[Operation]]:
    """Pack units into transactions, in order; none is parted."""
    chunk: list[Operation] = []
    size = 0
    for unit in units:
        more = sum(len(o.key) + (len(o.value) if isinstance(o, Put) else 0) for o in unit)
        if chunk and (len(chunk) + len(unit) > CHUNK_OPERATIONS or size + more > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.extend(unit)
        size += more
    if chunk:
        yield chunk
