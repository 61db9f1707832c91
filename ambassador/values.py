"""Text to values and back: the kinds of an option's value, addresses and ports, and text in an error line.

Invariants:

- A parser raises ValueError with one clause that says what to write; it never guesses.
- `parse(show(value))` is `value`, for each kind.
"""

from __future__ import annotations

import enum
import ipaddress
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Protocol(enum.StrEnum):
    """A transport protocol that can be relayed."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A kind of option value. `parse` takes the text and both bounds (None: none); raises ValueError."""

    metavar: str
    parse: Callable[[str, int | None, int | None], T]
    show: Callable[[T], str]


MAX_NANOSECONDS = (1 << 63) - 1
"""A Go duration is a signed 64-bit count of nanoseconds: about 292 years."""

MAX_DIGITS = 19
"""Of a number that fits 63 bits. A longer one is cut before int() spends time on it."""

NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,  # micro sign
    "\u03bcs": 1_000,  # Greek letter mu
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}

_BOOLEANS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "FALSE", "false", "False"), False
)


def parse_bool(text: str) -> bool:
    """Go's strconv.ParseBool."""
    if text not in _BOOLEANS:
        raise ValueError("write true or false")
    return _BOOLEANS[text]


def parse_text(text: str) -> str:
    """Any text but none: an empty value is a shell variable that was not set."""
    if not text:
        raise ValueError("it is empty; write a value or leave the flag out")
    return text


_TERM = re.compile(r"([0-9]*)(?:\.([0-9]*))?([^0-9.]*)")
_NOT_A_DURATION = "not a duration; write it as 10s, 500ms or 1m30s"
_TOO_LONG = "longer than a duration can be, which is 292 years"


def parse_duration(text: str) -> int:
    """Go's time.ParseDuration, in nanoseconds: `10s`, `1m30s`, `500ms`, `1.5h`, `0`."""
    left = text[1:] if text[:1] in ("+", "-") else text
    if left == "0":
        return 0
    if not left:
        raise ValueError(_NOT_A_DURATION)
    total = 0
    while left:
        term, left = _first_term(left)
        total += term
        if total > MAX_NANOSECONDS:
            raise ValueError(_TOO_LONG)
    return -total if text.startswith("-") else total


def _first_term(text: str) -> tuple[int, str]:
    """`1.5h30m` as (the nanoseconds of 1.5h, "30m")."""
    term = _TERM.match(text)
    if term is None or not (term[1] or term[2]):
        raise ValueError(_NOT_A_DURATION)
    whole = term[1].lstrip("0")
    fraction = (term[2] or "")[:MAX_DIGITS]  # the rest is less than a nanosecond, even of an hour
    if len(whole) > MAX_DIGITS:
        raise ValueError(_TOO_LONG)
    if not term[3]:
        raise ValueError("missing unit in duration; write it as 10s, 500ms or 1m30s")
    unit = NANOSECONDS.get(term[3])
    if unit is None:
        raise ValueError(f"unknown unit {quote(term[3])} in duration; write ns, us, ms, s, m or h")
    nanoseconds = int(whole or "0") * unit + int(fraction or "0") * unit // 10 ** len(fraction)
    return nanoseconds, text[term.end() :]


def escape(text: str) -> str:
    """`text` with all that could break or disguise a line spelt out: controls, bidi, surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(text: str) -> str:
    """`text` in double quotes, escaped, as Go's %q writes it."""
    return '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def split_address(text: str) -> tuple[str, str | None]:
    """`host:port`, `[v6]:port` or either without a port, as (host, port or None); not checked."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            raise ValueError("brackets are for an IPv6 address only; write [fd00::5]:53")
        return host, rest[1:] if rest else None
    if text.count(":") > 1:
        raise ValueError("an IPv6 address goes in brackets; write [fd00::5]:53")
    if "[" in text or "]" in text:
        raise ValueError("brackets go around the whole IPv6 address; write [fd00::5]:53")
    host, colon, port = text.partition(":")
    return host, port if colon else None


def _number(text: str) -> int | None:
    """A number in digits 0-9, else None: int() also takes other scripts, signs, spaces, underscores.

    A number that is too long for any bound is cut, and is still too large.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    return int(text.lstrip("0")[: MAX_DIGITS + 1] or "0")


def parse_port(text: str) -> int:
    """A port number, 1 to 65535."""
    if not text:
        raise ValueError("a port is missing; write a number from 1 to 65535")
    port = _number(text)
    if port is None:
        raise ValueError(f"port {quote(text)} is not a number; write 1 to 65535 in digits 0-9")
    if not 1 <= port <= 65535:
        raise ValueError(f"port {text[:20]} is out of range; write 1 to 65535")
    return port


def parse_ip(text: str) -> str:
    """An IP literal in its shortest form; a zone becomes the interface's number."""
    address, percent, zone = text.partition("%")
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(_not_an_ip(text)) from None
    if ip.version == 6 and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if not percent:
        return str(ip)
    if ip.version == 4:
        raise ValueError(f"an IPv4 address has no interface; write {ip}")
    return f"{ip}%{_parse_zone(zone)}"


def _not_an_ip(text: str) -> str:
    if re.fullmatch(r"[0-9.]+", text):
        return f"{text[:40]} is not a valid IPv4 address; write four numbers from 0 to 255"
    if ":" in text:
        return f"{quote(text[:60])} is not a valid IPv6 address; write one such as fd00::5"
    return (
        f"{quote(text[:60])} is not an IP address; write an IP literal such as 10.0.0.5 "
        "(-name, without relay, follows a container by its name)"
    )


def _parse_zone(zone: str) -> int:
    number = _number(zone)
    if number is not None:
        if not 1 <= number < 1 << 32:
            raise ValueError(f"interface number {zone[:20]} is out of range; write its name")
        return number
    try:
        return socket.if_nametoindex(zone)
    except (OSError, ValueError):
        raise ValueError(
            f"interface {quote(zone[:60])} does not exist here; `ip link` lists the ones that do"
        ) from None


LOG_LEVELS = {
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
    "fatal": "fatal",
    "panic": "panic",
}
"""The levels as logrus reads them, and the one name of each."""


def _duration(text: str, low: int | None, high: int | None) -> int:
    """Milliseconds, rounded up: 1us must not become 0, which often means never."""
    nanoseconds = parse_duration(text)
    if nanoseconds < 0:
        raise ValueError("it is negative; write 0 or more")
    milliseconds = -(-nanoseconds // 1_000_000)
    if low is not None and milliseconds < low:
        least = "more than 0" if low == 1 else f"{show_duration(low)} or more"
        raise ValueError(f"write {least}")
    if high is not None and milliseconds > high:
        raise ValueError(f"it is too long; write {show_duration(high)} or less")
    return milliseconds


def show_duration(milliseconds: int) -> str:
    """The shortest text with one unit: `90s`, `300ms`, `1000h`, `0`."""
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return "0"


def _count(text: str, low: int | None, high: int | None) -> int:
    least, most = low or 0, (1 << 32) - 1 if high is None else high
    number = _number(text)
    if number is None or not least <= number <= most:
        raise ValueError(f"write a number from {least} to {most}")
    return number


def _workers(text: str, low: int | None, high: int | None) -> int:
    if text == "auto":
        return min(len(os.sched_getaffinity(0)), high or 1)
    try:
        return _count(text, low, high)
    except ValueError as error:
        raise ValueError(f"{error}, or auto") from None


def _level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"write one of {', '.join(LOG_LEVELS)}")
    return LOG_LEVELS[text.lower()]


def _unbounded(parse: Callable[[str], T]) -> Callable[[str, int | None, int | None], T]:
    return lambda text, _low, _high: parse(text)


TEXT = Kind("TEXT", _unbounded(parse_text), str)
BOOL = Kind("", _unbounded(parse_bool), lambda value: "true" if value else "false")
DURATION = Kind("DURATION", _duration, show_duration)
COUNT = Kind("N", _count, str)
BYTES = Kind("BYTES", _count, str)
WORKERS = Kind("N", _workers, str)
LEVEL = Kind("LEVEL", _unbounded(_level), str)


def choice(members: type[enum.StrEnum]) -> Kind[Any]:
    """One of an enum's values."""

    def parse(text: str) -> enum.StrEnum:
        if text not in tuple(members):
            raise ValueError(f"write one of {', '.join(members)}")
        return members(text)

    return Kind("MODE", _unbounded(parse), str)
