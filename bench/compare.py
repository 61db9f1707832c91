"""What the samples of a row say: medians, spread, the best peer, and ratios round by round."""

from __future__ import annotations

import statistics

from bench.peers import VARIANTS
from bench.rows import Metric
from bench.run import Cell

OURS = "ambassador"
OTHER = "other"  # another checkout of ours
BASE = "direct"


def _values(cell: Cell, key: str) -> list[float]:
    return [sample[key] for sample in cell.samples if key in sample]


def median(cell: Cell, key: str) -> float | None:
    """Of one figure's samples; None where there is none."""
    values = _values(cell, key)
    return statistics.median(values) if values else None


def spread(cell: Cell, key: str) -> float:
    """Half the range of the samples, as a part of the median."""
    values = _values(cell, key)
    middle = statistics.median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0


def ratio(ours: Cell, other: Cell, key: str) -> float | None:
    """The median over the rounds that both have of ours / other: what slowed a round slowed both."""
    others = {sample["round"]: sample[key] for sample in other.samples if sample.get(key)}
    ratios = [
        sample[key] / others[sample["round"]]
        for sample in ours.samples
        if key in sample and sample["round"] in others
    ]
    return statistics.median(ratios) if ratios else None


def best_peer(cells: dict[str, Cell], metric: Metric) -> tuple[str, float] | None:
    """The best of those that are neither ours nor the row without a relay, and did not corrupt."""
    found: list[tuple[float, str]] = []
    for name, cell in cells.items():
        value = median(cell, metric.key)
        if name not in (OURS, OTHER, BASE, *VARIANTS) and value is not None and not cell.faults:
            found.append((value, name))
    if not found:
        return None
    value, name = max(found) if metric.more else min(found)
    return name, value
