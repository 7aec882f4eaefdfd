"""What the demo claims, counted where it happens: by the applications and by the Envoys, never by SMC."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import aiohttp

from smc.demo.envoy_admin import EnvoyAdmin
from smc.demo.programs import App

K = TypeVar("K")
PATIENCE = 2.0
"""Seconds that an Envoy has to answer. One that was stopped never does."""
FAR = 5.0
"""Standard deviations. A fair draw is farther off once in 1.7 million times."""


@dataclass(frozen=True, slots=True)
class Figures:
    """All counters at one moment, or (a difference of two) what happened in between."""

    sent: Counter[str]
    """Requests by visitor."""
    answered: Counter[tuple[str, int | str, str]]
    """By visitor, status (200, `PERMISSION_DENIED`) and version of the application that answered ("": none did)."""
    failed: Counter[str]
    """Requests without any answer, by visitor."""
    reached: Counter[tuple[str, str]]
    """Requests that an application itself has seen, by its workload and the caller's SPIFFE ID."""
    denied: Counter[str]
    """Requests that a sidecar's RBAC filters refused, by workload. Starts anew with its Envoy."""
    heard: Mapping[str, str]
    """The control plane that each sidecar last heard, by workload; "" if none or if it does not answer."""
    serials: Mapping[str, tuple[str, ...]]
    """Serial numbers of the workload certificates that each sidecar holds."""
    pending: Mapping[str, str]
    """What each sidecar has been sent and does not use, in words; "" if it uses all of it."""

    def __sub__(self, earlier: Figures) -> Figures:
        return Figures(
            _between(self.sent, earlier.sent),
            _between(self.answered, earlier.answered),
            _between(self.failed, earlier.failed),
            _between(self.reached, earlier.reached),
            _between(self.denied, earlier.denied),
            self.heard,
            self.serials,
            self.pending,
        )

    def statuses(self, visitor: str) -> Counter[int | str]:
        found: Counter[int | str] = Counter()
        for (name, status, _), count in self.answered.items():
            if name == visitor:
                found[status] += count
        return found

    def versions(self, visitor: str) -> Counter[str]:
        """Answers of an application, by its version."""
        found: Counter[str] = Counter()
        for (name, _, version), count in self.answered.items():
            if name == visitor and version:
                found[version] += count
        return found

    def reached_by(self, part: str) -> int:
        """Requests that reached an application from callers with `part` in their SPIFFE ID, as `/ns/bookthief/`."""
        return sum(count for (_, caller), count in self.reached.items() if part in caller)

    @classmethod
    async def take(
        cls, visitors: Mapping[str, App], stores: Mapping[str, App], sidecars: Mapping[str, EnvoyAdmin]
    ) -> Self:
        """Ask everybody at once. A sidecar that does not answer counts as having nothing to say.

        Raises:
            aiohttp.ClientError, TimeoutError: an application does not answer.
        """
        visited, served, said = await asyncio.gather(
            _all(visitors), _all(stores), asyncio.gather(*(_ask(admin) for admin in sidecars.values()))
        )
        spoken = dict(zip(sidecars, said, strict=True))
        return cls(
            sent=Counter({name: found["sent"] for name, found in visited.items()}),
            answered=Counter(
                {
                    (name, entry["status"], entry["version"]): entry["count"]
                    for name, found in visited.items()
                    for entry in found["answers"]
                }
            ),
            failed=Counter({name: found["failed"] for name, found in visited.items()}),
            reached=_reached(served),
            denied=Counter({name: denied for name, (denied, _, _, _) in spoken.items()}),
            heard={name: identifier for name, (_, identifier, _, _) in spoken.items()},
            serials={name: serials for name, (_, _, serials, _) in spoken.items()},
            pending={name: pending for name, (_, _, _, pending) in spoken.items()},
        )


def is_fair(hits: int, total: int, share: float) -> bool:
    """Whether so many hits of all may be drawn by chance with this share of them; of nothing at all nothing is."""
    return total > 0 and abs(hits - total * share) <= FAR * math.sqrt(total * share * (1 - share))


def _between(now: Counter[K], then: Counter[K]) -> Counter[K]:
    # What starts anew counts from nothing again: then all that it has counted happened in between.
    return Counter({key: count - then[key] if count >= then[key] else count for key, count in now.items()})


def _reached(served: Mapping[str, dict[str, Any]]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for name, counters in served.items():
        for entry in counters["requests"]:
            found[name, entry["client"]] += entry["count"]
    return found


async def _all(apps: Mapping[str, App]) -> dict[str, dict[str, Any]]:
    return dict(zip(apps, await asyncio.gather(*(app.counters() for app in apps.values())), strict=True))


async def _ask(admin: EnvoyAdmin) -> tuple[int, str, tuple[str, ...], str]:
    try:
        async with asyncio.timeout(PATIENCE):
            (_, denied), identifier, serials, pending = await asyncio.gather(
                admin.verdicts(), admin.identifier(), admin.serials(), admin.pending()
            )
    except (aiohttp.ClientError, TimeoutError):
        return 0, "", (), "no answer"
    return denied, identifier, serials, pending
