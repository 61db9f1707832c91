"""Starts a parent: what every subcommand that relays does first, and in which order.

The fork server is forked before anything heavy is imported and before any thread exists. So the imports of
what only the parent needs stand inside functions, here and in the subcommands.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable

from ambassador.cli.arguments import Arguments
from ambassador.supervise.forkserver import ForkServer
from ambassador.system.titles import PROGRAM

MIN_DESCRIPTORS = 64
MIN_PROCESSES = 6
"""Parent, fork server, and threads for log, events, ping, own networks. Each target and port has one more."""

LOG_FLUSH_S = 0.3
"""What standard error gets to take the last lines."""


def run_parent(arguments: Arguments, supervise: Callable[[Arguments, ForkServer], int]) -> int:
    """Fork the fork server, set up the log, and run `supervise`. Returns its exit code.

    If this machine has too little of something to start, that is one line, and 1.
    """
    try:
        return _run(arguments, supervise)
    except (OSError, ImportError, MemoryError, RuntimeError) as error:
        problem = _start_problem(error, len(arguments.program.name) + len(arguments.routes))
        if not problem:
            raise
        print(f"{PROGRAM}: cannot start: {problem}", file=sys.stderr)
        return 1


def _run(arguments: Arguments, supervise: Callable[[Arguments, ForkServer], int]) -> int:
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
