"""What a process uses, and what many measurements come to."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process, at a moment."""

    cpu: float
    """Seconds, of all its threads, those that have ended included."""
    resident: int
    """Bytes."""

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return cls(cpu(pid), int(status["VmRSS"].split()[0]) * 1024)


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used: what /proc/<pid>/stat counts in ticks of 10 ms, in nanoseconds.

    Linux gives every process a clock of its own: see clock_getcpuclockid(3).
    """
    return time.clock_gettime(~pid << 3 | 2)


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    p99: float
    """The greatest, if there are less than a hundred."""
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
        return cls(round(statistics.median(ordered), 3), round(p99, 3), round(ordered[-1], 3))


@dataclass(frozen=True, slots=True)
class Machine:
    cpus: int
    model: str
    kernel: str
    python: str
    grpcio: str
    load: float
    """Of the last minute, before the run: on a quiet machine well below 1."""

    @classmethod
    def here(cls) -> Machine:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return cls(
            len(models),
            models[0] if models else "unknown",
            platform.release(),
            platform.python_version(),
            version("grpcio"),
            float(Path("/proc/loadavg").read_text().split()[0]),
        )
