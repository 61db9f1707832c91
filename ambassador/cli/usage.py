"""The help, and docs/reference.md, printed from the tables of options and counters.

`make reference` writes docs/reference.md; a test compares it, and the README's flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ambassador import options
from ambassador.counters import COUNTERS
from ambassador.options import Row, rows

_HELP = "-help", "print this text"


def flag_lines(flags: Iterable[Row]) -> str:
    """The flags, one line each: name, value, meaning, default; sorted by name."""
    lines = dict((_HELP,))
    for row in flags:
        if row.flag:
            default = f" (default {row.shown})" if row.shown else ""
            lines[f"-{row.key} {row.metavar}".rstrip()] = row.doc + default
    width = max(map(len, lines))
    ordered = sorted(lines.items(), key=lambda line: line[0].split())
    return "".join(f"  {head:<{width}}  {text}\n" for head, text in ordered)


def _bounds(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    return f"{row.show(row.low)} to {row.show(row.high)}"


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "Flag": lambda row: f"`-{row.key}`" + (" *" if row.relay else ""),
    "Name": lambda row: f"`{row.name}`",
    "Variable": lambda row: f"`{row.variable}`",
    "Label": lambda row: f"`{row.label_key}`" if row.label else "",
    "Value": lambda row: row.metavar or "true, false",
    "Default": lambda row: row.shown or ("" if row.metavar else row.show(row.default)),
    "Bounds": _bounds,
    "Protocols": lambda row: ", ".join(sorted(row.protocols)),
    "A change takes": lambda row: row.change.value,
    "What it does": lambda row: row.doc,
}


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(
        f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *lines)
    )


def _options(cls: type, columns: str, flag: bool = True) -> str:
    """The rows of a class, with these columns of `_COLUMNS`."""
    names = columns.split(", ")
    found = sorted((row for row in rows(cls) if row.flag == flag), key=lambda row: row.key)
    return _table(names, [[_COLUMNS[name](row) for name in names] for row in found])


def reference() -> str:
    """The text of docs/reference.md."""
    listener, target, program = options.OPTION_CLASSES
    counters = _table(
        ("Counter", "Protocol", "Kind", "Unit", "What it counts"),
        [
            (f"`{one.name}`", protocol, "gauge" if one.gauge else "total", one.unit, one.help)
            for protocol, counters in COUNTERS.items()
            for one in counters
        ],
    )
    return f"""# Reference

Printed by `make reference` from `ambassador/options.py` and `ambassador/counters.py`. Do not edit.

A flag beats its variable, and a variable beats the default. An empty variable is not set. DURATION is
written as in Go: `10s`, `500ms`, `1m30s`. A flag without a value is true: `-wait=false` is false.
`relay` takes the flags that are marked with *.

## The program

The variable of a repeatable flag takes several values, with commas or spaces between.

{_options(program, "Flag, Variable, Value, Default, What it does")}
## Targets

No label is read yet.

{_options(target, "Flag, Variable, Label, Value, Default, What it does")}
## Listeners

"A change takes" is what a new value needs while the listener runs.

{_options(listener, "Flag, Variable, Label, Value, Default, Bounds, Protocols, A change takes, What it does")}
## Limits of listeners

No flag sets these.

{_options(listener, "Name, Default, Bounds, Protocols, A change takes, What it does", False)}
## Counters

Each worker counts. A gauge says what is so now; a total only rises.

{counters}"""


if __name__ == "__main__":
    print(reference(), end="")
