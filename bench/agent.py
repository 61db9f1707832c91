"""The programs that run at the client's and at the server's host: `python -m bench.agent VERB JSON`.

A generator prints its result as one line of JSON; a server runs until it is killed.
"""

from __future__ import annotations

import json
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from bench import _load, measure

BUFFER = 4 << 20  # bytes asked for; the kernel clamps it to rmem_max
Result = dict[str, float]


def udp_exchange(
    host: str, port: int, *, sockets: int, depth: int, size: int, seconds: float
) -> Result:
    """Closed loop over UDP."""
    clients = [_udp_client(host, port) for _ in range(sockets)]
    return _load.udp_exchange([client.fileno() for client in clients], depth, size, seconds)


def udp_blast(
    host: str, port: int, *, size: int, segments: int, window: int, seconds: float
) -> Result:
    """Runs of datagrams from one socket, to the sink."""
    with _udp_client(host, port) as client:
        return _load.udp_blast(client.fileno(), size, segments, window, seconds)


def tcp_exchange(
    host: str, port: int, *, connections: int, size: int, seconds: float, pids: Sequence[int]
) -> Result:
    """Ping-pong over TCP, and the processor time that `pids` and the machine spend on it, not on opening."""
    clients = [_tcp_client(host, port, blocking=connections == 1) for _ in range(connections)]
    used, busy = measure.cpu_seconds(pids), measure.busy_seconds()
    result: Result = _load.tcp_exchange([client.fileno() for client in clients], size, seconds)
    used, busy = measure.cpu_seconds(pids) - used, measure.busy_seconds() - busy
    return result | {"cpu_seconds": used, "machine_seconds": busy}


def tcp_beside_bulk(host: str, port: int, size: int, seconds: float) -> Result:
    """Ping-pong beside a bulk stream through the same listener."""
    bulk = _tcp_client(host, port, blocking=True)
    ping = _tcp_client(host, port, blocking=True)
    moved: Result = {}
    thread = threading.Thread(target=lambda: moved.update(_load.tcp_blast(bulk.fileno(), seconds)))
    thread.start()
    result = _load.tcp_exchange([ping.fileno()], size, seconds)
    thread.join()
    return result | {"bytes": moved["bytes"], "bulk_seconds": moved["seconds"]}


def tcp_hold(host: str, port: int, connections: int) -> None:
    """Open connections, prove each with a message, say how many, keep them until standard input ends."""
    clients = []
    try:
        for _ in range(connections):
            client = _tcp_client(host, port, blocking=True)
            client.settimeout(2)
            client.sendall(b"x")
            if client.recv(1) != b"x":
                break
            clients.append(client)
    except OSError:
        pass  # this many, then
    print(json.dumps({"opened": len(clients)}), flush=True)
    sys.stdin.read()


def connect_loop(host: str, port: int, seconds: float, every_ms: float) -> Result:
    """One new connection after the other, `every_ms` apart or at once, one message each.

    How many were answered, refused (or could not be made), and cut once they were made.
    """
    took: list[float] = []
    refused = cut = 0
    begun = time.monotonic()
    while (start := time.monotonic()) < begun + seconds:
        try:
            client = socket.create_connection((host, port), timeout=5)
        except OSError:
            refused += 1
        else:
            try:
                with client:
                    client.sendall(b"x")
                    cut += client.recv(1) != b"x"
            except OSError:
                cut += 1
        took.append(time.monotonic() - start)
        if every_ms:
            time.sleep(max(0.0, every_ms / 1000 - took[-1]))
    took.sort()
    return {
        "delivered": len(took) - refused - cut,
        "seconds": time.monotonic() - begun,
        "refused": refused,
        "cut": cut,
        "p50": 1e6 * took[len(took) // 2],
        "p99": 1e6 * took[len(took) * 99 // 100],
        "longest": 1e6 * took[-1],
    }


def serve_udp_echo(host: str, port: int) -> None:
    """Every datagram back."""
    with _udp_server(host, port) as server:
        _load.udp_echo(server.fileno())


def serve_udp_sink(host: str, port: int) -> None:
    """Every datagram counted."""
    with _udp_server(host, port) as server:
        _load.udp_sink(server.fileno())


def serve_tcp(host: str, port: int) -> None:
    """Every byte back, or discarded if the first of its connection is zero."""
    with socket.create_server((host, port), backlog=4096) as server:
        server.setblocking(False)
        _load.tcp_server(server.fileno())


def _udp_client(host: str, port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    client.connect((host, port))
    client.setblocking(False)
    return client


def _udp_server(host: str, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    server.bind((host, port))
    return server


def _tcp_client(host: str, port: int, *, blocking: bool) -> socket.socket:
    client = socket.create_connection((host, port), timeout=10)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(None)
    client.setblocking(blocking)
    return client


LOADS: dict[str, Callable[..., Result | None]] = {
    load.__name__: load
    for load in (udp_exchange, udp_blast, tcp_exchange, tcp_beside_bulk, tcp_hold, connect_loop)
}
SERVERS: dict[str, Callable[..., None]] = {
    server.__name__: server for server in (serve_udp_echo, serve_udp_sink, serve_tcp)
}


def main(arguments: list[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    verb, options = arguments[0], json.loads(arguments[1])
    if verb in SERVERS:
        SERVERS[verb](**options)
        return
    result = LOADS[verb](**options)
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
