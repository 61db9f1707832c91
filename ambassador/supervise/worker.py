"""A worker, the process in one slot of a listener, as its parent sees it. Its own life is _worker.pyx.

Invariants:

- The parent never blocks on a worker: what a full control pipe does not take waits here. Of waiting Updates
  only the newest is kept.
- The handle owns both ends of the control pipe until the read end is passed on, and the pidfd. The counters
  page is the slot's.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from ambassador.control import Drain, Start, Update, pack
from ambassador.options import Sandbox
from ambassador.supervise import sandbox
from ambassador.supervise.page import CountersPage


class WorkerProcess:
    """A worker, from the request to fork it until it is reaped.

    `pid` is 0 until the fork server has answered. `close` gives up the descriptors; a live worker takes that
    as the end of its parent, and exits. `kill_sent` says that it was killed because it did not respond.
    Raises OSError if there is no control pipe to be had, and ValueError if a record does not fit.
    """

    def __init__(self, start: Start, update: Update, page: CountersPage) -> None:
        self.page = page
        self.pid = 0
        self.kill_sent = False
        self._required = start.sandbox is Sandbox.REQUIRED
        self._has_run = False
        self._started_at = 0.0
        self._pidfd = -1
        self._outgoing = bytearray(pack(start) + pack(update))
        self._latest_update: Update | None = None
        self._control_read, self._control_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._control_write, False)
        self.flush()

    def passed_fds(self, listener: int, siblings: Sequence[int] = ()) -> list[int]:
        """The descriptors that the fork server gives to the child, in the order of `_worker.main`.

        `siblings` are the read-only pages of the listener's other slots, in the order of the slots.
        """
        return [listener, self._control_read, self.page.fd, *siblings]

    def close_passed(self) -> None:
        """Close what the child alone needs. For the moment after the request."""
        if self._control_read >= 0:
            os.close(self._control_read)
            self._control_read = -1

    def started(self, pid: int, pidfd: int) -> None:
        """The fork server has forked it. Owns `pidfd` from here."""
        self.close_passed()
        self.pid, self._pidfd, self._started_at = pid, pidfd, time.monotonic()

    def update(self, record: Update) -> None:
        """Send the newest state; it takes the place of one that still waits."""
        self._latest_update = record
        self.flush()

    def drain(self, deadline_ms: int) -> None:
        """Take nothing new, finish what is open, exit by the deadline. An Update may still follow."""
        if self._latest_update is not None:
            self._outgoing += pack(self._latest_update)
            self._latest_update = None
        self._outgoing += pack(Drain(deadline_ms))
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes now. A dead worker's pipe takes everything: its exit is reported."""
        while True:
            if not self._outgoing:
                if self._latest_update is None:
                    return
                self._outgoing += pack(self._latest_update)
                self._latest_update = None
            try:
                written = os.write(self._control_write, self._outgoing)
            except BlockingIOError:
                return
            except BrokenPipeError:
                written = len(self._outgoing)
            del self._outgoing[:written]

    @property
    def blocked_on(self) -> int:
        """The descriptor to wait on for writing, or -1 if nothing waits to be written."""
        return self._control_write if self._outgoing or self._latest_update else -1

    @property
    def pidfd(self) -> int:
        return self._pidfd

    def kill(self) -> None:
        """SIGKILL, through the pidfd: it cannot hit a process that took over the number."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    @property
    def last_heartbeat(self) -> float:
        """Its latest sign of life, by time.monotonic: a turn of its loop, or its start."""
        heartbeat = self.page.heartbeat
        self._has_run = self._has_run or heartbeat > 0
        return max(heartbeat, self._started_at)

    @property
    def has_run(self) -> bool:
        """Whether its loop was ever seen to run. The page alone does not say: a worker can write to it."""
        return self._has_run or self.page.heartbeat > 0

    @property
    def refused_to_run(self) -> bool:
        """Whether it may have exited because a step of the sandbox that is required is missing."""
        missing = sandbox.missing_steps(self.sandbox)
        return self._required and bool(missing) and not self.has_run

    @property
    def sandbox(self) -> int:
        """The word of sandbox.py: what it gave up; 0 until it has."""
        return self.page.sandbox

    def close(self) -> None:
        self.close_passed()
        for fd in (self._control_write, self._pidfd):
            if fd >= 0:
                os.close(fd)
        self._control_write = self._pidfd = -1
