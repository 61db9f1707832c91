"""Which process is stuck: pure judgement of how long it has been silent, for the supervisor to act on.

A worker's loop writes the time of its latest turn into its counters page, every 2 s when it is idle. A
worker that is stopped, or caught in a call that never returns, does not.

Invariants:

- Silence counts only while this process was looking. It is late for a look where it was stopped itself, or
  frozen with its workers, or starved: then everybody gets a whole interval anew.
- A process that runs, or waits for a disk, may only be starved: it gets RUNNING_PATIENCE_S. So does one
  that spins, which looks the same. The state is asked for only where somebody is silent.
- One that has ended is not stuck: word of its end is on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ambassador.system.processes import ProcessState

TIMEOUT_S = 3.0
"""A worker that is well beats every 2 s (BEAT_MS of _common.pxd); stopped, it is replaced within 5 s."""

BUSY_TIMEOUT_S = 30.0

MIN_INTERVAL_S = 0.25
"""Looks are at least this far apart, however many there are to look at."""

LATE_S = 1.0
"""A look that comes this much later than planned says that the looker was away."""

_PATIENCE = {
    ProcessState.WAITING: TIMEOUT_S,
    ProcessState.RUNNING: BUSY_TIMEOUT_S,
    ProcessState.ENDED: math.inf,
}


class Watchdog:
    """`next_check` is the moment of the next look. At each, `is_stuck` is asked of every process."""

    def __init__(self) -> None:
        self.next_check = 0.0
        self._now = 0.0
        self._fair_from = 0.0

    def start_check(self, now: float) -> bool:
        """Whether it is time for a look, which begins with this."""
        if now < self.next_check:
            return False
        if now > self.next_check + LATE_S:
            self._fair_from = now
        self._now, self.next_check = now, now + TIMEOUT_S
        return True

    def is_stuck(self, last_heartbeat: float, state: Callable[[], ProcessState]) -> bool:
        """Whether a process that gave its last sign of life then has been silent for too long."""
        since = max(last_heartbeat, self._fair_from)
        until = since + TIMEOUT_S
        if until <= self._now:
            until = since + _PATIENCE[state()]
        self.next_check = min(self.next_check, max(until, self._now + MIN_INTERVAL_S))
        return until <= self._now
