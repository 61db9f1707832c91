"""A worker: the process that serves one listener. Its handle in the parent, its entry point in the child.

Invariants:

- The child is lent three descriptors (listener, control pipe, and the counters page, which it maps) besides
  standard error, and has no thread. Everything it knows came over the control pipe: Start first, then
  Repoint, then Drain.
- The child enters its sandbox when it has heard its Start and before its loop exists, so before any traffic.
- The child leaves the compiled loop only for control. End of file on the control pipe means that the
  parent is gone: it exits at once, and every connection it had ends in a reset.
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
from typing import TYPE_CHECKING, cast

from ambassador import _datagram, _sandbox, _splice
from ambassador._wire import GSO, SANDBOX, SANDBOX_REQUIRED, TCP, take
from ambassador.control import BadRecord, Drain, Record, RecordType, Repoint, Start, pack
from ambassador.model import Listener, Protocol
from ambassador.titles import set_title

if TYPE_CHECKING:
    from ambassador._wire import Backends, StartNumbers

COUNTERS_BYTES = 4096
_READ_BYTES = 65_536

EXIT_DRAINED = 0
EXIT_PARENT_GONE = 0
EXIT_BAD_CONTROL = 65
"""What it was told makes no sense (EX_DATAERR of sysexits.h)."""
EXIT_BROKEN = 70
"""The loop could not be set up or failed (EX_SOFTWARE)."""
EXIT_UNCONFINED = 77
"""The sandbox is required and something of it cannot be had (EX_NOPERM)."""

COUNTERS = {Protocol.TCP: _splice.COUNTERS, Protocol.UDP: _datagram.COUNTERS}
_COMMON_COUNTERS = {"generation": 1, "backends": 2}
_HEARTBEAT_WORD = 3
_SANDBOX_WORD = 7
_FIRST_COUNTER = 8
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

_START, _DRAIN = int(RecordType.START), int(RecordType.DRAIN)


def make_counters(seats: int) -> int:
    """The file of a listener's counters, a page to each of its workers; the caller owns it."""
    fd = os.memfd_create("counters", os.MFD_CLOEXEC)
    os.ftruncate(fd, seats * COUNTERS_BYTES)
    return fd


class Handle:
    """A worker as the parent sees it, from the request to fork it until it is reaped.

    `pid` is 0 until the nursery has answered. `close` gives up the descriptors, which a live worker
    takes as the end of its parent; `kill` is for one that does not listen. `doomed` says that it was killed
    for being stuck.
    """

    def __init__(self, start: Start, repoint: Repoint, counters: int | None = None) -> None:
        """`counters` is the listener's (`make_counters`) and the caller's; without, it has its own."""
        self.listener: Listener = start.listener
        self.pid = 0
        self.draining = False
        self.doomed = False
        self._born_at = 0.0
        self._pidfd = -1
        self._counters_fd = make_counters(start.seats) if counters is None else os.dup(counters)
        self._pages = mmap.mmap(self._counters_fd, start.seats * COUNTERS_BYTES)
        begin = start.seat * COUNTERS_BYTES
        self._page = memoryview(self._pages)[begin : begin + COUNTERS_BYTES]
        self._words = self._page.cast("Q")
        self._clear()
        self._control_read, self._control_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._control_write, False)
        self._unsent = bytearray()
        self._next: Repoint | None = None
        self._known_losses: dict[str, int] = {}
        self._enqueue(start)
        self.repoint(repoint)

    def lend(self, listener_fd: int) -> tuple[int, int, int]:
        """The descriptors that the nursery gives to the child, in the order of `main`."""
        return listener_fd, self._control_read, self._counters_fd

    def born(self, pid: int, pidfd: int) -> None:
        """The nursery has forked it. Owns `pidfd` from here."""
        self.pid, self._pidfd, self._born_at = pid, pidfd, time.monotonic()
        self._forget_lent()

    def repoint(self, record: Repoint) -> None:
        """Tell it the newest list of backends; a list that is still waiting is superseded."""
        self._next = record
        self.flush()

    def drain(self, deadline_ms: int) -> None:
        self.draining = True
        self._enqueue(Drain(deadline_ms))
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes now. A dead worker's pipe takes everything: its end comes by pidfd."""
        while True:
            if not self._unsent:
                if self._next is None:
                    return
                self._enqueue(self._next)
                self._next = None
            try:
                written = os.write(self._control_write, self._unsent)
            except BlockingIOError:
                return
            except BrokenPipeError:
                written = len(self._unsent)
            del self._unsent[:written]

    @property
    def blocked_on(self) -> int:
        """The descriptor to wait on for writing, or -1 when nothing waits to be written."""
        return self._control_write if self._unsent or self._next else -1

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
        for place, name in enumerate(COUNTERS[self.listener.protocol], _FIRST_COUNTER):
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
    def alive_at(self) -> float:
        """Its latest sign of life, by time.monotonic(): a turn of its loop, or its birth."""
        return max(self._words[_HEARTBEAT_WORD] / 1000, self._born_at)

    @property
    def sandbox(self) -> int:
        """The word of sandbox.py: what it gave up; 0 until it has."""
        return self._words[_SANDBOX_WORD]

    def close(self) -> None:
        self._forget_lent()
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
        self._unsent += pack(record)

    def _forget_lent(self) -> None:
        if self._control_read >= 0:
            os.close(self._control_read)
            os.close(self._counters_fd)
            self._control_read = self._counters_fd = -1


# ------------------------------------------------------------------------------------ the child

Loop = _splice.TcpRelay | _datagram.UdpRelay


def main(listener_fd: int, control_fd: int, counters_fd: int) -> int:
    """Serve one listener until told to drain or the parent is gone; the exit code.

    Owns the three descriptors. Written to run little Python: every object it touches is a page that it no
    longer shares with the nursery.
    """
    try:
        return _serve(listener_fd, control_fd, counters_fd)
    except ValueError:  # BadRecord is one
        return EXIT_BAD_CONTROL


def _serve(listener_fd: int, control_fd: int, counters_fd: int) -> int:
    stream = bytearray()
    loop: Loop | None = None  # until the first record, for which the pipe blocks
    tcp = False
    generation = -1
    while True:
        taken = take(stream)
        if taken is None:
            if loop is not None and loop.run() == _splice.DRAINED:
                return EXIT_DRAINED
            data = os.read(control_fd, _READ_BYTES)
            if not data:
                return EXIT_PARENT_GONE
            stream += data
            continue
        kind, number, content = taken
        if (kind == _START) == (loop is not None):
            raise BadRecord("a Start comes first, and once")
        if loop is None:
            numbers = cast("StartNumbers", content)
            os.set_blocking(control_fd, False)
            if not _confined(numbers, counters_fd):
                return EXIT_UNCONFINED
            loop = _loop(numbers, listener_fd, control_fd, counters_fd)
            os.close(counters_fd)
            tcp = numbers[1] == TCP
        elif kind == _DRAIN:
            loop.drain(cast("int", content))
            if tcp:
                os.close(listener_fd)  # the last copy: from now on the port refuses
        elif number > generation:
            generation = number
            backends, title = cast("tuple[Backends, str]", content)
            loop.repoint(generation, backends)
            set_title(title)


def _confined(start: StartNumbers, counters_fd: int) -> bool:
    """Enter the sandbox, if there is to be one. False where something lacks that must not."""
    flags, seat, seats = start[2], start[12], start[13]
    if not flags & SANDBOX:
        return True
    return not _sandbox.enter(counters_fd, seat, seats) or not flags & SANDBOX_REQUIRED


def _loop(start: StartNumbers, listener_fd: int, control_fd: int, counters_fd: int) -> Loop:
    _, protocol, flags, hold_ms, connect_ms, session_idle_ms, max_sessions, max_held = start[:8]
    pipe_bytes, max_connections, idle_ms, half_close_ms, seat, seats = start[8:]
    if protocol == TCP:
        return _splice.TcpRelay(
            listener_fd,
            control_fd,
            counters=counters_fd,
            seat=seat,
            seats=seats,
            hold_ms=hold_ms,
            connect_ms=connect_ms,
            max_held=max_held,
            pipe_bytes=pipe_bytes,
            max_connections=max_connections,
            idle_ms=idle_ms,
            half_close_ms=half_close_ms,
        )
    return _datagram.UdpRelay(
        listener_fd,
        control_fd,
        counters=counters_fd,
        seat=seat,
        seats=seats,
        hold_ms=hold_ms,
        session_idle_ms=session_idle_ms,
        max_sessions=max_sessions,
        gso=bool(flags & GSO),
    )
