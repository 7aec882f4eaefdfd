"""The command `smc demo`."""

from __future__ import annotations

import asyncio
import sys

import click
from rich.console import Console

from smc.demo.show import show
from smc.demo.story import CHAPTERS

INTERRUPTED, TERMINATED = 130, 143
EXAMPLES = """\b
Examples:
  smc demo
  smc demo --check

\b
Exit codes:
  0    every claim held
  1    one did not, and is named
  130  interrupted
  143  terminated
"""


@click.command(epilog=EXAMPLES)
@click.option("--check", is_flag=True, help="Without a terminal: print each claim with its figure, and end.")
@click.option("--only", type=click.Choice(CHAPTERS), multiple=True, help="Only this chapter; may be given again.")
def demo(check: bool, only: tuple[str, ...]) -> None:
    """Run a whole mesh on this machine, and show what it does. No root, no Kubernetes."""
    try:
        sys.exit(asyncio.run(show(Console(soft_wrap=True), check=check, only=only or CHAPTERS)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except asyncio.CancelledError:
        sys.exit(TERMINATED)
