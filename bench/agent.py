"""The benchmark's own UDP load and server: `python -m bench.agent exchange|echo HOST PORT ...`."""

from __future__ import annotations

import json
import socket
import sys

from bench import _load

BUFFER = 4 << 20  # bytes asked for; the kernel limits it to rmem_max


def exchange(host: str, port: str, *arguments: str) -> None:
    """Run a closed loop and print its result as one line of JSON."""
    sockets, depth, size, seconds = map(float, arguments)
    clients = [_socket() for _ in range(int(sockets))]
    for client in clients:
        client.connect((host, int(port)))
        client.setblocking(False)
    descriptors = [client.fileno() for client in clients]
    print(json.dumps(_load.udp_exchange(descriptors, int(depth), int(size), seconds)))


def echo(host: str, port: str) -> None:
    """Send every datagram back, until killed."""
    with _socket() as server:
        server.bind((host, int(port)))
        _load.udp_echo(server.fileno())


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    return made


if __name__ == "__main__":
    verb = exchange if sys.argv[1] == "exchange" else echo
    verb(*sys.argv[2:])
