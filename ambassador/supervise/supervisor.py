"""The parent's loop: brings what runs to what is desired, and keeps it there.

    wait until the first job is due -> dispatch descriptors -> handle signals -> run the jobs that are due,
    the first of which is to reconcile

Invariants:

- The loop blocks nowhere but in its wait: workers are told through non-blocking pipes, other threads ask
  Docker, and logging has a thread of its own.
- Only this thread touches listeners and workers. Other threads call nothing but `wake`.
- The parent carries no traffic: if this loop stands still, established listeners go on.
- A backend that goes away is told to the workers before anything else is done with the event.
- No exception leaves a duty: what raised waits and is tried again, the rest goes on (guard.py).
"""

from __future__ import annotations

import logging
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType

from ambassador.model import DesiredState, ListenAddress, ListenerSpec
from ambassador.options import Sandbox
from ambassador.reconcile import Action, Close, Open, Replace, Update, fit, plan
from ambassador.supervise import jobs, sandbox
from ambassador.supervise.forkserver import ForkServer
from ambassador.supervise.guard import Guard
from ambassador.supervise.listener import RunningListener
from ambassador.supervise.port_limits import PortLimits
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker import WorkerProcess
from ambassador.supervise.worker_path import WorkerPath
from ambassador.supervise.workers import Workers
from ambassador.system.processes import PortOwners, reap_children
from ambassador.values import Protocol

log = logging.getLogger(__name__)


class Supervisor:
    """Runs workers for what `desired` returns, which is asked again after each `wake`.

    Owns `fork_server`. `run` returns the exit code; it must be called from the main thread (signals).
    """

    def __init__(
        self,
        fork_server: ForkServer,
        desired: Callable[[], DesiredState],
        *,
        sandbox: Sandbox,
        timings: Timings = Timings(),  # noqa: B008 - frozen
    ) -> None:
        self._desired = desired
        self._listeners: dict[ListenAddress, RunningListener] = {}
        self._paths: dict[ListenAddress, WorkerPath] = {}
        self._problems: frozenset[str] = frozenset()
        self._unfinished: set[ListenAddress] = set()
        self._signals: deque[int] = deque()
        self._limits = PortLimits()
        self._guard = Guard(timings.start_retry)
        self._draining = False
        self._exit_code = 0
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._workers = Workers(fork_server, self._selector, timings, self._no_sandbox)
        self._new_path = partial(
            WorkerPath,
            workers=self._workers,
            limits=self._limits,
            owners=PortOwners(),
            sandbox=sandbox,
            timings=timings,
        )
        self._changes = jobs.Reconcile(self._reconcile, timings)
        self._check_fork_server = jobs.CheckForkServer(self._workers, timings)
        self._jobs: tuple[jobs.Job, ...] = (
            self._changes,
            self._check_fork_server,
            jobs.StartWorkers(self._paths.values, self._guard),
            jobs.StopDeadlines(self._workers),
            jobs.WatchWorkers(self._paths.values, self._guard, timings),
            jobs.ReportLosses(self._paths.values, self._guard, timings),
            jobs.ReportSandbox(self._workers, sandbox, timings),
        )

    def wake(self) -> None:
        """Ask `desired` again soon. Safe from any thread."""
        self._changes.pending = True
        with suppress(BlockingIOError):  # a byte is waiting already
            self._wake_write.send(b"\0")

    # -- the loop

    def run(self) -> int:
        """Until a stop signal has been obeyed: 0, or 1 if the sandbox is required and missing."""
        self._catch_signals()
        while not (self._draining and not self._workers.stopping):
            for key, _ in self._selector.select(self._timeout()):
                if not self._guard.run(key.fd, key.data):
                    self._workers.pause(key)
            self._handle_signals()
            self._run_due()
        self._workers.close()
        return self._exit_code

    def _timeout(self) -> float | None:
        """Until the first job is due: seconds, None if none is."""
        moments = [due for job in self._jobs if (due := self._guard.due(job, job.due)) is not None]
        return max(min(moments) - time.monotonic(), 0) if moments else None

    def _run_due(self) -> None:
        now = time.monotonic()
        for job in self._jobs:
            due = self._guard.due(job, job.due)
            if due is not None and due <= now:
                self._guard.run(job, partial(job.run, now), duty=type(job).__name__)

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)

    # -- signals

    def _catch_signals(self) -> None:
        def note(number: int, _: FrameType | None) -> None:
            self._signals.append(number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, note)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            self._guard.run(("signal", number), partial(self._handle_signal, number))

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            reap_children()
            self._check_fork_server.child_changed(time.monotonic())
        elif self._draining:
            log.warning("second stop signal, closing connections now")
            self._workers.stop_now()
        else:
            log.info("stopping", extra={"fields": {"signal": signal.Signals(number).name}})
            self._drain()

    def _drain(self) -> None:
        """Take no new work. Workers finish what is open, up to the deadline."""
        self._draining = True
        for listen, listener in list(self._listeners.items()):
            close = partial(self._close, listen, listener.spec.options.drain)
            self._guard.run(listen, close, port=str(listen))

    def _no_sandbox(self, process: WorkerProcess) -> None:
        """A worker cannot enter the sandbox that is required, so none can: stop."""
        if self._exit_code:
            return
        self._exit_code = 1
        missing = sandbox.missing_steps(process.sandbox)
        advice = f"{sandbox.advice(missing)}; or use -sandbox auto"
        fields = {"missing": ",".join(missing), "advice": advice}
        log.error("the sandbox is required and cannot be had", extra={"fields": fields})
        if not self._draining:
            self._drain()

    # -- desired state

    def _reconcile(self) -> bool:
        """Whether all was carried out; if not, the rest is tried again."""
        if self._draining:
            return True
        desired = self._desired()
        desired = fit(desired, self._listeners, *self._limits.max_listeners(desired))
        running = {listen: listener.spec for listen, listener in self._listeners.items()}
        actions = plan(desired.listeners, running)
        done = {
            action.listen if isinstance(action, Close) else action.spec.listen for action in actions
        }
        again = {listen for listen in self._unfinished & running.keys() if listen not in done}
        if self._limits.share_local_ports(desired.listeners.values()):
            again |= {each for each in running.keys() - done if each.protocol is Protocol.UDP}
        # A backend that has gone is told first. What ends still comes before what is opened.
        actions.sort(key=lambda action: not isinstance(action, Update | Replace))
        applied = [self._apply(action) for action in actions]
        self._unfinished = {listen for listen in applied if listen is not None}
        for listen in again:
            if not self._guard.run(listen, self._listeners[listen].refresh, port=str(listen)):
                self._unfinished.add(listen)
        for problem in desired.problems:
            if problem not in self._problems:
                log.error("%s", problem)
        self._problems = frozenset(desired.problems)
        return not self._unfinished

    def _apply(self, action: Action) -> ListenAddress | None:
        """The listener that is to be told again, if that failed."""
        match action:
            case Open(spec):
                listen, call = spec.listen, partial(self._open, spec)
            case Update(spec) | Replace(spec):
                listen, call = spec.listen, partial(self._listeners[spec.listen].update, spec)
            case Close(listen):
                call = partial(self._withdraw, listen)
        return None if self._guard.run(listen, call, port=str(listen)) else listen

    def _withdraw(self, listen: ListenAddress) -> None:
        fields = self._listeners[listen].fields()
        log.info("no longer exposed, closing the listener", extra={"fields": fields})
        self._close(listen, 0)

    def _open(self, spec: ListenerSpec) -> None:
        listener = RunningListener(spec)
        path = self._new_path(listener)
        self._listeners[spec.listen], self._paths[spec.listen] = listener, path
        listener.open([path])

    def _close(self, listen: ListenAddress, deadline_ms: int) -> None:
        self._paths.pop(listen)
        self._listeners.pop(listen).close(deadline_ms)
