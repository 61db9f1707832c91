"""The nouns of the program, as plain immutable values.

Invariants:

- A value here never changes and owns nothing: no descriptor, no process, no connection to Docker.
- A `Backend` always has an address that a worker can be told: an IP literal, its zone a number. An empty
  address, which Docker reports for a container that is not (yet) on a network, cannot be represented, so it
  is never dialled.
- Two backends are equal only if they are the same container *run*: `container` and `run` are part of the
  value, so a restart that keeps its address is still a different backend.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ambassador.options import ListenerOptions
from ambassador.values import Protocol


@dataclass(frozen=True, slots=True, order=True)
class ListenAddress:
    """What a listener takes: a protocol, a range of ports and an address. The key of everything.

    `last_port` 0 stands for `first_port`. `address` "" is every address of both families, else an IP literal.
    Written `6379/tcp`, `30000-30010/udp`, `127.0.0.1:5432/tcp`. Raises ValueError if no socket can have it.
    """

    protocol: Protocol
    first_port: int
    last_port: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        if not self.last_port:
            object.__setattr__(self, "last_port", self.first_port)
        for port in (self.first_port, self.last_port):
            if not 1 <= port <= 65535:
                raise ValueError(f"port {port} is not between 1 and 65535")
        if self.last_port < self.first_port:
            raise ValueError(f"ports {self.first_port}-{self.last_port} run backwards")
        if self.address:
            ipaddress.ip_address(self.address)

    @property
    def ports(self) -> str:
        """`6379`, or `30000-30010`."""
        if self.first_port == self.last_port:
            return str(self.first_port)
        return f"{self.first_port}-{self.last_port}"

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.ports}/{self.protocol}" if host else f"{self.ports}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Backend:
    """One address behind a listener, bound to one run of one container.

    `port` answers `first_port` of the listener; a range keeps the distance. `container` and `run` (Docker's
    `State.StartedAt`, compared as text) are empty for a fixed address. A backend of `weight` 0 keeps what is
    open and gets nothing new. Raises ValueError if `address` is no IP literal or a number is out of range.
    """

    address: str
    port: int
    container: str = ""
    run: str = ""
    weight: int = 1

    def __post_init__(self) -> None:
        zone = getattr(ipaddress.ip_address(self.address), "scope_id", None)
        if zone is not None and not (zone.isascii() and zone.isdigit() and int(zone) < 2**32):
            raise ValueError(
                f"zone {zone[:32]!r} of {self.address[:64]!r} is no interface's number"
            )
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 1 and 65535")
        if not 0 <= self.weight <= 65535:
            raise ValueError(f"weight {self.weight} is not between 0 and 65535")

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Whether clients of a network may connect. Carried to workers, which do not obey it yet.

    Raises ValueError if `network` is not an IP network in its shortest form, such as 10.0.0.0/8.
    """

    network: str
    allow: bool

    def __post_init__(self) -> None:
        ipaddress.ip_network(self.network)


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """What one listener should do: relay to these backends, or hold if there are none."""

    listen: ListenAddress
    target: str  # for people: logs, titles, metrics
    origin: str = ""  # who asked: "-name", "relay", later "label of web"
    backends: tuple[Backend, ...] = ()
    options: ListenerOptions = field(default_factory=ListenerOptions)
    access: tuple[AccessRule, ...] = ()  # most specific first


@dataclass(frozen=True, slots=True)
class Replica:
    """One running container of a target, and where it is reached.

    `run` is Docker's `State.StartedAt`. `weight` 0 keeps what is open and gets nothing new.
    """

    container: str
    run: str
    address: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class TargetState:
    """What Docker says of one target at one moment.

    `ports` says which listeners the target wants, and the target port behind the first port of each. They
    outlive the container: the ports of the last run stay while the target is gone, so its listeners stay too.
    `replicas` is empty while the target cannot be relayed to: absent, stopped, restarting, or on no network
    that the ambassador shares. `problem` is one line for the log, which says what to do; "" if there is none.
    """

    target: str
    ports: Mapping[ListenAddress, int] = field(default_factory=lambda: MappingProxyType({}))
    replicas: tuple[Replica, ...] = ()
    options: ListenerOptions | None = None  # None: those of the command line
    access: tuple[AccessRule, ...] = ()
    problem: str = ""
    origin: str = "-name"  # who asked for it
    container: str = ""  # the full ID; that of the last one while there is none


@dataclass(frozen=True, slots=True)
class DesiredState:
    """The whole of what should run, and what stands in the way of the rest (a line each)."""

    listeners: Mapping[ListenAddress, ListenerSpec] = field(
        default_factory=lambda: MappingProxyType({})
    )
    problems: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()  # all that are followed, those without a port too; () if none is
