"""The fork server: the slim process that forks workers, and the parent's handle on it.

The parent forks it before it imports the Docker client or starts a thread. The compiled loops are loaded and
the garbage collector is frozen, so a worker shares nearly every page with it (figures: docs/design.md).

Its loop, which forks and reaps, is compiled (_forkserver.pyx says why, and has the messages).

Invariants:

- The fork server never has a thread, and runs nothing but that loop once it serves.
- It exits with the parent, and kills the children that are left.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ambassador import _forkserver, _worker
from ambassador.system.titles import set_title

_MESSAGE = struct.Struct("=iii")  # kind, pid, status: message_t of _forkserver.pyx


class ForkServerGone(Exception):
    """The fork server has exited. Its workers go on; new ones need a new fork server."""


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker was forked, in the order of the requests. The receiver owns `pidfd`, -1 if none arrived.

    If it could not be forked, `pid` is the negative errno.
    """

    pid: int
    pidfd: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker exited. `status` is a wait status (os.waitstatus_to_exitcode)."""

    pid: int
    status: int


class ForkServer:
    """The parent's handle. `fork` is for the start of the program, `launch` for any time later."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._socket = sock
        self.pid = pid
        sock.setblocking(False)

    @classmethod
    def fork(cls) -> ForkServer:
        """Fork the fork server off this process, which must not have threads yet. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            serve(theirs)
        theirs.close()
        return cls(ours, pid)

    @classmethod
    def launch(cls) -> ForkServer:
        """Start a fork server as a new program: forking is not safe once there are threads.

        Raises OSError if there is no process or no descriptor to be had.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = str(theirs.fileno())
        # -P: else a module in the working directory would be taken for one of ours.
        command = [sys.executable, "-P", "-m", "ambassador.supervise.forkserver", fd]
        try:
            with theirs:
                child = subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                )
        except BaseException:
            ours.close()
            raise
        child.returncode = 0  # the parent's loop reaps it, like every other child
        return cls(ours, child.pid)

    def fileno(self) -> int:
        return self._socket.fileno()

    def request(self, descriptors: Sequence[int]) -> None:
        """Ask for a worker with these. Raises ForkServerGone, BlockingIOError if it is stuck, or OSError."""
        try:
            socket.send_fds(self._socket, [b"F"], list(descriptors))
        except ConnectionError as error:
            raise ForkServerGone from error

    def receive(self) -> Forked | Exited | None:
        """The next message, or None if there is none now. Raises ForkServerGone, or OSError."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE.size, 1)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise ForkServerGone from error
        if len(data) != _MESSAGE.size:
            raise ForkServerGone
        kind, pid, status = _MESSAGE.unpack(data)
        if kind == _forkserver.FORKED_MESSAGE:
            return Forked(pid, fds[0] if fds else -1)
        return Exited(pid, status)

    @property
    def stopped(self) -> bool:
        """Whether it is stopped (SIGSTOP). SIGCHLD says that this may have changed."""
        try:
            options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, options) is not None
        except ChildProcessError:  # it has exited
            return False

    def kill(self) -> None:
        """For one that is stopped. Its workers go on."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close its socket: it kills its children and exits."""
        self._socket.close()


# ----------------------------------------------------------------------------------------- the process


def serve(sock: socket.socket) -> NoReturn:
    """The fork server's life. Never returns; a worker leaves it through os._exit as well."""
    # Ctrl-C goes to the whole process group and systemd's SIGTERM to the whole cgroup. Only the parent obeys
    # them; the workers inherit this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    set_title("fork server")
    gc.collect()
    gc.disable()
    gc.freeze()  # else the first collection in a worker would touch, and so copy, every object's page
    passed_fds = _forkserver.serve(sock.fileno())
    status = 0
    if passed_fds is not None:  # this is a new worker
        status = _worker.EXIT_BROKEN
        try:
            status = _worker.main(*passed_fds)
        except BaseException as error:  # noqa: BLE001 - the process ends here whatever it was
            with contextlib.suppress(OSError):
                os.write(
                    2, f"worker {os.getpid()}: {error!r}\n".encode("utf-8", "backslashreplace")
                )
    os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
