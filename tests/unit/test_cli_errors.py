"""The program's answers to a wrong command line (I1): its exit code, one line, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ambassador import __version__
from ambassador.cli.arguments import follow_usage, relay_usage
from tests.unit.test_options import BAD_COMMAND_LINES, BAD_ENGINES, BAD_ROUTES

ROOT = Path(__file__).resolve().parents[2]

GOOD_ROUTE = "2/tcp=10.0.0.9:2"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`grand-ambassador arguments`, away from this machine's Docker settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    done = subprocess.run(
        [sys.executable, "-m", "ambassador", *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def refused(*arguments: str, **environment: str) -> str:
    """The line that refuses `arguments`: alone but for the usage, which follows as Go has it."""
    done = run(*arguments, **environment)
    line, _, rest = done.stderr.partition("\n")
    assert done.returncode == 2
    assert done.stdout == ""
    assert rest.lstrip("\n") == (relay_usage() if arguments[0] == "relay" else follow_usage())
    assert line.isprintable()
    return line


@pytest.mark.parametrize(("arguments", "line"), BAD_COMMAND_LINES)
def test_refused_command_lines(arguments: list[str], line: str) -> None:
    assert refused(*arguments) == line


@pytest.mark.parametrize(
    ("spec", "reason"), [row for row in BAD_ROUTES if "\0" not in row[0]]
)  # no argument can hold a NUL
def test_refused_routes(spec: str, reason: str) -> None:
    line = refused("relay", GOOD_ROUTE, spec)
    assert line.startswith("invalid route ")
    assert reason in line


def test_a_listener_given_twice() -> None:
    line = refused("relay", GOOD_ROUTE, "2/tcp=10.0.0.8:2")
    assert line == (
        'invalid route "2/tcp=10.0.0.8:2": 2/tcp is already given; write each listener once'
    )


@pytest.mark.parametrize(("written", "reason"), BAD_ENGINES)
def test_refused_addresses_of_the_engine(written: str, reason: str) -> None:
    assert reason in refused("-name", "x", "-sock", written)


def test_a_refused_address_of_the_engine_in_the_environment() -> None:
    line = refused("-name", "x", DOCKER_HOST="ssh://me@host")
    assert line.startswith('invalid value "ssh://me@host" for DOCKER_HOST: ')


def test_an_argument_that_is_no_unicode_is_escaped() -> None:
    assert refused("-\udc80") == "flag provided but not defined: -\\udc80"


@pytest.mark.parametrize("arguments", [[], ["-wait"], ["-sock", "/nowhere"], ["-hold=0"]])
def test_a_missing_name(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Missing required arguments *name*\n"


@pytest.mark.parametrize(
    ("arguments", "missing", "flag"),
    [
        (["-tlsverify"], "ca.pem", "-tlscacert"),
        (["-tls", "-tlscert=/nowhere/c.pem"], "/nowhere/c.pem", "-tlscert"),
    ],
)
def test_a_missing_tls_file(tmp_path: Path, arguments: list[str], missing: str, flag: str) -> None:
    done = run(
        "-name", "x", "-sock", "tcp://127.0.0.1:1", *arguments, DOCKER_CERT_PATH=str(tmp_path)
    )
    assert (done.returncode, done.stdout) == (1, "")
    path = tmp_path / missing  # an absolute path stays as it is
    assert done.stderr == (
        f'Error setting up TLS: cannot read "{path}" (No such file or directory): '
        f"mount the file or name another with {flag}\n"
    )


@pytest.mark.parametrize("form", [[], ["relay"]], ids=["follow", "relay"])
def test_the_version(form: list[str]) -> None:
    for word in ("-version", "--version"):
        done = run(*form, word)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"grand-ambassador {__version__}\n"


@pytest.mark.parametrize(
    ("form", "usage"), [([], follow_usage()), (["relay"], relay_usage())], ids=["follow", "relay"]
)
def test_help_goes_to_standard_output(form: list[str], usage: str) -> None:
    for word in ("-h", "-help", "--help"):
        done = run(*form, word)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == usage
