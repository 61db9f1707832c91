"""Processes that are stopped: noticed, killed, replaced; and nobody else is. On the whole program."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from tests.support.endpoints import Peers, Server, read_exactly, read_to_reset
from tests.support.net import free_port
from tests.support.processes import is_gone, stopped
from tests.support.program import Program, Run
from tests.support.wait import wait_until

WITHIN_S = 5.0


def replaced(program: Program, listener: str, victims: list[int]) -> bool:
    now = program.workers(listener)
    return len(now) == len(victims) and not set(now) & set(victims)


def ask(port: int) -> bytes:
    """A conversation through the port; it is never refused."""
    with socket.create_connection(("127.0.0.1", port), timeout=WITHIN_S * 2) as client:
        client.sendall(b"ping")
        return read_exactly(client, 4)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_tcp_worker(run: Run, peers: Peers, workers: int) -> None:
    """W2: killed and replaced within 5 s; its connections are reset, what came meanwhile is served."""
    with Server(peers.server()) as echo:
        port = free_port()
        program = run("-workers", str(workers), f"{port}/tcp=127.0.0.1:{echo.port}")
        listener = f"{port}/tcp"
        program.has(listener, workers)
        client = peers.keep(socket.create_connection(("127.0.0.1", port)))
        client.sendall(b"ping")
        assert read_exactly(client, 4) == b"ping"
        everybody = program.workers(listener)
        for victim in everybody:
            os.kill(victim, signal.SIGSTOP)
        start_check = time.monotonic()
        assert ask(port) == b"ping"
        assert read_to_reset(client) == b""
        wait_until(lambda: replaced(program, listener, everybody), "they stay")
        assert time.monotonic() - start_check < WITHIN_S
        assert program.said("worker not responding, killing it") == workers
        assert program.said("killed by SIGKILL") == workers


def test_a_stopped_udp_worker(run: Run, peers: Peers) -> None:
    """W2: a datagram that came while it was stopped is relayed by the next."""
    server, client = peers.udp(), peers.udp()
    port = free_port()
    program = run(f"{port}/udp=127.0.0.1:{server.getsockname()[1]}")
    program.has(f"{port}/udp", 1)
    (victim,) = program.workers(f"{port}/udp")
    with stopped(victim):
        start_check = time.monotonic()
        client.sendto(b"meanwhile", ("127.0.0.1", port))
        assert server.recv(100) == b"meanwhile"
        assert time.monotonic() - start_check < WITHIN_S
    assert is_gone(victim)


def test_a_stopped_fork_server(run: Run, peers: Peers) -> None:
    """W2: its workers go on, another fork server takes over, a dead worker is replaced in time."""
    with Server(peers.server()) as echo:
        port = free_port()
        program = run(f"{port}/tcp=127.0.0.1:{echo.port}")
        program.has(f"{port}/tcp", 1)
        (worker,), fork_server = program.workers(f"{port}/tcp"), program.fork_server
        client = peers.keep(socket.create_connection(("127.0.0.1", port)))
        with stopped(fork_server):
            start_check = time.monotonic()
            client.sendall(b"ping")
            assert read_exactly(client, 4) == b"ping"
            os.kill(worker, signal.SIGKILL)
            assert ask(port) == b"ping"
            assert time.monotonic() - start_check < WITHIN_S
            assert is_gone(fork_server)
        assert program.said("fork server stopped, killing it") == 1
        assert program.said("worker not responding") == 0


def test_worker_and_fork_server_stopped(run: Run, peers: Peers) -> None:
    """W2: both at once."""
    with Server(peers.server()) as echo:
        port = free_port()
        program = run(f"{port}/tcp=127.0.0.1:{echo.port}")
        program.has(f"{port}/tcp", 1)
        (worker,) = program.workers(f"{port}/tcp")
        with stopped(program.fork_server), stopped(worker):
            start_check = time.monotonic()
            assert ask(port) == b"ping"
            assert time.monotonic() - start_check < WITHIN_S


def test_a_busy_worker_is_not_stuck(run: Run, peers: Peers) -> None:
    """W2: bulk traffic without a pause for longer than the watchdog's patience."""
    with Server(peers.server()) as echo:
        port = free_port()
        program = run(f"{port}/tcp=127.0.0.1:{echo.port}")
        program.has(f"{port}/tcp", 1)
        client = peers.keep(socket.create_connection(("127.0.0.1", port)))
        block, until = bytes(1 << 16), time.monotonic() + 5
        while time.monotonic() < until:
            client.sendall(block)
            assert read_exactly(client, len(block)) == block
        assert program.said("stuck") == 0
