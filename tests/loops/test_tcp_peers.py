"""Peers that read slowly, vanish without a word, or are at the end of a bad line.

Fault rows T8, T9, T12, S7.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.endpoints import Peers, exchange, fill, read_exactly, read_to_reset
from tests.support.net import Namespace, linked
from tests.support.processes import peer_of, private_kb, processor_s, sockets_of
from tests.support.program import Program
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, check_tcp_counters, destination

MIB = 1 << 20


def ping_pong_ms(client: socket.socket, backend: socket.socket, count: int = 300) -> float:
    """The median of so many one-byte round trips."""
    took = []
    for _ in range(count):
        begin = time.perf_counter()
        client.sendall(b"?")
        backend.sendall(read_exactly(backend, 1))
        read_exactly(client, 1)
        took.append((time.perf_counter() - begin) * 1000)
    return statistics.median(took)


@pytest.mark.alone
def test_slow_readers(start_tcp: StartWorker, peers: Peers) -> None:
    """T8: forty that do not read cost neither memory, nor processor time, nor a neighbour's latency."""
    server = peers.server()
    worker = start_tcp(destination(server))
    neighbours = peers.pair(worker, server)
    alone_ms = ping_pong_ms(*neighbours)
    before = 1024 * private_kb(worker.pid)
    pairs = [peers.pair(worker, server) for _ in range(20)]
    with ThreadPoolExecutor(40) as threads:
        ends = [sock for pair in pairs for sock in pair]
        sent = list(threads.map(fill, ends))
    assert min(sent) > MIB, "full is more than that"
    # What waits is in the kernel's buffers and pipes; of its own a worker has 64 KB to a direction.
    assert 1024 * private_kb(worker.pid) - before < 40 * 64 * 1024 + MIB

    used = processor_s(worker.pid)
    time.sleep(0.5)
    assert processor_s(worker.pid) - used <= 0.03, "it goes round in circles"
    beside_ms = ping_pong_ms(*neighbours)
    print(f"a round trip: {alone_ms:.3f} ms alone, {beside_ms:.3f} ms beside 20 full connections")
    assert beside_ms < 2 * alone_ms + 1

    for (client, backend), (to_backend, to_client) in zip(
        pairs, zip(sent[::2], sent[1::2], strict=True), strict=True
    ):
        read_exactly(backend, to_backend)
        read_exactly(client, to_client)
    check_tcp_counters(worker)


# ------------------------------------------------------------------------------------------------ T9


def in_namespace(peers: Peers, namespace: Namespace) -> socket.socket:
    return peers.keep(namespace.socket(socket.AF_INET, socket.SOCK_STREAM))


def served_in(peers: Peers, namespace: Namespace) -> socket.socket:
    server = in_namespace(peers, namespace)
    server.bind((namespace.theirs4, 0))
    server.listen()
    return server


def test_client_that_vanishes(start_tcp: StartWorker, peers: Peers) -> None:
    """T9: keepalive finds a silent client that is no longer there, and the backend sees a reset."""
    server = peers.server()
    with linked() as namespace:
        worker = start_tcp(destination(server))
        for name, value in (("KEEPIDLE", 1), ("KEEPINTVL", 1), ("KEEPCNT", 2)):
            option = getattr(socket, f"TCP_{name}")
            assert worker.listener.getsockopt(socket.IPPROTO_TCP, option) > value, "it is not set"
            worker.listener.setsockopt(socket.IPPROTO_TCP, option, value)
        client = in_namespace(peers, namespace)
        client.connect((namespace.ours4, worker.port))
        backend = peers.accept(server)
        client.sendall(b"here")
        assert read_exactly(backend, 4) == b"here"
        namespace.drop()
        begin = time.monotonic()
        assert read_to_reset(backend) == b""
        assert 1.5 < time.monotonic() - begin < 8
        worker.wait_for(active=0, reset=1)


def test_keepalive_is_spread_out(start_tcp: StartWorker, peers: Peers) -> None:
    """T9: the kernel fires timers of a minute in batches; thousands of probes at once would get lost."""
    server = peers.server()
    worker = start_tcp(destination(server))
    pairs = [peers.pair(worker, server) for _ in range(30)]

    def idle_times() -> Counter[int]:
        return Counter(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            for sock in sockets_of(worker.pid)
            if peer_of(sock) is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        )

    wait_until(lambda: sum(idle_times().values()) == 2 * len(pairs), "no keepalive")
    found = idle_times()
    assert set(found.values()) == {2}, (
        "one time for both sides of a connection, another for the next"
    )
    assert min(found) >= 30
    assert max(found) <= 90


def test_backend_that_vanishes_with_bytes_on_their_way(peers: Peers) -> None:
    """T9: then the kernel's retransmissions end it (net.ipv4.tcp_retries2), with a reset as well."""
    with linked() as namespace:
        # The relay stands in the namespace, which has this setting for itself.
        namespace.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/tcp_retries2")
        server = peers.server(namespace.ours4)
        port = server.getsockname()[1]
        relay = Program(
            "relay",
            f"7000/tcp={namespace.ours4}:{port}",
            before=["ip", "netns", "exec", namespace.name],
        )
        try:
            relay.wait_for_line("listening")
            client = in_namespace(peers, namespace)
            client.connect(("127.0.0.1", 7000))
            backend = peers.accept(server)
            client.sendall(b"here")
            assert read_exactly(backend, 4) == b"here"
            namespace.run("iptables", "-A", "INPUT", "-s", namespace.ours4, "-j", "DROP")
            begin = time.monotonic()
            client.sendall(b"anybody?")
            assert read_to_reset(client) == b""
            assert time.monotonic() - begin < 15
        finally:
            relay.stop()


# ----------------------------------------------------------------------------------------------- T12


def test_one_percent_loss(start_tcp: StartWorker, peers: Peers) -> None:
    """T12: one packet in a hundred vanishes, both ways on both sides: checksums equal."""
    with linked() as here, linked() as there:
        server = served_in(peers, there)
        worker = start_tcp(destination(server))
        client = in_namespace(peers, here)
        client.connect((here.ours4, worker.port))
        backend = peers.accept(server)
        for namespace in (here, there):
            namespace.drop("-m", "statistic", "--mode", "random", "--probability", "0.01")
        exchange(client, backend, 64 * MIB)
        lost = here.dropped() + there.dropped()
        print("packets lost:", lost)
        assert min(lost) > 0
        worker.wait_for(active=0, closed=1, reset=0)
        check_tcp_counters(worker)


# ------------------------------------------------------------------------------------------------ S7


@pytest.mark.alone
def test_flood_of_connections(start_tcp: StartWorker, peers: Peers) -> None:
    """S7: an address that opens thousands and says nothing: others are served as before."""
    server = peers.server()
    worker = start_tcp(destination(server))
    neighbours = peers.pair(worker, server)
    alone_ms = ping_pong_ms(*neighbours)
    before = 1024 * private_kb(worker.pid)
    flood = [peers.pair(worker, server) for _ in range(2_000)]
    assert (1024 * private_kb(worker.pid) - before) / len(flood) < 2_000
    beside_ms = ping_pong_ms(*neighbours)
    print(f"a round trip: {alone_ms:.3f} ms alone, {beside_ms:.3f} ms beside {len(flood)}")
    assert beside_ms < 2 * alone_ms + 1
    begin = time.monotonic()
    client, backend = peers.pair(worker, server)
    client.sendall(b"x")
    assert read_exactly(backend, 1) == b"x"
    assert time.monotonic() - begin < 1
    for pair in flood:
        for sock in pair:
            sock.close()
    worker.wait_for(active=2)
    check_tcp_counters(worker)


def test_flood_of_held_connections(start_tcp: StartWorker, peers: Peers) -> None:
    """S7: while there is no backend a flood fills the list and no more; after it all is well."""
    worker = start_tcp(max_held=100, hold=1_000)
    before = 1024 * private_kb(worker.pid)
    flood = [peers.connect(worker) for _ in range(100)]
    worker.wait_for(held=100)
    assert all(peers.is_refused(worker) for _ in range(200))
    assert 1024 * private_kb(worker.pid) - before < MIB
    for sock in flood:
        assert read_to_reset(sock) == b""
    worker.wait_for(held=0, active=0, rejected=300)
    server = peers.server()
    worker.repoint(destination(server))
    client, backend = peers.pair(worker, server)
    client.sendall(b"x")
    assert read_exactly(backend, 1) == b"x"
