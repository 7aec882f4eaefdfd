"""`smc`, the command line. What it imports before it knows the command is light, so that `--help` is instant."""

from __future__ import annotations


def main() -> None:
    """The entry point of the program `smc`."""
    from smc.cli.program import program

    program(prog_name="smc")
