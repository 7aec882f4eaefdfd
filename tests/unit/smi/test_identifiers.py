"""Every rule of SMI that is implemented has a test that bears its identifier, as in `test_ACCESS_7_…`."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]
RULES = {
    *(f"SPLIT_{number}" for number in range(1, 15)),
    *(f"ACCESS_{number}" for number in range(1, 14)),
    *(f"ROUTE_{number}" for number in range(1, 7)),
}


def _named(text: str) -> set[str]:
    return set(re.findall(r"def test_((?:SPLIT|ACCESS|ROUTE)_[0-9]+)_", text))


def test_every_rule_has_a_test_that_bears_its_identifier_and_no_test_bears_another() -> None:
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        found |= _named(path.read_text())
    assert sorted(RULES - found) == []
    assert sorted(found - RULES) == []


def test_the_table_explains_every_rule_and_no_other() -> None:
    text = (TESTS.parent / "smc/smi/README.md").read_text()
    assert {rule.replace("-", "_") for rule in re.findall(r"^\| ([A-Z]+-\d+) \|", text, re.MULTILINE)} == RULES
