"""Watches one target: its thread inspects on request, publishes the state, and logs each change once.

Invariants:

- One thread per target: an inspect that blocks delays its own target only. Docker holds a container's lock
  while it starts or stops it.
- An inspect that fails changes no replica: the data path does not depend on the daemon.
- A target that changes without end is logged at a bounded rate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ambassador.backoff import Backoff
from ambassador.discovery.documents import (
    Attachment,
    Network,
    container_id,
    exposed_ports,
    is_id_prefix,
    is_running,
    is_target,
    microseconds,
    network_owner_reference,
    networks_of,
    owners_of,
    started_at,
)
from ambassador.discovery.events import Subject
from ambassador.discovery.inspect_thread import InspectThread
from ambassador.discovery.joins import Join, joins_of
from ambassador.discovery.own_networks import OwnNetworks
from ambassador.discovery.target_address import (
    absent_state,
    awaits_address,
    keep_ports,
    networks_in_question,
    no_address_problem,
    target_state,
)
from ambassador.engine.api import Document, Engine, EngineError, NoSuchContainer
from ambassador.model import TargetState

RETRY_FIRST_S = 0.05
RETRY_CAP_S = 1.0
RETRIES = 10
"""Inspects of a running container without an address, over some 6 s. Then events and reconcile remain."""

FAILURE_CAP_S = 5.0
"""Between two inspects that the Engine answers with an error."""

LOUD_CHANGES = 20
LOUD_WINDOW_S = 60.0
"""More changes than LOUD_CHANGES in this time (a crash loop) are logged at debug level."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer of the Engine. `container` and `run` are empty if there is no such container."""

    state: TargetState
    container: str = ""
    run: str = ""
    running: bool = False
    awaits_address: bool = False


class TargetWatcher:
    """One target's thread. The other methods are called by other threads, and none of them blocks.

    `engine` returns the Engine to ask, or None while there is none. `own_networks` returns the ambassador's
    own networks or raises EngineError. `publish` takes each state; it must not block.
    """

    def __init__(
        self,
        target: str,
        *,
        engine: Callable[[], Engine | None],
        own_networks: Callable[[], OwnNetworks],
        publish: Callable[[TargetState], None],
        network: str,
        log: logging.Logger,
        debounce: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self._engine = engine
        self._own_networks = own_networks
        self._publish_state = publish
        self._network = network
        self._log = log
        self._clock = clock
        self._thread = InspectThread(
            f"watch {target}", turn=self.inspect_now, failed=self._fail, debounce=debounce
        )
        # The lock is over the next two, and held for no call that can block.
        self._lock = threading.Lock()
        self._state = TargetState(target)
        self._died_during_inspect = False
        self._container = ""
        self._ids: frozenset[str] = frozenset()  # of the container, and of its network's owners
        self._joins: tuple[Join, ...] = ()
        self._networks: Mapping[str, Network] = {}
        self._retries = 0
        self._retry = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        self._failures = 0
        self._failure = Backoff(2 * RETRY_FIRST_S, FAILURE_CAP_S)
        self._last_logged: object = None
        self._last_skipped: tuple[str, ...] = ()
        self._last_error = ""
        self._changes: deque[float] = deque(maxlen=LOUD_CHANGES)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def request_inspect(self, *, fresh: bool = False) -> None:
        """Inspect soon. `fresh`: there is news, so an address that never came is awaited anew."""
        if fresh:
            self._retries = 0
        self._thread.request()

    def container_died(self, container: str, at: int) -> None:
        """Clear the address now; an inspect that starts later sets it again. `at` is in nanoseconds.

        Docker's inspect reports a death only after its cleanup, 0.1 to 0.5 s later. Until then new
        connections and datagrams would go to a network that is gone. A death before the known run is old.
        """
        with self._lock:
            state = self._state
            if container not in self._ids or not state.replicas:
                return
            started = microseconds(state.replicas[0].run)
            if started is not None and started >= at // 1000:
                return
            self._died_during_inspect = True
            self._state = replace(state, replicas=())
            self._publish_state(self._state)

    def matches(self, subject: Subject) -> bool:
        """Whether an event is about this target: its name, its container or its network's owner."""
        if self.target.removeprefix("/") in subject.names or subject.ids & self._ids:
            return True
        return is_id_prefix(self.target) and any(i.startswith(self.target) for i in subject.ids)

    # --- in the target's thread ---

    def inspect_now(self) -> float | None:
        """Ask the Engine and publish. Returns the seconds until the next inspect; None: on request."""
        engine = self._engine()
        if engine is None:
            return None  # the reconnect requests an inspect
        with self._lock:
            self._died_during_inspect = False
        try:
            answer = self._ask(engine)
        except EngineError as error:
            if self._engine() is not engine:
                return None  # the Engine is gone, which the thread of the event stream logs
            return self._fail(error)
        self._succeed()
        state, delay = answer.state, None
        if not answer.awaits_address:
            self._retries = 0
            self._retry.reset()
        elif self._retries < RETRIES:
            self._retries += 1
            delay = self._retry.next()
        else:
            state = replace(state, problem=no_address_problem(self.target))
        if delay is None:
            self._log_change(state, answer)
        self._publish(state)
        return delay

    def _ask(self, engine: Engine) -> _Answer:
        document = self._inspect(engine, self.target)
        if document is None:
            self._ids, self._container = frozenset(), ""
            return _Answer(absent_state(self._state))
        owners = owners_of(document, lambda reference: self._inspect(engine, reference))
        known = [each for each in (document, *owners) if each is not None]
        ids = {container_id(each) for each in known}
        ids |= {network_owner_reference(each) or "" for each in known}
        self._ids = frozenset(ids - {""})
        self._joins = joins_of(document, owners, self._joins)
        own_networks = self._own_networks()
        self._log_skipped(exposed_ports(document).skipped)
        state = target_state(
            self.target,
            document,
            own_networks,
            network=self._network,
            owners=owners,
            joins=self._joins,
            networks=self._known_networks(engine, networks_in_question(known[-1], own_networks)),
            previous=self._state.replicas,
        )
        former, self._container = self._container, container_id(document)
        if self._container == former:
            state = keep_ports(self._state, state)
        return _Answer(
            state,
            self._container,
            started_at(document),
            is_running(document),
            awaits_address(document, state),
        )

    @staticmethod
    def _inspect(engine: Engine, name: str) -> Document | None:
        try:
            document = engine.inspect_container(name)
        except NoSuchContainer:
            return None
        return document if is_target(document, name) else None

    def _known_networks(
        self, engine: Engine, places: Sequence[Attachment]
    ) -> Mapping[str, Network]:
        """What is known of `places`. Nothing of it changes, so a network with an ID is asked for once.

        Podman has the name where Docker has the ID, and another network can take over a name.
        """
        ids = [place.network_id for place in places]
        if all(is_id_prefix(each) and each in self._networks for each in ids):
            return self._networks
        try:
            self._networks = networks_of(engine.networks())
        except EngineError as error:  # a socket proxy may forbid it
            fields = {"error": str(error)}
            self._log.debug("networks not listed", extra={"fields": fields})
        return self._networks

    def _publish(self, state: TargetState) -> None:
        with self._lock:
            if self._died_during_inspect:
                return  # the answer may be older than the death, which has requested another inspect
            self._state = state
            self._publish_state(state)

    def _fail(self, error: EngineError) -> float:
        self._failures += 1
        # The first broken connection may mean that the daemon stops, which another thread logs.
        if error.status is not None or self._failures > 1:
            text = str(error)
            if text != self._last_error:
                self._last_error = text
                fields = {"container": self.target, "error": text}
                self._log.warning("inspect failed", extra={"fields": fields})
            self._publish(replace(self._state, problem=text))
        return self._failure.next()

    def _succeed(self) -> None:
        self._failures = 0
        self._failure.reset()
        if self._last_error:
            self._last_error = ""
            self._log.info("inspect works again", extra={"fields": {"container": self.target}})

    # --- the log ---

    def _log_change(self, state: TargetState, answer: _Answer) -> None:
        """Log what has changed since the last line."""
        news = (answer.container, answer.run, answer.running, state.replicas, state.problem)
        if news == self._last_logged:
            return
        self._last_logged = news
        level = logging.INFO
        fields: dict[str, object] = {"container": self.target}
        if answer.container:
            fields["id"] = answer.container[:12]
        if state.problem:
            message, level = "target problem", logging.WARNING
            fields["problem"] = state.problem
        elif state.replicas:
            message = "target is running"
            fields["address"] = state.replicas[0].address
            fields["ports"] = " ".join(map(str, sorted(state.ports)))
        elif answer.container:
            message = "target is not running, waiting"
        else:
            message = "no such container, waiting"
        self._log.log(self._limited_level(level), message, extra={"fields": fields})

    def _limited_level(self, level: int) -> int:
        """`level`, or debug if this target has had enough lines in the last minute."""
        now = self._clock()
        if self._changes_are_many(now):
            return logging.DEBUG
        self._changes.append(now)
        if self._changes_are_many(now):
            fields = {"container": self.target}
            message = "target changes often, logging at debug level"
            self._log.warning(message, extra={"fields": fields})
        return level

    def _changes_are_many(self, now: float) -> bool:
        return len(self._changes) == LOUD_CHANGES and now - self._changes[0] < LOUD_WINDOW_S

    def _log_skipped(self, skipped: tuple[str, ...]) -> None:
        if skipped != self._last_skipped:
            self._last_skipped = skipped
            if skipped:
                fields = {"container": self.target, "ports": " ".join(skipped)}
                message = "ports left out, only TCP and UDP"
                self._log.warning(message, extra={"fields": fields})
