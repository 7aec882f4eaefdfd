"""SDS: the certificate that a proxy shows, the roots that it trusts, and the certificates that it does not."""

from __future__ import annotations

from typing import Any

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


def bundle(roots: tuple[str, ...], lists: tuple[str, ...] = ()) -> Resource:
    """`roots` and `lists` (of revoked certificates, one of each intermediate, or none at all) are PEM."""
    trusted = common_pb2.CertificateValidationContext(trusted_ca=_joined(roots))
    if lists:
        trusted.crl.CopyFrom(_joined(lists))
        # Else the roots would need lists too, and whoever leads to one without would be refused.
        trusted.only_verify_leaf_cert_crl = True
    return messages.resource(
        Type.SECRET, names.BUNDLE, secret_pb2.Secret(name=names.BUNDLE, validation_context=trusted)
    )


def _joined(parts: tuple[str, ...]) -> Any:
    joined = "".join(part if part.endswith("\n") else part + "\n" for part in parts)
    return base_pb2.DataSource(inline_bytes=joined.encode())
