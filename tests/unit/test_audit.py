"""The lock files and what the audit makes of its tool's answers (scripts/audit.py)."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
AUDIT = runpy.run_path(str(REPO / "scripts" / "audit.py"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())

FINE: dict[str, Any] = {"name": "idna", "version": "3.20", "vulns": []}
BAD = {
    "name": "docker",
    "version": "7",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["8"], "aliases": [], "description": ""}],
}
SKIPPED = {"name": "docker", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("entries", "code", "words"),
    [
        ([FINE, FINE | {"name": "docker"}], 0, "no known vulnerability in 2 packages"),
        ([FINE, BAD], 1, "docker 7: PYSEC-1"),
        ([FINE, SKIPPED], 3, "NOT CHECKED: docker"),
        ([SKIPPED], 3, "NOT CHECKED: docker, idna"),
        ([BAD], 1, "NOT CHECKED: idna"),
        ([], 3, "NOT CHECKED: docker, idna"),
    ],
)
def test_what_was_not_looked_up_is_no_pass(entries: list[Any], code: int, words: str) -> None:
    answer = json.dumps({"dependencies": entries})
    assert AUDIT["verdict"](answer, ["docker", "idna"])[0] == code
    assert words in "\n".join(AUDIT["verdict"](answer, ["docker", "idna"])[1])


@pytest.mark.parametrize("answer", ["", "[]", "{}", "<html>", "null"])
def test_no_answer_is_no_pass(answer: str) -> None:
    code, lines = AUDIT["verdict"](answer, ["docker"])
    assert code == 3
    assert "NOT CHECKED" in lines[0]


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("run.txt", PROJECT["project"]["dependencies"]),
        ("build.txt", PROJECT["build-system"]["requires"]),
    ],
)
def test_what_the_project_needs_is_locked(file: str, wanted: list[str]) -> None:
    """An edit of pyproject.toml asks for `make lock`."""
    path = REPO / "requirements" / file
    names = {re.split(r"[^A-Za-z0-9-]", each)[0].lower() for each in wanted}
    assert names <= set(AUDIT["locked"](path))
    entries = re.split(r"^(?=[a-z])", path.read_text(), flags=re.MULTILINE)[1:]
    assert all(re.search(r"==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
