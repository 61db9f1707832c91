"""Stands in the soak's containers: says who it is, echoes, and dies in a way that shows.

    python3 server.py NAME PORT

- TCP: greets with `NAME\\n`, echoes up to the end of file and answers that with its own. A client
  says first how much it will send (8 bytes); a clean end before that is printed.
- UDP: answers each datagram with `NAME ` and the datagram.

Its connections have SO_LINGER 0, from the listener on, until everything is echoed: where the process
ends before, the kernel sends a reset. So a clean end that comes too soon cannot have come from here.

It runs inside the demo image, so it needs nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading


def linger(client: socket.socket, on: int) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))


def serve(client: socket.socket, name: bytes) -> None:
    try:
        with client:
            client.sendall(name + b"\n")
            head, got = b"", 0
            while data := client.recv(1 << 16):
                head += data[: 8 - len(head)]
                got += len(data)
                client.sendall(data)
            if got and got != 8 + int.from_bytes(head, "big"):
                print(f"truncated: a clean end after {got} bytes", flush=True)
            linger(client, 0)
    except OSError:
        pass  # the client left


def answer(sock: socket.socket, name: bytes) -> None:
    while True:
        data, peer = sock.recvfrom(1 << 16)
        try:
            sock.sendto(name + b" " + data, peer)
        except OSError:
            pass  # the client left


def main(name: bytes, port: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("0.0.0.0", port))
    tcp = socket.create_server(("0.0.0.0", port), backlog=1024)
    linger(tcp, 1)  # inherited: not even one that was accepted a moment ago can end cleanly
    threading.Thread(target=answer, args=(udp, name), daemon=True).start()
    while True:
        client, _ = tcp.accept()
        threading.Thread(target=serve, args=(client, name), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1].encode(), int(sys.argv[2]))
