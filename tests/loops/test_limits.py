"""Limits that a user may set: how many connections, and for how long they may be silent or half-closed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.endpoints import Peers, Server, fill, read_exactly, read_to_end, read_to_reset
from tests.support.net import free_port
from tests.support.processes import is_gone, processor_s
from tests.support.program import Program, Run
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, check_tcp_counters, destination


def converse(client: socket.socket, backend: socket.socket) -> None:
    for one, other in ((client, backend), (backend, client)):
        one.sendall(b"x")
        assert read_exactly(other, 1) == b"x"


# ---------------------------------------------------------------------------------- -max-connections


def test_beyond_the_limit_connections_are_reset(start_tcp: StartWorker, peers: Peers) -> None:
    """S7: reset at once and counted; those that are open do not notice; room is used again."""
    server = peers.server()
    worker = start_tcp(destination(server), max_connections=3)
    pairs = [peers.pair(worker, server) for _ in range(3)]
    for _ in range(20):
        assert peers.is_refused(worker)
    worker.wait_for(accepted=23, active=3, rejected=20, over_limit=20)
    assert worker.losses() == {"over_limit": 20}
    for client, backend in pairs:
        converse(client, backend)
    pairs[0][0].close()
    assert read_to_end(pairs[0][1]) == b""
    pairs[0][1].close()
    worker.wait_for(active=2)
    converse(*peers.pair(worker, server))
    assert peers.is_refused(worker)
    check_tcp_counters(worker)


def test_held_connections_count(start_tcp: StartWorker, peers: Peers) -> None:
    """S7: who waits for a backend takes a place as well."""
    server = peers.server()
    worker = start_tcp(max_connections=2)
    held = [peers.connect(worker) for _ in range(2)]
    worker.wait_for(held=2)
    assert peers.is_refused(worker)
    worker.repoint(destination(server))
    for client in held:
        converse(client, peers.accept(server))


def test_a_full_port_is_at_rest(start_tcp: StartWorker, peers: Peers) -> None:
    """R1: a full port does not spin: nobody is accepted but who comes."""
    server = peers.server()
    worker = start_tcp(destination(server), max_connections=1)
    converse(*peers.pair(worker, server))
    assert peers.is_refused(worker)
    worker.wait_for(rejected=1)
    before = processor_s(worker.pid)
    time.sleep(1)  # the time is what is tested
    assert processor_s(worker.pid) - before < 0.025
    assert worker.counter("accepted") == 2


def held_by(port: int, attempts: int, peers: Peers) -> list[socket.socket]:
    """Connect so often, one after the other: those connections that were served."""
    served = []
    for _ in range(attempts):
        with contextlib.suppress(ConnectionError):
            client = peers.keep(socket.create_connection(("127.0.0.1", port)))
            client.sendall(b"x")
            if client.recv(1):
                served.append(client)
    return served


@pytest.fixture
def limited(run: Run, peers: Peers) -> Iterator[tuple[Program, int]]:
    """Three workers that may have ten connections together, in front of an echo: it, its port."""
    with Server(peers.server()) as echo:
        port = free_port()
        to = f"{port}/tcp=127.0.0.1:{echo.port}"
        program = run("-workers", "3", "-max-connections", "10", to)
        program.has(f"{port}/tcp", 3)
        yield program, port


def test_the_limit_is_of_all_workers_together(limited: tuple[Program, int], peers: Peers) -> None:
    """S7: exactly so many, wherever the kernel has sent them, and one line for the rest."""
    program, port = limited
    assert len(held_by(port, 30, peers)) == 10
    wait_until(lambda: program.said("over -max-connections"), "it is not said")


def test_a_dead_worker_holds_no_places(limited: tuple[Program, int], peers: Peers) -> None:
    """S7, W1: what a killed worker had counts no longer."""
    program, port = limited
    first = held_by(port, 10, peers)
    victims = program.workers(f"{port}/tcp")
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, victims)), "they do not die")
    for client in first:
        assert read_to_reset(client) == b""
    wait_until(lambda: program.said("worker exited") == 3, "their end is not noticed")
    assert len(held_by(port, 30, peers)) == 10


# ---------------------------------------------------------------------------------------- deadlines

IDLE_MS = 1_000
SLACK_S = 0.1
"""For a busy machine, beside the tenth that is promised."""


def check_ends_after(
    sock: socket.socket, since: float, wanted_s: float, until: float | None = None
) -> None:
    """It is reset so long after a moment between `since` and `until`: to 10 %, and no earlier."""
    read_to_reset(sock)
    now = time.monotonic()
    assert now - since >= wanted_s - 0.005
    assert now - (until or since) <= wanted_s * 1.1 + SLACK_S


@pytest.mark.alone
@pytest.mark.parametrize("speaker", ["client", "backend"])
def test_a_silent_connection_is_reset(start_tcp: StartWorker, peers: Peers, speaker: str) -> None:
    """T11: so long after the last byte, whoever sent it."""
    server = peers.server()
    worker = start_tcp(destination(server), idle_timeout=IDLE_MS)
    client, backend = peers.pair(worker, server)
    sender, reader = (client, backend) if speaker == "client" else (backend, client)
    for _ in range(6):
        time.sleep(IDLE_MS / 1000 / 3)
        since = time.monotonic()
        sender.sendall(b"x")
        assert read_exactly(reader, 1) == b"x"
        moved = time.monotonic()
    check_ends_after(client, since, IDLE_MS / 1000, moved)
    assert read_to_reset(backend) == b""
    worker.wait_for(reset=1, idle_closed=1, active=0)
    check_tcp_counters(worker)


@pytest.mark.alone
def test_silence_from_the_beginning(start_tcp: StartWorker, peers: Peers) -> None:
    """T11: a connection that never said anything; one that is never silent stays."""
    server = peers.server()
    worker = start_tcp(destination(server), idle_timeout=IDLE_MS)
    begin = time.monotonic()
    silent, _ = peers.pair(worker, server)
    talking = peers.pair(worker, server)
    while time.monotonic() < begin + IDLE_MS / 1000 * 0.7:
        converse(*talking)
        time.sleep(0.05)
    last = time.monotonic()
    check_ends_after(silent, begin, IDLE_MS / 1000)
    converse(*talking)
    assert time.monotonic() > last
    worker.wait_for(idle_closed=1, active=1)


def test_stuck_bytes_are_silence(start_tcp: StartWorker, peers: Peers) -> None:
    """T11: a connection whose reader does not read is as idle as one that has nothing to say."""
    server = peers.server()
    worker = start_tcp(destination(server), idle_timeout=IDLE_MS)
    client, _ = peers.pair(worker, server)
    fill(client)
    worker.wait_for(idle_closed=1, active=0)
    check_tcp_counters(worker)


HALF_MS = 1_000


@pytest.mark.alone
@pytest.mark.parametrize("ended", ["client", "backend"])
def test_a_half_closed_connection_is_reset(
    start_tcp: StartWorker, peers: Peers, ended: str
) -> None:
    """T10: so long after the one end, however much the other side still says."""
    server = peers.server()
    worker = start_tcp(destination(server), half_close_timeout=HALF_MS)
    other = peers.pair(worker, server)
    client, backend = peers.pair(worker, server)
    reader, sender = (client, backend) if ended == "client" else (backend, client)
    since = time.monotonic()
    reader.shutdown(socket.SHUT_WR)
    assert read_to_end(sender) == b""
    for _ in range(5):
        time.sleep(HALF_MS / 1000 / 10)
        sender.sendall(b"x")
        assert read_exactly(reader, 1) == b"x"
    check_ends_after(reader, since, HALF_MS / 1000)
    worker.wait_for(reset=1, half_closed_too_long=1, active=1)
    converse(*other)
    check_tcp_counters(worker)


def test_a_second_end_in_time_is_clean(start_tcp: StartWorker, peers: Peers) -> None:
    """T10: the deadline is for those that do not end."""
    server = peers.server()
    worker = start_tcp(destination(server), half_close_timeout=HALF_MS)
    client, backend = peers.pair(worker, server)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(backend) == b""
    backend.sendall(b"last")
    backend.close()
    assert read_to_end(client) == b"last"
    worker.wait_for(closed=1, active=0)
    time.sleep(HALF_MS / 1000 * 1.2)
    assert worker.counter("half_closed_too_long") == 0


@pytest.mark.alone
def test_the_first_deadline_counts(start_tcp: StartWorker, peers: Peers) -> None:
    """T10, T11: both are set; a long one does not put off the short one."""
    server = peers.server()
    worker = start_tcp(destination(server), idle_timeout=600_000, half_close_timeout=300)
    client, _ = peers.pair(worker, server)
    time.sleep(0.1)
    since = time.monotonic()
    client.shutdown(socket.SHUT_WR)
    check_ends_after(client, since, 0.3)
    worker.wait_for(half_closed_too_long=1, idle_closed=0)


def test_without_deadlines_nothing_ends(start_tcp: StartWorker, peers: Peers) -> None:
    """T10, T11: never is the default."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(backend) == b""
    time.sleep(1.5)
    backend.sendall(b"still here")
    assert read_exactly(client, 10) == b"still here"


@pytest.mark.alone
def test_a_udp_client_is_forgotten_after_the_time_that_was_set(run: Run, peers: Peers) -> None:
    """U6: -udp-timeout: after it the backend sees the client from another port.

    The client answers a reply with its second datagram. From then on it has the whole time, before a third.
    """
    server, client = peers.udp(), peers.udp()
    port = free_port()
    program = run("-udp-timeout", "1500ms", f"{port}/udp=127.0.0.1:{server.getsockname()[1]}")
    program.has(f"{port}/udp", 1)
    seen = []
    for pause in (0, 0.05, 0.7, 1.9):
        time.sleep(pause)
        client.sendto(b"x", ("127.0.0.1", port))
        seen.append(server.recvfrom(10)[1])
        server.sendto(b"y", seen[-1])
        assert client.recv(10) == b"y"
    assert seen[0] == seen[1] == seen[2] != seen[3]


def test_udp_sessions_make_room(run: Run, peers: Peers) -> None:
    """U5: -max-connections is a cap on sessions too: the longest idle one makes room for a new client."""
    server = peers.udp()
    port = free_port()
    program = run("-max-connections", "3", f"{port}/udp=127.0.0.1:{server.getsockname()[1]}")
    program.has(f"{port}/udp", 1)
    for client in [peers.udp() for _ in range(5)]:
        client.sendto(b"x", ("127.0.0.1", port))
        server.recv(10)
    wait_until(lambda: program.said("sessions evicted to make room"), "it is not said")
