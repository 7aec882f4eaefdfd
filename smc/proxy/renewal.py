"""How a proxy's credential and the roots that it trusts stay fresh: at half life, from whatever replica answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import structlog

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.channels import channel_to
from smc.errors import Denied, Expired, Invalid, SmcError, Unavailable
from smc.proxy import enrolment
from smc.proxy.enrolment import Enrolment
from smc.proxy.join import ERROR_METADATA, Unreachable, presented_chain
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub

CALL_TIMEOUT = 20.0
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
TELL_EVERY = 600.0
"""Seconds after which the control plane is told again what is trusted here: it may have been restored since."""
_LOOK_AGAIN = 60.0
"""Seconds: the clock may be set, and a machine may sleep, so no wait is longer."""
_MOST_LOOKED_AT = 8
"""Replicas whose certificates are looked at."""
LEFT_BEHIND = "the root of this proxy's credential is no longer trusted: the mesh has another one by now"
LEFT_BEHIND_HINT = "join again with a new token: smc token create"

T = TypeVar("T")

_log = structlog.get_logger(__name__)


async def keep_fresh(
    directory: Path,
    credential: Credential,
    enrolled: Enrolment,
    *,
    news: asyncio.Event,
    now: Callable[[], float] = time.time,
    renewed: Callable[[Credential, Enrolment], object] = lambda _credential, _enrolled: None,
    rejoin: Callable[[], Awaitable[tuple[Credential, Enrolment]]] | None = None,
) -> None:
    """Keep the credential in `directory` good, and its roots those of the mesh, until cancelled.

    A credential that turns out to be revoked is replaced by `rejoin`, where there is a way.

    `news` is set by whoever sees that the mesh may trust or sign otherwise now. That is a hint: what is so, is asked.

    Nothing that fails here stops Envoy: the old credential stays in use while it lives, and what Envoy already has
    outlives even that.
    """
    loop = asyncio.get_running_loop()
    wait = FIRST_RETRY
    outdated, told = False, -TELL_EVERY
    while True:
        try:
            if outdated or credential.renew_at <= now():
                credential, enrolled = await renew(directory, credential, enrolled, now=now)
                renewed(credential, enrolled)
                _log.info("credential renewed", credential=credential.uri, not_after=credential.not_after)
                told = -TELL_EVERY
            if news.is_set() or loop.time() >= told + TELL_EVERY:
                news.clear()
                credential, outdated = await confirm(directory, credential, enrolled, now=now)
                told = loop.time()
        except (SmcError, OSError) as e:
            # What was asked is not answered, so it is asked again.
            news.set()
            failure: Exception | None = e
            if isinstance(e, Denied) and rejoin is not None:
                try:
                    credential, enrolled = await rejoin()
                    renewed(credential, enrolled)
                    outdated, failure = False, None
                except (SmcError, OSError) as why:
                    failure = why
            if failure is not None:
                await _complain(credential, enrolled, failure, wait, now())
            # After joining too: a replica that is behind may refuse what is new as well.
            await asyncio.sleep(wait * (0.5 + random.random() / 2))  # noqa: S311
            wait = min(wait * 2, LAST_RETRY)
            continue
        wait = FIRST_RETRY
        # Whatever the life of a certificate, the control plane is not asked in a loop, nor by all in the same moment.
        await asyncio.sleep(FIRST_RETRY * (0.5 + random.random() / 2))  # noqa: S311
        left = 0.0 if outdated else min(credential.renew_at - now(), told + TELL_EVERY - loop.time(), _LOOK_AGAIN)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left)):
                await news.wait()


async def _complain(credential: Credential, enrolled: Enrolment, error: Exception, wait: float, now: float) -> None:
    if credential.not_after <= now:
        what, hint = "the credential has expired", "restart with a new token: smc token create"
    elif await is_left_behind(credential, enrolled):
        what, hint = LEFT_BEHIND, f"restart with a new token: {LEFT_BEHIND_HINT}"
    else:
        what, hint = "the credential cannot be renewed", ""
    _log.warning(what, credential=credential.uri, error=str(error), retry_in=wait, hint=hint)


async def is_left_behind(credential: Credential, enrolled: Enrolment) -> bool:
    """Whether the mesh has another root by now, and takes this credential no longer.

    Whoever is between here and there can make it seem so. What follows from it must be no more than he could do anyway
    by letting nothing through.
    """
    own = x509.load(credential.chain)
    trusted = x509.load(credential.roots_pem)
    addresses = enrolled.api_addresses[:_MOST_LOOKED_AT]
    shown = await asyncio.gather(*(presented_chain(address) for address in addresses), return_exceptions=True)
    strange: list[str] = []
    for address, chain in zip(addresses, shown, strict=True):
        if isinstance(chain, Unreachable):
            continue
        if isinstance(chain, BaseException):
            raise chain
        if _root(chain, trusted) == _root(own, trusted):
            return False
        strange.append(address)
    return bool(strange) and not any([await _is_taken(address, credential) for address in strange])


def _root(chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]) -> x509.Certificate | None:
    try:
        return x509.check_chain(chain, trusted, 0.0, times=False)
    except Invalid:
        return None


async def _is_taken(address: str, credential: Credential) -> bool:
    """Whether both sides of a connection take each other's certificates, whatever the answer then is."""
    try:
        await _call(address, credential, "Trust", pb.TrustRequest())
    except grpc.aio.AioRpcError as e:
        answered = any(key == ERROR_METADATA for key, _ in e.trailing_metadata() or ())
        return answered or e.code() is not grpc.StatusCode.UNAVAILABLE
    return True


async def renew(
    directory: Path, credential: Credential, enrolled: Enrolment, *, now: Callable[[], float] = time.time
) -> tuple[Credential, Enrolment]:
    """Get a new certificate for a new key from the first replica that gives one, and leave it in `directory`.

    Raises:
        Denied: the credential is revoked.
        Unavailable: none did; the text has each one's reason.
        OSError: the directory cannot be written.
    """

    async def ask(address: str) -> tuple[Credential, Enrolment]:
        key = x509.new_key()
        answer = await _call(address, credential, "Renew", pb.RenewRequest(csr=x509.request(key)))
        fresh = enrolment.accept(answer, key.public_key(), x509.private_pem(key).decode(), credential.uri, now())
        return fresh, enrolment.from_answer(answer, fresh)

    fresh, new = await _first_of(credential, enrolled, "no replica renewed the credential", ask)
    enrolment.write(directory, new)
    credentials.write(directory / enrolment.CREDENTIAL, fresh)
    return fresh, new


async def confirm(
    directory: Path, credential: Credential, enrolled: Enrolment, *, now: Callable[[], float] = time.time
) -> tuple[Credential, bool]:
    """Say what lies in `directory`, and trust there whom the mesh trusts; returns the credential as it is then.

    The mesh retires no root before it has heard that nobody needs it, so it is told once more when something changed.
    The second value says that another intermediate signs by now, so that the credential is to be renewed.

    Raises:
        Denied, Unavailable, OSError: as `renew`.
    """
    while True:
        request = pb.TrustRequest(roots=credential.pins, issuer=credential.issuer)
        ask = partial(_call, credential=credential, method="Trust", request=request)
        answer = await _first_of(credential, enrolled, "no replica heard what is trusted here", ask)
        roots = tuple(x509.pem(c) for text in answer.roots for c in x509.load(text))
        trusting = replace(credential, roots=roots)
        if trusting.pins == credential.pins:
            return credential, answer.renew
        try:
            trusting.check(now())
        except Invalid:
            # Nothing here leads to the new roots yet: first the credential, then the roots.
            return credential, True
        credentials.write(directory / enrolment.CREDENTIAL, trusting)
        _log.info("other roots are trusted", pins=trusting.pins)
        credential = trusting


async def _first_of(credential: Credential, enrolled: Enrolment, failure: str, ask: Callable[[str], Awaitable[T]]) -> T:
    """What the first replica answers that answers well, in any order.

    Raises:
        Denied: the credential is revoked.
        Unavailable: `failure`, and each one's reason.
    """
    reasons: list[str] = []
    addresses = list(enrolled.api_addresses)
    random.shuffle(addresses)
    for address in addresses:
        try:
            return await ask(address)
        except grpc.aio.AioRpcError as e:
            if e.code() is grpc.StatusCode.PERMISSION_DENIED:
                raise Denied(f"{address} refuses {credential.uri}: {(e.details() or '')[:500]}") from None
            reasons.append(f"{address}: {e.code().name}: {(e.details() or '')[:200]}")
        except (Invalid, Expired) as e:
            reasons.append(f"{address}: {e.message}")
    raise Unavailable(f"{failure}: " + "; ".join(reasons[:8]))


async def _call(address: str, credential: Credential, method: str, request: Any) -> Any:
    async with channel_to(address, credential) as channel:
        stub = MeshStub(channel)  # type: ignore[no-untyped-call]
        return await getattr(stub, method)(request, timeout=CALL_TIMEOUT)
