"""The seams of the TCP loop: an urgent byte, a backend that resets at once, an end behind a short read."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.support.endpoints import Peers, read_exactly, read_to_end, read_to_reset, reset
from tests.support.processes import turns
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, Worker, check_tcp_counters, destination


@pytest.mark.parametrize("side", ["client", "backend"])
def test_an_urgent_byte_stalls_nobody(start_tcp: StartWorker, peers: Peers, side: str) -> None:
    """T16: what stands behind the urgent mark is relayed at once; the byte itself stays out of the stream."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    one, other = (client, backend) if side == "client" else (backend, client)
    with worker.stopped():  # so that all three are queued when it looks
        one.send(b"A" * 10)
        one.send(b"!", socket.MSG_OOB)
        one.send(b"B" * 10)
    assert read_exactly(other, 20) == b"A" * 10 + b"B" * 10
    one.sendall(b"and on")
    assert read_exactly(other, 6) == b"and on"
    one.close()
    other.close()
    wait_until(lambda: worker.counter("active") == 0, "the connection does not end")


def stuck_pair(worker: Worker, peers: Peers) -> tuple[socket.socket, socket.socket, int]:
    """A pair whose backend does not read, filled until the worker reads no more. The client has room."""
    server = peers.bound()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    server.listen()
    worker.repoint(destination(server))
    client, backend = peers.pair(worker, server)
    sent, taken = 0, -1
    while worker.counter("received_from_client") != taken:
        taken = worker.counter("received_from_client")
        client.sendall(bytes(1 << 16))
        sent += 1 << 16
        time.sleep(0.05)
        # A worker that is only starved of a processor is not stuck.
        wait_until(lambda: psutil.Process(worker.pid).status() == "sleeping", "it does not rest")
    return client, backend, sent


def test_bytes_behind_a_full_destination_wake_nobody(start_tcp: StartWorker, peers: Peers) -> None:
    """T1, T8: what arrives while its direction is stuck costs no turn, and is not forgotten."""
    worker = start_tcp()
    client, backend, sent = stuck_pair(worker, peers)
    before = turns(worker.pid)
    for _ in range(100):
        client.sendall(b"more")
        time.sleep(0.003)
    assert turns(worker.pid) - before < 20, "each arrival is a turn"
    client.shutdown(socket.SHUT_WR)
    assert len(read_to_end(backend)) == sent + 400


def test_an_urgent_byte_behind_a_full_destination(start_tcp: StartWorker, peers: Peers) -> None:
    """T16: nobody is told of it there; what stands on both sides of the mark arrives, and then the end."""
    worker = start_tcp()
    client, backend, sent = stuck_pair(worker, peers)
    client.sendall(b"A" * 10)
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"B" * 10)
    client.shutdown(socket.SHUT_WR)
    time.sleep(0.05)  # so that word of the end has come as well
    assert read_to_end(backend) == bytes(sent) + b"A" * 10 + b"B" * 10


@pytest.mark.parametrize("ended", [False, True])
def test_an_urgent_byte_in_a_bulk_stream(start_tcp: StartWorker, peers: Peers, ended: bool) -> None:
    """T16: splice stops at the mark, and takes a FIN behind it for the end of the bytes."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(client.sendall, bytes(16 << 20))
        assert read_exactly(backend, 16 << 20) == bytes(16 << 20)
        sending.result()
    assert worker.counter("pipes_open") > 0, "nothing was ever spliced"
    with worker.stopped():
        client.sendall(b"A" * 10)
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"B" * 10)
        if ended:
            client.shutdown(socket.SHUT_WR)
    assert read_exactly(backend, 20) == b"A" * 10 + b"B" * 10
    if ended:
        assert read_to_end(backend) == b""
    else:
        client.sendall(b"and on")
        assert read_exactly(backend, 6) == b"and on"


def test_a_backend_that_accepts_and_resets_is_not_a_failed_dial(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """T6: it did take the connection: its reset is passed on, not waited for in the hold window."""
    server = peers.server()
    worker = start_tcp(destination(server))

    def turn_away() -> None:
        for _ in range(30):
            reset(server.accept()[0])

    turning = threading.Thread(target=turn_away)
    turning.start()
    for _ in range(30):
        assert peers.is_refused(worker)
    turning.join()
    worker.wait_for(accepted=30, reset=30, dial_failed=0, held_total=0)
    check_tcp_counters(worker)


def test_last_words_before_a_reset_at_once(start_tcp: StartWorker, peers: Peers) -> None:
    """T6: a backend that greets and resets: at most its greeting, then a reset, never a clean end."""
    server = peers.server()
    worker = start_tcp(destination(server))
    for _ in range(30):
        client = peers.connect(worker)
        backend = server.accept()[0]
        backend.sendall(b"no room\n")
        reset(backend)
        assert read_to_reset(client) in (b"", b"no room\n")
    worker.wait_for(reset=30, closed=0)


@pytest.mark.parametrize("size", [1, 1000, 40_000])
def test_bytes_and_end_that_arrive_together(
    start_tcp: StartWorker, peers: Peers, size: int
) -> None:
    """T5: the end that stands behind a short read is the end, in both directions, and nothing is missing."""
    server = peers.server()
    worker = start_tcp(destination(server))
    for _ in range(20):
        client, backend = peers.pair(worker, server)
        with worker.stopped():
            client.sendall(b"q" * size)
            client.shutdown(socket.SHUT_WR)
        assert read_to_end(backend) == b"q" * size
        with worker.stopped():
            backend.sendall(b"a" * size)
            backend.close()
        assert read_to_end(client) == b"a" * size
        client.close()
    worker.wait_for(closed=20, reset=0, active=0)
    check_tcp_counters(worker)
