"""The parent's loop: brings what runs to what is desired, and keeps it there.

    wait -> dispatch (wake, fork server, a worker's pipe) -> signals -> reconcile -> start what is due
         -> kill what is overdue or stuck -> report what was lost

Invariants:

- Exactly one live worker per slot, and one slot per listener unless told otherwise; a port's sockets
  outlive its workers, so it never refuses.
- The loop blocks nowhere but in its wait: workers are told through non-blocking pipes, Docker is asked by
  other threads, logging has a thread of its own.
- Only this thread touches posts and handles; other threads call nothing but `wake`.
- The parent carries no traffic: should this loop stand still, established listeners go on.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType

from ambassador import control
from ambassador.supervise import sandbox
from ambassador._worker import EXIT_NO_SANDBOX
from ambassador.model import DesiredState, Listener
from ambassador.system.processes import ProcessState
from ambassador.values import Protocol
from ambassador.options import Sandbox
from ambassador.supervise.forkserver import Exited, Forked, ForkServer, ForkServerGone
from ambassador.supervise.post import Post, WorkerSlot
from ambassador.reconcile import Repoint, Start, Stop, plan
from ambassador.system.processes import port_owner, process_state
from ambassador.supervise.watchdog import Watchdog
from ambassador.supervise.worker import LOSSES, WorkerProcess

log = logging.getLogger(__name__)

BIND_RETRY_S = 1.0
STUCK_FORK_SERVER_RETRY_S = 0.2
REPORT_S = 5.0
"""How often the counters are looked at for losses, so that each is in the log, and a flood is few lines."""

KILL_GRACE_S = 0.25
"""Past its deadline a draining worker gets this long before SIGKILL."""

SANDBOX_LOOK_FIRST_S = 0.02
SANDBOX_LOOK_LAST_S = 1.0
"""How often to look what the first worker has given up, until it has said so: doubling, no longer apart."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What every worker is told; milliseconds and numbers, see control.Start. `drain_ms` is for SIGTERM, and
    `workers` is the number of processes per listener. Where `sandbox` is required and some of it cannot be
    had, the program ends.
    """

    hold_ms: int = 10_000
    drain_ms: int = 300
    max_sessions: int = 16_384
    session_idle_ms: int = 90_000
    max_connections: int = 0
    idle_ms: int = 0
    half_close_ms: int = 0
    workers: int = 1
    sandbox: Sandbox = Sandbox.AUTO


@dataclass(slots=True)
class StoppingWorker:
    """A worker on its way out, and when patience ends."""

    handle: WorkerProcess
    kill_at: float


class Supervisor:
    """Runs workers for what `desired` returns, which is asked again after each `wake`.

    Owns `fork_server`. `run` returns the exit code; it must be called from the main thread (signals).
    """

    def __init__(
        self, fork_server: ForkServer, desired: Callable[[], DesiredState], limits: Limits
    ) -> None:
        self._fork_server = fork_server
        self._desired = desired
        self._limits = limits
        self._posts: dict[Listener, Post] = {}
        self._stopping_workers: list[StoppingWorker] = []
        self._pending: deque[WorkerProcess] = deque()
        self._problems: tuple[str, ...] = ()
        self._signals: deque[int] = deque()
        self._changed = True
        self._draining = False
        self._report_at = 0.0
        self._watchdog = Watchdog()
        self._fork_server_stopped_at: float | None = None
        self._exit_code = 0
        # Every worker has the same to give up: the first that has done it speaks for all.
        self._sandbox_look: float | None = 0.0 if limits.sandbox is Sandbox.AUTO else None
        self._sandbox_wait = SANDBOX_LOOK_FIRST_S
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._selector.register(fork_server, selectors.EVENT_READ, self._receive_fork_server)

    # -- from other threads

    def wake(self) -> None:
        """Ask `desired` again soon. Safe from any thread."""
        self._changed = True
        try:
            self._wake_write.send(b"\0")
        except BlockingIOError:
            pass  # a byte is waiting already

    # -- the loop

    def run(self) -> int:
        """Until SIGTERM or SIGINT has been obeyed: 0. Or 1: the sandbox is required and not to be had."""
        self._catch_signals()
        while not self._finished():
            for key, _ in self._selector.select(self._timeout()):
                key.data()
            self._handle_signals()
            self._reconcile()
            self._start_due()
            self._kill_overdue()
            self._kill_stuck()
            self._report_losses()
            self._look_at_sandbox()
        self._fork_server.close()
        return self._exit_code

    def _finished(self) -> bool:
        return self._draining and not self._stopping_workers

    def _timeout(self) -> float | None:
        moments = [
            max(slot.due, post.bind_at)
            for post in self._posts.values()
            for slot in post.slots
            if slot.due is not None
        ]
        moments += [stopping.kill_at for stopping in self._stopping_workers]
        if self._posts:
            moments.append(self._report_at)
        if self._posts or self._stopping_workers:
            moments.append(self._watchdog.next_check)
        if self._sandbox_look is not None and self._posts:
            moments.append(self._sandbox_look)
        if self._changed:
            return 0
        return max(min(moments) - time.monotonic(), 0) if moments else None

    def _woken(self) -> None:
        try:
            self._wake_read.recv(4096)
        except BlockingIOError:
            pass

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
            if number == signal.SIGCHLD:
                _reap()
                self._check_fork_server()
            elif self._draining:
                log.warning("second stop signal, closing connections now")
                self._kill_now()
            else:
                log.info("stopping", extra={"fields": {"signal": signal.Signals(number).name}})
                self._drain()

    def _drain(self) -> None:
        """Take no new work; workers finish what is open, up to the deadline."""
        self._draining = True
        for listener in list(self._posts):
            self._stop_listener(self._posts.pop(listener), self._limits.drain_ms)

    def _kill_now(self) -> None:
        for stopping in self._stopping_workers:
            stopping.kill_at = 0.0

    # -- desired state

    def _reconcile(self) -> None:
        if not self._changed or self._draining:
            self._changed = False
            return
        self._changed = False
        desired = self._desired()
        for problem in desired.problems:
            if problem not in self._problems:
                log.error("%s", problem)
        self._problems = desired.problems
        actual = {listener: post.route for listener, post in self._posts.items()}
        for action in plan(desired.routes, actual):
            match action:
                case Start():
                    self._posts[action.route.listener] = Post(action.route, self._limits.workers)
                case Repoint():
                    self._repoint(self._posts[action.route.listener], action)
                case Stop():
                    post = self._posts.pop(action.listener)
                    log.info(
                        "no longer exposed, closing the listener", extra={"fields": post.fields()}
                    )
                    self._stop_listener(post, 0)

    def _repoint(self, post: Post, action: Repoint) -> None:
        post.repoint(action.route)
        for worker in post.workers:
            self._await_pipe(worker)
        message = "backend changed" if action.route.backends else "no backend, holding new connections"
        log.info(message, extra={"fields": post.fields()})

    # -- starting

    def _start_due(self) -> None:
        now = time.monotonic()
        for post in self._posts.values():
            for slot in post.slots:
                if slot.due is not None and slot.due <= now and self._bound(post, now):
                    self._fork_worker(post, slot, now)

    def _bound(self, post: Post, now: float) -> bool:
        if post.bound or post.bind_at > now:
            return post.bound
        try:
            post.bind()
        except OSError as error:
            post.bind_at = now + BIND_RETRY_S
            reason = _bind_problem(post.listener, error)
            if reason != post.bind_error:
                log.error(
                    "cannot listen, trying again: %s", reason, extra={"fields": post.fields()}
                )
            post.bind_error = reason
            return False
        post.bind_error = ""
        log.info("listening", extra={"fields": post.fields()})
        return True

    def _fork_worker(self, post: Post, slot: WorkerSlot, now: float) -> None:
        start = control.Start(
            post.listener,
            hold_ms=self._limits.hold_ms,
            max_sessions=self._limits.max_sessions,
            session_idle_ms=self._limits.session_idle_ms,
            max_connections=self._limits.max_connections,
            idle_ms=self._limits.idle_ms,
            half_close_ms=self._limits.half_close_ms,
            sandbox=self._limits.sandbox,
        )
        handle, passed_fds = post.prepare(slot, start)
        slot.take(handle, now)
        try:
            self._fork_server.request(passed_fds)
        except BlockingIOError:  # the fork server is stopped or starved; it is asked again
            slot.retry_at(now + STUCK_FORK_SERVER_RETRY_S)
            return
        except ForkServerGone:
            slot.worker_exited(now)
            self._replace_fork_server()
            return
        self._pending.append(handle)

    # -- the fork server, births and deaths

    def _receive_fork_server(self) -> None:
        try:
            while (message := self._fork_server.receive()) is not None:
                if isinstance(message, Forked):
                    self._worker_started(message)
                else:
                    self._exited(message)
        except ForkServerGone:
            self._replace_fork_server()

    def _worker_started(self, message: Forked) -> None:
        handle = self._pending.popleft()
        if message.pid > 0:
            handle.started(message.pid, message.pidfd)
            self._await_pipe(handle)
            return
        reason = os.strerror(-message.pid)
        self._ended(handle, f"could not be forked: {reason}")

    def _exited(self, message: Exited) -> None:
        for handle in self._handles():
            if handle.pid == message.pid:
                if os.waitstatus_to_exitcode(message.status) == EXIT_NO_SANDBOX:
                    self._refuse(sandbox.missing_steps(handle.sandbox))
                self._ended(handle, _describe(message.status))
                return

    def _exited_unreaped(self, handle: WorkerProcess) -> None:
        """A worker whose fork server died before it: nobody can say how it ended."""
        self._ended(handle, "ended after its fork server")

    def _handles(self) -> list[WorkerProcess]:
        working = [worker for post in self._posts.values() for worker in post.workers]
        return working + [stopping.handle for stopping in self._stopping_workers]

    def _ended(self, handle: WorkerProcess, how: str) -> None:
        self._forget(handle)
        for stopping in self._stopping_workers:
            if stopping.handle is handle:
                self._stopping_workers.remove(stopping)
                handle.close()
                return
        post = self._posts[handle.listener]
        self._tell_losses(post, handle)
        was_degraded = post.degraded
        delay = post.slot_of(handle).worker_exited(time.monotonic())
        fields = {"port": post.listener.port, "protocol": post.listener.protocol.value}
        fields |= {"pid": handle.pid, "reason": how, "restart_in": f"{delay:g}s"}
        log.error("worker exited, restarting", extra={"fields": fields})
        if post.degraded and not was_degraded:
            log.error(
                "workers keep dying, the port is degraded: clients wait for the next one",
                extra={"fields": post.fields()},
            )

    def _replace_fork_server(self) -> None:
        """Its workers go on. Those it still owed are asked of the new one, and pidfds tell of the rest."""
        log.error(
            "fork server exited, restarting", extra={"fields": {"pid": self._fork_server.pid}}
        )
        self._selector.unregister(self._fork_server)
        self._fork_server_stopped_at = None
        self._fork_server.close()
        self._fork_server = ForkServer.launch()
        self._selector.register(self._fork_server, selectors.EVENT_READ, self._receive_fork_server)
        pending_workers, self._pending = self._pending, deque()
        for handle in pending_workers:
            self._ended(handle, "never born")
        for handle in self._handles():
            if handle.pidfd >= 0 and handle.pidfd not in self._selector.get_map():
                heard = partial(self._exited_unreaped, handle)
                self._selector.register(handle.pidfd, selectors.EVENT_READ, heard)

    # -- the sandbox

    def _look_at_sandbox(self) -> None:
        """Say once what the workers cannot give up."""
        now = time.monotonic()
        if self._sandbox_look is None or self._sandbox_look > now:
            return
        word = next((handle.sandbox for handle in self._handles() if handle.sandbox), 0)
        if not word:
            self._sandbox_look = now + self._sandbox_wait
            self._sandbox_wait = min(self._sandbox_wait * 2, SANDBOX_LOOK_LAST_S)
            return
        self._sandbox_look = None
        if missing_steps := sandbox.missing_steps(word):
            fields = {"lacking": ",".join(missing_steps)}
            log.warning(
                "workers run without all of their sandbox: %s",
                sandbox.advice(missing_steps),
                extra={"fields": fields},
            )

    def _refuse(self, missing_steps: tuple[str, ...]) -> None:
        """A worker cannot give up all that -sandbox required asks for, and so none can: the end."""
        if self._exit_code:
            return
        self._exit_code = 1
        log.error(
            "the sandbox is required and cannot be had: %s; or use -sandbox auto",
            sandbox.advice(missing_steps),
            extra={"fields": {"lacking": ",".join(missing_steps)}},
        )
        if not self._draining:
            self._drain()

    # -- control pipes

    def _await_pipe(self, handle: WorkerProcess | None) -> None:
        """Wait for room in its pipe, if something did not fit."""
        if handle is None or handle.blocked_on < 0:
            return
        if handle.blocked_on not in self._selector.get_map():
            self._selector.register(
                handle.blocked_on, selectors.EVENT_WRITE, partial(self._flush, handle)
            )

    def _flush(self, handle: WorkerProcess) -> None:
        waited_on = handle.blocked_on
        handle.flush()
        if handle.blocked_on < 0:
            self._selector.unregister(waited_on)

    def _forget(self, handle: WorkerProcess) -> None:
        for fd in (handle.blocked_on, handle.pidfd):
            if fd >= 0 and fd in self._selector.get_map():
                self._selector.unregister(fd)

    # -- losses

    def _report_losses(self) -> None:
        now = time.monotonic()
        if now < self._report_at:
            return
        self._report_at = now + REPORT_S
        for post in self._posts.values():
            for worker in post.workers:
                self._tell_losses(post, worker)
            if post.degraded:
                self._tell_recovery(post, now)

    def _tell_recovery(self, post: Post, now: float) -> None:
        for slot in post.slots:
            slot.recover(now)
        if not post.degraded:
            log.info(
                "workers live again, the port is not degraded", extra={"fields": post.fields()}
            )

    def _tell_losses(self, post: Post, worker: WorkerProcess) -> None:
        for name, count in worker.losses().items():
            log.warning("%s", LOSSES[name], extra={"fields": post.fields() | {"count": count}})

    # -- ending

    def _stop_listener(self, post: Post, deadline_ms: int) -> None:
        """Close the port and let its workers go within `deadline_ms`."""
        post.close()
        kill_at = time.monotonic() + deadline_ms / 1000 + KILL_GRACE_S
        for worker in post.workers:
            self._tell_losses(post, worker)
            worker.drain(deadline_ms)
            self._await_pipe(worker)
            self._stopping_workers.append(StoppingWorker(worker, kill_at))

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for stopping in self._stopping_workers:
            if stopping.kill_at <= now:
                stopping.handle.kill()
                stopping.kill_at = now + KILL_GRACE_S

    # -- what does not answer

    def _check_fork_server(self) -> None:
        """SIGCHLD: it may have been stopped, or set going again."""
        if not self._fork_server.stopped:
            self._fork_server_stopped_at = None
        elif self._fork_server_stopped_at is None:
            self._fork_server_stopped_at = time.monotonic()

    def _kill_stuck(self) -> None:
        """Workers that do not turn, and a stopped fork server; word of their end comes as that of any other."""
        now = time.monotonic()
        if not self._watchdog.start_check(now):
            return
        for post in self._posts.values():
            for worker in post.workers:
                if worker.pid and not worker.kill_sent:
                    self._check_worker(post, worker, now)
        stopped_at = self._fork_server_stopped_at
        if stopped_at is None:
            return
        if self._watchdog.is_stuck(stopped_at, lambda: ProcessState.WAITING):
            fields = {"pid": self._fork_server.pid}
            log.error("fork server stopped, killing it", extra={"fields": fields})
            self._fork_server.kill()
            self._fork_server_stopped_at = None

    def _check_worker(self, post: Post, worker: WorkerProcess, now: float) -> None:
        if self._watchdog.is_stuck(worker.last_heartbeat, partial(process_state, worker.pid)):
            fields = {"pid": worker.pid, "silent_s": f"{now - worker.last_heartbeat:.1f}s"}
            log.error("worker not responding, killing it", extra={"fields": post.fields() | fields})
            worker.kill_sent = True
            worker.kill()


def _reap() -> None:
    """Bury children: the fork server, and as PID 1 whatever else was left to us."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _bind_problem(listener: Listener, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{listener} is in use by {port_owner(listener)}; stop it, or run in a container"
    if error.errno == errno.EACCES:
        kind = "TCP" if listener.protocol is Protocol.TCP else "UDP"
        return (
            f"{kind} ports below 1024 need the capability NET_BIND_SERVICE: run as root or with "
            f"--cap-add NET_BIND_SERVICE, or --sysctl net.ipv4.ip_unprivileged_port_start=0"
        )
    return f"{listener}: {error.strerror}"
