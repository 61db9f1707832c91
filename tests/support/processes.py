"""Processes from outside: who descends from whom, who still lives, what they hold and use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.support.wait import wait_until

WORKER_TITLE = re.compile(r"grand-ambassador: \S+/(tcp|udp) ")

_libc = ctypes.CDLL(None, use_errno=True)
_STATES = {psutil.STATUS_ZOMBIE: "Z", psutil.STATUS_STOPPED: "T", psutil.STATUS_TRACING_STOP: "t"}


class Process(NamedTuple):
    """A process as it was when it was looked at."""

    pid: int
    parent: int
    state: str
    """Z, T, t, or "" for one that lives."""
    title: str


def read_process(pid: int) -> Process | None:
    """The process, or None where it is gone."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            state = _STATES.get(process.status(), "")
            title = "" if state == "Z" else " ".join(process.cmdline()).rstrip()
            return Process(pid, process.ppid(), state, title)
    except psutil.ZombieProcess:  # since
        return Process(pid, 0, "Z", "")
    except psutil.NoSuchProcess:
        return None


def descendants(root: int) -> list[Process]:
    """The living and the zombies below a process."""
    try:
        below = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for child in below if (process := read_process(child.pid)) is not None]


def children(pid: int) -> list[int]:
    """The processes that it has forked and not reaped, zombies among them."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def workers_of(root: int, listener: str = "") -> list[Process]:
    """Those of an ambassador, by its parent process: of one listener (`6379/tcp`), or all."""
    if listener:
        title = f"grand-ambassador: {listener} "
        return [process for process in descendants(root) if process.title.startswith(title)]
    return [process for process in descendants(root) if WORKER_TITLE.match(process.title)]


def is_gone(process: int | Process) -> bool:
    """No longer there, or dead and only not reaped yet (by whoever inherited it)."""
    now = read_process(process if isinstance(process, int) else process.pid)
    if now is None or now.state == "Z":
        return True
    return isinstance(process, Process) and now.title != process.title


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While in here, the process is stopped (SIGSTOP)."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(
            lambda: (now := read_process(pid)) and now.state in {"T", "t"},
            f"process {pid} does not stop",
        )
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def title(pid: int) -> str:
    process = read_process(pid)
    return process.title if process is not None else ""


def started_at(pid: int) -> float:
    """When it was forked, by CLOCK_BOOTTIME. (psutil counts from a boot that is rounded to seconds.)"""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def processor_s(pid: int) -> float:
    """The processor time that it has used, in steps of 10 ms."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def turns(pid: int) -> int:
    """How often it was given a processor. A process that sleeps and has had no turn made no system call."""
    return sum(psutil.Process(pid).num_ctx_switches())


def private_kb(pid: int) -> int:
    """The memory that is its own: 5 % of what is shared with its parent would hide any leak."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def descriptors(pid: int) -> dict[int, str]:
    """What it has open, by number: the targets of /proc/PID/fd."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            found[int(entry.name)] = str(entry.readlink())
    return found


def limit_descriptors(pid: int, soft: int) -> None:
    """Change RLIMIT_NOFILE of the running process."""
    # Allowed to whoever has its real user and group (prlimit(2)), or CAP_SYS_RESOURCE, which a
    # container's root lacks.
    said = status(pid)
    os.setresgid(int(said["Gid"].split()[0]), -1, -1)
    os.setresuid(int(said["Uid"].split()[0]), -1, -1)
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(soft, hard), hard))
    finally:
        os.setresuid(0, -1, -1)
        os.setresgid(0, -1, -1)


def sockets_of(pid: int) -> Iterator[socket.socket]:
    """Its own sockets, by pidfd_getfd(2); each is closed here when the next is asked for."""
    with contextlib.ExitStack() as stack:
        pidfd = os.pidfd_open(pid)
        stack.callback(os.close, pidfd)
        for number, what in descriptors(pid).items():
            if what.startswith("socket:"):
                with socket.socket(fileno=_getfd(pidfd, number)) as sock:
                    yield sock


def peer_of(sock: socket.socket) -> tuple[str, int] | None:
    """Whom it is connected to; None where it listens."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return None
    return host, port


@contextlib.contextmanager
def borrowed(pid: int, peer: tuple[str, int]) -> Iterator[socket.socket]:
    """The process's own socket that is connected to `peer`."""
    for sock in sockets_of(pid):
        if peer_of(sock) == peer:
            yield sock
            return
    raise AssertionError(f"process {pid} has no socket to {peer}")


def _getfd(pidfd: int, number: int) -> int:
    fd: int = _libc.syscall(438, pidfd, number, 0)  # SYS_pidfd_getfd
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return fd
