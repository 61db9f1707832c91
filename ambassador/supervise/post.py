"""A post: one listener's place in the parent, for as long as somebody exposes the port.

It keeps what must outlive any one worker: the bound sockets, the route, the generation, and the numbers
that tell one run of a container from another. Its slots are the places of its workers: one, or more with
`-workers`. Policy (when to fork, when to give up) is the supervisor's.

Invariants:

- `generation` rises with every change of the list of backends, and never falls.
- An identity stands for one backend value (address, port, container run) for the life of the post, and
  is never given to another: a worker that hears a new identity knows that the old connections are dead.
- Every worker of a post has the same list of backends. TCP workers accept from one socket; UDP workers
  have one each, in a SO_REUSEPORT group, so that the kernel keeps a client on its worker.
"""

from __future__ import annotations

import os
import socket

from ambassador.supervise import sockets
from ambassador.control import Destination, Repoint, Start
from ambassador.model import Backend, Listener, Route
from ambassador.system.titles import title_of
from ambassador.supervise.worker import WorkerProcess, make_counters

STABLE_S = 10.0
"""A worker that lived this long was no part of a crash loop."""

RESTART_FIRST_S = 0.1
RESTART_LAST_S = 10.0

DEGRADED_AFTER = 5
"""Deaths in a row, within 1.5 s at the least: the port is degraded until a worker has lived for STABLE_S."""


class WorkerSlot:
    """The place of one worker: `worker` while there is one, else `due`, the moment for the next."""

    def __init__(self) -> None:
        self.worker: WorkerProcess | None = None
        self.due: float | None = 0.0
        self.started = 0.0
        self._failures = 0

    def take(self, worker: WorkerProcess, now: float) -> None:
        self.worker, self.due, self.started = worker, None, now

    def worker_exited(self, now: float) -> float:
        """The worker is gone: seconds to wait before the next (0 unless they keep dying)."""
        self._vacate()
        self._failures = 1 if now - self.started >= STABLE_S else self._failures + 1
        delay = 0.0
        if self._failures > 1:
            delay = min(RESTART_FIRST_S * 2 ** min(self._failures - 2, 16), RESTART_LAST_S)
        self.due = now + delay
        return delay

    def retry_at(self, due: float) -> None:
        """The worker could not be asked for; that is no fault of its own."""
        self._vacate()
        self.due = due

    @property
    def degraded(self) -> bool:
        return self._failures >= DEGRADED_AFTER

    def recover(self, now: float) -> None:
        """No longer degraded, if its worker has proved stable."""
        if self.worker is not None and now - self.started >= STABLE_S:
            self._failures = 0

    def _vacate(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


class Post:
    """Owns the listening sockets, the counters and its workers' handles."""

    def __init__(self, route: Route, workers: int = 1) -> None:
        self.route = route
        self.generation = 0
        self.slots = [WorkerSlot() for _ in range(workers)]
        self.bind_at = 0.0
        self.bind_error = ""
        self._sockets: list[socket.socket] = []
        self._counters = -1
        self._identities: dict[Backend, int] = {}
        self._next_identity = 1
        self.repoint(route)

    @property
    def listener(self) -> Listener:
        return self.route.listener

    @property
    def workers(self) -> list[WorkerProcess]:
        return [slot.worker for slot in self.slots if slot.worker is not None]

    @property
    def degraded(self) -> bool:
        """Whether workers keep dying here."""
        return any(slot.degraded for slot in self.slots)

    def slot_of(self, worker: WorkerProcess) -> WorkerSlot:
        return next(slot for slot in self.slots if slot.worker is worker)

    def repoint(self, route: Route) -> None:
        """A new route; the workers hear of it at once."""
        self.route = route
        self.generation += 1
        known = self._identities
        self._identities = {}
        for backend in route.backends:
            if backend in known:
                self._identities[backend] = known[backend]
            else:
                self._identities[backend] = self._next_identity
                self._next_identity += 1
        for worker in self.workers:
            worker.repoint(self._record())

    # -- the port

    @property
    def bound(self) -> bool:
        return bool(self._sockets)

    def bind(self) -> None:
        """Take the port. Raises OSError, as sockets.bind_group does."""
        self._sockets = sockets.bind_group(self.listener, len(self.slots))
        if self._counters < 0:
            self._counters = make_counters(len(self.slots))

    def close(self) -> None:
        """Give up the port. The workers, if any, are the caller's to end."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []
        if self._counters >= 0:
            os.close(self._counters)
            self._counters = -1

    # -- workers

    def prepare(self, slot: WorkerSlot, start: Start) -> tuple[WorkerProcess, tuple[int, int, int]]:
        """A handle for a new worker, told all it needs, and what the fork server must lend it."""
        place = self.slots.index(slot)
        start = start._replace(slot=place, slots=len(self.slots))
        handle = WorkerProcess(start, self._record(), self._counters)
        sock = self._sockets[place % len(self._sockets)]
        return handle, handle.passed_fds(sock.fileno())

    # -- words

    def fields(self) -> dict[str, object]:
        """The post, for the log. A fixed address is its own target, and is not said twice."""
        backend = ",".join(map(str, self.route.backends)) or "none"
        named = {} if self.route.target == backend else {"container": self.route.target}
        return {
            "port": self.listener.port,
            "protocol": self.listener.protocol.value,
            **named,
            "backend": backend,
            "generation": self.generation,
        }

    def _record(self) -> Repoint:
        route = self.route
        where = ", ".join(map(str, route.backends)) or "hold"
        whither = where if route.target == where else f"{route.target} -> {where}"
        return Repoint(
            self.generation,
            tuple(Destination(b.address, b.port, self._identities[b]) for b in route.backends),
            title_of(f"{self.listener} {whither}")[:1000],
        )
