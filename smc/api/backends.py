"""What the services need of a replica: everything that they do is done by one of these."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from cluster.kv import KV
from smc.certificates.credential import Credential
from smc.certificates.sealing import Keyring
from smc.keys import Keys
from smc.manifests import Kind
from smc.mesh import Mesh
from smc.model import Name
from smc.records import ManifestRecord, MemberRecord, Nack


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """One stream of this replica."""

    name: Name
    identity: str
    """The SPIFFE ID of its workload."""
    connected: float
    """Seconds since 1970."""
    revision: int
    """The Mesh revision that it should have."""
    acked: int
    """The Mesh revision that it has ACKed."""
    state: str
    """"synced", "pending", "stalled" or "nacked"."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """By short type name, such as `Cluster`: what it has ACKed."""
    nacks: tuple[Nack, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    name: str
    leader: bool
    ready: bool
    revision: int
    """Of its Mesh."""
    streams: int
    version: str


class Written(Protocol):
    """What a write came to."""

    @property
    def outcome(self) -> Enum:
        """Its name is one of ApplyResponse.Outcome: CREATED, CONFIGURED or UNCHANGED."""
        ...

    @property
    def revision(self) -> int:
        """The mod_revision of the stored manifest; of a dry run, anything."""
        ...


class Registry(Protocol):
    """The guarded writes of manifests.

    Raises (each call): Conflict, NotFound, and what the store raises.
    """

    async def put_manifest(
        self, record: ManifestRecord, *, expected: int | None, traceparent: str, dry_run: bool
    ) -> Written:
        """Create or replace; `expected` is the mod_revision that it must have, None for whatever is there."""
        ...

    async def delete_manifest(self, manifest: str, *, expected: int | None) -> int:
        """Delete `<group>/<kind>/<namespace>/<name>`; returns the revision of the deletion."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    kv: KV
    keys: Keys
    keyring: Keyring
    registry: Registry
    kinds: Sequence[Kind]
    """The kinds of manifests that are taken."""
    trust_domain: str
    mesh: Callable[[], Mesh | None]
    imagine: Callable[[Mapping[str, bytes | None]], Awaitable[tuple[Mesh, Mesh]]]
    """The Mesh as it is, and as it would be with these values under these keys (None: deleted); raises Unavailable."""
    replica: Callable[[], ReplicaStatus]
    reached: Callable[[], int]
    """Up to which revision of the store this replica's Mesh has everything: that of the Mesh, or a later one that
    changed nothing in it."""
    proxies: Callable[[], Sequence[ProxyStatus]]
    members: Callable[[], Awaitable[Sequence[MemberRecord]]]
    """The replicas that are alive, this one among them; raises a StoreError while they are not known."""
    credential: Callable[[], Credential]
    """This replica's own: what the servers present, and what the other replicas are asked with. The same object until
    it was renewed."""
    unreachable_for: Callable[[], float]
    """For how many seconds the store has not answered; 0 while it does."""
    now: Callable[[], float] = time.time
    """Seconds since 1970."""
