"""That the tests can fail: each fault that the design names is put into a copy of the tree, and a test must notice.

    python -m tests.mutants [NAME …]

A mutant is a small change of one file. The text that it replaces must be there exactly once, so that no refactoring
makes it void without a word; and what notices it must hold of the tree as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
UNIT_TIME, DEMO_TIME = 60.0, 150.0
"""Seconds that one run may take, on a machine that is busy."""


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    """(what is there exactly once, what takes its place)"""


@dataclass(frozen=True, slots=True)
class Caught(Mutant):
    """By tests, each of which must fail."""

    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refuted(Mutant):
    """By `smc demo --check`, which must say of this claim that it failed."""

    chapter: str
    claim: str


UNIT = (
    Caught(
        "no fence",
        "cluster/election.py",
        (("transact(operations, (*self.fence, *guards))", "transact(operations, guards)"),),
        (
            "tests/unit/cluster/test_election.py::test_what_a_leader_writes_carries_its_fence",
            "tests/unit/cluster/test_election.py::test_a_leader_whose_clock_stood_still_is_fenced_at_its_first_write",
        ),
    ),
    Caught(
        "push before synced",
        "smc/pipeline.py",
        (("return self.mesh is not None and self._sources <= self.mesh.synced", "return self.mesh is not None"),),
        ("tests/unit/test_pipeline.py::test_a_replica_is_ready_once_every_source_was_observed_whole",),
    ),
    Caught(
        "a revoked proxy keeps its stream",
        "smc/pipeline.py",
        (("if why := mesh.refuses(name, slot.serial):", 'if why := "":'),),
        (
            "tests/unit/test_pipeline.py::"
            "test_whoever_is_revoked_is_ended_at_once_and_gets_nothing_of_the_mesh_that_says_so",
        ),
    ),
    Caught(
        "a call outlives the revocation of its caller",
        "smc/api/calls.py",
        (
            (
                "timeout=LOOK_AGAIN))[0]:\n                await self.admit(caller)",
                "timeout=LOOK_AGAIN))[0]:\n                pass",
            ),
        ),
        ("tests/unit/api/test_revocations.py::test_a_call_that_is_open_ends_when_its_caller_is_revoked",),
    ),
    Caught(
        "whoever is revoked takes it back on a replica that is behind",
        "smc/api/revocations.py",
        (
            (
                "guards = [admissions.unchanged(subject.key, item), *await may()]",
                "guards = [admissions.unchanged(subject.key, item)]",
            ),
        ),
        (
            "tests/unit/api/test_revocations.py::"
            "test_a_replica_whose_mesh_is_behind_writes_nothing_that_would_outlast_the_revocation",
        ),
    ),
    Caught(
        "a token that no replica has made is good",
        "smc/certificates/tokens.py",
        (("    if not keyring.proves(record.proof, *_proven(token, record)):\n", "    if False:\n"),),
        (
            "tests/unit/certificates/test_tokens.py::"
            "test_who_can_only_write_to_the_store_makes_no_token_and_nothing_else_of_one",
        ),
    ),
    Caught(
        "watch resumed at the header's revision",
        "cluster/etcd.py",
        (
            (
                "                response = await _receive(call)\n                if response.compact_revision:\n",
                "                response = await _receive(call)\n"
                "                self.header_revision = response.header.revision\n"
                "                if response.compact_revision:\n",
            ),
            (
                "                self._blame(endpoint, str(e))\n                if retry.fresh:\n"
                '                    log.info("a watch broke',
                "                self._blame(endpoint, str(e))\n"
                '                seen = getattr(self, "header_revision", seen)\n'
                "                if retry.fresh:\n"
                '                    log.info("a watch broke',
            ),
        ),
        ("tests/contract/test_etcd.py::test_a_watch_is_resumed_after_what_was_delivered_not_at_what_a_header_says",),
    ),
    Caught(
        "the EDS re-send dropped",
        "smc/xds/stream.py",
        (("                    subscription.refresh(warm_name)\n", "                    pass\n"),),
        (
            "tests/unit/xds/test_stream.py::TestTrapsOfEnvoy::"
            "test_a_changed_cluster_without_its_assignment_warms_for_15_seconds",
            "tests/unit/xds/test_stream.py::TestReconnecting::"
            "test_a_changed_cluster_has_its_assignment_sent_although_the_client_has_it",
        ),
    ),
    Caught(
        "keepalive trusted",
        "cluster/election.py",
        (("                    await self._verify(term)\n", ""),),
        ("tests/unit/cluster/test_election.py::test_a_confirmed_renewal_is_checked_by_reading",),
    ),
    Caught(
        "initial_resource_versions ignored",
        "smc/xds/stream.py",
        (("initial = request.initial if first else {}", "initial: Mapping[str, str] = {}"),),
        (
            "tests/unit/xds/test_stream.py::TestReconnecting::"
            "test_what_the_client_has_is_not_sent_and_the_wildcards_get_one_empty_answer",
        ),
    ),
)

DEMO = (
    Refuted(
        "RBAC off",
        "smc/envoy/routes.py",
        # Without rules it switches the filter off.
        (("filter_pb2.RBACPerRoute(rbac=rbac)", "filter_pb2.RBACPerRoute()"),),
        "policy",
        "the bookthief is denied",
    ),
    Refuted(
        "the split ignored",
        "smc/mesh/splits.py",
        (("                targets = found\n", "                targets = own.targets\n"),),
        "shift",
        "traffic follows the split 100/0 within 1 s",
    ),
)


class Survived(Exception):
    """A mutant that nobody noticed, or of which nothing can be said."""


class Tree:
    """A copy of the tree, in which every import of ours is of the copy."""

    def __init__(self, root: Path) -> None:
        self._root = root
        (root / "tmp").mkdir()
        found = self._run(["-c", "import cluster, smc, tests; print(cluster.__file__, smc.__file__, tests.__file__)"])
        paths = found.stdout.split()
        if len(paths) != 3 or not all(Path(path).is_relative_to(root) for path in paths):
            raise Survived(f"in the copy {root} what is imported is {found.stdout or found.stderr}")

    @contextmanager
    def hurt(self, mutant: Mutant) -> Iterator[None]:
        """The mutant lives for as long as the block runs."""
        path = self._root / mutant.file
        whole = text = path.read_text()
        for old, new in mutant.edits:
            if (times := text.count(old)) != 1:
                raise Survived(f"{mutant.name}: {mutant.file} has {times} times, not once:\n{old}")
            text = text.replace(old, new)
        try:
            path.write_text(text)
            yield
        finally:
            path.write_text(whole)

    def failed(self, tests: Sequence[str]) -> frozenset[str]:
        """Which of these tests fail.

        Raises:
            Survived: they could not be run.
        """
        ran = self._run(["-m", "pytest", "-q", "-rf", "--no-header", "--tb=no", *tests])
        if ran.returncode not in (0, 1):
            raise Survived(f"these tests could not be run:\n{ran.stdout}{ran.stderr}")
        return frozenset(test for test in tests if f"FAILED {test}" in ran.stdout)

    def demo(self, chapter: str) -> tuple[int, str]:
        """Exit code and output of `smc demo --check`, of this chapter alone."""
        ran = self._run(["-m", "smc", "demo", "--check", "--only", chapter], DEMO_TIME)
        return ran.returncode, ran.stdout + ran.stderr

    def _run(self, arguments: Sequence[str], seconds: float = UNIT_TIME) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": str(self._root),
            # Neither an old byte code nor a new one: a mutant may have the size and the time of what it replaces.
            "PYTHONDONTWRITEBYTECODE": "1",
            # The demo keeps the logs of a claim that failed.
            "TMPDIR": str(self._root / "tmp"),
        }
        try:
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=self._root,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise Survived(f"not within {seconds:g} s: {' '.join(arguments)}") from e


@contextmanager
def copied() -> Iterator[Tree]:
    """What is in the tree now, of the files that are tracked."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory(prefix="smc-mutants-") as directory:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                copy = Path(directory, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy)
        yield Tree(Path(directory))


def check_sound(tree: Tree, mutants: Sequence[Caught]) -> None:
    """Without any mutant, each test that is named passes.

    Raises:
        Survived: one does not.
    """
    tests = [test for mutant in mutants for test in mutant.tests]
    if failed := tree.failed(tests):
        raise Survived(f"these fail without any mutant: {', '.join(sorted(failed))}")


def check_caught(tree: Tree, mutant: Caught) -> None:
    """Each of its tests fails.

    Raises:
        Survived: one does not.
    """
    with tree.hurt(mutant):
        if passed := sorted(set(mutant.tests) - tree.failed(mutant.tests)):
            raise Survived(f"{mutant.name}: these tests pass all the same: {', '.join(passed)}")


def check_refuted(tree: Tree, mutant: Refuted) -> None:
    """The demo ends with 1 and names the claim.

    Raises:
        Survived: it does not.
    """
    with tree.hurt(mutant):
        code, output = tree.demo(mutant.chapter)
    if code != 1 or f"failed: {mutant.claim} (" not in output:
        raise Survived(f"{mutant.name}: the demo ended with {code}, and did not name {mutant.claim!r}:\n{output}")


def main(names: Sequence[str]) -> int:
    known = [mutant.name for mutant in (*UNIT, *DEMO)]
    if strays := set(names) - set(known):
        sys.stderr.write(f"no such mutant: {', '.join(sorted(strays))}; there are {', '.join(known)}\n")
        return 2
    survived = 0
    with copied() as tree:
        for mutant in (*UNIT, *DEMO):
            if names and mutant.name not in names:
                continue
            try:
                if isinstance(mutant, Caught):
                    check_sound(tree, [mutant])
                    check_caught(tree, mutant)
                else:
                    check_refuted(tree, mutant)
            except Survived as e:
                survived += 1
                sys.stdout.write(f"SURVIVED  {e}\n")
            else:
                sys.stdout.write(f"caught    {mutant.name}\n")
            sys.stdout.flush()
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
