"""Writes a run's results.json (every sample), results.md (the table) and results.svg (the picture)."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bench import ground
from bench.compare import BASE, OTHER, OURS, best_peer, median, ratio, spread
from bench.goals import GOALS
from bench.peers import PEERS, VARIANTS
from bench.rows import ROWS, Metric, Row
from bench.run import Cell, Run


def write(run: Run, folder: Path) -> list[Path]:
    """The paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    run.machine = run.machine or _machine()
    written = {
        "results.json": json.dumps(_record(run), indent=1),
        "results.md": _markdown(run, folder),
        "results.svg": _picture(run),
    }
    for name, text in written.items():
        (folder / name).write_text(text + "\n")
    return [folder / name for name in written]


def redraw(folder: Path) -> list[Path]:
    """The table and the picture again, from the record of an earlier run."""
    record = json.loads((folder / "results.json").read_text())
    run = Run(
        rows=[ROWS[name] for name in record["rows"] if name in ROWS],
        peers=list(PEERS.values()),
        rounds=record["rounds"],
        directory=folder,
        started=datetime.datetime.fromisoformat(record["started"]).timestamp(),
        seconds=record["seconds"],
        machine=record["machine"],
    )
    for name, cells in record["rows"].items():
        run.cells[name] = {peer: Cell(**cell) for peer, cell in cells.items()}
    (folder / "results.md").write_text(_markdown(run, folder) + "\n")
    (folder / "results.svg").write_text(_picture(run) + "\n")
    return [folder / "results.md", folder / "results.svg"]


# ------------------------------------------------------------------------------------------ record


def _record(run: Run) -> dict[str, object]:
    return {
        "machine": run.machine,
        "started": datetime.datetime.fromtimestamp(run.started, datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "seconds": round(run.seconds),
        "rounds": run.rounds,
        "versions": {peer.name: peer.read_version() for peer in run.peers},
        "configurations": {peer.name: peer.note for peer in run.peers},
        "rows": {
            name: {
                peer: {"samples": cell.samples, "faults": cell.faults, "remarks": cell.remarks}
                for peer, cell in cells.items()
            }
            for name, cells in run.cells.items()
        },
    }


def _machine() -> dict[str, Any]:
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
        "used_cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory // 1024,
        "kernel": platform.release(),
        "congestion": ground.congestion(),
        "python": platform.python_version(),
        "load_average_at_end": os.getloadavg(),
        "commit": done.stdout.strip(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


# ------------------------------------------------------------------------------------------- table


def _place(machine: dict[str, Any]) -> str:
    cores, used = machine["cores"], machine.get("used_cores", machine["cores"])
    of = f"{used} of {cores} cores" if used != cores else f"{cores} cores"
    text = f"{machine['cpu']}, {of}, Linux {machine['kernel']}"
    # Records from before it was asked for are of a machine whose own it was.
    return f"{text}, TCP {machine['congestion']}" if "congestion" in machine else text


def _markdown(run: Run, folder: Path) -> str:
    machine = run.machine
    date = datetime.datetime.fromtimestamp(run.started, datetime.UTC).date()
    how = os.path.relpath(Path(__file__).parent / "README.md", folder.resolve())
    lines = [
        "# Results",
        "",
        f"{_place(machine)},"
        f" commit {machine['commit']}, {date}; {run.rounds} measured rounds,"
        f" {run.seconds / 60:.0f} minutes. Made by `make bench`; how, and how the figures could mislead,"
        f" is in [bench/README.md]({how}). Medians; ± is half the range of the samples, a ratio the median"
        " of the rounds' own ratios.",
        "",
        "![Relay CPU time per unit of work](results.svg)",
    ]
    rows = [row for row in run.rows if row.name in run.cells]
    lines += _goals(run)
    lines += ["", "## Against the best peer", ""]
    lines.append("| row | figure | ambassador | best peer | ratio | direct |")
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in rows:
        lines += _summary(row, run.cells[row.name])
    for variant in VARIANTS:
        lines += _variant(run, rows, variant)
    for row in rows:
        lines += ["", f"## {row.title}", "", *_table(row, run.cells[row.name])]
    return "\n".join(lines)


def _goals(run: Run) -> list[str]:
    lines = []
    for goal in GOALS:
        reached = goal.reached(run.cells)
        ours = run.cells.get(goal.row, {}).get(OURS)
        if reached is not None:
            figure = f"{reached:,.{goal.digits}f}{goal.unit}"
        elif ours and ours.faults:
            figure = "at fault"
        else:
            continue
        aim = f"{'≥' if goal.more else '≤'} {goal.aim:g}{goal.unit}"
        held = "yes" if reached is not None and goal.holds(reached) else "**no**"
        lines.append(f"| {ROWS[goal.row].title} | {goal.words} | {aim} | {figure} | {held} |")
    if not lines:
        return []
    head = ["", "## What is aimed at", ""]
    return [*head, "| row | figure | aim | reached | holds |", "|---|---|---:|---:|---|", *lines]


def _summary(row: Row, cells: dict[str, Cell]) -> list[str]:
    lines = []
    for metric in row.all_metrics:
        ours = median(cells[OURS], metric.key) if OURS in cells else None
        best = best_peer(cells, metric)
        if ours is None or best is None:
            continue
        direct = median(cells[BASE], metric.key) if BASE in cells and metric.key != "cpu" else None
        against = ratio(cells[OURS], cells[best[0]], metric.key)
        sign = "≥" if metric.more else "≤"
        base = _figure(metric, direct) if direct is not None else ""
        lines.append(
            f"| {row.title} | {metric.unit} ({sign} is better) | {_figure(metric, ours)} |"
            f" {_figure(metric, best[1])} {best[0]} | {_times(against)} | {base} |"
        )
    return lines


def _variant(run: Run, rows: Sequence[Row], variant: str) -> list[str]:
    """Ours beside ours with other flags, where both were measured."""
    lines = []
    for row in rows:
        cells = run.cells[row.name]
        for metric in row.all_metrics if OURS in cells and variant in cells else ():
            plain, varied = median(cells[OURS], metric.key), median(cells[variant], metric.key)
            if plain and varied:
                against = ratio(cells[variant], cells[OURS], metric.key)
                figures = (
                    f"{_figure(metric, plain)} | {_figure(metric, varied)} | {_times(against)}"
                )
                lines.append(f"| {row.title} | {metric.unit} | {figures} |")
    if not lines:
        return []
    flags = VARIANTS[variant]
    head = ["", f"## The ambassador with `{flags}`", ""]
    return [
        *head,
        f"| row | figure | without | `{flags}` | ratio |",
        "|---|---|---:|---:|---:|",
        *lines,
    ]


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
            if name == BASE and metric.key == "cpu":
                figures.append("")
            elif value is None and cell.remarks:
                figures.append("n/a")
            elif value is None:
                figures.append("")
            elif len(cell.samples) > 1 and value:
                figures.append(f"{_figure(metric, value)} ± {100 * spread(cell, metric.key):.0f} %")
            else:
                figures.append(_figure(metric, value))
        lines.append(
            f"| {name} | {' | '.join(figures)} | {'; '.join([*cell.faults, *cell.remarks])} |"
        )
    return lines


def _times(against: float | None) -> str:
    return "" if against is None else f"{against:.2f}x"


def _figure(metric: Metric, value: float) -> str:
    return f"{value:,.{metric.digits}f}"


# ----------------------------------------------------------------------------------------- picture

_WIDTH, _MARGIN, _COLUMNS, _GAP = 1000, 20, 2, 24
_PANEL = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
_LABEL, _NUMBERS, _BAR, _HEAD = 104, 136, 18, 50  # names, figures, a bar's line, a panel's title
_TOP, _FOOT = 84, 34
_GOOD, _LEVEL = 0.98, 1.02  # of the best peer: ahead below the one, behind above the other
_LIGHT = {
    "bg": "#ffffff", "card": "#f6f8fa", "ink": "#1f2328", "dim": "#59636e", "peer": "#a9b4c0",
    "ours": "#0969da", "ahead": "#1a7f37", "level": "#59636e", "behind": "#bc4c00",
}  # fmt: skip
_DARK = {
    "bg": "#0d1117", "card": "#161b22", "ink": "#e6edf3", "dim": "#9198a1", "peer": "#4d5763",
    "ours": "#4493f8", "ahead": "#3fb950", "level": "#9198a1", "behind": "#f0883e",
}  # fmt: skip


def _style() -> str:
    def colours(of: dict[str, str]) -> str:
        fills = "".join(f".{name}{{fill:{colour}}}" for name, colour in of.items())
        return fills + f".mark{{stroke:{of['dim']}}}.v{{stroke:{of['card']}}}"

    return (
        "text{font:12.5px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}"
        ".h{font-size:19px;font-weight:600}.t{font-size:14px;font-weight:600}.s{font-size:11.5px}"
        ".b{font-weight:600}.r{text-anchor:end}"
        ".v{paint-order:stroke;stroke-width:5px;stroke-linejoin:round}"
        ".mark{stroke-width:1.2;stroke-dasharray:3 2}"
        f"{colours(_LIGHT)}@media(prefers-color-scheme:dark){{{colours(_DARK)}}}"
    )


@dataclass(frozen=True)
class _Panel:
    """A row's group of bars, the shortest first, and the best peer's figure."""

    row: Row
    metric: Metric
    values: list[tuple[str, float]]
    cells: dict[str, Cell]
    best: tuple[str, float] | None

    @property
    def height(self) -> int:
        return _HEAD + _BAR * len(self.values) + 12


def _panels(run: Run) -> list[_Panel]:
    panels = []
    for row in run.rows:
        cells = run.cells.get(row.name, {})
        for metric in row.all_metrics:
            if metric.key != row.bar:
                continue
            values = [
                (name, value)
                for name, cell in cells.items()
                if name != BASE and (value := median(cell, metric.key)) is not None
            ]
            best = best_peer(cells, metric)
            values.sort(key=lambda item: (bool(cells[item[0]].faults), item[1]))
            if values:
                panels.append(_Panel(row, metric, values, cells, best))
    return panels


def _picture(run: Run) -> str:
    """A group of bars for each row, less is better: CPU time, or what else its `bar` says."""
    panels = _panels(run)
    y, parts = _TOP, []
    for start in range(0, len(panels), _COLUMNS):
        group = panels[start : start + _COLUMNS]
        tallest = max(panel.height for panel in group)
        for column, panel in enumerate(group):
            parts += _group(panel, _MARGIN + column * (_PANEL + _GAP), y, tallest)
        y += tallest + 14
    machine = run.machine
    date = datetime.datetime.fromtimestamp(run.started, datetime.UTC).date()
    where = f"{_place(machine)}, {date}"
    height = y + _FOOT
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"'
        f' aria-label="What each relay costs, for each row"><style>{_style()}</style>',
        f'<rect class="bg" width="{_WIDTH}" height="{height}"/>',
        _text(_MARGIN, 34, "What a relay costs", "h ink"),
        _text(_MARGIN, 56, _CAPTION, "dim"),
    ]
    return "\n".join([*head, *parts, _text(_MARGIN, y + 16, where, "s dim"), "</svg>"])


_CAPTION = (
    "CPU time per unit of work, or what else the group says: shorter is better. Dashed: the best peer."
    " Right: what it did. Faint: at fault."
)


def _group(panel: _Panel, x: int, y: int, height: int) -> list[str]:
    row, metric = panel.row, panel.metric
    other = next((one for one in row.all_metrics if one.key != metric.key), metric)
    parts = [
        f'<rect class="card" x="{x}" y="{y}" width="{_PANEL}" height="{height}" rx="8"/>',
        _text(x + 12, y + 21, row.title, "t ink"),
        _text(x + 12, y + 39, metric.unit, "s dim"),
        _text(x + _PANEL - 12, y + 39, other.unit, "s dim r"),
    ]
    ours = panel.cells.get(OURS)
    against = ratio(ours, panel.cells[panel.best[0]], metric.key) if ours and panel.best else None
    if against is not None:
        kind = "ahead" if against < _GOOD else "behind" if against > _LEVEL else "level"
        words = f"{against:.2f}\u00d7 the best peer"
        parts.append(_text(x + 12 + _LABEL, y + 39, words, f"b {kind}"))
    room = _PANEL - _LABEL - _NUMBERS - 24
    # One peer far behind must not flatten the others: its bar is cut, its figure is not.
    middle = statistics.median(value for _, value in panel.values)
    longest = min(max(value for _, value in panel.values), 3 * middle) or 1.0
    left, top = x + 12 + _LABEL, y + _HEAD
    if panel.best:  # first, so that figures stand before it
        at = left + room * min(1.0, panel.best[1] / longest)
        bottom = top + _BAR * len(panel.values)
        parts.append(
            f'<line class="mark" x1="{at:.1f}" y1="{top - 2}" x2="{at:.1f}" y2="{bottom}"/>'
        )
    for index, (name, value) in enumerate(panel.values):
        line = top + index * _BAR
        width = max(1.5, room * min(1.0, value / longest))
        mine = name in (OURS, OTHER, *VARIANTS)
        faint = ' opacity="0.45"' if panel.cells[name].faults else ""
        ink = "b ours" if mine else "ink"
        figure = _short(metric, value) + " \u2192" * (value > longest)
        parts += [
            f"<g{faint}>",
            _text(x + 12, line + 13, name, ink),
            f'<rect class="{"ours" if mine else "peer"}" x="{left}" y="{line + 2}" width="{width:.1f}"'
            f' height="{_BAR - 5}" rx="2"/>',
            _text(left + width + 6, line + 13, figure, f"v {ink}"),
        ]
        done = median(panel.cells[name], other.key)
        if done is not None:
            parts.append(_text(x + _PANEL - 12, line + 13, _short(other, done), "dim r"))
        parts.append("</g>")
    return parts


def _short(metric: Metric, value: float) -> str:
    return f"{value:,.{metric.digits if abs(value) < 100 else 0}f}"


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(words)}</text>'
