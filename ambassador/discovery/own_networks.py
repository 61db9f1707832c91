"""The ambassador's own networks: one thread refreshes them, all watchers read them.

Invariants:

- No lock is held while the Engine is asked. A reader gets the last answer at once.
- Only the first answer is waited for, and at most FIRST_ANSWER_S: without it no address can be chosen.
- A refresh that fails changes nothing.
- GET /info is optional: a proxy may forbid it, and then the Engine counts as one that is not rootless.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ambassador.backoff import Backoff
from ambassador.discovery.documents import (
    Attachment,
    attachments,
    container_id,
    is_host_mode,
    is_podman,
    is_rootless,
    is_target,
    owners_of,
)
from ambassador.discovery.events import Subject
from ambassador.discovery.inspect_thread import InspectThread
from ambassador.engine.api import Document, Engine, EngineError, NoSuchContainer
from ambassador.system.processes import own_addresses

FIRST_ANSWER_S = 6.0
"""Without an answer by then, a watcher says so and asks again."""

RETRY_FIRST_S = 0.1
RETRY_CAP_S = 5.0
"""Between two refreshes that fail."""

# The path is short if the directory of the containers is a file system of its own.
_MOUNT = re.compile(
    r"(?:/containers/|^/)([0-9a-f]{64})/(?:hostname|hosts|resolv\.conf)"
    r"|/overlay-containers/([0-9a-f]{64})/userdata/(?:hostname|hosts|resolv\.conf)"
)
_MOUNTED_FILES = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
_SHORT_ID = re.compile(r"[0-9a-f]{12}")
_MARKS = ("/.dockerenv", "/run/.containerenv")
"""Docker, Podman: a process that sees one is in a container."""

_CGROUP = re.compile(r"[/-]([0-9a-f]{64})(?:\.scope)?(?:/|$)")


@dataclass(frozen=True, slots=True)
class OwnNetworks:
    """The ambassador's own networks. Default: on the host, not in a container.

    `network_owner` is the container whose network the ambassador uses: its own container, or Y if it was
    started with `--network container:Y`. The rest matters only if `host`: `addresses` are those of the own
    interfaces. `unknown`: the ambassador is in a container that the Engine does not know. `rootless`: the
    Engine's networks are not in the own network namespace.
    """

    container_id: str = ""
    network_owner: str = ""
    host: bool = True
    attachments: tuple[Attachment, ...] = ()
    addresses: frozenset[str] = frozenset()
    unknown: bool = False
    rootless: bool = False


def own_networks_of(
    document: Document | None, network_owner: Document | None = None
) -> OwnNetworks:
    """The networks from the document of the ambassador's own container; None: it is in none.

    `network_owner` is the document of the container whose network it uses, if that is another one.
    """
    if document is None:
        return OwnNetworks()
    owner = network_owner if network_owner is not None else document
    return OwnNetworks(
        container_id=container_id(document),
        network_owner=container_id(owner),
        host=is_host_mode(owner),
        attachments=attachments(owner),
    )


def own_container_id(mountinfo: str, cgroup: str) -> str | None:
    """This process's container, from the texts of /proc/self/mountinfo and /proc/self/cgroup.

    The mounts come first: with cgroup v2 the cgroup file says only `0::/`. With `--network container:Y`
    Docker mounts the files of Y, so the result is Y. That suits: the networks to compare are those of Y.
    """
    mounts: dict[str, str] = {}
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        # A host also sees its containers' directories, but not on its own /etc/hostname.
        if len(fields) > 4 and fields[4] in _MOUNTED_FILES:
            match = _MOUNT.search(fields[3])
            if match:
                mounts.setdefault(fields[4], match[1] or match[2])
    for path in _MOUNTED_FILES:
        if path in mounts:
            return mounts[path]
    for line in cgroup.splitlines():
        found = _CGROUP.findall(line.rpartition(":")[2])
        if found:
            return str(found[-1])
    return None


def read_own_id() -> str | None:
    """The ID of the container that this process is in; None if it is in none."""
    texts = []
    for path in ("/proc/self/mountinfo", "/proc/self/cgroup"):
        try:
            texts.append(Path(path).read_text(errors="replace"))
        except OSError:
            texts.append("")
    return own_container_id(*texts)


def own_short_id() -> str:
    """The hostname if it can be a container's short ID, which is what an Engine sets; else empty."""
    name = socket.gethostname()
    return name if _SHORT_ID.fullmatch(name) else ""


def is_in_container() -> bool:
    return any(Path(mark).exists() for mark in _MARKS)


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """How the ambassador learns where it runs. Each field is asked when it is needed.

    `container_id` is None if the ambassador is in no container, or cannot tell in which.
    """

    container_id: Callable[[], str | None] = read_own_id
    short_id: Callable[[], str] = own_short_id
    in_container: Callable[[], bool] = is_in_container
    addresses: Callable[[], frozenset[str]] = own_addresses


class OwnNetworksWatcher:
    """Refreshes the own networks on request.

    `engine` returns the Engine to ask, or None while there is none. `on_change` is called by the thread if
    readers have seen an older answer or an error.
    """

    def __init__(
        self,
        engine: Callable[[], Engine | None],
        *,
        place: OwnPlace,
        on_change: Callable[[], None],
        log: logging.Logger,
        debounce: float,
    ) -> None:
        self._engine = engine
        self._place = place
        self._own_id = place.container_id()
        self._info: tuple[Engine, Document] | None = None
        self._on_change = on_change
        self._log = log
        self._networks: OwnNetworks | None = None
        self._error: EngineError | None = None  # of the last request, while no answer is known
        self._last_error = ""  # that was logged
        self._has_failed = False
        self._answered = threading.Event()  # there is an answer, or an error instead of one
        self._retry = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        self._thread = InspectThread(
            "own networks", turn=self._refresh, failed=self._failed, debounce=debounce
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end, and end every wait for the first answer."""
        self._thread.stop()
        self._answered.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def request_refresh(self) -> None:
        if self._networks is None:
            self._answered.clear()  # an older error no longer counts
        self._thread.request()

    def matches(self, subject: Subject) -> bool:
        """Whether an event is about the ambassador's own container or its network's owner."""
        networks = self._networks
        if networks is None:
            return self._own_id in subject.ids
        return not subject.ids.isdisjoint((networks.container_id, networks.network_owner))

    def get(self) -> OwnNetworks:
        """The last answer, at once. Waits up to FIRST_ANSWER_S for the first one.

        Raises EngineError if there is none: the error of the last request, or that it takes too long.
        """
        if self._networks is None:
            self._answered.wait(FIRST_ANSWER_S)
        networks, error = self._networks, self._error
        if networks is not None:
            if not networks.host:
                return networks
            # Read anew each time: a bridge gets its address when its network is made, without an event.
            addresses = self._place.addresses()
            if not addresses:  # there is a loopback address at least
                raise EngineError("own addresses cannot be read: raise ulimit -n")
            return replace(networks, addresses=addresses)
        if error is not None:
            raise EngineError(str(error), status=error.status)
        raise EngineError("own container not inspected in time: check whether the daemon is stuck")

    def _refresh(self) -> None:
        engine = self._engine()
        if engine is None:
            return  # the reconnect requests a refresh
        networks = self._ask(engine)
        self._retry.reset()
        self._last_error, self._has_failed = "", False
        former, refused = self._networks, self._error is not None
        self._networks, self._error = networks, None
        self._answered.set()
        if networks != former:
            names = " ".join(each.network for each in networks.attachments) or "none"
            fields = {"networks": "host" if networks.host else names}
            self._log.info("own networks", extra={"fields": fields})
            self._warn(networks)
            if former is not None or refused:  # else all readers still wait for this answer
                self._on_change()

    def _warn(self, networks: OwnNetworks) -> None:
        """Log a container that cannot be found: only what the host reaches can be relayed to."""
        if networks.unknown:
            text = "the Engine does not know this container: use -sock of the Engine that runs it"
        elif not networks.container_id and self._place.in_container():
            text = "mount nothing over /etc/hostname, and set no --hostname"
        else:
            return
        self._log.warning("own container not found", extra={"fields": {"error": text}})

    def _ask(self, engine: Engine) -> OwnNetworks:
        document = self._own_document(engine)
        if document is None:
            networks = OwnNetworks(unknown=self._own_id is not None)
        else:
            owners = owners_of(document, engine.inspect_container)
            networks = own_networks_of(document, owners[-1] if owners else None)
        if not networks.host:
            return networks
        info = self._engine_info(engine)
        # A container on the host network of a rootless Docker is in the namespace of its bridges.
        inside = document is not None and not is_podman(info)
        return replace(networks, rootless=is_rootless(info) and not inside)

    def _own_document(self, engine: Engine) -> Document | None:
        """The ambassador's own container; None if it is in none that the Engine knows."""
        try:
            if self._own_id is not None:
                return engine.inspect_container(self._own_id)
            short = self._place.short_id()
            if not short:
                return None
            document = engine.inspect_container(short)
        except NoSuchContainer:
            return None
        # A hostname can be anything, so one of the addresses must agree.
        theirs = {each.address for each in attachments(document)} - {""}
        if is_target(document, short) and theirs & self._place.addresses():
            self._own_id = container_id(document)
            return document
        return None

    def _engine_info(self, engine: Engine) -> Document:
        if self._info is not None and self._info[0] is engine:
            return self._info[1]
        try:
            info = engine.info()
        except EngineError as error:
            fields = {"error": str(error)}
            self._log.debug("no info, assuming a rootful Engine", extra={"fields": fields})
            if error.status is None or error.status >= 500:
                return {}  # no answer: ask again at the next refresh
            info = {}
        self._info = engine, info
        return info

    def _failed(self, error: EngineError) -> float:
        if self._networks is None:
            self._error = error
        elif error.status is None and not self._has_failed:
            self._has_failed = True  # the daemon may just stop, which another thread logs
        elif str(error) != self._last_error and self._engine() is not None:
            self._last_error = str(error)
            fields = {"error": self._last_error}
            self._log.warning("own networks not refreshed, keeping them", extra={"fields": fields})
        self._answered.set()
        return self._retry.next()
