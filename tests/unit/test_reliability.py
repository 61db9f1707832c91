"""docs/reliability.md: every fault has its row, and every test that it names exists and says so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOW_MANY = {"D": 14, "C": 13, "W": 8, "P": 6, "T": 17, "U": 17, "R": 8, "I": 4, "S": 9}
FAULTS = [f"{kind}{number + 1}" for kind, many in HOW_MANY.items() for number in range(many)]
ROW = re.compile(r"\| ([A-Z]\d+) \| (.+) \| (.+) \| (.+) \|")


def rows() -> dict[str, list[str]]:
    """The tests that the document names, by fault; fails where a fault has two rows."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "reliability.md").read_text().splitlines():
        if match := ROW.fullmatch(line):
            fault, _, _, tests = match.groups()
            assert fault not in found, f"{fault} has two rows"
            found[fault] = [name.strip().strip("`") for name in tests.split(",")]
    return found


def functions_in(file: str) -> set[str]:
    path = ROOT / "tests" / file
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_row() -> None:
    assert sorted(rows()) == sorted(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_named_tests_exist(fault: str) -> None:
    for name in rows()[fault]:
        file, _, test = name.partition("::")
        assert test.startswith("test_") and test in functions_in(file), name
