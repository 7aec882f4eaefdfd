"""`python -m smc` is `smc`."""

from __future__ import annotations

from smc.cli import main

main()
