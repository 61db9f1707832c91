"""The option table: each row by flag, variable and label, at its bounds; and that a new option is a row."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import Any

import pytest

from ambassador import _control, options
from ambassador.cli.arguments import UsageError
from ambassador.cli.follow import follow_usage
from ambassador.cli.main import parse_arguments
from ambassador.cli.relay import relay_usage
from ambassador.cli.usage import reference
from ambassador.control import Update, pack
from ambassador.options import (
    OPTION_CLASSES,
    UDP,
    ListenerOptions,
    Row,
    all_rows,
    option,
    read_labels,
    rows,
)
from ambassador.values import BOOL, BYTES, COUNT, DURATION, TEXT, WORKERS

ROUTE = "1/tcp=10.0.0.5:1"
BOUNDED = [row for row in all_rows() if row.flag and row.high is not None]
named = pytest.mark.parametrize("row", all_rows(), ids=lambda row: row.name)
bounded = pytest.mark.parametrize("row", BOUNDED, ids=lambda row: row.name)


def class_of(row: Row) -> type[Any]:
    return next(cls for cls in options.OPTION_CLASSES if row in rows(cls))


def by_flag(row: Row, text: str) -> Any:
    return _field(row, [f"-{row.key}={text}"], {})


def by_variable(row: Row, text: str) -> Any:
    return _field(row, [], {row.variable: text})


def _field(row: Row, flags: list[str], environment: dict[str, str]) -> Any:
    name = [] if row.name == "name" else ["-name", "x"]
    start = ["relay", *flags, ROUTE] if row.relay else [*name, *flags]
    read = parse_arguments(start, environment)
    return next(
        getattr(each, row.name)
        for each in (read.program, read.target, read.listener)
        if isinstance(each, class_of(row))
    )


def by_label(row: Row, text: str) -> Any:
    return getattr(read_labels(class_of(row)(), {row.label_key: text}), row.name)


def ways(row: Row) -> list[Any]:
    return [by_flag, by_variable] + [by_label] * row.label


# --- the table ---------------------------------------------------------------------------------


@named
def test_a_default_is_inside_its_bounds_or_is_explained(row: Row) -> None:
    assert getattr(class_of(row)(), row.name) == row.default
    if row.low is not None and row.high is not None:
        assert row.low <= row.default <= row.high or row.shown != row.show(row.default)
    if row.shown and row.shown == row.show(row.default):
        assert row.parse(row.shown) == row.default


@named
def test_a_row_is_whole(row: Row) -> None:
    assert row.doc
    assert row.doc[0] != row.doc[0].upper() or row.doc.startswith(("TCP", "UDP"))
    assert (row.low is None) == (row.high is None)
    assert (row.low is None) == (row.kind not in (DURATION, COUNT, BYTES, WORKERS))
    assert row.protocols
    assert row.flag or not row.label
    assert not row.wire or class_of(row) is ListenerOptions


def test_names_and_wire_numbers_belong_to_one_row() -> None:
    names = [each.name for cls in OPTION_CLASSES for each in fields(cls)]
    assert len(set(names)) == len(names) == len(all_rows())
    wire = [row.wire for row in all_rows() if row.wire]
    assert sorted(wire) == list(range(1, len(wire) + 1))


def test_every_worker_finds_a_slot() -> None:
    """The counters of so many workers are mapped, and no more."""
    row = next(row for row in all_rows() if row.name == "workers")
    assert row.high is not None
    assert row.high <= _control.MAX_SLOTS


# --- by flag, variable and label ---------------------------------------------------------------


@bounded
def test_both_bounds_are_taken(row: Row) -> None:
    for way in ways(row):
        for bound in (row.low, row.high):
            assert way(row, row.show(bound)) == bound, way


@bounded
def test_one_past_each_bound_is_refused_in_one_text(row: Row) -> None:
    assert row.low is not None
    assert row.high is not None
    for text in (f"{row.high + 1}ms" if row.kind is DURATION else str(row.high + 1),) + (
        ("-1ns",) if row.low == 0 else ("0",)
    ):
        with pytest.raises(ValueError, match="write") as reason:
            row.parse(text)
        for way, source in zip(
            ways(row), (f"flag -{row.key}", row.variable, f"label {row.label_key}"), strict=False
        ):
            with pytest.raises((UsageError, ValueError)) as caught:
                way(row, text)
            line = str(caught.value).removesuffix("; see grand-ambassador relay -help")
            assert line == f'invalid value "{text}" for {source}: {reason.value}'


@pytest.mark.parametrize(
    "row",
    [row for row in all_rows() if row.flag and row.kind is BOOL and row.name != "version"],
    ids=lambda row: row.name,
)
def test_booleans(row: Row) -> None:
    for way in ways(row):
        assert (way(row, "true"), way(row, "F")) == (True, False)


@pytest.mark.parametrize(
    "row", [row for row in all_rows() if row.kind is TEXT], ids=lambda row: row.name
)
def test_texts(row: Row) -> None:
    for way in ways(row):
        assert way(row, "/some-text") == (("/some-text",) if row.repeatable else "/some-text")


@pytest.mark.parametrize("sandbox", options.Sandbox)
def test_sandbox_modes(sandbox: options.Sandbox) -> None:
    row = next(row for row in all_rows() if row.name == "sandbox")
    assert by_flag(row, str(sandbox)) is by_variable(row, str(sandbox)) is sandbox


@named
def test_what_has_no_label_or_no_flag_is_not_set(row: Row) -> None:
    text = row.show(row.high) if row.high is not None else "auto"
    if not row.label:
        start = class_of(row)()
        assert read_labels(start, {f"ambassador.{row.key}": text, "": text}) == start
    if not row.flag:
        assert _field(row, [], {f"AMBASSADOR_{row.name.upper()}": text, "": text}) == row.default
        with pytest.raises(UsageError, match="flag provided but not defined"):
            by_flag(row, text)


# --- a new option is a row ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WithPatience(ListenerOptions):
    patience: int = option(
        DURATION, 5_000, "a trial option", low=1, high=60_000, wire=99, protocols=UDP, label=True
    )


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Row:
    """A copy of the table with one more row, and nothing else."""
    monkeypatch.setattr(options, "OPTION_CLASSES", (WithPatience, *OPTION_CLASSES[1:]))
    return rows(WithPatience)[-1]


def test_a_new_option_is_a_row(patience: Row) -> None:
    assert [way(patience, "1m") for way in ways(patience)] == [60_000] * 3
    test_both_bounds_are_taken(patience)
    test_one_past_each_bound_is_refused_in_one_text(patience)
    test_a_default_is_inside_its_bounds_or_is_explained(patience)
    for usage in (follow_usage(), relay_usage()):
        assert "\n  -patience DURATION            a trial option (default 5s)\n" in usage
    assert (
        "| `-patience` * | `AMBASSADOR_PATIENCE` | `ambassador.patience` | DURATION | 5s "
        "| 1ms to 1m | udp | an update | a trial option |\n"
    ) in reference()
    record = pack(Update(1, WithPatience(patience=60_000)))
    assert struct.pack("<HQ", 99, 60_000) in record, "a worker does not get it"
