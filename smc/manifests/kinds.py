"""The table of kinds, and the one way from a text to records and from a record to what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smc.errors import NotFound
from smc.manifests import schema
from smc.manifests.findings import MAX_FINDINGS, Finding, InvalidManifest, Unfit, did_you_mean, one_of, shown
from smc.manifests.schema import BAD, Field, Findings, MapOf, Object, Text
from smc.manifests.text import MAX_DOCUMENT, Document, Node, bare, parse, plain
from smc.model import Name
from smc.records import ManifestRecord

DEFAULT_NAMESPACE = "default"
MESH_WIDE = "-"
"""The namespace of what has none."""


@dataclass(frozen=True, slots=True)
class Metadata:
    name: Name
    labels: tuple[tuple[str, str], ...]
    """Sorted."""


@dataclass(frozen=True, slots=True)
class Schema:
    """One version of a kind: its fields beside apiVersion, kind and metadata, and the noun that they make."""

    fields: tuple[Field, ...]
    noun: Callable[..., Any]
    """(Metadata, the fields' values in order) -> what the manifest says; may raise Unfit."""
    strange: Mapping[str, str] = field(default_factory=dict)
    """What to do about keys that are not taken but often met."""


@dataclass(frozen=True, slots=True)
class Kind:
    group: str
    name: str
    plural: str
    short_names: tuple[str, ...]
    versions: Mapping[str, Schema]
    """By name, the oldest first."""
    namespaced: bool = True
    name_is: Callable[[str], str] = schema.subdomain
    """Checks metadata.name; may raise Unfit."""

    @property
    def words(self) -> tuple[str, ...]:
        """What a user may call it, in lower case."""
        return (self.name.lower(), self.plural, *self.short_names, f"{self.plural}.{self.group}")


def find(kinds: Sequence[Kind], word: str) -> Kind:
    """The kind that a user calls `word`: TrafficSplit, trafficsplits, ts, trafficsplits.split.smi-spec.io.

    Raises:
        NotFound: no kind is called so.
    """
    for kind in kinds:
        if word.lower() in kind.words:
            return kind
    known = {w for kind in kinds for w in (kind.name.lower(), kind.plural)}
    raise NotFound(f"no kind of manifest is called {shown(word)}", hint=did_you_mean(word, known))


def read(
    text: str | bytes, kinds: Sequence[Kind], *, file: str, line: int = 1, author: str = "", now: float = 0.0
) -> ManifestRecord:
    """Read the one manifest that `text` holds; `line` is that of its first line in `file`.

    Args:
        author: the SPIFFE ID of who wrote it.
        now: seconds since 1970; when it was accepted.

    Raises:
        InvalidManifest: it is not exactly one manifest of these kinds without a mistake; it carries every finding.
    """
    if len(text) > MAX_DOCUMENT:
        reason = f"the document has more than {MAX_DOCUMENT} bytes"
        raise InvalidManifest([Finding(file, 0, 0, "", reason, "split it into several manifests")])
    first, *others = read_all(text, kinds, file=file, line=line, author=author, now=now)
    if others:
        reason = "a second document, where one is taken"
        raise InvalidManifest([Finding(file, others[0].line, 1, "", reason, "apply each on its own")])
    return first


def within(record: ManifestRecord, namespace: str) -> ManifestRecord:
    """Put a manifest that names no namespace into this one; "" leaves it where it is, and so does a mesh-wide kind.

    Raises:
        InvalidManifest: it names another, or no namespace may be called so.
    """
    if not namespace or record.name.namespace in (namespace, MESH_WIDE):
        return record
    metadata = record.object["metadata"]
    if "namespace" in metadata:
        at, reason = (
            _place(record, "metadata", "namespace"),
            f"it names its own namespace, and {namespace} was asked for",
        )
        finding = Finding(record.file, at.line, at.column, "metadata.namespace", reason, "leave one of the two out")
        raise InvalidManifest([finding])
    try:
        schema.label(namespace)
    except Unfit as e:
        raise InvalidManifest([Finding(record.file, record.line, 0, "", f"namespace {e.reason}", e.hint)]) from None
    placed = {**record.object, "metadata": {**metadata, "namespace": namespace}}
    return replace(record, name=Name(namespace, record.name.name), object=placed)


def _place(record: ManifestRecord, *path: str) -> Node:
    """Where a record's text has what is at this path, which is there."""
    (document,), _ = parse(record.text, file=record.file, line=record.line)
    node = document.root
    for key in path:
        assert isinstance(node.value, Mapping)  # noqa: S101 - it was read
        node = node.value[key].value
    return node


def read_all(
    text: str | bytes, kinds: Sequence[Kind], *, file: str, line: int = 1, author: str = "", now: float = 0.0
) -> tuple[ManifestRecord, ...]:
    """Read every manifest of a file: at least one, none twice. Arguments and errors as in `read`."""
    records: dict[str, ManifestRecord] = {}
    found, findings = parse(text, file=file, line=line)
    for document in found:
        try:
            record = _record(document, kinds, file, author, now)
        except InvalidManifest as e:
            findings.extend(e.findings)
            continue
        if first := records.get(record.id):
            reason = f"{record.kind} {_called(record.name)} is in the file twice"
            hint = f"it begins on line {first.line} too"
            findings.append(Finding(file, document.root.line, document.root.column, "", reason, hint))
        records[record.id] = record
    if not found and not findings:
        findings.append(Finding(file, 0, 0, "", "there is no manifest in it", "a manifest begins with apiVersion"))
    if findings:
        raise InvalidManifest(sorted(findings, key=lambda f: (f.line, f.column))[:MAX_FINDINGS])
    return tuple(records.values())


def noun(record: ManifestRecord, kinds: Sequence[Kind]) -> Any:
    """What a stored manifest says: the noun of its kind and version.

    Raises:
        InvalidManifest: this version of SMC does not take it, or it is not what its key says; the findings have fields,
            but no lines.
    """
    kind, version, metadata, found = _read(bare(record.object), kinds, "")
    if (kind.group, kind.name, version, metadata.name) != (record.group, record.kind, record.version, record.name):
        reason = f"stored as {record.id}, it says that it is {kind.group}/{kind.name}/{metadata.name}"
        raise InvalidManifest([Finding("", 0, 0, "", reason, "apply it again")])
    return found


def _called(name: Name) -> str:
    return name.name if name.namespace == MESH_WIDE else str(name)


def _record(document: Document, kinds: Sequence[Kind], file: str, author: str, now: float) -> ManifestRecord:
    kind, version, metadata, _ = _read(document.root, kinds, file)
    return ManifestRecord(
        group=kind.group,
        version=version,
        kind=kind.name,
        name=metadata.name,
        object=plain(document.root),
        text=document.text,
        file=file,
        line=document.line,
        created=now,
        author=author,
    )


def _read(root: Node, kinds: Sequence[Kind], file: str) -> tuple[Kind, str, Metadata, Any]:
    findings = Findings(file)
    result = _checked(root, kinds, findings)
    if findings.all:
        raise InvalidManifest(sorted(findings.all, key=lambda f: (f.line, f.column)))
    assert result is not None  # noqa: S101 - what was refused has a finding
    return result


def _checked(root: Node, kinds: Sequence[Kind], findings: Findings) -> tuple[Kind, str, Metadata, Any] | None:
    if not isinstance(root.value, Mapping):
        findings.add(root, "", "a manifest is a map", "it begins with apiVersion, kind and metadata")
        return None
    found = _kind(root, kinds, findings)
    if found is None:
        return None
    kind, version = found
    schema_ = kind.versions[version]
    metadata: list[Metadata] = []

    def build(_version: str, _kind: str, meta: Metadata, *values: Any) -> Any:
        metadata.append(meta)
        return schema_.noun(meta, *values)

    whole = Object(
        (
            Field("apiVersion", Text(), required=True),
            Field("kind", Text(), required=True),
            Field("metadata", _metadata(kind), required=True),
            *schema_.fields,
        ),
        build,
        {"status": "the control plane tells the status: remove it", **schema_.strange},
    )
    value = whole.read(root, "", findings)
    return None if value is BAD else (kind, version, metadata[0], value)


def _kind(root: Node, kinds: Sequence[Kind], findings: Findings) -> tuple[Kind, str] | None:
    """The kind and version that a manifest says it is of."""
    head = Object(
        (Field("apiVersion", Text(), required=True), Field("kind", Text(), required=True)), lambda *words: words
    )
    assert isinstance(root.value, Mapping)  # noqa: S101
    words = {name: entry for name, entry in root.value.items() if name in {"apiVersion", "kind"}}
    misspelt = {name: entry for name, entry in root.value.items() if name.lower() in {"apiversion", "api_version"}}
    read_ = head.read(Node(words | misspelt, root.line, root.column), "", findings)
    if read_ is BAD:
        return None
    api_version, name = read_
    group, _, version = api_version.rpartition("/")
    at = root.value["kind"].value
    named = [kind for kind in kinds if kind.name == name]
    if not named:
        if name == "List":
            findings.add(
                at, "kind", "lists are not taken", "write each item as a document of its own, after a line ---"
            )
        else:
            hint = did_you_mean(name, {kind.name for kind in kinds})
            findings.add(at, "kind", f"{shown(name)} is not known", hint)
        return None
    for kind in named:
        if kind.group == group and version in kind.versions:
            return kind, version
    at = root.value["apiVersion"].value
    taken = [f"{kind.group}/{version}" for kind in named for version in kind.versions]
    hint = one_of(taken) if len(taken) > 1 else f"write {taken[0]}"
    findings.add(at, "apiVersion", f"{name} is not known in version {shown(api_version)}", hint)
    return None


# ------------------------------------------------------------------------------------------------------------ metadata

_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_SERVER_SIDE = (
    "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "selfLink", "managedFields",
    "ownerReferences", "finalizers", "generateName",
)  # fmt: skip


def label_key(text: str) -> str:
    if not _LABEL_KEY.fullmatch(text):
        raise Unfit(f"{shown(text)} is no key of a label", "letters, digits and ._- , after at most one prefix and /")
    return text


def label_value(text: str) -> str:
    if not _LABEL_VALUE.fullmatch(text):
        raise Unfit(f"{shown(text)} is no value of a label: letters, digits and ._- , at most 63")
    return text


def _metadata(kind: Kind) -> Object:
    def build(name: str, namespace: str, labels: tuple[tuple[str, str], ...], _annotations: Any) -> Metadata:
        return Metadata(Name(namespace, name), labels)

    strange = dict.fromkeys(_SERVER_SIDE, "it means nothing here: remove it")
    fields = (
        Field("name", Text(kind.name_is), required=True),
        Field("namespace", Text(schema.label if kind.namespaced else _no_namespace), default=_default(kind)),
        Field("labels", MapOf(label_key, Text(label_value), most=100), default=()),
        Field("annotations", MapOf(label_key, Text(lines=True), most=100), default=()),
    )
    return Object(fields, build, strange)


def _default(kind: Kind) -> str:
    return DEFAULT_NAMESPACE if kind.namespaced else MESH_WIDE


def _no_namespace(text: str) -> str:
    raise Unfit(f"{shown(text)}: this kind is mesh-wide and has no namespace", "remove the line")
