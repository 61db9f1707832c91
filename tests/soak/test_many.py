"""Many at once and many in a row, through `relay` to an echo server on this machine."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import psutil

from tests.soak import samples
from tests.soak.report import milliseconds, say, table
from tests.soak.samples import KINDS, Use
from tests.support.endpoints import Server
from tests.support.net import free_port
from tests.support.program import Program
from tests.support.wait import wait_until

IDLE = 9_000
SESSIONS = 10_000
ROW = 100_000
BURST = 64
HERE = "127.0.0.1"


@contextlib.contextmanager
def relay(kind: socket.SocketKind) -> Iterator[tuple[int, int]]:
    """Put an ambassador before an echo server; yield its port and its process id."""
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with socket.socket(socket.AF_INET, kind) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        server.bind((HERE, 0))
        if kind == socket.SOCK_STREAM:
            server.listen(4096)
        port = free_port()
        with Server(server) as echo:
            ambassador = Program("relay", f"{port}/{protocol}={HERE}:{echo.port}")
            try:
                ambassador.wait_for_line("listening")
                time.sleep(1)
                yield port, ambassador.pid
            finally:
                ambassador.stop()


def ask(sock: socket.socket, word: bytes) -> None:
    sock.sendall(word)
    assert sock.recv(len(word), socket.MSG_WAITALL) == word


def connect(port: int) -> socket.socket:
    return socket.create_connection((HERE, port), 30)


def bytes_each(before: dict[str, Use], now: dict[str, Use], count: int) -> str:
    return f"{(now['workers'].pss - before['workers'].pss) / count:.0f} bytes"


def check_nothing_is_left(pid: int, before: dict[str, Use]) -> None:
    """Wait until the workers have the descriptors that they had; look at the others."""
    most = before["workers"].descriptors
    wait_until(lambda: samples.look(pid)["workers"].descriptors <= most, "no rest", 10, 0.2)
    after = samples.look(pid)
    for kind in KINDS:
        assert after[kind].descriptors <= before[kind].descriptors, kind


def test_idle_connections(minutes: float) -> None:
    """Many are open while others come and go; each is asked again at the end."""
    with relay(socket.SOCK_STREAM) as (port, pid):
        before = samples.look(pid)
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]

        def cpu_seconds() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connect(port)) for _ in range(IDLE)]
            for number, sock in enumerate(held):
                ask(sock, b"%06d" % number)
            full, work, begun = samples.look(pid), cpu_seconds(), time.monotonic()
            say(f"{IDLE:,} connections are open")
            times: list[float] = []
            while time.monotonic() - begun < 60 * minutes:
                at = time.monotonic()
                with connect(port) as sock:
                    ask(sock, b"hello")
                times.append(time.monotonic() - at)
                time.sleep(0.01)
            took = time.monotonic() - begun
            share = 100 * (cpu_seconds() - work) / took
            for number, sock in enumerate(held):
                ask(sock, b"%06d" % (IDLE - number))
        check_nothing_is_left(pid, before)
    table(
        f"{IDLE:,} idle connections for {took:.0f} s, every one answered before and after",
        ("memory of each", "processor time"),
        (bytes_each(before, full, IDLE), f"{share:.2f} % of a core"),
    )
    title = "Others meanwhile, from connect to echo, ms"
    table(title, ("connections", "p50", "p99", "slowest"), milliseconds(times))


def test_udp_sessions() -> None:
    """As many clients, each with a socket of its own, each asked twice."""
    with relay(socket.SOCK_DGRAM) as (port, pid), contextlib.ExitStack() as stack:
        before = samples.look(pid)
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(SESSIONS)]
        for client in map(stack.enter_context, sockets):
            client.connect((HERE, port))
            client.settimeout(5)
        begun = time.monotonic()
        for turn in (b"first", b"second"):
            for at in range(0, SESSIONS, BURST):
                some = list(enumerate(sockets[at : at + BURST], at))
                for number, client in some:
                    client.send(turn + b" %06d" % number)
                for number, client in some:
                    assert client.recv(100) == turn + b" %06d" % number, "another's answer"
        took, full = time.monotonic() - begun, samples.look(pid)
    assert full["workers"].descriptors - before["workers"].descriptors == SESSIONS
    table(
        f"{SESSIONS:,} UDP sessions at once, two datagrams each, all answered",
        ("memory of each", "time"),
        (bytes_each(before, full, SESSIONS), f"{took:.1f} s"),
    )


def test_connections_in_a_row() -> None:
    """One after the other: memory stays from the tenth part to the last."""
    with relay(socket.SOCK_STREAM) as (port, pid):
        begun = time.monotonic()
        early = before = samples.look(pid)
        for number in range(ROW):
            with connect(port) as sock:
                ask(sock, b"%06d" % number)
            if number == ROW // 10:
                early = samples.look(pid)
        took = time.monotonic() - begun
        check_nothing_is_left(pid, before)
        late = samples.look(pid)
    for kind in KINDS:
        assert not samples.has_grown(early[kind].pss, late[kind].pss), kind
    grown = (f"{(late[kind].pss - early[kind].pss) / 1000:+.0f} kB" for kind in KINDS)
    title = (
        f"{ROW:,} connections in a row, all answered; memory from the {ROW // 10:,}th to the last"
    )
    table(title, ("time", *KINDS), (f"{took:.0f} s", *grown))
