"""`smc explain`: would this request be allowed, by what, and where would it go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say
from smc.cli.completion import complete_proxy
from smc.cli.kinds import named_by
from smc.cli.pages import examples
from smc.cli.session import Session, connected

if TYPE_CHECKING:
    from smc.v1 import smc_pb2 as pb

ALLOWED = "allowed"
SHOWN = 5
"""Workloads that are named of those that answer alike."""

EXAMPLES = examples(
    "smc explain shop/buyer shop/bookstore --path /books",
    "smc explain sa:shop/buyer bookstore.shop --method POST --header user-agent=Firefox -o json",
    exits={
        0: "allowed by all that may get it, also where the mode only counts what policy denies",
        1: "denied, or not allowed by all; refused for its form; or nobody serves it",
        7: "it failed, and there is no answer",
    },
)


class Header(click.ParamType[tuple[str, str]]):
    name = "header"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, text = str(value).partition("=")
        if not (name and equals):
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, text


@click.command(epilog=EXAMPLES)
@click.argument("caller", shell_complete=complete_proxy)
@click.argument("service")
@click.option("--port", type=click.IntRange(1, 65535), default=None, help="Of the service. Default: its only one.")
@click.option("--method", default="", help="Default: GET; POST of what speaks gRPC.")
@click.option("--path", default="/", show_default=True, help="With the query, if there is one.")
@click.option("--header", "headers", type=Header(), multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@connected
def explain(
    session: Session,
    caller: str,
    service: str,
    port: int | None,
    method: str,
    path: str,
    headers: Sequence[tuple[str, str]],
    output: str,
) -> None:
    """Say whether a request would be allowed, by which manifest, and where it would go.

    CALLER is a workload, NAMESPACE/NAME, or else the identity of one, NAMESPACE/SERVICE-ACCOUNT; with sa: before it, it
    is an identity in any case. SERVICE is NAMESPACE/NAME or NAME.NAMESPACE.

    The answer is that of the configuration which the proxies have or are about to get, judged as Envoy judges it: the
    path without its query and normalised, headers by their whole value, splits before policy. Nothing is sent. If it
    is denied, the permissions that come closest are listed, and what the request lacks.

    Beside the verdict, and whatever it is, stands what a TrafficPolicy does to such requests, and to which share of
    them: faults, the timeout, limits, the rate limit. A workload without a proxy (sidecar: grpc) is judged as gRPC
    judges: paths as they are, the values of a header as one.
    """
    from smc.v1 import smc_pb2 as pb

    request = pb.ExplainRequest(
        caller=caller,
        service=service_named(service),
        port=port or 0,
        method=method,
        path=path,
        headers=[pb.Header(name=name, value=value) for name, value in headers],
    )
    answer = session.call("Explain", request)
    say.out(as_json(answer) if output == "json" else text(answer))
    if answer.verdict != ALLOWED:
        raise say.Reported


def service_named(word: str) -> str:
    """`NAMESPACE/NAME`, from that or from `NAME.NAMESPACE`."""
    if "/" in word:
        return word
    name, _, namespace = word.partition(".")
    return f"{namespace or 'default'}/{name}"


def text(answer: pb.ExplainResponse) -> str:
    return "\n".join(_lines(answer))


def _lines(a: pb.ExplainResponse) -> Iterator[str]:
    yield f"{a.verdict}{_counted(a)}{': ' + a.reason if a.reason else ''}"
    yield f"  from    {a.caller}, as {a.identity}"
    yield f"  to      {a.service} port {a.port} ({a.protocol})"
    if a.protocol != "tcp":
        yield f"  request {a.method} {a.path}" + "".join(f"\n          {h.name}: {h.value}" for h in a.headers)
    if a.split_by:
        yield "split by  " + "\n          ".join(_rule(rule) for rule in a.split_by)
        yield "          for " + (" or ".join(a.branch) if a.branch else "all requests that no condition takes")
    yield from _treated("", a.effects)
    for way in a.ways:
        yield f"{way.share:>6.1%} to {way.service} port {way.port}"
        if not way.servers:
            yield "          nobody serves it"
        elif not any(server.ready for server in way.servers):
            yield f"          nobody is ready, so {a.unanswered}"
        yield from _treated("    ", way.effects)
        for workloads, server in _alike(way.servers):
            yield from (f"    {line}" for line in _judged(workloads, server))
        if way.more:
            yield f"    and {way.more} more workloads"


def _treated(indent: str, effects: Sequence[pb.Effect]) -> Iterator[str]:
    """One manifest has made all of them, as a rule."""
    rule = ""
    for effect in effects:
        if (now := _rule(effect.rule)) != rule:
            rule = now
            yield f"{indent}treated by {rule}"
        # A share is for what happens by chance; what has a bound happens to all beyond it.
        share = f"{effect.share:.4%}".rstrip("0%").rstrip(".") + "% " if effect.kind.startswith("fault.") else ""
        yield f"{indent}  {share}{effect.what}"


def _counted(a: pb.ExplainResponse) -> str:
    """The modes in which a request passes that policy denies."""
    modes = sorted({s.mode for way in a.ways for s in way.servers if s.passes and not s.allowed})
    return f" ({', '.join(modes)}: policy would deny it)" if modes else ""


def _alike(servers: Sequence[pb.Server]) -> list[tuple[list[str], pb.Server]]:
    """Those that answer the same in the same words, as one."""
    found: dict[bytes, tuple[list[str], pb.Server]] = {}
    for server in servers:
        same = type(server).FromString(server.SerializeToString())
        same.ClearField("workload")
        same.ClearField("ready")
        found.setdefault(same.SerializeToString(deterministic=True), ([], server))[0].append(server.workload)
    return list(found.values())


def _judged(workloads: Sequence[str], server: pb.Server) -> Iterator[str]:
    more = f" and {len(workloads) - SHOWN} more" if len(workloads) > SHOWN else ""
    word = "refused" if server.refused else "allowed" if server.allowed else "denied"
    counted = f", but passes: the mode is {server.mode}" if server.passes and not server.allowed else ""
    yield f"{word}{counted} at {', '.join(workloads[:SHOWN])}{more}, as {server.identity}, port {server.app_port}"
    if server.refused:
        yield f"  {server.refused}"
    elif server.allowed:
        yield from (f"  by {_rule(rule)}" for rule in server.by)
        if not server.by:
            yield "  by the proxy itself: health checks are answered to everyone in the mesh"
    elif not server.misses:
        yield "  no manifest allows anything to anyone here, or anything like it: the default is to deny"
    for miss in server.misses:
        yield f"  not by {_rule(miss.rule)}"
        yield from (f"      {why}" for why in miss.why)
    yield from _treated("  ", server.effects)
    for manifest in server.left_out:
        yield f"  its proxy goes without {named_by(manifest)}, which it refused"


def _rule(rule: pb.Rule) -> str:
    return f"{named_by(rule.manifest)}  {rule.file}:{rule.line}" if rule.file else named_by(rule.manifest)


def as_json(answer: pb.ExplainResponse) -> str:
    from google.protobuf.json_format import MessageToDict

    data = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(data, indent=2, ensure_ascii=False)
