"""`smc cert`: the certificates of the mesh, who is revoked, and what signs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say
from smc.cli.completion import complete_identity, complete_proxy
from smc.cli.pages import examples
from smc.cli.rotate import rotate
from smc.cli.session import Session, connected
from smc.cli.table import age, table
from smc.cli.waiting import Waits, wait, wait_option

if TYPE_CHECKING:
    from smc.v1 import smc_pb2 as pb

LOOK_AGAIN = 0.1
"""Seconds until it is asked again whether the leader has done its part."""


@click.group()
def cert() -> None:
    """Certificates: see them, revoke whoever has lost one, and replace what signs."""


cert.add_command(rotate)


@cert.command("list", epilog=examples("smc cert list", "smc cert list -n shop -o json"))
@click.option("-n", "--namespace", default="", help="Of this namespace only.")
@click.option("-o", "--output", type=click.Choice(["table", "wide", "json", "yaml", "name"]), default="table")
@connected
def list_(session: Session, namespace: str, output: str) -> None:
    """List the workload certificates, and who is revoked.

    States: current, what an identity's proxies show; replaced by that, and still good until it expires; revoked, and
    taken by nobody. Credentials of proxies and operators are not listed: they are stored nowhere but with their owners.
    A revocation is `pending` until the leader has listed all certificates that it concerns, and `let in again` once
    another credential was signed for a new token. Operators and viewers are of no namespace.
    """
    from smc.v1 import smc_pb2 as pb

    answer = session.call("Certificates", pb.CertificatesRequest(namespace=namespace))
    if not (answer.certificates or answer.revocations) and output in ("table", "wide", "name"):
        say.note("there are no workload certificates yet: the leader issues them once there are workloads")
        return
    say.out(render(answer, output))


def render(answer: pb.CertificatesResponse, output: str, now: float | None = None) -> str:
    """The answer as text; `now` is in seconds since 1970."""
    now = time.time() if now is None else now
    if output == "name":
        return "\n".join(f"certificate/{one.serial}" for one in answer.certificates)
    if output in ("json", "yaml"):
        data = as_data(answer)
        if output == "json":
            return json.dumps(data, indent=2, ensure_ascii=False)
        from smc.cli.get import as_yaml

        return as_yaml(data).rstrip("\n")
    header = ["IDENTITY", "STATE", "SERIAL", "AGE", "EXPIRES IN", "ISSUER"]
    rows = [
        [
            one.identity,
            one.state,
            one.serial if output == "wide" else f"{one.serial[:4]}…{one.serial[-8:]}",
            age(one.not_before, now),
            _left(one.not_after, now),
            str(one.issuer),
        ]
        for one in answer.certificates
    ]
    lines = [table(header, rows)]
    if answer.revocations:
        header = ["REVOKED", "STATE", "AGE", "BY", "REASON"]
        rows = [
            [_subject(one), _state(one), age(one.time, now), one.author.rpartition("/")[2], one.reason]
            for one in answer.revocations
        ]
        lines += ["", table(header, rows)]
    return "\n".join(lines)


def _left(not_after: float, now: float) -> str:
    """`12h`, or `-` once it is past."""
    return age(2 * now - not_after, now) if not_after > now else "-"


def _subject(one: pb.Revocation) -> str:
    return one.credential or (f"proxy/{one.proxy}" if one.proxy else f"identity/{one.identity}")


def _state(one: pb.Revocation) -> str:
    if one.outstanding:
        return "pending"
    return "let in again" if one.admitted else "revoked"


def as_data(answer: pb.CertificatesResponse) -> dict[str, Any]:
    return {
        "certificates": [
            {
                "identity": one.identity,
                "serial": one.serial,
                "state": one.state,
                "notBefore": one.not_before or None,
                "notAfter": one.not_after,
                "issuer": one.issuer,
            }
            for one in answer.certificates
        ],
        "revocations": [
            {
                **({"proxy": one.proxy} if one.proxy else {}),
                **({"credential": one.credential} if one.credential else {}),
                "identity": one.identity or None,
                "state": _state(one),
                "reason": one.reason,
                "author": one.author,
                "time": one.time,
                "resourceVersion": one.resource_version,
                "outstanding": list(one.outstanding),
            }
            for one in answer.revocations
        ],
        "crl": {"number": answer.crl_number, "resourceVersion": answer.crl},
    }


@cert.command(
    cls=Waits,
    epilog=examples(
        "smc cert revoke --proxy shop/buyer --reason stolen --wait",
        "smc cert revoke --identity shop/buyer --undo",
        "smc cert revoke --operator ann --reason 'lost the laptop'",
        exits={say.LAGGING: "it is written, and after the time some proxies lack it, or have refused it"},
    ),
)
@click.option("--proxy", default="", metavar="NAMESPACE/WORKLOAD", shell_complete=complete_proxy, help="This proxy.")
@click.option(
    "--identity",
    default="",
    metavar="NAMESPACE/SERVICE-ACCOUNT",
    shell_complete=complete_identity,
    help="This identity, on whatever machine.",
)
@click.option("--operator", default="", metavar="NAME", help="This operator: all credentials of that name.")
@click.option("--viewer", default="", metavar="NAME", help="This viewer.")
@click.option("--reason", default="", help="Why: for whoever looks at it later.")
@click.option("--undo", is_flag=True, help="Take a revocation back.")
@wait_option
@connected
def revoke(
    session: Session,
    proxy: str,
    identity: str,
    operator: str,
    viewer: str,
    reason: str,
    undo: bool,
    patience: float | None,
) -> None:
    """Revoke a proxy, a whole identity, an operator or a viewer, at once and until it is taken back.

    A PROXY loses its stream and its credential, and nobody dials it any more. Workloads of one identity share a key:
    the others get another one, and what the proxy has of the old one is refused within seconds, on connections that
    are open as well. To let it in again give it a new token: smc token create.

    An IDENTITY may call nobody and is called by nobody, whatever policy says, and gets no certificate.

    An OPERATOR or VIEWER is refused by every replica within seconds, in calls that are open as well, whoever has the
    credential and however often it was renewed; so are tokens from before, made for that name or by it. What it has
    changed stays. To let it in again give it a new token. Any operator may revoke any other, and itself: after that
    only another operator's token, or smc recover, leads back.

    With --undo it is as it was before; certificates that were revoked stay so, and others take their place.

    With --wait this returns once every connected proxy has ACKed all of it; the exit code is 6 if some have not after
    TIMEOUT (default 30s), and they are named. It is in force for all others.
    """
    from smc.v1 import smc_pb2 as pb

    kinds = {"proxy": proxy, "identity": identity, "operator": operator, "viewer": viewer}
    named = [f"{kind}/{name}" for kind, name in kinds.items() if name]
    if len(named) != 1:
        raise click.UsageError("name a --proxy, an --identity, an --operator or a --viewer, and one alone")
    (called,) = named
    credential = called if operator or viewer else ""
    request = pb.RevokeRequest(proxy=proxy, identity=identity, credential=credential, reason=reason, undo=undo)
    answer = session.call("Revoke", request)
    if undo:
        say.out(f"{called} is revoked no longer")
    else:
        say.out(f"{called} {'revoked' if answer.resource_version else 'was revoked before'}")
    is_self = called == session.credential.path and not undo
    for line in _consequences(answer, undo=undo, is_self=is_self):
        say.note(line)
    if patience is None:
        return
    if is_self:
        say.note(
            "the replicas answer you no longer, so it is not waited for: all that reach etcd know it within seconds"
        )
    else:
        _wait(session, answer, patience)


def _consequences(answer: pb.RevokeResponse, *, undo: bool, is_self: bool = False) -> Sequence[str]:
    """What follows, for people. With `is_self` whoever asked has no way back with the credential that he has."""
    revocation = answer.revocation
    if undo:
        return ["certificates that were revoked stay so; credentials that have not expired count again"]
    if revocation.credential:
        said = [
            "its credentials from before are refused, and so are tokens from before that are for it or made by it",
            "nobody keeps a list of who has one, so check the name; what it has written stays",
        ]
        again = f"smc token create {revocation.credential}"
        if is_self:
            return [
                *said,
                f"that is you: another operator lets you in again with {again}; if there is none, smc recover",
            ]
        return [*said, f"to let it in again: {again}"]
    if not revocation.proxy:
        names = ", ".join(answer.proxies[:10]) or "none is connected to the mesh now"
        return [
            f"its proxies are out: {names}",
            f"to take it back: smc cert revoke --identity {revocation.identity} --undo",
        ]
    again = f"to let it in again: smc token create proxy/{revocation.proxy}"
    if not revocation.identity:
        return ["the mesh has no such workload, so only the credential of that name is refused", again]
    if answer.others:
        shared = f"{answer.others} other proxies share its key of {revocation.identity}, and get another one"
    else:
        shared = f"no other proxy shares its key of {revocation.identity}"
    return [shared, again]


def _wait(session: Session, answer: pb.RevokeResponse, patience: float) -> None:
    """Wait until the leader has done its part, and then until every proxy has ACKed it.

    Raises:
        Reported: with LAGGING, once it is said what is missing.
        SmcError: nobody answers.
    """
    from smc.v1 import smc_pb2 as pb

    deadline = time.monotonic() + patience
    written = answer.resource_version or answer.revocation.resource_version
    while True:
        found = session.call("Certificates", pb.CertificatesRequest())
        mine = [one for one in found.revocations if one.resource_version == written]
        if not any(one.outstanding for one in mine):
            break
        if time.monotonic() >= deadline:
            say.finding(
                f"after {patience:g} s the leader has not listed all of its certificates yet",
                "it is written, and goes on once somebody leads: smc cert list shows it, and smc check says who leads",
            )
            raise say.Reported(say.LAGGING)
        time.sleep(LOOK_AGAIN)
    versions = [version for version in (written, found.crl) if version]
    wait(session, versions, max(0.0, deadline - time.monotonic()))
