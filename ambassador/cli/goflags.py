"""Command-line flags as Go's `flag` package reads them, so that a command line written for the Go
original keeps its meaning to the letter.

Invariants:

- Pure: nothing is read but the arguments, nothing is printed, and the program never ends here.
- The rules are Go's: one or two dashes; `-x v` or `-x=v`; a boolean is `-x` or `-x=false`, never
  `-x false`; no abbreviations and no bundles; the last one wins; the first argument that is no flag
  (`-` alone is none) ends the flags, and so does `--`, which is itself dropped.
- Every error is one line in Go's words, followed by what to do; user text in it is escaped.
- Digits are ASCII. `int()` would take any script's, which nobody can tell apart in a log.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

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
MAX_NANOSECONDS = (1 << 63) - 1
"""A Go duration is a signed 64-bit count of nanoseconds: about 292 years."""

MAX_DIGITS = 19
"""Of a number that still fits 63 bits. A longer one is refused before int() spends time on it."""


class FlagError(ValueError):
    """The command line is wrong; the text is one line that says what to do."""


class HelpRequested(Exception):
    """`-h` or `-help` was met before any error."""


@dataclass(frozen=True)
class Flag(Generic[T]):
    """One row of a program's table of flags.

    `parse` turns the text into the value or raises ValueError with what to do. `kind` is the word
    for the value in the usage text; empty for a boolean, the only kind that needs no value.
    `shown` is the default as a person would write it; empty where there is none worth saying.
    """

    name: str
    parse: Callable[[str], T]
    default: T
    kind: str
    meaning: str
    shown: str = ""

    @property
    def is_boolean(self) -> bool:
        return not self.kind


@dataclass(frozen=True)
class Parsed:
    """What a command line said: each flag's values in the order given, and the other arguments."""

    values: Mapping[str, tuple[Any, ...]]
    rest: tuple[str, ...]

    def given(self, flag: Flag[Any]) -> bool:
        return flag.name in self.values

    def get(self, flag: Flag[T]) -> T:
        """The last value given, or the default."""
        if flag.name not in self.values:
            return flag.default
        last: T = self.values[flag.name][-1]
        return last

    def all(self, flag: Flag[T]) -> tuple[T, ...]:
        """Every value of a repeatable flag, in order; none where it was not given."""
        return self.values.get(flag.name, ())


def parse(flags: Sequence[Flag[Any]], arguments: Sequence[str]) -> Parsed:
    """Read the flags at the start of `arguments`. Raises FlagError or HelpRequested."""
    known = {flag.name: flag for flag in flags}
    values: dict[str, tuple[Any, ...]] = {}
    left = list(arguments)
    while left and len(left[0]) >= 2 and left[0][0] == "-":
        argument = left.pop(0)
        if argument == "--":
            break
        name, has_value, value = _split(argument)
        flag = known.get(name)
        if flag is None:
            if name in ("h", "help"):
                raise HelpRequested
            raise FlagError(f"flag provided but not defined: -{escape(name)}")
        if not has_value:
            if flag.is_boolean:
                value = "true"
            elif left:
                value = left.pop(0)
            else:
                raise FlagError(f"flag needs an argument: -{name}")
        try:
            values[name] = (*values.get(name, ()), flag.parse(value))
        except ValueError as error:
            what = "boolean value" if flag.is_boolean else "value"
            where = f"-{name}" if flag.is_boolean else f"flag -{name}"
            raise FlagError(f"invalid {what} {quote(value)} for {where}: {error}") from None
    return Parsed(values, tuple(left))


def _split(argument: str) -> tuple[str, bool, str]:
    """`--name=value` as (name, True, value); without `=` as (name, False, "")."""
    body = argument[2:] if argument.startswith("--") else argument[1:]
    if body[0] in "-=":
        raise FlagError(f"bad flag syntax: {escape(argument)}")
    name, equals, value = body.partition("=")
    return name, bool(equals), value


def usage(flags: Sequence[Flag[Any]]) -> str:
    """The table of flags for a person: name, kind of value, meaning, default; one line each."""
    heads = {flag.name: f"-{flag.name} {flag.kind}".rstrip() for flag in flags}
    width = max(map(len, heads.values()), default=0)
    return "".join(
        f"  {heads[flag.name]:<{width}}  {flag.meaning}"
        + (f" (default {flag.shown})" if flag.shown else "")
        + "\n"
        for flag in sorted(flags, key=lambda flag: flag.name)
    )


# --- kinds of value ----------------------------------------------------------------------------

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


# --- user text in an error line ----------------------------------------------------------------


def escape(text: str) -> str:
    """`text` with all that could break or disguise a line spelt out: controls, bidi, surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(text: str) -> str:
    """`text` in double quotes, escaped, as Go's %q writes it."""
    return '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'
