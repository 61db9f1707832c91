"""The command line and the variables: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.cli.arguments import (
    Action,
    Arguments,
    MissingName,
    UsageError,
)
from ambassador.cli.follow import follow_usage
from ambassador.cli.main import parse_arguments
from ambassador.cli.relay import relay_usage
from ambassador.engine.address import EngineAddress, TlsFiles
from ambassador.options import ListenerOptions, ProgramOptions, Sandbox, TargetOptions
from ambassador.rules import parse_routes

ROUTE = "1/tcp=10.0.0.5:1"


def follow(*arguments: str, **environment: str) -> Arguments:
    return parse_arguments(["-name", "redis", *arguments], environment)


def refused(*arguments: str, **environment: str) -> UsageError:
    """The error for `arguments`: one line."""
    with pytest.raises(UsageError) as caught:
        parse_arguments(arguments, environment)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable(), "not one clean line"
    return caught.value


def test_defaults() -> None:
    assert follow() == Arguments(
        Action.RUN,
        ProgramOptions(name=("redis",)),
        engine=EngineAddress("unix:///var/run/docker.sock"),
    )


def test_everything_at_once() -> None:
    assert follow(
        *("-hold=1m30s", "--drain", "2s", "-network", "back", "-log-level=DEBUG", "-wait=false"),
        *("-sock", "tcp://10.0.0.1:2376", "-tls", "-tlsverify=true", "-sandbox=off"),
        *("-tlscert", "/c", "-tlskey", "/k", "-tlscacert", "/a", "-workers", "3"),
        *("-max-connections", "500", "-idle-timeout", "1h", "-half-close-timeout=30s"),
        *("-udp-timeout", "5m"),
    ) == Arguments(
        Action.RUN,
        ProgramOptions(
            name=("redis",),
            sock="tcp://10.0.0.1:2376",
            wait=False,
            tls=True,
            tlsverify=True,
            tlscert="/c",
            tlskey="/k",
            tlscacert="/a",
            sandbox=Sandbox.OFF,
            log_level="debug",
        ),
        TargetOptions(network="back"),
        ListenerOptions(
            hold=90_000,
            drain=2_000,
            workers=3,
            max_connections=500,
            idle_timeout=3_600_000,
            half_close_timeout=30_000,
            udp_timeout=300_000,
        ),
        engine=EngineAddress(
            "tcp://10.0.0.1:2376", TlsFiles(True, "/a", "/c", "/k", client_required=True)
        ),
        warnings=("-wait flag is deprecated and will not be used",),
    )


def test_the_relay_form() -> None:
    listener = ListenerOptions(hold=0, drain=1_000)
    routes = ("6379/tcp=10.0.0.5:6380", "53/udp=[fd00::5]:53")
    assert parse_arguments(
        ["relay", "-hold=0", "-drain", "1s", *routes],
        {
            "DOCKER_HOST": "nonsense://",
            "DOCKER_TLS_VERIFY": "1",
            "AMBASSADOR_SOCK": "nonsense://",
            "AMBASSADOR_TLS": "nonsense",
            "AMBASSADOR_NAME": "web",
        },
    ) == Arguments(Action.RUN, listener=listener, routes=parse_routes(routes, listener))


def test_names_keep_their_order_and_lose_duplicates() -> None:
    read = parse_arguments(["-name", "b", "-name=a", "--name", "b", "-name", "c"], {})
    assert read.program.name == ("b", "a", "c")


@pytest.mark.parametrize("text", ["b a c", "b,a,c", " b, a,b,\tc ,", "b\na\nc"])
def test_a_variable_takes_several_names(text: str) -> None:
    assert parse_arguments([], {"AMBASSADOR_NAME": text}).program.name == ("b", "a", "c")
    flag = parse_arguments(["-name", "d,e"], {"AMBASSADOR_NAME": text})
    assert flag.program.name == ("d,e",), "the flag beats the variable, and takes any name"


def test_any_name_is_a_name() -> None:
    strange = "web\nlevel=error \x1b[31m\u202e\udc80"
    assert parse_arguments(["-name", strange], {}).program.name == (strange,)


@pytest.mark.parametrize("arguments", [[], ["-wait"], ["-sock", "/x"], ["-hold", "0"], ["--"]])
@pytest.mark.parametrize("environment", [{}, {"AMBASSADOR_NAME": ""}, {"AMBASSADOR_NAME": " , "}])
def test_a_missing_name_has_the_originals_words_and_code(
    arguments: list[str], environment: dict[str, str]
) -> None:
    with pytest.raises(MissingName) as caught:
        parse_arguments(arguments, environment)
    assert str(caught.value) == "Missing required arguments *name*"
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("form", "usage"), [([], follow_usage()), (["relay"], relay_usage())], ids=["follow", "relay"]
)
def test_help_and_version_need_nothing_else(form: list[str], usage: str) -> None:
    bad = {"AMBASSADOR_HOLD": "bad"}
    for word in ("-h", "-help", "--h", "--help"):
        assert parse_arguments([*form, word], bad) == Arguments(Action.HELP, usage=usage)
    assert parse_arguments([*form, "-version"], bad) == Arguments(Action.VERSION)
    assert parse_arguments([*form, "--version=true", "x"], bad).action is Action.VERSION
    assert parse_arguments(form, {"AMBASSADOR_VERSION": "true"}).action is Action.VERSION


def test_a_flag_beats_its_variable_even_a_bad_one() -> None:
    assert follow("-hold", "1s", AMBASSADOR_HOLD="2s").listener.hold == 1_000
    assert follow("-hold", "1s", AMBASSADOR_HOLD="bad").listener.hold == 1_000
    assert follow(AMBASSADOR_HOLD="2s").listener.hold == 2_000
    assert follow(AMBASSADOR_HOLD="").listener.hold == ListenerOptions().hold
    assert follow("-wait=true", AMBASSADOR_WAIT="false").warnings == ()
    assert follow(AMBASSADOR_WAIT="false").warnings != ()


@pytest.mark.parametrize("form", [["-name", "x"], ["relay", ROUTE]], ids=["follow", "relay"])
def test_a_wrong_variable_is_one_line_that_names_it(form: list[str]) -> None:
    error = refused(*form, AMBASSADOR_LOG_LEVEL="loud\n")
    command = "grand-ambassador relay" if form[0] == "relay" else "grand-ambassador"
    assert str(error) == (
        'invalid value "loud\\n" for AMBASSADOR_LOG_LEVEL: write one of debug, info, warn, '
        f"warning, error, fatal, panic; see {command} -help"
    )
    assert error.usage == ""


BAD_COMMAND_LINES = [
    (["-sandbox", "on"], 'invalid value "on" for flag -sandbox: write one of auto, required, off'),
    (["-x"], "flag provided but not defined: -x"),
    (["-na", "redis"], "flag provided but not defined: -na"),
    (["-max-held", "1"], "flag provided but not defined: -max-held"),
    (["-name"], "flag needs an argument: -name"),
    (["---name"], "bad flag syntax: ---name"),
    (
        ["-name", ""],
        'invalid value "" for flag -name: it is empty; write a value or leave the flag out',
    ),
    (
        ["-sock", ""],
        'invalid value "" for flag -sock: it is empty; write a value or leave the flag out',
    ),
    (["-wait=maybe"], 'invalid boolean value "maybe" for -wait: write true or false'),
    (
        ["-hold", "10"],
        'invalid value "10" for flag -hold: '
        "missing unit in duration; write it as 10s, 500ms or 1m30s",
    ),
    (["-hold=-1s"], 'invalid value "-1s" for flag -hold: it is negative; write 0 or more'),
    (["-drain", "-1ns"], 'invalid value "-1ns" for flag -drain: it is negative; write 0 or more'),
    (
        ["-hold", "1001h"],
        'invalid value "1001h" for flag -hold: it is too long; write 1000h or less',
    ),
    (["-udp-timeout", "0s"], 'invalid value "0s" for flag -udp-timeout: write more than 0'),
    *(
        (
            ["-max-connections", text],
            f'invalid value "{text}" for flag -max-connections: write a number from 1 to 10000000',
        )
        for text in ("0", "-1", "many", "1e3", "10000001", "99999999999999999999", "٣")
    ),
    (
        ["-workers", "0"],
        'invalid value "0" for flag -workers: write a number from 1 to 64, or auto',
    ),
    (
        ["-log-level", "loud"],
        'invalid value "loud" for flag -log-level: '
        "write one of debug, info, warn, warning, error, fatal, panic",
    ),
    (
        ["redis"],
        'unexpected argument "redis": write -name "redis" to follow a container of that name',
    ),
    (["-wait", "false"], 'unexpected argument "false": write -wait=false'),
    (["--tls", "True"], 'unexpected argument "True": write --tls=True'),
    (
        ["-name", "a", "relay", ROUTE],
        'unexpected argument "relay": write it first, '
        "grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), BAD_COMMAND_LINES)
def test_refused_command_lines(arguments: list[str], line: str) -> None:
    error = refused(*arguments)
    assert (str(error), error.usage) == (line, follow_usage())


BAD_RELAYS = [
    (["-name", "x"], "flag provided but not defined: -name"),
    (["-sock=x", ROUTE], "flag provided but not defined: -sock"),
    (["-hold", "1"], 'invalid value "1" for flag -hold: missing unit in duration'),
    ([], "relay needs at least one route: write 6379/tcp=10.0.0.5:6379"),
    ([ROUTE, "-hold=1s"], 'invalid route "-hold=1s": flags go before the routes'),
    ([ROUTE, "redis"], 'invalid route "redis": write PORT/PROTOCOL=ADDRESS:PORT, such as'),
    ([ROUTE, ROUTE], f'invalid route "{ROUTE}": 1/tcp is already given; write each listener once'),
]


@pytest.mark.parametrize(("arguments", "line"), BAD_RELAYS)
def test_relay_refuses_with_one_line_that_names_the_help(arguments: list[str], line: str) -> None:
    error = refused("relay", *arguments)
    assert str(error).startswith(line)
    assert str(error).endswith("; see grand-ambassador relay -help")
    assert error.usage == ""


@pytest.mark.parametrize("word", ["debug", "info", "warn", "warning", "WaRn", "panic"])
def test_log_levels(word: str) -> None:
    level = {"warn": "warning"}.get(word.lower(), word.lower())
    assert follow("-log-level", word).program.log_level == level
    assert parse_arguments(["relay", "-log-level", word, ROUTE], {}).program.log_level == level


_WORDS = st.lists(
    st.text(max_size=12) | st.sampled_from(["relay", "-name", "-hold=1s", ROUTE]), max_size=6
)


@given(
    _WORDS,
    st.dictionaries(st.sampled_from(["AMBASSADOR_HOLD", "AMBASSADOR_NAME"]), st.text(max_size=6)),
)
def test_any_command_line_is_arguments_or_one_line(
    words: list[str], environment: dict[str, str]
) -> None:
    try:
        assert parse_arguments(words, environment).action in Action
    except (UsageError, MissingName) as error:
        assert str(error).isprintable()
