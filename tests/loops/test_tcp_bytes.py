"""Bytes: all of them, in their order, unaltered, however they are moved."""

from __future__ import annotations

import random
import socket
import statistics
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.endpoints import (
    Peers,
    check_tape,
    exchange,
    fill,
    read_exactly,
    read_to_end,
    send_tape,
)
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, Worker, check_tcp_counters, destination

MIB = 1 << 20

WAYS = {"splice": 1 << 20, "copy": 0, "tiny-pipes": 4096}
"""The ways to move bytes, as the pipe size that forces each."""


def check_all_done(worker: Worker, received: int) -> None:
    worker.wait_for(active=0, closed=1, reset=0)
    counters = worker.counters()
    assert counters["received_from_client"] == counters["sent_to_backend"] == received
    assert counters["received_from_backend"] == counters["sent_to_client"] == received
    check_tcp_counters(worker)


def test_much_data_each_way_at_once(start_tcp: StartWorker, peers: Peers, loopback: str) -> None:
    """Invariant 1: 128 MiB each way, at the same time, byte for byte (a GiB: tests/soak)."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server, loopback)
    exchange(client, backend, 128 * MIB)
    check_all_done(worker, 128 * MIB)
    assert worker.counter("pipes_open") > 0, "nothing was ever spliced"


@pytest.mark.parametrize("way", ["copy", "tiny-pipes"])
def test_much_data_each_way_without_good_pipes(
    start_tcp: StartWorker, peers: Peers, way: str
) -> None:
    """R2, invariant 1: copying by force, and pipes of one page, carry the same bytes."""
    server = peers.server()
    worker = start_tcp(destination(server), pipe_bytes=WAYS[way])
    client, backend = peers.pair(worker, server)
    exchange(client, backend, 256 * MIB)
    check_all_done(worker, 256 * MIB)
    assert (worker.counter("pipes_open") > 0) == (way == "tiny-pipes")


@pytest.mark.parametrize(
    ("way", "count"), [("splice", 65_535), ("copy", 16_383), ("tiny-pipes", 16_383)]
)
def test_small_writes_keep_their_order(
    start_tcp: StartWorker, peers: Peers, way: str, count: int
) -> None:
    """Invariant 1: sequenced small writes, there and back through an echo."""
    server = peers.server()
    worker = start_tcp(destination(server), pipe_bytes=WAYS[way])
    client, backend = peers.pair(worker, server)

    def write() -> None:
        for number in range(count):
            client.send(struct.pack("<I", number))
        client.shutdown(socket.SHUT_WR)

    def echo() -> None:
        while data := backend.recv(4096):
            backend.sendall(data)
        backend.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(write), threads.submit(echo)]
        got = read_to_end(client)
        for job in jobs:
            job.result()
    assert got == struct.pack(f"<{count}I", *range(count))
    check_all_done(worker, 4 * count)


@pytest.mark.parametrize("way", WAYS)
def test_tiny_socket_buffers(start_tcp: StartWorker, peers: Peers, way: str) -> None:
    """T2: every send is cut short by a receiver that takes a few KiB at a time."""
    server = peers.bound()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    server.listen()
    worker = start_tcp(destination(server), pipe_bytes=WAYS[way])
    client, backend = peers.pair(worker, server)
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(send_tape, client, 1, 8 * MIB)
        check_tape(backend, 1, 8 * MIB)
        sending.result()
    backend.close()
    assert read_to_end(client) == b""
    worker.wait_for(closed=1, active=0, sent_to_backend=8 * MIB)


def reached(worker: Worker, received: int) -> bool:
    return worker.counter("received_from_client") >= received


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 64), st.integers(1, 300_000)), min_size=1, max_size=12),
    pauses=st.sets(st.integers(0, 11)),
    seed=st.integers(0, 2**32),
)
def test_any_mixture_of_writes(
    mixing: tuple[Worker, socket.socket], sizes: list[int], pauses: set[int], seed: int
) -> None:
    """Invariant 1: whatever the sizes, and wherever the reader pauses, the bytes are the same."""
    worker, server = mixing
    data = [random.Random(seed + place).randbytes(size) for place, size in enumerate(sizes)]
    peers = Peers()
    try:
        client, backend = peers.pair(worker, server)
        sent = 0
        received = bytearray()
        before = worker.counter("received_from_client")
        for place, piece in enumerate(data):
            client.sendall(piece)  # never more than the buffers on the way take
            sent += len(piece)
            if place in pauses:
                # The backend does not read: the relay takes what it can keep.
                goal = before + min(sent, len(received) + 1_000_000)
                reads = partial(reached, worker, goal)
                wait_until(reads, "the relay does not read")
            elif len(received) < sent:
                received += read_exactly(backend, sent - len(received))
        client.shutdown(socket.SHUT_WR)
        received += read_to_end(backend)
        assert received == b"".join(data)
    finally:
        peers.close()


@pytest.fixture
def mixing(start_tcp: StartWorker, peers: Peers) -> tuple[Worker, socket.socket]:
    server = peers.server()
    return start_tcp(destination(server)), server


@pytest.mark.alone
@pytest.mark.parametrize("way", WAYS)
def test_one_byte_writes_into_a_full_path(start_tcp: StartWorker, peers: Peers, way: str) -> None:
    """T1: every buffer is full, one-byte writes follow, the reader resumes: no stall over a second."""
    server = peers.server()
    worker = start_tcp(destination(server), pipe_bytes=WAYS[way])
    client, backend = peers.pair(worker, server)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    before = fill(client)
    ones = 20_000

    def write_ones() -> None:
        for number in range(ones):
            client.sendall(bytes([number % 251]))
        client.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write_ones)
        worst, got, buffer = 0.0, bytearray(), bytearray(1 << 16)
        last = time.monotonic()
        while count := backend.recv_into(buffer):
            worst = max(worst, time.monotonic() - last)
            got += buffer[:count]
            last = time.monotonic()
        writing.result()
    assert got[before:] == bytes(number % 251 for number in range(ones))
    assert len(got) == before + ones
    assert worst < 1.0, f"the reader had to wait {worst:.2f} s"


@pytest.mark.alone
def test_two_small_writes_in_a_row_are_not_delayed(start_tcp: StartWorker, peers: Peers) -> None:
    """T13: the second would wait for the other end's delayed acknowledgement, 40 ms, in either direction."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    took = []
    for _ in range(60):
        begin = time.perf_counter()
        for one, other in ((client, backend), (backend, client)):
            one.sendall(b"1")
            assert read_exactly(other, 1) == b"1"  # so that the worker has read them apart
            one.sendall(b"2")
            assert read_exactly(other, 1) == b"2"
        took.append(time.perf_counter() - begin)
    assert statistics.median(took) < 0.02


def test_one_byte_there_and_back(start_tcp: StartWorker, peers: Peers, loopback: str) -> None:
    """T13: one-byte ping-pong takes less than 5 ms at the 99th percentile."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server, loopback)

    def echo() -> None:
        while data := backend.recv(16):
            backend.send(data)

    worst_of_batches = []
    with ThreadPoolExecutor(1) as threads:
        echoing = threads.submit(echo)
        for _ in range(15):
            times = []
            for _ in range(200):
                begin = time.perf_counter()
                client.send(b"x")
                assert client.recv(16) == b"x"
                times.append(time.perf_counter() - begin)
            worst_of_batches.append(statistics.quantiles(times, n=100)[98])
        client.shutdown(socket.SHUT_WR)
        echoing.result()
    # The median over batches: other work on this machine makes some of them slow, a relay that
    # waits for more bytes or for a timer makes all of them slow.
    assert statistics.median(worst_of_batches) < 0.005, worst_of_batches
