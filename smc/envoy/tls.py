"""Both ends of the mutual TLS between two proxies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2, tls_pb2
from envoy.type.matcher.v3 import string_pb2

from smc.envoy import messages, names
from smc.model import Identity
from smc.xds.snapshot import Type

HTTP = ("h2",)
NOT_HTTP = ()
"""What ALPN offers. A TCP port's health is HTTP and its connections are not: by that the server tells them apart."""

SECRETS = ((Type.SECRET, names.BUNDLE), (Type.SECRET, names.IDENTITY))
"""What either end waits for."""


def nobody(trust_domain: str) -> str:
    """A SPIFFE ID that no certificate has: the authority signs only below `ns/`, `proxy/`, `operator/` and their like.

    It stands where nobody may be accepted, because Envoy reads an empty list as anybody.
    """
    return f"spiffe://{trust_domain}/nobody"


def upstream(identities: tuple[Identity, ...], trust_domain: str, sni: str, offered: tuple[str, ...] = HTTP) -> Any:
    """The caller's end: whoever answers must be exactly one of `identities`; none means nobody."""
    # A resumed session skips the check of the certificate, expiry included.
    return tls_pb2.UpstreamTlsContext(
        common_tls_context=_common(exactly(identities, trust_domain), offered),
        sni=sni,
        max_session_keys=messages.uint32(0),
    )


def downstream(
    trust_domain: str, identities: tuple[Identity, ...] | None = None, offered: tuple[str, ...] = HTTP
) -> Any:
    """The server's end: exactly one of `identities`; none means nobody.

    Without them any workload identity of this mesh, and policy decides what it may do. Credentials of proxies,
    operators and replicas are for the control plane: they are refused here.
    """
    accepted = [of_workloads(trust_domain)] if identities is None else exactly(identities, trust_domain)
    return tls_pb2.DownstreamTlsContext(
        common_tls_context=_common(accepted, offered),
        require_client_certificate=messages.TRUE,
        # Either kind of resumption skips the check of the certificate, expiry included; one flag alone does nothing.
        disable_stateless_session_resumption=True,
        disable_stateful_session_resumption=True,
    )


def of_workloads(trust_domain: str) -> Any:
    """A matcher of the URIs of this mesh's workloads. Its authority signs others too, for the control plane alone."""
    return string_pb2.StringMatcher(prefix=f"spiffe://{trust_domain}/ns/")


def exactly(identities: Sequence[Identity], trust_domain: str) -> list[Any]:
    """A matcher of each identity's URI; one of nobody's if there is none, and never an empty list."""
    accepted = [identity.uri(trust_domain) for identity in identities] or [nobody(trust_domain)]
    return [string_pb2.StringMatcher(exact=uri) for uri in accepted]


def _common(accepted: list[Any], offered: tuple[str, ...]) -> Any:
    uri = common_pb2.SubjectAltNameMatcher.URI
    return tls_pb2.CommonTlsContext(
        tls_params=common_pb2.TlsParameters(
            tls_minimum_protocol_version=common_pb2.TlsParameters.TLSv1_3,
            tls_maximum_protocol_version=common_pb2.TlsParameters.TLSv1_3,
        ),
        alpn_protocols=offered,
        tls_certificate_sds_secret_configs=[secret_pb2.SdsSecretConfig(name=names.IDENTITY, sds_config=messages.ads())],
        combined_validation_context=tls_pb2.CommonTlsContext.CombinedCertificateValidationContext(
            default_validation_context=common_pb2.CertificateValidationContext(
                match_typed_subject_alt_names=[
                    common_pb2.SubjectAltNameMatcher(san_type=uri, matcher=matcher) for matcher in accepted
                ]
            ),
            validation_context_sds_secret_config=secret_pb2.SdsSecretConfig(
                name=names.BUNDLE, sds_config=messages.ads()
            ),
        ),
    )
