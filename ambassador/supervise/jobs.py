"""The supervisor's duties. A new duty is a class here and a row in `Supervisor.__init__`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from ambassador.options import Sandbox
from ambassador.supervise import sandbox
from ambassador.supervise.guard import Guard
from ambassador.supervise.timings import Timings
from ambassador.supervise.watchdog import Watchdog
from ambassador.supervise.worker import WorkerProcess
from ambassador.supervise.worker_path import WorkerPath
from ambassador.supervise.workers import Workers
from ambassador.system.processes import ProcessState, process_state

log = logging.getLogger(__name__)

Paths = Callable[[], Iterable[WorkerPath]]
"""The paths of all listeners that are open now."""


class Job(Protocol):
    """A duty that is due at moments of its own. `run` never waits and never raises for lack of anything.

    If either raises all the same, that is logged, and the duty is tried again later.
    """

    def due(self) -> float | None:
        """The next moment (time.monotonic) at which to run, None if there is nothing to do."""

    def run(self, now: float) -> None:
        """Do what is due."""


class Reconcile:
    """Brings what runs to what is desired, whenever that may have changed."""

    def __init__(self, reconcile: Callable[[], bool], timings: Timings) -> None:
        self.pending = True
        self._reconcile = reconcile
        self._retry = timings.start_retry
        self._again: float | None = None

    def due(self) -> float | None:
        return 0.0 if self.pending else self._again

    def run(self, now: float) -> None:
        self.pending = False  # first, so that a wake from now on is not lost
        self._again = now + self._retry  # if it raises
        if self._reconcile():
            self._again = None


class StartWorkers:
    """Binds ports and starts workers, and tries again what failed."""

    def __init__(self, paths: Paths, guard: Guard) -> None:
        self._paths = paths
        self._guard = guard

    def due(self) -> float | None:
        moments = (self._guard.due(path, path.due) for path in self._paths())
        return min((moment for moment in moments if moment is not None), default=None)

    def run(self, now: float) -> None:
        for path in self._paths():
            due = self._guard.due(path, path.due)
            if due is not None and due <= now:
                self._guard.run(path, partial(path.run, now), **path.fields())


class StopDeadlines:
    """Kills workers that were told to stop and have not exited in time."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def due(self) -> float | None:
        return min((stopping.kill_at for stopping in self._workers.stopping), default=None)

    def run(self, now: float) -> None:
        self._workers.kill_overdue(now)


class WatchWorkers:
    """Kills workers that do not respond. Their exit is reported like any other."""

    def __init__(self, paths: Paths, guard: Guard, timings: Timings) -> None:
        self._paths = paths
        self._guard = guard
        self._watchdog = Watchdog(timings)

    def due(self) -> float | None:
        return self._watchdog.next_check if any(True for _ in self._paths()) else None

    def run(self, now: float) -> None:
        if not self._watchdog.start_check(now):
            return
        for path in self._paths():
            self._guard.run((self, path), partial(self._check_path, path, now))

    def _check_path(self, path: WorkerPath, now: float) -> None:
        for process in path.processes():
            if process.pid and not process.kill_sent:
                self._check_worker(path, process, now)

    def _check_worker(self, path: WorkerPath, process: WorkerProcess, now: float) -> None:
        if self._watchdog.is_stuck(process.last_heartbeat, partial(process_state, process.pid)):
            silent = now - process.last_heartbeat
            fields = path.fields() | {"pid": process.pid, "silent_s": f"{silent:.1f}s"}
            log.error("worker not responding, killing it", extra={"fields": fields})
            process.kill_sent = True
            process.kill()


class ReportLosses:
    """Logs what was lost, and which ports have recovered."""

    def __init__(self, paths: Paths, guard: Guard, timings: Timings) -> None:
        self._paths = paths
        self._guard = guard
        self._interval = timings.report
        self._next = 0.0

    def due(self) -> float | None:
        return self._next if any(True for _ in self._paths()) else None

    def run(self, now: float) -> None:
        if now < self._next:
            return
        self._next = now + self._interval
        for path in self._paths():
            self._guard.run((self, path), partial(self._report, path, now))

    @staticmethod
    def _report(path: WorkerPath, now: float) -> None:
        path.report_losses()
        path.recover(now)


class ReportSandbox:
    """Logs once what the workers could not give up. All have the same: the first speaks for the others."""

    def __init__(self, workers: Workers, wanted: Sandbox, timings: Timings) -> None:
        self._workers = workers
        self._next: float | None = 0.0 if wanted is Sandbox.AUTO else None
        self._wait = timings.sandbox_first
        self._longest_wait = timings.sandbox_last

    def due(self) -> float | None:
        return self._next if self._workers.processes() else None

    def run(self, now: float) -> None:
        if self._next is None or self._next > now:
            return
        words = (process.sandbox for process in self._workers.processes())
        word = next(filter(None, words), 0)
        if not word:
            self._next = now + self._wait
            self._wait = min(self._wait * 2, self._longest_wait)
            return
        self._next = None
        if missing := sandbox.missing_steps(word):
            fields = {"missing": ",".join(missing), "advice": sandbox.advice(missing)}
            log.warning("workers run without all of their sandbox", extra={"fields": fields})


class CheckForkServer:
    """Kills a fork server that stays stopped, and repairs what failed around it."""

    def __init__(self, workers: Workers, timings: Timings) -> None:
        self._workers = workers
        self._watchdog = Watchdog(timings)
        self._stopped_at: float | None = None

    def child_changed(self, now: float) -> None:
        """SIGCHLD: the fork server may have been stopped, or set going again."""
        server = self._workers.fork_server
        if server is None or not server.stopped:
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now

    def due(self) -> float | None:
        moments = [self._workers.repair_at]
        if self._stopped_at is not None:
            moments.append(self._watchdog.next_check)
        return min((moment for moment in moments if moment is not None), default=None)

    def run(self, now: float) -> None:
        self._workers.repair(now)
        server, stopped_at = self._workers.fork_server, self._stopped_at
        if server is None:
            self._stopped_at = None
        elif stopped_at is None or not self._watchdog.start_check(now):
            return
        elif self._watchdog.is_stuck(stopped_at, lambda: ProcessState.WAITING):
            log.error("fork server stopped, killing it", extra={"fields": {"pid": server.pid}})
            server.kill()
            self._stopped_at = None
