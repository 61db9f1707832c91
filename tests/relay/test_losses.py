"""What is lost is said: the counters page is looked at, and what has risen is a line in the log."""

from __future__ import annotations

import socket

from ambassador.model import Backend
from ambassador.supervise.worker import LOSSES

from .conftest import Start
from .harness import wait_until
from .peers import Peers


def test_a_rejected_connection_is_a_loss_once(start_tcp: Start, peers: Peers) -> None:
    """C11: nobody listens: refused within the hold policy, and counted."""
    refusing = peers.bound()
    worker = start_tcp((1, Backend("127.0.0.1", refusing.getsockname()[1])), hold=50)
    assert worker.handle.losses() == {}
    for _ in range(3):
        assert peers.is_refused(worker)
    worker.wait_for(rejected=3)
    assert worker.handle.losses() == {"rejected": 3}
    assert worker.handle.losses() == {}
    assert peers.is_refused(worker)
    worker.wait_for(rejected=4)
    assert worker.handle.losses() == {"rejected": 1}


def test_a_dropped_datagram_is_a_loss(start_udp: Start, peers: Peers) -> None:
    client = peers.udp()
    worker = start_udp(hold=0)
    client.sendto(b"lost", ("127.0.0.1", worker.port))
    worker.wait_for(dropped_no_backend=1)
    assert worker.handle.losses() == {"dropped_no_backend": 1}


def test_every_loss_is_a_counter_of_some_loop(start_tcp: Start, start_udp: Start) -> None:
    assert set(LOSSES) <= {*start_tcp().counters(), *start_udp().counters()}


def test_an_ordinary_end_is_no_loss(start_tcp: Start, peers: Peers) -> None:
    server = peers.server()
    worker = start_tcp((1, Backend("127.0.0.1", server.getsockname()[1])))
    client, backend = peers.pair(worker, server)
    client.shutdown(socket.SHUT_WR)
    backend.close()
    client.close()
    wait_until(lambda: worker.counter("active") == 0, "the connection does not end")
    assert worker.handle.losses() == {}
