"""What the ambassador aims at in each row. The report says of every run which of it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.compare import OURS, best_peer, median, ratio
from bench.rows import FLAT, ROWS
from bench.run import Cell

Cells = Mapping[str, dict[str, Cell]]


@dataclass(frozen=True)
class Goal:
    """`reached` is None where the run does not have what it takes, or the ambassador was at fault; `more` is
    whether more is better.
    """

    row: str
    words: str
    aim: float
    more: bool
    reached: Callable[[Cells], float | None]
    unit: str = "x"
    digits: int = 2

    def holds(self, reached: float) -> bool:
        """As it is printed, so that nobody sees 0.40 miss 0.4."""
        rounded = round(reached, self.digits)
        return rounded >= self.aim if self.more else rounded <= self.aim


def _ours(cells: Cells, row: str) -> Cell:
    """Without samples where the row did not run, or the ambassador was at fault in it."""
    cell = cells.get(row, {}).get(OURS, Cell())
    return Cell() if cell.faults else cell


def _against_best(row: str, key: str, aim: float) -> Goal:
    """The figure as a multiple of the best peer's."""
    metric = next(metric for metric in ROWS[row].all_metrics if metric.key == key)

    def reached(cells: Cells) -> float | None:
        best = best_peer(cells.get(row, {}), metric)
        return ratio(_ours(cells, row), cells[row][best[0]], key) if best else None

    return Goal(row, f"{metric.unit}, of the best peer's", aim, metric.more, reached)


def _against(row: str, peer: str, key: str, words: str, aim: float) -> Goal:
    def reached(cells: Cells) -> float | None:
        return ratio(_ours(cells, row), cells.get(row, {}).get(peer, Cell()), key)

    return Goal(row, words, aim, more=False, reached=reached)


def _itself(row: str, key: str, words: str, aim: float) -> Goal:
    def reached(cells: Cells) -> float | None:
        return median(_ours(cells, row), key)

    return Goal(row, words, aim, more=False, reached=reached, unit="", digits=0)


def _flat(aim: float) -> Goal:
    few, many = (f"conns{count}" for count in FLAT)

    def reached(cells: Cells) -> float | None:
        # Not ratio(): the rounds of two rows are minutes apart.
        first, last = (median(_ours(cells, row), "cpu") for row in (few, many))
        return last / first if first and last else None

    return Goal(many, f"CPU an operation, of that with {FLAT[0]}", aim, more=False, reached=reached)


def _all(row: str, **aims: float) -> list[Goal]:
    return [_against_best(row, key, aim) for key, aim in aims.items()]


GOALS = (
    *_all("bulk1", gbits=1.0, cpu=1.05),
    *_all("bulk8", gbits=1.0, cpu=1.05),
    *_all("redis1", rate=1.03, cpu=0.92),
    *_all("redis16", rate=0.98, cpu=0.95),
    *_all("ping64", p50=1.02, p99=1.02, cpu=0.95),
    *_all("ping16k", p50=1.02, p99=1.02, cpu=0.95),
    *_all("http", rate=1.03, cpu=0.92),
    _itself("http60", "errors", "errors", 0),
    *_all("udp64", rate=1.6, cpu=0.4),
    *_all("udp1400", rate=1.6, cpu=0.4),
    *_all("udpping", p50=1.02),
    *_all("udpbulk", gbits=3.0),
    _itself("idle", "user", "user memory a connection, bytes", 300),
    _itself("idle", "switches", "wake-ups in 2 s, the worker's heartbeats", 2),
    _against("start100", "docker-proxy", "pss", "PSS, of docker-proxy's", 1.0),
    _flat(1.15),
)
