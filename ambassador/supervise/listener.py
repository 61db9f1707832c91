"""A running listener: what it should do, the numbers that its workers know, and its data paths.

Invariants:

- `generation` rises with every change, and never falls.
- A backend id stands for one backend value, its weight apart, and is never given to another. A backend that
  has left and comes back gets a new id, so that no old connection is taken for one of the new list.
- A backend that goes is told to the outer path first; one that comes, to the inner path first. So no outer
  path ever relays to a backend that the inner one does not have.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ambassador.datapath import DataPath
from ambassador.model import Backend, ListenerSpec

log = logging.getLogger(__name__)


class RunningListener:
    """Owns no descriptor: `close` closes its paths."""

    def __init__(self, spec: ListenerSpec) -> None:
        self.spec = spec
        self.generation = 0
        self._ids: dict[Backend, int] = {}
        self._last_id = 0
        self._refusals: dict[int, str] = {}  # by place of the path
        self._paths: Sequence[DataPath] = ()
        self._open: list[bool] = []

    def open(self, paths: Sequence[DataPath]) -> None:
        """Relay, or hold, by these paths: outermost first. The last one carries what the others refuse."""
        self._paths, self._open = paths, [False] * len(paths)
        self._advance(self.spec)
        self._tell(self._inner_first())

    def update(self, spec: ListenerSpec) -> None:
        """The whole new state."""
        old = self.spec
        known = set(map(_identity, spec.backends))
        stay = tuple(backend for backend in old.backends if _identity(backend) in known)
        goes = len(stay) < len(old.backends)
        comes = any(_identity(backend) not in self._ids for backend in spec.backends)
        if goes and comes and len(self._paths) > 1:
            self._advance(replace(spec, backends=stay))
            self._tell(self._outer_first())
        self._advance(spec)
        self._tell(self._outer_first() if goes and not comes else self._inner_first())
        if old.backends == spec.backends:
            message = "options changed"
        elif any(backend.weight for backend in spec.backends):
            message = "backend changed"
        else:
            message = "no backend, holding new connections"
        log.info(message, extra={"fields": self.fields()})

    def refresh(self) -> None:
        """Tell the paths the same again: what it stands for has changed, or they may not have it."""
        self._advance(self.spec)
        self._tell(self._inner_first())

    def close(self, deadline_ms: int) -> None:
        """Nothing new at once. What is open may finish until the deadline."""
        for place in self._outer_first():
            if self._open[place]:
                self._paths[place].close(deadline_ms)
                self._open[place] = False

    def backends(self) -> tuple[tuple[int, Backend], ...]:
        """The backends as a worker gets them, each with its id."""
        return tuple((self._ids[_identity(backend)], backend) for backend in self.spec.backends)

    def fields(self) -> dict[str, object]:
        """The listener, for the log. A fixed address is its own target, and is not said twice."""
        spec, backend = self.spec, ",".join(map(str, self.spec.backends)) or "none"
        address = {"address": spec.listen.address} if spec.listen.address else {}
        container = {} if spec.target == backend else {"container": spec.target}
        return {
            "port": spec.listen.ports,
            "protocol": spec.listen.protocol.value,
            **address,
            **container,
            "backend": backend,
            "generation": self.generation,
        }

    def _advance(self, spec: ListenerSpec) -> None:
        self.spec = spec
        self.generation += 1
        known, self._ids = self._ids, {}
        for key in map(_identity, spec.backends):
            if key not in known and key not in self._ids:
                self._last_id += 1
            self._ids[key] = known.get(key) or self._ids.get(key) or self._last_id

    def _outer_first(self) -> Iterable[int]:
        return range(len(self._paths))

    def _inner_first(self) -> Iterable[int]:
        return reversed(range(len(self._paths)))

    def _tell(self, places: Iterable[int]) -> None:
        for place in places:
            path, refusal = self._paths[place], self._paths[place].refuses(self.spec)
            if not refusal and self._open[place]:
                path.update(self.spec)
            elif not refusal:
                path.open(self.spec)
            elif self._open[place]:
                path.close(0)
            self._open[place] = not refusal
            if refusal != self._refusals.get(place, ""):
                self._report_refusal(place, refusal)

    def _report_refusal(self, place: int, refusal: str) -> None:
        """The last path is the last resort. What another one refuses is its business."""
        self._refusals[place] = refusal
        if refusal and place == len(self._paths) - 1:
            fields = self.fields() | {"reason": refusal}
            log.error("cannot relay this listener", extra={"fields": fields})


def _identity(backend: Backend) -> Backend:
    """What a backend id stands for: the weight only says what a backend may get."""
    return replace(backend, weight=1)
