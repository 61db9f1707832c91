"""Follows one target: a thread that looks when it is told to, and says what it saw.

Invariants:

- One thread per target, so that an inspect that blocks (Docker holds a container's lock while it
  starts or stops it) delays only its own target.
- A look is begun after the mark that asked for it, never before: a mark during a look causes
  exactly one more.
- A look that fails changes no address: the data path does not depend on the daemon.
- Every change is logged once, and a target that changes without end is logged at a bounded rate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ambassador.engine.api import Document
from ambassador.discovery.documents import OwnNetworks, drivers_of, exposed_listeners, is_id_prefix, is_running, is_target, joined_reference, microseconds, needs_drivers
from ambassador.backoff import Backoff
from ambassador.discovery.events import Subject
from ambassador.discovery.target_address import (
    absent_state,
    awaits_address,
    keep_exposed,
    no_address_problem,
    target_state,
)
from ambassador.model import TargetState

RETRY_FIRST_S = 0.05
RETRY_CAP_S = 1.0
RETRIES = 10
"""Looks at a running container without an address: some 6 s. Then events and reconcile remain."""

FAILURE_CAP_S = 5.0
"""Between two looks that the Engine answers with an error."""

LOUD_CHANGES = 20
LOUD_WINDOW_S = 60.0
"""More changes than this in this time (a crash loop) are logged at debug level only."""


class EngineError(Exception):
    """The Engine did not give what was asked for. The text is one line that says what to do.

    `status` is the HTTP status where the Engine, or what stands in front of it, did answer;
    `retry_is_cheap` says that asking again costs nothing (nobody listens on a local socket).
    """

    def __init__(self, message: str, *, status: int | None = None, retry_is_cheap: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.retry_is_cheap = retry_is_cheap


class NoSuchContainer(EngineError):
    """The Engine knows no container of that name or ID."""


class EventStream(Protocol):
    """Pieces of the event stream as they come; ends when the stream does, and on `close`."""

    def __iter__(self) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """What is asked of a Docker Engine. Every method may raise EngineError, and nothing else."""

    def inspect_container(self, name: str) -> Document: ...
    def events(self, filters: Mapping[str, list[str]]) -> EventStream: ...
    def ping(self) -> None: ...
    def networks(self) -> list[Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a watcher shares with the others."""

    engine: Callable[[], Engine | None]
    own_networks: Callable[[Engine], OwnNetworks]
    publish: Callable[[TargetState], None]
    network: str | None
    log: logging.Logger
    debounce: float
    clock: Callable[[], float] = time.monotonic


class TargetWatcher:
    """One target's thread. `request_inspect`, `matches` and `stop` are called from other threads."""

    def __init__(self, target: str, around: Surroundings) -> None:
        self.target = target
        self._around = around
        self._dirty = threading.Event()
        self._stopping = threading.Event()
        self._state = TargetState(target)
        self._ids: frozenset[str] = frozenset()
        self._lock = threading.Lock()  # over _state and _overtaken; held for no call that can block
        self._died_during_inspect = False  # a death was heard after the look in progress began
        self._last_logged: object = None
        self._said_skipped: tuple[str, ...] = ()
        self._said_failure = ""
        self._failures = 0
        self._changes: deque[float] = deque(maxlen=LOUD_CHANGES)
        self._retries = 0
        self._retry = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        self._failure = Backoff(2 * RETRY_FIRST_S, FAILURE_CAP_S)
        self.thread = threading.Thread(target=self._run, name=f"follow {target}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._dirty.set()

    def request_inspect(self, *, fresh: bool = False) -> None:
        """Look (again). `fresh`: because of news, so that given-up retries start anew."""
        if fresh:
            self._retries = 0
        self._dirty.set()

    def container_died(self, container_id: str, at: int) -> None:
        """The container died at `at` (ns): drop its address at once, until a look that began later says more.

        Inspect would say so too, but only once Docker has cleaned up behind the container, some 0.1 to
        0.5 s later: so long would new connections and datagrams go to a network that is gone. A death
        that is older than the run that is known is old news.
        """
        with self._lock:
            state = self._state
            if container_id not in self._ids or state.address is None:
                return
            started = microseconds(state.started_at)
            if started is not None and started >= at // 1000:
                return
            self._died_during_inspect = True
            self._state = replace(state, address=None)
            self._around.publish(self._state)

    def matches(self, subject: Subject) -> bool:
        """Whether an event is about this target: its name, its container, the one it joined."""
        if self.target.removeprefix("/") in subject.names or subject.ids & self._ids:
            return True
        return is_id_prefix(self.target) and any(i.startswith(self.target) for i in subject.ids)

    def _run(self) -> None:
        delay: float | None = None
        while not self._stopping.is_set():
            self._dirty.wait(delay)
            if self._stopping.is_set():
                return
            # Cleared before the look: a mark from here on is another look's.
            self._dirty.clear()
            try:
                delay = self.inspect_now()
            except Exception as error:  # noqa: BLE001 - a thread that ends would freeze its target
                delay = self._fail(EngineError(f"unexpected {type(error).__name__}: {error}"))
            # The first mark after quiet is looked at at once, those right behind it together.
            self._stopping.wait(self._around.debounce)

    def inspect_now(self) -> float | None:
        """Ask the Engine and publish. Returns when to look again if nobody asks; None: never."""
        engine = self._around.engine()
        if engine is None:
            return None  # everybody is marked when it is back
        with self._lock:
            self._died_during_inspect = False
        try:
            state, pending, running = self._ask(engine)
        except EngineError as error:
            if self._around.engine() is not engine:
                return None  # lost meanwhile; the loss is logged where it was noticed
            return self._fail(error)
        self._recover()
        delay = None
        if not pending:
            self._retries = 0
            self._retry.reset()
        elif self._retries < RETRIES:
            self._retries += 1
            delay = self._retry.next()
        else:
            state = replace(state, problem=no_address_problem(self.target))
        self._log_change(state, running=running, pending=delay is not None)
        self._publish(state)
        return delay

    def _ask(self, engine: Engine) -> tuple[TargetState, bool, bool]:
        """The state, whether an address is still to come, and whether the container runs."""
        around = self._around
        own_networks = around.own_networks(engine)
        document = self._inspect(engine, self.target)
        if document is None:
            self._ids = frozenset()
            return absent_state(self._state), False, False
        joined = None
        ids = {document.get("Id")}
        reference = joined_reference(document)
        if reference is not None:
            joined = self._inspect(engine, reference)
            ids |= {reference, joined.get("Id") if joined is not None else None}
        self._ids = frozenset(i for i in ids if isinstance(i, str) and i)
        if needs_drivers(joined or document, own_networks, around.network):
            own_networks = replace(own_networks, drivers=self._drivers(engine))
        self._tell_skipped(exposed_listeners(document).skipped)
        state = target_state(self.target, document, own_networks, network=around.network, joined=joined)
        return (
            keep_exposed(self._state, state),
            awaits_address(document, state),
            is_running(document),
        )

    @staticmethod
    def _inspect(engine: Engine, name: str) -> Document | None:
        try:
            document = engine.inspect_container(name)
        except NoSuchContainer:
            return None
        return document if is_target(document, name) else None

    def _drivers(self, engine: Engine) -> Mapping[str, str]:
        try:
            return drivers_of(engine.networks())
        except EngineError as error:
            # A socket proxy may forbid it; then every network counts as a bridge.
            self._around.log.debug(
                "networks are not known", extra={"fields": {"error": str(error)}}
            )
            return {}

    def _publish(self, state: TargetState) -> None:
        with self._lock:
            if self._died_during_inspect:
                return  # asked before the container died; the event has marked for another look
            self._state = state
            self._around.publish(state)

    # --- what is said, once ---

    def _fail(self, error: EngineError) -> float:
        self._failures += 1
        # A connection that breaks is the daemon's going, which is noticed and told elsewhere.
        if error.status is not None or self._failures > 1:
            text = str(error)
            if text != self._said_failure:
                self._said_failure = text
                self._around.log.warning(
                    "inspect failed",
                    extra={"fields": {"container": self.target, "error": text}},
                )
            self._publish(replace(self._state, problem=text))
        return self._failure.next()

    def _recover(self) -> None:
        self._failures = 0
        self._failure.reset()
        if self._said_failure:
            self._said_failure = ""
            self._around.log.info(
                "inspect works again", extra={"fields": {"container": self.target}}
            )

    def _log_change(self, state: TargetState, *, running: bool, pending: bool) -> None:
        if pending:
            return
        news = (state.container_id, state.started_at, state.address, state.problem, running)
        if news == self._last_logged:
            return
        self._last_logged = news
        fields: dict[str, object] = {"container": self.target}
        if state.container_id:
            fields["id"] = state.container_id[:12]
        if state.problem:
            message, level = state.problem, logging.WARNING
        elif state.address is not None:
            fields["address"] = state.address
            fields["ports"] = " ".join(str(port) for port in sorted(state.exposed))
            message, level = "target is running", logging.INFO
        elif state.container_id:
            message, level = "target is not running: waiting for it", logging.INFO
        else:
            message, level = "there is no such container: waiting for it", logging.INFO
        self._around.log.log(self._limited_level(level), message, extra={"fields": fields})

    def _limited_level(self, level: int) -> int:
        """`level`, or debug where the log has been told enough in the last minute."""
        now = self._around.clock()
        quiet = len(self._changes) == LOUD_CHANGES and now - self._changes[0] < LOUD_WINDOW_S
        if not quiet:
            self._changes.append(now)
            if len(self._changes) == LOUD_CHANGES and now - self._changes[0] < LOUD_WINDOW_S:
                self._around.log.warning(
                    "target changes often, logging at debug level",
                    extra={"fields": {"container": self.target}},
                )
        return logging.DEBUG if quiet else level

    def _tell_skipped(self, skipped: tuple[str, ...]) -> None:
        if skipped != self._said_skipped:
            self._said_skipped = skipped
            if skipped:
                self._around.log.warning(
                    "only TCP and UDP are relayed: leaving out some ports",
                    extra={"fields": {"container": self.target, "ports": " ".join(skipped)}},
                )
