"""The kinds of SMI: a module for each of its API groups.

The published text leaves some cases open, and in some the common way to read it would widen access or move traffic that
nobody meant to move. Those are refused when they are written: an empty `matches`, a split whose root is one of its own
backends, weights that are all 0, and every name of another namespace.
"""

from __future__ import annotations

from smc.manifests import Kind
from smc.smi import access, specs, split

GROUPS = frozenset({split.SPLIT, access.ACCESS, specs.SPECS})

KINDS: tuple[Kind, ...] = (*split.KINDS, *access.KINDS, *specs.KINDS)
"""What `smc.manifests.read` needs to know of SMI."""
