"""`smc validate`: what is wrong with manifests, told without a control plane by what would refuse them there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import click

from cluster.kv import KeyValue, View
from smc import manifests, plugins
from smc.cli import say
from smc.cli.documents import Document, read_all
from smc.cli.pages import examples
from smc.codec import encode
from smc.keys import Keys
from smc.manifests import Finding, InvalidManifest, Kind, PolicyApi, schema
from smc.manifests.text import Node
from smc.mesh import build
from smc.model import Problem, Severity
from smc.records import ManifestRecord, MeshRecord

FORMATS = ("text", "json", "sarif")
INVALID = "InvalidManifest"
"""The reason of what a manifest gets wrong all by itself: the control plane would refuse it."""
RUNNING = frozenset({"NotReady", "BackendNotReady", "NoBackend", "Quarantined"})
"""Reasons that only a mesh at work can have: no file is at fault."""
FOLLOWS = frozenset({"GrantsNothing", "MatchesNothing"})
"""Reasons that follow from others of the same manifest, and go when those go."""
HERE = frozenset({"MatchNotFound"})
"""What is missed is missed in a manifest that the files hold."""

_STEP = re.compile(r'\.?([A-Za-z0-9_-]+)|\[(\d+)]|\["((?:[^"\\]|\\.)*)"]')
_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True, slots=True)
class Told:
    """Something to mend."""

    severity: Severity
    rule: str
    """One CamelCase word: INVALID, or the reason of a Problem."""
    finding: Finding

    def __str__(self) -> str:
        field = f"{self.finding.field}: " if self.finding.field else ""
        return f"{self.finding.where}: {self.severity.value}: {field}{self.finding.reason} [{self.rule}]"


def check(
    documents: Sequence[Document], kinds: Sequence[Kind], policies: Sequence[PolicyApi], namespace: str = ""
) -> tuple[Told, ...]:
    """Say all that is wrong with the manifests, as each is and as they are together, in the order of the text.

    `namespace` is for those that name none, as `smc apply -n` has it; "" is the default one.

    Errors are what the control plane would refuse, and what has no or less effect whatever else the mesh holds.
    Warnings are what these files refer to and do not hold. What depends on a mesh at work is not told.
    """
    told: list[Told] = []
    accepted: dict[str, tuple[Document, ManifestRecord]] = {}
    for number, document in enumerate(documents):
        try:
            record = manifests.read(document.text, kinds, file=document.file, line=document.line, now=float(number))
            record = manifests.within(record, namespace)
        except InvalidManifest as e:
            told.extend(Told(Severity.ERROR, INVALID, finding) for finding in e.findings)
            continue
        if before := accepted.get(record.id):
            at, first = _root(document), f"{before[0].file}:{_root(before[0]).line}"
            reason = f"{record.kind} {record.name.name} is given twice, and only the last would count"
            found = Finding(document.file, at.line, at.column, "", reason, f"the first is at {first}: remove one")
            told.append(Told(Severity.ERROR, INVALID, found))
        accepted[record.id] = (document, record)
    told.extend(
        _told(problem, accepted[problem.manifest][0])
        for problem in _problems([record for _, record in accepted.values()], policies)
        if problem.manifest in accepted and problem.reason not in RUNNING
    )
    order = {document.file: number for number, document in reversed(list(enumerate(documents)))}
    return tuple(sorted(told, key=lambda t: (order[t.finding.file], t.finding.line, t.finding.column)))


def _problems(records: Iterable[ManifestRecord], policies: Sequence[PolicyApi]) -> Iterable[Problem]:
    """What a mesh of nothing but these manifests would say of them."""
    keys = Keys("files")
    stored = {keys.mesh: encode(MeshRecord("files", "mesh.invalid", ""))}
    stored |= {keys.manifest(record.id): encode(record) for record in records}
    items = {key: KeyValue(key, value, 1, 1) for key, value in stored.items()}
    mesh = build(None, View(0, 1, 1, MappingProxyType(items), frozenset(items)), policies)
    return [problem for found in mesh.problems.values() for problem in found]


def _root(document: Document) -> Node:
    (parsed,) = manifests.documents(document.text, file=document.file, line=document.line)
    return parsed.root


def _told(problem: Problem, document: Document) -> Told:
    at = locate(_root(document), problem.field)
    maybe = _may_be_elsewhere(problem.reason)
    severity = Severity.WARNING if maybe else Severity(problem.severity)
    hint = "these files do not hold it; if the mesh does, all is well" if maybe else ""
    found = Finding(document.file, at.line, at.column, problem.field, problem.message, hint)
    return Told(severity, problem.reason, found)


def _may_be_elsewhere(reason: str) -> bool:
    """Whether it may be no problem in the mesh: what these files refer to may be there already."""
    return reason in FOLLOWS or (reason.endswith("NotFound") and reason not in HERE)


def locate(root: Node, field: str) -> Node:
    """The value at a path such as `spec.backends[1].service`, or the nearest above it that is there."""
    node = root
    for name, index, quoted in _STEP.findall(field):
        match node.value:
            case Mapping() if (entry := node.value.get(name or quoted)) is not None:
                node = entry.value
            case list() | tuple() if index and int(index) < len(node.value):
                node = node.value[int(index)]
            case _:
                break
    return node


# ------------------------------------------------------------------------------------------------------------- to print


def as_text(told: Sequence[Told]) -> str:
    """One line each, as editors read them, and one below it for what to do."""
    lines = []
    for t in told:
        lines.append(str(t))
        if t.finding.hint:
            lines.append(f"  what to do: {t.finding.hint}")
    return "\n".join(lines)


def as_json(told: Sequence[Told], number: int) -> str:
    """`number` is that of the documents."""
    found = [
        {
            "severity": t.severity.value,
            "reason": t.rule,
            "file": t.finding.file,
            "line": t.finding.line,
            "column": t.finding.column,
            "field": t.finding.field,
            "message": t.finding.reason,
            "hint": t.finding.hint,
        }
        for t in told
    ]
    return json.dumps({"documents": number, "findings": found}, indent=2, ensure_ascii=False)


def as_sarif(told: Sequence[Told]) -> str:
    """One run in SARIF 2.1.0, the Static Analysis Results Interchange Format of OASIS. Columns count characters."""
    rules = sorted({t.rule for t in told})
    run = {
        "tool": {"driver": {"name": "smc", "rules": [{"id": rule} for rule in rules]}},
        "columnKind": "unicodeCodePoints",
        "results": [_result(t, rules.index(t.rule)) for t in told],
    }
    return json.dumps({"$schema": _SARIF, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False)


def _result(t: Told, rule: int) -> dict[str, Any]:
    f = t.finding
    text = ": ".join(part for part in (f.field, f.reason) if part)
    # Numbers in it begin with 1: what is not known is left out.
    region = {name: n for name, n in (("startLine", f.line), ("startColumn", f.column if f.line else 0)) if n}
    place: dict[str, Any] = {"artifactLocation": {"uri": _uri(f.file)}}
    return {
        "ruleId": t.rule,
        "ruleIndex": rule,
        "level": t.severity.value,
        "message": {"text": f"{text} ({f.hint})" if f.hint else text},
        "locations": [{"physicalLocation": place | ({"region": region} if region else {})}],
    }


def _uri(file: str) -> str:
    path = Path(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


# ---------------------------------------------------------------------------------------------------------- the command


@click.command(
    epilog=examples(
        "smc validate -f policy/",
        "smc validate -f policy/ -o sarif > smc.sarif",
        exits={1: "there is an error; with --strict also a warning"},
    )
)
@click.option(
    "-f", "--filename", "files", multiple=True, metavar="FILE|DIR|-", help="Manifests, YAML or JSON; may be repeated."
)
@click.option("-n", "--namespace", default="", help="For manifests that name none.")
@click.option("-o", "--output", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--strict", is_flag=True, help="Fail for warnings too.")
def validate(files: tuple[str, ...], namespace: str, output: str, strict: bool) -> None:
    """Check manifests without a control plane.

    Findings go to standard output; the exit code is 1 if there is an error. A warning is about what the files refer
    to and do not hold: the mesh may have it. What only a mesh at work can tell, `smc get` and `smc describe` show.
    """
    if namespace:
        try:
            schema.label(namespace)
        except ValueError as e:
            raise click.BadParameter(str(e), param_hint="--namespace") from None
    documents = read_all(files)
    told = check(documents, plugins.kinds(), plugins.policies(), namespace)
    if output == "sarif":
        say.out(as_sarif(told))
    elif output == "json":
        say.out(as_json(told, len(documents)))
    elif told:
        say.out(as_text(told))
    errors = sum(t.severity is Severity.ERROR for t in told)
    if output == "text":
        counted = (_count(len(documents), "manifest"), _count(errors, "error"), _count(len(told) - errors, "warning"))
        say.note(", ".join(counted))
    if errors or (strict and told):
        raise say.Reported


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
