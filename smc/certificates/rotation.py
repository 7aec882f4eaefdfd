"""Rotation of the intermediate or of the root: who is waited for, and what comes next.

Trust goes before use, and use ends before trust does. Nothing is signed with a new root until everybody alive trusts
it beside the old one; the old one is taken away once nobody alive shows a certificate that leads to it.

A new intermediate need not be published: whoever shows a certificate shows the intermediate with it, and the root that
both lead to is trusted already. Unless certificates are revoked: whoever has a list of one intermediate refuses the
certificates of every other, so the new one's list has to be there first.

Pure: what the store, the replicas and the proxies say comes from the caller, and so does the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from cryptography import x509 as cx509

from smc.certificates import making, x509
from smc.records import Phase, Rotates, RotationRecord

FORCED_AFTER = 10.0
"""Seconds that also a forced rotation waits in each phase: whoever is well needs less."""
_NEXT = {
    Phase.PUBLISHING: Phase.SIGNING,
    Phase.SIGNING: Phase.RETIRING,
    Phase.RETIRING: Phase.DONE,
}


class Kind(Enum):
    """What is missing."""

    CERTIFICATES = "certificates"
    REPLICA = "replica"
    PROXY = "proxy"
    TOKENS = "tokens"


DISPENSABLE = frozenset({Kind.PROXY, Kind.TOKENS})
"""What a forced rotation may leave behind. A replica that is alive, or a certificate that can be signed, never."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A replica or a proxy, and what its credential is, as far as it has said."""

    name: str
    roots: frozenset[str] = frozenset()
    """The pins of the roots that it trusts."""
    issuer: str = ""
    """The key id of the intermediate that signed its credential; "": it has said nothing."""
    connected: bool = True
    lag: str = ""
    """Why it has not ACKed what it should have; "" if it has."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is so at one moment."""

    roots: frozenset[str]
    """The pins of the roots in the bundle."""
    signer: str
    """The key id of the new intermediate."""
    replicas: Sequence[Holder] = ()
    """That are alive."""
    proxies: Sequence[Holder] = ()
    """That are connected, or may still hold something that is valid."""
    tokens: int = 0
    """Join tokens that nobody has used, and that do not know the new root."""
    outdated: int = 0
    """Stored workload certificates that another intermediate has signed."""
    listed: bool | None = None
    """Whether the new intermediate has a list of revoked certificates; None: nobody has."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a phase is not over."""

    kind: Kind
    who: str
    why: str


def missing(rotation: RotationRecord, found: Found) -> tuple[Missing, ...]:
    """Who has yet to do what for the phase to end."""
    match rotation.phase:
        case Phase.PUBLISHING if rotation.of is Rotates.ROOT or found.listed is not None:
            trusting = _holders(found, lambda h: found.roots <= h.roots, "does not trust the new root yet")
            return (*_lists(found), *trusting, *_tokens(found))
        case Phase.SIGNING:
            renewed = _holders(found, lambda h: h.issuer == found.signer, "shows a credential of the old authority")
            return (*_certificates(found), *renewed)
        case Phase.RETIRING:
            # Who is away shows nothing old any more, and learns the rest when it comes back.
            there = replace(found, proxies=[proxy for proxy in found.proxies if proxy.connected])
            return tuple(_holders(there, lambda h: h.roots == found.roots, "trusts the old root as well"))
        case _:
            return ()


def next_phase(rotation: RotationRecord, lacking: Sequence[Missing], now: float) -> Phase | None:
    """The phase that begins now; None while the present one goes on, or when there is nothing to wait for.

    A request becomes a rotation by what is made for it, and so never by waiting.
    """
    following = _NEXT.get(rotation.phase)
    if not lacking:
        return following
    patient_until = max(rotation.since, rotation.forced) + FORCED_AFTER
    if rotation.forced and now >= patient_until and all(one.kind in DISPENSABLE for one in lacking):
        return following
    return None


def due(root: cx509.Certificate, intermediate: cx509.Certificate, now: float) -> Rotates | None:
    """What has to be rotated by itself: the intermediate at half of its life, the root while two more would fit in."""
    if root.not_valid_after_utc.timestamp() - now < 2 * making.INTERMEDIATE_TTL.total_seconds():
        return Rotates.ROOT
    return Rotates.INTERMEDIATE if now >= renew_at(intermediate) else None


def renew_at(intermediate: cx509.Certificate) -> float:
    """When the intermediate is due, in seconds since 1970."""
    return x509.renew_at(*_life(intermediate), f"{intermediate.serial_number:x}")


def is_urgent(intermediate: cx509.Certificate, now: float) -> bool:
    """Whether the intermediate that signs has so little life left that nobody may hold up the next one."""
    not_before, not_after = _life(intermediate)
    return now >= not_after - (not_after - not_before) / 4


def _life(certificate: cx509.Certificate) -> tuple[float, float]:
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def _holders(found: Found, is_done: Callable[[Holder], bool], otherwise: str) -> Iterator[Missing]:
    for kind, holders in ((Kind.REPLICA, found.replicas), (Kind.PROXY, found.proxies)):
        for holder in holders:
            if not holder.connected:
                yield Missing(kind, holder.name, "connected to no replica")
            elif holder.lag:
                yield Missing(kind, holder.name, holder.lag)
            elif not holder.issuer:
                yield Missing(kind, holder.name, "has not said what it trusts: does smc proxy run keep its credential?")
            elif not is_done(holder):
                yield Missing(kind, holder.name, otherwise)


def _lists(found: Found) -> Iterator[Missing]:
    if found.listed is False:
        yield Missing(Kind.CERTIFICATES, "the list of revoked certificates", "the leader signs it anew")


def _certificates(found: Found) -> Iterator[Missing]:
    if found.outdated:
        yield Missing(Kind.CERTIFICATES, f"{found.outdated} workload certificates", "the leader signs them anew")


def _tokens(found: Found) -> Iterator[Missing]:
    if found.tokens:
        why = "unused, and made before the new root was; none lives for more than 10 minutes"
        yield Missing(Kind.TOKENS, f"{found.tokens} join tokens", why)
