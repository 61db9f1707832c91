"""A worker's own sockets, to ask the kernel about them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator

import pytest

from .harness import Worker

SYS_PIDFD_GETFD = 438
SYS_PIDFD_OPEN = 434


def peer_of(sock: socket.socket) -> tuple[str, int] | None:
    try:
        address: tuple[str, int] = sock.getpeername()[:2]
    except OSError:
        return None  # it listens
    return address


def sockets_of(worker: Worker) -> Iterator[socket.socket]:
    """The worker's own sockets, by pidfd_getfd(2); each is closed here when the next is asked for."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = libc.syscall(SYS_PIDFD_OPEN, worker.pid, 0)
    try:
        for number, what in worker.descriptors().items():
            if not what.startswith("socket:"):
                continue
            fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
            if fd < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            with socket.socket(fileno=fd) as sock:
                yield sock
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def borrowed(worker: Worker, peer: tuple[str, int]) -> Iterator[socket.socket]:
    """The worker's own socket that is connected to `peer`."""
    for sock in sockets_of(worker):
        if peer_of(sock) == peer:
            yield sock
            return
    pytest.fail(f"the worker has no socket to {peer}")
