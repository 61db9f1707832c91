"""The seams of the TCP loop: an urgent byte, a backend that resets at once, an end behind a short read."""

from __future__ import annotations

import socket
import threading

import pytest

from .conftest import Start
from .harness import check_tcp_counters, wait_until
from .peers import Peers, destination, read_exactly, read_to_end, read_to_reset, reset


@pytest.mark.parametrize("side", ["client", "backend"])
def test_an_urgent_byte_stalls_nobody(start_tcp: Start, peers: Peers, side: str) -> None:
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


def test_a_backend_that_accepts_and_resets_is_not_a_failed_dial(
    start_tcp: Start, peers: Peers
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


def test_last_words_before_a_reset_at_once(start_tcp: Start, peers: Peers) -> None:
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
def test_bytes_and_end_that_arrive_together(start_tcp: Start, peers: Peers, size: int) -> None:
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
