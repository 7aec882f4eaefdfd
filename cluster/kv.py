"""What a replicated store must promise: the values, the errors and the one protocol that the rest is written against.

`memory.py` and `etcd.py` implement `KV`; one contract test class runs on both. The words are etcd's: a *revision* is a
number that every transaction which changes something raises by one for the whole store, `create_revision` and
`mod_revision` are the revisions at which a key was made and last written.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

MOST_OPERATIONS = 128
"""In one transaction; so many conditions of guards as well."""

MOST_BYTES = 1_572_864
"""Of one transaction: keys and values, those of guards as well, and OVERHEAD for each operation and guard."""

OVERHEAD = 64
"""Bytes that an operation or a guard may cost beside what it says."""


class StoreError(Exception):
    """Any way in which a store fails to do what it was asked."""


class Unavailable(StoreError):
    """No endpoint answered in time, or the cluster has no quorum. Nothing was written; trying again is safe."""


class Ambiguous(StoreError):
    """A transaction was sent and its answer was lost: it may or may not have been applied, now or later.

    Never retry it blindly: read back, or let a guard decide.
    """


class Refused(StoreError):
    """The store answered, and refused for good: not allowed, too large, out of space. Trying again does not help."""


class Compacted(StoreError):
    """The asked revision is gone. List again, and apply the difference, hidden deletions included."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"history before revision {revision} was compacted")
        self.revision = revision


class HistoryChanged(StoreError):
    """What was read before belongs to another history: nothing remembered may be trusted."""


class RevisionRegressed(HistoryChanged):
    """The store's revision is lower than one already seen: it was restored from a snapshot."""

    def __init__(self, seen: int, found: int) -> None:
        super().__init__(f"the store went back from revision {seen} to {found}: it was restored from a snapshot")
        self.seen = seen
        self.found = found


class ClusterChanged(HistoryChanged):
    """The store answers with another cluster id than before."""

    def __init__(self, seen: int, found: int) -> None:
        super().__init__(f"the store's cluster id changed from {seen:x} to {found:x}")
        self.seen = seen
        self.found = found


class LeaseLost(StoreError):
    """The lease expired or was revoked; every key attached to it is gone."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0
    """The lease that the key dies with; 0 for none."""


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


Operation = Put | Delete


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition on one key that etcd checks inside the transaction. At least one field is set.

    `create_revision=0` means that the key must not exist.
    """

    key: str
    create_revision: int | None = None
    mod_revision: int | None = None
    value: bytes | None = None

    def __post_init__(self) -> None:
        if self.create_revision is None and self.mod_revision is None and self.value is None:
            raise ValueError(f"the guard of {self.key} asks for nothing: give it a revision or a value")

    def holds(self, item: KeyValue | None) -> bool:
        """What etcd would decide, if `item` is what it has under the key."""
        if self.create_revision is not None and self.create_revision != (item.create_revision if item else 0):
            return False
        if self.mod_revision is not None and self.mod_revision != (item.mod_revision if item else 0):
            return False
        return self.value is None or (item is not None and item.value == self.value)


@dataclass(frozen=True, slots=True)
class Committed:
    """The transaction's guards held and its operations were applied, all at `revision`."""

    revision: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A guard did not hold and nothing was written. `found` has each guarded key as it is now (None: absent)."""

    revision: int
    found: Mapping[str, KeyValue | None]


Outcome = Committed | Rejected


@dataclass(frozen=True, slots=True)
class Status:
    """A linearizable read of where the store is."""

    cluster_id: int
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Every key below a prefix, all at one revision, in key order."""

    cluster_id: int
    revision: int
    items: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """How many keys are below a prefix and when the newest of them was written, all at one revision.

    It tells whether a copy is equal without reading it: a copy that has every change up to its own revision c, c not
    greater than `revision`, equals the store at `revision` if and only if it has `count` keys and `mod_revision` <= c.
    (A key put after c and still there has a mod_revision above c. If there is none, what is left after c was never
    touched, so keys can only be missing, and then the counts differ.)
    """

    cluster_id: int
    revision: int
    count: int
    mod_revision: int
    """The greatest below the prefix; 0 when it is empty."""


@dataclass(frozen=True, slots=True)
class Batch:
    """All that one revision changed below the watched prefix: never half a transaction."""

    revision: int
    puts: tuple[KeyValue, ...]
    deletes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class View:
    """The store at a revision, as far as the followed prefixes go.

    `changed` holds the keys put or deleted since the View before it in the same generation; the first View of a
    generation has every key that is there, and every key of the generation before that is not.
    """

    cluster_id: int
    generation: int
    """Raised whenever the history that the Views before it came from turned out to be another one."""
    revision: int
    items: Mapping[str, KeyValue] = field(default_factory=lambda: MappingProxyType({}))
    changed: frozenset[str] = frozenset()


class KV(Protocol):
    """A replicated store. Every call has a deadline of its own and may be cancelled at any point.

    Raises (each call): Unavailable, Refused; `transact` also Ambiguous.
    """

    async def status(self) -> Status:
        """Read the cluster id and the revision linearizably."""
        ...

    async def get(self, key: str) -> KeyValue | None:
        """Read one key linearizably."""
        ...

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        """Read all keys that begin with `prefix` at one revision (0: now, linearizably).

        Raises:
            Compacted: `revision` is no longer kept.
            RevisionRegressed: `revision` is still to come.
        """
        ...

    async def survey(self, prefix: str) -> Survey:
        """Read linearizably what `Survey` says; the answer is small, whatever is below `prefix`."""
        ...

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        """Apply all operations at one revision if every guard holds; at most 128 of both, and 1.5 MiB.

        Deleting a key that is not there is no error. No two operations may name the same key. If nothing changes,
        the revision does not move. Without operations it reads linearizably whether the guards hold.

        Raises:
            Ambiguous: the answer was lost, the fate is unknown.
            LeaseLost: an operation names a lease that does not exist.
        """
        ...

    def watch(self, prefix: str, after: Status) -> AsyncGenerator[Batch, None]:
        """Yield each later revision that touches `prefix`, in order, none twice, none missing, for ever.

        It resumes by itself after a broken connection, a dead endpoint or a lost quorum: the caller sees a pause, and
        Unavailable only once the client is closed.
        Close it with `contextlib.aclosing`. Cancelling is safe.

        Raises:
            Compacted: `after.revision` is no longer kept.
            RevisionRegressed, ClusterChanged: the store is another one than `after` was read from.
        """
        ...

    async def grant(self, ttl: float) -> int:
        """Make a lease that lives `ttl` seconds past its last renewal: rounded up to whole ones, and in etcd to 1.5
        times the longest election, which is two seconds unless it was set.
        """
        ...

    async def renew(self, lease: int) -> float:
        """Renew a lease; returns the granted seconds.

        Raises:
            LeaseLost: it is gone.
        """
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys. A lease that is gone is no error."""
        ...

    async def compact(self, revision: int) -> None:
        """Forget history below `revision`. One that is already forgotten is no error, one to come is Refused."""
        ...

    async def close(self) -> None:
        """Free the connections; every later call raises Unavailable, and so do open watches. Idempotent."""
        ...


def check_transaction(operations: Sequence[Operation], guards: Sequence[Guard]) -> None:
    """Refuse what every store refuses, before anything is sent.

    Raises:
        Refused: too many operations, conditions or bytes, a key twice, or one that is empty.
    """
    conditions = sum(
        condition is not None
        for guard in guards
        for condition in (guard.create_revision, guard.mod_revision, guard.value)
    )
    for what, number in (("operations", len(operations)), ("guards", conditions)):
        if number > MOST_OPERATIONS:
            raise Refused(f"a transaction of {number} {what} is too large: at most {MOST_OPERATIONS}, split it")
    keys = [operation.key for operation in operations]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Refused(f"a transaction names the key {twice} twice: at one revision a key can change once")
    if not all(keys) or not all(guard.key for guard in guards):
        raise Refused("a transaction names an empty key: no key is empty")
    size = sum(_length(o.key) + (len(o.value) if isinstance(o, Put) else 0) + OVERHEAD for o in operations)
    # A guard's key is sent twice: what is there comes back if it does not hold.
    size += sum(2 * _length(guard.key) + len(guard.value or b"") + OVERHEAD for guard in guards)
    if size > MOST_BYTES:
        raise Refused(f"a transaction of {size} bytes is too large: at most {MOST_BYTES}, split it")


def _length(key: str) -> int:
    return len(key.encode(errors="surrogateescape"))
