"""System calls that fail in ways that are allowed, injected into a running worker by strace."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.endpoints import (
    Peers,
    exchange,
    fill,
    read_exactly,
    read_to_end,
    read_to_reset,
    reset,
    send_tape,
)
from tests.support.strace import injected, injections
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, Worker, check_tcp_counters, destination

MIB = 1 << 20


def check_intact(
    worker: Worker, peers: Peers, server: socket.socket, faults: dict[str, str]
) -> None:
    """With a fault in each of these calls, the bytes are the same."""
    with injected(worker.pid, *(f"{call}:{fault}" for call, fault in faults.items())) as log:
        for number in range(1, 21):
            client, backend = peers.pair(worker, server)
            exchange(client, backend, 16 * MIB)
            worker.wait_for(closed=number, active=0, reset=0)
            # Whether a stream is bulk is a matter of how the reads fall.
            if all(injections(log, call) for call in faults):
                break
        else:
            pytest.fail(f"not all of {', '.join(faults)} were ever tried")
    check_tcp_counters(worker)


@pytest.mark.parametrize("error", ["EINVAL", "ENOSYS", "EPERM"])
def test_splice_is_not_to_be_had(start_tcp: StartWorker, peers: Peers, error: str) -> None:
    """T3: splice gives an error from the first call on: the loop copies, bytes intact."""
    server = peers.server()
    worker = start_tcp(destination(server))
    check_intact(worker, peers, server, {"splice": f"error={error}"})


@pytest.mark.parametrize("error", ["EINVAL", "ENOMEM"])
def test_splice_fails_with_bytes_in_the_pipe(
    start_tcp: StartWorker, peers: Peers, error: str
) -> None:
    """T3, T6: bytes that cannot leave the pipe any more: a reset for both, never a clean end."""
    server = peers.server()
    worker = start_tcp(destination(server))
    with injected(worker.pid, f"splice:error={error}:when=2+1") as log:
        for _ in range(20):
            client, backend = peers.pair(worker, server)
            with ThreadPoolExecutor(1) as threads:
                sending = threads.submit(send_tape, client, 1, 32 * MIB)
                try:
                    assert len(read_to_end(backend)) == 32 * MIB, "a clean end with bytes missing"
                except ConnectionResetError:
                    with pytest.raises((ConnectionResetError, BrokenPipeError)):
                        sending.result()
                    break
                assert not injections(log, "splice")  # this stream was copied throughout: once more
                sending.result()
                backend.close()
        else:
            pytest.fail("splice was never tried twice")
    worker.wait_for(reset=1, active=0)
    check_tcp_counters(worker)


def test_the_end_of_a_backend_that_takes_no_more(start_tcp: StartWorker, peers: Peers) -> None:
    """T6: a send to the backend fails, then its end of file is read: not a clean end for the client."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    with injected(worker.pid, "sendto:error=EPIPE:when=1..2+1"):
        with worker.stopped():
            client.sendall(b"too late")
            backend.sendall(b"goodbye")
            backend.shutdown(socket.SHUT_WR)
        assert read_to_reset(client) == b"goodbye"
    worker.wait_for(reset=1, active=0, discarded_to_backend=8)
    check_tcp_counters(worker)


@pytest.mark.parametrize("pipe_bytes", [1 << 20, 0], ids=["splice", "copy"])
def test_interrupted_calls(start_tcp: StartWorker, peers: Peers, pipe_bytes: int) -> None:
    """T2: every second or third call of every kind is interrupted by a signal (EINTR)."""
    server = peers.server()
    worker = start_tcp(destination(server), pipe_bytes=pipe_bytes)
    calls = {"recvfrom": 2, "sendto": 3, "epoll_wait": 3, "accept4": 2}
    if pipe_bytes:
        calls["splice"] = 2
    faults = {call: f"error=EINTR:when=1+{step}" for call, step in calls.items()}
    check_intact(worker, peers, server, faults)


def test_reads_that_would_block_after_all(start_tcp: StartWorker, peers: Peers) -> None:
    """T2: EAGAIN where epoll promised bytes: the next segment, or the end, mends it.

    An edge-triggered loop cannot tell such an answer from a true one, so a denied read waits for the
    next event of its socket. No kernel denies one to the only reader of a TCP socket.
    """
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    count = 300
    with injected(worker.pid, "recvfrom:error=EAGAIN:when=1..100+3") as log:
        for number in range(count):
            client.send(struct.pack("<I", number))
            time.sleep(0.002)  # so that there are many segments, and many reads
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(backend) == struct.pack(f"<{count}I", *range(count))
        assert injections(log, "recvfrom") > 20


@pytest.mark.parametrize("error", ["ECONNABORTED", "EPROTO", "EINTR", "ENETDOWN", "EPERM"])
def test_accept_fails_for_one_connection(start_tcp: StartWorker, peers: Peers, error: str) -> None:
    """T15: accept fails with an error of the connection: the loop goes on to the next one."""
    server = peers.server()
    worker = start_tcp(destination(server))
    with injected(worker.pid, f"accept4:error={error}:when=1+2") as log:
        for number in range(10):
            client, backend = peers.pair(worker, server)
            client.sendall(b"%4d" % number)
            assert read_exactly(backend, 4) == b"%4d" % number
        assert injections(log, "accept4") >= 5
    worker.wait_for(accepted=10, active=10)


@pytest.mark.parametrize("error", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"])
def test_accept_has_no_descriptor(start_tcp: StartWorker, peers: Peers, error: str) -> None:
    """R1: no descriptor left: accepting rests, does not spin, and goes on when there are some again."""
    server = peers.server()
    worker = start_tcp(destination(server))
    with injected(worker.pid, f"accept4:error={error}") as log:
        client = peers.connect(worker)
        wait_until(lambda: injections(log, "accept4") >= 4, "accepting is never tried again")
        client.sendall(b"waiting")
    backend = peers.accept(server)
    assert read_exactly(backend, 7) == b"waiting"
    assert 4 <= worker.counter("no_descriptor") < 20, "it spins"


def test_no_pipe_is_to_be_had(start_tcp: StartWorker, peers: Peers) -> None:
    """R2: pipe2 fails: the direction copies."""
    server = peers.server()
    worker = start_tcp(destination(server))
    check_intact(worker, peers, server, {"pipe2": "error=ENFILE"})
    assert worker.counter("pipes_open") == 0


def test_pipes_shrink_to_a_page(start_tcp: StartWorker, peers: Peers) -> None:
    """R2: past pipe-user-pages-soft the size cannot be set and the pipe is tiny: it is not used."""
    server = peers.server()
    worker = start_tcp(destination(server))
    check_intact(worker, peers, server, {"fcntl": "retval=4096"})
    assert worker.counter("pipes_open") == 0


def test_denied_pipes_are_not_asked_for_at_each_move(start_tcp: StartWorker, peers: Peers) -> None:
    """R2: while the kernel gives no pipe, a bulk stream costs what a copied one costs."""
    server = peers.server()
    worker = start_tcp(destination(server))
    begin = time.monotonic()
    with injected(worker.pid, "pipe2:error=ENFILE") as log:
        for _ in range(3):
            client, backend = peers.pair(worker, server)
            exchange(client, backend, 32 * MIB)
        tries = injections(log, "pipe2")
    assert 1 <= tries <= 2 + time.monotonic() - begin


@pytest.mark.parametrize("end", [True, False], ids=["end", "no-end"])
def test_answered_and_reset_before_the_loop_looks(
    start_tcp: StartWorker, peers: Peers, end: bool
) -> None:
    """T6: the backend took the connection: its words arrive, and it is dialled once."""
    server = peers.server()
    worker = start_tcp(destination(server))
    with injected(worker.pid, "connect:delay_exit=300000"):
        client = peers.connect(worker)
        backend = peers.accept(server)
        backend.sendall(b"421 too many")
        if end:
            backend.shutdown(socket.SHUT_WR)
        reset(backend)
        assert read_to_reset(client) == b"421 too many"
    worker.wait_for(accepted=1, reset=1, dial_failed=0, held_total=0)
    check_tcp_counters(worker)


@pytest.mark.parametrize("call", ["socket", "connect"])
def test_dialling_has_no_memory(start_tcp: StartWorker, peers: Peers, call: str) -> None:
    """R1, C11: a dial that fails for want of memory is held and tried again, not lost."""
    server = peers.server()
    worker = start_tcp(destination(server))
    with injected(worker.pid, f"{call}:error=ENOMEM:when=1..5+1") as log:
        client = peers.connect(worker)
        client.sendall(b"patience")
        backend = peers.accept(server)
        assert read_exactly(backend, 8) == b"patience"
        assert injections(log, call) == 5
    assert worker.counter("dial_failed") == 5


def test_no_local_port_is_left(start_tcp: StartWorker, peers: Peers) -> None:
    """T14: connect gives EADDRNOTAVAIL: a reset and a counter."""
    server = peers.server()
    worker = start_tcp(destination(server))
    with injected(worker.pid, "connect:error=EADDRNOTAVAIL"):
        assert peers.is_refused(worker)
    worker.wait_for(no_local_port=1, reset=1, active=0)
    check_tcp_counters(worker)


def test_a_short_splice(start_tcp: StartWorker, peers: Peers) -> None:
    """T2: splices are cut short by a reader that takes a little at a time from a full path."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    sent = fill(client, bytes(range(256)) * 1000)
    client.shutdown(socket.SHUT_WR)
    got = bytearray()
    while data := backend.recv(100_000 if len(got) % 7 else 1):
        got += data
    assert bytes(got) == (bytes(range(256)) * (sent // 256 + 1))[:sent]
