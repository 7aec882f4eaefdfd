"""What a certificate of the mesh looks like, and which requests and chains are believed."""

from __future__ import annotations

import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smc.certificates import making, x509
from smc.errors import Expired, Invalid
from tests.unit.certificates.authority import DAY, NOW, TestAuthority, serial, sign

CA = TestAuthority.make()
REAL = TestAuthority.make(now=time.time())
"""Valid now: TLS libraries look at the clock."""
KEY = x509.new_key()
DER = serialization.Encoding.DER


def csr(key: object, *extensions: cx509.ExtensionType, name: str = "") -> bytes:
    subject = cx509.Name([cx509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    builder = cx509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(DER)  # type: ignore[arg-type]


# --- times and serials


@settings(deadline=None, max_examples=60)
@given(
    after=st.floats(min_value=0, max_value=making.INTERMEDIATE_TTL.total_seconds() - 1),
    ttl=st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(days=4000)),
)
def test_a_leaf_is_valid_from_two_minutes_before_and_never_outlives_its_issuer(after: float, ttl: timedelta) -> None:
    now = NOW + after
    leaf = CA.leaf("ns/a/sa/b", KEY.public_key(), now=now, ttl=ttl)
    made = datetime.fromtimestamp(int(now), UTC)
    assert leaf.not_valid_before_utc == made - timedelta(minutes=2)
    assert leaf.not_valid_after_utc == min((made + ttl).replace(microsecond=0), CA.intermediate.not_valid_after_utc)
    assert CA.intermediate.not_valid_before_utc <= leaf.not_valid_before_utc
    assert CA.intermediate.not_valid_after_utc <= CA.root.not_valid_after_utc


def test_an_expired_authority_signs_nothing() -> None:
    with pytest.raises(Expired, match="can sign nothing any more"):
        CA.leaf("ns/a/sa/b", KEY.public_key(), now=NOW + making.INTERMEDIATE_TTL.total_seconds())


@given(
    made=st.integers(10**9, 2 * 10**9),
    ttl=st.integers(1, 10**8),
    seed=st.text(max_size=40),
)
def test_renewal_is_at_half_life_give_or_take_a_tenth(made: int, ttl: int, seed: str) -> None:
    at = x509.renew_at(made - 120.0, made + ttl, seed)
    assert made + 0.4 * ttl <= at <= made + 0.6 * ttl
    assert at == x509.renew_at(made - 120.0, made + ttl, seed)


def test_certificates_made_together_are_not_renewed_together() -> None:
    assert len({x509.renew_at(0, 86400, f"{n:x}") for n in range(100)}) == 100


@given(epoch=st.integers(1, 2**32 - 1), randomness=st.binary(min_size=12, max_size=12))
def test_a_serial_is_the_epoch_and_96_random_bits(epoch: int, randomness: bytes) -> None:
    number = making.serial(epoch, randomness)
    assert number >> 96 == epoch
    assert (number & (2**96 - 1)).to_bytes(12, "big") == randomness
    assert number.bit_length() <= 128


def test_a_serial_without_an_epoch_is_refused() -> None:
    for epoch, randomness in ((0, bytes(12)), (2**32, bytes(12)), (1, bytes(11))):
        with pytest.raises(ValueError, match="epoch"):
            making.serial(epoch, randomness)


# --- what is in a certificate


def test_a_leaf_says_one_uri_and_nothing_else_of_its_own() -> None:
    leaf = CA.leaf("ns/shop/sa/buyer", KEY.public_key())
    names = leaf.extensions.get_extension_for_class(cx509.SubjectAlternativeName)
    assert list(names.value) == [cx509.UniformResourceIdentifier("spiffe://mesh.example/ns/shop/sa/buyer")]
    assert names.critical
    assert not list(leaf.subject)
    assert leaf.extensions.get_extension_for_class(cx509.BasicConstraints).value.ca is False
    usage = leaf.extensions.get_extension_for_class(cx509.KeyUsage).value
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
    assert set(leaf.extensions.get_extension_for_class(cx509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }


def test_an_intermediate_signs_leaves_of_its_trust_domain_only() -> None:
    constraints = CA.intermediate.extensions.get_extension_for_class(cx509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    permitted = CA.intermediate.extensions.get_extension_for_class(cx509.NameConstraints).value.permitted_subtrees
    assert permitted == [cx509.UniformResourceIdentifier("mesh.example"), cx509.DNSName("replica.mesh.example")]


def test_a_key_elsewhere_signs_just_as_well() -> None:
    unsigned = making.leaf(
        KEY.public_key(), "spiffe://mesh.example/operator/a", CA.intermediate, serial=7, now=NOW, ttl=DAY
    )
    certificate = sign(unsigned, CA.key)
    assert certificate.tbs_certificate_bytes == unsigned.data
    certificate.verify_directly_issued_by(CA.intermediate)


def tls_handshake(server: tuple[str, str], client: tuple[str, str], root: str, host: str, folder: Path) -> str:
    """A TLS handshake in memory, each side verifying the other; returns what the server saw as the client's URI."""
    contexts = []
    for purpose, (chain, key), name in (
        (ssl.PROTOCOL_TLS_SERVER, server, "s"),
        (ssl.PROTOCOL_TLS_CLIENT, client, "c"),
    ):
        (folder / f"{name}.pem").write_text(chain + key)
        context = ssl.SSLContext(purpose)
        context.load_cert_chain(folder / f"{name}.pem")
        context.load_verify_locations(cadata=root)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    accepting = contexts[0].wrap_bio(a, b, server_side=True)
    connecting = contexts[1].wrap_bio(b, a, server_hostname=host)
    done: set[int] = set()
    for _ in range(10):
        for n, side in enumerate((connecting, accepting)):
            try:
                side.do_handshake()
                done.add(n)
            except ssl.SSLWantReadError:
                pass
    assert done == {0, 1}
    names = dict(accepting.getpeercert() or {})["subjectAltName"]
    return str(dict(names)["URI"])  # type: ignore[arg-type]


def credential_pair(path: str) -> tuple[str, str]:
    credential = REAL.credential(path, now=time.time())
    return credential.chain, credential.key


def test_a_tls_library_accepts_the_chain_both_ways_name_constraints_included(tmp_path: Path) -> None:
    root = x509.pem(REAL.root)
    seen = tls_handshake(
        credential_pair("replica/a"), credential_pair("proxy/n/w"), root, "replica.mesh.example", tmp_path
    )
    assert seen == "spiffe://mesh.example/proxy/n/w"


def test_only_a_replica_can_pose_as_a_replica(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        tls_handshake(
            credential_pair("proxy/n/w"),
            credential_pair("proxy/n/w"),
            x509.pem(REAL.root),
            "replica.mesh.example",
            tmp_path,
        )


# --- requests


def test_of_a_request_nothing_but_the_public_key_is_used() -> None:
    greedy = csr(
        KEY,
        cx509.BasicConstraints(ca=True, path_length=5),
        cx509.SubjectAlternativeName([cx509.UniformResourceIdentifier("spiffe://mesh.example/operator/admin")]),
        cx509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING]),
        name="replica.mesh.example",
    )
    key = x509.requested_key(greedy)
    assert x509.public_der(key) == x509.public_der(KEY.public_key())
    leaf = CA.leaf("proxy/n/w", key)
    assert x509.uri(leaf) == "spiffe://mesh.example/proxy/n/w"
    assert leaf.extensions.get_extension_for_class(cx509.BasicConstraints).value.ca is False
    assert b"operator" not in leaf.public_bytes(DER)
    assert b"replica" not in leaf.public_bytes(DER)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-256", "P-384", "Ed25519", "RSA-2048"],
)
def test_a_strong_key_is_certified(key: object) -> None:
    public = x509.requested_key(csr(key))
    CA.leaf("proxy/n/w", public).verify_directly_issued_by(CA.intermediate)
    assert x509.fingerprint(x509.load_public(x509.public_der(public))) == x509.fingerprint(public)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        (ec.generate_private_key(ec.SECP521R1()), "secp521r1"),
        (rsa.generate_private_key(65537, 1024), "1024 bits"),
        (rsa.generate_private_key(3, 2048), "exponent 3"),
        (dsa.generate_private_key(2048), "another algorithm"),
    ],
    ids=["K-256", "P-521", "RSA-1024", "RSA-e3", "DSA"],
)
def test_a_weak_or_unusual_key_is_refused_by_name(key: object, said: str) -> None:
    with pytest.raises(Invalid, match=said):
        x509.requested_key(csr(key))


def test_a_request_that_another_key_has_signed_is_refused() -> None:
    whole = bytearray(csr(KEY))
    other = x509.public_der(x509.new_key().public_key())
    mine = x509.public_der(KEY.public_key())
    at = bytes(whole).index(mine)
    whole[at : at + len(mine)] = other
    with pytest.raises(Invalid, match="not signed by its own key"):
        x509.requested_key(bytes(whole))


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
@example(at=7, bit=0)  # the version of the request
def test_a_request_with_any_bit_turned_gives_this_key_or_a_refusal(at: int, bit: int) -> None:
    der = bytearray(csr(KEY))
    der[at % len(der)] ^= 1 << bit
    try:
        key = x509.requested_key(bytes(der))
    except Invalid:
        return
    assert x509.public_der(key) == x509.public_der(KEY.public_key())


@given(st.binary(max_size=400))
def test_whatever_bytes_come_the_answer_is_a_refusal(noise: bytes) -> None:
    for read in (x509.requested_key, x509.load_public):
        with pytest.raises(Invalid):
            read(noise)


def test_too_large_a_request_is_not_even_parsed() -> None:
    for read in (x509.requested_key, x509.load_public):
        with pytest.raises(Invalid, match="more than 16384"):
            read(bytes(x509.MAX_REQUEST + 1))


# --- names


@pytest.mark.parametrize("path", ["proxy/shop/buyer-1", "operator/admin", "viewer/v.1", "replica/a"])
def test_the_four_kinds_of_credentials_have_a_uri(path: str) -> None:
    assert x509.credential_uri("mesh.example", path) == f"spiffe://mesh.example/{path}"


@pytest.mark.parametrize(
    "path",
    ["", "proxy", "proxy/a", "proxy/a/b/c", "operator/", "operator/a/b", "ns/a/sa/b", "root/a", "operator/..",
     "operator/A",
     "operator/a b", "operator/a\0", "operator/ä", "operator/a%2f", "/operator/a", "operator/" + "a" * 254],
)  # fmt: skip
def test_no_other_path_is_a_credential(path: str) -> None:
    with pytest.raises(Invalid, match="names no credential"):
        x509.check_credential(path)


@pytest.mark.parametrize("name", ["", "Mesh", "a_b", "-a", "a-", "a..b", "a/b", "a:1", "a\n", "ä.example", "a" * 201])
def test_no_other_name_is_a_trust_domain(name: str) -> None:
    with pytest.raises(Invalid, match="no trust domain"):
        x509.check_trust_domain(name)


def crafted(*names: cx509.GeneralName) -> cx509.Certificate:
    unsigned = making.leaf(KEY.public_key(), "spiffe://x/y", CA.intermediate, serial=serial(), now=NOW, ttl=DAY)
    kept = [e for e in unsigned.builder._extensions if not isinstance(e.value, cx509.SubjectAlternativeName)]
    unsigned.builder._extensions = kept
    builder = unsigned.builder.add_extension(cx509.SubjectAlternativeName(names), critical=True) if names else None
    return sign(making.ToBeSigned(builder or unsigned.builder), CA.key)


def test_a_certificate_must_carry_exactly_one_plain_spiffe_id() -> None:
    uri = cx509.UniformResourceIdentifier
    for names in (
        (),
        (cx509.DNSName("a"),),
        (uri("spiffe://m/a/b"), uri("spiffe://m/a/c")),
        (uri("http://m/a"),),
        (uri("spiffe://m"),),
        (uri("spiffe://m/a\0b"),),
        (uri("spiffe://m/a b"),),
    ):
        with pytest.raises(Invalid):
            x509.uri(crafted(*names))


# --- chains


def test_a_chain_leads_to_its_root_with_or_without_the_root_in_it() -> None:
    leaf = CA.leaf("proxy/n/w", KEY.public_key())
    for chain in ((leaf, CA.intermediate), (leaf, CA.intermediate, CA.root)):
        assert x509.check_chain(chain, (CA.root,), NOW) == CA.root


def test_a_chain_to_another_root_or_with_a_gap_is_refused() -> None:
    other = TestAuthority.make()
    leaf = CA.leaf("proxy/n/w", KEY.public_key())
    for chain in ((leaf, CA.intermediate), (leaf,), (leaf, CA.root), (leaf, other.intermediate), ()):
        with pytest.raises(Invalid):
            x509.check_chain(chain, (other.root,) if chain == (leaf, CA.intermediate) else (CA.root, other.root), NOW)


def test_a_leaf_cannot_sign_nor_can_an_intermediate_make_another() -> None:
    key = x509.new_key()
    leaf = CA.leaf("proxy/n/w", key.public_key())
    below = sign(
        making.leaf(KEY.public_key(), "spiffe://mesh.example/operator/a", leaf, serial=1, now=NOW, ttl=DAY), key
    )
    with pytest.raises(Invalid, match="no authority"):
        x509.check_chain((below, leaf, CA.intermediate), (CA.root,), NOW)
    second = sign(
        making.intermediate(key.public_key(), CA.intermediate, "mesh.example", number=2, serial=1, now=NOW), CA.key
    )
    below = sign(
        making.leaf(KEY.public_key(), "spiffe://mesh.example/operator/a", second, serial=1, now=NOW, ttl=DAY), key
    )
    with pytest.raises(Invalid, match="longer than its authority allows"):
        x509.check_chain((below, second, CA.intermediate), (CA.root,), NOW)


def test_a_chain_out_of_its_time_names_the_clock() -> None:
    chain = (CA.leaf("proxy/n/w", KEY.public_key()), CA.intermediate)
    x509.check_chain(chain, (CA.root,), NOW - 90)
    with pytest.raises(Expired, match=r"valid only from .* and here it is .*set the clock: this one is behind"):
        x509.check_chain(chain, (CA.root,), NOW - 3600)
    with pytest.raises(Expired, match="expired at"):
        x509.check_chain(chain, (CA.root,), NOW + 86401)


def test_an_answer_for_another_key_name_or_root_is_refused() -> None:
    leaf = CA.leaf("proxy/n/w", KEY.public_key())
    chain, roots, name = x509.pem(leaf, CA.intermediate), [x509.pem(CA.root)], "spiffe://mesh.example/proxy/n/w"
    assert x509.check_answer(chain, KEY.public_key(), name, roots, NOW)[0] == leaf
    with pytest.raises(Invalid, match="another key"):
        x509.check_answer(chain, x509.new_key().public_key(), name, roots, NOW)
    with pytest.raises(Invalid, match="asked for"):
        x509.check_answer(chain, KEY.public_key(), "spiffe://mesh.example/operator/a", roots, NOW)
    with pytest.raises(Invalid, match="trusted"):
        x509.check_answer(chain, KEY.public_key(), name, [x509.pem(TestAuthority.make().root)], NOW)


def test_a_strangers_certificate_with_a_key_of_no_known_kind_has_no_pin() -> None:
    prime256v1, unknown = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d030163")
    (strange,) = x509.load_der([CA.root.public_bytes(DER).replace(prime256v1, unknown)])
    with pytest.raises(Invalid, match="a key that cannot be read"):
        x509.pin(strange)
