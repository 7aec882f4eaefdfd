"""What the other replicas say: asked all at once, with this replica's own credential, and not waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from smc.certificates.credential import Credential
from smc.channels import channel_to
from smc.records import MemberRecord
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub

DEADLINE = 2.0
MAX_MESSAGE = 16 * 1024 * 1024


async def proxies(
    members: Sequence[MemberRecord], credential: Credential
) -> tuple[list[pb.ProxiesResponse], list[str]]:
    """Ask each of `members` for its streams; returns the answers, and who gave none within DEADLINE seconds."""
    return await _each(members, credential, "Proxies", pb.ProxiesRequest(local=True))


async def denials(
    members: Sequence[MemberRecord], credential: Credential, namespace: str
) -> tuple[list[pb.DenialsResponse], list[str]]:
    """Ask each of `members` what it was told of denials; returns as `proxies`."""
    return await _each(members, credential, "Denials", pb.DenialsRequest(local=True, namespace=namespace))


async def acks(
    members: Sequence[MemberRecord], credential: Credential, versions: Sequence[int]
) -> list[pb.AcksResponse | None]:
    """Ask each of `members` what its proxies have ACKed; None for one that gave no answer within DEADLINE seconds."""
    request = pb.AcksRequest(resource_versions=versions)
    return list(await asyncio.gather(*(_ask(member, credential, "Acks", request) for member in members)))


async def _each(
    members: Sequence[MemberRecord], credential: Credential, method: str, request: Any
) -> tuple[list[Any], list[str]]:
    answers = await asyncio.gather(*(_ask(member, credential, method, request) for member in members))
    unreachable = [m.name for m, answer in zip(members, answers, strict=True) if answer is None]
    return [answer for answer in answers if answer is not None], unreachable


async def _ask(member: MemberRecord, credential: Credential, method: str, request: Any) -> Any:
    channel = channel_to(member.api_address, credential, max_message=MAX_MESSAGE)
    try:
        async with asyncio.timeout(DEADLINE), channel:
            stub = MeshStub(channel)  # type: ignore[no-untyped-call]
            return await getattr(stub, method)(request, timeout=DEADLINE)
    except (grpc.aio.AioRpcError, TimeoutError):
        return None
