"""What a scenario prints: progress while it runs, and figures at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path("build/soak")
tables: list[str] = []


def say(text: str) -> None:
    """Print a line at once; pytest keeps what goes to sys.stderr."""
    print(f"  {text}", file=sys.__stderr__, flush=True)


def table(title: str, *rows: tuple[object, ...]) -> None:
    """Show a table at the end of the run, and in build/soak/figures.md; the first row is its head."""
    head, *rest = (f"| {' | '.join(map(str, row))} |" for row in rows)
    rule = f"|---|{'---:|' * (len(rows[0]) - 1)}"
    tables.append("\n".join([f"{title}:", "", head, rule, *rest]))


def milliseconds(seconds: Sequence[float]) -> tuple[str, ...]:
    """Return the cells for: how many, p50, p99, slowest."""
    if not seconds:
        return ("0", "-", "-", "-")
    ordered = sorted(seconds)
    parts = (ordered[min(int(part * len(ordered)), len(ordered) - 1)] for part in (0.5, 0.99, 1))
    return (str(len(ordered)), *(f"{1000 * part:.{0 if part > 0.01 else 1}f}" for part in parts))
