"""The nouns of the program, as plain immutable values.

Invariants:

- A value here never changes and owns nothing: no descriptor, no process, no connection to Docker.
- A `Backend` always has an address that parses as an IP literal. An empty address, which Docker
  reports for a container that is not (yet) on a network, cannot be represented, so it is never dialled.
- Two backends are equal only if they are the same container *run*: `container_id` and `started_at`
  are part of the value, so a restart that keeps its address is still a different backend.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


class Protocol(enum.StrEnum):
    """A transport protocol that can be relayed."""

    TCP = "tcp"
    UDP = "udp"


class Sandbox(enum.StrEnum):
    """Whether workers give up what they do not need, and what it means when they cannot."""

    AUTO = "auto"  # as much as can be had; one warning where something is lacking
    REQUIRED = "required"
    OFF = "off"


class ProcessState(enum.Enum):
    """What a process is doing, as far as it matters to who waits for it."""

    RUNNING = enum.auto()  # or would, if there were a processor or a disk for it
    WAITING = enum.auto()  # for something; or it is stopped
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """One accepting socket: a port (1 to 65535) and a protocol. Written `6379/tcp`."""

    port: int
    protocol: Protocol

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 1 and 65535")

    def __str__(self) -> str:
        return f"{self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Backend:
    """One address behind a listener, bound to one run of one container.

    `container_id` and `started_at` (Docker's `State.StartedAt`, compared as text) are empty for a
    fixed address. Raises ValueError where `address` is not an IP literal or the port is out of range.
    """

    address: str
    port: int
    container_id: str = ""
    started_at: str = ""

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.address)
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 1 and 65535")

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Route:
    """What one listener should do: relay to these backends, or hold where there are none."""

    listener: Listener
    target: str
    backends: tuple[Backend, ...] = ()


@dataclass(frozen=True, slots=True)
class TargetState:
    """What Docker says of one target at one moment.

    `address` is None while the target cannot be relayed to: absent, stopped, restarting, or on no
    network that the ambassador shares. `exposed` outlives the container: the ports of the last run
    stay while the target is gone, so that its listeners stay too. `problem` is one line for the
    log, which says what to do; empty where there is nothing to say.
    """

    target: str
    exposed: frozenset[Listener] = frozenset()
    address: str | None = None
    container_id: str = ""
    started_at: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class DesiredState:
    """The whole of what should run, and where targets are in each other's way (a line each)."""

    routes: Mapping[Listener, Route] = field(default_factory=lambda: MappingProxyType({}))
    problems: tuple[str, ...] = ()
