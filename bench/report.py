"""What the samples say: medians, spread, the best peer, ratios round by round; and the tables of a run."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import BASE, OURS, PEERS
from bench.places import congestion
from bench.rows import ROWS, Metric, Result, Row

PACKAGES = ("haproxy", "nginx", "docker.io", "redis-server", "wrk", "iperf3", "sockperf")
FAULTS = {
    "corrupt": "corrupts datagrams",
    "wrong": "answers reach the wrong client",
    "twice": "delivers twice",
}


@dataclass
class Cell:
    """One peer in one row: its samples, each with its round, and what went wrong."""

    samples: list[Result] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, sample: Result) -> None:
        """Keep a sample; a relay that alters or misdelivers datagrams is at fault."""
        self.samples.append(sample)
        for key, text in FAULTS.items():
            if sample.get(key) and not any(fault.startswith(text) for fault in self.faults):
                self.fault(f"{text} ({sample[key]:.0f} of {sample['units']:.0f})")

    def fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    def values(self, key: str) -> list[float]:
        return [sample[key] for sample in self.samples if key in sample]


Cells = Mapping[str, Cell]


def ratio(ours: Cell, other: Cell, key: str) -> float | None:
    """The median of ours / other over the rounds that both have: what slowed a round slowed both."""
    others = {sample["round"]: sample[key] for sample in other.samples if sample.get(key)}
    ratios = [
        sample[key] / others[sample["round"]]
        for sample in ours.samples
        if key in sample and sample["round"] in others
    ]
    return statistics.median(ratios) if ratios else None


def best_peer(cells: Cells, metric: Metric) -> str | None:
    """The best of those without fault that are neither an ambassador nor the row without a relay."""
    found = [
        (statistics.median(values), name)
        for name, cell in cells.items()
        if name not in (OURS, BASE) and not PEERS[name].variant and not cell.faults
        if (values := cell.values(metric.key))
    ]
    return (max if metric.more else min)(found)[1] if found else None


def tables(cells: Mapping[str, Cells], rounds: int) -> str:
    """The whole report, in Markdown."""
    lines = ["# Results", "", _head(rounds)]
    for name, row_cells in cells.items():
        lines += ["", f"## {ROWS[name].title}", "", *table(ROWS[name], row_cells)]
    return "\n".join(lines) + "\n"


def _head(rounds: int) -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    versions = _output("dpkg-query", "-W", "-f", "${Package} ${Version}; ", *PACKAGES)
    peers = "; ".join(f"{peer.name}: {peer.note}" for peer in PEERS.values())
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, Linux {platform.release()}, TCP"
        f" {congestion()}, commit {_output('git', 'describe', '--always', '--dirty')},"
        f" {datetime.datetime.now(datetime.UTC).date()}; rounds measured: {rounds}. Made by `make bench`."
        " Medians; ± is half the range of the samples; a ratio is the median of the rounds' own ratios."
        f"\n\n{peers}. {versions.strip('; ')}."
    )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "?"


def table(row: Row, cells: Cells) -> list[str]:
    """All peers, the ambassador's ratios to the best peer, and those of its variants to itself."""
    lines = [
        _line("relay", *(metric.unit for metric in row.metrics), "faults"),
        "|---|" + "---:|" * len(row.metrics) + "---|",
    ]
    for name, cell in cells.items():
        figures = (_figure(metric, cell.values(metric.key)) for metric in row.metrics)
        lines.append(_line(name, *figures, "; ".join(cell.faults)))
    ours = cells.get(OURS, Cell())
    against, aimed = [], []
    for metric in row.metrics:
        best = best_peer(cells, metric)
        # Of a row that is no load only what has an aim: there is no best number of processes.
        compared = best and (row.load or metric.key in row.aims)
        reached = ratio(ours, cells[best], metric.key) if best and compared else None
        against.append(f"{_times(reached)} {best}" if reached is not None else "")
        aim = row.aims.get(metric.key)
        aimed.append("" if aim is None or reached is None else _aimed(metric, aim, reached, ours))
    if any(against):
        lines.append(_line("**ambassador / best peer**", *against, ""))
    if any(aimed):
        lines.append(_line("aimed at", *aimed, ""))
    for name in cells:
        if PEERS[name].variant and ours.samples:
            ratios = (_times(ratio(cells[name], ours, metric.key)) for metric in row.metrics)
            lines.append(_line(f"**{name} / ambassador**", *ratios, ""))
    return lines


def _aimed(metric: Metric, aim: float, reached: float, ours: Cell) -> str:
    """Whether the aim holds, as printed. An ambassador at fault misses it."""
    rounded = round(reached, 2)
    holds = not ours.faults and (rounded >= aim if metric.more else rounded <= aim)
    return f"{'≥' if metric.more else '≤'} {aim:g}x: {'yes' if holds else '**no**'}"


def _line(*fields: str) -> str:
    return f"| {' | '.join(fields)} |"


def _times(against: float | None) -> str:
    return "" if against is None else f"{against:.2f}x"


def _figure(metric: Metric, values: list[float]) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    spread = (max(values) - min(values)) / 2 / middle if middle else 0.0
    varies = f" ± {100 * spread:.0f} %" if middle and len(values) > 1 else ""
    return f"{middle:,.{metric.digits}f}{varies}"
