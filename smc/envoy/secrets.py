"""SDS: the certificate that a proxy shows, and the roots that it trusts."""

from __future__ import annotations

from envoy.config.core.v3 import base_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2

from smc.envoy import messages, names
from smc.xds.snapshot import Resource, Type


def identity(chain: str, key: bytes) -> Resource:
    """`chain` is PEM, the leaf first; `key` the PKCS#8 PEM. For proxies of that identity only."""
    certificate = common_pb2.TlsCertificate(
        certificate_chain=base_pb2.DataSource(inline_bytes=chain.encode()),
        private_key=base_pb2.DataSource(inline_bytes=key),
    )
    return messages.resource(
        Type.SECRET, names.IDENTITY, secret_pb2.Secret(name=names.IDENTITY, tls_certificate=certificate)
    )


def bundle(roots: tuple[str, ...]) -> Resource:
    """`roots` are PEM."""
    joined = "".join(root if root.endswith("\n") else root + "\n" for root in roots)
    trusted = common_pb2.CertificateValidationContext(trusted_ca=base_pb2.DataSource(inline_bytes=joined.encode()))
    return messages.resource(
        Type.SECRET, names.BUNDLE, secret_pb2.Secret(name=names.BUNDLE, validation_context=trusted)
    )
