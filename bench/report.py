"""Writes a run's results.json (every sample), results.md (the table) and results.svg (the picture)."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bench.rows import Metric, Row
from bench.run import Cell, Run

OURS = "ambassador"
BASE = "direct"


def write(run: Run, folder: Path) -> list[Path]:
    """The paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "results.json": json.dumps(_record(run), indent=1),
        "results.md": _markdown(run),
        "results.svg": _picture(run),
    }
    for name, text in written.items():
        (folder / name).write_text(text + "\n")
    return [folder / name for name in written]


# ------------------------------------------------------------------------------------------ record


def _record(run: Run) -> dict[str, object]:
    return {
        "machine": _machine(),
        "started": datetime.datetime.fromtimestamp(run.started, datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "seconds": round(run.seconds),
        "rounds": run.rounds,
        "versions": {peer.name: peer.read_version() for peer in run.peers},
        "configurations": {peer.name: peer.note for peer in run.peers},
        "rows": {
            name: {
                peer: {"samples": cell.samples, "faults": cell.faults}
                for peer, cell in cells.items()
            }
            for name, cells in run.cells.items()
        },
    }


def _machine() -> dict[str, object]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "",
    )
    memory = next(
        int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")
    )
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_mib": memory // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_at_end": os.getloadavg(),
        "commit": done.stdout.strip(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


# ------------------------------------------------------------------------------------------- table


def median(cell: Cell, key: str) -> float | None:
    """Of one figure's samples; None where there is none."""
    values = [sample[key] for sample in cell.samples if key in sample]
    return statistics.median(values) if values else None


def _spread(cell: Cell, key: str) -> float:
    """Half the range of the samples, as a part of the median."""
    values = [sample[key] for sample in cell.samples if key in sample]
    middle = statistics.median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0


def best_peer(cells: dict[str, Cell], metric: Metric) -> tuple[str, float] | None:
    """The best of those that are neither ours nor the row without a relay, and did not corrupt."""
    found: list[tuple[float, str]] = []
    for name, cell in cells.items():
        value = median(cell, metric.key)
        if name not in (OURS, BASE) and value is not None and not cell.faults:
            found.append((value, name))
    if not found:
        return None
    value, name = max(found) if metric.more else min(found)
    return name, value


def _markdown(run: Run) -> str:
    machine = _machine()
    date = datetime.datetime.fromtimestamp(run.started, datetime.UTC).date()
    lines = [
        "# Results",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']},"
        f" commit {machine['commit']}, {date}; {run.rounds} measured rounds,"
        f" {run.seconds / 60:.0f} minutes. Made by `make bench`; how, and how the figures could mislead,"
        " is in [bench/README.md](../../bench/README.md). Medians; ± is half the range of the samples.",
        "",
        "![Relay CPU time per unit of work](results.svg)",
    ]
    rows = [row for row in run.rows if row.name in run.cells]
    lines += ["", "## Against the best peer", ""]
    lines.append("| row | figure | ambassador | best peer | ratio | direct |")
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in rows:
        lines += _summary(row, run.cells[row.name])
    for row in rows:
        lines += ["", f"## {row.title}", "", *_table(row, run.cells[row.name])]
    return "\n".join(lines)


def _summary(row: Row, cells: dict[str, Cell]) -> list[str]:
    lines = []
    for metric in row.all_metrics:
        ours = median(cells[OURS], metric.key) if OURS in cells else None
        best = best_peer(cells, metric)
        if ours is None or best is None:
            continue
        direct = median(cells[BASE], metric.key) if BASE in cells and metric.key != "cpu" else None
        ratio = f"{ours / best[1]:.2f}x" if best[1] else ""
        sign = "≥" if metric.more else "≤"
        base = _figure(metric, direct) if direct is not None else ""
        lines.append(
            f"| {row.title} | {metric.unit} ({sign} is better) | {_figure(metric, ours)} |"
            f" {_figure(metric, best[1])} {best[0]} | {ratio} | {base} |"
        )
    return lines


def _table(row: Row, cells: dict[str, Cell]) -> list[str]:
    metrics = row.all_metrics
    lines = [
        "| relay | " + " | ".join(metric.unit for metric in metrics) + " | remarks |",
        "|---|" + "---:|" * len(metrics) + "---|",
    ]
    for name, cell in cells.items():
        figures = []
        for metric in metrics:
            value = median(cell, metric.key)
            if value is None or (name == BASE and metric.key == "cpu"):
                figures.append("")
            elif len(cell.samples) > 1 and value:
                figures.append(
                    f"{_figure(metric, value)} ± {100 * _spread(cell, metric.key):.0f} %"
                )
            else:
                figures.append(_figure(metric, value))
        lines.append(f"| {name} | {' | '.join(figures)} | {'; '.join(cell.faults)} |")
    return lines


def _figure(metric: Metric, value: float) -> str:
    return f"{value:,.{metric.digits}f}"


# ----------------------------------------------------------------------------------------- picture

_WIDTH, _PANEL, _BAR, _LABEL, _COLUMNS = 960, 310, 16, 96, 3
_STYLE = (
    "text{font:12px sans-serif;fill:#222}.t{font-weight:bold}.p{fill:#b8c0c8}.a{fill:#c0392b}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.p{fill:#5b6670}.a{fill:#e8604f}}"
)


def _picture(run: Run) -> str:
    """One small bar chart for each row with a CPU figure: less is better."""
    panels: list[tuple[Row, Metric, list[tuple[str, float]]]] = []
    for row in run.rows:
        metric = row.all_metrics[-1]
        cells = run.cells.get(row.name, {})
        values = [
            (name, value)
            for name, cell in cells.items()
            if name != BASE and (value := median(cell, metric.key)) is not None
        ]
        if values and metric.key == "cpu":
            panels.append((row, metric, sorted(values, key=lambda item: item[1])))
    y, parts = 34, []
    for start in range(0, len(panels), _COLUMNS):
        group = panels[start : start + _COLUMNS]
        for column, panel in enumerate(group):
            parts += _bars(*panel, x=10 + column * (_PANEL + 5), y=y)
        y += 40 + _BAR * max(len(values) for _, _, values in group)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" role="img"'
        f' aria-label="CPU time per unit of work, for each row and relay"><style>{_STYLE}</style>'
        '<text class="t" x="10" y="18">The relay\'s CPU time per unit of work (shorter is better)</text>'
    )
    return "\n".join([head, *parts, "</svg>"])


def _bars(
    row: Row, metric: Metric, values: Sequence[tuple[str, float]], x: int, y: int
) -> list[str]:
    longest = max(value for _, value in values) or 1.0
    parts = [
        f'<text class="t" x="{x}" y="{y + 12}">{escape(row.title)}, {escape(metric.unit)}</text>'
    ]
    for index, (name, value) in enumerate(values):
        top = y + 18 + index * _BAR
        width = max(1.0, (_PANEL - _LABEL - 60) * value / longest)
        kind = "a" if name == OURS else "p"
        parts.append(f'<text x="{x}" y="{top + 12}">{escape(name)}</text>')
        parts.append(
            f'<rect class="{kind}" x="{x + _LABEL}" y="{top + 2}" width="{width:.1f}" height="{_BAR - 4}"/>'
        )
        parts.append(
            f'<text x="{x + _LABEL + width + 4:.1f}" y="{top + 12}">{_figure(metric, value)}</text>'
        )
    return parts
