"""Fixtures of the scenarios, and the figures at the end of the run."""

from __future__ import annotations

import os
import random
import resource

import pytest

from tests.docker.conftest import engine, own, stage
from tests.loops.conftest import loopback, peers, run, start, start_tcp, start_udp, tools, yard
from tests.soak import report

__all__ = [
    "engine", "loopback", "own", "peers", "run", "stage", "start", "start_tcp", "start_udp", "tools", "yard",
]  # fmt: skip


@pytest.fixture(scope="session")
def minutes() -> float:
    """How long each scenario lasts: `make soak MINUTES=10`."""
    return float(os.environ.get("SOAK_MINUTES") or 2)


@pytest.fixture(scope="session")
def seed() -> int:
    """What decides the order of events: `make soak SEED=1`."""
    return int(os.environ.get("SOAK_SEED") or random.randrange(1 << 32))


@pytest.fixture(scope="session", autouse=True)
def descriptors() -> None:
    """Allow as many descriptors as the machine does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if report.tables:
        text = "\n\n".join(report.tables)
        report.FOLDER.mkdir(parents=True, exist_ok=True)
        (report.FOLDER / "figures.md").write_text(f"{text}\n")
        terminalreporter.write_line(f"\n{text}\n\nalso in {report.FOLDER}/figures.md")
