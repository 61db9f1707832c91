"""What the command line and the environment say, as one checked, immutable value.

Invariants:

- Nothing is read but the arguments and the environment mapping passed in (an interface's number
  and, for a relative -sock, the working directory apart); only `check_tls_files` reads files.
- An `Arguments` that exists is valid: every number is in range, every address an IP literal, every
  listener there once, the Engine's address a full URL. Nothing behind this module checks again.
- Every error is one line that says what to do; `exit_code` is the program's exit code.
- A flag beats its variable, a variable beats DOCKER_HOST and the like, and these beat the default.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from ambassador import options
from ambassador.cli import goflags
from ambassador.engine.address import EngineAddress, readable_files
from ambassador.model import ListenerSpec
from ambassador.options import ListenerOptions, ProgramOptions, TargetOptions

T = TypeVar("T", ProgramOptions, TargetOptions, ListenerOptions)


class ArgumentsError(Exception):
    """The program cannot start; the text is the line to print."""

    exit_code: ClassVar[int] = 1


class UsageError(ArgumentsError):
    """The command line or a variable is wrong. The line is followed by `usage`, as Go does, or by nothing."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.usage = usage


class MissingName(ArgumentsError):
    """No target, in the Go original's words."""

    def __init__(self) -> None:
        super().__init__("Missing required arguments *name*")


class ConfigError(ArgumentsError):
    """The command line is right, but a file that it names is not."""


class VariableError(ValueError):
    """A variable is wrong: the usage, which is about flags, does not follow."""


class Action(enum.Enum):
    """What to do with a subcommand."""

    RUN = enum.auto()
    VERSION = enum.auto()
    HELP = enum.auto()


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the user asked for.

    `engine` is empty for `relay`, and `routes` for all else. `warnings` are lines for the log, once there is
    one. `usage` is the text that HELP prints.
    """

    action: Action
    program: ProgramOptions = field(default_factory=ProgramOptions)
    target: TargetOptions = field(default_factory=TargetOptions)
    listener: ListenerOptions = field(default_factory=ListenerOptions)
    routes: tuple[ListenerSpec, ...] = ()
    engine: EngineAddress = field(default_factory=EngineAddress)
    warnings: tuple[str, ...] = ()
    usage: str = ""


@dataclass(frozen=True, slots=True)
class Subcommand:
    """One thing that the program does: its help, what reads its arguments, and what it runs.

    `read` raises ValueError for what is wrong. `run` returns the exit code.
    """

    usage: Callable[[], str]
    read: Callable[[Sequence[str], Mapping[str, str]], Arguments]
    run: Callable[[Arguments], int]


def read_options(
    rows: Sequence[options.Row],
    parsed: goflags.Parsed,
    environment: Mapping[str, str],
) -> Arguments:
    """The options of all classes. A flag beats its variable, which is then not even read."""
    if parsed.values.get("version"):
        return Arguments(Action.VERSION)
    unset = {row.name for row in rows} - parsed.values.keys()

    def read(cls: type[T]) -> T:
        flags = {row.name for row in options.rows(cls)} & parsed.values.keys()
        start = options.read_variables(cls(), environment, unset)
        return replace(start, **{name: parsed.values[name] for name in flags})

    listener, target, program = options.OPTION_CLASSES
    try:
        found = Arguments(Action.RUN, read(program), read(target), read(listener))
    except ValueError as error:
        raise VariableError(error) from None
    return Arguments(Action.VERSION) if found.program.version else found


def check_tls_files(arguments: Arguments) -> Arguments:
    """`arguments` with only those TLS files that are to be used, each readable. Raises ConfigError."""
    engine = arguments.engine
    if engine.tls is None:
        return arguments
    try:
        return replace(arguments, engine=replace(engine, tls=readable_files(engine.tls)))
    except ValueError as error:
        raise ConfigError(str(error)) from None
