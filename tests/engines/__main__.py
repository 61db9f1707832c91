"""Runs the scenarios on the engines and prints a table: `make test-engines`.

Exit code: 0 if every outcome is as expected.py says, 1 if one is not, 2 if an engine cannot be had.
Outcomes are kept in the cache as long as images and scenarios stay the same, so a table
may be made in several runs. `--record` writes it into docs/engines.md.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tests.engines.engine import CACHE, KINDS, REPO, Engine, UnavailableError, make_root
from tests.engines.expected import FAILED, NOT_AVAILABLE, OK, chosen, expected
from tests.engines.scenarios import SCENARIOS
from tests.engines.stage import NotAvailableError, Stage
from tests.support.engine import AMBASSADOR, DEMO, start_engine

ARCHIVE = CACHE / "images.tar"
RESULTS = CACHE / "results.json"
DOCUMENT = REPO / "docs" / "engines.md"
TABLE = re.compile("(<!-- table -->\n).*(<!-- end of table -->)", re.DOTALL)


class Outcome(NamedTuple):
    word: str
    seconds: float
    detail: str

    def surprise(self, scenario: str, engine: str) -> str:
        """Why this is not as expected; "" if it is."""
        row = expected(scenario, engine)
        if self.word == (row.word if row else OK):
            return ""
        known = f"expected.py has {row.word}, {row.reason}" if row else "expected.py has ok"
        return f"{self.word} ({known})"


_started = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", flush=True)


def save_images() -> str:
    """Write the images to the archive, unless they are there; their IDs."""
    environment = {**os.environ, "DOCKER_HOST": start_engine()}

    def docker(*words: str) -> str:
        done = subprocess.run(
            ["docker", *words], check=False, capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            raise UnavailableError(f"docker {words[0]}: {done.stderr.strip()}")
        return done.stdout

    tags = [AMBASSADOR, *(f"{DEMO}:{tag}" for tag in ("latest", "redis", "redis-cli"))]
    ids = " ".join(docker("image", "inspect", "--format", "{{.Id}}", *tags).split())
    known = ARCHIVE.with_suffix(".ids")
    if not known.exists() or known.read_text() != ids:
        say("saving the images")
        known.unlink(missing_ok=True)
        docker("save", "--output", str(ARCHIVE), *tags)
        known.write_text(ids)
    return ids


def digest() -> str:
    """Of what the scenarios do."""
    files = [Path(__file__).with_name(f"{name}.py") for name in ("scenarios", "stage", "client")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def play(stage: Stage, run: Callable[[Stage], str | None]) -> Outcome:
    """One scenario on a clear stage."""
    begin = time.monotonic()
    try:
        stage.clear()
        word, detail = OK, run(stage) or ""
    except NotAvailableError as error:
        word, detail = NOT_AVAILABLE, " ".join(str(error).split())
    except Exception as error:  # noqa: BLE001  (whatever it is, the other scenarios go on)
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        word, detail = FAILED, f"{kind}{error}"
        log = stage.log().splitlines()
        detail += "".join(f"\n    | {line}" for line in log[-12:])
    return Outcome(word, round(time.monotonic() - begin, 1), detail)


class Results:
    """Outcomes by engine and scenario, kept in the cache as long as `source` stays the same."""

    def __init__(self, source: str) -> None:
        self.versions: dict[str, str] = {}
        self.outcomes: dict[str, dict[str, Outcome]] = {}
        self._source = source
        self._lock = threading.Lock()
        if RESULTS.exists():
            kept = json.loads(RESULTS.read_text())
            if kept["source"] == source:
                self.versions = kept["versions"]
                for engine, outcomes in kept["outcomes"].items():
                    self.outcomes[engine] = {name: Outcome(*o) for name, o in outcomes.items()}

    def keep(self, engine: str, version: str, scenario: str, outcome: Outcome) -> None:
        with self._lock:
            self.versions[engine] = version
            self.outcomes.setdefault(engine, {})[scenario] = outcome
            kept = {"source": self._source, "versions": self.versions, "outcomes": self.outcomes}
            RESULTS.write_text(json.dumps(kept, indent=1))

    def table(self) -> str:
        """Scenarios by engines in Markdown, and below it the reason of all that is not ok."""
        engines = [name for name in KINDS if name in self.outcomes]
        reasons: dict[str, str] = {}
        heads = [f"{name} ({self.versions[name]})" for name in engines]
        lines = [f"| scenario | {' | '.join(heads)} |", "|---" * (len(engines) + 1) + "|"]
        for scenario in SCENARIOS:
            cells = [self._cell(scenario, name, reasons) for name in engines]
            lines.append(f"| {scenario} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *(f"- {mark}: {text}" for text, mark in reasons.items())])

    def _cell(self, scenario: str, engine: str, reasons: dict[str, str]) -> str:
        outcome = self.outcomes[engine].get(scenario)
        if outcome is None:
            return "not run"
        row = expected(scenario, engine)
        if row is None or outcome.word != row.word:
            return outcome.word
        numbers = sum(mark.startswith("(") for mark in reasons.values())
        mark = reasons.setdefault(row.reason, row.finding or f"({numbers + 1})")
        return f"{outcome.word} {mark}"


def run_engine(name: str, scenarios: Sequence[str], results: Results) -> list[str]:
    """Bring an engine up and run scenarios on it; what surprised."""
    surprises = []
    say(f"{name}: starting")
    with Engine(name) as engine:
        engine.start()
        version = engine.docker("version", "--format", "{{.Server.Version}}")
        say(f"{name}: version {version} answers; loading the images")
        engine.load(ARCHIVE)
        stage = Stage(engine)
        for number, scenario in enumerate(scenarios, 1):
            outcome = play(stage, SCENARIOS[scenario])
            surprise = outcome.surprise(scenario, name)
            head = f"{name} {number:2}/{len(scenarios)} {scenario:36} {outcome.word:4}"
            tail = "  UNEXPECTED  " if surprise else "  "
            say(f"{head} {outcome.seconds:5.1f} s{tail}{outcome.detail}")
            results.keep(name, version, scenario, outcome)
            surprises += [f"{name} {scenario}: {surprise}"] if surprise else []
    return surprises


def run_engines(
    engines: Sequence[str], scenarios: Sequence[str], results: Results, jobs: int
) -> tuple[list[str], list[str]]:
    """All of them, some at a time: what surprised, and which engine did not come up or died."""
    say("making sure of the roots: minutes for a Debian release, once")
    for name in engines:
        make_root(KINDS[name].suite)
    with ThreadPoolExecutor(jobs) as pool:  # a scenario waits most of its time
        runs = {name: pool.submit(run_engine, name, scenarios, results) for name in engines}
    surprises, failures = [], []
    for name, run in runs.items():
        try:
            surprises += run.result()
        except (UnavailableError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(f"{name}: {error}")
    return surprises, failures


def record(table: str) -> None:
    """Write the table into docs/engines.md, with the day."""
    day = f"{datetime.now(UTC):%d %B %Y}"
    text = TABLE.sub(lambda m: f"{m[1]}Made on {day}.\n\n{table}\n{m[2]}", DOCUMENT.read_text())
    DOCUMENT.write_text(text)
    say(f"recorded in {DOCUMENT}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.engines")
    parser.add_argument("--engines", default="", help=f"some of {' '.join(KINDS)}")
    parser.add_argument("--scenarios", default="", help=f"some of {' '.join(SCENARIOS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="engines at a time")
    parser.add_argument("--record", action="store_true", help=f"write the table into {DOCUMENT}")
    options = parser.parse_args()
    engines = [name for name in KINDS if chosen(name, options.engines or "*")]
    scenarios = [name for name in SCENARIOS if chosen(name, options.scenarios or "*")]
    if not engines or not scenarios:
        parser.error("no engine or no scenario has such a name")
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with (CACHE / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another run of this checkout")
                fcntl.flock(lock, fcntl.LOCK_EX)
            results = Results(f"{save_images()} {digest()}")
            surprises, failures = run_engines(engines, scenarios, results, options.jobs)
    except (UnavailableError, RuntimeError) as error:  # no root, no image, no Engine to make it
        parser.error(str(error))
    print(f"\n{results.table()}\n")
    if options.record:
        record(results.table())
    for line in [*failures, *(f"UNEXPECTED: {surprise}" for surprise in surprises)]:
        say(line)
    return 2 if failures else bool(surprises)


if __name__ == "__main__":
    sys.exit(main())
