"""Whether every proxy has ACKed what was written. Each replica is asked for its own; nothing unknown counts as done.

The replicas say what is so at this moment. What they tell etcd of it once a second would miss a proxy that is between
two of them: gone from the one, not yet told by the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from smc.api import peers
from smc.api.backends import Backends, ProxyStatus
from smc.certificates.rotating import Acks
from smc.errors import Invalid
from smc.mesh import Mesh
from smc.model import Name
from smc.records import QuarantineRecord
from smc.v1 import smc_pb2 as pb

LONGEST = 8.0
"""Seconds until an answer that is not done. With the time that the other replicas have, less than one call may take."""
ABSENCE = 3.0
"""Seconds for which a proxy must be connected nowhere before it is not waited for: it may be on its way to another
replica, and an Envoy tries again within two."""
NEWS = 1.0
"""Seconds after which an answer need not be done if more proxies have ACKed meanwhile: somebody watches."""
LOOK_AGAIN, AT_MOST = 0.01, 1.0
"""Seconds until the replicas are asked again; they double up to the second figure."""
MOST_TOLD = 100
"""Laggards, and proxies that are absent, in one answer."""
LONGEST_TEXT = 1000


def versions(request: pb.WaitRequest | pb.AcksRequest) -> Sequence[int]:
    """The resource versions that are asked for.

    Raises:
        Invalid: there is none, or one that is none.
    """
    if not request.resource_versions or min(request.resource_versions) <= 0:
        raise Invalid("it is not said what to wait for: name the resource versions of what was written")
    return tuple(request.resource_versions)


# ------------------------------------------------------------------------------------------------------- one replica


def acks(b: Backends, wanted: Sequence[int]) -> pb.AcksResponse:
    """What this replica's proxies have made of everything up to the newest of `wanted`."""
    reached, mesh = b.reached(), b.mesh()
    statuses = b.proxies()
    response = pb.AcksResponse(revision=reached, proxies=sorted({str(status.name) for status in statuses}))
    for status in statuses:
        known = mesh.proxies.get(status.name) if mesh is not None else None
        state, text = _state(status, reached, known.quarantined if known is not None else (), wanted)
        if state:
            response.laggards.add(
                proxy=str(status.name), replica=b.replica().name, state=state, text=text[:LONGEST_TEXT]
            )
    return response


def _state(
    status: ProxyStatus, reached: int, quarantined: Iterable[QuarantineRecord], wanted: Sequence[int]
) -> tuple[str, str]:
    """Why a proxy does not have it; "" if it has.

    What it refuses counts as ACKed in `acked`, so that is looked at by itself. A refusal of something older than all
    that is asked for says nothing about it.
    """
    for nack in status.nacks:
        if nack.revision >= min(wanted):
            return "nacked", f"{nack.type_url.rpartition('.')[2]} {', '.join(nack.resources)}: {nack.text}"
    acked = reached if status.acked >= status.revision else status.acked
    if acked < max(wanted):
        return ("stalled" if status.state == "stalled" else "pending"), ""
    for record in quarantined:
        if record.mod_revision in wanted:
            return "refused", f"{record.manifest} is left out: {record.reason}"
    return "", ""


# ------------------------------------------------------------------------------------------------------- all of them


async def survey(b: Backends, revision: int) -> Acks:
    """What every live replica's proxies have made of everything up to `revision`.

    Raises:
        StoreError: it is not known which replicas there are.
        Unavailable: this replica cannot ask the others yet.
    """
    connected: set[str] = set()
    lagging: dict[str, str] = {}
    behind: dict[str, str] = {}
    for name, answer in (await _ask_all(b, (revision,))).items():
        if answer is None:
            behind[name] = "does not answer"
            continue
        connected.update(answer.proxies)
        lagging.update((one.proxy, f"{one.state}: {one.text}" if one.text else one.state) for one in answer.laggards)
        if answer.revision < revision:
            behind[name] = f"is at revision {answer.revision}, before {revision}"
    mesh = b.mesh()
    out: frozenset[str] = frozenset()
    if mesh is not None and (mesh.admitted or mesh.revoked_identities):
        out = frozenset(str(name) for name in mesh.proxies if mesh.is_out(name))
    return Acks(frozenset(connected), lagging, behind, out, partial(_is_gone, mesh))


def _is_gone(mesh: Mesh | None, proxy: str, revision: int) -> bool:
    """As `Acks.gone`: a Mesh from after that revision does not have it."""
    return mesh is not None and mesh.revision > revision and Name.parse(proxy) not in mesh.proxies


@dataclass(slots=True)
class _Watched:
    """What one call remembers from look to look."""

    lagging: set[str]
    """Proxies that were connected and had not ACKed: they are waited for wherever they are."""
    absent: dict[str, float] = field(default_factory=dict)
    """Since when a proxy is connected to no replica, by the loop's clock."""


async def wait(b: Backends, request: pb.WaitRequest) -> pb.WaitResponse:
    """Return once it is done, or after the asked seconds; after NEWS also when more proxies have ACKed meanwhile.

    Raises:
        Invalid: the request names nothing to wait for.
        StoreError: it is not known which replicas there are.
    """
    loop = asyncio.get_running_loop()
    wanted = versions(request)
    began = loop.time()
    give_up = began + max(0.0, min(request.seconds, LONGEST))
    acked: int | None = None
    watched = _Watched(set(request.lagging))
    pause = LOOK_AGAIN
    while True:
        answers = await _ask_all(b, wanted)
        mesh = b.mesh()
        there = {str(name) for name in mesh.proxies if not mesh.is_out(name)} if mesh is not None else set[str]()
        response = _judge(answers, there, wanted, watched, loop.time())
        acked = response.acked if acked is None else acked
        left = (began + NEWS if response.acked > acked else give_up) - loop.time()
        if response.done or left <= 0:
            return response
        await asyncio.sleep(min(pause, left))
        pause = min(2 * pause, AT_MOST)


async def _ask_all(b: Backends, wanted: Sequence[int]) -> Mapping[str, pb.AcksResponse | None]:
    """What each live replica says, by name; None for one that says nothing."""
    own = b.replica().name
    others = [member for member in await b.members() if member.name != own]
    told = await peers.acks(others, b.credential(), wanted)
    # This one last: its Mesh says which proxies there are.
    return {member.name: answer for member, answer in zip(others, told, strict=True)} | {own: acks(b, wanted)}


def _judge(
    answers: Mapping[str, pb.AcksResponse | None],
    there: Collection[str],
    wanted: Sequence[int],
    watched: _Watched,
    now: float,
) -> pb.WaitResponse:
    """What the replicas' answers come to; `there` are the proxies of the mesh."""
    laggards: list[pb.Laggard] = []
    connected: set[str] = set()
    for name, answer in sorted(answers.items()):
        if answer is None:
            laggards.append(pb.Laggard(replica=name, state="unknown", text="the replica does not answer"))
            continue
        connected.update(answer.proxies)
        laggards.extend(answer.laggards)
        if answer.revision < max(wanted):
            text = f"the replica is at revision {answer.revision}, before {max(wanted)}"
            laggards.append(pb.Laggard(replica=name, state="pending", text=text))

    missing = set(there) - connected
    gone = sorted(missing & watched.lagging)
    laggards += [pb.Laggard(proxy=name, state="disconnected", text="it was connected before") for name in gone]
    behind = {laggard.proxy for laggard in laggards if laggard.proxy}
    watched.lagging = behind
    watched.absent = {name: watched.absent.get(name, now) for name in sorted(missing - behind)}

    open_ = any(laggard.state != "refused" for laggard in laggards)
    moving = any(now - since < ABSENCE for since in watched.absent.values())
    waited_for = connected | behind
    laggards.sort(key=lambda laggard: (not laggard.proxy, laggard.proxy, laggard.replica))
    return pb.WaitResponse(
        done=not open_ and not moving,
        proxies=len(waited_for),
        acked=len(waited_for - behind),
        laggards=laggards[:MOST_TOLD],
        disconnected=list(watched.absent)[:MOST_TOLD],
        absent=len(watched.absent),
    )
