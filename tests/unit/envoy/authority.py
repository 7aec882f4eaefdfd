"""A certificate authority for tests: real certificates, in memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test root")])
        self._root = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.root = self._root.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, uri: str) -> tuple[str, str]:
        """(chain, key), both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        leaf = self._builder(x509.Name([]), key).add_extension(san, critical=True).sign(self._key, hashes.SHA256())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return leaf.public_bytes(serialization.Encoding.PEM).decode(), private.decode()

    def secrets(self, uri: str) -> dict[str, Any]:
        """What SDS would serve to `uri`, by name."""
        chain, key = self.issue(uri)
        certificate = {"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}
        return {
            "identity": {"tls_certificate": certificate},
            "bundle": {"validation_context": {"trusted_ca": {"inline_string": self.root}}},
        }

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=2))
            .not_valid_after(now + timedelta(hours=1))
        )
