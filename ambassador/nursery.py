"""The nursery: the slim process that forks workers, and the parent's handle on it.

It is forked by the parent before the parent imports the Docker client or starts a thread, with the
compiled loops loaded and the garbage collector frozen, so that a worker shares nearly every page with it
(docs/design.md has the table of what other ways cost).

Messages over the Unix socket pair (SOCK_SEQPACKET, so each is whole), the parent asking first:

    fork      parent -> nursery   three descriptors: listener, control pipe, counters
    forked    nursery -> parent   the pid, and a pidfd
    exited    nursery -> parent   the pid, and the wait status

Invariants:

- The nursery never has a thread, and never runs anything but this loop.
- It keeps no descriptor of a worker beyond the fork, so workers never see each other's.
- It ends with the parent, and takes what is left of its children with it: a worker that is stopped or
  stuck would not notice the end of its control pipe.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import NoReturn

from ambassador import worker
from ambassador.titles import set_title

_FORK = b"F"
_FORKED = struct.Struct("<ci")
_EXITED = struct.Struct("<cii")
_MESSAGE_BYTES = 64
_DESCRIPTORS = 3


class NurseryGone(Exception):
    """The nursery died: its workers go on, new ones need a new nursery."""


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker was made, in the order of the requests. The receiver owns `pidfd`.

    Where it could not be made, `pid` is the negative errno and there is no pidfd (-1).
    """

    pid: int
    pidfd: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker ended. `status` is a wait status (os.waitstatus_to_exitcode)."""

    pid: int
    status: int


class Nursery:
    """The parent's handle. `fork` is for the start of the program, `launch` for any time later."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._socket = sock
        self.pid = pid
        sock.setblocking(False)

    @classmethod
    def fork(cls) -> Nursery:
        """Fork the nursery off this process, which must not have threads yet."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            serve(theirs)
        theirs.close()
        return cls(ours, pid)

    @classmethod
    def launch(cls) -> Nursery:
        """Start a nursery as a new program: forking is not safe once there are threads."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
                [sys.executable, "-m", "ambassador.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        child.returncode = 0  # the parent's loop reaps it, like every other child
        return cls(ours, child.pid)

    def fileno(self) -> int:
        return self._socket.fileno()

    def request(self, descriptors: tuple[int, int, int]) -> None:
        """Ask for a worker with these. Raises NurseryGone, or BlockingIOError if it is stuck."""
        try:
            socket.send_fds(self._socket, [_FORK], list(descriptors))
        except (BrokenPipeError, ConnectionError) as error:
            raise NurseryGone from error

    def receive(self) -> Forked | Exited | None:
        """The next message, or None when there is none now. Raises NurseryGone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise NurseryGone from error
        if len(data) == _FORKED.size:
            return Forked(_FORKED.unpack(data)[1], fds[0] if fds else -1)
        if len(data) == _EXITED.size:
            return Exited(*_EXITED.unpack(data)[1:])
        raise NurseryGone

    def close(self) -> None:
        """Let go of it: it ends, and takes its children with it."""
        self._socket.close()


# ----------------------------------------------------------------------------------------- the process


def serve(sock: socket.socket) -> NoReturn:
    """The nursery's life. Never returns; workers leave it through os._exit as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    set_title("nursery")
    gc.collect()
    gc.disable()
    gc.freeze()  # else the first collection in a worker would touch, and so copy, every object's page
    children: dict[int, int] = {}
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        while True:
            for fd, _ in poll.poll():
                if fd != sock.fileno():
                    _bury(sock, poll, fd, children.pop(fd))
                elif not _fork_worker(sock, poll, children):
                    _end(children)
    except OSError:
        _end(children)


def _fork_worker(sock: socket.socket, poll: select.poll, children: dict[int, int]) -> bool:
    """Serve one request; False when the parent is gone."""
    data, ancillary, _, _ = sock.recvmsg(
        _MESSAGE_BYTES, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
    )
    if not data:
        return False
    descriptors = array.array("i")
    for _, _, received in ancillary:
        descriptors.frombytes(received)
    try:
        pid = os.fork()
    except OSError as error:  # a limit on processes or memory: the parent tries again later
        pid = -(error.errno or 1)
    if pid == 0:
        _become_worker(descriptors)
    for fd in descriptors:
        os.close(fd)
    if pid < 0:
        sock.send(_FORKED.pack(b"P", pid))
        return True
    pidfd = os.pidfd_open(pid)
    children[pidfd] = pid
    poll.register(pidfd, select.POLLIN)
    socket.send_fds(sock, [_FORKED.pack(b"P", pid)], [pidfd])
    return True


def _become_worker(descriptors: array.array[int]) -> NoReturn:
    """In the child: keep standard error and the three descriptors, nothing else."""
    status = worker.EXIT_BROKEN
    try:
        high = os.sysconf("SC_OPEN_MAX")
        # First out of the way of the places they go to.
        kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + 2 * _DESCRIPTORS) for fd in descriptors]
        for place, fd in enumerate(kept, 3):
            os.dup2(fd, place, inheritable=False)
        os.closerange(3 + len(kept), high)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        status = worker.main(*range(3, 3 + len(kept)))
    except BaseException as error:  # noqa: BLE001 - the process ends here whatever it was
        with contextlib.suppress(OSError):
            os.write(2, f"worker {os.getpid()}: {error!r}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(status)


def _bury(sock: socket.socket, poll: select.poll, pidfd: int, pid: int) -> None:
    poll.unregister(pidfd)
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    sock.send(_EXITED.pack(b"X", pid, status))


def _end(children: dict[int, int]) -> NoReturn:
    for pidfd in children:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
