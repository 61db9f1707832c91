"""A backend that vanishes is found after its connection is 10 s old. Fault row T9."""

from __future__ import annotations

import socket
import time

from tests.loops.test_tcp_peers import served_in
from tests.support.endpoints import Peers, read_exactly, read_to_reset
from tests.support.net import linked
from tests.support.processes import borrowed
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, destination, sockets


def test_backend_that_vanishes(start_tcp: StartWorker, peers: Peers) -> None:
    """T9: the same for a backend; its socket gets the options when the connection is 10 s old."""
    with linked() as namespace:
        server = served_in(peers, namespace)
        worker = start_tcp(destination(server))
        client, backend = peers.pair(worker, server)
        client.sendall(b"here")
        assert read_exactly(backend, 4) == b"here"
        with borrowed(worker.pid, server.getsockname()) as sock:
            wait_until(
                lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), "no keepalive"
            )
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            now = [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options]
            assert 30 <= now[0] <= 90
            assert now[1:] == [sockets.KEEPALIVE_INTERVAL_S, sockets.KEEPALIVE_COUNT], (
                "one side is kept as the other"
            )
            for option, value in zip(options, (1, 1, 2), strict=True):  # two minutes are too long
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        namespace.drop()
        begin = time.monotonic()
        assert read_to_reset(client) == b""
        assert time.monotonic() - begin < 8
        worker.wait_for(active=0, reset=1)
