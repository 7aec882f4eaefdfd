"""Where the versions of SMI have their fields: all under `spec`, or at the top of the manifest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smc.manifests.kinds import Schema
from smc.manifests.schema import Field, Object


def under_spec(*fields: Field, build: Callable[..., Any], strange: dict[str, str] | None = None) -> Schema:
    """A schema whose fields are all under `spec`; `build` makes of them a function of the metadata."""
    spec = Field("spec", Object(fields, build, strange or {}), required=True)
    moved = dict.fromkeys((f.name for f in fields), "in this version it is under spec")
    return Schema((spec,), lambda metadata, of: of(metadata), moved)


def at_top(*fields: Field, build: Callable[..., Any], strange: dict[str, str] | None = None) -> Schema:
    """A schema of the versions that have no `spec`; `build` makes of the fields a function of the metadata."""
    hints = {"spec": "this version has none: its fields are at the top"}
    return Schema(fields, lambda metadata, *values: build(*values)(metadata), hints | (strange or {}))
