"""What the processes of an ambassador use: memory (PSS) and descriptors."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import psutil

KINDS = ("parent", "fork server", "workers")
SLACK_BYTES = 1_500_000
DRIFT = 0.10
"""Memory may grow by this part and SLACK_BYTES between the second tenth of a run and its end."""


class Use(NamedTuple):
    pss: int
    descriptors: int


def look(parent: int) -> dict[str, Use]:
    """Sample an ambassador. The fork server is the parent's only child; workers are its own."""
    first = psutil.Process(parent)
    second = first.children()
    below = first.children(recursive=True)
    workers = [process for process in below if process not in second]
    groups = dict(zip(KINDS, ([first], second, workers), strict=True))
    return {kind: _use(processes) for kind, processes in groups.items()}


def _use(processes: Sequence[psutil.Process]) -> Use:
    pss = descriptors = 0
    for process in processes:
        try:
            pss += process.memory_full_info().pss
            descriptors += process.num_fds()
        except psutil.Error:  # it has just exited
            pass
    return Use(pss, descriptors)


def drift(samples: Sequence[dict[str, Use]], kind: str) -> tuple[float, float]:
    """Return the PSS in the second tenth of a run, and in its last: (before, after)."""
    tenth = max(1, len(samples) // 10)
    sizes = [sample[kind].pss for sample in samples]
    return statistics.median(sizes[tenth : 2 * tenth] or sizes), statistics.median(sizes[-tenth:])


def has_grown(before: float, after: float) -> bool:
    return after > before * (1 + DRIFT) + SLACK_BYTES
