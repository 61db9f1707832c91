"""Which process is stuck: a pure judgement of how long it has been silent. The supervisor acts on it.

A worker's loop writes the time of its latest turn into its counters page, every 2 s when it is idle. A
worker that is stopped, or caught in a call that never returns, does not.

Invariants:

- Silence counts only while this process was checking. A late check says that this process itself was
  stopped, frozen or starved: then every worker gets a whole interval anew.
- A process that runs, or waits for a disk, may only be starved: it gets `watchdog_busy_timeout`. So does one
  that spins, which looks the same. The state is asked for only if a process is silent.
- A process that has exited is not stuck: the fork server reports its exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ambassador.supervise.timings import Timings
from ambassador.system.processes import ProcessState


class Watchdog:
    """`next_check` is the moment of the next check. In each, `is_stuck` is asked of every process."""

    def __init__(self, timings: Timings) -> None:
        self.next_check = 0.0
        self._timings = timings
        self._timeouts = {
            ProcessState.WAITING: timings.watchdog_timeout,
            ProcessState.RUNNING: timings.watchdog_busy_timeout,
            ProcessState.ENDED: math.inf,
        }
        self._now = 0.0
        self._fair_from = 0.0

    def start_check(self, now: float) -> bool:
        """Whether it is time for a check. If so, it begins with this."""
        if now < self.next_check:
            return False
        if now > self.next_check + self._timings.watchdog_late:
            self._fair_from = now
        self._now, self.next_check = now, now + self._timings.watchdog_timeout
        return True

    def is_stuck(self, last_heartbeat: float, state: Callable[[], ProcessState]) -> bool:
        """Whether a process that gave its last sign of life then has been silent for too long."""
        since = max(last_heartbeat, self._fair_from)
        until = since + self._timings.watchdog_timeout
        if until <= self._now:
            until = since + self._timeouts[state()]
        earliest = self._now + self._timings.watchdog_min_interval
        self.next_check = min(self.next_check, max(until, earliest))
        return until <= self._now
