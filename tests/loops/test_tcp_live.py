"""What changes while connections are open: options, and weights of backends. No connection is lost."""

from __future__ import annotations

import dataclasses
import socket
from concurrent.futures import ThreadPoolExecutor

from tests.support.endpoints import Peers, exchange, read_exactly, read_to_reset
from tests.support.worker import Destination, StartWorker, check_tcp_counters, destination

MIB = 1 << 20


def weighted(server: socket.socket, weight: int, identity: int = 1) -> Destination:
    number, backend = destination(server, identity)
    return number, dataclasses.replace(backend, weight=weight)


def converse(client: socket.socket, backend: socket.socket) -> None:
    for one, other in ((client, backend), (backend, client)):
        one.sendall(b"x")
        assert read_exactly(other, 1) == b"x"


def test_weight_0_keeps_what_is_open(start_tcp: StartWorker, peers: Peers) -> None:
    """The only backend gets weight 0: open connections go on, new clients are held until it has one again."""
    server = peers.server()
    worker = start_tcp(weighted(server, 1))
    pair = peers.pair(worker, server)
    converse(*pair)
    worker.repoint(weighted(server, 0))
    converse(*pair)
    waiting = peers.connect(worker)
    worker.wait_for(held=1, active=2)
    converse(*pair)
    worker.repoint(weighted(server, 1))
    converse(waiting, peers.accept(server))
    converse(*pair)
    worker.wait_for(active=2, reset=0, rejected=0)
    check_tcp_counters(worker)


def test_weight_0_gets_nothing_new(start_tcp: StartWorker, peers: Peers) -> None:
    """The other backend gets every new client, also those that were held."""
    leaving, staying = peers.server(), peers.server()
    worker = start_tcp(weighted(leaving, 0), weighted(leaving, 0, 2))
    held = [peers.connect(worker) for _ in range(3)]
    worker.wait_for(held=3)
    worker.repoint(weighted(leaving, 0), weighted(staying, 2, 3), weighted(leaving, 0, 2))
    for client in held:
        converse(client, peers.accept(staying))
    for _ in range(5):
        converse(*peers.pair(worker, staying))
    leaving.settimeout(0.1)
    try:
        leaving.accept()
    except TimeoutError:
        pass
    else:
        raise AssertionError("a backend of weight 0 got a client")
    worker.wait_for(active=8, reset=0, rejected=0)


def test_options_change_under_traffic(start_tcp: StartWorker, peers: Peers) -> None:
    """Idle timeout, limit and hold change again and again; every byte arrives and every end is clean."""
    server = peers.server()
    worker = start_tcp(destination(server))
    pairs = [peers.pair(worker, server) for _ in range(4)]
    with ThreadPoolExecutor(len(pairs)) as threads:
        streams = [threads.submit(exchange, *pair, 24 * MIB) for pair in pairs]
        for turn in range(20):
            worker.change(
                idle_timeout=60_000 * (turn % 2), max_connections=4 * (turn % 3), hold=100 * turn
            )
        for stream in streams:
            stream.result()
    worker.wait_for(active=0, closed=4, reset=0, rejected=0)
    check_tcp_counters(worker)


def test_new_options_are_obeyed(start_tcp: StartWorker, peers: Peers) -> None:
    """A limit holds for the next client, a hold for the next one held, an idle timeout for all."""
    server = peers.server()
    worker = start_tcp(destination(server), idle_timeout=0, max_connections=0, hold=60_000)
    pair = peers.pair(worker, server)
    converse(*pair)
    worker.change(max_connections=1)
    assert peers.is_refused(worker)
    worker.change(max_connections=0, hold=100)
    worker.repoint()  # resets what is open
    assert read_to_reset(pair[0]) == b""
    assert peers.is_refused(worker)  # once its hold is over
    worker.wait_for(rejected=2, over_limit=1, active=0)
    worker.repoint(destination(server, 2))
    pair = peers.pair(worker, server)
    converse(*pair)
    worker.change(idle_timeout=1_000)
    assert read_to_reset(pair[0]) == b""
    worker.wait_for(active=0, idle_closed=1)
    check_tcp_counters(worker)
