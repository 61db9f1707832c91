"""The two ends around a worker: sockets that close with the test, streams that can be checked."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ambassador.model import Backend

from .harness import TIMEOUT_S, Worker

BLOCK_BYTES = 8 << 20
_BLOCK = random.Random(20_260_101).randbytes(BLOCK_BYTES)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def destination(server: socket.socket, identity: int = 1) -> tuple[int, Backend]:
    """The server as a backend."""
    host, port = server.getsockname()[:2]
    return (identity, Backend(host, port))


class Peers:
    """Makes sockets, and closes all of them at the end."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        self._open.close()

    def keep(self, sock: socket.socket) -> socket.socket:
        sock.settimeout(TIMEOUT_S)
        return self._open.enter_context(sock)

    def bound(self, address: str = "127.0.0.1") -> socket.socket:
        """A TCP socket that has a port and refuses connections, until somebody calls listen()."""
        sock = self.keep(socket.socket(family_of(address), socket.SOCK_STREAM))
        sock.bind((address, 0))
        return sock

    def server(self, address: str = "127.0.0.1", backlog: int = 2048) -> socket.socket:
        sock = self.bound(address)
        sock.listen(backlog)
        return sock

    def accept(self, server: socket.socket) -> socket.socket:
        return self.keep(server.accept()[0])

    def connect(self, worker: Worker, address: str = "127.0.0.1") -> socket.socket:
        sock = self.keep(socket.socket(family_of(address), socket.SOCK_STREAM))
        sock.connect((address, worker.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def is_refused(self, worker: Worker) -> bool:
        """Whether a new connection is reset without a byte. Fails if it ends cleanly or lasts."""
        try:
            return read_to_reset(self.connect(worker)) == b""
        except ConnectionResetError:  # while connecting: the reset was faster than we
            return True

    def pair(
        self, worker: Worker, server: socket.socket, address: str = "127.0.0.1"
    ) -> tuple[socket.socket, socket.socket]:
        """A client, and the backend's end of its connection."""
        client = self.connect(worker, address)
        backend = self.accept(server)
        backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client, backend

    def udp(self, address: str = "127.0.0.1") -> socket.socket:
        sock = self.keep(socket.socket(family_of(address), socket.SOCK_DGRAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((address, 0))
        return sock


# ------------------------------------------------------------------------------------------------- ends


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_exactly(sock: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        data = sock.recv(min(count - len(got), 1 << 20))
        assert data, f"the end after {len(got)} of {count} bytes"
        got += data
    return bytes(got)


def read_to_end(sock: socket.socket) -> bytes:
    """Everything up to a clean end. A reset is an error (ConnectionResetError)."""
    got = bytearray()
    while data := sock.recv(1 << 20):
        got += data
    return bytes(got)


def read_to_reset(sock: socket.socket) -> bytes:
    """Everything up to a reset. A clean end is a failure."""
    got = bytearray()
    try:
        while data := sock.recv(1 << 20):
            got += data
    except ConnectionResetError:
        return bytes(got)
    pytest.fail(f"a clean end after {len(got)} bytes, where there should be a reset")


def fill(sock: socket.socket, data: bytes = b"x" * (1 << 20)) -> int:
    """Send `data` again and again until every buffer on the way is full. The bytes sent."""
    sent = 0
    timeout = sock.gettimeout()
    sock.settimeout(0.3)
    try:
        while True:
            sent += sock.send(memoryview(data)[sent % len(data) :])
    except TimeoutError:
        return sent
    finally:
        sock.settimeout(timeout)


# ---------------------------------------------------------------------------------------------- streams


def pattern(total: int) -> Iterator[memoryview]:
    """`total` bytes in which no two blocks are alike. Each piece is valid until the next is asked for."""
    block = bytearray(_BLOCK)
    for number in range((total + BLOCK_BYTES - 1) // BLOCK_BYTES):
        struct.pack_into("<Q", block, 0, number)
        yield memoryview(block)[: min(BLOCK_BYTES, total - number * BLOCK_BYTES)]


@functools.lru_cache
def pattern_digest(total: int) -> str:
    digest = hashlib.blake2b()
    for piece in pattern(total):
        digest.update(piece)
    return digest.hexdigest()


def send_pattern(sock: socket.socket, total: int) -> None:
    """Send it and half-close."""
    for piece in pattern(total):
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)


def check_pattern(sock: socket.socket, total: int) -> None:
    """Read up to a clean end; it must be the pattern, all of it."""
    digest = hashlib.blake2b()
    buffer = memoryview(bytearray(1 << 20))
    count = 0
    while got := sock.recv_into(buffer):
        digest.update(buffer[:got])
        count += got
    assert count == total
    assert digest.hexdigest() == pattern_digest(total), "the bytes are not those that were sent"


def exchange(client: socket.socket, backend: socket.socket, total: int) -> None:
    """The pattern both ways at once."""
    with ThreadPoolExecutor(4) as threads:
        jobs = [
            threads.submit(work, sock, total)
            for work in (check_pattern, send_pattern)
            for sock in (client, backend)
        ]
        for job in jobs:
            job.result()
