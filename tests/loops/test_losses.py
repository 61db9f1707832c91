"""What is lost is said: the counters page is looked at, and what has risen is a line in the log."""

from __future__ import annotations

import socket

from ambassador.counters import TCP, UDP
from tests.support.endpoints import Peers, read_to_reset
from tests.support.net import linked
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, destination


def test_a_rejected_connection_is_a_loss_once(start_tcp: StartWorker, peers: Peers) -> None:
    """C11: nobody listens: refused within the hold policy, and counted."""
    refusing = peers.bound()
    worker = start_tcp(destination(refusing), hold=50)
    assert worker.losses() == {}
    for _ in range(3):
        assert peers.is_refused(worker)
    worker.wait_for(rejected=3)
    assert worker.losses() == {"rejected_refused": 3}
    assert worker.losses() == {}
    assert peers.is_refused(worker)
    worker.wait_for(rejected=4)
    assert worker.losses() == {"rejected_refused": 1}


def test_a_backend_that_does_not_answer_is_another_loss(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """C12: packets that vanish have a line of their own; without a backend it is the plain one."""
    with linked() as namespace:
        worker = start_tcp(
            destination((namespace.black_hole4(), 80)), connect_timeout=100, hold=150
        )
        assert read_to_reset(peers.connect(worker)) == b""
        worker.wait_for(rejected=1)
        assert worker.losses() == {"rejected_unanswered": 1}
        worker.repoint()
        assert read_to_reset(peers.connect(worker)) == b""
        worker.wait_for(rejected=2)
        assert worker.losses() == {"rejected": 1}


def test_a_dropped_datagram_is_a_loss(start_udp: StartWorker, peers: Peers) -> None:
    client = peers.udp()
    worker = start_udp(hold=0)
    client.sendto(b"lost", ("127.0.0.1", worker.port))
    worker.wait_for(dropped_no_backend=1)
    assert worker.losses() == {"dropped_no_backend": 1}


def test_every_loss_is_a_counter_of_some_loop(
    start_tcp: StartWorker, start_udp: StartWorker
) -> None:
    losses = {row.name for row in (*TCP, *UDP) if row.loss}
    assert losses <= {*start_tcp().counters(), *start_udp().counters()}


def test_an_ordinary_end_is_no_loss(start_tcp: StartWorker, peers: Peers) -> None:
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    client.shutdown(socket.SHUT_WR)
    backend.close()
    client.close()
    wait_until(lambda: worker.counter("active") == 0, "the connection does not end")
    assert worker.losses() == {}
