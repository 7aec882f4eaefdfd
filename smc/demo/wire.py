"""To which root the certificates on the wire lead, as TLS handshakes show, and whom the Envoys trust, as they say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import aiohttp
from cryptography.x509 import Certificate

from smc.certificates import x509
from smc.demo.envoy_admin import EnvoyAdmin
from smc.errors import Invalid
from smc.proxy.join import Unreachable, presented_chain

Chain = tuple[Certificate, ...]


@dataclass(frozen=True, slots=True)
class Roots:
    """Serial numbers of the roots that are in use, in hexadecimal."""

    shown: Mapping[str, str]
    """By TLS port: the root to which what it presents leads; "": to none, or nothing answers."""
    trusted: Mapping[str, frozenset[str]]
    """By workload: the roots that its Envoy trusts; none if it does not answer."""

    @property
    def all(self) -> frozenset[str]:
        return frozenset(self.shown.values()).union(*self.trusted.values())

    @classmethod
    async def take(cls, ports: Mapping[str, str | None], envoys: Mapping[str, EnvoyAdmin]) -> Self:
        """Ask everybody at once.

        `ports` are host:port and the name to ask for, if any. The roots to choose from are those that one of the ports
        presents itself, as every replica's join port does.
        """
        chains, trusted = await asyncio.gather(
            asyncio.gather(*(_chain(port, name) for port, name in ports.items())),
            asyncio.gather(*map(_trusted, envoys.values())),
        )
        roots = tuple(one for chain in chains for one in chain if one.issuer == one.subject)
        return cls(
            {port: _leads_to(chain, roots) for port, chain in zip(ports, chains, strict=True)},
            dict(zip(envoys, trusted, strict=True)),
        )


async def _chain(port: str, name: str | None) -> Chain:
    try:
        return await presented_chain(port, name)
    except Unreachable:
        return ()


def _leads_to(chain: Chain, roots: Chain) -> str:
    try:
        return f"{x509.check_chain(chain, roots, 0.0, times=False).serial_number:x}"
    except Invalid:
        return ""


async def _trusted(admin: EnvoyAdmin) -> frozenset[str]:
    try:
        found = await admin.certificates()
    except (aiohttp.ClientError, TimeoutError):
        return frozenset()
    return frozenset(f"{int(one['serial_number'], 16):x}" for entry in found for one in entry.get("ca_cert", ()))
