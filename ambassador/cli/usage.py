"""The help, and docs/reference.md, printed from the tables of options and counters.

`make reference` writes docs/reference.md; a test compares it, and the README's flags.
"""

from __future__ import annotations

from collections.abc import Iterable

from ambassador.counters import COUNTERS
from ambassador.options import ListenerOptions, ProgramOptions, Row, all_rows, rows
from ambassador.values import Protocol

_HELP = "-help", "print this text"


def flag_lines(flags: Iterable[Row]) -> str:
    """The flags, one line each: name, value, meaning, default; sorted by name."""
    lines = dict((_HELP,))
    for row in flags:
        if row.flagged:
            default = f" (default {row.shown})" if row.shown else ""
            lines[f"-{row.key} {row.metavar}".rstrip()] = row.doc + default
    width = max(map(len, lines))
    ordered = sorted(lines.items(), key=lambda line: line[0].split())
    return "".join(f"  {head:<{width}}  {text}\n" for head, text in ordered)


def follow_usage() -> str:
    """The help of the program, and what follows a wrong flag."""
    return (
        "Usage:\n"
        "  grand-ambassador [flags] -name NAME [-name NAME ...]\n"
        "  grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT ...\n"
        "\n"
        "Relays every port that the named containers expose and follows them through restarts.\n"
        "\n"
        "Flags:\n"
        f"{flag_lines(all_rows())}"
        "\n"
        "Environment, if no flag says otherwise:\n"
        "  AMBASSADOR_...     any flag: AMBASSADOR_IDLE_TIMEOUT=1h is -idle-timeout 1h\n"
        "  DOCKER_HOST        as -sock\n"
        "  DOCKER_TLS_VERIFY  as -tlsverify, if it is not empty\n"
        "  DOCKER_CERT_PATH   directory of ca.pem, cert.pem and key.pem; else $HOME/.docker\n"
    )


def relay_usage() -> str:
    """The help of `relay`."""
    return (
        "Usage:\n"
        "  grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT ...\n"
        "\n"
        "Relays each port to a fixed address, without Docker:\n"
        "  grand-ambassador relay 6379/tcp=10.0.0.5:6379 53/udp=[fd00::5]:53\n"
        "\n"
        "Flags:\n"
        f"{flag_lines(row for row in all_rows() if row.relay)}"
        "\n"
        "Environment, if no flag says otherwise:\n"
        "  AMBASSADOR_...     any flag: AMBASSADOR_IDLE_TIMEOUT=1h is -idle-timeout 1h\n"
    )


REFERENCE = """# Reference

Printed by `make reference` from `ambassador/options.py` and `ambassador/counters.py`. Do not edit.

## Options

A flag beats its variable, and a variable beats the default. An empty variable is not set. A label is for a
later version: nothing reads it yet. DURATION is written as Go does: `10s`, `500ms`, `1m30s`. A flag without
a value is true; write `-wait=false` for false. The variable of a repeatable flag takes several values, with
commas or spaces between. `relay` takes the flags that are marked with *.

{options}
"Takes" says what it takes to change the option of a live target.

## Limits

No flag sets them.

{limits}
## Counters

Each worker counts. A gauge says what is so now; all others only rise.

{counters}"""


def _table(head: str, lines: Iterable[tuple[str, ...]]) -> str:
    columns = head.split(", ")
    text = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in text)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _bounds(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    return f"{row.kind.show(row.low)} to {row.kind.show(row.high)}"


def _default(row: Row) -> str:
    return row.shown or row.show(row.default) if isinstance(row.default, bool) else row.shown


def _takes(row: Row) -> str:
    return "a restart" if row in rows(ProgramOptions) else row.change.value


def _protocols(row: Row) -> str:
    if row not in rows(ListenerOptions):
        return ""
    return ", ".join(protocol for protocol in Protocol if protocol in row.protocols)


def _option(row: Row) -> tuple[str, ...]:
    return (
        _code(f"-{row.key}") + (" *" if row.relay else ""),
        _code(row.variable),
        _code(row.label),
        row.metavar,
        _default(row),
        _bounds(row),
        _protocols(row),
        _takes(row),
        row.doc,
    )


def reference() -> str:
    """The text of docs/reference.md."""
    table = sorted(all_rows(), key=lambda row: row.key)
    return REFERENCE.format(
        options=_table(
            "Flag, Variable, Label, Value, Default, Bounds, Protocols, Takes, What it does",
            [_option(row) for row in table if row.flagged],
        ),
        limits=_table(
            "Name, Default, Bounds, Protocols, What it does",
            [
                (_code(row.name), _default(row), _bounds(row), _protocols(row), row.doc)
                for row in table
                if not row.flagged
            ],
        ),
        counters=_table(
            "Counter, Protocol, Kind, Unit, What it counts",
            [
                (
                    _code(each.name),
                    protocol,
                    "gauge" if each.gauge else "total",
                    each.unit,
                    each.help,
                )
                for protocol, counters in COUNTERS.items()
                for each in counters
            ],
        ),
    )


if __name__ == "__main__":
    print(reference(), end="")
