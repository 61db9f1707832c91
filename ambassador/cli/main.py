"""The command: reads the options, wires the objects and runs them. The only composition root.

The order matters. The fork server is forked before anything heavy is imported and before any thread exists;
that is why the imports of what only the parent needs stand inside functions.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ambassador import __version__
from ambassador.supervise.forkserver import ForkServer
from ambassador.cli.arguments import (
    Command,
    ConfigError,
    MissingName,
    Options,
    UsageError,
    check_tls_files,
    parse_options,
)
from ambassador.system.titles import PROGRAM, set_title

if TYPE_CHECKING:
    from ambassador.supervise.supervisor import Limits

LOG_FLUSH_S = 0.3
"""What standard error gets to take the last lines."""

MAX_SESSIONS = 16_384
SPARE_DESCRIPTORS = 64
"""Of a worker's limit: what is not a UDP session's socket."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code: 0, 1 for what cannot be set up, 2 for bad usage."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments, os.environ)
        if options.command is Command.VERSION:
            print(f"{PROGRAM} {__version__}")
            return 0
        if options.command is Command.HELP:
            print(options.usage, end="")
            return 0
        options = check_tls_files(options)
    except (UsageError, MissingName, ConfigError) as error:
        print(error, file=sys.stderr)
        print(getattr(error, "usage", ""), file=sys.stderr, end="")
        return error.exit_code
    # As PID 1 a signal without a handler is ignored: until the supervisor has its own, stopping is easy.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    descriptors = _raise_descriptor_limit()
    fork_server = ForkServer.fork()
    return _run(options, fork_server, descriptors)


def _raise_descriptor_limit() -> int:
    """Lift the soft limit to the hard one; inherited by every worker. The limit now."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def port_limits(asked: int, workers: int, descriptors: int) -> tuple[int, int]:
    """TCP connections of a port, and UDP sessions of each of its workers; 0 is asked for no number.

    Connections are counted in all workers of a port together. The kernel spreads UDP clients evenly over
    workers, so that each has its share of the sessions.
    """
    room = max(2, descriptors - SPARE_DESCRIPTORS)
    connections, sessions = workers * (room // 2), min(MAX_SESSIONS, room)
    if asked:
        connections, sessions = min(asked, connections), min(max(1, asked // workers), room)
    return connections, sessions


def _run(options: Options, fork_server: ForkServer, descriptors: int) -> int:
    import logging  # noqa: PLC0415 - after the fork, as all that the fork server has no use for

    from ambassador.system import logs  # noqa: PLC0415
    from ambassador.supervise.supervisor import Limits  # noqa: PLC0415

    lines = logs.setup(options.log_level)
    log = logging.getLogger(__name__)
    connections, sessions = port_limits(options.max_connections, options.workers, descriptors)
    if connections < options.max_connections:
        log.warning(
            "descriptors do not suffice for -max-connections %d: raise ulimit -n",
            options.max_connections,
            extra={"fields": {"connections": connections}},
        )
    limits = Limits(
        hold_ms=options.hold_ms,
        drain_ms=options.drain_ms,
        workers=options.workers,
        sandbox=options.sandbox,
        max_connections=connections,
        max_sessions=sessions,
        idle_ms=options.idle_ms,
        half_close_ms=options.half_close_ms,
        session_idle_ms=options.session_idle_ms,
    )
    held = {"connections": connections, "sessions": sessions * options.workers}
    log.info("each port can hold", extra={"fields": held})
    try:
        if options.command is Command.RELAY:
            return _relay(options, fork_server, limits)
        return _follow(options, fork_server, limits)
    finally:
        lines.close(LOG_FLUSH_S)


def _relay(options: Options, fork_server: ForkServer, limits: Limits) -> int:
    """To fixed addresses, with no Docker at all."""
    from ambassador.model import DesiredState  # noqa: PLC0415
    from ambassador.supervise.supervisor import Supervisor  # noqa: PLC0415

    set_title("relay")
    desired = DesiredState({route.listener: route for route in options.routes})
    return Supervisor(fork_server, lambda: desired, limits).run()


def _follow(options: Options, fork_server: ForkServer, limits: Limits) -> int:
    """Follow containers through the Docker Engine."""
    import logging  # noqa: PLC0415

    from ambassador.discovery.docker_source import DockerSource, connect_engine  # noqa: PLC0415
    from ambassador.reconcile import merge  # noqa: PLC0415
    from ambassador.supervise.supervisor import Supervisor  # noqa: PLC0415

    set_title(f"following {', '.join(options.targets)}")
    log = logging.getLogger(__name__)
    for warning in options.warnings:
        log.warning("%s", warning)
    supervisor = Supervisor(fork_server, lambda: merge(discovery.states()), limits)
    discovery = DockerSource(
        lambda: connect_engine(options.docker_host, tls=options.tls),
        options.targets,
        network=options.network,
        on_change=supervisor.wake,
        log=log,
    )
    discovery.start()
    try:
        return supervisor.run()
    finally:
        discovery.stop()
