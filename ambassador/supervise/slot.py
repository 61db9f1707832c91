"""A worker's place: the counters page that outlives its workers, and the delay before the next start."""

from __future__ import annotations

from ambassador.counters import COUNTERS
from ambassador.supervise.page import CountersPage
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker import WorkerProcess
from ambassador.values import Protocol

DEGRADED_AFTER = 5
"""Exits in a row: the slot is degraded until a worker has run for `Timings.stable`."""


class RestartDelay:
    """The delay before the next start of a process that keeps exiting; 0 after the first exit."""

    def __init__(self, timings: Timings) -> None:
        self.failures = 0
        self._timings = timings

    def exited(self, started: float, now: float) -> float:
        """The process that was started then has exited: seconds until the next start."""
        self.failures = 1 if now - started >= self._timings.stable else self.failures + 1
        if self.failures == 1:
            return 0.0
        doubled = self._timings.restart_first * 2.0 ** min(self.failures - 2, 16)
        return min(doubled, self._timings.restart_last)


class WorkerSlot:
    """The place of one worker: `worker` while there is one, else `start_at`, the moment for the next.

    Owns its page and its worker's handle.
    """

    def __init__(self, protocol: Protocol, timings: Timings) -> None:
        self.worker: WorkerProcess | None = None
        self.start_at: float | None = 0.0
        self.started = 0.0
        self._protocol = protocol
        self._timings = timings
        self._delay = RestartDelay(timings)
        self._page: CountersPage | None = None
        self._highest: dict[str, int] = {}

    @property
    def page(self) -> CountersPage:
        """The page, made by the first who asks. Raises OSError if it cannot be made."""
        if self._page is None:
            self._page = CountersPage(self._protocol)
        return self._page

    def assign(self, worker: WorkerProcess, now: float) -> None:
        self.worker, self.start_at, self.started = worker, None, now

    def worker_exited(self, now: float) -> float:
        """Seconds until the next start. Call `end_counters` first."""
        self._close_worker()
        delay = self._delay.exited(self.started, now)
        self.start_at = now + delay
        return delay

    def retry_at(self, when: float) -> None:
        """No worker could be asked for; that is no fault of the worker."""
        self._close_worker()
        self.start_at = when

    @property
    def degraded(self) -> bool:
        return self._delay.failures >= DEGRADED_AFTER

    def recover(self, now: float) -> None:
        """No longer degraded, if its worker has run long enough."""
        if self.worker is not None and now - self.started >= self._timings.stable:
            self._delay.failures = 0

    def counters(self) -> dict[str, int]:
        """What its worker has counted; all but gauges only rise, whatever the worker writes."""
        if self._page is None:
            return {}
        now = self._page.counters()
        for row in COUNTERS[self._protocol]:
            if not row.gauge:
                now[row.name] = max(now[row.name], self._highest.get(row.name, 0))
        self._highest = now
        return now

    def end_counters(self) -> dict[str, int]:
        """The last counters of a worker that has been reaped. Clears the page for the next."""
        last = self.counters()
        self._highest = {}
        if self._page is not None:
            self._page.clear()
        return last

    def close(self) -> None:
        self._close_worker()
        self.start_at = None
        if self._page is not None:
            self._page.close()
            self._page = None

    def _close_worker(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None
