"""Both loops in this process: used, freed, and then LeakSanitizer is asked what is left of them.

It reports whatever Python has lost as well; what counts is a stack with one of our modules in it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ambassador import _datagram, _splice
from ambassador._worker import COUNTERS_BYTES
from ambassador.values import Protocol
from tests.support.endpoints import Server, read_exactly, reset
from tests.support.records import HEADER_BYTES
from tests.support.worker import bind_free, destination, update_record

OURS = ("ambassador/_splice.", "ambassador/_datagram.", "ambassador/_control.")
_open: list[socket.socket] = []

Loop = _splice.TcpLoop | _datagram.UdpLoop


def relay(
    make: Callable[[int, int, int], Loop], kind: Protocol, use: Callable[[int], None]
) -> None:
    """Make a loop, have `use` talk through it to an echo server, and free it with all that is open."""
    listen, sock = bind_free(kind)
    control, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    counters = os.memfd_create("counters")
    os.ftruncate(counters, COUNTERS_BYTES)
    loop = make(sock.fileno(), control, counters)
    stream = socket.SOCK_STREAM if kind is Protocol.TCP else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, stream) as server:
        server.bind(("127.0.0.1", 0))
        if kind is Protocol.TCP:
            server.listen()
        loop.update(1, update_record(1, destination(server))[HEADER_BYTES:])
        thread = threading.Thread(target=loop.run)
        with Server(server):
            thread.start()
            use(listen.first_port)
            os.write(told, b"x")  # whatever it is, the loop returns
            thread.join()
        loop.update(2, update_record(2)[HEADER_BYTES:])
        del loop
    for fd in (control, told, counters):
        os.close(fd)
    sock.close()


def tcp(port: int) -> None:
    for size in (1, 1000, 500_000):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(bytes(size))
            assert len(read_exactly(client, size)) == size
            if size == 1000:
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
    # What is still open, with bytes in flight or a reset behind it, is freed with the loop.
    for _ in range(4):
        left = _left_open(port)
        left.sendall(bytes(200_000))
    reset(left)


def _left_open(port: int) -> socket.socket:
    _open.append(socket.create_connection(("127.0.0.1", port)))
    return _open[-1]


def udp(port: int) -> None:
    for size in (0, 1, 1472, 60_000):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(("127.0.0.1", port))
            client.send(bytes(size))
            assert len(client.recv(1 << 16)) == size


def main() -> int:
    relay(_splice.TcpLoop, Protocol.TCP, tcp)
    relay(_datagram.UdpLoop, Protocol.UDP, udp)
    return leaks()


def leaks() -> int:
    """LeakSanitizer writes to the log path; what is not about us is taken away again."""
    ctypes.CDLL(None).__lsan_do_recoverable_leak_check()
    report = Path(f"{os.environ['ASAN_OPTIONS'].split('log_path=')[1].split(':')[0]}.{os.getpid()}")
    if not report.exists():
        return 0
    stacks = report.read_text(errors="replace").split("\n\n")
    report.unlink()
    ours = [stack for stack in stacks if any(name in stack for name in OURS)]
    print(*ours, sep="\n\n", file=sys.stderr)
    return 1 if ours else 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # before LeakSanitizer looks again, at what Python leaves
