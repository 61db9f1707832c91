"""Stands in the containers of the tests: says who it is, echoes, and records whoever comes.

    python3 server.py NAME PORT/PROTOCOL ...

- TCP: greets with `NAME ADDRESS\\n`, the address that the client reached, then echoes up to the end
  of file, which it answers with its own.
- UDP: answers each datagram with `NAME ` and the datagram.
- Standard output: `listening TIME`, then a line for every connection and every datagram that came.

It runs inside the demo image, so it needs nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

EAT = b"eat all memory\n"
"""A client that begins with this has the container killed for want of memory."""


def say(*words: object) -> None:
    print(*words, flush=True)


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def bind(kind: socket.SocketKind, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    return sock


def eat() -> None:
    pieces = []
    while True:
        pieces.append(b"x" * (1 << 20))


def serve(client: socket.socket, name: str) -> None:
    with client:
        client.sendall(f"{name} {plain(client.getsockname()[0])}\n".encode())
        while data := client.recv(1 << 16):
            if data == EAT:
                eat()
            client.sendall(data)


def serve_quietly(client: socket.socket, name: str) -> None:
    try:
        serve(client, name)
    except OSError:
        pass  # the client left


def accept(listener: socket.socket, name: str) -> None:
    port = listener.getsockname()[1]
    while True:
        client, peer = listener.accept()
        say("connection", port, plain(peer[0]))
        threading.Thread(target=serve_quietly, args=(client, name), daemon=True).start()


def answer(sock: socket.socket, name: str) -> None:
    port = sock.getsockname()[1]
    while True:
        data, peer = sock.recvfrom(1 << 16)
        say("datagram", port, plain(peer[0]), len(data))
        try:
            sock.sendto(name.encode() + b" " + data, peer)
        except OSError:
            pass  # the client left


def main(name: str, ports: list[str]) -> None:
    # The first process of a container ignores signals that it has no handler for.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    for port, _, protocol in (text.partition("/") for text in ports):
        if protocol == "udp":
            sock = bind(socket.SOCK_DGRAM, int(port))
            threading.Thread(target=answer, args=(sock, name), daemon=True).start()
        else:
            sock = bind(socket.SOCK_STREAM, int(port))
            sock.listen(1024)
            threading.Thread(target=accept, args=(sock, name), daemon=True).start()
    say("listening", time.time())
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
