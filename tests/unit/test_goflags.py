"""Go's flag syntax, as a table: what Go's own `flag` package does with each of these lines."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.cli.goflags import HelpRequested, parse
from ambassador.options import option, rows
from ambassador.values import BOOL, DURATION, TEXT, Kind

ANY = Kind("TEXT", lambda text, _low, _high: text, str)


@dataclass(frozen=True)
class Flags:
    name: tuple[str, ...] = option(ANY, (), "who", repeatable=True)
    sock: str = option(TEXT, "/sock", "where")
    wait: bool = option(BOOL, True, "whether to wait")
    hold: int = option(DURATION, 10, "how long", low=0, high=1 << 40)
    half_close: int = option(DURATION, 10, "two words", low=0, high=1 << 40)
    limit: str = option(TEXT, "", "no flag sets it", flag=False)


FLAGS = rows(Flags)


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
        (["-name", "a", "-name=b", "--name", "a"], {"name": ("a", "b")}, ()),
        (["-wait"], {"wait": True}, ()),
        (["--wait"], {"wait": True}, ()),
        (["-wait=false"], {"wait": False}, ()),
        (["-wait=F", "-wait"], {"wait": True}, ()),
        # A boolean never takes the next argument, so that one ends the flags.
        (["-wait", "false", "-name", "x"], {"wait": True}, ("false", "-name", "x")),
        (["relay", "-name", "x"], {}, ("relay", "-name", "x")),
        (["-wait", "--", "-name", "x"], {"wait": True}, ("-name", "x")),
        (["--"], {}, ()),
        (["-"], {}, ("-",)),
        (["-wait", "-", "-name", "x"], {"wait": True}, ("-", "-name", "x")),
        ([""], {}, ("",)),
        (["-hold=1m30s", "--half-close", "1s"], {"hold": 90_000, "half_close": 1_000}, ()),
    ],
)
def test_reads_what_go_reads(
    arguments: list[str], values: dict[str, object], rest: tuple[str, ...]
) -> None:
    parsed = parse(FLAGS, arguments)
    assert parsed.values == values
    assert parsed.rest == rest


def test_the_last_one_wins_or_all_if_repeatable() -> None:
    parsed = parse(FLAGS, ["-name", "b", "-sock=x", "-name", "a", "-name=b", "-sock", "y"])
    assert parsed.values == {"name": ("b", "a"), "sock": "y"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-nam", "x"], "flag provided but not defined: -nam"),
        (["-n=x"], "flag provided but not defined: -n"),
        (["-half_close=1s"], "flag provided but not defined: -half_close"),
        (["-limit=x"], "flag provided but not defined: -limit"),
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
    with pytest.raises(ValueError) as caught:
        parse(FLAGS, arguments)
    assert str(caught.value) == message


def test_the_first_error_is_the_one_reported() -> None:
    with pytest.raises(ValueError, match="not defined: -a"):
        parse(FLAGS, ["-a", "-b"])


@pytest.mark.parametrize("word", ["-h", "-help", "--h", "--help", "-h=x"])
def test_help_is_asked_for(word: str) -> None:
    with pytest.raises(HelpRequested):
        parse(FLAGS, ["-wait", word, "-not-defined"])


def test_help_after_the_flags_is_an_argument() -> None:
    assert parse(FLAGS, ["x", "-h"]).rest == ("x", "-h")


def test_a_defined_h_is_a_flag() -> None:
    @dataclass(frozen=True)
    class Short:
        h: bool = option(BOOL, False, "a flag like any other")

    assert parse(rows(Short), ["-h"]).values == {"h": True}


@given(st.lists(st.text(max_size=8), max_size=5))
def test_any_arguments_are_read_or_refused_in_one_line(arguments: list[str]) -> None:
    try:
        parsed = parse(FLAGS, arguments)
    except ValueError as error:
        assert str(error).isprintable()
    except HelpRequested:
        assert any(argument.lstrip("-").startswith("h") for argument in arguments)
    else:
        assert parsed.rest == tuple(arguments[len(arguments) - len(parsed.rest) :])
