"""Keeps the machine's cores from going to sleep while something is measured.

A core that was idle is slow for some milliseconds, and one of a virtual machine has to be given back by the host first:
so a single change, after which nothing happens for a while, would be measured on a slower machine than one of many. On
each core runs a process that yields to everybody (SCHED_IDLE), and takes nothing but the time that nobody wants.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LOOK = 0.1
"""Seconds between two looks at whether anybody still measures."""


@contextmanager
def awake() -> Iterator[None]:
    """All cores that this process may use are, for as long as the block runs."""
    program = sys.executable, "-m", "bench.awake", str(os.getpid())
    with ExitStack() as processes:
        for core in sorted(os.sched_getaffinity(0)):
            process = processes.enter_context(subprocess.Popen([*program, str(core)]))
            processes.callback(process.kill)
        yield


def spin(parent: int, core: int) -> None:
    """Until the process `parent`, which has started this one, is gone."""
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while os.getppid() == parent:
        until = time.monotonic() + LOOK
        while time.monotonic() < until:
            pass


if __name__ == "__main__":
    spin(int(sys.argv[1]), int(sys.argv[2]))
