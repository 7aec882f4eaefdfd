"""What can be plugged in, as literal tables: to add one is a new file, and a line here.

Each is imported only when it is used, so nobody needs the libraries of what he has not configured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smc.config import Settings
from smc.errors import Invalid

if TYPE_CHECKING:
    from cluster.kv import KV
    from smc.certificates.signers import Signer
    from smc.informers import Informer
    from smc.manifests import Kind, PolicyApi


def store(settings: Settings) -> KV:
    """The replicated store.

    Raises:
        Invalid: a TLS file cannot be read.
    """
    from cluster.etcd import EtcdKV, EtcdTLS
    from smc.keys import Keys

    tls = None
    if settings.etcd_ca is not None:
        tls = EtcdTLS(
            _pem(settings.etcd_ca),
            _pem(settings.etcd_certificate) if settings.etcd_certificate else None,
            _pem(settings.etcd_key) if settings.etcd_key else None,
        )
    # What this client may read, should etcd's access control end at the mesh's prefix.
    return EtcdKV(settings.etcd, tls=tls, probe=Keys(settings.mesh).epoch)


def signer(settings: Settings) -> Signer:
    """Who holds the mesh's keys.

    Raises:
        NotFound, Invalid: its key-encryption key is not there, or cannot be used.
    """
    from smc.certificates.signers.local import LocalSigner

    return LocalSigner.open(settings.kek_file)


def _files(settings: Settings) -> Informer | None:
    if settings.files is None:
        return None
    from smc.informers.files import FilesInformer

    return FilesInformer(settings.files)


INFORMERS: Mapping[str, Callable[[Settings], Informer | None]] = {"files": _files}
"""By the name of the source; None when the settings do not ask for it."""


def informers(settings: Settings) -> Sequence[Informer]:
    """Those that the settings ask for."""
    return [found for make in INFORMERS.values() if (found := make(settings)) is not None]


def policies() -> Sequence[PolicyApi]:
    """The APIs that policy may be written in."""
    from smc import smi

    return [smi.API]


def kinds() -> Sequence[Kind]:
    """Every kind of manifest that is taken: our own, and those of each policy API."""
    from smc import smi
    from smc.manifests import OWN_KINDS

    return [*OWN_KINDS, *smi.KINDS]


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise Invalid(f"{path} cannot be read: {e.strerror}", hint="correct the path of etcd's TLS files") from None
