"""That each fault which the design names is noticed: by a test, or by a claim of `smc demo --check`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mutants import DEMO, UNIT, Caught, Mutant, Refuted, Survived, Tree, check_caught, check_refuted, check_sound
from tests.mutants import copied as a_copy


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    with a_copy() as tree:
        yield tree


def test_without_any_mutant_the_tests_pass(tree: Tree) -> None:
    check_sound(tree, UNIT)


@pytest.mark.parametrize("mutant", UNIT, ids=lambda mutant: mutant.name)
def test_a_test_notices(tree: Tree, mutant: Caught) -> None:
    check_caught(tree, mutant)


@pytest.mark.parametrize("mutant", DEMO, ids=lambda mutant: mutant.name)
def test_the_demo_names_the_claim_that_does_not_hold(tree: Tree, mutant: Refuted) -> None:
    check_refuted(tree, mutant)


@pytest.mark.parametrize(
    "edit", [("no such text", ""), ("self", "himself")], ids=["it is not there", "it is there more than once"]
)
def test_a_mutant_that_a_refactoring_made_void_is_an_error(tree: Tree, edit: tuple[str, str]) -> None:
    with pytest.raises(Survived, match="not once"), tree.hurt(Mutant("void", "smc/pipeline.py", (edit,))):
        pass


def test_a_mutant_that_changes_nothing_survives(tree: Tree) -> None:
    same = UNIT[0].edits[0][0]
    harmless = Caught("harmless", UNIT[0].file, ((same, f"{same}  # the same"),), UNIT[0].tests)
    with pytest.raises(Survived, match="pass all the same"):
        check_caught(tree, harmless)
