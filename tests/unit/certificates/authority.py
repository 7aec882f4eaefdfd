"""A small authority whose keys are at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from smc.certificates import making, x509
from smc.certificates.credential import Credential

NOW = 1_900_000_000.0
DAY = timedelta(hours=24)


def sign(unsigned: making.ToBeSigned, key: ec.EllipticCurvePrivateKey) -> cx509.Certificate:
    return unsigned.signed(key.sign(unsigned.data, ec.ECDSA(hashes.SHA256())))


def serial() -> int:
    return making.serial(1, os.urandom(making.RANDOM_BYTES))


@dataclass(frozen=True)
class TestAuthority:
    __test__ = False
    trust_domain: str
    root: cx509.Certificate
    intermediate: cx509.Certificate
    key: ec.EllipticCurvePrivateKey
    root_key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, trust_domain: str = "mesh.example", now: float = NOW) -> TestAuthority:
        root_key, key = x509.new_key(), x509.new_key()
        root = sign(making.root(root_key.public_key(), trust_domain, number=1, serial=serial(), now=now), root_key)
        intermediate = sign(
            making.intermediate(key.public_key(), root, trust_domain, number=1, serial=serial(), now=now), root_key
        )
        return cls(trust_domain, root, intermediate, key, root_key)

    def leaf(
        self, path: str, key: x509.PublicKey, *, now: float = NOW, ttl: timedelta = DAY, dns: str = ""
    ) -> cx509.Certificate:
        uri = f"spiffe://{self.trust_domain}/{path}"
        return sign(making.leaf(key, uri, self.intermediate, serial=serial(), now=now, ttl=ttl, dns=dns), self.key)

    def credential(self, path: str, *, now: float = NOW, ttl: timedelta = DAY) -> Credential:
        key = x509.new_key()
        dns = x509.replica_host(self.trust_domain) if path.startswith("replica/") else ""
        leaf = self.leaf(path, key.public_key(), now=now, ttl=ttl, dns=dns)
        return Credential(
            f"spiffe://{self.trust_domain}/{path}",
            x509.pem(leaf, self.intermediate),
            x509.private_pem(key).decode(),
            (x509.pem(self.root),),
        )
