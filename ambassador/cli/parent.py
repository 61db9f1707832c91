"""Starts a parent: what every subcommand that relays does first, and in which order.

The fork server is forked before anything heavy is imported and before any thread exists. So the imports of
what only the parent needs stand inside functions, here and in the subcommands.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

from ambassador.cli.arguments import Arguments
from ambassador.supervise.forkserver import ForkServer

LOG_FLUSH_S = 0.3
"""What standard error gets to take the last lines."""


def run_parent(arguments: Arguments, supervise: Callable[[Arguments, ForkServer], int]) -> int:
    """Fork the fork server, set up the log, and run `supervise`. Returns its exit code."""
    # As PID 1 a signal without a handler is ignored: until the supervisor has its own, stopping is easy.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every worker inherits it
    fork_server = ForkServer.fork()
    from ambassador.system import logs  # noqa: PLC0415 - after the fork, as all that only the parent needs

    lines = logs.setup(arguments.program.log_level)
    try:
        return supervise(arguments, fork_server)
    finally:
        lines.close(LOG_FLUSH_S)
