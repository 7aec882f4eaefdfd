"""How a mesh begins: one transaction that writes all of it, or nothing."""

from __future__ import annotations

import secrets
from datetime import timedelta

from cluster import kv as store
from cluster.kv import KV, Guard, Put, Rejected
from smc.certificates import x509
from smc.certificates.authority import Authority, load_mesh, make_intermediate, make_root, store_errors
from smc.certificates.credential import Credential
from smc.certificates.sealing import Keyring, new_dek
from smc.certificates.signers import Signer
from smc.codec import encode
from smc.errors import Conflict, NotFound
from smc.keys import Keys
from smc.model import MeshConfig
from smc.records import BundleRecord, DekRecord, EpochRecord, IntermediateRecord, MeshRecord, RootRecord, SigningRecord

DEFAULTS = MeshConfig()


async def initialise(
    kv: KV,
    keys: Keys,
    signer: Signer,
    trust_domain: str,
    now: float,
    *,
    operator: str = "admin",
    ttl: timedelta = DEFAULTS.credential_ttl,
) -> Credential:
    """Make the mesh with its authority, and sign the first operator's credential.

    Nothing is there before the one transaction, and all of it afterwards, so there is nothing to repair after a crash.
    Who lost the credential but can unwrap the data-encryption key asks for another like a replica does.

    Raises:
        Conflict: the mesh exists; it was left as it is.
        Invalid: a name that cannot be.
        Unavailable: the store or the signer does not answer; nothing was written, or `mesh` shows that it was.
    """
    x509.check_trust_domain(trust_domain)
    uri = x509.credential_uri(trust_domain, f"operator/{operator}")
    try:
        existing = await load_mesh(kv, keys)
    except NotFound:
        pass
    else:
        raise _exists(keys, existing.trust_domain)
    with store_errors("the store cannot be read"):
        cluster_id = f"{(await kv.status()).cluster_id:x}"

    mesh = MeshRecord(secrets.token_hex(16), trust_domain, cluster_id)
    epoch = EpochRecord(1)
    dek = new_dek()
    keyring = Keyring(mesh.mesh_id, {1: dek})

    root, root_handle = await make_root(signer, trust_domain, 1, epoch.number, now)
    intermediate, handle = await make_intermediate(signer, root, root_handle, trust_domain, 1, epoch.number, now)
    operator_key = x509.new_key()
    authority = Authority(1, epoch.number, trust_domain, intermediate, signer, handle)
    _, chain = await authority.issue(operator_key.public_key(), uri, now=now, ttl=ttl)

    root_path, intermediate_path = keys.ca("roots", 1), keys.ca("intermediates", 1)
    records = {
        keys.mesh: mesh,
        keys.epoch: epoch,
        keys.ca("dek", 1): DekRecord(1, signer.name, await signer.wrap(dek)),
        root_path: RootRecord(1, x509.pem(root), keyring.seal(root_path, root_handle)),
        intermediate_path: IntermediateRecord(1, 1, x509.pem(intermediate), keyring.seal(intermediate_path, handle)),
        keys.signing: SigningRecord(1),
        keys.bundle: BundleRecord((x509.pem(root),)),
    }
    with store_errors("the mesh cannot be written"):
        try:
            outcome = await kv.transact(
                [Put(path, encode(record)) for path, record in records.items()],
                [Guard(path, create_revision=0) for path in records],
            )
        except store.Ambiguous:
            # Either it was applied or it was not; the random mesh id tells whose it is.
            if (await load_mesh(kv, keys)).mesh_id != mesh.mesh_id:
                raise _exists(keys, trust_domain) from None
            outcome = None
    if isinstance(outcome, Rejected):
        raise _exists(keys, trust_domain)
    return Credential(uri, chain, x509.private_pem(operator_key).decode(), (x509.pem(root),))


def _exists(keys: Keys, trust_domain: str) -> Conflict:
    return Conflict(
        f"the mesh {keys.mesh_name!r} exists already, for the trust domain {trust_domain!r}",
        hint="give another name to make a second mesh beside it",
    )
