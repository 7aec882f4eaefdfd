"""How the servers of a replica prove who they are and learn who calls, with a certificate that may change meanwhile."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc

from smc.certificates import x509
from smc.errors import Denied, Invalid, Unauthenticated


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """What a server presents, and whom it believes. All of it is PEM."""

    chain: str
    """The leaf first."""
    key: str = field(repr=False)
    roots: str


def server_credentials(current: Callable[[], ServerTLS], *, require_client: bool) -> grpc.ServerCredentials:
    """Credentials that ask `current` at every handshake, so that a renewed certificate needs no restart.

    `current` is called on threads of gRPC: it must not block, and returns the same object until something changed.
    Connections that are open stay as they are. With `require_client` a client without a certificate that leads to the
    roots is refused before it can say anything.
    """
    served = current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        newest = current()
        if newest is served:
            return None
        configuration = _configuration(newest, require_client)
        served = newest
        return configuration

    # The stubs do not know that None means "as before".
    return grpc.dynamic_ssl_server_credentials(
        _configuration(served, require_client),
        fetch,  # type: ignore[arg-type]
        require_client_authentication=require_client,
    )


def _configuration(tls: ServerTLS, require_client: bool) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(tls.key.encode(), tls.chain.encode())], tls.roots.encode() if require_client else None
    )


def server_context(tls: ServerTLS) -> ssl.SSLContext:
    """For an HTTP/2 server that is not gRPC's: a client must have a certificate that leads to the roots."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # A client of TLS 1.3 that comes back is asked for its certificate again. One of 1.2 may resume what this context
    # has checked, and there is one context for each set of roots.
    context.num_tickets = 0
    context.set_alpn_protocols(["h2"])
    context.verify_mode = ssl.CERT_REQUIRED
    # As gRPC has it: whatever is among the roots is trusted, also if another certificate has signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=tls.roots)
    present(context, tls.chain, tls.key)
    return context


def present(context: ssl.SSLContext, chain: str, key: str) -> None:
    """Have the context show this certificate. Both are PEM."""
    # OpenSSL's wrapper reads keys from files only: this one is in memory, and nobody else's.
    file = os.memfd_create("credential", os.MFD_CLOEXEC)
    try:
        os.write(file, (key + chain).encode())
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def peer_path(auth_context: Mapping[str, Iterable[bytes]], trust_domain: str, now: float) -> str:
    """Who calls, by what gRPC knows of the connection: as `credential_path`.

    Raises:
        Unauthenticated: no certificate, and what `credential_path` raises.
        Denied: as there.
    """
    certificates = list(auth_context.get("x509_pem_cert", ()))
    if not certificates:
        raise Unauthenticated("the connection carries no client certificate", hint="connect with a credential")
    return credential_path(certificates[0].decode("latin-1"), trust_domain, now)


def peer_leaf(auth_context: Mapping[str, Iterable[bytes]]) -> x509.Certificate:
    """The certificate whose path `peer_path` has told."""
    (leaf,) = x509.load(next(iter(auth_context["x509_pem_cert"])).decode("latin-1"))
    return leaf


def credential_path(pem: str, trust_domain: str, now: float) -> str:
    """The path of a credential's SPIFFE ID, such as `operator/<name>` or `proxy/<namespace>/<workload>`.

    TLS has checked the chain when the connection was made; that the certificate is still valid is checked here, because
    a connection may outlive it. `now` is in seconds since 1970.

    Raises:
        Unauthenticated: expired, not exactly one SPIFFE ID, or one of another trust domain.
        Denied: the SPIFFE ID is of no kind of credential (a workload's certificate, for one).
    """
    try:
        (leaf,) = x509.load(pem)
        uri = x509.uri(leaf)
    except (Invalid, ValueError) as e:
        raise Unauthenticated(f"the client certificate says nothing about who it is: {e}") from None
    prefix = f"spiffe://{trust_domain}/"
    if not uri.startswith(prefix):
        raise Unauthenticated(f"{uri[:300]} is not of the trust domain {trust_domain!r}")
    if leaf.not_valid_after_utc.timestamp() <= now:
        raise Unauthenticated(f"the credential of {uri} has expired", hint="renew it, or join again with a new token")
    try:
        return x509.check_credential(uri.removeprefix(prefix))
    except Invalid:
        raise Denied(
            f"{uri} is no credential: nothing here is for it",
            hint="a workload's certificate is for the traffic of the mesh; use a credential",
        ) from None
