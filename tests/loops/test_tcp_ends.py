"""Ends: a clean end comes last and means that every byte arrived; a reset stays a reset."""

from __future__ import annotations

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.endpoints import (
    Peers,
    check_tape,
    fill,
    read_exactly,
    read_to_end,
    read_to_reset,
    reset,
    send_tape,
)
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, Worker, check_tcp_counters, destination

MIB = 1 << 20
SIDES = ["client", "backend"]


@pytest.fixture(params=SIDES)
def first(request: pytest.FixtureRequest) -> str:
    """Which side does it first."""
    return str(request.param)


@pytest.fixture
def ends(
    start_tcp: StartWorker, peers: Peers, loopback: str, first: str
) -> tuple[Worker, socket.socket, socket.socket]:
    """A worker and the two ends of a connection, the one that does it first before the other."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server, loopback)
    return (worker, client, backend) if first == "client" else (worker, backend, client)


Ends = tuple[Worker, socket.socket, socket.socket]


def test_fifty_mebibytes_after_the_other_side_has_ended(ends: Ends) -> None:
    """T4: one side half-closes; 50 MiB come back to it, and then a clean end."""
    worker, one, other = ends
    one.sendall(b"request")
    one.shutdown(socket.SHUT_WR)
    assert read_to_end(other) == b"request"
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(send_tape, other, 1, 50 * MIB)
        check_tape(one, 1, 50 * MIB)
        sending.result()
    worker.wait_for(closed=1, active=0, reset=0)
    check_tcp_counters(worker)


def test_half_closed_stays_open(ends: Ends) -> None:
    """T4: after one side's end the other way goes on, message by message."""
    worker, one, other = ends
    one.shutdown(socket.SHUT_WR)
    assert read_to_end(other) == b""
    for number in range(50):
        other.sendall(b"%4d" % number)
        assert read_exactly(one, 4) == b"%4d" % number
    assert worker.counter("active") == 1
    other.close()
    assert read_to_end(one) == b""
    worker.wait_for(closed=1, active=0, reset=0)


def test_the_end_comes_after_what_is_in_the_pipe(ends: Ends) -> None:
    """T5: end of file while the pipe and every buffer is full: all of it arrives, then the end."""
    worker, one, other = ends
    data = random.Random(5).randbytes(MIB)
    sent = fill(one, data)
    one.shutdown(socket.SHUT_WR)
    counters = worker.counters()
    received = counters["received_from_client"] + counters["received_from_backend"]
    assert received > counters["sent_to_backend"] + counters["sent_to_client"], "nothing in flight"
    assert read_to_end(other) == (data * (sent // MIB + 1))[:sent]
    other.close()
    assert read_to_end(one) == b""
    worker.wait_for(closed=1, active=0, reset=0)


def send_and_close(sock: socket.socket) -> None:
    send_tape(sock, 1, 3 * MIB)
    sock.close()


def test_close_right_after_the_last_byte(
    start_tcp: StartWorker, peers: Peers, loopback: str
) -> None:
    """T5: the backend answers with a few MiB and closes at once; a slow client gets every byte."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    for _ in range(10):
        client, backend = peers.pair(worker, server, loopback)
        client.shutdown(socket.SHUT_WR)
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(send_and_close, backend)
            check_tape(client, 1, 3 * MIB)
            sending.result()
    worker.wait_for(closed=10, active=0, reset=0)


@pytest.mark.parametrize("amount", [0, 1000, 3 * MIB])
def test_a_reset_is_passed_on(ends: Ends, amount: int) -> None:
    """T6: a reset, after nothing, a message or a stream, is a reset on the other side."""
    worker, one, other = ends
    one.sendall(b"hello")
    assert read_exactly(other, 5) == b"hello"
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read_to_reset, other)
        one.sendall(bytes(amount))
        reset(one)
        assert len(reading.result()) <= amount
    worker.wait_for(reset=1, active=0, closed=0)
    check_tcp_counters(worker)


def test_a_reset_in_the_middle_of_a_stream(ends: Ends) -> None:
    """T6: a reset while every buffer is full and nobody reads: no clean end for the other side."""
    worker, one, other = ends
    sent = fill(one)
    reset(one)
    assert len(read_to_reset(other)) < sent
    worker.wait_for(reset=1, active=0, closed=0)
    check_tcp_counters(worker)


def test_a_reader_that_resets(ends: Ends) -> None:
    """T6: the side that should read resets instead: the sender learns it at once."""
    worker, one, other = ends
    fill(one)
    reset(other)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        one.recv(1)
    worker.wait_for(reset=1, active=0, closed=0)
    check_tcp_counters(worker)


def test_a_reset_after_a_half_close(ends: Ends) -> None:
    """T6: one side half-closes, waits for the answer, and then resets: the other side learns it."""
    worker, one, other = ends
    one.sendall(b"request")
    one.shutdown(socket.SHUT_WR)
    assert read_to_end(other) == b"request"
    reset(one)
    worker.wait_for(reset=1, active=0, closed=0, timeout_s=3)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            other.sendall(b"answer")


def test_an_end_and_a_reset_in_one_breath(ends: Ends) -> None:
    """T6: the relay sees end of file and reset together: the other side gets the bytes and a reset."""
    worker, one, other = ends
    other.sendall(b"hello")
    assert read_exactly(one, 5) == b"hello"
    with worker.stopped():
        one.sendall(b"request")
        one.shutdown(socket.SHUT_WR)
        reset(one)
    worker.wait_for(reset=1, active=0, closed=0, timeout_s=3)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            other.sendall(b"answer")
    check_tcp_counters(worker)


def test_the_last_words_of_a_backend_that_takes_no_more(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """T6: the backend refuses a body: it answers, closes with bytes unread. The answer arrives."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    client.sendall(bytes(100_000))
    worker.wait_for(sent_to_backend=100_000)
    with worker.stopped():
        backend.sendall(b"413 too large")
        backend.close()  # with bytes unread: the kernel sends a reset
        client.sendall(b"more")
    assert read_to_reset(client) == b"413 too large"
    worker.wait_for(reset=1, active=0)
    check_tcp_counters(worker)


def test_both_sides_end_at_once(start_tcp: StartWorker, peers: Peers, loopback: str) -> None:
    """T4: both half-close before the relay has seen either: both get everything and a clean end."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    pairs = [peers.pair(worker, server, loopback) for _ in range(20)]
    with worker.stopped():
        for client, backend in pairs:
            client.sendall(b"from the client")
            client.shutdown(socket.SHUT_WR)
            backend.sendall(b"from the backend")
            backend.shutdown(socket.SHUT_WR)
    for client, backend in pairs:
        assert read_to_end(client) == b"from the backend"
        assert read_to_end(backend) == b"from the client"
    worker.wait_for(closed=20, active=0, reset=0)


def test_drain_resets_what_is_left(start_tcp: StartWorker, peers: Peers) -> None:
    """P2, W1: draining takes no new work; what is open at the deadline ends in a reset; exit 0."""
    server = peers.server()
    worker = start_tcp(destination(server))
    finishing, finishing_backend = peers.pair(worker, server)
    staying, staying_backend = peers.pair(worker, server)
    worker.drain(1500)
    worker.listener.close()
    wait_until(lambda: not worker.descriptors().get(3, "").startswith("socket:"), "it stays open")
    with pytest.raises(ConnectionRefusedError):
        peers.connect(worker)
    finishing.sendall(b"last request")
    finishing.shutdown(socket.SHUT_WR)
    assert read_to_end(finishing_backend) == b"last request"
    finishing_backend.sendall(b"last answer")
    finishing_backend.close()
    assert read_to_end(finishing) == b"last answer"
    assert read_to_reset(staying) == b""
    assert read_to_reset(staying_backend) == b""
    assert worker.exit_code() == 0


def test_drain_ends_with_the_last_connection(start_tcp: StartWorker, peers: Peers) -> None:
    """P2: draining with nothing left to finish ends at once, not at the deadline."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    worker.drain(60_000)
    client.close()
    assert read_to_end(backend) == b""
    backend.close()
    assert worker.exit_code(timeout_s=3) == 0


SIZE = 3 * MIB


def slow_tail(worker: Worker, server: socket.socket, peers: Peers) -> socket.socket:
    """A client that has half-closed and reads nothing; the kernel has the whole answer."""
    client = peers.keep(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 30_000)
    client.connect(("127.0.0.1", worker.port))
    client.settimeout(20)
    client.sendall(b"get")
    client.shutdown(socket.SHUT_WR)
    backend = peers.accept(server)
    assert read_to_end(backend) == b"get"
    backend.sendall(bytes(SIZE))
    backend.close()
    worker.wait_for(closed=1, active=0)
    return client


def test_drain_waits_for_the_tail_of_an_ended_connection(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """P2: the container's network goes with the worker, so it stays until the client has all."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client = slow_tail(worker, server, peers)
    worker.drain(60_000)
    worker.listener.close()
    wait_until(lambda: not worker.descriptors().get(3, "").startswith("socket:"), "it stays open")
    time.sleep(0.5)
    assert not worker.yard.has_exited(worker.pid), "it leaves while its client reads"
    assert len(read_to_end(client)) == SIZE
    assert worker.exit_code(timeout_s=3) == 0


def test_the_tail_of_an_ended_connection_is_reset_at_the_deadline(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """P2: never silence: what is not delivered by the deadline ends in a reset."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client = slow_tail(worker, server, peers)
    worker.drain(300)
    assert worker.exit_code() == 0
    assert len(read_to_reset(client)) < SIZE


def test_a_tail_is_not_kept_longer_than_it_takes(start_tcp: StartWorker, peers: Peers) -> None:
    """T4: without a drain the socket goes as soon as the client has all."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client = slow_tail(worker, server, peers)
    kept = len(worker.descriptors())
    assert len(read_to_end(client)) == SIZE
    wait_until(lambda: len(worker.descriptors()) < kept, "the socket stays open")
    assert worker.counters()["closed"] == 1


def test_a_drain_gives_the_kernel_a_moment_after_the_last_end(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """P2: a small answer that was sent just before is on its way."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    client.shutdown(socket.SHUT_WR)
    backend.close()
    worker.wait_for(closed=1)
    begin = time.monotonic()
    worker.drain(60_000)
    assert worker.exit_code(timeout_s=3) == 0
    assert time.monotonic() - begin > 0.05
