"""Asks a server of tests/support/endpoints.py from within a container, and prints what happened as JSON.

    python3 client.py ask HOST PORT udp|tcp          once: {"tcp": name, "udp": name, "error": text}
    python3 client.py calls HOST PORT SECONDS        a new connection every 20 ms: a list of `Call`
    python3 client.py datagrams HOST PORT SECONDS    the same with one UDP socket
    python3 client.py hold HOST PORT SECONDS         one conversation: {"end": how, "at": time}

A conversation is `open` at the end of the time, or ended before: `clean`, or by an error. Times are
those of the machine's clock. It runs in the demo image: standard library only.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
from typing import BinaryIO

INTERVAL_S = 0.02
PATIENCE_S = 13.0

Call = tuple[float, float, str, str]
"""Begin, end, the name of who answered, the error."""


def connect(host: str, port: int, timeout: float) -> tuple[socket.socket, BinaryIO, str]:
    """A connection, what it says from here on, and the name that it began with."""
    connection = socket.create_connection((host, port), timeout)
    reader = connection.makefile("rb")
    greeting = reader.readline().split()
    if not greeting:
        raise ConnectionResetError("no greeting")
    return connection, reader, greeting[0].decode()


def ask_tcp(host: str, port: int, timeout: float) -> str:
    connection, reader, name = connect(host, port, timeout)
    with connection, reader:
        connection.sendall(b"?")
        if reader.read(1) != b"?":
            raise ConnectionResetError("no echo")
    return name


def udp_socket(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect(address)
    return sock


def ask(host: str, port: int, protocol: str) -> dict[str, str]:
    answers = {"error": ""}
    try:
        answers["tcp"] = ask_tcp(host, port, 3)
        if protocol == "udp":
            with udp_socket(host, port) as sock:
                sock.settimeout(2)
                sock.send(b"?")
                answers["udp"] = sock.recv(999).split()[0].decode()
    except OSError as error:
        answers["error"] = f"{type(error).__name__} {error}"
    return answers


def calls(host: str, port: int, seconds: float) -> list[Call]:
    made: list[Call] = []

    def call() -> None:
        begin, name, problem = time.time(), "", ""
        try:
            name = ask_tcp(host, port, PATIENCE_S - 1)
        except OSError as error:
            problem = type(error).__name__
        made.append((begin, time.time(), name, problem))

    threads = []
    end = time.time() + seconds
    while time.time() < end:
        threads.append(threading.Thread(target=call, daemon=True))
        threads[-1].start()
        time.sleep(INTERVAL_S)
    for thread in threads:
        thread.join(PATIENCE_S)
    return sorted(made)


def datagrams(host: str, port: int, seconds: float) -> list[Call]:
    answered: list[Call] = []
    sent: list[float] = []
    end = time.time() + seconds
    with udp_socket(host, port) as sock:
        while time.time() < end + 1:
            if time.time() < end:
                sock.send(str(len(sent)).encode())
                sent.append(time.time())
            stop = time.time() + INTERVAL_S
            while select.select([sock], [], [], max(0, stop - time.time()))[0]:
                try:
                    name, number = sock.recv(999).decode().split()
                except OSError:  # an ICMP error that came back for one of them
                    continue
                answered.append((sent[int(number)], time.time(), name, ""))
    return sorted(answered)


def hold(host: str, port: int, seconds: float) -> dict[str, object]:
    connection, reader, _ = connect(host, port, PATIENCE_S)
    how, end = "open", time.time() + seconds
    with connection, reader:
        try:
            while time.time() < end and how == "open":
                connection.sendall(b"x")
                how = "open" if reader.read(1) else "clean"
                time.sleep(INTERVAL_S)
        except OSError as error:
            how = type(error).__name__
    return {"end": how, "at": time.time()}


def main(mode: str, host: str, port: int, last: str) -> None:
    if mode == "ask":
        print(json.dumps(ask(host, port, last)))
    elif mode == "calls":
        print(json.dumps(calls(host, port, float(last))))
    elif mode == "datagrams":
        print(json.dumps(datagrams(host, port, float(last))))
    else:
        print(json.dumps(hold(host, port, float(last))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
