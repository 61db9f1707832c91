"""Go's flag syntax, as a table: what Go's own `flag` package does with each of these lines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.cli.goflags import (
    MAX_NANOSECONDS,
    Flag,
    FlagError,
    HelpRequested,
    escape,
    parse,
    parse_bool,
    parse_duration,
    parse_text,
    quote,
    usage,
)

NAME = Flag("name", str, "", "NAME", "who")
SOCK = Flag("sock", str, "/sock", "PATH", "where", "/sock")
WAIT = Flag("wait", parse_bool, True, "", "whether to wait", "true")
HOLD = Flag("hold", parse_duration, 10, "DURATION", "how long", "10s")
FLAGS: tuple[Flag[Any], ...] = (NAME, SOCK, WAIT, HOLD)

MILLISECOND = 1_000_000
SECOND = 1_000 * MILLISECOND


@pytest.mark.parametrize(
    ("arguments", "values", "rest"),
    [
        ([], {}, ()),
        (["-name", "redis"], {"name": ("redis",)}, ()),
        (["-name=redis"], {"name": ("redis",)}, ()),
        (["--name", "redis"], {"name": ("redis",)}, ()),
        (["--name=redis"], {"name": ("redis",)}, ()),
        (["-name="], {"name": ("",)}, ()),
        (["-name", ""], {"name": ("",)}, ()),
        (["-name=a=b"], {"name": ("a=b",)}, ()),
        (["-name", "-wait"], {"name": ("-wait",)}, ()),
        (["-name", "--"], {"name": ("--",)}, ()),
        (["-name", "a", "-name=b", "--name", "a"], {"name": ("a", "b", "a")}, ()),
        (["-wait"], {"wait": (True,)}, ()),
        (["--wait"], {"wait": (True,)}, ()),
        (["-wait=false"], {"wait": (False,)}, ()),
        (["-wait=F", "-wait"], {"wait": (False, True)}, ()),
        # A boolean never takes the next argument, so that one ends the flags.
        (["-wait", "false", "-name", "x"], {"wait": (True,)}, ("false", "-name", "x")),
        (["relay", "-name", "x"], {}, ("relay", "-name", "x")),
        (["-wait", "--", "-name", "x"], {"wait": (True,)}, ("-name", "x")),
        (["--"], {}, ()),
        (["-"], {}, ("-",)),
        (["-wait", "-", "-name", "x"], {"wait": (True,)}, ("-", "-name", "x")),
        ([""], {}, ("",)),
        (["-hold=1m30s"], {"hold": (90 * SECOND,)}, ()),
    ],
)
def test_reads_what_go_reads(
    arguments: list[str], values: dict[str, tuple[object, ...]], rest: tuple[str, ...]
) -> None:
    parsed = parse(FLAGS, arguments)
    assert parsed.values == values
    assert parsed.rest == rest


def test_the_last_one_wins_and_a_default_stands_for_none() -> None:
    parsed = parse(FLAGS, ["-name", "a", "-name", "b"])
    assert parsed.get(NAME) == "b"
    assert parsed.all(NAME) == ("a", "b")
    assert parsed.given(NAME)
    assert parsed.get(SOCK) == "/sock"
    assert parsed.all(SOCK) == ()
    assert not parsed.given(SOCK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-nam", "x"], "flag provided but not defined: -nam"),
        (["-n=x"], "flag provided but not defined: -n"),
        (["-waitname"], "flag provided but not defined: -waitname"),
        (["-Name=x"], "flag provided but not defined: -Name"),
        (["-x\ny"], "flag provided but not defined: -x\\ny"),
        (["-name"], "flag needs an argument: -name"),
        (["---name"], "bad flag syntax: ---name"),
        (["---"], "bad flag syntax: ---"),
        (["-=x"], "bad flag syntax: -=x"),
        (["--=x"], "bad flag syntax: --=x"),
        (["-wait=maybe"], 'invalid boolean value "maybe" for -wait: write true or false'),
        (["-wait="], 'invalid boolean value "" for -wait: write true or false'),
        (
            ["-hold", "10"],
            'invalid value "10" for flag -hold: '
            "missing unit in duration; write it as 10s, 500ms or 1m30s",
        ),
        (
            ['-hold="\x1b[31m\u202e'],
            r'invalid value "\"\x1b[31m\u202e" for flag -hold: '
            "not a duration; write it as 10s, 500ms or 1m30s",
        ),
    ],
)
def test_errors_are_in_gos_words(arguments: list[str], message: str) -> None:
    with pytest.raises(FlagError) as caught:
        parse(FLAGS, arguments)
    assert str(caught.value) == message


def test_the_first_error_is_the_one_reported() -> None:
    with pytest.raises(FlagError, match="not defined: -a"):
        parse(FLAGS, ["-a", "-b"])


@pytest.mark.parametrize("word", ["-h", "-help", "--h", "--help", "-h=x"])
def test_help_is_asked_for(word: str) -> None:
    with pytest.raises(HelpRequested):
        parse(FLAGS, ["-wait", word, "-not-defined"])


def test_help_after_the_flags_is_an_argument() -> None:
    assert parse(FLAGS, ["x", "-h"]).rest == ("x", "-h")


def test_a_defined_h_is_a_flag() -> None:
    h = Flag("h", parse_bool, False, "", "a flag like any other")
    assert parse((h,), ["-h"]).get(h)


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


@given(st.lists(st.text(max_size=8), max_size=5))
def test_any_arguments_are_read_or_refused_in_one_line(arguments: list[str]) -> None:
    try:
        parsed = parse(FLAGS, arguments)
    except FlagError as error:
        assert str(error).isprintable()
    except HelpRequested:
        assert any(argument.lstrip("-").startswith("h") for argument in arguments)
    else:
        assert parsed.rest == tuple(arguments[len(arguments) - len(parsed.rest) :])


@given(st.text())
def test_quoted_text_is_printable_and_reversible(text: str) -> None:
    quoted = quote(text)
    assert quoted.isprintable()
    inner = quoted[1:-1].encode("latin-1", "backslashreplace").decode("unicode_escape")
    assert inner == text


def test_escape_leaves_readable_text_alone() -> None:
    assert escape('caf\u00e9 "x" \\ \U0001f433') == 'caf\u00e9 "x" \\ \U0001f433'
    assert escape("a\u200bb\ud800") == "a\\u200bb\\ud800"


def test_usage_is_an_aligned_table_sorted_by_name() -> None:
    assert usage(FLAGS) == (
        "  -hold DURATION  how long (default 10s)\n"
        "  -name NAME      who\n"
        "  -sock PATH      where (default /sock)\n"
        "  -wait           whether to wait (default true)\n"
    )
    assert usage(()) == ""
