"""Watches the targets through a Docker Engine, and reconnects if the Engine goes.

Threads: one per target (`watcher.py`), one for the own networks (`own_networks.py`), one that holds the event
stream and reconnects, one that pings and reconciles, one that inspects all on news that may concern any. All
are daemon threads: none keeps the program alive.

Invariants:

- Level-triggered: an event, a reconnect or a reconcile only requests inspects. The state is what inspect
  says.
- Subscribe first, inspect second: no change between the two is lost.
- Without events all targets are inspected every few seconds. A stream that is deaf is given up.
- While the Engine is away the last states stand. Its loss and its return are one log line each.
- Only GET requests: `_ping`, `version`, `events`, `containers/{id}/json`, `networks`, `info`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from ambassador.backoff import Backoff
from ambassador.discovery.events import FILTERS, EventParser, loss, start, subject
from ambassador.discovery.inspect_thread import InspectThread
from ambassador.discovery.own_networks import OwnNetworksWatcher, OwnPlace
from ambassador.discovery.source import Source
from ambassador.discovery.watcher import TargetWatcher
from ambassador.engine.api import Engine, EngineError, EventStream
from ambassador.model import TargetState

RECONNECT_FIRST_S = 0.05
LOCAL_CAP_S = 1.0
"""Between two attempts at a local socket without a listener. An attempt is one system call, and a daemon that
is back should be noticed within 2 s."""

STREAM_LIVED_S = 1.0
"""A stream that ends sooner counts as a failure: a proxy that cuts at once must not cause a storm."""

POLL_S = 2.0
POLLS_PER_SECOND = 25
"""Without events each target is inspected every POLL_S, and all together at this rate at most."""

POLLS_PER_SUBSCRIBE = 5

INSPECT_ALL_GAP_S = 1.0
"""Between two events after which all targets are inspected."""

LOG_AGAIN_S = 10.0
"""While the Engine is away, a new reason is logged no sooner than this after the last line."""

STOP_S = 0.5
"""How long `stop` waits for the threads."""


class DockerSource(Source):
    """The Source of targets that a Docker Engine runs.

    `connect` makes a new `Engine`, or raises EngineError. `network` is the value of -network. Durations are
    seconds. `stop` closes the Engine's connections.
    """

    def __init__(
        self,
        connect: Callable[[], Engine],
        targets: Sequence[str],
        *,
        on_change: Callable[[], None],
        log: logging.Logger,
        network: str = "",
        debounce: float = 0.02,
        reconcile_every: float = 30.0,
        ping_every: float = 10.0,
        backoff_max: float = 10.0,
        place: OwnPlace = OwnPlace(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._on_change = on_change
        self._log = log
        self._reconcile_every = reconcile_every
        self._ping_every = ping_every
        self._clock = clock
        self._backoff = Backoff(RECONNECT_FIRST_S, backoff_max)
        self._stopping = threading.Event()
        # The lock is over the next three, and held for no call that can block.
        self._lock = threading.Lock()
        # Docker's own form of a name has a slash: /web is web.
        names = (target.removeprefix("/") or target for target in targets)
        self._states = {name: TargetState(name) for name in names}
        self._engine: Engine | None = None
        self._stream: EventStream | None = None
        self._has_no_events = False
        self._lost_reason: str | None = None
        self._lost_at = 0.0
        self._own_networks = OwnNetworksWatcher(
            lambda: self._engine,
            place=place,
            on_change=self._inspect_all,
            log=log,
            debounce=debounce,
        )
        self._watchers = [
            TargetWatcher(
                target,
                engine=lambda: self._engine,
                own_networks=self._own_networks.get,
                publish=self._publish,
                event_missed=self._event_missed,
                network=network,
                log=log,
                debounce=debounce,
                clock=clock,
            )
            for target in self._states
        ]
        self._inspector = InspectThread(
            "inspect all",
            turn=self._inspect_all,
            failed=lambda _: INSPECT_ALL_GAP_S,
            debounce=INSPECT_ALL_GAP_S,
        )
        self._threads = [
            threading.Thread(target=self._run, args=(turn,), name=name, daemon=True)
            for name, turn in (("docker events", self._events_turn), ("docker pings", self._pings))
        ]

    def start(self) -> None:
        self._own_networks.start()
        self._inspector.start()
        for watcher in self._watchers:
            watcher.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads and close the connections. A thread inside a request ends with its timeout."""
        self._stopping.set()
        with self._lock:
            engine, stream = self._engine, self._stream
            self._engine = None
        self._own_networks.stop()
        self._inspector.stop()
        for watcher in self._watchers:
            watcher.stop()
        if stream is not None:
            stream.close()
        if engine is not None:
            engine.close()
        deadline = time.monotonic() + STOP_S
        for join in (
            *(thread.join for thread in self._threads),
            self._own_networks.join,
            self._inspector.join,
            *(watcher.join for watcher in self._watchers),
        ):
            join(max(0.0, deadline - time.monotonic()))

    def targets(self) -> tuple[TargetState, ...]:
        """The last known state of each target, in the order of the command line."""
        with self._lock:
            return tuple(self._states.values())

    @property
    def connected(self) -> bool:
        """Whether the Engine answers, as far as is known."""
        return self._engine is not None

    def _publish(self, state: TargetState) -> None:
        with self._lock:
            changed = self._states[state.target] != state
            self._states[state.target] = state
        if changed and not self._stopping.is_set():
            self._on_change()

    def _inspect_all(self, *, fresh: bool = True) -> None:
        for watcher in self._watchers:
            watcher.request_inspect(fresh=fresh)

    def _refresh_all(self, *, fresh: bool = True) -> None:
        self._own_networks.request_refresh()
        self._inspect_all(fresh=fresh)

    # --- threads ---

    def _run(self, turn: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                turn()
            except Exception as error:  # noqa: BLE001 - without this thread no target is watched
                text = f"{type(error).__name__}: {error}: report this as a bug"
                self._log.error("unexpected error, trying again", extra={"fields": {"error": text}})
                self._stopping.wait(1.0)

    def _events_turn(self) -> None:
        """Connect, subscribe, request every inspect, and read until the stream ends."""
        try:
            engine = self._connect()
            try:
                stream = engine.events(FILTERS)
            except EngineError as error:
                stream = self._poll(engine, error)
        except EngineError as error:
            self._disconnected(error)
            self._stopping.wait(self._backoff.next(LOCAL_CAP_S if error.retry_is_cheap else None))
            return
        started = self._clock()
        self._connected(engine, stream)
        self._refresh_all()
        self._read(stream)
        stream.close()
        if self._clock() - started >= STREAM_LIVED_S:
            # A proxy cut an idle stream, or the daemon stopped: the next turn finds out, without a delay.
            self._backoff.reset()
            self._log.debug("event stream ended, subscribing again")
        else:
            self._stopping.wait(self._backoff.next())

    def _poll(self, engine: Engine, error: EngineError) -> EventStream:
        """Inspect all until the Engine gives events. Raises EngineError if it is gone.

        `error` is its refusal: without events Podman runs, and proxies exist that forbid them.
        """
        if error.status is None:
            engine.close()
            raise error
        self._connected(engine, None)
        gap = max(POLL_S, len(self._watchers) / POLLS_PER_SECOND)
        if not self._has_no_events:
            self._has_no_events = True
            fields = {"error": str(error), "every": f"{gap:.0f}s"}
            self._log.warning("no events, inspecting at intervals", extra={"fields": fields})
        for turn in itertools.count(1):
            self._refresh_all(fresh=False)
            if self._stopping.wait(gap):
                break
            try:
                if turn % POLLS_PER_SUBSCRIBE == 0:
                    return engine.events(FILTERS)
                engine.ping()
            except EngineError as refusal:
                if refusal.status is None:
                    raise
        raise error

    def _connected(self, engine: Engine, stream: EventStream | None) -> None:
        with self._lock:
            former, self._engine, self._stream = self._engine, engine, stream
            stopping = self._stopping.is_set()
        if former is not None and former is not engine:
            former.close()
        if stopping:  # `stop` came too early to close these two
            if stream is not None:
                stream.close()
            engine.close()
        if stream is not None and self._has_no_events:
            self._has_no_events = False
            self._log.info("Docker tells events again")
        if self._lost_reason is not None:
            self._lost_reason = None
            self._log.info("connected to Docker again")

    def _disconnected(self, error: EngineError) -> None:
        with self._lock:
            engine, self._engine, self._stream = self._engine, None, None
        if engine is not None:
            engine.close()
        now, reason = self._clock(), str(error)
        is_new = reason != self._lost_reason and now - self._lost_at >= LOG_AGAIN_S
        if self._stopping.is_set() or not (self._lost_reason is None or is_new):
            return
        self._lost_reason, self._lost_at = reason, now
        fields = {"error": reason}
        self._log.warning("cannot ask Docker, keeping the last state", extra={"fields": fields})

    def _read(self, stream: EventStream) -> None:
        for watcher in self._watchers:
            watcher.subscribed()
        parser = EventParser()
        for data in stream:
            for event in parser.feed(data):
                self._handle(event)

    def _handle(self, event: object) -> None:
        about = subject(event)
        started, lost = start(event), loss(event)
        for watcher in self._watchers:
            if lost is not None:
                watcher.container_lost(lost)
            if started is not None and about is not None and watcher.matches(about):
                watcher.container_started(*started)
        if about is None or self._own_networks.matches(about):
            self._own_networks.request_refresh()
            self._inspector.request()
        if about is None:
            return
        for watcher in self._watchers:
            if watcher.matches(about):
                watcher.request_inspect(fresh=True)

    def _event_missed(self, target: str) -> None:
        """Give up an event stream that is open and deaf: one that a NAT or the daemon forgot."""
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            fields = {"container": target}
            self._log.warning("an event is missing, subscribing again", extra={"fields": fields})
            stream.close()

    def _pings(self) -> None:
        """Ping and reconcile until `stop`: an event stream has no read timeout, and may lose events."""
        reconcile_at = self._clock() + self._reconcile_every
        while not self._stopping.wait(min(self._ping_every, self._reconcile_every)):
            self._ping()
            for watcher in self._watchers:
                watcher.log_slow_inspect()
            if self._clock() >= reconcile_at:
                reconcile_at = self._clock() + self._reconcile_every
                self._refresh_all(fresh=False)

    def _ping(self) -> None:
        with self._lock:
            engine, stream = self._engine, self._stream
        if engine is None or stream is None:
            return  # the thread of the event stream reconnects
        try:
            engine.ping()
        except EngineError as error:
            if error.status in (403, 404, 405):
                return  # a proxy that forbids the ping has answered
            self._log.debug("no answer to a ping", extra={"fields": {"error": str(error)}})
            stream.close()
