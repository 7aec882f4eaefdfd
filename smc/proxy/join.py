"""How a machine that knows nothing but a token comes to trust a control plane, and to be trusted by it.

First the presented TLS chain is read without trust. It has to hold a root whose public key has the token's pin, and to
lead there from a replica's certificate: so **the join port presents leaf, intermediate and root**. Only then is the
token sent, over a connection that trusts that root alone and checks the replica's name.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import structlog

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.certificates.tokens import Token
from smc.channels import channel_options
from smc.errors import Expired, Invalid
from smc.proxy import enrolment
from smc.proxy.enrolment import Enrolment
from smc.proxy.settings import Exit, ProxyFailed
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import JoinStub

CALL_TIMEOUT = 20.0
"""Seconds for one call: the control plane itself waits up to 15 for a leader."""
CONNECT_TIMEOUT = 5.0
FIRST_RETRY, LAST_RETRY = 0.5, 5.0
ERROR_METADATA = "smc-error"
"""Trailing metadata with the class of the error, such as `Expired`, where one gRPC status stands for several."""
_PENDING = "pending.pem"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Unreachable(Exception):
    reason: str


async def join(
    directory: Path,
    token: Token,
    addresses: tuple[str, ...],
    *,
    timeout: float,
    now: Callable[[], float] = time.time,
) -> tuple[Credential, Enrolment]:
    """Turn the token into a credential and leave both, with the enrolment, in `directory`.

    The key is on disk before the token is sent: after a crash the same key asks again, and gets the same answer.
    While nothing answers, the addresses are tried in turn for `timeout` seconds.

    Raises:
        ProxyFailed: it cannot; `exit` says which way.
    """
    key = _pending_key(directory)
    wait = FIRST_RETRY
    reason = "no address was given"
    try:
        async with asyncio.timeout(timeout):
            while True:
                for address in addresses:
                    try:
                        answer = await ask(address, token, key, now)
                        return _keep(directory, answer, key, now())
                    except Unreachable as e:
                        reason = f"{address}: {e.reason}"
                        _log.warning("cannot join yet", address=address, error=e.reason)
                await asyncio.sleep(wait)
                wait = min(wait * 2, LAST_RETRY)
    except TimeoutError:
        raise ProxyFailed(
            Exit.UNREACHABLE,
            f"no control plane let this proxy join within {timeout:g} s; the last attempt: {reason}",
            hint="check the addresses and the network, then run it again with the same token",
        ) from None


async def ask(address: str, token: Token, key: x509.PrivateKey, now: Callable[[], float]) -> pb.Credential:
    """Send token and key to one join port, once it proved to be of the token's mesh; the answer is not checked yet.

    Raises:
        Unreachable: nothing answers there, or it cannot now.
        ProxyFailed: it refuses, or is not of that mesh.
    """
    root, host = await _pinned_root(address, token, now())
    tls = grpc.ssl_channel_credentials(root_certificates=x509.pem(root).encode())
    async with grpc.aio.secure_channel(address, tls, options=channel_options(host)) as channel:
        try:
            stub = JoinStub(channel)  # type: ignore[no-untyped-call]
            answer: pb.Credential = await stub.Join(
                pb.JoinRequest(token=token.text(), csr=x509.request(key)), timeout=CALL_TIMEOUT
            )
        except grpc.aio.AioRpcError as e:
            raise _failure(address, e, token) from None
    return answer


async def _pinned_root(address: str, token: Token, now: float) -> tuple[x509.Certificate, str]:
    """Find the root that the token pins in what `address` presents; returns it and the replicas' DNS name."""
    chain = await presented_chain(address)
    try:
        root, trust_domain = _check_presented(chain, token.pins)
    except Invalid as e:
        raise ProxyFailed(
            Exit.WRONG_PIN,
            f"{address} is not the mesh that the token is for: {e.message}",
            hint=f"{e.hint}check the address; if it is right, somebody may be in between. The token was not sent",
        ) from None
    try:
        for certificate in chain:
            x509.check_times(certificate, now)
    except Expired as e:
        raise ProxyFailed(Exit.CLOCK_SKEW, f"{address}: {e.message}", hint=e.hint) from None
    return root, x509.replica_host(trust_domain)


def _check_presented(chain: tuple[x509.Certificate, ...], pins: Sequence[str]) -> tuple[x509.Certificate, str]:
    """Check that a replica's chain leads to a pinned root; returns the root and the trust domain."""
    root = next((c for c in chain if any(hmac.compare_digest(x509.pin(c), pin) for pin in pins)), None)
    if root is None:
        raise _without_pinned_root(chain, pins)
    return root, _trust_domain_of_replica(chain, root)


def _trust_domain_of_replica(chain: tuple[x509.Certificate, ...], root: x509.Certificate) -> str:
    x509.check_self_signed(root)
    x509.check_chain(chain[: chain.index(root) + 1], (root,), 0.0, times=False)
    trust_domain, *path = x509.uri(chain[0]).removeprefix("spiffe://").split("/")
    if len(path) != 2 or path[0] != "replica":
        raise Invalid("it is no replica of the mesh")
    return trust_domain


def _without_pinned_root(chain: tuple[x509.Certificate, ...], pins: Sequence[str]) -> Invalid:
    """What presents no root of the token: a mesh that has another one by now, or no mesh at all."""
    try:
        _trust_domain_of_replica(chain, chain[-1])
    except (Invalid, IndexError):
        return Invalid("none of the certificates that it presents has the pinned key")
    known = " or ".join(f"{pin[:16]}…" for pin in pins)
    return Invalid(
        f"the root that it has now is {x509.pin(chain[-1])[:16]}…, and the one in the token is {known}",
        hint="if the root was rotated after the token was made (smc cert rotate --root), nobody takes the token any "
        "more: ask for a new one, smc token create. If it was not, ",
    )


async def presented_chain(address: str, name: str | None = None) -> tuple[x509.Certificate, ...]:
    """The certificates that a TLS server presents, unverified, the leaf first; `name` is asked for by SNI.

    Raises:
        Unreachable: nothing answers there, or not with TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is sent and nothing believed on this connection: the chain is only looked at.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context, server_hostname=name)
    except TimeoutError:
        raise Unreachable(f"no answer within {CONNECT_TIMEOUT:g} s") from None
    except (OSError, ValueError) as e:
        raise Unreachable(str(e) or type(e).__name__) from None
    try:
        session = writer.get_extra_info("ssl_object")
        if hasattr(session, "get_unverified_chain"):  # public since Python 3.13
            encoded = list(session.get_unverified_chain())
        else:
            certificates = session._sslobj.get_unverified_chain()  # noqa: SLF001
            encoded = [c.public_bytes(ssl._ssl.ENCODING_DER) for c in certificates]  # type: ignore[attr-defined] # noqa: SLF001
        return x509.load_der(encoded[:8])
    except Invalid:
        raise Unreachable("it presents a certificate that cannot be read") from None
    finally:
        writer.transport.abort()


def _failure(address: str, error: grpc.aio.AioRpcError, token: Token) -> Exception:
    # Whoever answers may repeat what it was sent.
    code, details = error.code(), (error.details() or "").replace(token.text().split(".")[0], "smc-…")[:500]
    kind = dict(error.trailing_metadata() or ()).get(ERROR_METADATA, "")
    hint = "ask for a new token: smc token create"
    if code == grpc.StatusCode.UNAUTHENTICATED:
        if kind == Expired.__name__:
            return ProxyFailed(Exit.TOKEN_EXPIRED, f"{address} says: {details or 'the token has expired'}", hint=hint)
        return ProxyFailed(Exit.NO_SUCH_TOKEN, f"{address} says: {details or 'there is no such token'}", hint=hint)
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return ProxyFailed(
            Exit.TOKEN_USED,
            f"{address} says: {details or 'the token was used by another key'}",
            hint=f"{hint}; if no other machine of yours has used it, find out who did",
        )
    if code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
    ):
        return Unreachable(f"{code.name}: {details}")
    return ProxyFailed(Exit.REFUSED, f"{address} refuses: {code.name}: {details}")


def _keep(directory: Path, answer: pb.Credential, key: x509.PrivateKey, now: float) -> tuple[Credential, Enrolment]:
    try:
        credential = enrolment.accept(answer, key.public_key(), x509.private_pem(key).decode(), "", now)
        enrolled = enrolment.from_answer(answer, credential)
    except Expired as e:
        raise ProxyFailed(Exit.CLOCK_SKEW, e.message, hint=e.hint) from None
    except Invalid as e:
        raise ProxyFailed(Exit.REFUSED, f"the control plane's answer is of no use: {e.message}", hint=e.hint) from None
    enrolment.write(directory, enrolled)
    credentials.write(directory / enrolment.CREDENTIAL, credential)
    (directory / _PENDING).unlink(missing_ok=True)
    return credential, enrolled


def _pending_key(directory: Path) -> x509.PrivateKey:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / _PENDING
    try:
        if path.stat().st_mode & 0o077 == 0:
            return x509.load_private(path.read_bytes())
    except (OSError, Invalid):
        _log.debug("no key of an earlier attempt to join", path=os.fspath(path))
    key = x509.new_key()
    enrolment.write_file(path, x509.private_pem(key).decode())
    return key
