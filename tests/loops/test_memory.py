"""What a worker keeps of a burst: at most 1 MB more than before it."""

from __future__ import annotations

import socket
import time

import pytest

from ambassador.values import Protocol
from tests.support.endpoints import Peers, exchange
from tests.support.processes import private_kb
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, destination

MB = 1_000_000
MB_KB = 1000
IDLE_KB = 500
BUFFER_KB = 64
"""The least that bulk reads touch of the worker's buffer, one after the other."""

pytestmark = pytest.mark.native


def test_udp_buffers_go_back(start_udp: StartWorker, peers: Peers) -> None:
    """Invariant 4: a burst touches a buffer of 64 KiB for each of its datagrams; later they are gone."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * MB)
    idle = private_kb(worker.pid)

    def burst() -> bool:
        with worker.stopped():
            for _ in range(32):
                client.sendto(bytes(60_000), ("127.0.0.1", worker.port))
        time.sleep(0.1)
        return private_kb(worker.pid) > idle + MB_KB

    wait_until(burst, "no burst ever needed more than 1 MB")
    wait_until(lambda: private_kb(worker.pid) < idle + MB_KB, "the buffers stay")


@pytest.mark.parametrize("protocol", Protocol)
def test_an_idle_worker_has_little_of_its_own(
    start_tcp: StartWorker, start_udp: StartWorker, protocol: Protocol
) -> None:
    """100 ports are 100 workers: below docker-proxy's 0.8 MB each, and a leak of pages to see at once."""
    worker = start_tcp() if protocol is Protocol.TCP else start_udp()
    assert private_kb(worker.pid) <= IDLE_KB


def test_tcp_pipes_and_buffer_go_back(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariant 4: bulk streams need pipes, and reads the worker's buffer; at rest neither is there."""
    server = peers.server()
    worker = start_tcp(destination(server))
    baseline = len(worker.descriptors())
    idle = private_kb(worker.pid)
    pairs = [peers.pair(worker, server) for _ in range(4)]
    for client, backend in pairs:
        exchange(client, backend, 16 * MB)
    assert worker.counter("pipes_open") > 0, "nothing was ever spliced"
    worker.wait_for(pipes_open=0, active=0)
    assert len(worker.descriptors()) == baseline
    assert private_kb(worker.pid) < idle + BUFFER_KB
    again, backend = peers.pair(worker, server)
    exchange(again, backend, 16 * MB)


def test_connections_go_back(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariant 4: thousands of connections come and go."""
    server = peers.server()
    server.listen(4096)
    worker = start_tcp(destination(server))
    idle = private_kb(worker.pid)
    for _ in range(3):
        ends = [socket.create_connection(("127.0.0.1", worker.port)) for _ in range(1500)]
        ends += [server.accept()[0] for _ in range(1500)]
        for end in ends:
            end.close()
    worker.wait_for(accepted=4500, active=0)
    assert private_kb(worker.pid) < idle + MB_KB // 2
