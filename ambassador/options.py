"""The option table: each option is declared once, as a field of one of three frozen classes.

The field's name gives the flag `-idle-timeout`, the label `ambassador.idle-timeout` and the variable
`AMBASSADOR_IDLE_TIMEOUT`. Its kind gives unit, parser, printer and error text. All readers of options use
`rows`: the command line, the help and docs/reference.md, the control records, and the tests. No other module
states a default, a bound or a unit.

Invariants:

- A default is inside its own bounds, or it is a value that no text can say, and `shown` says what it means.
- A wire number belongs to one row for ever; `_options.pxd` has the same numbers (a test compares).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, TypeVar

from ambassador.values import (
    BOOL,
    BYTES,
    COUNT,
    DURATION,
    LEVEL,
    TEXT,
    WORKERS,
    Kind,
    Protocol,
    choice,
    quote,
)

T = TypeVar("T", bound="ProgramOptions | TargetOptions | ListenerOptions")

HOURS_1000 = 1000 * 3_600_000
"""In milliseconds. A longer wait is a mistake."""

TCP = frozenset({Protocol.TCP})
UDP = frozenset({Protocol.UDP})


class Sandbox(enum.StrEnum):
    """Whether workers drop what they do not need, and what a missing step means."""

    AUTO = "auto"  # as much as can be had; one warning if a step is missing
    REQUIRED = "required"
    OFF = "off"


class Change(enum.Enum):
    """What it takes to change an option of a live target."""

    LIVE = "an update"
    REPLACE = "a new worker"  # on the same socket; the old one drains


@dataclass(frozen=True, slots=True)
class Row:
    """One option of the table."""

    name: str
    kind: Kind[Any]
    default: Any
    doc: str
    shown: str  # the default as people read it
    metavar: str  # the value in the help, "" if none is needed
    low: int | None = None  # both bounds are included
    high: int | None = None
    wire: int = 0  # the number in an Update record, 0 if workers do not get it
    protocols: frozenset[Protocol] = TCP | UDP
    change: Change = Change.LIVE
    label: bool = False  # a container's label may set it
    flag: bool = True  # False: only tests change it
    relay: bool = True  # False: of use with Docker only
    repeatable: bool = False

    @property
    def key(self) -> str:
        """The name in flags and labels: `idle-timeout`."""
        return self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable: `AMBASSADOR_IDLE_TIMEOUT`; "" if there is none."""
        return f"AMBASSADOR_{self.name.upper()}" if self.flag else ""

    @property
    def label_key(self) -> str:
        """The container's label: `ambassador.idle-timeout`; "" if there is none."""
        return f"ambassador.{self.key}" if self.label else ""

    def parse(self, text: str) -> Any:
        """The value of one text. Raises ValueError, which says what to write."""
        return self.kind.parse(text, self.low, self.high)

    def show(self, value: Any) -> str:
        """`value` as `parse` reads it."""
        return self.kind.show(value)

    def value(self, values: list[Any]) -> Any:
        """The field's value if `values` were given in this order: the last, or all if repeatable."""
        return tuple(dict.fromkeys(values)) if self.repeatable else values[-1]


def option(kind: Kind[Any], default: Any, doc: str, **more: Any) -> Any:
    """A field of an option class; `more` is what Row has besides. `rows` makes a Row of it."""
    row = {"shown": kind.show(default), "metavar": kind.metavar, **more}
    return field(default=default, metadata={"kind": kind, "default": default, "doc": doc, **row})


# A row takes two or three lines, not ten.
# fmt: off


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """How the program itself runs."""

    name: tuple[str, ...] = option(
        TEXT, (), "name or ID of a container to follow; repeatable",
        relay=False, repeatable=True, shown="", metavar="NAME")
    sock: str = option(
        TEXT, "/var/run/docker.sock", "path or URL of the Docker Engine", relay=False, metavar="ADDRESS")
    wait: bool = option(
        BOOL, True, "deprecated: an absent container is always waited for", relay=False, shown="")
    tls: bool = option(BOOL, False, "use TLS for a tcp:// Engine", relay=False, shown="")
    tlsverify: bool = option(BOOL, False, "use TLS and verify the Engine", relay=False, shown="")
    tlscert: str = option(
        TEXT, "", "this client's certificate", relay=False, shown="cert.pem", metavar="FILE")
    tlskey: str = option(TEXT, "", "this client's key", relay=False, shown="key.pem", metavar="FILE")
    tlscacert: str = option(
        TEXT, "", "authority that vouches for it", relay=False, shown="ca.pem", metavar="FILE")
    sandbox: Sandbox = option(
        choice(Sandbox), Sandbox.AUTO, "what workers give up: auto, required or off")
    log_level: str = option(LEVEL, "info", "debug, info, warn, error, fatal or panic")
    version: bool = option(BOOL, False, "print the version", shown="")


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """How one target is found and reached."""

    network: str = option(
        TEXT, "", "network to reach the container over",
        relay=False, label=True, shown="", metavar="NAME")


@dataclass(frozen=True, slots=True)
class ListenerOptions:
    """What one listener does. Durations are milliseconds."""

    hold: int = option(
        DURATION, 10_000, "how long new connections wait for a backend",
        low=0, high=HOURS_1000, wire=1, label=True)
    drain: int = option(
        DURATION, 300, "how long SIGTERM lets open connections finish",
        low=0, high=HOURS_1000, label=True)
    workers: int = option(
        WORKERS, 1, "processes for each port, or auto: one to a core",
        low=1, high=64, change=Change.REPLACE)
    max_connections: int = option(
        COUNT, 0, "TCP connections or UDP sessions per port",
        low=1, high=10_000_000, wire=2, label=True, shown="by ulimit -n")
    idle_timeout: int = option(
        DURATION, 0, "reset TCP connections after such a silence",
        low=0, high=HOURS_1000, wire=3, protocols=TCP, label=True, shown="0, never")
    half_close_timeout: int = option(
        DURATION, 0, "reset TCP connections half-closed for so long",
        low=0, high=HOURS_1000, wire=4, protocols=TCP, label=True, shown="0, never")
    udp_timeout: int = option(
        DURATION, 90_000, "forget a UDP client after such a silence",
        low=1, high=HOURS_1000, wire=5, protocols=UDP, label=True)
    max_sessions: int = option(
        COUNT, 16_384, "UDP sessions of one worker",
        low=1, high=10_000_000, wire=6, protocols=UDP, flag=False)
    connect_timeout: int = option(
        DURATION, 5_000, "how long an attempt to connect may take",
        low=1, high=HOURS_1000, wire=7, protocols=TCP, flag=False)
    max_held: int = option(
        COUNT, 4_096, "connections that one worker holds",
        low=0, high=10_000_000, wire=8, protocols=TCP, flag=False)
    pipe_bytes: int = option(
        BYTES, 1 << 20, "size of a pipe to splice through; 0 always copies",
        low=0, high=1 << 30, wire=9, protocols=TCP, flag=False)
    gso: bool = option(
        BOOL, True, "send runs of equal datagrams as one message", wire=10, protocols=UDP, flag=False)


# fmt: on

OPTION_CLASSES = (ListenerOptions, TargetOptions, ProgramOptions)


@cache
def _rows(cls: Any) -> tuple[Row, ...]:
    return tuple(Row(name=each.name, **each.metadata) for each in fields(cls))


def rows(cls: type) -> tuple[Row, ...]:
    """The rows of one option class, in the order of its fields."""
    return _rows(cls)


def all_rows() -> tuple[Row, ...]:
    """All rows of the table."""
    return tuple(row for cls in OPTION_CLASSES for row in rows(cls))


def read(start: T, texts: Mapping[str, str], key: Callable[[Row], str], source: str = "") -> T:
    """`start`, changed by those of `texts` whose key is a row's `key`; a row without a key is skipped.

    An empty text is a variable that was not set, and is skipped. A repeatable row takes several values with
    commas or spaces between. Raises ValueError, one line: `invalid value "x" for SOURCEKEY: write ...`.
    """
    changes = {}
    for row in rows(type(start)):
        text = texts.get(key(row), "") if key(row) else ""
        if not text:
            continue
        try:
            words = re.findall(r"[^,\s]+", text) if row.repeatable else [text]
            changes[row.name] = row.value([row.parse(word) for word in words])
        except ValueError as error:
            where = f"{source}{key(row)}"
            raise ValueError(f"invalid value {quote(text)} for {where}: {error}") from None
    return replace(start, **changes)


def read_variables(start: T, environment: Mapping[str, str], names: Collection[str]) -> T:
    """`start`, changed by the `AMBASSADOR_*` variables of the rows named in `names`."""
    return read(start, environment, lambda row: row.variable if row.name in names else "")


def read_labels(start: T, labels: Mapping[str, str]) -> T:
    """`start`, changed by a container's `ambassador.*` labels. Only rows with a label can be set."""
    return read(start, labels, lambda row: row.label_key, "label ")
