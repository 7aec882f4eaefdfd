"""`smc get`: the stored manifests, as a table or as data, once or as they change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from smc.cli import denials, say
from smc.cli.completion import complete_kind, complete_name
from smc.cli.kinds import KIND_HELP, namespace_of, resolve, split_name
from smc.cli.pages import WATCHED, examples
from smc.cli.session import Session, connected
from smc.cli.table import Columns, age, table
from smc.cli.watching import PATIENCE, Change, Changes, refuse, watch, watch_option
from smc.errors import NotFound

if TYPE_CHECKING:
    from smc.manifests import Kind

FORMATS = ("table", "wide", "json", "yaml", "name")

Spec = Mapping[str, Any]


def _split(spec: Spec, _: Any) -> tuple[str, ...]:
    backends = ", ".join(f"{b['service']}={b['weight']}" for b in spec.get("backends", ()))
    return str(spec.get("service", "")), backends


def _target(spec: Spec, _: Any) -> tuple[str, ...]:
    sources = ", ".join(str(s.get("name", "")) for s in spec.get("sources", ()))
    return str(spec.get("destination", {}).get("name", "")), sources


def _routes(spec: Spec, _: Any) -> tuple[str, ...]:
    return (", ".join(str(m.get("name", "")) for m in spec.get("matches", ())),)


def _service(spec: Spec, object_: Any) -> tuple[str, ...]:
    ports = ", ".join(f"{p.get('port', '')}/{p.get('protocol', 'http')}" for p in spec.get("ports", ()))
    return ports, object_.address


def _workload(spec: Spec, _: Any) -> tuple[str, ...]:
    return (
        str(spec.get("address", "")),
        str(spec.get("serviceAccount", "")),
        ", ".join(map(str, spec.get("services", ()))),
    )


def _mode(spec: Spec, _: Any) -> tuple[str, ...]:
    return (str(spec.get("mode", "")),)


Cells = Callable[[Spec, Any], tuple[str, ...]]
"""Of a spec, and of the object that the API shows."""

COLUMNS: Mapping[str, tuple[tuple[str, ...], Cells]] = {
    "TrafficSplit": (("SERVICE", "BACKENDS"), _split),
    "TrafficTarget": (("DESTINATION", "SOURCES"), _target),
    "NamespaceConfig": (("MODE",), _mode),
    "HTTPRouteGroup": (("MATCHES",), _routes),
    "Service": (("PORTS", "ADDRESS"), _service),
    "Workload": (("ADDRESS", "SERVICE ACCOUNT", "SERVICES"), _workload),
}
"""By kind: what is worth seeing of it."""


_HELP = f"""List the manifests of a kind, or show one.

{KIND_HELP}
ADDRESS of a service is where intercepted applications dial it: its own, or the virtual one that it keeps.

`smc get denials` lists what policy has denied, or would have denied where the mode is audit or permissive, as the
proxies have counted it since they started: requests by service port; connections that were refused at ports that speak
TCP together, as PORT tcp. The namespace is that of the workload that was called. gRPC programs without a proxy count
nothing.
"""


@click.command(
    help=_HELP,
    epilog=examples(
        "smc get services -A",
        "smc get trafficsplit bookstore -n shop -o yaml",
        "smc get tt -n shop --watch",
        "smc get denials -A",
        exits=WATCHED,
    ),
)
@click.argument("kind", shell_complete=complete_kind)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option("-A", "--all-namespaces", is_flag=True)
@click.option("-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True)
@watch_option
@connected
def get(
    session: Session,
    kind: str,
    name: str | None,
    namespace: str,
    all_namespaces: bool,
    output: str,
    watched: bool,
) -> None:
    from smc.v1 import smc_pb2 as pb

    kind, name = split_name(kind, name)
    if kind.lower() in denials.WORDS:
        if name:
            raise click.UsageError("denials have no names: -n chooses the namespace that was called")
        denials.show(session, "" if all_namespaces else namespace, output, watched=watched)
        return
    known = resolve(kind)
    if name and all_namespaces and known.namespaced:
        raise click.UsageError("a NAME is in one namespace: give -n instead of -A")
    everywhere = all_namespaces or not known.namespaced
    within = "" if everywhere else namespace
    one = pb.GetRequest(group=known.group, kind=known.name, namespace=namespace_of(known, namespace), name=name or "")
    all_ = pb.ListRequest(group=known.group, kind=known.name, namespace=within)
    if watched:
        refuse(output)
        watch(session, partial(_look, session, one if name else all_), _teller(known, output, all_namespaces))
    if name:
        say.out(render([session.call("Get", one)], known, output, single=True))
        return
    listed = session.call("List", all_)
    if not listed.objects and output in ("table", "wide", "name"):
        where = f" in namespace {within}" if within else ""
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
    rows = [_row(o, kind, wide=wide, with_namespace=with_namespace, now=now) for o in objects]
    return table(_header(kind, wide=wide, with_namespace=with_namespace), rows)


def _header(kind: Kind, *, wide: bool, with_namespace: bool) -> list[str]:
    names, _ = COLUMNS.get(kind.name, ((), None))
    header = [*(("NAMESPACE",) if with_namespace else ()), "NAME", *names, "STATUS", "AGE"]
    return [*header, "VERSION", "WRITTEN IN", "AUTHOR"] if wide else header


def _row(
    o: Any, kind: Kind, *, wide: bool, with_namespace: bool, now: float | None = None, deleted: bool = False
) -> list[str]:
    _, cells = COLUMNS.get(kind.name, ((), lambda _spec, _object: ()))
    state = "deleted" if deleted else status(o)
    row = [*((o.namespace,) if with_namespace else ()), o.name, *_cells(cells, o), state, age(o.created, now)]
    return [*row, str(o.resource_version), f"{o.file}:{o.line}", o.author.rpartition("/")[2]] if wide else row


def _look(session: Session, request: Any, _before: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the request finds now, by namespace and name; one that is not there is none."""
    from smc.v1 import smc_pb2 as pb

    if isinstance(request, pb.GetRequest):
        try:
            found = [session.call("Get", request, timeout=PATIENCE)]
        except NotFound:
            found = []
    else:
        found = session.call("List", request, timeout=PATIENCE).objects
    return {f"{o.namespace}/{o.name}": o for o in found}


def _teller(kind: Kind, output: str, all_namespaces: bool) -> Callable[[Changes[Any]], None]:
    """Prints changes in one of FORMATS but YAML; in JSON each is a line of its own."""
    shape = {"wide": output == "wide", "with_namespace": all_namespaces and kind.namespaced}
    columns = Columns(_header(kind, **shape))

    def tell(changes: Changes[Any]) -> None:
        if output == "json":
            for change, o in changes:
                say.out(json.dumps({"type": change, "object": as_data(o)}, ensure_ascii=False))
        elif output == "name":
            for _, o in changes:
                say.out(render([o], kind, output))
        elif changes:
            say.out(columns.text([_row(o, kind, deleted=c is Change.DELETED, **shape) for c, o in changes]))

    return tell


def _cells(cells: Cells, object_: Any) -> tuple[str, ...]:
    """What a newer version wrote may have another shape: then the columns are unknown, not an error."""
    try:
        return cells(json.loads(object_.json).get("spec") or {}, object_)
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
            **({"address": object_.address} if object_.address else {}),
            "author": object_.author,
            "file": object_.file,
            "line": object_.line,
        },
    }


def as_yaml(data: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text
