"""`smc diff`: what a change would make different, proxy by proxy, without making it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say
from smc.cli.apply import file_options, say_findings
from smc.cli.documents import read_all
from smc.cli.get import as_yaml
from smc.cli.kinds import named_by
from smc.cli.pages import examples
from smc.cli.session import InvalidDocument, Session, connected

if TYPE_CHECKING:
    from smc.v1 import smc_pb2 as pb

EXAMPLES = examples(
    "smc diff -f split.yaml",
    "smc diff -f policy/ -n shop -o json",
    "smc diff -f old.yaml --delete",
    exits={
        0: "no proxy would notice, and no problem would come or go",
        1: "there are differences",
        7: "it failed: a document is refused, for one",
    },
)


@click.command(epilog=EXAMPLES)
@file_options
@click.option("--delete", is_flag=True, help="As if the manifests were deleted.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@connected
def diff(session: Session, files: tuple[str, ...], namespace: str, delete: bool, output: str) -> None:
    """Show what applying manifests would change at which proxies, without applying anything.

    The control plane builds the mesh with the change beside the one that it serves, and compares what the proxies would
    be sent. Proxies for which the difference is the same are told once. Problems that would come and go are listed. Of
    a secret it is said that it would change, and never how.
    """
    from smc.v1 import smc_pb2 as pb

    documents = read_all(files)
    request = pb.DiffRequest(
        documents=[pb.Document(text=d.text, file=d.file, line=d.line) for d in documents],
        namespace=namespace,
        delete=delete,
    )
    try:
        answer = session.call("Diff", request)
    except InvalidDocument as e:
        say_findings(e)
        raise say.Reported(say.UNANSWERED) from None
    if output == "json":
        say.out(json.dumps(as_data(answer), indent=2, ensure_ascii=False))
    elif lines := list(_lines(answer)):
        say.out("\n".join(lines))
    else:
        say.note("no proxy would notice")
    if answer.differences or answer.come or answer.go:
        raise say.Reported


def _lines(answer: pb.DiffResponse) -> Iterator[str]:
    yield from (f"{named_by(change.manifest)} would be {change.change}" for change in answer.changes)
    if answer.proxies:
        yield f"\n{_proxies(answer.proxies)} would be sent something else"
    for difference in answer.differences:
        more = f" and {difference.more} more" if difference.more else ""
        yield f"\n=== {', '.join(difference.proxies)}{more}"
        for resource in difference.resources:
            yield from _resource(resource)
    for label, colour, told in (("come", "red", answer.come), ("go", "green", answer.go)):
        if told:
            yield f"\nProblems that would {label}:"
        for t in told:
            field = f" {t.problem.field}" if t.problem.field else ""
            yield say.colour(f"  {named_by(t.manifest)}{field}: {t.problem.reason}: {t.problem.message}", colour)
    if answer.more:
        yield f"\nand {answer.more} more things that are not shown"


def _proxies(number: int) -> str:
    return f"{number} prox{'ies' if number > 1 else 'y'}"


def _resource(r: pb.ChangedResource) -> Iterator[str]:
    by = f"  from {', '.join(named_by(manifest) for manifest in r.sources)}" if r.sources else ""
    yield say.colour(f"{r.change} {r.type} {r.name}", "cyan") + by
    before, after = (as_yaml(json.loads(text)).splitlines() if text else [] for text in (r.before, r.after))
    # The two lines that name files, and those that number lines, tell nothing here.
    for line in list(difflib.unified_diff(before, after, lineterm="", n=2))[2:]:
        marked = {"+": "green", "-": "red"}.get(line[0])
        yield say.colour(line, marked) if marked else line


def as_data(answer: pb.DiffResponse) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    data: dict[str, Any] = MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for difference in data["differences"]:
        for resource in difference["resources"]:
            for side in ("before", "after"):
                resource[side] = json.loads(resource[side]) if resource[side] else None
    return data
