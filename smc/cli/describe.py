"""`smc describe`: one manifest, and all that the mesh has to say about it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from smc.cli import say
from smc.cli.completion import complete_kind, complete_name
from smc.cli.get import as_yaml
from smc.cli.kinds import KIND_HELP, namespace_of, resolve, split_name
from smc.cli.pages import examples
from smc.cli.session import Session, connected
from smc.cli.table import age

SHOWN = 20
"""Proxies that are named."""


@click.command(
    help=f"""Show a manifest with its problems, who refuses it, and which proxies it reached.

{KIND_HELP}
A manifest reaches a proxy whose routes or policy are made from it. Those that have not ACKed it as it is now come
first, and why they have not. Of a service it says where intercepted applications dial it.
""",
    epilog=examples("smc describe trafficsplit bookstore -n shop", "smc describe tt/buyer-to-bookstore -n shop"),
)
@click.argument("kind", shell_complete=complete_kind)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("-n", "--namespace", default="default", show_default=True)
@connected
def describe(session: Session, kind: str, name: str | None, namespace: str) -> None:
    from smc.v1 import smc_pb2 as pb

    kind, name = split_name(kind, name)
    if not name:
        raise click.UsageError("NAME is missing")
    known = resolve(kind)
    request = pb.GetRequest(group=known.group, kind=known.name, namespace=namespace_of(known, namespace), name=name)
    found = session.call("Get", request)
    say.out(text(found, session.call("Reach", request)))


def text(object_: Any, reach: Any, now: float | None = None) -> str:
    """What Get and Reach answer."""
    o = object_
    created = datetime.fromtimestamp(o.created, UTC)
    data = json.loads(o.json)
    lines = [
        f"Name:        {o.name}",
        *([f"Namespace:   {o.namespace}"] if o.namespace != "-" else []),
        f"Kind:        {o.kind} ({o.group}/{o.version})",
        f"Created:     {created:%Y-%m-%d %H:%M:%S} UTC ({age(o.created, now)} ago)",
        f"Author:      {o.author}",
        f"Written in:  {o.file}:{o.line}",
        f"Version:     {o.resource_version}",
        *([f"Address:     {o.address}{_virtual(o.address, data)}"] if o.address else []),
    ]
    body = {k: v for k, v in data.items() if k not in ("apiVersion", "kind", "metadata", "status")}
    lines += [*as_yaml(body).rstrip("\n").splitlines()] if body else []
    lines.append("Problems:" if o.problems else "Problems:    none")
    for p in o.problems:
        lines.append(f"  {p.severity}  {p.reason}{'  ' + p.field if p.field else ''}")
        lines.append(textwrap.indent(p.message, "    "))
    lines.append("Refused by:" if o.nacks else "Refused by:  no proxy")
    for n in o.nacks:
        lines.append(f"  {n.proxy}  {n.type_url.rpartition('.')[2]} {n.resource}  (version {n.resource_version})")
        lines.append(textwrap.indent(n.text, "    "))
    return "\n".join([*lines, *_reached(reach)])


def _virtual(address: str, data: Any) -> str:
    """That it is not written in the manifest."""
    own = (data.get("spec") or {}).get("address")
    return "" if own == address else " (virtual: where intercepted applications dial it)"


def _reached(reach: Any) -> Iterator[str]:
    """Those that lack it first, in full; then the others by name."""
    if not reach.proxies:
        yield "Reached:     no proxy has anything that comes from it by name"
        return
    yield f"Reached:     {reach.acked} of {reach.proxies} proxies have ACKed it"
    shown = reach.reached[:SHOWN]
    for r in shown:
        yield f"  {r.proxy}  {' '.join(r.state.split())}"
    if more := reach.proxies - len(shown):
        yield f"  and {more} more"
