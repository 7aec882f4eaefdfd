"""A credential, and how it lies on disk: whoever reads it while it is replaced sees the old or the new, never both.

In the directory `key.pem`, `certificate.pem` and `roots.pem` are links through `..data`, itself a link to a directory
that is never changed. A new credential is a new directory, and one rename turns `..data` to it. Envoy's
`watched_directory` on the credential's directory notices that rename and reads the three anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from smc.certificates import x509
from smc.errors import Invalid, NotFound

KEY, CERTIFICATE, ROOTS = "key.pem", "certificate.pem", "roots.pem"
_DATA = "..data"
READS = 5
"""Attempts to read what is replaced meanwhile: only two replacements during one attempt spoil it."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A key and who it is: a proxy's, an operator's, a viewer's or a replica's."""

    uri: str
    """The SPIFFE ID."""
    chain: str
    """PEM: the leaf, then the intermediate."""
    key: str = field(repr=False)
    """PEM, PKCS#8."""
    roots: tuple[str, ...]
    """PEM: whom it trusts."""

    @property
    def trust_domain(self) -> str:
        return self.uri.split("/")[2]

    @property
    def path(self) -> str:
        """What follows the trust domain: `proxy/<namespace>/<workload>` and the like."""
        return self.uri.split("/", 3)[3]

    @property
    def roots_pem(self) -> str:
        return "".join(self.roots)

    @property
    def issuer(self) -> str:
        """The key id of the intermediate that signed it."""
        return x509.issuer_id(x509.load(self.chain)[0])

    @property
    def pins(self) -> tuple[str, ...]:
        """Of the roots that it trusts, sorted."""
        return tuple(sorted(x509.pin(certificate) for certificate in x509.load(self.roots_pem)))

    @property
    def authority(self) -> str:
        """Equal for all credentials that the same intermediate signed and that trust the same roots."""
        return hashlib.sha256(" ".join((self.issuer, *self.pins)).encode()).hexdigest()

    @property
    def not_after(self) -> float:
        """Seconds since 1970."""
        return x509.load(self.chain)[0].not_valid_after_utc.timestamp()

    @property
    def renew_at(self) -> float:
        """When to ask for the next one, in seconds since 1970."""
        leaf = x509.load(self.chain)[0]
        return x509.renew_at(
            leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp(), f"{leaf.serial_number:x}"
        )

    def chain_with_root(self) -> str:
        """The chain up to the root: what the join port presents, so that a client that knows only a pin finds it.

        Raises:
            Invalid: it leads to none of `roots`.
        """
        chain = x509.load(self.chain)
        root = x509.check_chain(chain, [c for text in self.roots for c in x509.load(text)], 0.0, times=False)
        return x509.pem(*(c for c in chain if c != root), root)

    def check(self, now: float) -> None:
        """Check that key, certificate, name and roots belong together, and that it is valid at `now`.

        Raises:
            Invalid: they do not.
            Expired: no longer, or not yet.
        """
        try:
            key = serialization.load_pem_private_key(self.key.encode(), None)
        except (ValueError, TypeError):
            raise Invalid("the credential's key cannot be read") from None
        x509.check_answer(self.chain, key.public_key(), self.uri, self.roots, now)  # type: ignore[arg-type]


def read(directory: Path) -> Credential:
    """Read what `write` wrote. Nothing is checked but the form: see `Credential.check`.

    Raises:
        NotFound: there is none.
        Invalid: not readable, or others than its owner may read the key.
    """
    for left in reversed(range(READS)):
        try:
            # One directory for all three: between two reads through the links the credential might be replaced.
            data = (directory / _DATA).resolve(strict=True)
            mode = (data / KEY).stat().st_mode
            key, chain, roots = (_read(data / name) for name in (KEY, CERTIFICATE, ROOTS))
            break
        except FileNotFoundError:
            if not left:
                raise NotFound(f"there is no credential in {directory}") from None
        except (OSError, UnicodeDecodeError) as e:
            raise Invalid(f"the credential in {directory} cannot be read: {e}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise Invalid(
            f"the key in {directory} has mode {stat.S_IMODE(mode):04o}: others than its owner may use it",
            hint=f"chmod 600 {data / KEY}; if others may have read it, ask for a new credential",
        )
    return Credential(x509.uri(x509.load(chain)[0]), chain, key, tuple(x509.pem(c) for c in x509.load(roots)))


def write(directory: Path, credential: Credential) -> None:
    """Put a credential into `directory`, made if missing with mode 0700, in place of the one that is there.

    A crash at any moment leaves the old one or the new one, and of several writers at once, in whatever processes, the
    last one counts. As `give_to_owner` says, root leaves it to whom the directory belongs.

    Raises:
        OSError: the directory cannot be written.
    """
    if not directory.exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        give_to_owner(directory, directory.parent)
    with _alone(directory):
        _replace(directory, credential)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Wait for every other writer: each takes away what it does not know, which would be what another has just made."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # A file system of the network may lock no directory.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(directory: Path, credential: Credential) -> None:
    old = _target(directory)
    data = Path(tempfile.mkdtemp(prefix="..", dir=directory))
    give_to_owner(data, directory)
    files = ((KEY, credential.key), (CERTIFICATE, credential.chain), (ROOTS, credential.roots_pem))
    for name, text in files:
        descriptor = os.open(data / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            give_to_owner(descriptor, directory)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    for name, _ in files:
        if not (directory / name).is_symlink():
            _link(directory, name, f"{_DATA}/{name}")
    _link(directory, _DATA, data.name)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for left in directory.glob("..?*"):
        # The one before stays until the next write: a reader may be between two of its files.
        if left.is_dir() and not left.is_symlink() and left not in (data, old):
            shutil.rmtree(left, ignore_errors=True)


def give_to_owner(new: Path | int, directory: Path) -> None:
    """Give what root has made (a path or a descriptor) to whom `directory` belongs; who is not root, cannot."""
    if os.geteuid() == 0:
        owner = directory.stat()
        os.chown(new, owner.st_uid, owner.st_gid)


def _target(directory: Path) -> Path | None:
    try:
        return directory / os.readlink(directory / _DATA)
    except OSError:
        return None


def _link(directory: Path, name: str, target: str) -> None:
    new = directory / f"{name}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(directory / name)


def _read(path: Path) -> str:
    with path.open() as file:
        return file.read(x509.MAX_CHAIN)
