"""The corpus, and a short random run, a different one each time. `make fuzz MINUTES=n` runs longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from ambassador.cli.arguments import MissingName, UsageError
from ambassador.cli.main import main, parse_arguments
from tests.fuzz.doors import DOORS, seeds
from tests.fuzz.mutate import nonsense

EXAMPLES = 120


@pytest.mark.parametrize("door", DOORS)
def test_corpus(door: str) -> None:
    """Every seed, and everything that was ever found."""
    files = seeds(door)
    assert files
    for path in files:
        try:
            DOORS[door](path.read_bytes())
        except BaseException as error:
            error.add_note(f"of {path}")
            raise


@pytest.mark.parametrize("door", DOORS)
def test_nonsense(door: str) -> None:
    """I1, I3, W4, D7: a short random run through every door."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(nonsense(door))
    def run(data: bytes) -> None:
        DOORS[door](data)

    run()


@pytest.mark.parametrize("path", seeds("arguments"), ids=lambda path: path.name)
def test_the_program_ends_with_a_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: what a bad command line prints, from the program's own entry: never a traceback."""
    words = [os.fsdecode(word) for word in path.read_bytes().split(b"\0")]
    monkeypatch.setattr(os, "environ", {})
    try:
        parse_arguments(words, {})
    except (UsageError, MissingName) as error:
        assert main(words) == error.exit_code
        first, *_ = capsys.readouterr().err.splitlines()
        assert first == str(error)
