"""The mesh at a revision: every record joined, indexed and compiled, and nothing rebuilt that did not change.

A build is a chain of stages, each a module here, and each reads only the stages before it:

    reading -> sources -> revocations, traffic -> served -> compiled -> splits -> bindings -> permissions
            -> quarantines -> callers -> listening -> proxies

and `addresses` and `egress` beside it, which need the sources alone. `problems` gathers what all of them find.

Every stage keeps its results in tables (`tables.py`). A build forks the tables of the one before, finds from the rows
that changed upstream which of its own rows they touch, and computes those anew, as a pure function of the stages
before. A row that comes out as it was stays the same object, and nothing downstream hears of it. So the work follows
the change, and a Mesh built step by step equals one that is built from nothing.
"""

from __future__ import annotations

from smc.mesh.building import build, with_revocations
from smc.mesh.nouns import Mesh, Proxy

__all__ = ["Mesh", "Proxy", "build", "with_revocations"]
