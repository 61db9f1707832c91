"""The command: reads the arguments, wires the objects and runs them. The only composition root.

The order matters. The fork server is forked before anything heavy is imported and before any thread exists;
that is why the imports of what only the parent needs stand inside functions.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from ambassador import __version__
from ambassador.cli.arguments import (
    Arguments,
    ArgumentsError,
    Command,
    check_tls_files,
    parse_arguments,
)
from ambassador.supervise.forkserver import ForkServer
from ambassador.system.titles import PROGRAM, set_title

MIN_DESCRIPTORS = 64
MIN_PROCESSES = 6
"""Parent, fork server, and threads for log, events, ping, own networks. Each target and port has one more."""

LOG_FLUSH_S = 0.3
"""What standard error gets to take the last lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code: 0, 1 for what cannot be set up, 2 for bad usage."""
    try:
        read = parse_arguments(sys.argv[1:] if arguments is None else arguments, os.environ)
        read = check_tls_files(read)
    except ArgumentsError as error:
        print(error, file=sys.stderr)
        print(getattr(error, "usage", ""), file=sys.stderr, end="")
        return error.exit_code
    if read.command is Command.VERSION:
        print(f"{PROGRAM} {__version__}")
        return 0
    if read.command is Command.HELP:
        print(read.usage, end="")
        return 0
    try:
        return _run(read)
    except (OSError, ImportError, MemoryError, RuntimeError) as error:
        problem = _start_problem(error, len(read.program.name) + len(read.routes))
        if not problem:
            raise
        print(f"{PROGRAM}: cannot start: {problem}", file=sys.stderr)
        return 1


def _start_problem(error: Exception, jobs: int) -> str:
    """What this machine has too little of, and what to do; "" if it is something else.

    Libraries that cannot be loaded and threads that cannot be started have no errno. `jobs` is how many
    targets and fixed ports there are.
    """
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in text:
        return f"too few descriptors, raise ulimit -n to {MIN_DESCRIPTORS} or more"
    if number == errno.EAGAIN or "start new thread" in text:
        least = f"{MIN_PROCESSES + jobs}, and one more for each port"
        return f"too few processes and threads, allow {least} (--pids-limit, ulimit -u)"
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        return "too little memory, allow 64 MB or more"
    return ""


def _run(arguments: Arguments) -> int:
    # As PID 1 a signal without a handler is ignored: until the supervisor has its own, stopping is easy.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every worker inherits it
    fork_server = ForkServer.fork()
    from ambassador.system import logs  # noqa: PLC0415 - after the fork, as all that only the parent needs

    lines = logs.setup(arguments.program.log_level)
    try:
        return _COMMANDS[arguments.command](arguments, fork_server)
    finally:
        lines.close(LOG_FLUSH_S)


def _relay(arguments: Arguments, fork_server: ForkServer) -> int:
    """To fixed addresses, with no Docker at all."""
    from ambassador.model import DesiredState  # noqa: PLC0415
    from ambassador.supervise.supervisor import Supervisor  # noqa: PLC0415

    set_title("relay")
    desired = DesiredState({spec.listen: spec for spec in arguments.routes})
    sandbox = arguments.program.sandbox
    return Supervisor(fork_server, lambda: desired, sandbox=sandbox).run()


def _follow(arguments: Arguments, fork_server: ForkServer) -> int:
    """Follow containers through the Docker Engine."""
    import logging  # noqa: PLC0415

    from ambassador.discovery.docker_source import DockerSource  # noqa: PLC0415
    from ambassador.engine.client import connect_engine  # noqa: PLC0415
    from ambassador.reconcile import merge  # noqa: PLC0415
    from ambassador.supervise.supervisor import Supervisor  # noqa: PLC0415

    names, engine = arguments.program.name, arguments.engine
    set_title(f"following {', '.join(names)}")
    log = logging.getLogger(__name__)
    for warning in arguments.warnings:
        log.warning("%s", warning)
    supervisor = Supervisor(
        fork_server,
        lambda: merge(source.targets(), arguments.listener),
        sandbox=arguments.program.sandbox,
    )
    source = DockerSource(
        lambda: connect_engine(engine.url, tls=engine.tls),
        names,
        network=arguments.target.network,
        on_change=supervisor.wake,
        log=log,
    )
    source.start()
    try:
        return supervisor.run()
    finally:
        source.stop()


_COMMANDS: Mapping[Command, Callable[[Arguments, ForkServer], int]] = {
    Command.FOLLOW: _follow,
    Command.RELAY: _relay,
}
