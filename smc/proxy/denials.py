"""What policy has denied at this proxy, and would have denied: read from Envoy's counters, and told to a replica.

Only counters that are not 0 are told, all of them each time, when one has risen or a minute has passed: so a proxy that
nobody is denied at says nothing, and a replica that has just started hears of the others soon. They begin anew with
each Envoy. Nothing that fails here concerns Envoy.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import aiohttp
import grpc
import grpc.aio
import structlog

from smc.certificates.credential import Credential
from smc.channels import channel_to
from smc.envoy import names
from smc.proxy.enrolment import Enrolment
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub

LOOK = 3.0
"""Seconds from one look at the counters to the next."""
REPEAT = 60.0
"""Seconds after which counts that have not changed are told again."""
CALL_TIMEOUT = 5.0
MOST_PORTS = 1000
_MOST_BYTES = 4 * 1024 * 1024
_REFUSED = rf"listener\..+_{names.INBOUND_PORT}\.ssl\.fail_verify_san"
"""Policy of TCP is in the handshake, which fails for who may not connect: one for each connection."""
FILTER = rf"^((http\.inbound\.rbac\..+|inbound\..+\.rbac)\.(shadow_)?denied|{_REFUSED})$"
"""As listeners name them: of a port that speaks HTTP, of one that speaks TCP, and of all that do."""
_COUNTER = re.compile(
    r"(?:http\.inbound\.rbac\.(?P<http>.+)|inbound\.(?P<tcp>.+)\.rbac)\.(?P<shadow>shadow_)?denied"
    rf"|(?P<refused>{_REFUSED})"
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Counted:
    """The calls to one port that policy denied since Envoy started, and those that passed only because of the mode.

    Where policy is enforced, what connects to ports that speak TCP is counted together, under `names.TCP`.
    """

    denied: int = 0
    would_be_denied: int = 0


def counted(stats: Any) -> Mapping[str, Counted]:
    """By port, as `names.cluster` has it, what Envoy's answer `{"stats": [{"name": …, "value": …}]}` counts.

    Raises:
        ValueError: it is no such answer.
    """
    found: dict[str, Counted] = {}
    try:
        for stat in stats["stats"]:
            match = _COUNTER.fullmatch(stat.get("name", ""))
            if match is None or not (value := int(stat["value"])):
                continue
            port = names.TCP if match["refused"] else match["http"] or match["tcp"]
            kind = "would_be_denied" if match["shadow"] else "denied"
            found[port] = replace(found.get(port, Counted()), **{kind: value})
    except (TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"Envoy's counters have another shape: {type(e).__name__}") from None
    return dict(sorted(found.items())[:MOST_PORTS])


async def report(
    admin: str,
    entered: Callable[[], tuple[Credential, Enrolment]],
    *,
    look: float = LOOK,
    now: Callable[[], float] = time.time,
) -> None:
    """Watch one Envoy, that has just started, until cancelled.

    `admin` is the host:port of its admin interface, `entered` the credential and the mesh as they are now.
    """
    loop = asyncio.get_running_loop()
    since = now()
    told: Mapping[str, Counted] = {}
    seen: Mapping[str, Counted] = {}
    rose: dict[str, float] = {}
    repeat_at = 0.0
    timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session, _Replica(entered) as replica:
        while True:
            await asyncio.sleep(look)
            counts = await _read(session, admin)
            if counts is None:
                continue
            rose |= {port: now() for port, count in counts.items() if count != seen.get(port)}
            seen = counts
            if counts and (counts != told or loop.time() >= repeat_at):
                ports = [
                    pb.CountedPort(
                        port=port, denied=count.denied, would_be_denied=count.would_be_denied, last=rose[port]
                    )
                    for port, count in counts.items()
                ]
                if await replica.tell(pb.ReportDenialsRequest(since=since, ports=ports)):
                    told, repeat_at = counts, loop.time() + REPEAT


async def _read(session: aiohttp.ClientSession, admin: str) -> Mapping[str, Counted] | None:
    """None: Envoy does not say now."""
    try:
        query = {"format": "json", "usedonly": "", "filter": FILTER}
        async with session.get(f"http://{admin}/stats", params=query) as answer:
            if answer.status != 200:
                return None
            return counted(json.loads(await answer.content.read(_MOST_BYTES)))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
        _log.debug("Envoy's counters cannot be read", admin=admin, error=type(e).__name__)
        return None


class _Replica:
    """The replica that is told: the same one for as long as it takes what it is told and the credential is the same."""

    def __init__(self, entered: Callable[[], tuple[Credential, Enrolment]]) -> None:
        self._entered = entered
        self._credential: Credential | None = None
        self._channel: grpc.aio.Channel | None = None
        self._silent = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._leave()

    async def tell(self, request: pb.ReportDenialsRequest) -> bool:
        """Whether it took it. If not, another one is asked the next time."""
        credential, enrolled = self._entered()
        if self._credential is not credential:
            await self._leave()
        if self._channel is None:
            self._channel, self._credential = _open(credential, enrolled), credential
        try:
            stub = MeshStub(self._channel)  # type: ignore[no-untyped-call]
            await stub.ReportDenials(request, timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as e:
            await self._leave()
            if not self._silent:
                _log.warning("what policy denied cannot be told", code=e.code().name, reason=(e.details() or "")[:200])
            self._silent = True
            return False
        self._silent = False
        return True

    async def _leave(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        self._channel = None


def _open(credential: Credential, enrolled: Enrolment) -> grpc.aio.Channel:
    return channel_to(random.choice(enrolled.api_addresses), credential)  # noqa: S311
