"""`-workers N`: several processes serve one listener, as one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

import psutil

from ambassador.values import Protocol
from tests.support.endpoints import Peers, Server, read_exactly, read_to_reset
from tests.support.net import free_port
from tests.support.processes import descriptors, is_gone, stopped
from tests.support.program import Run
from tests.support.wait import wait_until
from tests.support.worker import bind_free


def test_tcp_is_shared_and_survives_one_of_them(run: Run, peers: Peers) -> None:
    """W1: all accept from one socket; killing one resets its own connections and nobody else's."""
    server = peers.server()
    with Server(server):
        port = free_port()
        program = run("-workers", "3", f"{port}/tcp=127.0.0.1:{server.getsockname()[1]}")
        program.has(f"{port}/tcp", 3)
        victim, *others = program.workers(f"{port}/tcp")

        def connect(count: int) -> list[socket.socket]:
            clients = [
                peers.keep(socket.create_connection(("127.0.0.1", port))) for _ in range(count)
            ]
            for number, client in enumerate(clients):
                client.sendall(b"%4d" % number)
                assert read_exactly(client, 4) == b"%4d" % number
            return clients

        with contextlib.ExitStack() as stack:  # who is stopped accepts nothing
            for other in others:
                stack.enter_context(stopped(other))
            lost = connect(20)
        with stopped(victim):
            kept = connect(20)
        os.kill(victim, signal.SIGKILL)
        for client in lost:
            assert read_to_reset(client) == b""
        for client in kept:
            client.sendall(b"ping")
            assert read_exactly(client, 4) == b"ping"
        wait_until(lambda: is_gone(victim), "it is gone")
        program.has(f"{port}/tcp", 3)
        assert set(others) < set(program.workers(f"{port}/tcp"))
        for _ in range(30):
            client = peers.keep(socket.create_connection(("127.0.0.1", port)))
            client.sendall(b"after")
            assert read_exactly(client, 5) == b"after"


def test_udp_clients_stay_on_their_worker(run: Run, peers: Peers) -> None:
    """A session lives in one worker: the server sees each client from one address for ever."""
    server = peers.udp()
    port = free_port()
    program = run("-workers", "3", f"{port}/udp=127.0.0.1:{server.getsockname()[1]}")
    program.has(f"{port}/udp", 3)
    clients = [peers.udp() for _ in range(40)]
    seen: dict[bytes, set[object]] = {}
    for turn in range(5):
        for number, client in enumerate(clients):
            client.sendto(b"%d" % number, ("127.0.0.1", port))
            data, source = server.recvfrom(100)
            seen.setdefault(data, set()).add(source)
            server.sendto(b"%d of %d" % (turn, number), source)
            assert client.recv(100) == b"%d of %d" % (turn, number)
    assert all(len(sources) == 1 for sources in seen.values())
    assert len(seen) == 40
    used = [psutil.Process(pid).num_fds() for pid in program.workers(f"{port}/udp")]
    assert max(used) - min(used) < 40, "no worker has all the sessions"


def test_a_port_that_somebody_has_is_not_shared(run: Run) -> None:
    """R4: SO_REUSEPORT is for our own; another program's port is in use."""
    listener, sock = bind_free(Protocol.UDP)
    program = run("-workers", "2", f"{listener.ports}/udp=127.0.0.2:9")
    wait_until(lambda: "is in use by" in program.text, "it says who has the port")
    assert program.workers(str(listener)) == []
    sock.close()
    program.has(str(listener), 2)


def test_tcp_connections_that_stay_open_are_shared(run: Run, peers: Peers) -> None:
    """W8: a pool opens its connections one after the other: no worker has most of them."""
    server = peers.server()
    port = free_port()
    program = run("-workers", "3", f"{port}/tcp=127.0.0.1:{server.getsockname()[1]}")
    program.has(f"{port}/tcp", 3)
    for _ in range(201):
        client = peers.connect(port)
        peers.accept(server).sendall(b"+")
        assert read_exactly(client, 1) == b"+"
    shares = [
        sum(name.startswith("socket:") for name in descriptors(pid).values()) // 2
        for pid in program.workers(f"{port}/tcp")
    ]
    assert sum(shares) == 201
    assert max(shares) <= 2 * 201 / 3, shares
