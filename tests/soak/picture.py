"""Draws a run: memory and descriptors over time, and what was done to the ambassador meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tests.soak.samples import KINDS, Sample

WIDTH, LEFT, RIGHT, HEIGHT = 900, 70, 110, 170
MARKS = {"restart": "#8c959f", "worker killed": "#bc4c00", "daemon bounced": "#cf222e"}
COLOURS = dict(zip(KINDS, ("#0969da", "#8250df", "#1a7f37"), strict=True))
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#59636e}.t{font-size:14px;font-weight:600}"
    ".bg{fill:#fff}.grid{stroke:#8c959f;stroke-opacity:.3}path{fill:none;stroke-width:1.6}"
    "@media(prefers-color-scheme:dark){.bg{fill:#0d1117}text{fill:#9198a1}}"
)


def draw(samples: Sequence[Sample], marks: Sequence[tuple[float, str]], title: str) -> str:
    """The picture as SVG text. `marks` are (seconds since the start, a key of MARKS)."""
    end = max(samples[-1].at, 1.0)
    across = (WIDTH - LEFT - RIGHT) / end
    parts = [_text(20, 28, title, "t")]
    parts += _panel(samples, "PSS", "MB, PSS", scale=1e6, top=60, across=across)
    parts += _panel(
        samples, "descriptors", "open descriptors", scale=1, top=110 + HEIGHT, across=across
    )
    bottom = 60 + 2 * HEIGHT + 100
    for row, (kind, colour) in enumerate(MARKS.items()):
        y = bottom + row * 20
        parts += [
            f'<rect x="{LEFT + at * across:.1f}" y="{y - 6}" width="1.6" height="12" fill="{colour}"/>'
            for at, what in marks
            if what == kind
        ]
        parts.append(_text(WIDTH - RIGHT + 8, y + 4, kind))
    height = bottom + 20 * len(MARKS) + 24
    parts += [
        _text(LEFT + minute * 60 * across, height - 12, f"{minute:g} min", anchor="middle")
        for minute in _ticks(end / 60)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect class="bg" width="{WIDTH}" height="{height}"/>'
    )
    return "\n".join([head, *filter(None, parts), "</svg>"]) + "\n"


def _panel(
    samples: Sequence[Sample], field: str, unit: str, *, scale: float, top: int, across: float
) -> list[str]:
    most = max(max(s.values[f"{kind} {field}"] for kind in KINDS) for s in samples) / scale or 1
    parts = [_text(LEFT, top - 8, unit)]
    for tick in _ticks(most):
        y = top + HEIGHT * (1 - tick / most)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    ends: list[float] = []
    for kind in KINDS:
        points = [
            f"{LEFT + s.at * across:.1f},"
            f"{top + HEIGHT * (1 - s.values[f'{kind} {field}'] / scale / most):.1f}"
            for s in samples
        ]
        parts.append(f'<path stroke="{COLOURS[kind]}" d="M{" L".join(points)}"/>')
        y = float(points[-1].partition(",")[2])
        while any(abs(y - other) < 13 for other in ends):
            y -= 13
        ends.append(y)
        parts.append(_text(WIDTH - RIGHT + 8, y + 4, kind, colour=COLOURS[kind]))
    return parts


def _ticks(most: float) -> list[float]:
    step = next(s * 10**e for e in range(-2, 9) for s in (1, 2, 5) if most / (s * 10**e) <= 6)
    return [n * step for n in range(int(most / step) + 1)]


def _text(
    x: float, y: float, words: str, kind: str = "", *, anchor: str = "start", colour: str = ""
) -> str:
    fill = f' style="fill:{colour}"' if colour else ""
    return (
        f'<text class="{kind}" text-anchor="{anchor}"{fill} x="{x:.1f}" y="{y:.1f}">'
        f"{escape(words)}</text>"
    )
