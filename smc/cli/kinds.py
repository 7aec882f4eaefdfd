"""What users call a kind: `trafficsplit`, `trafficsplits`, `ts`, `trafficsplits.split.smi-spec.io`, in any case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from smc.errors import Invalid

if TYPE_CHECKING:
    from smc.cli.documents import Document
    from smc.manifests import Kind

KIND_HELP = """KIND is its name, its plural or its short name, in any case. The kinds:

\b
  Service          svc      TrafficSplit     ts
  Workload         wl       TrafficTarget    tt
  NamespaceConfig  nc       HTTPRouteGroup   htr
  MeshConfig       mc       TCPRoute         tr
  TrafficPolicy    tp       UDPRoute         ur
                            IdentityBinding  ib
"""


def known() -> Sequence[Kind]:
    """Every kind that this version knows."""
    from smc import plugins

    return plugins.kinds()


def resolve(word: str) -> Kind:
    """The kind that the user means.

    Raises:
        click.BadParameter: none is called so.
    """
    from smc.errors import NotFound
    from smc.manifests import find

    try:
        return find(known(), word)
    except NotFound as e:
        raise click.BadParameter(str(e), param_hint="KIND") from None


def split_name(kind: str, name: str | None) -> tuple[str, str | None]:
    """`trafficsplit/bookstore` is the same as `trafficsplit bookstore`."""
    word, slash, rest = kind.partition("/")
    if not slash:
        return kind, name
    if name or not rest or "/" in rest:
        raise click.UsageError(f"{kind!r} is not KIND/NAME, or a NAME follows it")
    return word, rest


def namespace_of(kind: Kind, namespace: str) -> str:
    """As the API has it: mesh-wide kinds have none."""
    from smc.manifests import DEFAULT_NAMESPACE, MESH_WIDE

    return (namespace or DEFAULT_NAMESPACE) if kind.namespaced else MESH_WIDE


def named_by(manifest: str) -> str:
    """How people name what is stored as `<group>/<kind>/<namespace>/<name>`: `trafficsplit/shop/bookstore`."""
    from smc.manifests import MESH_WIDE

    parts = manifest.split("/")
    if len(parts) != 4:  # it is an informer's, or a record that is no manifest
        return manifest
    _, kind, namespace, name = parts
    return f"{kind.lower()}/{name}" if namespace == MESH_WIDE else f"{kind.lower()}/{namespace}/{name}"


def identify(document: Document) -> tuple[Kind, str, str]:
    """Whose manifest a document is, by its head alone: kind, namespace ("" if it says none) and name.

    Raises:
        InvalidManifest: it cannot be read.
        Invalid: it does not say.
    """
    from smc.manifests import documents, find
    from smc.manifests.text import plain

    (parsed,) = documents(document.text, file=document.file, line=document.line)
    head = plain(parsed.root)
    try:
        kind = find(known(), f"{head['kind']}")
        return kind, str(head["metadata"].get("namespace", "")), str(head["metadata"]["name"])
    except (KeyError, TypeError, AttributeError):
        raise Invalid(
            "it does not say its kind and metadata.name", hint="what is deleted needs at least these"
        ) from None
