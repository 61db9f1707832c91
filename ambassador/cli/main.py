"""The command: finds the subcommand, reads its arguments and runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from ambassador import __version__
from ambassador.cli import goflags
from ambassador.cli.arguments import (
    Action,
    Arguments,
    ArgumentsError,
    Subcommand,
    UsageError,
    VariableError,
    check_tls_files,
)
from ambassador.cli.follow import FOLLOW
from ambassador.cli.relay import RELAY
from ambassador.system.titles import PROGRAM

SUBCOMMANDS: Mapping[str, Subcommand] = {
    "": FOLLOW,
    "relay": RELAY,
}
"""By the first argument."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code: 0, 1 for what cannot be set up, 2 for bad usage."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        read = check_tls_files(parse_arguments(words, os.environ))
    except ArgumentsError as error:
        print(error, file=sys.stderr)
        print(getattr(error, "usage", ""), file=sys.stderr, end="")
        return error.exit_code
    match read.action:
        case Action.VERSION:
            print(f"{PROGRAM} {__version__}")
            return 0
        case Action.HELP:
            print(read.usage, end="")
            return 0
    return SUBCOMMANDS[subcommand_of(words)].run(read)


def subcommand_of(arguments: Sequence[str]) -> str:
    """The subcommand's word, "" if there is none."""
    return arguments[0] if arguments and arguments[0] in SUBCOMMANDS else ""


def parse_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    """Read `arguments` (without the program's name). Raises UsageError or MissingName."""
    word = subcommand_of(arguments)
    command = SUBCOMMANDS[word]
    try:
        return command.read(arguments[1:] if word else arguments, environment)
    except goflags.HelpRequested:
        return Arguments(Action.HELP, usage=command.usage())
    except ValueError as error:
        if not word and not isinstance(error, VariableError):
            raise UsageError(str(error), command.usage()) from None
        program = f"grand-ambassador {word}".rstrip()
        raise UsageError(f"{error}; see {program} -help") from None
