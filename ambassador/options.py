"""The option table: each option is declared once, as a field of one of three frozen classes.

The field's name gives the flag `-idle-timeout`, the label `ambassador.idle-timeout`, the variable
`AMBASSADOR_IDLE_TIMEOUT` and the file key `idle-timeout`. Its kind gives unit, parser, printer and error
text. Whoever needs options reads `rows`: the command line, the help and docs/reference.md, control records,
and the tests. No other module states a default, a bound or a unit.

Invariants:

- A default is inside its own bounds.
- A wire number belongs to one row for ever; `_options.pxd` has the same numbers (a test compares).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from ambassador import values
from ambassador.values import Kind, Protocol

HOURS_1000 = 1000 * 3_600_000
"""In milliseconds. Longer waits are taken for a mistake."""

TCP = frozenset({Protocol.TCP})
UDP = frozenset({Protocol.UDP})
BOTH = TCP | UDP


class Sandbox(enum.StrEnum):
    """Whether workers drop what they do not need, and what a missing step means."""

    AUTO = "auto"  # as much as can be had; one warning if a step is missing
    REQUIRED = "required"
    OFF = "off"


class Change(enum.Enum):
    """What a new value of a live target's option takes."""

    LIVE = enum.auto()  # an Update record
    REPLACE = enum.auto()  # a new worker on the same socket; the old one drains


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says of one option.

    `low` and `high` bound the value, both included; `wire` is its number in an Update record, 0 if the
    worker need not know it. `label` says that a container's label may set it. `flag` is False for limits
    that only tests change. `shown` is the default as people read it; `metavar` names the value in the help.
    """

    name: str
    kind: Kind[Any]
    default: Any
    low: int | None
    high: int | None
    wire: int
    protocols: frozenset[Protocol]
    change: Change
    label: bool
    flag: bool
    repeatable: bool
    shown: str
    metavar: str
    doc: str

    @property
    def key(self) -> str:
        """The name as flag, label and file key have it: `idle-timeout`."""
        return self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable: `AMBASSADOR_IDLE_TIMEOUT`."""
        return f"AMBASSADOR_{self.name.upper()}"

    def parse(self, text: str) -> Any:
        """The value that `text` says. Raises ValueError, which says what to write."""
        return self.kind.parse(text, self.low, self.high)

    def show(self, value: Any) -> str:
        """`value` as `parse` reads it."""
        return self.kind.show(value)


def option(
    kind: Kind[Any],
    default: Any,
    *,
    doc: str,
    low: int | None = None,
    high: int | None = None,
    wire: int = 0,
    protocols: frozenset[Protocol] = BOTH,
    change: Change = Change.LIVE,
    label: bool = False,
    flag: bool = True,
    repeatable: bool = False,
    shown: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A field of an option class; `rows` has what is said here."""
    said = {
        "kind": kind, "default": default, "low": low, "high": high, "wire": wire, "protocols": protocols,
        "change": change, "label": label, "flag": flag, "repeatable": repeatable,
        "shown": kind.show(default) if shown is None else shown,
        "metavar": kind.metavar if metavar is None else metavar, "doc": doc,
    }  # fmt: skip
    return field(default=default, metadata=said)


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """How the program itself runs."""

    name: tuple[str, ...] = option(
        values.TEXT, (), repeatable=True, shown="", metavar="NAME",
        doc="name or ID of a container to follow; repeatable",
    )  # fmt: skip
    sock: str = option(
        values.TEXT, "/var/run/docker.sock", metavar="ADDRESS",
        doc="path or URL of the Docker Engine",
    )  # fmt: skip
    wait: bool = option(
        values.BOOL, True, shown="", doc="deprecated: an absent container is always waited for"
    )
    tls: bool = option(values.BOOL, False, shown="", doc="use TLS for a tcp:// Engine")
    tlsverify: bool = option(values.BOOL, False, shown="", doc="use TLS and verify the Engine")
    tlscert: str = option(
        values.TEXT, "", shown="cert.pem", metavar="FILE", doc="this client's certificate"
    )
    tlskey: str = option(values.TEXT, "", shown="key.pem", metavar="FILE", doc="this client's key")
    tlscacert: str = option(
        values.TEXT, "", shown="ca.pem", metavar="FILE", doc="authority that vouches for it"
    )
    sandbox: Sandbox = option(
        values.choice(Sandbox), Sandbox.AUTO, metavar="MODE",
        doc="what workers give up: auto, required or off",
    )  # fmt: skip
    log_level: str = option(values.LEVEL, "info", doc="debug, info, warn, error, fatal or panic")
    version: bool = option(values.BOOL, False, shown="", doc="print the version")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """How one target is found and reached."""

    network: str = option(
        values.TEXT, "", label=True, shown="", metavar="NAME",
        doc="network to reach the container over",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ListenerOptions:
    """What one listener does. Durations are milliseconds."""

    hold: int = option(
        values.DURATION, 10_000, low=0, high=HOURS_1000, wire=1, label=True,
        doc="how long new connections wait for a backend",
    )  # fmt: skip
    drain: int = option(
        values.DURATION, 300, low=0, high=HOURS_1000, label=True,
        doc="how long SIGTERM lets open connections finish",
    )  # fmt: skip
    workers: int = option(
        values.WORKERS, 1, low=1, high=64, change=Change.REPLACE, metavar="N",
        doc="processes for each port, or auto: one to a core",
    )  # fmt: skip
    max_connections: int = option(
        values.COUNT, 0, low=1, high=10_000_000, wire=2, label=True, shown="by ulimit -n", metavar="N",
        doc="TCP connections or UDP sessions per port",
    )  # fmt: skip
    idle_timeout: int = option(
        values.DURATION, 0, low=0, high=HOURS_1000, wire=3, protocols=TCP, label=True, shown="0, never",
        doc="reset TCP connections after such a silence",
    )  # fmt: skip
    half_close_timeout: int = option(
        values.DURATION, 0, low=0, high=HOURS_1000, wire=4, protocols=TCP, label=True, shown="0, never",
        doc="reset TCP connections half-closed for so long",
    )  # fmt: skip
    udp_timeout: int = option(
        values.DURATION, 90_000, low=1, high=HOURS_1000, wire=5, protocols=UDP, label=True,
        doc="forget a UDP client after such a silence",
    )  # fmt: skip
    max_sessions: int = option(
        values.COUNT, 16_384, low=1, high=10_000_000, wire=6, protocols=UDP, flag=False,
        doc="UDP sessions of one worker",
    )  # fmt: skip
    connect_timeout: int = option(
        values.DURATION, 5_000, low=1, high=HOURS_1000, wire=7, protocols=TCP, flag=False,
        doc="give up an attempt to connect after so long",
    )  # fmt: skip
    max_held: int = option(
        values.COUNT, 4_096, low=0, high=10_000_000, wire=8, protocols=TCP, flag=False,
        doc="connections that one worker holds",
    )  # fmt: skip
    pipe_bytes: int = option(
        values.BYTES, 1 << 20, low=0, high=1 << 30, wire=9, protocols=TCP, flag=False,
        doc="size of a pipe to splice through; 0 always copies",
    )  # fmt: skip
    gso: bool = option(
        values.BOOL, True, wire=10, protocols=UDP, flag=False,
        doc="send runs of equal datagrams as one message",
    )  # fmt: skip


OPTION_CLASSES: tuple[type, ...] = (ListenerOptions, TargetOptions, ProgramOptions)


@cache
def rows(cls: type) -> tuple[Row, ...]:
    """The rows of one option class, in the order of its fields."""
    return tuple(Row(name=each.name, **each.metadata) for each in fields(cls))


def all_rows() -> Iterator[Row]:
    """Every row of the table."""
    for cls in OPTION_CLASSES:
        yield from rows(cls)
