"""The mesh's own keys, as they are read from the store: what opens the sealed values, and what signs."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, TypeVar

import structlog
from cryptography import x509 as cx509

from cluster import kv as store
from cluster.backoff import Backoff
from cluster.kv import KV, Status
from smc.certificates import making, x509
from smc.certificates.sealing import Keyring
from smc.certificates.signers import Signer
from smc.codec import decode
from smc.errors import Invalid, NotFound, SmcError, Unavailable
from smc.keys import Keys
from smc.records import (
    BundleRecord,
    CrlRecord,
    DekRecord,
    EpochRecord,
    IntermediateRecord,
    MeshRecord,
    RootRecord,
    RotationRecord,
    SigningRecord,
)

T = TypeVar("T")
log = structlog.get_logger(__name__)


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Say the store's errors in the words of SMC: `what` is what could not be done."""
    try:
        yield
    except store.Refused as e:
        raise Invalid(f"{what}: the store refuses: {e}") from e
    except store.StoreError as e:
        raise Unavailable(f"{what}: {e}", hint="try again") from e


@dataclass(frozen=True, slots=True)
class Authority:
    """An intermediate that signs, wherever its key is."""

    number: int
    epoch: int
    trust_domain: str
    certificate: cx509.Certificate
    signer: Signer
    handle: bytes = field(repr=False)

    async def issue(
        self, key: x509.PublicKey, uri: str, *, now: float, ttl: timedelta
    ) -> tuple[cx509.Certificate, str]:
        """Sign a leaf for `uri`; returns it, and the chain in PEM: the leaf, then the intermediate.

        A replica's gets the DNS name of replicas; nobody else's gets any.

        Raises:
            Expired: the intermediate is.
            Unavailable, Invalid: the signer failed.
        """
        is_replica = uri.startswith(f"spiffe://{self.trust_domain}/replica/")
        unsigned = making.leaf(
            key,
            uri,
            self.certificate,
            serial=_serial(self.epoch),
            now=now,
            ttl=ttl,
            dns=x509.replica_host(self.trust_domain) if is_replica else "",
        )
        leaf = await sign(unsigned, self.signer, self.handle, self.certificate)
        return leaf, x509.pem(leaf, self.certificate)


async def sign(
    unsigned: making.ToBeSigned, signer: Signer, handle: bytes, issuer: cx509.Certificate | None
) -> cx509.Certificate:
    """Let the signer sign, and check that it did; `issuer=None` for a root, which issues itself.

    Raises:
        Unavailable, Invalid: the signer failed, or its key is not the issuer's.
    """
    certificate = unsigned.signed(await signer.sign(handle, unsigned.data))
    x509.check_chain((certificate,), (issuer or certificate,), 0.0, times=False)
    return certificate


async def make_root(
    signer: Signer, trust_domain: str, number: int, epoch: int, now: float
) -> tuple[cx509.Certificate, bytes]:
    """A new root and its handle, nowhere stored yet.

    Raises:
        Unavailable, Invalid: the signer failed.
    """
    handle = await signer.new_key()
    unsigned = making.root(await signer.public_key(handle), trust_domain, number=number, serial=_serial(epoch), now=now)
    return await sign(unsigned, signer, handle, None), handle


async def make_intermediate(
    signer: Signer, root: cx509.Certificate, root_handle: bytes, trust_domain: str, number: int, epoch: int, now: float
) -> tuple[cx509.Certificate, bytes]:
    """A new intermediate below `root`, and its handle, nowhere stored yet.

    Raises:
        Expired: the root is.
        Unavailable, Invalid: the signer failed.
    """
    handle = await signer.new_key()
    unsigned = making.intermediate(
        await signer.public_key(handle), root, trust_domain, number=number, serial=_serial(epoch), now=now
    )
    return await sign(unsigned, signer, root_handle, root), handle


def _serial(epoch: int) -> int:
    return making.serial(epoch, os.urandom(making.RANDOM_BYTES))


async def load_keyring(kv: KV, keys: Keys, signer: Signer) -> Keyring:
    """Read the mesh's data-encryption keys and have the signer unwrap them.

    Raises:
        NotFound: there is no such mesh.
        Invalid: another signer wrapped them, or another key-encryption key.
        Unavailable: the store or the signer does not answer.
    """
    mesh = await load_mesh(kv, keys)
    with store_errors("the mesh's data-encryption keys cannot be read"):
        listing = await kv.list(keys.ca_prefix("dek"))
    deks: dict[int, bytes] = {}
    for item in listing.items:
        record = decode(DekRecord, item.value, key=item.key)
        if record.signer != signer.name:
            raise Invalid(
                f"the mesh's data-encryption key {record.number} was wrapped by the signer {record.signer!r}, "
                f"and this replica has {signer.name!r}",
                hint="configure the signer that the mesh was made with",
            )
        deks[record.number] = await signer.unwrap(record.wrapped)
    return Keyring(mesh.mesh_id, deks)


async def load_mesh(kv: KV, keys: Keys) -> MeshRecord:
    """Read the record that `smc init` wrote.

    Raises:
        NotFound: there is no such mesh.
        Unavailable: the store does not answer.
    """
    with store_errors("the mesh cannot be read"):
        item = await kv.get(keys.mesh)
    if item is None:
        raise NotFound(f"there is no mesh {keys.mesh_name!r} in this store", hint="smc init makes one")
    return decode(MeshRecord, item.value, key=item.key)


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store has of the mesh's authorities, all at one revision."""

    at: Status
    roots: Mapping[int, RootRecord]
    intermediates: Mapping[int, IntermediateRecord]
    signing: int
    """The number of the intermediate that signs."""
    bundle: BundleRecord
    bundle_revision: int
    crl: CrlRecord | None
    crl_revision: int
    """0: there is none."""
    rotation: RotationRecord | None
    rotation_revision: int
    """0: there is none."""

    def root_of(self, intermediate: int) -> RootRecord:
        return self.roots[self.intermediates[intermediate].root]


async def load_stored(kv: KV, keys: Keys) -> Stored:
    """Read them.

    Raises:
        NotFound: there is no such mesh, or something of its authority is gone.
        Unavailable: the store does not answer.
    """
    with store_errors("the mesh's authority cannot be read"):
        listing = await kv.list(keys.authorities)
    found = {item.key: item for item in listing.items}

    def numbered(what: Literal["roots", "intermediates"], kind: type[T]) -> dict[int, T]:
        prefix = keys.ca_prefix(what)
        return {
            int(key.removeprefix(prefix)): decode(kind, item.value, key=key)
            for key, item in found.items()
            if key.startswith(prefix)
        }

    bundle, signing = found.get(keys.bundle), found.get(keys.signing)
    crl, rotation = found.get(keys.crl), found.get(keys.rotation)
    roots, intermediates = numbered("roots", RootRecord), numbered("intermediates", IntermediateRecord)
    signs = decode(SigningRecord, signing.value, key=signing.key).intermediate if signing is not None else 0
    if bundle is None or signs not in intermediates or intermediates[signs].root not in roots:
        raise NotFound(f"the mesh {keys.mesh_name!r} has no authority", hint="restore the store from a backup")
    return Stored(
        Status(listing.cluster_id, listing.revision),
        roots,
        intermediates,
        signs,
        decode(BundleRecord, bundle.value, key=bundle.key),
        bundle.mod_revision,
        decode(CrlRecord, crl.value, key=crl.key) if crl is not None else None,
        crl.mod_revision if crl is not None else 0,
        decode(RotationRecord, rotation.value, key=rotation.key) if rotation is not None else None,
        rotation.mod_revision if rotation is not None else 0,
    )


async def load_epoch(kv: KV, keys: Keys) -> int:
    """Read the epoch that serial numbers begin with.

    Raises:
        NotFound: there is none.
        Unavailable: the store does not answer.
    """
    with store_errors("the mesh's epoch cannot be read"):
        item = await kv.get(keys.epoch)
    if item is None:
        raise NotFound(f"the mesh {keys.mesh_name!r} has no epoch", hint="restore the store from a backup")
    return decode(EpochRecord, item.value, key=item.key).number


async def load_authority(kv: KV, keys: Keys, keyring: Keyring, signer: Signer) -> Authority:
    """Read the intermediate that signs.

    Raises:
        NotFound: there is no such mesh, or it has no intermediate.
        Invalid: its key cannot be opened, or does not belong to its certificate.
        Unavailable: the store or the signer does not answer.
    """
    mesh = await load_mesh(kv, keys)
    epoch = await load_epoch(kv, keys)
    stored = await load_stored(kv, keys)
    record = stored.intermediates[stored.signing]
    (certificate,) = x509.load(record.certificate)
    handle = keyring.open(keys.ca("intermediates", record.number), record.sealed_key)
    if await signer.public_key(handle) != certificate.public_key():
        raise Invalid(f"the key of intermediate {record.number} does not belong to its certificate")
    return Authority(record.number, epoch, mesh.trust_domain, certificate, signer, handle)


async def load_roots(kv: KV, keys: Keys) -> tuple[str, ...]:
    """The roots that everybody trusts now, in PEM.

    Raises:
        NotFound: there is no such mesh.
        Unavailable: the store does not answer.
    """
    with store_errors("the mesh's roots cannot be read"):
        item = await kv.get(keys.bundle)
    if item is None:
        raise NotFound(f"there is no mesh {keys.mesh_name!r} in this store", hint="smc init makes one")
    return decode(BundleRecord, item.value, key=item.key).roots


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom everybody trusts, and who signs."""

    roots: tuple[str, ...]
    """PEM."""
    signer: str
    """The key id of the intermediate that signs."""
    issuers: frozenset[str]
    """The key ids of all intermediates that there are."""


def trust(stored: Stored) -> Trust:
    """What `stored` comes to for whoever holds a credential."""
    ids = {n: x509.key_id(x509.load(one.certificate)[0]) for n, one in stored.intermediates.items()}
    return Trust(stored.bundle.roots, ids[stored.signing], frozenset(ids.values()))


async def follow_trust(kv: KV, keys: Keys) -> AsyncGenerator[Trust, None]:
    """Yield what is so now, and after each change. Close it with `aclosing`.

    While the store cannot be reached, or has no authority, nothing is yielded: what was trusted is trusted on.
    """
    retry = Backoff()
    last: Trust | None = None
    while True:
        try:
            stored = await load_stored(kv, keys)
            if (newest := trust(stored)) != last:
                last = newest
                yield newest
            async with aclosing(kv.watch(keys.authorities, stored.at)) as batches:
                async for _ in batches:
                    retry.reset()
                    break
            continue
        except (SmcError, store.StoreError) as e:
            log.warning("the mesh's authority is read again", reason=str(e))
        await retry.wait()


async def load_pins(kv: KV, keys: Keys) -> tuple[str, ...]:
    """SHA-256 of the public key of each root that everybody trusts now, in hexadecimal.

    Raises:
        NotFound: there is no such mesh.
        Unavailable: the store does not answer.
    """
    return pins(await load_roots(kv, keys))


def pins(roots: Iterable[str]) -> tuple[str, ...]:
    """The pins of roots in PEM, sorted."""
    return tuple(sorted(x509.pin(certificate) for text in roots for certificate in x509.load(text)))
