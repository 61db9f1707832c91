"""The program's answers to a wrong command line (I1): its exit code, one line, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ambassador import __version__
from ambassador.cli.follow import follow_usage
from ambassador.cli.main import main
from ambassador.cli.relay import relay_usage
from tests.unit.test_address import BAD_ENGINES
from tests.unit.test_arguments import BAD_COMMAND_LINES, BAD_RELAYS
from tests.unit.test_rules import BAD_ROUTES

ROOT = Path(__file__).resolve().parents[2]
GOOD_ROUTE = "2/tcp=10.0.0.9:2"
FOLLOW_HELP = "; see grand-ambassador -help"
RELAY_HELP = "; see grand-ambassador relay -help"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`grand-ambassador arguments`, in this process; the words `NAME=value` of `environment` are all."""

    def run(*arguments: str, **environment: str) -> Done:
        monkeypatch.setattr(os, "environ", environment)
        code = main(arguments)
        return Done(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(("arguments", "line"), BAD_COMMAND_LINES)
def test_refused_command_lines(run: Run, arguments: list[str], line: str) -> None:
    """Go prints the usage after the line."""
    assert run(*arguments) == Done(2, "", f"{line}\n{follow_usage()}")


def one_line(done: Done, end: str) -> str:
    """What the program printed: one line and no usage."""
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.removesuffix("\n")
    assert line.isprintable()
    assert line.endswith(end)
    return line


@pytest.mark.parametrize(("arguments", "line"), BAD_RELAYS)
def test_refused_relays(run: Run, arguments: list[str], line: str) -> None:
    assert one_line(run("relay", *arguments), RELAY_HELP).startswith(line)


@pytest.mark.parametrize(("spec", "reason"), BAD_ROUTES)
def test_refused_routes(run: Run, spec: str, reason: str) -> None:
    line = one_line(run("relay", GOOD_ROUTE, spec), RELAY_HELP)
    assert line.startswith("invalid route ")
    assert reason in line


@pytest.mark.parametrize(("written", "reason"), BAD_ENGINES)
def test_refused_addresses_of_the_engine(run: Run, written: str, reason: str) -> None:
    line, _, rest = run("-name", "x", "-sock", written).stderr.partition("\n")
    assert reason in line
    assert rest == follow_usage()


@pytest.mark.parametrize("variable", ["DOCKER_HOST", "AMBASSADOR_SOCK"])
def test_a_refused_address_of_the_engine_in_the_environment(run: Run, variable: str) -> None:
    line = one_line(run("-name", "x", **{variable: "ssh://me@host"}), FOLLOW_HELP)
    assert line.startswith(f'invalid value "ssh://me@host" for {variable}: ')


def test_a_program_of_its_own_says_the_same() -> None:
    """A process, an argument that is no Unicode, and no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "ambassador", b"relay", b"-\x80"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"flag provided but not defined: -\\udc80{RELAY_HELP}\n"


@pytest.mark.parametrize("arguments", [[], ["-wait"], ["-sock", "/nowhere"], ["-hold=0"]])
def test_a_missing_name(run: Run, arguments: list[str]) -> None:
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
def test_a_missing_tls_file(
    run: Run, tmp_path: Path, arguments: list[str], missing: str, flag: str
) -> None:
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
def test_the_version(run: Run, form: list[str]) -> None:
    for word in ("-version", "--version"):
        done = run(*form, word)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"grand-ambassador {__version__}\n"


@pytest.mark.parametrize(
    ("form", "usage"), [([], follow_usage()), (["relay"], relay_usage())], ids=["follow", "relay"]
)
def test_help_goes_to_standard_output(run: Run, form: list[str], usage: str) -> None:
    for word in ("-h", "-help", "--help"):
        done = run(*form, word)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == usage
