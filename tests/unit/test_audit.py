"""The lock files of the image, which `make lock` writes and `make audit` looks up."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("run.txt", PROJECT["project"]["dependencies"]),
        ("build.txt", PROJECT["build-system"]["requires"]),
    ],
)
def test_what_the_project_needs_is_locked(file: str, wanted: list[str]) -> None:
    """An edit of pyproject.toml asks for `make lock`."""
    text = (REPO / "requirements" / file).read_text()
    entries = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    names = {re.split(r"[^A-Za-z0-9-]", each)[0].lower() for each in wanted}
    assert names <= {entry.partition("==")[0] for entry in entries}
    assert all(re.search(r"==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
