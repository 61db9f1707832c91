"""The command line and the environment, as one checked, immutable value.

    grand-ambassador [flags]                                    follow containers by name
    grand-ambassador relay [flags] 6379/tcp=10.0.0.5:6379 ...   relay to fixed addresses

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
from ambassador.cli.usage import follow_usage, relay_usage
from ambassador.engine.address import EngineAddress, engine_address, readable_files
from ambassador.model import ListenerSpec
from ambassador.options import ListenerOptions, ProgramOptions, TargetOptions
from ambassador.rules import parse_routes
from ambassador.values import escape, quote

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


class Command(enum.Enum):
    """What the program is to do."""

    FOLLOW = enum.auto()
    RELAY = enum.auto()
    VERSION = enum.auto()
    HELP = enum.auto()


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the user asked for.

    `engine` is empty for `relay`, and `routes` for all else. `warnings` are lines for the log, once there is
    one. `usage` is the text that HELP prints.
    """

    command: Command
    program: ProgramOptions = field(default_factory=ProgramOptions)
    target: TargetOptions = field(default_factory=TargetOptions)
    listener: ListenerOptions = field(default_factory=ListenerOptions)
    routes: tuple[ListenerSpec, ...] = ()
    engine: EngineAddress = field(default_factory=EngineAddress)
    warnings: tuple[str, ...] = ()
    usage: str = ""


class _VariableError(ValueError):
    """A variable is wrong: the usage, which is about flags, does not follow."""


def parse_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    """Read `arguments` (without the program's name). Raises UsageError or MissingName."""
    word = arguments[0] if arguments and arguments[0] in _SUBCOMMANDS else ""
    read, usage = _SUBCOMMANDS[word]
    try:
        return read(arguments[1:] if word else arguments, environment)
    except goflags.HelpRequested:
        return Arguments(Command.HELP, usage=usage())
    except ValueError as error:
        if not word and not isinstance(error, _VariableError):
            raise UsageError(str(error), usage()) from None
        command = f"grand-ambassador {word}".rstrip()
        raise UsageError(f"{error}; see {command} -help") from None


def _follow(arguments: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    rows = options.all_rows()
    parsed = goflags.parse(rows, arguments)
    if parsed.rest and not parsed.values.get("version"):
        raise ValueError(_unexpected(arguments, parsed.rest))
    read = _read_options(Command.FOLLOW, rows, parsed, environment)
    if read.command is Command.VERSION:
        return read
    if not read.program.name:
        raise MissingName
    sources = {row.name: row.variable for row in rows if environment.get(row.variable)}
    sources |= {row.name: f"flag -{row.key}" for row in rows if row.name in parsed.values}
    try:
        engine = engine_address(read.program, sources, environment)
    except ValueError as error:
        raise (error if "sock" in parsed.values else _VariableError(error)) from None
    wait = "" if read.program.wait else "-wait flag is deprecated and will not be used"
    return replace(read, engine=engine, warnings=tuple(filter(None, (wait, engine.warning))))


def _relay(arguments: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    rows = [row for row in options.all_rows() if row.relay]
    parsed = goflags.parse(rows, arguments)
    read = _read_options(Command.RELAY, rows, parsed, environment)
    if read.command is Command.VERSION:
        return read
    if not parsed.rest:
        raise ValueError("relay needs at least one route: write 6379/tcp=10.0.0.5:6379")
    return replace(read, routes=parse_routes(parsed.rest, read.listener))


_Reader = Callable[[Sequence[str], Mapping[str, str]], Arguments]
_SUBCOMMANDS: Mapping[str, tuple[_Reader, Callable[[], str]]] = {
    "": (_follow, follow_usage),
    "relay": (_relay, relay_usage),
}
"""By the first argument: what reads the others, and the help."""


def _read_options(
    command: Command,
    rows: Sequence[options.Row],
    parsed: goflags.Parsed,
    environment: Mapping[str, str],
) -> Arguments:
    """The options of all classes. A flag beats its variable, which is then not even read."""
    if parsed.values.get("version"):
        return Arguments(Command.VERSION)
    unset = {row.name for row in rows} - parsed.values.keys()

    def read(cls: type[T]) -> T:
        flags = {row.name for row in options.rows(cls)} & parsed.values.keys()
        start = options.read_variables(cls(), environment, unset)
        return replace(start, **{name: parsed.values[name] for name in flags})

    listener, target, program = options.OPTION_CLASSES
    try:
        found = Arguments(command, read(program), read(target), read(listener))
    except ValueError as error:
        raise _VariableError(error) from None
    return Arguments(Command.VERSION) if found.program.version else found


def _unexpected(arguments: Sequence[str], rest: Sequence[str]) -> str:
    """Why an argument that is no flag stands among the flags, and what to write."""
    line = f"unexpected argument {quote(rest[0])}"
    before = arguments[-len(rest) - 1] if len(arguments) > len(rest) else ""
    if rest[0].lower() in ("true", "false") and before.startswith("-") and before.strip("-"):
        return f"{line}: write {escape(before)}={rest[0]}"
    if rest[0] == "relay":
        return f"{line}: write it first, grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT"
    return f"{line}: write -name {quote(rest[0])} to follow a container of that name"


def check_tls_files(arguments: Arguments) -> Arguments:
    """`arguments` with only those TLS files that are to be used, each readable. Raises ConfigError."""
    engine = arguments.engine
    if engine.tls is None:
        return arguments
    try:
        return replace(arguments, engine=replace(engine, tls=readable_files(engine.tls)))
    except ValueError as error:
        raise ConfigError(str(error)) from None
