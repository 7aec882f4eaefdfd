"""A whole mesh on one machine: what `smc demo` shows, and what the end-to-end tests stand on.

The programs in here run as processes of their own, so importing this package has to stay cheap.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """The command, imported when it is asked for."""
    if name == "demo":
        from smc.demo.command import demo

        return demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
