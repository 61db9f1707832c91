"""What the listeners may hold, by the descriptors and the local ports that there are.

Invariants:

- Not all descriptors are for listeners: the log, Docker's connections and the start of a worker need some.
- The UDP workers together get a part of the local ports: the rest is for this host's other programs.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ambassador.model import DesiredState, ListenerSpec
from ambassador.options import ListenerOptions
from ambassador.reconcile import MAX_LISTENERS, REMEDY
from ambassador.values import Protocol

log = logging.getLogger(__name__)

SPARE_DESCRIPTORS = 64
"""Of a worker's limit: what is not a UDP session's socket. Of the parent's: what is not a listener's."""

MIN_SPARE_DESCRIPTORS = 16
"""What the parent needs besides, whatever its limit."""

WORKER_DESCRIPTORS = 4
"""Of the parent, for each worker: the page and its mapping, the control pipe, the pidfd."""

MIN_SESSIONS = 512
"""Of a UDP worker, however many there are: most ports are idle, so together they may promise too much."""

LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
DEFAULT_LOCAL_PORTS = (32_768, 60_999)


def port_limits(
    options: ListenerOptions, descriptors: int, sessions: int | None = None
) -> ListenerOptions:
    """`options` with the TCP connections of a port, and the UDP sessions of each of its workers, that fit.

    Connections are counted in all workers of a port together. The kernel spreads UDP clients evenly over
    workers, so each has its share of the sessions. Each worker may have so many `descriptors`, and so many
    `sessions` (None: no limit).
    """
    room = max(2, descriptors - SPARE_DESCRIPTORS)
    most = room if sessions is None else min(room, sessions)
    connections, held = options.workers * (room // 2), min(options.max_sessions, most)
    asked = options.max_connections
    if asked:
        connections = min(asked, connections)
        held = min(max(1, asked // options.workers), most)
    return replace(options, max_connections=connections, max_sessions=held)


class PortLimits:
    """By RLIMIT_NOFILE, which workers inherit, and ip_local_port_range. Logs each answer once."""

    def __init__(self, descriptors: int | None = None, local_ports: int | None = None) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._descriptors = soft if descriptors is None else descriptors
        self._local_ports = count_local_ports() if local_ports is None else local_ports
        self._sessions = self._local_ports * 3 // 4
        self._logged: set[tuple[int, int]] = set()

    def resolve(self, options: ListenerOptions) -> ListenerOptions:
        """The options as a worker gets them."""
        limited = port_limits(options, self._descriptors, self._sessions)
        asked = (options.max_connections, options.workers)
        if asked not in self._logged:
            self._logged.add(asked)
            self._log(options, limited)
        return limited

    def max_listeners(self, desired: DesiredState) -> tuple[int, str]:
        """How many listeners fit, at least 1, and what to do if that is too few."""
        spare = MIN_SPARE_DESCRIPTORS + min(len(desired.targets), SPARE_DESCRIPTORS)
        spare += min(self._descriptors // 8, SPARE_DESCRIPTORS - MIN_SPARE_DESCRIPTORS)
        each = max(map(_descriptors, desired.listeners.values()), default=1)
        fit = max((self._descriptors - spare) // each, 1)
        if fit < MAX_LISTENERS:
            return fit, f"too few descriptors, raise ulimit -n (it is {self._descriptors})"
        return MAX_LISTENERS, REMEDY

    def share_local_ports(self, specs: Iterable[ListenerSpec]) -> bool:
        """Share the local ports out among the UDP workers of these. True if a worker's share changes.

        The share is halved when their number doubles, so that not every listener changes all others.
        """
        workers = sum(s.options.workers for s in specs if s.listen.protocol is Protocol.UDP)
        shares = 1 << max(workers - 1, 0).bit_length()
        former, self._sessions = self._sessions, self._local_ports * 3 // 4 // shares
        self._sessions = max(self._sessions, min(MIN_SESSIONS, self._local_ports // 4), 1)
        return self._sessions != former

    def _log(self, options: ListenerOptions, limited: ListenerOptions) -> None:
        holds = {
            "connections": limited.max_connections,
            "sessions": limited.max_sessions * options.workers,
        }
        if limited.max_connections < options.max_connections:
            fields = {"asked": options.max_connections, "connections": limited.max_connections}
            message = "too few descriptors for -max-connections, raise ulimit -n"
            log.warning(message, extra={"fields": fields})
        log.info("each port can hold", extra={"fields": holds})


def _descriptors(spec: ListenerSpec) -> int:
    """Of the parent, for one listener."""
    workers = spec.options.workers
    sockets = 1 if spec.listen.protocol is Protocol.TCP else workers
    return sockets + workers * WORKER_DESCRIPTORS


def count_local_ports() -> int:
    """How many local ports the kernel gives out (ip(7)): each UDP session takes one."""
    try:
        first, last = map(int, LOCAL_PORTS.read_text().split())
    except (OSError, ValueError):
        first, last = DEFAULT_LOCAL_PORTS
    return max(last - first + 1, 1)
