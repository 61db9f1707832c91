"""Breaks the ambassador in one place at a time and runs the test that must fail: `make mutants`.

    python -m tests.mutants [WORD ...]    those whose name, rows or file contain a WORD; else all

mutants.toml has the list. All of it happens in a copy of the working tree, build/mutants; the copy
has an Engine of its own if a test needs one. First each test must pass with nothing broken; then it
must fail for each mutant. Exit code 1: it passed for one, so it does not test.

- A mutant counts as noticed only if the test itself failed, not if a fixture did or nothing ran.
- Compiled modules are built again; a mutant that does not compile is a mistake in the list.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

REPO = Path(__file__).resolve().parents[2]
PLACE = REPO / "build" / "mutants"
LOG = PLACE / "build" / "last.log"
LIST = Path(__file__).with_name("mutants.toml")
COMPILED = {".pyx", ".pxd"}
DOCKER_TESTS = "tests/docker/"
LIMIT_S = 300


class Outcome(enum.Enum):
    PASSED = enum.auto()
    FAILED = enum.auto()
    NOTHING = enum.auto()  # a fixture failed, nothing ran, or it did not end


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
    """Read the list; raises ValueError if it does not fit the sources."""
    mutants = [Mutant(**entry) for entry in tomllib.loads(LIST.read_text())["mutant"]]
    for mutant in mutants:
        found = (REPO / mutant.file).read_text().count(mutant.old)
        if found != 1:
            raise ValueError(f"{mutant.name}: `old` occurs {found} times in {mutant.file}")
        if not _exists(mutant.test):
            raise ValueError(f"{mutant.name}: there is no {mutant.test}")
    return mutants


def _exists(test: str) -> bool:
    path, _, function = test.partition("::")
    file = REPO / path
    return file.exists() and (not function or f"def {function}(" in file.read_text())


def copy() -> None:
    """Copy the working tree as git knows it. What was built there stays: the next build is short."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listing.splitlines():
        source, target = REPO / name, PLACE / name
        if not source.is_file():
            target.unlink(missing_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)


def build() -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=PLACE, check=True, capture_output=True, timeout=LIMIT_S)


@contextlib.contextmanager
def engine(*, needed: bool) -> Iterator[dict[str, str]]:
    """Give the environment for the tests, and the copy's private Engine for as long as needed."""
    # No .pyc: one written within the second of a change would pass for the changed file's.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "scripts/engine.py"]
    if not needed:
        yield environment
        return
    begin = subprocess.run(
        [*command, "up", "--private"], cwd=PLACE, stdout=subprocess.PIPE, check=True
    )
    try:
        yield environment | {"DOCKER_HOST": begin.stdout.decode().strip().partition("=")[2]}
    finally:
        subprocess.run([*command, "down"], cwd=PLACE, check=False)


def run(test: str, environment: dict[str, str]) -> Outcome:
    LOG.parent.mkdir(exist_ok=True)
    report = PLACE / "build" / "report.xml"
    report.unlink(missing_ok=True)
    # Without the project's own options: one process, and one after the other.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p"]
    command += ["no:cacheprovider", f"--junitxml={report}", test]
    with LOG.open("w") as log:
        try:
            subprocess.run(
                command,
                cwd=PLACE,
                env=environment,
                stdout=log,
                stderr=log,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome.NOTHING
    if not report.exists():
        return Outcome.NOTHING
    (suite,) = ElementTree.parse(report).getroot()
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    if count["failures"]:
        return Outcome.FAILED
    passed = count["tests"] > count["skipped"] and not count["errors"]
    return Outcome.PASSED if passed else Outcome.NOTHING


def run_broken(mutant: Mutant, environment: dict[str, str]) -> Outcome:
    """Break, build, test and mend; build the mended sources again at once."""
    path = PLACE / mutant.file
    whole = path.read_text()
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        if path.suffix in COMPILED:
            build()
        return run(mutant.test, environment)
    finally:
        path.write_text(whole)
        if path.suffix in COMPILED:
            build()


def main(words: Sequence[str]) -> int:
    chosen = [m for m in read() if not words or any(word in m.words() for word in words)]
    copy()
    build()
    with engine(needed=any(m.test.startswith(DOCKER_TESTS) for m in chosen)) as environment:
        for test in dict.fromkeys(mutant.test for mutant in chosen):
            _say(f"whole   {test}")
            if run(test, environment) is not Outcome.PASSED:
                _say(f"        does not pass with nothing broken: see {LOG}")
                return 1
        missed = [mutant for mutant in chosen if not _is_noticed(mutant, environment)]
    _say(f"{len(chosen)} mutants, {len(missed)} missed")
    return 1 if missed else 0


def _is_noticed(mutant: Mutant, environment: dict[str, str]) -> bool:
    begun = time.monotonic()
    outcome = run_broken(mutant, environment)
    words = {Outcome.FAILED: "noticed", Outcome.PASSED: "MISSED", Outcome.NOTHING: "NO TEST RAN"}
    took = f"{time.monotonic() - begun:4.0f} s"
    _say(f"{words[outcome]:11} {took}  {' '.join(mutant.rows):8} {mutant.name}  ({mutant.test})")
    return outcome is Outcome.FAILED


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
