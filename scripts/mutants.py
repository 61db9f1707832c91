"""Break the ambassador in one place at a time and see the test that must notice: `make mutants`.

    python scripts/mutants.py [WORD ...]     those whose name, rows or file contain a WORD; else all

tests/mutants/mutants.toml has the list. Everything happens in a copy of the working tree, build/mutants, with
an Engine of its own where an image is needed. First each test must pass there with nothing broken; then, for
each mutant, it must fail. Exit code 1 where one does not, which is a test that does not test.

- A mutant counts as noticed only if pytest says that a test failed (exit code 1), not where nothing ran.
- Compiled modules are built again; a mutant that does not compile is a mistake in the list.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PLACE = REPO / "build" / "mutants"
LIST = REPO / "tests" / "mutants" / "mutants.toml"
COMPILED = {".pyx", ".pxd"}
PASSED, FAILED = 0, 1  # exit codes of pytest
LIMIT_S = 300


@dataclass(frozen=True)
class Mutant:
    """`new` instead of `old`, which occurs once in `file`; `test` must fail."""

    name: str
    rows: Sequence[str]
    file: str
    old: str
    new: str
    test: str

    def words(self) -> str:
        return " ".join((self.name, *self.rows, self.file))


def read() -> list[Mutant]:
    """Raises ValueError where the list does not fit the sources."""
    mutants = [Mutant(**entry) for entry in tomllib.loads(LIST.read_text())["mutant"]]
    for mutant in mutants:
        found = (REPO / mutant.file).read_text().count(mutant.old)
        if found != 1:
            raise ValueError(f"{mutant.name}: `old` occurs {found} times in {mutant.file}")
        if not (REPO / mutant.test.partition("::")[0]).exists():
            raise ValueError(f"{mutant.name}: there is no {mutant.test}")
    return mutants


def copy() -> None:
    """The working tree as git knows it, with what it has built: the next build is short."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listing.splitlines():
        source, target = REPO / name, PLACE / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)


def build() -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=PLACE, check=True, capture_output=True, timeout=LIMIT_S)


def outcome(test: str) -> int:
    """The exit code of pytest; one that is never done is a failure too."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(
            command, cwd=PLACE, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return FAILED
    (PLACE / "build").mkdir(exist_ok=True)
    (PLACE / "build" / "last.log").write_text(done.stdout + done.stderr)
    return done.returncode


def is_noticed(mutant: Mutant) -> bool:
    """Break, build, test, mend. (Mended sources are built with the next that is compiled.)"""
    path = PLACE / mutant.file
    whole = path.read_text()
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        if path.suffix in COMPILED:
            build()
        return outcome(mutant.test) == FAILED
    finally:
        path.write_text(whole)
        if path.suffix in COMPILED:
            build()


def main(words: Sequence[str]) -> int:
    chosen = [m for m in read() if not words or any(word in m.words() for word in words)]
    copy()
    build()
    tests = dict.fromkeys(mutant.test for mutant in chosen)
    for test in tests:
        _say(f"whole   {test}")
        if outcome(test) != PASSED:
            _say(f"        does not pass with nothing broken: see {PLACE}/build/last.log")
            return 1
    missed = []
    for mutant in chosen:
        begun = time.monotonic()
        noticed = is_noticed(mutant)
        took = f"{time.monotonic() - begun:4.0f} s"
        verdict = "noticed" if noticed else "MISSED "
        _say(f"{verdict} {took}  {' '.join(mutant.rows):8} {mutant.name}  ({mutant.test})")
        if not noticed:
            missed.append(mutant)
    _say(f"{len(chosen)} mutants, {len(missed)} missed")
    return 1 if missed else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
