"""The two ends around an ambassador: servers that name themselves, echo and record, and checked clients.

A server runs in a thread of the test, or in a container, which needs this text and Python only:

    python3 -c TEXT NAME PORT/PROTOCOL ...

There it prints `listening TIME` when a run begins, then a line for every connection and every datagram.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, Self

TIMEOUT_S = 20.0
PORT = 7000
"""Of servers in containers."""

EAT = b"eat all memory\n"
"""A client that begins with this has the server's container killed for want of memory."""

READ_BYTES = 1 << 20
UDP_SEGMENT = 103
"""linux/udp.h; the socket module has no name for it."""

Address = tuple[str, int]


# ----------------------------------------------------------------------------------------------- server


class Server:
    """Echoes over TCP and UDP. Leaving it closes its connections and raises what went wrong.

    - With a name it greets over TCP with `NAME ADDRESS\\n`, the address that the client reached, and answers
      each datagram with `NAME ` and the datagram. It answers end of file with its own.
    - With `record`, a connection is made of records of so many bytes, all alike: that is how a byte that
      crossed over would show.
    - It never waits for one client, so one that does not read stops nobody else.
    """

    def __init__(
        self,
        *sockets: socket.socket,
        record: int = 0,
        name: str = "",
        say: Callable[..., None] = lambda *_: None,
    ) -> None:
        self._sockets = sockets
        self._record = record
        self._name = name
        self._say = say
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None
        self._selector = selectors.DefaultSelector()
        self._unsent: dict[socket.socket, bytes] = {}
        self._tags: dict[socket.socket, bytes] = {}
        self._rest: dict[socket.socket, bytes] = {}
        self.accepted = 0
        self.resets = 0

    @property
    def port(self) -> int:
        return port_of(self._sockets[0])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._wake.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._woken.close()
        self._selector.close()
        for sock in self._unsent:
            sock.close()
        if self._error is not None:
            raise self._error from error

    def _run(self) -> None:
        try:
            self.serve()
        except BaseException as error:  # noqa: BLE001 - raised again where the test is
            self._error = error

    def serve(self) -> None:
        """Until it is left; for ever, in the thread that calls this."""
        for one in (*self._sockets, self._woken):
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._woken:
                    return
                if sock in self._unsent:
                    self._move(sock)
                elif sock.type == socket.SOCK_STREAM:
                    self._accept(sock)
                else:
                    self._answer_datagrams(sock)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, peer = listener.accept()
                self.accepted += 1
                self._say("connection", port_of(listener), plain(peer[0]))
                sock.setblocking(False)
                self._unsent[sock] = self._greeting(sock)
                self._tags[sock] = self._rest[sock] = b""
                self._selector.register(sock, selectors.EVENT_READ)
                self._move(sock)

    def _greeting(self, sock: socket.socket) -> bytes:
        return f"{self._name} {plain(sock.getsockname()[0])}\n".encode() if self._name else b""

    def _move(self, sock: socket.socket) -> None:
        """Send what is left; read the next only when all is sent."""
        try:
            with contextlib.suppress(BlockingIOError):
                if not self._unsent[sock]:
                    data = sock.recv(1 << 16)
                    if not data:
                        self._forget(sock)
                        return
                    self._check(sock, data)
                    self._unsent[sock] = data
                if self._unsent[sock]:
                    self._unsent[sock] = self._unsent[sock][sock.send(self._unsent[sock]) :]
        except (ConnectionResetError, BrokenPipeError):
            self.resets += 1
            self._forget(sock)
            return
        wanted = selectors.EVENT_WRITE if self._unsent[sock] else selectors.EVENT_READ
        if self._selector.get_key(sock).events != wanted:
            self._selector.modify(sock, wanted)

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._unsent[sock], self._tags[sock], self._rest[sock]
        sock.close()

    def _check(self, sock: socket.socket, data: bytes) -> None:
        if self._name and data == EAT:
            eaten = []
            while True:
                eaten.append(b"x" * (1 << 20))
        if not self._record:
            return
        data = self._rest[sock] + data
        whole = len(data) // self._record
        self._rest[sock] = data[whole * self._record :]
        if whole:
            tag = self._tags[sock] or data[: self._record]
            self._tags[sock] = tag
            assert data[: whole * self._record] == tag * whole, "bytes of another connection"

    def _answer_datagrams(self, sock: socket.socket) -> None:
        prefix = f"{self._name} ".encode() if self._name else b""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, peer = sock.recvfrom(1 << 16)
                self._say("datagram", port_of(sock), plain(peer[0]), len(data))
                with contextlib.suppress(OSError):  # the client left
                    sock.sendto(prefix + data, peer)


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def dual_stack(protocol: str, port: int) -> socket.socket:
    """A socket that is reached over IPv4 and IPv6, at every address; over TCP it listens."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    if protocol != "udp":
        sock.listen(1024)
    return sock


def main(name: str, ports: Sequence[str]) -> None:
    # The first process of a container ignores signals that it has no handler for.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))

    def say(*words: object) -> None:
        print(*words, flush=True)

    split = [text.partition("/") for text in ports]
    sockets = [dual_stack(protocol, int(port)) for port, _, protocol in split]
    say("listening", time.time())
    Server(*sockets, name=name, say=say).serve()


# --------------------------------------------------------------------------------------- sockets, streams


class HasPort(Protocol):
    """A worker, or whatever listens for clients."""

    @property
    def port(self) -> int: ...


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

    def connect(self, to: HasPort | int, address: str = "127.0.0.1") -> socket.socket:
        port = to if isinstance(to, int) else to.port
        sock = self.keep(socket.socket(family_of(address), socket.SOCK_STREAM))
        sock.connect((address, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def is_refused(self, worker: HasPort) -> bool:
        """Whether a new connection is reset without a byte. Fails if it ends cleanly or lasts."""
        try:
            return read_to_reset(self.connect(worker)) == b""
        except ConnectionResetError:  # while connecting: the reset was faster than we
            return True

    def pair(
        self, worker: HasPort, server: socket.socket, address: str = "127.0.0.1"
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


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_exactly(sock: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        data = sock.recv(min(count - len(got), READ_BYTES))
        assert data, f"the end after {len(got)} of {count} bytes"
        got += data
    return bytes(got)


def read_to_end(sock: socket.socket) -> bytes:
    """Everything up to a clean end. A reset is an error (ConnectionResetError)."""
    got = bytearray()
    while data := sock.recv(READ_BYTES):
        got += data
    return bytes(got)


def read_to_reset(sock: socket.socket) -> bytes:
    """Everything up to a reset. A clean end is a failure."""
    got = bytearray()
    try:
        while data := sock.recv(READ_BYTES):
            got += data
    except ConnectionResetError:
        return bytes(got)
    raise AssertionError(f"a clean end after {len(got)} bytes, where there should be a reset")


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


# -------------------------------------------------------------------------------------------------- tapes
#
# What one end sends is its tape: eight bytes that name it, then bytes that only it sends, by their position.
# So whoever reads knows whose bytes these are, and sees one that is missing, altered or a stranger's.

NAME_BYTES = 8
TAPE_BYTES = 65_537  # then it begins again: no power of two, which a loop might lose as one piece

names = itertools.count(1)
"""Of ends, each one's own."""


@functools.lru_cache(1024)
def tape(name: int) -> bytes:
    """Twice, so that any piece of up to TAPE_BYTES is one slice."""
    filler = random.Random(name).randbytes(TAPE_BYTES - NAME_BYTES)
    return 2 * (name.to_bytes(NAME_BYTES, "big") + filler)


def piece(name: int, start: int, count: int) -> memoryview:
    """What comes at this place of the tape: so many bytes, or TAPE_BYTES if that is less."""
    start %= TAPE_BYTES
    return memoryview(tape(name))[start : start + min(count, TAPE_BYTES)]


def check_piece(name: int, start: int, data: bytes) -> None:
    """`data` must be what comes at this place of the tape."""
    for offset in range(0, len(data), TAPE_BYTES):
        part = data[offset : offset + TAPE_BYTES]
        begin = (start + offset) % TAPE_BYTES
        assert part == tape(name)[begin : begin + len(part)], (
            f"wrong bytes after {start + offset} of tape {name}"
        )


def send_tape(sock: socket.socket, name: int, total: int) -> None:
    """Send so much of it and half-close."""
    sent = 0
    while sent < total:
        part = piece(name, sent, total - sent)
        sock.sendall(part)
        sent += len(part)
    sock.shutdown(socket.SHUT_WR)


def check_tape(sock: socket.socket, name: int, total: int) -> None:
    """Read up to a clean end; it must be the tape, so much of it."""
    count = 0
    while data := sock.recv(READ_BYTES):
        check_piece(name, count, data)
        count += len(data)
    assert count == total


def exchange(client: socket.socket, backend: socket.socket, total: int) -> None:
    """A tape each way, both at once."""
    sends, hears = next(names), next(names)
    with ThreadPoolExecutor(4) as threads:
        jobs = [
            threads.submit(check_tape, backend, sends, total),
            threads.submit(check_tape, client, hears, total),
            threads.submit(send_tape, client, sends, total),
            threads.submit(send_tape, backend, hears, total),
        ]
        for job in jobs:
            job.result()


# ---------------------------------------------------------------------------------------------- datagrams

_FILLER = random.Random(8).randbytes(1 << 17)
_HEAD = struct.Struct("<IIH")
SMALLEST = _HEAD.size


def datagram(sender: int, number: int, size: int) -> bytes:
    """What nobody else sends: its bytes tell its sender, its number and its length."""
    head = _HEAD.pack(sender, number, size & 0xFFFF)
    start = (sender * 7919 + number * 104_729) % 1000
    return (head + _FILLER[start : start + size])[:size]


def number_of(data: bytes) -> tuple[int, int]:
    """Sender and number of a datagram, which must be unaltered."""
    sender, number, size = _HEAD.unpack_from(data)
    assert size == len(data) & 0xFFFF, f"{len(data)} bytes instead of {size}"
    assert data == datagram(sender, number, len(data)), "the bytes are altered"
    return sender, number


def numbers(got: Iterable[bytes]) -> list[int]:
    return [number_of(data)[1] for data in got]


def send_run(sock: socket.socket, address: Address | None, run: Sequence[bytes]) -> None:
    """One message of equal datagrams, the last one maybe shorter, as one UDP_SEGMENT send."""
    size = len(run[0])
    assert all(len(data) == size for data in run[:-1])
    assert 0 < len(run[-1]) <= size
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
    sock.sendmsg(run, control if len(run) > 1 else [], 0, *([address] if address else []))


def receive(sock: socket.socket, count: int) -> list[bytes]:
    """The next so many datagrams."""
    got: list[bytes] = []
    while len(got) < count:
        try:
            got.append(sock.recv(1 << 17))
        except TimeoutError:
            raise AssertionError(f"only {len(got)} of {count} datagrams came") from None
    return got


def is_silent(sock: socket.socket, for_s: float = 0.1) -> bool:
    """Whether nothing is there, and nothing comes in this time."""
    timeout = sock.gettimeout()
    sock.settimeout(for_s)
    try:
        sock.recv(1 << 17)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(timeout)
    return False


def talk(client: socket.socket, to: Address, server: socket.socket) -> Address:
    """A datagram there and one back: an established session. Its address as the server sees it."""
    client.sendto(b"ping", to)
    data, session = server.recvfrom(100)
    assert data == b"ping"
    server.sendto(b"pong", session)
    assert client.recv(100) == b"pong"
    host, port = session[:2]
    return host, port


def client_of(peers: Peers, address: str, to: Address) -> socket.socket:
    """A client whose socket is connected, so that it only takes what comes from there."""
    client = peers.udp("::" if family_of(address) == socket.AF_INET6 else "0.0.0.0")
    client.connect(to)
    return client


# ------------------------------------------------------------------------------ clients of a named server


class Conversation:
    """A TCP connection; a context manager that closes it."""

    def __init__(self, host: str, port: int = PORT, timeout: float = TIMEOUT_S) -> None:
        self.socket = socket.create_connection((host, port), timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, count: int) -> bytes:
        return read_exactly(self.socket, count)

    def greeting(self) -> tuple[str, str]:
        """What the server says first: its name, and the address that it was reached at."""
        line = bytearray()
        while not line.endswith(b"\n"):
            line += self.read(1)
        name, _, address = line.decode().strip().partition(" ")
        return name, address

    def ask(self, data: bytes) -> bytes:
        """Send, and read as much of the echo."""
        self.send(data)
        return self.read(len(data))

    def ending(self, timeout: float = TIMEOUT_S) -> str:
        """`reset` or `end`, after whatever comes before it. TimeoutError where it goes on."""
        deadline = time.monotonic() + timeout
        while True:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                if not self.socket.recv(1 << 16):
                    return "end"
            except ConnectionResetError:
                return "reset"

    def is_held(self, seconds: float) -> bool:
        """Whether it stays open for so long without a word, no end and no reset."""
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        except ConnectionResetError:
            return False
        finally:
            self.socket.settimeout(TIMEOUT_S)
        return False


def greet(host: str, port: int = PORT) -> str:
    """Connect once; the name of the server that answers."""
    with Conversation(host, port) as conversation:
        return conversation.greeting()[0]


def is_greeted_by(name: str, host: str, port: int = PORT) -> bool:
    """Whether that server answers now. While another is being left, a reset is no answer."""
    try:
        return greet(host, port) == name
    except ConnectionError:
        return False


def accepts(host: str, port: int = PORT) -> bool:
    """Whether a connection is taken, held or not; False where it is refused."""
    try:
        Conversation(host, port).socket.close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True


class Answer(NamedTuple):
    data: bytes
    source: str
    """The address that it came from."""


class Caller:
    """One UDP socket, kept open and unconnected: it sees where answers come from."""

    def __init__(self, host: str, port: int = PORT) -> None:
        self.host, self.port = host, port
        self.socket = socket.socket(family_of(host), socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendto(data, (self.host, self.port))

    def receive(self, timeout: float) -> Answer | None:
        """The next datagram from anywhere, or None where none comes in time."""
        self.socket.settimeout(max(timeout, 0.001))
        try:
            data, source = self.socket.recvfrom(1 << 16)
        except TimeoutError:
            return None
        return Answer(data, source[0])

    def ask(self, data: bytes, timeout: float = 1.0) -> Answer | None:
        """Send, and wait for the answer to it: late ones to earlier questions are passed over."""
        self.send(data)
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            answer = self.receive(left)
            if answer is not None and answer.data.endswith(data):
                return answer
        return None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
