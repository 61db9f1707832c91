"""A post: one listener's place in the parent, for as long as somebody exposes the port.

It keeps what must outlive any one worker: the bound socket, the route, the generation, and the numbers
that tell one run of a container from another. Policy (when to fork, when to give up) is the supervisor's.

Invariants:

- `generation` rises with every change of the list of backends, and never falls.
- An identity stands for one backend value (address, port, container run) for the life of the post, and
  is never given to another: a worker that hears a new identity knows that the old connections are dead.
"""

from __future__ import annotations

import socket

from ambassador.control import Destination, Repoint, Start
from ambassador.model import Backend, Listener, Route
from ambassador.worker import Handle

STABLE_S = 10.0
"""A worker that lived this long was no part of a crash loop."""

RESTART_FIRST_S = 0.1
RESTART_LAST_S = 10.0


class Post:
    """Owns the listening socket (`socket`, None until it could be bound) and the worker's handle."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.generation = 0
        self.socket: socket.socket | None = None
        self.worker: Handle | None = None
        self.due: float | None = 0.0
        self.born = 0.0
        self.bind_error = ""
        self._failures = 0
        self._identities: dict[Backend, int] = {}
        self._next_identity = 1
        self.repoint(route)

    @property
    def listener(self) -> Listener:
        return self.route.listener

    def repoint(self, route: Route) -> None:
        """A new route; the worker, if there is one, hears of it at once."""
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
        if self.worker is not None:
            self.worker.repoint(self._record())

    def hire(self, start: Start) -> Handle:
        """A handle for a new worker, told all it needs; the caller has it forked."""
        self.worker = Handle(start, self._record())
        self.due = None
        return self.worker

    def lose(self, now: float) -> float:
        """The worker is gone: seconds to wait before the next (0 unless they keep dying)."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None
        self._failures = 1 if now - self.born >= STABLE_S else self._failures + 1
        delay = 0.0
        if self._failures > 1:
            delay = min(RESTART_FIRST_S * 2 ** min(self._failures - 2, 16), RESTART_LAST_S)
        self.due = now + delay
        return delay

    def close(self) -> None:
        """Give up the port. The worker, if any, is the caller's to end."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def fields(self) -> dict[str, object]:
        """The post, for the log."""
        return {
            "port": self.listener.port,
            "protocol": self.listener.protocol.value,
            "container": self.route.target,
            "backend": ",".join(map(str, self.route.backends)) or "none",
            "generation": self.generation,
        }

    def _record(self) -> Repoint:
        route = self.route
        where = ", ".join(map(str, route.backends)) or "hold"
        title = where if route.target == where else f"{route.target} -> {where}"
        return Repoint(
            self.generation,
            tuple(Destination(b.address, b.port, self._identities[b]) for b in route.backends),
            title[:1000],
        )
