"""The mesh's own keys, as they are read from the store: what opens the sealed values, and what signs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from cryptography import x509 as cx509

from cluster import kv as store
from cluster.kv import KV
from smc.certificates import making, x509
from smc.certificates.sealing import Keyring
from smc.certificates.signers import Signer
from smc.errors import Invalid, NotFound, Unavailable
from smc.records import BundleRecord, DekRecord, EpochRecord, IntermediateRecord, Keys, MeshRecord, RootRecord, decode


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
            serial=making.serial(self.epoch, os.urandom(making.RANDOM_BYTES)),
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


async def load_authority(kv: KV, keys: Keys, keyring: Keyring, signer: Signer) -> Authority:
    """Read the newest intermediate.

    Raises:
        NotFound: there is no such mesh, or it has no intermediate.
        Invalid: its key cannot be opened, or does not belong to its certificate.
        Unavailable: the store or the signer does not answer.
    """
    mesh = await load_mesh(kv, keys)
    with store_errors("the mesh's authority cannot be read"):
        epoch = await kv.get(keys.epoch)
        intermediates = (await kv.list(keys.ca_prefix("intermediates"))).items
    if epoch is None or not intermediates:
        raise NotFound(f"the mesh {keys.mesh_name!r} has no authority", hint="restore the store from a backup")
    newest = intermediates[-1]
    record = decode(IntermediateRecord, newest.value, key=newest.key)
    (certificate,) = x509.load(record.certificate)
    handle = keyring.open(newest.key, record.sealed_key)
    if await signer.public_key(handle) != certificate.public_key():
        raise Invalid(f"the key of intermediate {record.number} does not belong to its certificate")
    number = decode(EpochRecord, epoch.value, key=epoch.key).number
    return Authority(record.number, number, mesh.trust_domain, certificate, signer, handle)


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


async def load_pin(kv: KV, keys: Keys) -> str:
    """SHA-256 of the public key of the root that the newest intermediate leads to, in hexadecimal.

    Raises:
        NotFound: there is no such mesh.
        Unavailable: the store does not answer.
    """
    with store_errors("the mesh's root cannot be read"):
        intermediates = (await kv.list(keys.ca_prefix("intermediates"))).items
        found = None
        if intermediates:
            record = decode(IntermediateRecord, intermediates[-1].value, key=intermediates[-1].key)
            found = await kv.get(keys.ca("roots", record.root))
    if found is None:
        raise NotFound(f"there is no mesh {keys.mesh_name!r} in this store", hint="smc init makes one")
    (certificate,) = x509.load(decode(RootRecord, found.value, key=found.key).certificate)
    return x509.pin(certificate)
