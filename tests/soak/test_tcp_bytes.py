"""A GiB each way: tests/loops has less of it. Invariant 1."""

from __future__ import annotations

from tests.loops.test_tcp_bytes import check_all_done
from tests.support.endpoints import Peers, exchange
from tests.support.worker import StartWorker, destination

GIB = 1 << 30


def test_a_gibibyte_each_way_at_once(start_tcp: StartWorker, peers: Peers, loopback: str) -> None:
    """Invariant 1: a GiB each way, at the same time, byte for byte."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server, loopback)
    exchange(client, backend, GIB)
    check_all_done(worker, GIB)
    assert worker.counter("pipes_open") > 0, "nothing was ever spliced"
