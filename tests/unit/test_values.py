"""Text to values and back: what each kind of value accepts, refuses and shows."""

from __future__ import annotations

import enum
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador import values
from ambassador.values import (
    MAX_NANOSECONDS,
    Kind,
    escape,
    parse_bool,
    parse_duration,
    parse_port,
    parse_text,
    quote,
    show_duration,
)

MILLISECOND = 1_000_000
SECOND = 1_000 * MILLISECOND


@pytest.mark.parametrize("word", ["1", "t", "T", "TRUE", "true", "True"])
def test_words_for_true(word: str) -> None:
    assert parse_bool(word) is True


@pytest.mark.parametrize("word", ["0", "f", "F", "FALSE", "false", "False"])
def test_words_for_false(word: str) -> None:
    assert parse_bool(word) is False


@pytest.mark.parametrize("word", ["", "yes", "no", "on", "tRUE", " true", "2", "\u0661"])
def test_other_words_are_not_booleans(word: str) -> None:
    with pytest.raises(ValueError, match="write true or false"):
        parse_bool(word)


def test_text_may_not_be_empty() -> None:
    assert parse_text(" ") == " "
    with pytest.raises(ValueError, match="empty"):
        parse_text("")


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("+0", 0),
        ("-0", 0),
        ("0s", 0),
        ("10s", 10 * SECOND),
        ("+5s", 5 * SECOND),
        ("-5s", -5 * SECOND),
        ("1m30s", 90 * SECOND),
        ("500ms", 500 * MILLISECOND),
        ("1.5h", 5400 * SECOND),
        ("1h30m", 5400 * SECOND),
        (".5s", 500 * MILLISECOND),
        ("1.s", SECOND),
        ("3ns", 3),
        ("3us", 3_000),
        ("3\u00b5s", 3_000),
        ("3\u03bcs", 3_000),
        ("0.3ns", 0),
        ("1m1m", 120 * SECOND),
        ("0000000000000000000000000001s", SECOND),
        ("0" * 5000 + "1s", SECOND),
        ("0." + "3" * 5000 + "s", 333_333_333),
        ("9223372036854775807ns", MAX_NANOSECONDS),
        ("2562047h47m16.854775807s", MAX_NANOSECONDS),
    ],
)
def test_durations(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a duration"),
        ("-", "not a duration"),
        ("s", "not a duration"),
        (".s", "not a duration"),
        ("--1s", "not a duration"),
        (" 1s", "not a duration"),
        ("\uff11\uff10s", "not a duration"),  # full-width digits
        ("\u0661s", "not a duration"),  # an Arabic-Indic digit
        ("1s-1s", "unknown unit"),
        ("1_0s", "unknown unit"),
        ("1S", "unknown unit"),
        ("1d", "unknown unit"),
        ("1 s", "unknown unit"),
        ("10", "missing unit"),
        ("1m30", "missing unit"),
        ("1.2.3s", "missing unit"),
        ("9223372036854775808ns", "292 years"),
        ("9" * 5000 + "s", "292 years"),
        ("2562048h", "292 years"),
        ("2562047h1h", "292 years"),
    ],
)
def test_not_durations(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_duration(text)
    assert str(caught.value).isprintable()


@given(st.integers(0, MAX_NANOSECONDS), st.booleans())
def test_any_count_of_nanoseconds_reads_back(count: int, negative: bool) -> None:
    seconds, rest = divmod(count, SECOND)
    for text in (f"{count}ns", f"{seconds}s{rest}ns", f"{seconds}.{rest:09}s"):
        assert parse_duration("-" + text if negative else text) == (-count if negative else count)


@given(st.text())
def test_quoted_text_is_printable_and_reversible(text: str) -> None:
    quoted = quote(text)
    assert quoted.isprintable()
    inner = quoted[1:-1].encode("latin-1", "backslashreplace").decode("unicode_escape")
    assert inner == text


def test_escape_leaves_readable_text_alone() -> None:
    assert escape('caf\u00e9 "x" \\ \U0001f433') == 'caf\u00e9 "x" \\ \U0001f433'
    assert escape("a\u200bb\ud800") == "a\\u200bb\\ud800"


class Size(enum.StrEnum):
    SMALL = "small"
    LARGE = "large"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((values.DURATION, n) for n in (0, 1, 999, 1000, 1001, 90_000, 120_000, 3_600_000_000)),
        *(
            (kind, n)
            for kind in (values.COUNT, values.BYTES, values.WORKERS)
            for n in (0, 7, 1 << 31)
        ),
        (values.BOOL, True),
        (values.BOOL, False),
        (values.TEXT, " a,b"),
        *((values.LEVEL, level) for level in values.LOG_LEVELS.values()),
        *((values.choice(Size), size) for size in Size),
    ],
)
def test_what_a_kind_shows_it_reads(kind: Kind[Any], value: object) -> None:
    assert kind.parse(kind.show(value), None, None) == value


@given(st.integers(0, 9_000_000_000_000))
def test_any_duration_reads_back(milliseconds: int) -> None:
    assert values.DURATION.parse(show_duration(milliseconds), None, None) == milliseconds


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "0"),
        (300, "300ms"),
        (1500, "1500ms"),
        (90_000, "90s"),
        (600_000, "10m"),
        (3_600_000, "1h"),
    ],
)
def test_a_duration_is_shown_with_one_unit(milliseconds: int, text: str) -> None:
    assert show_duration(milliseconds) == text


@pytest.mark.parametrize("kind", [values.COUNT, values.BYTES, values.WORKERS])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "+1",
        " 1",
        "1_0",
        "1e1",
        "many",
        "\u0663",
        "11",
        "9" * 5000,
        "0" * 12 + "11",
        "0001" * 9,
    ],
)
def test_other_texts_are_not_counts(kind: Kind[int], text: str) -> None:
    with pytest.raises(ValueError, match="write a number from 1 to 10"):
        kind.parse(text, 1, 10)


def test_zeros_in_front_change_nothing() -> None:
    assert values.COUNT.parse("0" * 5000 + "10", 1, 10) == 10
    assert parse_port("0" * 5000 + "80") == 80


def test_auto_is_one_worker_to_a_core() -> None:
    assert values.WORKERS.parse("auto", 1, 1000) == len(os.sched_getaffinity(0))
    assert values.WORKERS.parse("auto", 1, 1) == 1


def test_a_duration_is_milliseconds_rounded_up() -> None:
    assert values.DURATION.parse("1us", 0, None) == 1
    with pytest.raises(ValueError, match="write 2s or more"):
        values.DURATION.parse("1999ms", 2000, None)
