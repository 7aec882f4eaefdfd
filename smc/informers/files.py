"""A directory of Services and Workloads, in files that an operator or a tool writes: the simplest source.

Every `*.yaml`, `*.yml` and `*.json` directly in it is read; dot-files and what editors leave behind are not. It is
looked at again every POLL seconds, and only what changed is read. Write a new file by renaming it into place: one that
is written where it lies may be read half.

A file with a mistake hurts only itself: what it said before stays in effect, and each mistake is a Problem. What it
said before the first look is in the registry alone: a file that is bad from then on is `unknown`, so that nothing is
removed until it is mended. A directory that cannot be read is unknown as a whole; an empty one is empty.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smc import endpoints
from smc.errors import Unavailable
from smc.manifests import MAX_TEXT, OWN_KINDS, Finding, InvalidManifest, noun, read_all
from smc.model import Name, Observation, Problem, Service, Workload

NAME = "files"
SUFFIXES = (".yaml", ".yml", ".json")
KINDS = tuple(kind for kind in OWN_KINDS if kind.name in {"Service", "Workload"})
POLL = 0.5
"""Seconds between two looks at the directory."""
SETTLED = 1.0
"""Seconds after which a file's times are believed: a second write soon after the first may leave them as they are."""
_ATTEMPTS = 3
"""At reading a file that changes meanwhile."""


class FilesInformer:
    """`smc.informers.Informer` over a directory.

    It remembers nothing from one `observe` to the next: another replica may have led meanwhile, and have read more.
    """

    name = NAME

    def __init__(self, directory: Path, *, poll: float = POLL) -> None:
        self._directory = directory
        self._poll = poll

    async def observe(self) -> AsyncGenerator[Observation, None]:
        """As `Informer.observe`.

        Raises:
            Unavailable: the directory is gone, or may not be read.
        """
        known: Mapping[str, _File] | None = None
        last: Observation | None = None
        while True:
            files = await asyncio.to_thread(_look, self._directory, known)
            if known is None or _changed(known, files):
                observation = await asyncio.to_thread(_observation, files)
                if observation != last:
                    last = observation
                    yield observation
            known = files
            await asyncio.sleep(self._poll)


@dataclass(frozen=True, slots=True)
class _Object:
    noun: Service | Workload
    kind: str
    line: int


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was last seen."""

    stamp: tuple[int, ...] | None
    """Equal while the file is; None: look again."""
    digest: bytes
    """SHA-256 of what is in it; b"": it could not be read."""
    objects: tuple[_Object, ...] = ()
    """What the last version without a mistake says."""
    good: bool = False
    """Whether there was one."""
    unknown: bool = False
    """There may have been one before the first look: what it said is not known."""
    findings: tuple[Finding, ...] = ()
    """What is wrong with it now."""
    reason: str = ""
    """The word for it."""

    def wrong(self, findings: Sequence[Finding], reason: str) -> _File:
        return replace(self, findings=tuple(findings), reason=reason)


# ------------------------------------------------------------------------------------------------------------- reading


def _look(directory: Path, known: Mapping[str, _File] | None) -> Mapping[str, _File]:
    """Every file of the directory, sorted by name; one that did not change is the same object as in `known`.

    None: this is the first look.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as e:
        raise Unavailable(
            f"the directory {directory} cannot be read: {e.strerror}",
            hint="what was read from it before stays in effect; make it readable for the user that smc runs as",
        ) from e
    files: dict[str, _File] = {}
    for name in names:
        if name.startswith(".") or not name.endswith(SUFFIXES):
            continue
        # What is there at the first look may have been there before; of what comes later nobody has read anything.
        before = known.get(name) if known is not None else _File(None, b"", unknown=True)
        file = _file(directory / name, before)
        if file is not None:
            files[name] = file
    return files


def _file(path: Path, known: _File | None) -> _File | None:
    """Look at one file again; None: there is none."""
    try:
        for _ in range(_ATTEMPTS):
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                return None
            stamp = _stamp(found)
            if known is not None and known.stamp == stamp:
                return known
            with path.open("rb") as file:
                # One byte more than is taken, so that a file that is too large is refused and not cut.
                data = file.read(MAX_TEXT + 1)
                after = os.fstat(file.fileno())
            if _stamp(after) == stamp and len(data) == min(found.st_size, MAX_TEXT + 1):
                return _parsed(_text(path.name), stamp if _settled(found) else None, data, known)
        reason = "it is written to while it is read"
        hint = "write another file and rename it to this one"
    except OSError as e:
        if isinstance(e, FileNotFoundError) and not os.path.lexists(path):
            return None
        reason, hint = f"it cannot be read: {e.strerror}", "make it readable for the user that smc runs as"
    before = replace(known, stamp=None, digest=b"") if known else _File(None, b"")
    return before.wrong([Finding(_text(path.name), 0, 0, "", reason, hint)], "UnreadableFile")


def _text(name: str) -> str:
    """A file's name as it can be stored: one that is not UTF-8 has escapes."""
    return name.encode(errors="backslashreplace").decode()


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _settled(found: os.stat_result) -> bool:
    # Both are the file system's own times; one that is ahead of the clock is never believed.
    return max(found.st_mtime, found.st_ctime) + SETTLED < time.time()


def _parsed(name: str, stamp: tuple[int, ...] | None, data: bytes, known: _File | None) -> _File:
    digest = hashlib.sha256(data).digest()
    if known is not None and known.digest == digest:
        return replace(known, stamp=stamp)
    before = replace(known, stamp=stamp, digest=digest) if known else _File(stamp, digest)
    try:
        records = read_all(data, KINDS, file=name)
        objects = tuple(_Object(noun(record, KINDS), record.kind, record.line) for record in records)
    except InvalidManifest as e:
        return before.wrong(e.findings, "InvalidManifest")
    return _File(stamp, digest, objects, good=True)


def _changed(before: Mapping[str, _File], after: Mapping[str, _File]) -> bool:
    """Whether anything differs but the times."""
    return before.keys() != after.keys() or any(
        file is not before[name] and replace(file, stamp=None) != replace(before[name], stamp=None)
        for name, file in after.items()
    )


# ------------------------------------------------------------------------------------------------------------- joining


def _observation(files: Mapping[str, _File]) -> Observation:
    """What all files say together; of an object that is in two files the first one counts, by the files' names."""
    where: dict[tuple[str, Name], str] = {}
    services: list[Service] = []
    workloads: list[Workload] = []
    problems: list[Problem] = []
    for path, file in files.items():
        name = _text(path)
        problems.extend(_problem(name, file, finding) for finding in file.findings)
        for found in file.objects:
            first = where.setdefault((found.kind, found.noun.name), name)
            if first != name:
                message = f"{name}:{found.line}: {found.kind} {found.noun.name} is in {first} too, and that one counts"
                problems.append(Problem(_manifest(name), "Duplicate", f"{message}: remove one of them"))
            elif isinstance(found.noun, Service):
                services.append(found.noun)
            else:
                workloads.append(found.noun)
    joined, unmatched = endpoints.join(
        services,
        workloads,
        manifest_of_workload={n: _manifest(file) for (kind, n), file in where.items() if kind == "Workload"},
    )
    unknown = tuple(_text(path) for path, file in files.items() if file.unknown)
    if unknown:
        # The service may be in one of these.
        unmatched = tuple(problem for problem in unmatched if problem.reason != "ServiceNotFound")
    return Observation(
        services=tuple(sorted(services, key=lambda service: service.name)),
        endpoints=joined,
        workloads=tuple(sorted(workloads, key=lambda workload: workload.name)),
        problems=tuple(sorted([*problems, *unmatched])),
        unknown=tuple(sorted(unknown)),
    )


def _manifest(file: str) -> str:
    return f"{NAME}:{file}"


def _problem(name: str, file: _File, finding: Finding) -> Problem:
    hint = f" ({finding.hint})" if finding.hint else ""
    if file.good:
        effect = "what it said before stays in effect"
    elif file.unknown:
        effect = "what it said before is not known, so nothing is removed from the mesh until it is mended"
    else:
        effect = "nothing in it has effect"
    return Problem(_manifest(name), file.reason, f"{finding.where}: {finding.reason}{hint}; {effect}", finding.field)
