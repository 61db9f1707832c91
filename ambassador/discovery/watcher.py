"""Watches one target: its thread inspects on request, publishes the state, and logs each change once.

Invariants:

- One thread per target: an inspect that blocks delays its own target only. Docker holds a container's lock
  while it starts or stops it.
- An inspect that fails changes no replica: the data path does not depend on the daemon.
- A loss that the event stream tells clears the address at once, and voids the answer of an inspect that was
  under way. The order of the stream decides, since clocks are set back.
- A target that was found by its ID stays that container: a name like the ID changes nothing.
- A target that changes without end is logged at a bounded rate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ambassador.backoff import Backoff
from ambassador.discovery.documents import (
    Attachment,
    Network,
    attachments,
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
from ambassador.discovery.events import Loss, Subject
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

SLOW_S = 10.0
"""An inspect that takes longer is a line in the log. It is waited for."""

GRACE_S = 2.0
"""How long an event may come behind the change that it tells."""

LOUD_CHANGES = 20
LOUD_WINDOW_S = 60.0
"""More changes than LOUD_CHANGES in this time (a crash loop) are logged at debug level. When the time is
over, the state as it is then is logged."""


LOSSES_KEPT = 1000
"""Losses of all containers that are remembered during one inspect."""

NAMESAKES_LOGGED = 20

STARTS_KEPT = 8
"""Containers whose last start is remembered: the target's, its network's owner's and what they replace."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What an answer says of the containers that make the address.

    `ids`: the target's container and its network's owner. `runs`: the start of each, as Docker writes it.
    `networks`: the IDs and names of the networks that have the address.
    """

    ids: frozenset[str] = frozenset()
    runs: Mapping[str, str] = field(default_factory=dict)
    networks: frozenset[str] = frozenset()


_NOTHING = _Known()


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer of the Engine. `container` and `run` are empty if there is no such container."""

    state: TargetState
    known: _Known = _NOTHING
    container: str = ""
    run: str = ""
    running: bool = False
    awaits_address: bool = False


class TargetWatcher:
    """One target's thread. The other methods are called by other threads, and none of them blocks.

    `engine` returns the Engine to ask, or None while there is none. `own_networks` returns the ambassador's
    own networks or raises EngineError. `publish` takes each state; it must not block. `event_missed` is
    called if a reconcile found what no event told.
    """

    def __init__(
        self,
        target: str,
        *,
        engine: Callable[[], Engine | None],
        own_networks: Callable[[], OwnNetworks],
        publish: Callable[[TargetState], None],
        event_missed: Callable[[str], None],
        network: str,
        log: logging.Logger,
        debounce: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self._engine = engine
        self._own_networks = own_networks
        self._publish_state = publish
        self._event_missed = event_missed
        self._network = network
        self._log = log
        self._clock = clock
        self._thread = InspectThread(
            f"watch {target}", turn=self.inspect_now, failed=self._fail, debounce=debounce
        )
        # The lock is over the next four, and held for no call that can block.
        self._lock = threading.Lock()
        self._state = TargetState(target)
        self._known = _NOTHING
        self._losses: list[Loss] = []  # told since the last inspect began
        self._starts: dict[str, int] = {}  # of containers, told by this stream; nanoseconds
        self._container = ""
        self._joins: tuple[Join, ...] = ()
        self._networks: Mapping[str, Network] = {}
        self._full_id = ""  # once the target was found by its ID
        self._namesakes: set[str] = set()  # IDs of containers that are only named like the ID
        self._is_told = False  # there was news since the last inspect that counts
        self._is_reconciled = False
        self._doubted_at: float | None = None  # an inspect found what no event had told
        self._found: object = None  # by the last inspect that counts
        self._inspect_began: float | None = None
        self._retries = 0
        self._retry = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        self._failures = 0
        self._failure = Backoff(2 * RETRY_FIRST_S, FAILURE_CAP_S)
        self._last_logged: object = None
        self._last_skipped: tuple[str, ...] = ()
        self._last_error = ""
        self._changes: deque[float] = deque(maxlen=LOUD_CHANGES)
        self._left_out = 0  # changes since the last line about one

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
            self._is_told = True
        else:
            self._is_reconciled = True
        self._thread.request()

    def log_slow_inspect(self) -> None:
        """Log an inspect that has no answer yet, once, if it takes long."""
        began = self._inspect_began
        if began is not None and self._clock() - began >= SLOW_S:
            self._inspect_began = None
            fields = {"container": self.target, "since": f"{SLOW_S:.0f}s"}
            self._log.warning("inspect takes long: check the daemon", extra={"fields": fields})

    def subscribed(self) -> None:
        """A new event stream begins: what the former one told last may be long ago."""
        with self._lock:
            self._starts.clear()

    def container_started(self, container: str, at: int) -> None:
        """Note a start. `at` is in nanoseconds by the daemon's clock, 0 if unknown."""
        with self._lock:
            self._starts.pop(container, None)
            if at:
                self._starts[container] = at
            while len(self._starts) > STARTS_KEPT:
                del self._starts[next(iter(self._starts))]

    def container_lost(self, loss: Loss) -> None:
        """Clear the address now if it is lost; an inspect that starts later sets it again.

        Docker's inspect reports a death only after its cleanup, 0.1 to 0.5 s later. Until then new
        connections and datagrams would go to a network that is gone, or to whoever has the address now.
        """
        with self._lock:
            self._losses.append(loss)
            del self._losses[:-LOSSES_KEPT]
            state = self._state
            if state.replicas and self._is_hit(loss, self._known):
                self._state = replace(state, replicas=())
                self._publish_state(self._state)

    def _is_hit(self, loss: Loss, known: _Known) -> bool:
        """Whether `loss` takes away the address that `known` is about. The caller holds the lock."""
        if loss.container not in known.ids:
            return False
        if loss.network and loss.network not in known.networks:
            return False
        if loss.old_name and (self._full_id or loss.old_name != self.target.removeprefix("/")):
            return False
        started = microseconds(known.runs.get(loss.container, ""))
        told = self._starts.get(loss.container)
        # The stream is late if the last start that it told came before the start of the known run: then the
        # loss is an older run's, unless it is younger than the known start all the same.
        is_late = started is not None and told is not None and told // 1000 < started
        return not is_late or (started is not None and loss.at // 1000 > started)

    def matches(self, subject: Subject) -> bool:
        """Whether an event is about this target: its name, its container or its network's owner."""
        if subject.ids & self._known.ids:
            return True
        is_named = self.target.removeprefix("/") in subject.names
        if self._full_id:
            if is_named and self._full_id not in subject.ids:
                self._log_namesakes(subject.ids)
            return self._full_id in subject.ids
        if is_named:
            return True
        return is_id_prefix(self.target) and any(i.startswith(self.target) for i in subject.ids)

    # --- in the target's thread ---

    def inspect_now(self) -> float | None:
        """Ask the Engine and publish. Returns the seconds until the next inspect; None: on request."""
        engine = self._engine()
        if engine is None:
            return None  # the reconnect requests an inspect
        told, self._is_told = self._is_told, False
        reconciled, self._is_reconciled = self._is_reconciled, False
        with self._lock:
            self._losses.clear()
        self._inspect_began = self._clock()
        try:
            answer = self._ask(engine)
        except EngineError as error:
            self._is_told |= told
            if self._engine() is not engine:
                return None  # the Engine is gone, which the thread of the event stream logs
            return self._fail(error)
        finally:
            self._inspect_began = None
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
        if not self._publish(state, answer.known):
            delay = 0.0  # the answer may be older than a loss: ask again
        if delay is not None:
            self._is_told |= told
            return delay
        self._log_change(state, answer)
        found = (answer.container, answer.run, answer.running, state.replicas)
        return min(
            (d for d in (self._doubt(found, told, reconciled), self._quiet_for()) if d is not None),
            default=None,
        )

    def _doubt(self, found: object, told: bool, reconciled: bool) -> float | None:
        """Report an event that is missing. Returns the seconds until another inspect may prove it.

        A reconcile can come between a change and its event, so an event has GRACE_S to come.
        """
        former, self._found = self._found, found
        now = self._clock()
        if told:
            self._doubted_at = None
        elif self._doubted_at is None:
            if reconciled and former not in (None, found):
                self._doubted_at = now
                return GRACE_S
        elif now - self._doubted_at < GRACE_S:
            return self._doubted_at + GRACE_S - now
        else:
            self._doubted_at = None
            self._event_missed(self.target)
        return None

    def _ask(self, engine: Engine) -> _Answer:
        # By its name, another container that is named like the ID would come first.
        document = self._inspect(engine, self._full_id or self.target)
        if document is None:
            self._container = ""
            return _Answer(absent_state(self._state))
        ident = container_id(document)
        if is_id_prefix(self.target) and ident.startswith(self.target):
            self._full_id = ident
        owners = owners_of(document, lambda reference: self._inspect(engine, reference))
        containers = [each for each in (document, *owners) if each is not None]
        ids = {container_id(each) for each in containers}
        ids |= {network_owner_reference(each) or "" for each in containers}
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
            networks=self._known_networks(
                engine, networks_in_question(containers[-1], own_networks)
            ),
            previous=self._state.replicas,
        )
        former, self._container = self._container, ident
        if self._container == former:
            state = keep_ports(self._state, state)
        addresses = {replica.address for replica in state.replicas}
        places = [a for a in attachments(containers[-1]) if a.address in addresses]
        known = _Known(
            frozenset(ids - {""}),
            {container_id(each): started_at(each) for each in containers},
            frozenset(text for a in places for text in (a.network, a.network_id) if text),
        )
        return _Answer(
            state,
            known,
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

    def _publish(self, state: TargetState, known: _Known) -> bool:
        """Publish an answer; False if a loss that was told meanwhile makes it void."""
        with self._lock:
            self._known = known
            if state.replicas and any(self._is_hit(loss, known) for loss in self._losses):
                return False
            self._state = state
            self._publish_state(state)
            return True

    def _fail(self, error: EngineError) -> float:
        self._failures += 1
        # The first broken connection may mean that the daemon stops, which another thread logs.
        if error.status is not None or self._failures > 1:
            text = str(error)
            if text != self._last_error:
                self._last_error = text
                fields = {"container": self.target, "error": text}
                self._log.warning("inspect failed", extra={"fields": fields})
            with self._lock:
                self._state = replace(self._state, problem=text)
                self._publish_state(self._state)
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
        if news == self._last_logged and (not self._left_out or self._quiet_for() is not None):
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
        level = self._limited_level(level)
        if level == logging.DEBUG:
            self._left_out += 1
        elif self._left_out:
            fields["changes_left_out"], self._left_out = self._left_out, 0
        self._log.log(level, message, extra={"fields": fields})

    def _log_namesakes(self, idents: frozenset[str]) -> None:
        for ident in idents - self._namesakes:
            if len(self._namesakes) < NAMESAKES_LOGGED:
                self._namesakes.add(ident)
                fields = {"container": self.target, "id": ident[:12]}
                message = "another container is named like this id: rename it"
                self._log.warning(message, extra={"fields": fields})

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

    def _quiet_for(self) -> float | None:
        """The seconds until a change that was left out is logged after all; None if there is none."""
        now = self._clock()
        if not self._left_out or not self._changes_are_many(now):
            return None
        return self._changes[0] + LOUD_WINDOW_S - now

    def _changes_are_many(self, now: float) -> bool:
        return len(self._changes) == LOUD_CHANGES and now - self._changes[0] < LOUD_WINDOW_S

    def _log_skipped(self, skipped: tuple[str, ...]) -> None:
        if skipped != self._last_skipped:
            self._last_skipped = skipped
            if skipped:
                fields = {"container": self.target, "ports": " ".join(skipped)}
                message = "ports left out, only TCP and UDP"
                self._log.warning(message, extra={"fields": fields})
