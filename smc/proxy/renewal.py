"""How a proxy's credential and the roots that it trusts stay fresh: at half life, from whatever replica answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import structlog

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.errors import Expired, Invalid, SmcError, Unavailable
from smc.proxy import enrolment
from smc.proxy.enrolment import Enrolment
from smc.proxy.join import channel_options
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub

CALL_TIMEOUT = 20.0
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
_LOOK_AGAIN = 60.0
"""Seconds: the clock may be set, and a machine may sleep, so no wait is longer."""

_log = structlog.get_logger(__name__)


async def keep_fresh(
    directory: Path,
    credential: Credential,
    enrolled: Enrolment,
    *,
    now: Callable[[], float] = time.time,
    renewed: Callable[[Credential, Enrolment], object] = lambda _credential, _enrolled: None,
) -> None:
    """Renew the credential in `directory` again and again, until cancelled.

    Nothing that fails here stops Envoy: the old credential stays in use while it lives, and what Envoy already has
    outlives even that.
    """
    wait = FIRST_RETRY
    while True:
        if (left := credential.renew_at - now()) > 0:
            await asyncio.sleep(min(left, _LOOK_AGAIN))
            continue
        try:
            credential, enrolled = await renew(directory, credential, enrolled, now=now)
            renewed(credential, enrolled)
        except (SmcError, OSError) as e:
            expired = credential.not_after <= now()
            _log.warning(
                "the credential has expired" if expired else "the credential cannot be renewed",
                credential=credential.uri,
                error=str(e),
                retry_in=wait,
                hint="restart with a new token: smc token create" if expired else "",
            )
            await asyncio.sleep(wait * (0.5 + random.random() / 2))  # noqa: S311
            wait = min(wait * 2, LAST_RETRY)
            continue
        _log.info("credential renewed", credential=credential.uri, not_after=credential.not_after)
        wait = FIRST_RETRY
        # Whatever the life of a certificate, the control plane is not asked in a loop.
        await asyncio.sleep(FIRST_RETRY)


async def renew(
    directory: Path, credential: Credential, enrolled: Enrolment, *, now: Callable[[], float] = time.time
) -> tuple[Credential, Enrolment]:
    """Get a new certificate for a new key from the first replica that gives one, and leave it in `directory`.

    Raises:
        Unavailable: none did; the text has each one's reason.
        OSError: the directory cannot be written.
    """
    reasons: list[str] = []
    addresses = list(enrolled.api_addresses)
    random.shuffle(addresses)
    for address in addresses:
        try:
            fresh, answer = await _ask(address, credential, now())
            new = enrolment.from_answer(answer, fresh)
        except grpc.aio.AioRpcError as e:
            reasons.append(f"{address}: {e.code().name}: {(e.details() or '')[:200]}")
        except (Invalid, Expired) as e:
            reasons.append(f"{address}: {e.message}")
        else:
            enrolment.write(directory, new)
            credentials.write(directory / enrolment.CREDENTIAL, fresh)
            return fresh, new
    raise Unavailable("no replica renewed the credential: " + "; ".join(reasons[:8]))


async def _ask(address: str, credential: Credential, now: float) -> tuple[Credential, pb.Credential]:
    key = x509.new_key()
    tls = grpc.ssl_channel_credentials(
        credential.roots_pem.encode(), credential.key.encode(), credential.chain.encode()
    )
    options = channel_options(x509.replica_host(credential.trust_domain))
    async with grpc.aio.secure_channel(address, tls, options=options) as channel:
        stub = MeshStub(channel)  # type: ignore[no-untyped-call]
        answer: pb.Credential = await stub.Renew(pb.RenewRequest(csr=x509.request(key)), timeout=CALL_TIMEOUT)
    fresh = enrolment.accept(answer, key.public_key(), x509.private_pem(key).decode(), credential.uri, now)
    return fresh, answer
