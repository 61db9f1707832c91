"""What the ambassador's processes use, over time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.measure import memory_of
from tests.support.processes import descendants

KINDS = ("parent", "fork server", "workers")
FIELDS = (*(f"{kind} PSS" for kind in KINDS), *(f"{kind} descriptors" for kind in KINDS))
SLACK_BYTES = 1_500_000
DRIFT = 0.10
"""Memory may grow by this part, and by SLACK_BYTES, between the run's first quarter and its end."""


@dataclass(frozen=True)
class Sample:
    at: float
    values: dict[str, int]


def descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0


def look(parent: int, at: float) -> Sample:
    """Of the three kinds of process. The fork server is the parent's only child; workers are its own."""
    below = descendants(parent)
    pids = {
        "parent": [parent],
        "fork server": [process.pid for process in below if process.parent == parent],
        "workers": [process.pid for process in below if process.parent != parent],
    }
    values = {f"{kind} PSS": sum(memory_of(pid).pss for pid in pids[kind]) for kind in KINDS}
    values |= {f"{kind} descriptors": sum(map(descriptors, pids[kind])) for kind in KINDS}
    return Sample(at, values)


def middle(samples: list[Sample], of: Callable[[Sample], int]) -> float:
    return statistics.median(of(sample) for sample in samples)


def drift(samples: list[Sample], kind: str) -> tuple[float, float]:
    """Bytes of PSS in the second tenth of a run, and in its last: (before, after)."""
    tenth = max(1, len(samples) // 10)
    of = lambda sample: sample.values[f"{kind} PSS"]  # noqa: E731
    return middle(samples[tenth : 2 * tenth], of), middle(samples[-tenth:], of)


def has_grown(before: float, after: float) -> bool:
    return after > before * (1 + DRIFT) + SLACK_BYTES
