from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes, serialization

from smc.certificates import x509
from smc.errors import Denied, Unauthenticated
from smc.tls import peer_path
from tests.unit.certificates.authority import NOW, TestAuthority

CA = TestAuthority.make()


def path_of(pem: str) -> str:
    return peer_path({"x509_pem_cert": [pem.encode()]}, "mesh.example", NOW)


def leaf(*names: cx509.GeneralName) -> str:
    """A certificate with any names at all; who signed it is for TLS to check."""
    key = x509.new_key()
    name = cx509.Name([cx509.NameAttribute(cx509.NameOID.COMMON_NAME, "spiffe://mesh.example/operator/ann")])
    moment = datetime.fromtimestamp(NOW, UTC)
    builder: Any = cx509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(moment).not_valid_after(moment + timedelta(hours=1))
    if names:
        builder = builder.add_extension(cx509.SubjectAlternativeName(list(names)), critical=False)
    pem: bytes = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return pem.decode()


def uri(text: str) -> cx509.UniformResourceIdentifier:
    return cx509.UniformResourceIdentifier(text)


@pytest.mark.parametrize("path", ["operator/ann", "viewer/vic", "proxy/shop/buyer", "replica/replica-1"])
def test_the_one_uri_says_who_calls(path: str) -> None:
    assert path_of(leaf(uri(f"spiffe://mesh.example/{path}"))) == path


@pytest.mark.parametrize(
    "names",
    [
        (),
        (cx509.DNSName("spiffe://mesh.example/operator/ann"),),
        (uri("spiffe://mesh.example/viewer/vic"), uri("spiffe://mesh.example/operator/ann")),
        (uri("spiffe://mesh.example.evil/operator/ann"),),
        (uri("spiffe://evil/mesh.example/operator/ann"),),
        (uri("https://mesh.example/operator/ann"),),
        (uri("spiffe://mesh.example/operator/ann\0evil"),),
        (uri("spiffe://mesh.example/operator/ann?role=x"),),
        (uri("spiffe://MESH.example/operator/ann"),),
    ],
)
def test_whoever_is_not_one_spiffe_id_of_this_trust_domain_is_nobody(names: tuple[cx509.GeneralName, ...]) -> None:
    with pytest.raises(Unauthenticated):
        path_of(leaf(*names))


@pytest.mark.parametrize("path", ["ns/shop/sa/buyer", "operator/a/b", "proxy/shop", "root/ann", "operator/.."])
def test_a_spiffe_id_that_is_no_credential_is_refused(path: str) -> None:
    with pytest.raises(Denied):
        path_of(leaf(uri(f"spiffe://mesh.example/{path}")))


def test_an_expired_certificate_is_nobody() -> None:
    pem = x509.pem(x509.load(CA.credential("operator/ann").chain)[0]).encode()
    assert peer_path({"x509_pem_cert": [pem]}, "mesh.example", NOW) == "operator/ann"
    with pytest.raises(Unauthenticated, match="expired"):
        peer_path({"x509_pem_cert": [pem]}, "mesh.example", NOW + 86401)


def test_no_certificate_is_nobody() -> None:
    with pytest.raises(Unauthenticated):
        peer_path({}, "mesh.example", NOW)
