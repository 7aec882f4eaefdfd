"""`smc check`: is the mesh well, as far as its replicas tell; and for what is not, the command that mends it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say
from smc.cli.kinds import known
from smc.cli.pages import examples
from smc.cli.session import Session, credential_option, server_option
from smc.cli.table import table
from smc.config import HEALTH_PORT
from smc.errors import Denied, SmcError

if TYPE_CHECKING:
    from smc.certificates.credential import Credential

PATIENCE = 5.0
"""Seconds that a replica has for an answer."""
LOOKS = 5
"""How often the replicas are asked, a second apart, before what passes by itself is called an error: who leads while
the leadership changes hands, and how far each one is while something is being written."""
SHOWN = 3
"""Things that a reason names; the others are counted."""

LOGIN = "smc login --join <host> --token <token>"


class Result(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    id: str
    """Stable, for machines; that of a server is `server/<host>:<port>`."""
    result: Result
    reason: str
    command: str = ""
    """What to run to mend it, or to see more of it; "" if all is well."""


# ------------------------------------------------------------------------------------------------- judging, without I/O


def credential(found: Credential, now: float) -> Check:
    """`now` in seconds since 1970. One that is used renews itself at half of its life: past three quarters is late."""
    left = found.not_after - now
    late = left < (found.not_after - found.renew_at) / 2
    reason = f"{found.uri} is good for {left / 3600:.1f} h more"
    if not late:
        return Check("credential", Result.OK, reason)
    return Check("credential", Result.WARNING, f"{reason}, and was not renewed when it was due", LOGIN)


def server(address: str, answer: Any) -> Check:
    """What a server says of itself, a ProxiesResponse of its own proxies; or the SmcError that it was."""
    id_ = f"server/{address}"
    if isinstance(answer, Denied):
        return Check(id_, Result.ERROR, answer.message, LOGIN)
    if isinstance(answer, SmcError):
        return Check(
            id_, Result.ERROR, answer.message, "smc serve, on its machine: is it running, and what does it log?"
        )
    (replica,) = answer.replicas
    if not replica.ready:
        reason = f"{replica.name} is not ready: no proxy and no caller should be sent to it"
        return Check(id_, Result.ERROR, reason, f"curl http://{address.rpartition(':')[0]}:{HEALTH_PORT}/readyz")
    return Check(id_, Result.OK, f"{replica.name} {replica.version} is ready, and has {replica.streams} streams")


def replicas(found: Sequence[Any], unreachable: Sequence[str]) -> Check:
    """Do all that etcd knows answer, and are there enough?"""
    serve = "smc serve --name <name> --address <address> --etcd <etcd> --kek-file <file>"
    unready = [f"{r.name} is not ready" for r in found if not r.ready]
    if wrong := [*(f"no answer: {replica}" for replica in unreachable), *unready]:
        return Check("replicas", Result.ERROR, _few(wrong), serve)
    if len(found) == 1:
        return Check("replicas", Result.WARNING, f"{found[0].name} is the only one: none takes over if it dies", serve)
    return Check("replicas", Result.OK, f"{len(found)} are ready: {', '.join(r.name for r in found)}")


def leader(found: Sequence[Any], unreachable: Sequence[str]) -> Check:
    leaders = [r.name for r in found if r.leader]
    if len(leaders) == 1:
        return Check("leader", Result.OK, f"{leaders[0]} leads")
    if leaders:
        return Check(
            "leader", Result.ERROR, f"{', '.join(leaders)} each say that they lead", "smc proxy status -o json"
        )
    if unreachable:
        return Check("leader", Result.WARNING, "none that answers leads; one that does not answer may", "smc check")
    reason = "no replica leads, so nothing is observed and no certificate renewed"
    return Check("leader", Result.ERROR, reason, "etcdctl endpoint health --cluster")


def revisions(found: Sequence[Any], newest: int) -> Check:
    """Has every replica built the mesh with the newest manifest, whose revision this is?

    Beyond that their revisions differ, and mean nothing: a replica is at that of the last change that it had to know.
    """
    behind = [f"{r.name} is at {r.revision}" for r in found if r.revision < newest]
    if behind:
        reason = f"the newest manifest is of revision {newest}, and {_few(behind)}"
        return Check("revision", Result.ERROR, reason, "smc serve, on its machine: what does it log?")
    reason = (
        f"every replica that answers has the newest manifest, of revision {newest}" if newest else "nothing to have"
    )
    return Check("revision", Result.OK, reason)


def proxies(found: Sequence[Any]) -> Check:
    """Do all have what they should have, or at least take it?"""
    stalled = [f"{p.name} does not answer" for p in found if p.state == "stalled"]
    refused = [f"{p.name} refuses {p.nacks[0].text if p.nacks else p.state}" for p in found if _refuses(p)]
    if wrong := [*stalled, *refused]:
        return Check("proxies", Result.ERROR, _few(wrong), "smc proxy status")
    pending = sum(p.state == "pending" for p in found)
    reason = f"{len(found)} are connected, and none is stalled or refuses anything"
    return Check("proxies", Result.OK, f"{reason}; {pending} are being told something" if pending else reason)


def _refuses(p: Any) -> bool:
    return bool(p.nacks) or p.state == "nacked"


def manifests(found: Sequence[Any]) -> Check:
    """Has any no or less effect than it says?"""
    wrong = [(o, p) for o in found for p in o.problems if p.severity == "error"]
    if not wrong:
        return Check("manifests", Result.OK, f"{len(found)} are in effect")
    first = wrong[0][0]
    where = "" if first.namespace == "-" else f" -n {first.namespace}"
    reasons = _few([f"{o.kind} {_called(o)}: {p.reason}: {p.message}" for o, p in wrong])
    return Check("manifests", Result.ERROR, reasons, f"smc describe {first.kind.lower()} {first.name}{where}")


def _called(o: Any) -> str:
    return o.name if o.namespace == "-" else f"{o.namespace}/{o.name}"


def _few(reasons: Sequence[str]) -> str:
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + more


# ------------------------------------------------------------------------------------------------------------- looking


def checks(directory: Path, servers: Sequence[str]) -> Iterator[Check]:
    """Every check, in the order in which one explains the next; what cannot be asked is skipped, and says why."""
    with contextlib.closing(Session(directory, servers)) as session:
        try:
            found = session.credential
        except SmcError as e:
            yield Check("credential", Result.ERROR, e.message, LOGIN)
            yield from _skipped("there is no credential to ask with", "replicas")
            return
        yield credential(found, time.time())
        answers = {address: _local(directory, address) for address in session.servers}
        yield from (server(address, answer) for address, answer in answers.items())
        if all(isinstance(answer, SmcError) for answer in answers.values()):
            yield from _skipped("no server answers", "replicas")
            return
        yield from _together(session)
        session.keep_fresh()


def _local(directory: Path, address: str) -> Any:
    from smc.v1 import smc_pb2 as pb

    with contextlib.closing(Session(directory, [address])) as session:
        try:
            return session.call("Proxies", pb.ProxiesRequest(local=True), timeout=PATIENCE)
        except SmcError as e:
            return e


def _together(session: Session) -> Iterator[Check]:
    from smc.v1 import smc_pb2 as pb

    written: list[Any] = []
    unknown = ""
    try:
        for kind in known():
            written.extend(session.call("List", pb.ListRequest(group=kind.group, kind=kind.name)).objects)
    except SmcError as e:
        unknown = e.message
    newest = max((o.resource_version for o in written), default=0)
    try:
        answer = session.call("Proxies", pb.ProxiesRequest())
        for _ in range(LOOKS - 1):
            passing = (leader(answer.replicas, answer.unreachable), revisions(answer.replicas, newest))
            if all(c.result is Result.OK for c in passing):
                break
            time.sleep(1.0)
            answer = session.call("Proxies", pb.ProxiesRequest())
    except SmcError as e:
        yield Check("replicas", Result.ERROR, e.message, "smc check")
        yield from _skipped("the replicas could not be asked", "leader")
        return
    yield replicas(answer.replicas, answer.unreachable)
    yield leader(answer.replicas, answer.unreachable)
    if unknown:
        yield Check("revision", Result.SKIPPED, "it is not known which manifests there are")
        yield proxies(answer.proxies)
        yield Check("manifests", Result.ERROR, unknown, "etcdctl endpoint health --cluster")
        return
    yield revisions(answer.replicas, newest)
    yield proxies(answer.proxies)
    yield manifests(written)


def _skipped(reason: str, first: str) -> Iterator[Check]:
    ids = ("replicas", "leader", "revision", "proxies", "manifests")
    for id_ in ids[ids.index(first) :]:
        yield Check(id_, Result.SKIPPED, reason)


def render(found: Sequence[Check], output: str) -> str:
    """As a table with what to do below it, or as JSON."""
    if output == "json":
        ok = not any(c.result is Result.ERROR for c in found)
        return json.dumps({"ok": ok, "checks": [asdict(c) for c in found]}, indent=2, ensure_ascii=False)
    lines = [table(["CHECK", "RESULT", "REASON"], [[c.id, c.result, " ".join(c.reason.split())] for c in found])]
    if mend := [[c.id, c.command] for c in found if c.command]:
        lines += ["", table(["CHECK", "WHAT TO DO"], mend)]
    return "\n".join(lines)


@click.command(epilog=examples("smc check", "smc check -o json", exits={1: "a check is in error"}))
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@server_option
@credential_option
def check(output: str, server: tuple[str, ...], credential: Path) -> None:
    """Say whether the mesh is well, and what mends it.

    The credential, every server, the replicas, who leads, how far each one is, the proxies, the manifests. The exit
    code is 1 if any is in error; warnings do not count. How the replicas' clocks and etcd itself are is not asked:
    the API does not tell it.
    """
    found = tuple(checks(credential, server))
    say.out(render(found, output))
    if any(c.result is Result.ERROR for c in found):
        raise say.Reported
