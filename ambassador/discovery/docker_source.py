"""Follows the targets through a Docker Engine, and keeps at it whatever the Engine does.

Threads: one per target (`watcher.py`), one that holds the event stream and reconnects, one that
pings and reconciles. All are daemon threads: none keeps the program from ending.

Invariants:

- Level-triggered: an event, a reconnect and the passing of 30 s only mark watchers. What is so is
  what inspect says.
- Subscribed first, looked after: between the two nothing can be missed.
- While the Engine is away the last states stand, and that it went and came is one log line each.
- Only GET requests: `_ping`, `version`, `events`, `containers/{id}/json`, `networks`.
- Nothing here knows docker's client: `engine.py` is the only module that imports it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ambassador.discovery.documents import OwnNetworks, joined_reference, own_container_id, own_networks_of
from ambassador.engine.client import connect_engine
from ambassador.discovery.events import FILTERS, EventParser, death, subject
from ambassador.backoff import Backoff
from ambassador.engine.api import Engine, EngineError, EventStream, NoSuchContainer
from ambassador.discovery.watcher import TargetWatcher, Surroundings
from ambassador.model import TargetState

__all__ = ["Discovery", "connect_engine", "read_own_id"]

RECONNECT_FIRST_S = 0.05
LOCAL_CAP_S = 1.0
"""Between two tries at a local socket where nobody listens: it costs a system call, and a daemon
that is back is to be noticed within 2 s."""

STREAM_LIVED_S = 1.0
"""A stream that ends sooner counts as a failure: a proxy that cuts at once must not cause a storm."""

SAY_AGAIN_S = 10.0
"""While the Engine is away, a *new* reason is logged no sooner than this after the last line."""


def read_own_id() -> str | None:
    """The container this process is in, if any."""
    texts = []
    for path in ("/proc/self/mountinfo", "/proc/self/cgroup"):
        try:
            texts.append(Path(path).read_text(errors="replace"))
        except OSError:
            texts.append("")
    return own_container_id(*texts)


class DockerSource:
    """What Docker says of the targets, kept current from `start` to `stop`.

    `connect` makes a fresh `Engine` and raises EngineError where there is none. `on_change` is
    called, from some thread, after `states()` changed; it must not block.
    """

    def __init__(
        self,
        connect: Callable[[], Engine],
        targets: Sequence[str],
        *,
        network: str | None,
        on_change: Callable[[], None],
        log: logging.Logger,
        debounce: float = 0.02,
        reconcile_every: float = 30.0,
        ping_every: float = 10.0,
        backoff_max: float = 10.0,
        own_id: Callable[[], str | None] = read_own_id,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._on_change = on_change
        self._log = log
        self._reconcile_every = reconcile_every
        self._ping_every = ping_every
        self._clock = clock
        self._own_id = own_id
        self._backoff = Backoff(RECONNECT_FIRST_S, backoff_max)
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # over the next three; held for no call that can block
        self._states = {target: TargetState(target) for target in targets}
        self._engine: Engine | None = None
        self._stream: EventStream | None = None
        self._own_networks_lock = threading.Lock()  # held while asking: everybody needs the answer
        self._own_networks: OwnNetworks | None = None
        self._own_networks_stale = True
        self._lost_said: str | None = None
        self._lost_at = 0.0
        around = Surroundings(
            engine=lambda: self._engine,
            own_networks=self._own_networks_now,
            publish=self._publish,
            network=network or None,
            log=log,
            debounce=debounce,
            clock=clock,
        )
        self._watchers = [TargetWatcher(target, around) for target in self._states]
        self._threads = [
            threading.Thread(target=self._run, args=(turn,), name=name, daemon=True)
            for name, turn in (("docker events", self._events_turn), ("docker watch", self._watch))
        ]

    def start(self) -> None:
        for watcher in self._watchers:
            watcher.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads; one that is inside a request is left to its timeout."""
        self._stopping.set()
        for watcher in self._watchers:
            watcher.stop()
        with self._lock:
            engine, stream = self._engine, self._stream
            self._engine = None
        if stream is not None:
            stream.close()
        if engine is not None:
            engine.close()
        deadline = time.monotonic() + 0.5
        for thread in (*self._threads, *(watcher.thread for watcher in self._watchers)):
            thread.join(max(0.0, deadline - time.monotonic()))

    def states(self) -> tuple[TargetState, ...]:
        """One for each target, in the order they were given."""
        with self._lock:
            return tuple(self._states.values())

    @property
    def connected(self) -> bool:
        """Whether the Engine answers, as far as is known."""
        return self._engine is not None

    # --- for the watchers ---

    def _publish(self, state: TargetState) -> None:
        with self._lock:
            changed = self._states[state.target] != state
            self._states[state.target] = state
        if changed and not self._stopping.is_set():
            self._on_change()

    def _own_networks_now(self, engine: Engine) -> OwnNetworks:
        with self._own_networks_lock:
            if self._own_networks is not None and not self._own_networks_stale:
                return self._own_networks
            self._own_networks_stale = False  # before asking: who marks it meanwhile is heard
            try:
                own_networks = self._ask_own_networks(engine)
            except EngineError:
                self._own_networks_stale = True
                if self._own_networks is None:
                    raise
                return self._own_networks
            if own_networks != self._own_networks:
                self._own_networks = own_networks
                place = " ".join(a.network for a in own_networks.attachments) or "none"
                fields = {"networks": "the host's" if own_networks.host else place}
                self._log.info("own networks", extra={"fields": fields})
            return own_networks

    def _ask_own_networks(self, engine: Engine) -> OwnNetworks:
        own = self._own_id()
        if own is None:
            return own_networks_of(None)
        try:
            document = engine.inspect_container(own)
        except NoSuchContainer:
            # In a container of another Engine than the one it asks. There is no telling what can
            # be reached from here; the host's view is the likeliest.
            return own_networks_of(None)
        reference = joined_reference(document)
        joined = engine.inspect_container(reference) if reference is not None else None
        return own_networks_of(document, joined)

    # --- threads ---

    def _run(self, turn: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                turn()
            except Exception as error:  # noqa: BLE001 - without this thread nothing is followed
                text = f"{type(error).__name__}: {error}"
                self._log.error("unexpected", extra={"fields": {"error": text}})
                self._stopping.wait(1.0)

    def _events_turn(self) -> None:
        """Connect, subscribe, have everybody look, read until the stream ends."""
        try:
            engine = self._connect()
            try:
                stream = engine.events(FILTERS)
            except EngineError:
                engine.close()
                raise
        except EngineError as error:
            self._disconnected(error)
            self._stopping.wait(self._backoff.next(LOCAL_CAP_S if error.retry_is_cheap else None))
            return
        began = self._clock()
        self._connected(engine, stream)
        self._mark_all()
        self._read(stream)
        stream.close()
        if self._clock() - began >= STREAM_LIVED_S:
            # A proxy cut an idle stream, or the daemon went: the next turn tells. At once.
            self._backoff.reset()
            self._log.debug("event stream ended: subscribing again")
        else:
            self._stopping.wait(self._backoff.next())

    def _connected(self, engine: Engine, stream: EventStream) -> None:
        with self._lock:
            former, self._engine, self._stream = self._engine, engine, stream
            stopping = self._stopping.is_set()
        if former is not None:
            former.close()
        if stopping:  # `stop` came too early to see this stream
            stream.close()
        if self._lost_said is not None:
            self._lost_said = None
            self._log.info("connected to Docker again")

    def _disconnected(self, error: EngineError) -> None:
        with self._lock:
            engine, self._engine, self._stream = self._engine, None, None
        if engine is not None:
            engine.close()
        now, reason = self._clock(), str(error)
        news = reason != self._lost_said and now - self._lost_at >= SAY_AGAIN_S
        if self._stopping.is_set() or not (self._lost_said is None or news):
            return
        self._lost_said, self._lost_at = reason, now
        self._log.warning(
            "cannot ask Docker: going on with what is known, trying again",
            extra={"fields": {"error": reason}},
        )

    def _read(self, stream: EventStream) -> None:
        parser = EventParser()
        for data in stream:
            for event in parser.feed(data):
                who = subject(event)
                dead = death(event)
                if dead is not None:
                    for watcher in self._watchers:
                        watcher.container_died(*dead)
                own_networks = self._own_networks
                own = (own_networks.container_id, own_networks.network_owner) if own_networks else ()
                if who is None or any(i in who.ids for i in own):
                    self._mark_all()
                    continue
                for watcher in self._watchers:
                    if watcher.matches(who):
                        watcher.request_inspect(fresh=True)

    def _mark_all(self, *, fresh: bool = True) -> None:
        self._own_networks_stale = True
        for watcher in self._watchers:
            watcher.request_inspect(fresh=fresh)

    def _watch(self) -> None:
        """Pings and reconciles: an event stream has no read timeout, and may lose events."""
        reconcile_at = self._clock() + self._reconcile_every
        while not self._stopping.wait(min(self._ping_every, self._reconcile_every)):
            self._ping()
            if self._clock() >= reconcile_at:
                reconcile_at = self._clock() + self._reconcile_every
                self._mark_all(fresh=False)

    def _ping(self) -> None:
        with self._lock:
            engine, stream = self._engine, self._stream
        if engine is None or stream is None:
            return  # the events thread is at it
        try:
            engine.ping()
        except EngineError as error:
            if error.status in (403, 404, 405):
                return  # a proxy that forbids the ping is there, for all that
            self._log.debug("no answer to a ping", extra={"fields": {"error": str(error)}})
            stream.close()
