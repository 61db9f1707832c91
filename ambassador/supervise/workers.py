"""Every worker process of this parent, and the fork server that forks them.

Invariants:

- A worker that was asked for is reported as exited once, whatever became of it and of its fork server.
- The fork server's exit costs no worker: pidfds report the exits of those it left behind.
- Nothing here waits, and nothing raises for lack of descriptors, memory or processes but `fork`.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ambassador._worker import EXIT_NO_SANDBOX
from ambassador.supervise.forkserver import Exited, Forked, ForkServer, ForkServerGone
from ambassador.supervise.slot import RestartDelay
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker import WorkerProcess

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Living:
    """A worker that was asked for, and who is told how it exited."""

    process: WorkerProcess
    exited: Callable[[str], None]


@dataclass(slots=True, eq=False)
class StoppingWorker:
    """A worker that was told to stop, and when to kill it."""

    process: WorkerProcess
    kill_at: float


class Workers:
    """Owns the fork server. `no_sandbox` is called if a worker could not enter a required sandbox.

    The handles of workers belong to their slots.
    """

    def __init__(
        self,
        fork_server: ForkServer,
        selector: selectors.BaseSelector,
        timings: Timings,
        no_sandbox: Callable[[WorkerProcess], None],
    ) -> None:
        self.stopping: list[StoppingWorker] = []
        self.repair_at: float | None = None
        self.fork_server: ForkServer | None = fork_server
        self._selector = selector
        self._timings = timings
        self._no_sandbox = no_sandbox
        self._have_run = False
        self._pending: deque[Living] = deque()  # in the order of the requests
        self._living: dict[int, Living] = {}
        self._unwatched: dict[int, tuple[int, Callable[[], None]]] = {}
        self._fork_server_delay = RestartDelay(timings)
        self._fork_server_started = time.monotonic()
        self._watch(fork_server.fileno(), selectors.EVENT_READ, self._receive)

    def close(self) -> None:
        """Close the fork server, which kills what is left of its children."""
        if self.fork_server is not None:
            self.fork_server.close()

    def processes(self) -> list[WorkerProcess]:
        """All that run, the stopping ones among them."""
        return [living.process for living in self._living.values()]

    # -- a worker's life

    def fork(
        self, process: WorkerProcess, descriptors: list[int], exited: Callable[[str], None]
    ) -> None:
        """Ask for a worker with these descriptors. `exited` is called later, with one line on how.

        Raises ForkServerGone, BlockingIOError if the fork server is stopped or starved, and OSError.
        """
        if self.fork_server is None:
            raise ForkServerGone
        try:
            self.fork_server.request(descriptors)
        except ForkServerGone:
            self._fork_server_exited()
            raise
        process.close_passed()
        self._pending.append(Living(process, exited))

    def flush(self, process: WorkerProcess) -> None:
        """Send what waits for room in the worker's control pipe, now and whenever there is room."""
        process.flush()
        if process.blocked_on >= 0:
            ready = partial(self._room, process, process.blocked_on)
            self._watch(process.blocked_on, selectors.EVENT_WRITE, ready)

    def stop(self, process: WorkerProcess, deadline_ms: int) -> None:
        """Tell it to drain, and kill it if it has not exited shortly after the deadline."""
        process.drain(deadline_ms)
        self.flush(process)
        kill_at = time.monotonic() + deadline_ms / 1000 + self._timings.kill_grace
        self.stopping.append(StoppingWorker(process, kill_at))

    def kill_overdue(self, now: float) -> None:
        """Kill the stopping workers whose time is over; again after the grace, if need be."""
        for stopping in self.stopping:
            if stopping.kill_at <= now:
                stopping.process.kill()
                stopping.kill_at = now + self._timings.kill_grace

    def stop_now(self) -> None:
        """Do not wait for the deadlines of the stopping workers."""
        for stopping in self.stopping:
            stopping.kill_at = 0.0

    def _room(self, process: WorkerProcess, waited_on: int) -> None:
        process.flush()
        if process.blocked_on < 0:
            self._unwatch(waited_on)

    # -- the fork server

    def _receive(self) -> None:
        try:
            while self.fork_server is not None and (message := self.fork_server.receive()):
                if isinstance(message, Forked):
                    self._forked(message)
                else:
                    self._exited(message)
        except ForkServerGone:
            self._fork_server_exited()
        except OSError as error:  # no memory for the message: it is still there
            log.debug("fork server not readable", extra={"fields": {"error": str(error)}})

    def _forked(self, message: Forked) -> None:
        living = self._pending.popleft()
        if message.pid <= 0:
            self._end(living, f"could not be forked: {os.strerror(-message.pid)}")
        elif message.pidfd < 0:  # its control pipe is closed, so it exits by itself
            self._end(living, "could not be watched: no descriptor for its pidfd")
        else:
            living.process.started(message.pid, message.pidfd)
            self._living[message.pid] = living

    def _exited(self, message: Exited) -> None:
        living = self._living.pop(message.pid, None)
        if living is None:
            return
        self._have_run = self._have_run or any(each.has_run for each in self.processes())
        if (
            os.waitstatus_to_exitcode(message.status) == EXIT_NO_SANDBOX
            and living.process.refused_to_run
            and not self._have_run  # else the sandbox can be had, and the code is a worker's whim
        ):
            self._no_sandbox(living.process)
        self._end(living, _describe(message.status))

    def _exited_unreaped(self, living: Living) -> None:
        """A worker that outlived its fork server: nobody can say how it exited."""
        self._living.pop(living.process.pid, None)
        self._end(living, "exited after its fork server")

    def _end(self, living: Living, how: str) -> None:
        process = living.process
        self._unwatch(process.blocked_on)
        self._unwatch(process.pidfd)
        self.stopping = [each for each in self.stopping if each.process is not process]
        living.exited(how)

    def _fork_server_exited(self) -> None:
        """Its workers go on. Those that it still owed are reported as exited."""
        former, self.fork_server = self.fork_server, None
        if former is None:
            return
        self._unwatch(former.fileno())
        former.close()
        now = time.monotonic()
        delay = self._fork_server_delay.exited(self._fork_server_started, now)
        fields = {"pid": former.pid, "restart_in": f"{delay:g}s"}
        log.error("fork server exited, restarting", extra={"fields": fields})
        self.repair_at = now + delay
        self.repair(now)
        for living in list(self._living.values()):
            exited = partial(self._exited_unreaped, living)
            self._watch(living.process.pidfd, selectors.EVENT_READ, exited)
        owed, self._pending = self._pending, deque()
        for living in owed:
            self._end(living, "never started, its fork server exited")

    # -- what failed

    def repair(self, now: float) -> None:
        """Try again what failed: start a fork server, watch a descriptor."""
        if self.repair_at is None or self.repair_at > now:
            return
        self.repair_at = None
        unwatched, self._unwatched = self._unwatched, {}
        for fd, (events, ready) in unwatched.items():
            self._watch(fd, events, ready)
        if self.fork_server is None:
            self._launch(now)

    def _launch(self, now: float) -> None:
        try:
            server = ForkServer.launch()
        except (OSError, MemoryError) as error:
            self.repair_at = now + self._timings.start_retry
            fields = {"reason": f"{error}; raise the limits on processes and descriptors"}
            log.error("cannot start a fork server, trying again", extra={"fields": fields})
            return
        self.fork_server, self._fork_server_started = server, now
        self._watch(server.fileno(), selectors.EVENT_READ, self._receive)

    def _watch(self, fd: int, events: int, ready: Callable[[], None]) -> None:
        if fd in self._selector.get_map():
            return
        try:
            self._selector.register(fd, events, ready)
        except OSError:  # no memory, or a limit on watches (epoll_ctl(2))
            self._watch_later(fd, events, ready)

    def pause(self, key: selectors.SelectorKey) -> None:
        """Do not wait for this descriptor for a while, if it is still waited for: its handler failed."""
        if key.fd in self._selector.get_map():
            self._selector.unregister(key.fd)
            self._watch_later(key.fd, key.events, key.data)

    def _watch_later(self, fd: int, events: int, ready: Callable[[], None]) -> None:
        self._unwatched[fd] = (events, ready)
        retry_at = time.monotonic() + self._timings.start_retry
        self.repair_at = retry_at if self.repair_at is None else min(retry_at, self.repair_at)

    def _unwatch(self, fd: int) -> None:
        self._unwatched.pop(fd, None)
        if fd >= 0 and fd in self._selector.get_map():
            self._selector.unregister(fd)


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"
