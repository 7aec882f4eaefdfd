"""`smc get denials`: what policy denied, and would have denied where the mode is not enforcing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from smc.cli import say
from smc.cli.session import Session
from smc.cli.table import Columns, age, table
from smc.cli.watching import PATIENCE, Change, Changes, refuse, watch

WORDS = ("denial", "denials")
"""What stands where other lists have a kind. There is no such manifest: the proxies count them."""
FORMATS = ("table", "wide", "json", "yaml")
TOGETHER = ("plaintext", "tcp")
"""What stands for a port where Envoy does not say which was meant."""


def show(session: Session, namespace: str, output: str, *, watched: bool) -> None:
    """List the denials of the workloads of a namespace, or of all for "".

    Raises:
        click.UsageError: `output` is none of FORMATS.
    """
    from smc.v1 import smc_pb2 as pb

    if output not in FORMATS:
        raise click.UsageError(f"denials have no names of their own: -o is one of {', '.join(FORMATS)}")
    request = pb.DenialsRequest(namespace=namespace)
    if watched:
        refuse(output)
        watch(session, _looker(session, request), _teller(output))
    answer = session.call("Denials", request)
    _warn(answer.unreachable)
    if not answer.denials and output in ("table", "wide"):
        say.note(f"nothing was denied{f' in namespace {namespace}' if namespace else ''}")
        return
    say.out(render(answer.denials, output))


def render(denials: Sequence[Any], output: str, now: float | None = None) -> str:
    if output in ("json", "yaml"):
        data = {"denials": [as_data(denial) for denial in denials]}
        if output == "json":
            return json.dumps(data, indent=2, ensure_ascii=False)
        from smc.cli.get import as_yaml

        return as_yaml(data).rstrip("\n")
    return table(_header(output), [_row(denial, output, now) for denial in denials])


def _header(output: str) -> list[str]:
    header = ["NAMESPACE", "WORKLOAD", "SERVICE", "PORT", "MODE", "DENIED", "WOULD BE DENIED", "LAST"]
    return [*header, "SINCE"] if output == "wide" else header


def _row(denial: Any, output: str, now: float | None = None) -> list[str]:
    namespace, _, workload = denial.workload.partition("/")
    service, port = _service(denial.port)
    counts = [str(denial.denied), str(denial.would_be_denied)]
    row = [namespace, workload, service, port, denial.mode, *counts, age(denial.last, now)]
    return [*row, _time(denial.since)] if output == "wide" else row


def _service(port: str) -> tuple[str, str]:
    """`<namespace>/<service>|<port>` as the service and the port; what is counted together has no service."""
    service, _, number = port.rpartition("|")
    return (service, number) if service else ("", port)


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def as_data(denial: Any) -> dict[str, Any]:
    namespace, _, workload = denial.workload.partition("/")
    service, port = _service(denial.port)
    return {
        "namespace": namespace,
        "workload": workload,
        "service": service or None,
        "port": port if port in TOGETHER else int(port),
        "mode": denial.mode,
        "denied": denial.denied,
        "wouldBeDenied": denial.would_be_denied,
        "since": _time(denial.since),
        "last": _time(denial.last),
    }


def _warn(unreachable: Sequence[str]) -> None:
    for replica in unreachable:
        say.warning(f"not asked, or no answer: {replica}; what only it was told is missing here")


def _looker(session: Session, request: Any) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """By workload and port. A replica that does not answer takes nothing along that it was told."""
    missed: set[str] = set()

    def look(before: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = session.call("Denials", request, timeout=PATIENCE)
        _warn(sorted(set(answer.unreachable) - missed))
        missed.clear()
        missed.update(answer.unreachable)
        found = {f"{denial.workload} {denial.port}": denial for denial in answer.denials}
        return {**before, **found} if missed else found

    return look


def _teller(output: str) -> Callable[[Changes[Any]], None]:
    """Prints changes; in JSON each is a line of its own."""
    columns = Columns(_header(output))

    def tell(changes: Changes[Any]) -> None:
        if output == "json":
            for change, denial in changes:
                say.out(json.dumps({"type": change, "denial": as_data(denial)}, ensure_ascii=False))
        elif rows := [_row(denial, output) for change, denial in changes if change is not Change.DELETED]:
            say.out(columns.text(rows))

    return tell
