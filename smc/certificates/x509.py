"""Names, keys, requests and certificates: how they are written and read, and which of them are believed.

Pure: the time comes from the caller. Of a request one thing is believed, the public key.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from smc.errors import Expired, Invalid

BACKDATE = timedelta(minutes=2)
"""How far the clocks of two machines may be apart: every certificate is valid from this much before it was made."""
JITTER = 0.1
"""A certificate is renewed at half its life, give or take this share of its life."""

MAX_REQUEST = 16 * 1024
"""Bytes of a certificate request; a 4,096-bit RSA key with its signature takes 1,200."""
MAX_RSA_BITS = 8192
MAX_CHAIN = 64 * 1024

CREDENTIAL_KINDS = {"proxy": 2, "operator": 1, "viewer": 1, "replica": 1}
"""How many names follow the kind in the path of a credential's SPIFFE ID."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_TRUST_DOMAIN = re.compile(r"(?=.{1,200}\Z)[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*")

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
"""What a certificate may be for: P-256 or P-384, Ed25519, RSA of 2,048 bits or more."""

PrivateKey = ec.EllipticCurvePrivateKey
"""What is made here: P-256."""

Certificate = x509.Certificate


# --------------------------------------------------------------------------------------------------------------- names


def check_trust_domain(text: str) -> str:
    """Return `text` if it can name a trust domain: lower-case DNS labels.

    Raises:
        Invalid: it cannot.
    """
    if not _TRUST_DOMAIN.fullmatch(text):
        raise Invalid(
            f"{text[:80]!r} is no trust domain",
            hint="use lower-case letters, digits, hyphens and dots, such as mesh.example.com",
        )
    return text


def check_credential(path: str) -> str:
    """Return `path` if it is that of a credential: `proxy/<namespace>/<workload>`, `operator/<name>`, `viewer/<name>`
    or `replica/<name>`.

    Raises:
        Invalid: it is not.
    """
    kind, *names = path[:1024].split("/")
    if CREDENTIAL_KINDS.get(kind) != len(names) or not all(_NAME.fullmatch(name) for name in names):
        raise Invalid(
            f"{path[:80]!r} names no credential",
            hint="use proxy/<namespace>/<workload>, operator/<name>, viewer/<name> or replica/<name>",
        )
    return path


def credential_uri(trust_domain: str, path: str) -> str:
    """The SPIFFE ID of a credential."""
    return f"spiffe://{trust_domain}/{check_credential(path)}"


def replica_host(trust_domain: str) -> str:
    """The DNS name on every replica's certificate, and on no other: gRPC clients verify a host name, never a URI.

    A client sets `grpc.ssl_target_name_override` to it, whatever address it dials.
    """
    return f"replica.{trust_domain}"


# ---------------------------------------------------------------------------------------------------------------- keys


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_private(pem: bytes) -> PrivateKey:
    """Read what `private_pem` wrote.

    Raises:
        Invalid: it is none, or a key of another algorithm.
    """
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Invalid("the private key cannot be read", hint="it must be PKCS#8 in PEM, not encrypted") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Invalid("the private key is of another algorithm", hint="it must be on an elliptic curve")
    return key


def public_der(key: PublicKey) -> bytes:
    """SubjectPublicKeyInfo."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public(der: bytes) -> PublicKey:
    """Read a SubjectPublicKeyInfo and refuse what is too weak to certify.

    Raises:
        Invalid: no key, or not one of `PublicKey`.
    """
    if len(der) > MAX_REQUEST:
        raise Invalid(f"the public key has {len(der)} bytes, more than {MAX_REQUEST}")
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Invalid("the public key cannot be read", hint="send a SubjectPublicKeyInfo in DER") from None
    return _strong(key)


def request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate request, PKCS#10 in DER, that asks for nothing: only its public key will be used."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def requested_key(csr: bytes) -> PublicKey:
    """The public key of a certificate request, once its own signature shows that the sender has the private one.

    Names and extensions that it asks for are not read.

    Raises:
        Invalid: too large, unreadable, not signed by its own key, or a key that is too weak.
    """
    if len(csr) > MAX_REQUEST:
        raise Invalid(f"the certificate request has {len(csr)} bytes, more than {MAX_REQUEST}")
    try:
        parsed = x509.load_der_x509_csr(csr)
        key = parsed.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise Invalid("the certificate request cannot be read", hint="send PKCS#10 in DER") from None
    strong = _strong(key)
    try:
        valid = parsed.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, TypeError):
        valid = False
    if not valid:
        raise Invalid("the certificate request is not signed by its own key")
    return strong


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, in hexadecimal."""
    return hashlib.sha256(public_der(key)).hexdigest()


def _strong(key: object) -> PublicKey:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name in ("secp256r1", "secp384r1"):
            return key
        found = f"an elliptic-curve key on {key.curve.name}"
    elif isinstance(key, rsa.RSAPublicKey):
        if 2048 <= key.key_size <= MAX_RSA_BITS and key.public_numbers().e >= 65537:
            return key
        found = f"an RSA key of {key.key_size} bits with exponent {min(key.public_numbers().e, 2**32)}"
    else:
        found = "a key of another algorithm"
    raise Invalid(
        f"{found} cannot be certified",
        hint=f"use P-256, P-384, Ed25519, or RSA of 2048 to {MAX_RSA_BITS} bits with an exponent of 65537 or more",
    )


# ------------------------------------------------------------------------------------------------------------- reading


def pem(*certificates: x509.Certificate) -> str:
    """The certificates as PEM, in the given order."""
    return "".join(c.public_bytes(serialization.Encoding.PEM).decode() for c in certificates)


def load(text: str) -> tuple[x509.Certificate, ...]:
    """Read one or more certificates in PEM.

    Raises:
        Invalid: none in it, unreadable, or more than `MAX_CHAIN` characters.
    """
    if len(text) > MAX_CHAIN:
        raise Invalid(f"the certificate chain has {len(text)} characters, more than {MAX_CHAIN}")
    try:
        return tuple(x509.load_pem_x509_certificates(text.encode()))
    except (ValueError, x509.InvalidVersion):
        raise Invalid("the certificate cannot be read", hint="it must be PEM") from None


def load_der(encoded: Iterable[bytes]) -> tuple[x509.Certificate, ...]:
    """Read certificates in DER.

    Raises:
        Invalid: one cannot be read.
    """
    try:
        return tuple(x509.load_der_x509_certificate(der) for der in encoded)
    except (ValueError, x509.InvalidVersion):
        raise Invalid("a certificate cannot be read", hint="it must be DER") from None


def uri(certificate: x509.Certificate) -> str:
    """The one URI that a certificate is for.

    Raises:
        Invalid: it carries none, several, or one with a character that no SPIFFE ID has.
    """
    uris = _alternative_names(certificate, x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise Invalid(f"the certificate carries {len(uris)} URIs; exactly one says who it is for")
    if not re.fullmatch(r"spiffe://[a-z0-9.-]+(/[A-Za-z0-9._-]+)+", uris[0]):
        raise Invalid(f"the certificate's URI {uris[0][:80]!r} is no SPIFFE ID")
    return uris[0]


def dns_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names that a certificate is for; only a replica's has one."""
    return _alternative_names(certificate, x509.DNSName)


def issued(not_before: float, not_after: float) -> float:
    """When a certificate was made, in seconds since 1970: it is valid from `BACKDATE` before that."""
    return min(not_before + BACKDATE.total_seconds(), not_after)


def renew_at(not_before: float, not_after: float, seed: str) -> float:
    """When to renew: at half of the life from `issued` to `not_after`, give or take `JITTER`.

    Equal arguments, equal time; `seed` (the serial) spreads certificates that were made together.
    """
    share = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") / 2**64
    made = issued(not_before, not_after)
    return made + (not_after - made) * (0.5 + JITTER * (2 * share - 1))


def check_times(certificate: x509.Certificate, now: float) -> None:
    """Check that `certificate` is valid at `now`, in seconds since 1970.

    Raises:
        Expired: it is no longer, or not yet. The text says which, and what clock to look at.
    """
    moment = datetime.fromtimestamp(now, UTC)
    who = common_name(certificate) or ", ".join(_alternative_names(certificate, x509.UniformResourceIdentifier))
    if moment < certificate.not_valid_before_utc:
        raise Expired(
            f"the certificate of {who[:200]!r} is valid only from "
            f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC, "
            f"and here it is {moment:%Y-%m-%d %H:%M:%S} UTC",
            hint="set the clock: this one is behind",
        )
    if moment > certificate.not_valid_after_utc:
        raise Expired(
            f"the certificate of {who[:200]!r} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC, "
            f"and here it is {moment:%Y-%m-%d %H:%M:%S} UTC",
            hint="if that time is wrong, set the clock",
        )


def check_chain(
    chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: float, *, times: bool = True
) -> x509.Certificate:
    """Check that `chain` (the leaf first, each signed by the next) leads to one of `roots`; returns that root.

    TLS libraries check all this again. Here it tells apart the ways in which it can fail, before anything is sent.
    With `times=False` the periods of validity are left to the caller.

    Raises:
        Invalid: it does not lead there, or what signs is no authority.
        Expired: a certificate on the way is not valid at `now`.
    """
    if not 1 <= len(chain) <= 8:
        raise Invalid(f"a chain of {len(chain)} certificates is none of this mesh")
    path = list(chain)
    found = next((r for r in roots if r == path[-1] or _issued(path[-1], r)), None)
    if found is None:
        raise Invalid("the certificate does not lead to a root that is trusted here")
    if found != path[-1]:
        path.append(found)
    for below, (child, parent) in enumerate(itertools.pairwise(path)):
        if not _issued(child, parent):
            raise Invalid("the certificates do not form a chain: one is not signed by the next")
        constraints = _extension(parent, x509.BasicConstraints)
        if constraints is None or not constraints.ca:
            raise Invalid("a certificate in the chain was signed by one that is no authority")
        if constraints.path_length is not None and constraints.path_length < below:
            raise Invalid("the chain is longer than its authority allows")
    if times:
        for certificate in path:
            check_times(certificate, now)
    return found


def check_self_signed(certificate: x509.Certificate) -> None:
    """Check that a root is signed with its own key.

    Raises:
        Invalid: it is not.
    """
    if not _issued(certificate, certificate):
        raise Invalid("the root is not signed with its own key")


def check_answer(
    chain: str, key: PublicKey, expected_uri: str, roots: Sequence[str], now: float
) -> tuple[x509.Certificate, ...]:
    """Check that a signed chain is what was asked for: this key, this URI, and a root of `roots` at its end.

    Raises:
        Invalid, Expired: it is not.
    """
    certificates = load(chain)
    if not hmac.compare_digest(public_der(certificates[0].public_key()), public_der(key)):  # type: ignore[arg-type]
        raise Invalid("the certificate is for another key than the one that was sent")
    if uri(certificates[0]) != expected_uri:
        raise Invalid(f"the certificate is for {uri(certificates[0])!r}, and {expected_uri!r} was asked for")
    check_chain(certificates, [c for text in roots for c in load(text)], now)
    return certificates


def _issued(child: x509.Certificate, parent: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _extension(certificate: x509.Certificate, kind: type[Any]) -> Any:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except ValueError:
        raise Invalid("a certificate has extensions that cannot be read") from None


def _alternative_names(certificate: x509.Certificate, kind: Any) -> tuple[str, ...]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    return tuple(names.get_values_for_type(kind)) if names is not None else ()


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate's DER, in hexadecimal: the `Hash` by which Envoy calls it."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def list_pem(revocations: x509.CertificateRevocationList, issuer: x509.Certificate) -> str:
    """A list of revoked certificates as PEM, once it has proved to be signed by `issuer`.

    Raises:
        Invalid: it is not.
    """
    if not revocations.is_signature_valid(issuer.public_key()):  # type: ignore[arg-type]
        raise Invalid(f"the list of revoked certificates is not signed by {common_name(issuer)!r}")
    return revocations.public_bytes(serialization.Encoding.PEM).decode()


def listed(text: str) -> set[str]:
    """The serials, in hexadecimal, that are on a list of revoked certificates in PEM."""
    return {f"{one.serial_number:x}" for one in x509.load_pem_x509_crl(text.encode())}


def list_ends(text: str) -> float:
    """Until when a list of revoked certificates in PEM is good, in seconds since 1970."""
    ends = x509.load_pem_x509_crl(text.encode()).next_update_utc
    return ends.timestamp() if ends is not None else 0.0


def pin(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate's SubjectPublicKeyInfo, in hexadecimal: what a join token carries of the root.

    Raises:
        Invalid: the key is of a kind that is unknown here, as in what a stranger may present.
    """
    try:
        return hashlib.sha256(public_der(certificate.public_key())).hexdigest()  # type: ignore[arg-type]
    except (ValueError, UnsupportedAlgorithm):
        raise Invalid("a certificate has a key that cannot be read") from None


def key_id(certificate: x509.Certificate) -> str:
    """An authority's own key identifier, in hexadecimal.

    Raises:
        Invalid: it carries none.
    """
    found = _extension(certificate, x509.SubjectKeyIdentifier)
    if found is None:
        raise Invalid("the authority's certificate carries no key identifier")
    return str(found.digest.hex())


def issuer_id(certificate: x509.Certificate) -> str:
    """The `key_id` of who signed a certificate.

    Raises:
        Invalid: it does not say.
    """
    found = _extension(certificate, x509.AuthorityKeyIdentifier)
    if found is None or found.key_identifier is None:
        raise Invalid("the certificate does not say whose key signed it")
    return str(found.key_identifier.hex())


def common_name(certificate: x509.Certificate) -> str:
    """The common name of a certificate's subject; "" if it has none, like every leaf."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""
