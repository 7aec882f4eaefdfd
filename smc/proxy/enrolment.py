"""What the control plane says to a proxy beside its credential, kept on disk: so a restart needs no control plane."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smc.certificates import x509
from smc.certificates.credential import Credential, give_to_owner
from smc.errors import Invalid
from smc.v1 import smc_pb2 as pb

CREDENTIAL = "credential"
"""The credential's directory, below the proxy's: what Envoy watches."""
_FILE = "enrolment.json"
_MAX_ADDRESSES = 256


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The mesh, as far as one proxy has to know it to reach it."""

    proxy: str
    """`<namespace>/<workload>`: Envoy's node id."""
    mesh: str
    trust_domain: str
    mesh_domain: str
    xds_addresses: tuple[str, ...]
    """host:port"""
    api_addresses: tuple[str, ...]
    """host:port"""
    address: str
    """The IP address at which the other proxies reach this one."""
    app_address: str


def accept(answer: pb.Credential, key: x509.PublicKey, private_pem: str, expected: str, now: float) -> Credential:
    """The credential in an answer, once it proved to be for this key.

    `expected` is the SPIFFE ID that it must be for, "" while only the token knows it: then any proxy's.

    Raises:
        Invalid, Expired: it is not, or not valid at `now`.
    """
    found = x509.uri(x509.load(answer.chain)[0])
    if expected and found != expected:
        raise Invalid(f"the control plane answered with a credential for {found!r} instead of {expected!r}")
    roots = tuple(x509.pem(c) for text in answer.roots for c in x509.load(text))
    x509.check_answer(answer.chain, key, found, roots, now)
    credential = Credential(found, answer.chain, private_pem, roots)
    if not credential.path.startswith("proxy/") or credential.trust_domain != answer.trust_domain:
        raise Invalid(f"{found!r} is no proxy's credential", hint="create the token for proxy/<namespace>/<workload>")
    return credential


def from_answer(answer: pb.Credential, credential: Credential) -> Enrolment:
    """What an answer says beside the credential.

    Raises:
        Invalid: it names no control plane.
    """
    if not answer.xds_addresses or not answer.api_addresses:
        raise Invalid("the control plane named no address of its own", hint="is any replica ready?")
    return Enrolment(
        proxy=credential.path.removeprefix("proxy/"),
        mesh=answer.mesh,
        trust_domain=credential.trust_domain,
        mesh_domain=answer.mesh_domain,
        xds_addresses=tuple(answer.xds_addresses[:_MAX_ADDRESSES]),
        api_addresses=tuple(answer.api_addresses[:_MAX_ADDRESSES]),
        address=answer.address,
        app_address=answer.app_address,
    )


def read(directory: Path) -> Enrolment | None:
    """What `write` wrote; None if there is none.

    Raises:
        Invalid: it cannot be read.
    """
    try:
        document = json.loads((directory / _FILE).read_text())
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in document.items()}
        return Enrolment(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OSError) as e:
        raise Invalid(f"{directory / _FILE} cannot be read: {type(e).__name__}", hint="join with a new token") from None


def write(directory: Path, value: Enrolment) -> None:
    """Keep it, in place of the one before."""
    write_file(directory / _FILE, json.dumps(asdict(value), indent=2, sort_keys=True) + "\n")


def write_file(path: Path, text: str) -> None:
    """Write a file with mode 0600 so that readers and crashes see the old or the new one whole.

    As `give_to_owner` says, root leaves it to whom the directory belongs.
    """
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        give_to_owner(file.fileno(), path.parent)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
