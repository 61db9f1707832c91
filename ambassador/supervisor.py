"""The parent's loop: brings what runs to what is desired, and keeps it there.

    wait -> dispatch (wake, nursery, a worker's pipe) -> signals -> reconcile -> start what is due
         -> kill what is overdue or stuck -> report what was lost

Invariants:

- Exactly one live worker per seat, and one seat per listener unless told otherwise; a port's sockets
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

from ambassador import control, sandbox
from ambassador._worker import EXIT_UNCONFINED
from ambassador.model import DesiredState, Listener, ProcessState, Protocol, Sandbox
from ambassador.nursery import Exited, Forked, Nursery, NurseryGone
from ambassador.post import Post, Seat
from ambassador.reconcile import Repoint, Start, Stop, plan
from ambassador.status import port_owner, process_state
from ambassador.watchdog import Watchdog
from ambassador.worker import LOSSES, Handle

log = logging.getLogger(__name__)

BIND_RETRY_S = 1.0
STUCK_NURSERY_RETRY_S = 0.2
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
class _Leaver:
    """A worker on its way out, and when patience ends."""

    handle: Handle
    kill_at: float


class Supervisor:
    """Runs workers for what `desired` returns, which is asked again after each `wake`.

    Owns `nursery`. `run` returns the exit code; it must be called from the main thread (signals).
    """

    def __init__(
        self, nursery: Nursery, desired: Callable[[], DesiredState], limits: Limits
    ) -> None:
        self._nursery = nursery
        self._desired = desired
        self._limits = limits
        self._posts: dict[Listener, Post] = {}
        self._leavers: list[_Leaver] = []
        self._unborn: deque[Handle] = deque()
        self._problems: tuple[str, ...] = ()
        self._signals: deque[int] = deque()
        self._changed = True
        self._draining = False
        self._report_at = 0.0
        self._watchdog = Watchdog()
        self._nursery_stopped_at: float | None = None
        self._exit_code = 0
        # Every worker has the same to give up: the first that has done it speaks for all.
        self._sandbox_look: float | None = 0.0 if limits.sandbox is Sandbox.AUTO else None
        self._sandbox_wait = SANDBOX_LOOK_FIRST_S
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._selector.register(nursery, selectors.EVENT_READ, self._hear_nursery)

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
        self._nursery.close()
        return self._exit_code

    def _finished(self) -> bool:
        return self._draining and not self._leavers

    def _timeout(self) -> float | None:
        moments = [
            max(seat.due, post.bind_at)
            for post in self._posts.values()
            for seat in post.seats
            if seat.due is not None
        ]
        moments += [leaver.kill_at for leaver in self._leavers]
        if self._posts:
            moments.append(self._report_at)
        if self._posts or self._leavers:
            moments.append(self._watchdog.look_at)
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
                self._look_at_nursery()
            elif self._draining:
                log.warning("told to stop again, not waiting for connections")
                self._leave_now()
            else:
                log.info("stopping", extra={"fields": {"signal": signal.Signals(number).name}})
                self._drain()

    def _drain(self) -> None:
        """Take no new work; workers finish what is open, up to the deadline."""
        self._draining = True
        for listener in list(self._posts):
            self._dismiss(self._posts.pop(listener), self._limits.drain_ms)

    def _leave_now(self) -> None:
        for leaver in self._leavers:
            leaver.kill_at = 0.0

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
                    self._dismiss(post, 0)

    def _repoint(self, post: Post, action: Repoint) -> None:
        post.repoint(action.route)
        for worker in post.workers:
            self._await_pipe(worker)
        message = "repointed" if action.route.backends else "no backend, holding new connections"
        log.info(message, extra={"fields": post.fields()})

    # -- starting

    def _start_due(self) -> None:
        now = time.monotonic()
        for post in self._posts.values():
            for seat in post.seats:
                if seat.due is not None and seat.due <= now and self._bound(post, now):
                    self._fork_worker(post, seat, now)

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

    def _fork_worker(self, post: Post, seat: Seat, now: float) -> None:
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
        handle, lent = post.prepare(seat, start)
        seat.take(handle, now)
        try:
            self._nursery.request(lent)
        except BlockingIOError:  # the nursery is stopped or starved; it is asked again
            seat.postpone(now + STUCK_NURSERY_RETRY_S)
            return
        except NurseryGone:
            seat.lose(now)
            self._replace_nursery()
            return
        self._unborn.append(handle)

    # -- the nursery, births and deaths

    def _hear_nursery(self) -> None:
        try:
            while (message := self._nursery.receive()) is not None:
                if isinstance(message, Forked):
                    self._born(message)
                else:
                    self._exited(message)
        except NurseryGone:
            self._replace_nursery()

    def _born(self, message: Forked) -> None:
        handle = self._unborn.popleft()
        if message.pid > 0:
            handle.born(message.pid, message.pidfd)
            self._await_pipe(handle)
            return
        reason = os.strerror(-message.pid)
        self._ended(handle, f"could not be forked: {reason}")

    def _exited(self, message: Exited) -> None:
        for handle in self._handles():
            if handle.pid == message.pid:
                if os.waitstatus_to_exitcode(message.status) == EXIT_UNCONFINED:
                    self._refuse(sandbox.lacking(handle.sandbox))
                self._ended(handle, _describe(message.status))
                return

    def _orphan_exited(self, handle: Handle) -> None:
        """A worker whose nursery died before it: nobody can say how it ended."""
        self._ended(handle, "ended after its nursery")

    def _handles(self) -> list[Handle]:
        working = [worker for post in self._posts.values() for worker in post.workers]
        return working + [leaver.handle for leaver in self._leavers]

    def _ended(self, handle: Handle, how: str) -> None:
        self._forget(handle)
        for leaver in self._leavers:
            if leaver.handle is handle:
                self._leavers.remove(leaver)
                handle.close()
                return
        post = self._posts[handle.listener]
        self._tell_losses(post, handle)
        was_degraded = post.degraded
        delay = post.seat_of(handle).lose(time.monotonic())
        fields = {"port": post.listener.port, "protocol": post.listener.protocol.value}
        fields |= {"pid": handle.pid, "reason": how, "replaced_in": f"{delay:g}s"}
        log.error("worker ended, replacing it", extra={"fields": fields})
        if post.degraded and not was_degraded:
            log.error(
                "workers keep dying, the port is degraded: clients wait for the next one",
                extra={"fields": post.fields()},
            )

    def _replace_nursery(self) -> None:
        """Its workers go on. Those it still owed are asked of the new one, and pidfds tell of the rest."""
        log.error(
            "the nursery ended, starting another", extra={"fields": {"pid": self._nursery.pid}}
        )
        self._selector.unregister(self._nursery)
        self._nursery_stopped_at = None
        self._nursery.close()
        self._nursery = Nursery.launch()
        self._selector.register(self._nursery, selectors.EVENT_READ, self._hear_nursery)
        unborn, self._unborn = self._unborn, deque()
        for handle in unborn:
            self._ended(handle, "never born")
        for handle in self._handles():
            if handle.pidfd >= 0 and handle.pidfd not in self._selector.get_map():
                heard = partial(self._orphan_exited, handle)
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
        if lacking := sandbox.lacking(word):
            fields = {"lacking": ",".join(lacking)}
            log.warning(
                "workers run without all of their sandbox: %s",
                sandbox.advice(lacking),
                extra={"fields": fields},
            )

    def _refuse(self, lacking: tuple[str, ...]) -> None:
        """A worker cannot give up all that -sandbox required asks for, and so none can: the end."""
        if self._exit_code:
            return
        self._exit_code = 1
        log.error(
            "the sandbox is required and cannot be had: %s; or use -sandbox auto",
            sandbox.advice(lacking),
            extra={"fields": {"lacking": ",".join(lacking)}},
        )
        if not self._draining:
            self._drain()

    # -- control pipes

    def _await_pipe(self, handle: Handle | None) -> None:
        """Wait for room in its pipe, if something did not fit."""
        if handle is None or handle.blocked_on < 0:
            return
        if handle.blocked_on not in self._selector.get_map():
            self._selector.register(
                handle.blocked_on, selectors.EVENT_WRITE, partial(self._flush, handle)
            )

    def _flush(self, handle: Handle) -> None:
        waited_on = handle.blocked_on
        handle.flush()
        if handle.blocked_on < 0:
            self._selector.unregister(waited_on)

    def _forget(self, handle: Handle) -> None:
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
        for seat in post.seats:
            seat.recover(now)
        if not post.degraded:
            log.info(
                "workers live again, the port is not degraded", extra={"fields": post.fields()}
            )

    def _tell_losses(self, post: Post, worker: Handle) -> None:
        for name, count in worker.losses().items():
            log.warning("%s", LOSSES[name], extra={"fields": post.fields() | {"count": count}})

    # -- ending

    def _dismiss(self, post: Post, deadline_ms: int) -> None:
        """Close the port and let its workers go within `deadline_ms`."""
        post.close()
        kill_at = time.monotonic() + deadline_ms / 1000 + KILL_GRACE_S
        for worker in post.workers:
            self._tell_losses(post, worker)
            worker.drain(deadline_ms)
            self._await_pipe(worker)
            self._leavers.append(_Leaver(worker, kill_at))

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for leaver in self._leavers:
            if leaver.kill_at <= now:
                leaver.handle.kill()
                leaver.kill_at = now + KILL_GRACE_S

    # -- what does not answer

    def _look_at_nursery(self) -> None:
        """SIGCHLD: it may have been stopped, or set going again."""
        if not self._nursery.stopped:
            self._nursery_stopped_at = None
        elif self._nursery_stopped_at is None:
            self._nursery_stopped_at = time.monotonic()

    def _kill_stuck(self) -> None:
        """Workers that do not turn, and a stopped nursery; word of their end comes as that of any other."""
        now = time.monotonic()
        if not self._watchdog.begin(now):
            return
        for post in self._posts.values():
            for worker in post.workers:
                if worker.pid and not worker.doomed:
                    self._judge(post, worker, now)
        stopped_at = self._nursery_stopped_at
        if stopped_at is None:
            return
        if self._watchdog.is_stuck(stopped_at, lambda: ProcessState.WAITING):
            fields = {"pid": self._nursery.pid}
            log.error("the nursery is stopped, killing it", extra={"fields": fields})
            self._nursery.kill()
            self._nursery_stopped_at = None

    def _judge(self, post: Post, worker: Handle, now: float) -> None:
        if self._watchdog.is_stuck(worker.alive_at, partial(process_state, worker.pid)):
            fields = {"pid": worker.pid, "silent_for": f"{now - worker.alive_at:.1f}s"}
            log.error("a worker is stuck, killing it", extra={"fields": post.fields() | fields})
            worker.doomed = True
            worker.kill()


def _reap() -> None:
    """Bury children: the nursery, and as PID 1 whatever else was left to us."""
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
