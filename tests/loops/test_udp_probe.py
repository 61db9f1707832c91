"""A container that has just started does not listen yet: what waits for it must not be thrown at it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.endpoints import Peers, datagram, number_of, numbers, receive
from tests.support.wait import TIMEOUT_S, wait_until
from tests.support.worker import StartWorker, check_udp_counters, destination


@contextlib.contextmanager
def reserved() -> Iterator[int]:
    """A UDP port where nobody listens, so that the kernel refuses what is sent there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    yield port


def listen(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(TIMEOUT_S)
    sock.bind(("127.0.0.1", port))
    return sock


@pytest.mark.parametrize("late_s", [0.05, 0.4])
def test_what_waited_reaches_a_server_that_listens_late(
    start_udp: StartWorker, peers: Peers, late_s: float
) -> None:
    """U3, U7: after a repoint nothing is lost to a server that is not up yet, and order is kept."""
    clients = [peers.udp() for _ in range(3)]
    worker = start_udp()
    with reserved() as port:
        for number in range(20):
            for who, client in enumerate(clients):
                client.sendto(datagram(who, number, 60), ("127.0.0.1", worker.port))
        worker.wait_for(queued=60)
        worker.repoint(destination(("127.0.0.1", port)))
        time.sleep(late_s)
        clients[0].sendto(datagram(0, 20, 60), ("127.0.0.1", worker.port))
        worker.wait_for(received_from_client=61, queued=61)
        assert worker.counter("refused") >= 1, "the probe was refused, and everything still waits"
        with listen(port) as server:
            got = receive(server, 61)
    order: dict[int, list[int]] = {}
    for who, number in map(number_of, got):
        order.setdefault(who, []).append(number)
    assert order == {0: list(range(21)), 1: list(range(20)), 2: list(range(20))}
    worker.wait_for(queued=0, dropped_no_backend=0)


def test_a_server_that_listens_gets_the_rest_at_once(start_udp: StartWorker, peers: Peers) -> None:
    """The probe costs a listening server's clients some ten milliseconds, not a retry."""
    client, server = peers.udp(), peers.udp()
    worker = start_udp()
    for number in range(64):
        client.sendto(datagram(1, number, 60), ("127.0.0.1", worker.port))
    worker.wait_for(queued=64)
    worker.repoint(destination(server))
    assert numbers(receive(server, 64)) == list(range(64))
    assert worker.counter("refused") == 0
    check_udp_counters(worker)


def test_a_burst_in_the_moment_of_the_repoint_is_not_cut(
    start_udp: StartWorker, peers: Peers
) -> None:
    """While the probe is under way and not refused, a full queue is released rather than overflow."""
    client, server = peers.udp(), peers.udp()
    worker = start_udp()
    with worker.stopped():
        worker.tell(destination(server))
        for number in range(150):
            client.sendto(datagram(1, number, 60), ("127.0.0.1", worker.port))
    assert numbers(receive(server, 150)) == list(range(150))
    worker.wait_for(queued=0, dropped_no_backend=0)


def test_the_window_ends(start_udp: StartWorker, peers: Peers) -> None:
    """U3: nobody ever listens: the queue is given up after the hold window, counted, and no retry goes on."""
    client = peers.udp()
    worker = start_udp(hold=300)
    with reserved() as port:
        worker.repoint(destination(("127.0.0.1", port)))
        client.sendto(b"never", ("127.0.0.1", worker.port))
        worker.wait_for(queued=1)
        worker.wait_for(queued=0)
        refused = worker.counter("refused")
        assert refused >= 1
        time.sleep(0.3)
        assert worker.counter("refused") <= refused + 1, "the last one's own refusal, no more"


def test_a_target_that_goes_away_during_the_probe(start_udp: StartWorker, peers: Peers) -> None:
    """U7: held again, then another run: the probe is sent to that one, once."""
    client, server = peers.udp(), peers.udp()
    worker = start_udp()
    with reserved() as port:
        client.sendto(b"one", ("127.0.0.1", worker.port))
        client.sendto(b"two", ("127.0.0.1", worker.port))
        worker.wait_for(queued=2)
        worker.repoint(destination(("127.0.0.1", port)))
        wait_until(lambda: worker.counter("refused") > 0, "nothing has gone ahead")
        worker.wait_for(queued=2)
        worker.repoint()
        worker.repoint(destination(server, 2))
        assert receive(server, 2) == [b"one", b"two"]
    worker.wait_for(queued=0)


def test_a_probe_that_a_repoint_cuts_short(start_udp: StartWorker, peers: Peers) -> None:
    """U7: the probe to a backend that is gone already was sent: once, and counted once."""
    client, server, other = peers.udp(), peers.udp(), peers.udp()
    worker = start_udp()
    for number in range(5):
        client.sendto(datagram(1, number, 60), ("127.0.0.1", worker.port))
    worker.wait_for(queued=5)
    with worker.stopped():  # so that both changes come before the probe is over
        worker.tell(destination(server))
        worker.tell()
    worker.wait_for(generation=3)
    assert numbers(receive(server, 1)) == [0]
    check_udp_counters(worker)
    worker.repoint(destination(other, 2))
    assert numbers(receive(other, 4)) == [1, 2, 3, 4]
    worker.wait_for(queued=0, sent_to_backend=5)
    check_udp_counters(worker)
