"""A worker, the process that serves one listener, as its parent sees it. Its own life is _worker.pyx.

Invariants:

- The parent never blocks on a worker: what a full control pipe does not take waits here, and of waiting
  Repoints only the newest is kept.
- The handle owns the write end of the control pipe, the counters page and the pidfd.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Mapping

from ambassador import _datagram, _splice
from ambassador._worker import (
    BACKENDS_WORD,
    COUNTERS_BYTES,
    FIRST_COUNTER,
    GENERATION_WORD,
    HEARTBEAT_WORD,
    SANDBOX_WORD,
)
from ambassador.control import Drain, Record, Repoint, Start, pack
from ambassador.model import Listener
from ambassador.values import Protocol

COUNTERS = {Protocol.TCP: _splice.COUNTERS, Protocol.UDP: _datagram.COUNTERS}
_COMMON_COUNTERS = {"generation": GENERATION_WORD, "backends": BACKENDS_WORD}
LOSSES = {
    "rejected": "connections had no backend within the hold window",
    "over_limit": "connections came beyond -max-connections",
    "idle_closed": "connections were idle for the -idle-timeout",
    "half_closed_too_long": "connections were half-closed for the -half-close-timeout",
    "no_local_port": "connections found no local port towards the backend",
    "no_descriptor": "times a descriptor or memory was lacking",
    "dropped_no_backend": "datagrams had no backend within the hold window",
    "dropped_no_session": "datagrams of new clients found no room for a session",
    "dropped_looped": "datagrams had been passed on too often: does a relay point back at this one?",
    "dropped_truncated": "datagrams were larger than any can be",
    "dropped_send_to_backend": "datagrams were refused by the kernel on their way to the backend",
    "dropped_send_to_client": "datagrams were refused by the kernel on their way to a client",
    "sessions_evicted": "sessions were ended to make room for others",
}
"""Counters that somebody should hear of when they rise, and what they count."""


def make_counters(slots: int) -> int:
    """The file of a listener's counters, a page to each of its workers; the caller owns it."""
    fd = os.memfd_create("counters", os.MFD_CLOEXEC)
    os.ftruncate(fd, slots * COUNTERS_BYTES)
    return fd


class WorkerProcess:
    """A worker as the parent sees it, from the request to fork it until it is reaped.

    `pid` is 0 until the fork server has answered. `close` gives up the descriptors, which a live worker
    takes as the end of its parent; `kill` is for one that does not listen. `kill_sent` says that it was killed
    for being stuck.
    """

    def __init__(self, start: Start, repoint: Repoint, counters: int | None = None) -> None:
        """`counters` is the listener's (`make_counters`) and the caller's; without, it has its own."""
        self.listener: Listener = start.listener
        self.pid = 0
        self.draining = False
        self.kill_sent = False
        self._started_at = 0.0
        self._pidfd = -1
        self._counters_fd = make_counters(start.slots) if counters is None else os.dup(counters)
        self._pages = mmap.mmap(self._counters_fd, start.slots * COUNTERS_BYTES)
        begin = start.slot * COUNTERS_BYTES
        self._page = memoryview(self._pages)[begin : begin + COUNTERS_BYTES]
        self._words = self._page.cast("Q")
        self._clear()
        self._control_read, self._control_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._control_write, False)
        self._outgoing = bytearray()
        self._latest_update: Repoint | None = None
        self._known_losses: dict[str, int] = {}
        self._enqueue(start)
        self.repoint(repoint)

    def passed_fds(self, listener_fd: int) -> tuple[int, int, int]:
        """The descriptors that the fork server gives to the child, in the order of `main`."""
        return listener_fd, self._control_read, self._counters_fd

    def started(self, pid: int, pidfd: int) -> None:
        """The fork server has forked it. Owns `pidfd` from here."""
        self.pid, self._pidfd, self._started_at = pid, pidfd, time.monotonic()
        self._close_passed()

    def repoint(self, record: Repoint) -> None:
        """Tell it the newest list of backends; a list that is still waiting is superseded."""
        self._latest_update = record
        self.flush()

    def drain(self, deadline_ms: int) -> None:
        self.draining = True
        self._enqueue(Drain(deadline_ms))
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes now. A dead worker's pipe takes everything: its end comes by pidfd."""
        while True:
            if not self._outgoing:
                if self._latest_update is None:
                    return
                self._enqueue(self._latest_update)
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
        """The descriptor to wait on for writing, or -1 when nothing waits to be written."""
        return self._control_write if self._outgoing or self._latest_update else -1

    @property
    def pidfd(self) -> int:
        return self._pidfd

    def kill(self) -> None:
        """SIGKILL, through the pidfd: it can never hit a process that took over the number."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def counters(self) -> Mapping[str, int]:
        """A copy of the counters page by name. Costs the worker nothing; works when it is stuck."""
        values = {name: self._words[place] for name, place in _COMMON_COUNTERS.items()}
        for place, name in enumerate(COUNTERS[self.listener.protocol], FIRST_COUNTER):
            values[name] = self._words[place]
        return values

    def losses(self) -> Mapping[str, int]:
        """What was lost since the last call, by counter; empty when nothing was."""
        now = dict(self.counters())
        if "over_limit" in now:
            now["rejected"] -= now["over_limit"]  # that has a line of its own
        risen = {
            name: now[name] - self._known_losses.get(name, 0)
            for name in LOSSES
            if now.get(name, 0) > self._known_losses.get(name, 0)
        }
        self._known_losses |= {name: now[name] for name in risen}
        return risen

    @property
    def last_heartbeat(self) -> float:
        """Its latest sign of life, by time.monotonic(): a turn of its loop, or its birth."""
        return max(self._words[HEARTBEAT_WORD] / 1000, self._started_at)

    @property
    def sandbox(self) -> int:
        """The word of sandbox.py: what it gave up; 0 until it has."""
        return self._words[SANDBOX_WORD]

    def close(self) -> None:
        self._close_passed()
        self._clear()
        self._words.release()
        self._page.release()
        self._pages.close()
        os.close(self._control_write)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _clear(self) -> None:
        """Nothing that it counted is there any more: others of its listener would reckon with it."""
        self._page[:] = bytes(COUNTERS_BYTES)

    def _enqueue(self, record: Record) -> None:
        self._outgoing += pack(record)

    def _close_passed(self) -> None:
        if self._control_read >= 0:
            os.close(self._control_read)
            os.close(self._counters_fd)
            self._control_read = self._counters_fd = -1
