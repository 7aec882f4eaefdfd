"""What a certificate of the mesh looks like: a root, an intermediate, and the leaf that is all that others ever get.

Pure: the time, the randomness and the signature come from the caller. A certificate is made in two steps, so that the
key may live anywhere: `root`, `intermediate` and `leaf` say what is to be signed, and `ToBeSigned.signed` takes the
signature. Every authority's key is P-256 and signs ECDSA with SHA-256. The authority writes the names itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from smc.certificates import x509
from smc.errors import Expired

ROOT_TTL = timedelta(days=3652)
INTERMEDIATE_TTL = timedelta(days=30)
"""The next one takes its place at half of that: see `rotation`."""
RANDOM_BYTES = 12
"""What `serial` takes: 96 bits."""


class _Elsewhere(ec.EllipticCurvePrivateKey):
    """Stands in for a P-256 key that is elsewhere, and returns the signature that was made there."""

    def __init__(self, signature: bytes) -> None:
        self.signature = signature

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        return self.signature

    @property
    def curve(self) -> ec.EllipticCurve:
        return ec.SECP256R1()

    @property
    def key_size(self) -> int:
        return 256

    def public_key(self) -> ec.EllipticCurvePublicKey:
        self._absent()

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        self._absent()

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        self._absent()

    def private_bytes(self, *args: Any, **kwargs: Any) -> bytes:
        self._absent()

    def __copy__(self) -> _Elsewhere:
        return self

    def __deepcopy__(self, memo: Any) -> _Elsewhere:
        return self

    def _absent(self) -> NoReturn:
        raise NotImplementedError("the private key is not here")


@dataclass(frozen=True, slots=True)
class ToBeSigned:
    """A certificate that lacks its signature only."""

    builder: cx509.CertificateBuilder

    @property
    def data(self) -> bytes:
        """The TBSCertificate in DER: what the issuer's key signs, as ECDSA with SHA-256."""
        return self._finish(b"\0").tbs_certificate_bytes

    def signed(self, signature: bytes) -> cx509.Certificate:
        """The certificate with its signature, an ECDSA-Sig-Value in DER over `data`. It is not verified here."""
        return self._finish(signature)

    def _finish(self, signature: bytes) -> cx509.Certificate:
        return self.builder.sign(_Elsewhere(signature), hashes.SHA256())


def serial(epoch: int, randomness: bytes) -> int:
    """A serial number: the epoch's 32 bits, then 96 random ones, so that a restored store cannot use one again.

    Raises:
        ValueError: `epoch` is not in 1..2**32-1, or `randomness` has not `RANDOM_BYTES` bytes.
    """
    if not 0 < epoch < 2**32 or len(randomness) != RANDOM_BYTES:
        raise ValueError(f"a serial needs an epoch of 1 to {2**32 - 1} and {RANDOM_BYTES} random bytes")
    return epoch << 96 | int.from_bytes(randomness, "big")


def root(
    key: ec.EllipticCurvePublicKey,
    trust_domain: str,
    *,
    number: int,
    serial: int,
    now: float,
    ttl: timedelta = ROOT_TTL,
) -> ToBeSigned:
    """A root, to be signed with its own key. `now` is in seconds since 1970."""
    name = _authority_name("root", number, trust_domain)
    builder = _builder(name, name, key, key, serial, *_times(now, ttl, None))
    return ToBeSigned(_as_authority(builder, path_length=1))


def intermediate(
    key: ec.EllipticCurvePublicKey,
    issuer: cx509.Certificate,
    trust_domain: str,
    *,
    number: int,
    serial: int,
    now: float,
    ttl: timedelta = INTERMEDIATE_TTL,
) -> ToBeSigned:
    """An authority for leaves of this trust domain alone, to be signed with the key of the root `issuer`.

    Raises:
        Expired: `issuer` is no longer valid.
    """
    name = _authority_name("intermediate", number, trust_domain)
    builder = _builder(name, issuer.subject, key, issuer.public_key(), serial, *_times(now, ttl, issuer))
    permitted = [cx509.UniformResourceIdentifier(trust_domain), cx509.DNSName(x509.replica_host(trust_domain))]
    builder = builder.add_extension(cx509.NameConstraints(permitted, None), critical=True)
    return ToBeSigned(_as_authority(builder, path_length=0))


def leaf(
    key: x509.PublicKey,
    uri: str,
    issuer: cx509.Certificate,
    *,
    serial: int,
    now: float,
    ttl: timedelta,
    dns: str = "",
) -> ToBeSigned:
    """A certificate for `uri`, for clients and servers, to be signed with the key of the intermediate `issuer`.

    `dns` is `x509.replica_host` for a replica, and empty for everybody else.

    Raises:
        Expired: `issuer` is no longer valid.
    """
    builder = _builder(cx509.Name([]), issuer.subject, key, issuer.public_key(), serial, *_times(now, ttl, issuer))
    names: list[cx509.GeneralName] = [cx509.UniformResourceIdentifier(uri)]
    if dns:
        names.append(cx509.DNSName(dns))
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return ToBeSigned(
        # With an empty subject the alternative name is all there is, and must be critical: RFC 5280, 4.2.1.6.
        builder.add_extension(cx509.SubjectAlternativeName(names), critical=True)
        .add_extension(cx509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(cx509.ExtendedKeyUsage(usages), critical=False)
    )


def _builder(
    subject: cx509.Name,
    issuer: cx509.Name,
    key: Any,
    issuer_key: Any,
    serial: int,
    not_before: datetime,
    not_after: datetime,
) -> cx509.CertificateBuilder:
    return (
        cx509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(cx509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(cx509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _times(now: float, ttl: timedelta, issuer: cx509.Certificate | None) -> tuple[datetime, datetime]:
    made = datetime.fromtimestamp(int(now), UTC)
    not_before, not_after = made - x509.BACKDATE, made + ttl
    if issuer is not None:
        if made >= issuer.not_valid_after_utc:
            raise Expired(
                f"the authority {x509.common_name(issuer)!r} expired at "
                f"{issuer.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC and can sign nothing any more",
                hint="check the clock; the mesh needs a new authority",
            )
        not_before, not_after = (
            max(not_before, issuer.not_valid_before_utc),
            min(not_after, issuer.not_valid_after_utc),
        )
    return not_before, not_after


def _as_authority(builder: cx509.CertificateBuilder, *, path_length: int) -> cx509.CertificateBuilder:
    return builder.add_extension(cx509.BasicConstraints(ca=True, path_length=path_length), critical=True).add_extension(
        _key_usage(authority=True), critical=True
    )


def _key_usage(*, authority: bool) -> cx509.KeyUsage:
    return cx509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_name(role: str, number: int, trust_domain: str) -> cx509.Name:
    # RFC 5280 bounds both attributes at 64 characters.
    return cx509.Name(
        [
            cx509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),
            cx509.NameAttribute(NameOID.COMMON_NAME, f"SMC {role} {number}"),
        ]
    )


@dataclass(frozen=True, slots=True)
class ListToBeSigned:
    """A list of revoked certificates that lacks its signature only."""

    builder: cx509.CertificateRevocationListBuilder

    @property
    def data(self) -> bytes:
        """The TBSCertList in DER: what the issuer's key signs, as ECDSA with SHA-256."""
        return self._finish(b"\0").tbs_certlist_bytes

    def signed(self, signature: bytes) -> cx509.CertificateRevocationList:
        """The list with its signature, an ECDSA-Sig-Value in DER over `data`. It is not verified here."""
        return self._finish(signature)

    def _finish(self, signature: bytes) -> cx509.CertificateRevocationList:
        return self.builder.sign(_Elsewhere(signature), hashes.SHA256())


def revocation_list(issuer: cx509.Certificate, revoked: Iterable[tuple[int, float]], *, number: int) -> ListToBeSigned:
    """The certificates of `issuer` that nobody may take, to be signed with its key.

    `revoked` are (serial, seconds since 1970). It is good for exactly as long as its issuer is: with a list that is not
    valid yet, or no longer, every connection is refused, so no clock and nobody's neglect may make it one.
    """
    builder = (
        cx509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(issuer.not_valid_before_utc)
        .next_update(issuer.not_valid_after_utc)
        .add_extension(cx509.CRLNumber(number), critical=False)
        .add_extension(
            cx509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()),  # type: ignore[arg-type]
            critical=False,
        )
    )
    for serial_number, time in sorted(revoked):
        one = cx509.RevokedCertificateBuilder().serial_number(serial_number)
        builder = builder.add_revoked_certificate(one.revocation_date(datetime.fromtimestamp(int(time), UTC)).build())
    return ListToBeSigned(builder)
