"""`smc get`: the stored manifests, as a table or as data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say
from smc.cli.completion import complete_kind, complete_name
from smc.cli.kinds import KIND_HELP, namespace_of, resolve, split_name
from smc.cli.session import Session, connected
from smc.cli.table import age, table

if TYPE_CHECKING:
    from smc.manifests import Kind

FORMATS = ("table", "wide", "json", "yaml", "name")

Spec = Mapping[str, Any]


def _split(spec: Spec) -> tuple[str, ...]:
    backends = ", ".join(f"{b['service']}={b['weight']}" for b in spec.get("backends", ()))
    return str(spec.get("service", "")), backends


def _target(spec: Spec) -> tuple[str, ...]:
    sources = ", ".join(str(s.get("name", "")) for s in spec.get("sources", ()))
    return str(spec.get("destination", {}).get("name", "")), sources


def _routes(spec: Spec) -> tuple[str, ...]:
    return (", ".join(str(m.get("name", "")) for m in spec.get("matches", ())),)


def _service(spec: Spec) -> tuple[str, ...]:
    return (", ".join(f"{p.get('port', '')}/{p.get('protocol', 'http')}" for p in spec.get("ports", ())),)


def _workload(spec: Spec) -> tuple[str, ...]:
    return (
        str(spec.get("address", "")),
        str(spec.get("serviceAccount", "")),
        ", ".join(map(str, spec.get("services", ()))),
    )


COLUMNS: Mapping[str, tuple[tuple[str, ...], Callable[[Spec], tuple[str, ...]]]] = {
    "TrafficSplit": (("SERVICE", "BACKENDS"), _split),
    "TrafficTarget": (("DESTINATION", "SOURCES"), _target),
    "HTTPRouteGroup": (("MATCHES",), _routes),
    "Service": (("PORTS",), _service),
    "Workload": (("ADDRESS", "SERVICE ACCOUNT", "SERVICES"), _workload),
}
"""By kind: what is worth seeing of its spec."""


@click.command(help=f"List the manifests of a kind, or show one.\n\n{KIND_HELP}")
@click.argument("kind", shell_complete=complete_kind)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option("-A", "--all-namespaces", is_flag=True)
@click.option("-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True)
@connected
def get(
    session: Session,
    kind: str,
    name: str | None,
    namespace: str,
    all_namespaces: bool,
    output: str,
) -> None:
    from smc.v1 import smc_pb2 as pb

    kind, name = split_name(kind, name)
    known = resolve(kind)
    if name and all_namespaces and known.namespaced:
        raise click.UsageError("a NAME is in one namespace: give -n instead of -A")
    if name:
        found = session.call(
            "Get",
            pb.GetRequest(group=known.group, kind=known.name, namespace=namespace_of(known, namespace), name=name),
        )
        say.out(render([found], known, output, single=True))
        return
    everywhere = all_namespaces or not known.namespaced
    listed = session.call(
        "List", pb.ListRequest(group=known.group, kind=known.name, namespace="" if everywhere else namespace)
    )
    if not listed.objects and output in ("table", "wide", "name"):
        where = "" if everywhere else f" in namespace {namespace}"
        say.note(f"no {known.plural} found{where}")
        return
    say.out(render(listed.objects, known, output, with_namespace=all_namespaces and known.namespaced))


def render(
    objects: Sequence[Any],
    kind: Kind,
    output: str,
    *,
    single: bool = False,
    with_namespace: bool = False,
    now: float | None = None,
) -> str:
    """The objects in one of FORMATS.

    JSON is one object, or a List, with `status`; YAML is one document for each, as it can be applied again.
    """
    if output == "name":
        return "\n".join(f"{kind.name.lower()}/{o.name}" for o in objects)
    if output == "json":
        plain = [as_data(o) for o in objects]
        document: Any = plain[0] if single else {"apiVersion": "v1", "kind": "List", "items": plain}
        return json.dumps(document, indent=2, ensure_ascii=False)
    if output == "yaml":
        return "---\n".join(_written(o) for o in objects).rstrip("\n")
    return _table(objects, kind, wide=output == "wide", with_namespace=with_namespace, now=now)


def _written(object_: Any) -> str:
    """The manifest, fit to be applied again; what the control plane adds to it is a comment."""
    applied = f"{datetime.fromtimestamp(object_.created, UTC):%Y-%m-%dT%H:%M:%SZ}"
    comment = f"# version {object_.resource_version}, created {applied}, by {object_.author}; {status(object_)}\n"
    return comment + as_yaml(json.loads(object_.json))


def _table(objects: Sequence[Any], kind: Kind, *, wide: bool, with_namespace: bool, now: float | None) -> str:
    names, cells = COLUMNS.get(kind.name, ((), lambda _spec: ()))
    header = [*(("NAMESPACE",) if with_namespace else ()), "NAME", *names, "STATUS", "AGE"]
    if wide:
        header += ["VERSION", "WRITTEN IN", "AUTHOR"]
    rows = []
    for o in objects:
        row = [*((o.namespace,) if with_namespace else ()), o.name, *_cells(cells, o), status(o), age(o.created, now)]
        if wide:
            row += [str(o.resource_version), f"{o.file}:{o.line}", o.author.rpartition("/")[2]]
        rows.append(row)
    return table(header, rows)


def _cells(cells: Callable[[Spec], tuple[str, ...]], object_: Any) -> tuple[str, ...]:
    """What a newer version wrote may have another shape: then the columns are unknown, not an error."""
    try:
        return cells(json.loads(object_.json).get("spec") or {})
    except (AttributeError, KeyError, TypeError, ValueError):
        return ("?",) * len(COLUMNS[object_.kind][0])


def status(object_: Any) -> str:
    """In a word: is it in effect?"""
    parts = []
    for severity, word in (("error", "problem"), ("warning", "warning")):
        if number := sum(p.severity == severity for p in object_.problems):
            parts.append(f"{number} {word}{'s' if number > 1 else ''}")
    if proxies := len({nack.proxy for nack in object_.nacks}):
        parts.append(f"refused by {proxies} prox{'ies' if proxies > 1 else 'y'}")
    return ", ".join(parts) or "ok"


def as_data(object_: Any) -> dict[str, Any]:
    """The manifest as it was written, with what the control plane knows of it in `metadata` and `status`."""
    data: dict[str, Any] = json.loads(object_.json)
    metadata = dict(data.get("metadata") or {})
    metadata["name"] = object_.name
    if object_.namespace != "-":
        metadata["namespace"] = object_.namespace
    metadata["creationTimestamp"] = f"{datetime.fromtimestamp(object_.created, UTC):%Y-%m-%dT%H:%M:%SZ}"
    metadata["resourceVersion"] = str(object_.resource_version)
    rest = {k: v for k, v in data.items() if k not in ("apiVersion", "kind", "metadata", "status")}
    return {
        "apiVersion": data.get("apiVersion", f"{object_.group}/{object_.version}"),
        "kind": object_.kind,
        "metadata": metadata,
        **rest,
        "status": {
            "problems": [
                {"reason": p.reason, "message": p.message, "field": p.field, "severity": p.severity}
                for p in object_.problems
            ],
            "refusedBy": [
                {"proxy": n.proxy, "type": n.type_url, "resource": n.resource, "text": n.text} for n in object_.nacks
            ],
            "author": object_.author,
            "file": object_.file,
            "line": object_.line,
        },
    }


def as_yaml(data: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text
