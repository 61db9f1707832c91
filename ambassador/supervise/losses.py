"""Totals over the deaths of workers, and the log lines of what was lost. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ambassador.counters import COUNTERS, Counter
from ambassador.values import Protocol


class Totals:
    """The counters of one path. All but gauges never fall, also if a worker dies."""

    def __init__(self, protocol: Protocol) -> None:
        self._rows = COUNTERS[protocol]
        self._ended = dict.fromkeys((row.name for row in self._rows if not row.gauge), 0)

    def add(self, last: Mapping[str, int]) -> None:
        """The last counters of a worker that has been reaped."""
        for name in self._ended:
            self._ended[name] += last.get(name, 0)

    def sum(self, living: Iterable[Mapping[str, int]]) -> dict[str, int]:
        """All that was counted, by the living and the dead; a gauge is the sum over the living."""
        total = {row.name: self._ended.get(row.name, 0) for row in self._rows}
        for each in living:
            for name, value in each.items():
                total[name] += value
        return total


class Losses:
    """Which losses have not been reported yet."""

    def __init__(self, protocol: Protocol) -> None:
        self._rows = [row for row in COUNTERS[protocol] if row.loss]
        self._parts = [row for row in self._rows if row.part_of]
        self._reported: dict[str, int] = {}

    def risen(self, counters: Mapping[str, int]) -> Iterator[tuple[Counter, int]]:
        """What was lost since the last call: the row, and by how much it rose."""
        now = dict(counters)
        for part in self._parts:
            if part.name in now:
                now[part.part_of] -= now[part.name]
        for row in self._rows:
            rise = now.get(row.name, 0) - self._reported.get(row.name, 0)
            if rise > 0:
                self._reported[row.name] = now[row.name]
                yield row, rise
