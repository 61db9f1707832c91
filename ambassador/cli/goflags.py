"""Flags as Go's `flag` package reads them: a command line of the Go original keeps its meaning.

Invariants:

- Pure: nothing is read but the arguments, nothing is printed, and the program never ends here.
- The rules are Go's: one or two dashes; `-x v` or `-x=v`; a boolean is `-x` or `-x=false`, never
  `-x false`; no abbreviations and no bundles; the last one wins; the first argument that is no flag
  (`-` alone is none) ends the flags, and so does `--`, which is itself dropped.
- Every error is one line in Go's words, followed by what to do; user text in it is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ambassador.options import Row
from ambassador.values import escape, quote


class HelpRequested(Exception):
    """`-h` or `-help` was met before any error."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """The value of each flag that was given, by the option's name, and the other arguments."""

    values: Mapping[str, Any]
    rest: tuple[str, ...]


def parse(rows: Iterable[Row], arguments: Sequence[str]) -> Parsed:
    """Read the flags at the start of `arguments`. Raises ValueError or HelpRequested."""
    flags = {row.key: row for row in rows if row.flag}
    given: dict[str, list[Any]] = {}
    left = list(arguments)
    while left and len(left[0]) >= 2 and left[0][0] == "-":
        argument = left.pop(0)
        if argument == "--":
            break
        key, has_value, text = _split(argument)
        row = flags.get(key)
        if row is None:
            if key in ("h", "help"):
                raise HelpRequested
            raise ValueError(f"flag provided but not defined: -{escape(key)}")
        is_boolean = not row.metavar
        if not has_value:
            if is_boolean:
                text = "true"
            elif left:
                text = left.pop(0)
            else:
                raise ValueError(f"flag needs an argument: -{key}")
        try:
            given.setdefault(key, []).append(row.parse(text))
        except ValueError as error:
            what, flag = ("boolean value", "") if is_boolean else ("value", "flag ")
            raise ValueError(f"invalid {what} {quote(text)} for {flag}-{key}: {error}") from None
    values = {flags[key].name: flags[key].value(each) for key, each in given.items()}
    return Parsed(values, tuple(left))


def _split(argument: str) -> tuple[str, bool, str]:
    """`--key=value` as (key, True, value); without `=` as (key, False, "")."""
    body = argument[2:] if argument.startswith("--") else argument[1:]
    if body[0] in "-=":
        raise ValueError(f"bad flag syntax: {escape(argument)}")
    key, equals, value = body.partition("=")
    return key, bool(equals), value
