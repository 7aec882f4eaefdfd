"""SMI, the Service Mesh Interface: its kinds in every version that is read, and what they compile to."""

from __future__ import annotations

from smc.manifests import PolicyApi
from smc.smi.compiling import compile_namespace as compile  # noqa: A004
from smc.smi.kinds import GROUPS, KINDS

API = PolicyApi(GROUPS, compile)

__all__ = ["API", "GROUPS", "KINDS", "compile"]
