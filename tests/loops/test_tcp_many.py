"""Many connections: nothing crosses over, nothing is left behind, nothing is uncounted."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from tests.support.endpoints import Peers, Server, exchange, fill, read_exactly, read_to_end, reset
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, Worker, check_tcp_counters, destination

RECORD = 16


def tag(number: int) -> bytes:
    """What only this connection says."""
    return struct.pack("<QQ", number, ~number & (1 << 64) - 1)


def at_rest(worker: Worker) -> int:
    """The number of its descriptors once no connection is left, and nothing pooled or spare."""
    worker.wait_for(active=0, held=0, pipes_open=0, spare=0)
    return len(worker.descriptors())


def talk(worker: Worker, number: int, how: str) -> None:
    """One client's life: records there and back, and one of several ends."""
    peers = Peers()
    try:
        client = peers.connect(worker, "::1" if number % 2 else "127.0.0.1")
        count = 20_000 if how == "bulk" else 10
        data = tag(number) * count
        if how == "bulk":
            with ThreadPoolExecutor(1) as threads:
                sending = threads.submit(client.sendall, data)
                assert read_exactly(client, len(data)) == data
                sending.result()
        elif how != "silent":
            client.sendall(data)
            assert read_exactly(client, len(data)) == data
        if how == "reset":
            reset(client)
            return
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b""
    finally:
        peers.close()


HOWS = ["talk", "talk", "reset", "silent", "bulk", "talk", "talk", "reset", "talk", "talk"]


def test_a_thousand_connections_leave_nothing_behind(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariants 3 and 4: 1,000 connections with every kind of end; descriptors are as before."""
    server = peers.server()
    worker = start_tcp(destination(server))
    baseline = len(worker.descriptors())
    with Server(server, record=RECORD), ThreadPoolExecutor(16) as threads:
        jobs = [threads.submit(talk, worker, n, HOWS[n % len(HOWS)]) for n in range(1000)]
        for job in jobs:
            job.result()
        assert at_rest(worker) == baseline
    now = worker.counters()
    assert now["accepted"] == 1000
    assert now["closed"] == 800
    assert now["reset"] == 200
    check_tcp_counters(worker)


def test_a_thousand_at_once(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariants 2, 3 and 4: 1,000 open connections, each with its own data, then none."""
    server = peers.server()
    worker = start_tcp(destination(server))
    baseline = len(worker.descriptors())
    with Server(server, record=RECORD):
        clients = [peers.connect(worker) for _ in range(1000)]
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(tag(number) * (turn + 1))
            for number, client in enumerate(clients):
                assert read_exactly(client, RECORD * (turn + 1)) == tag(number) * (turn + 1)
        worker.wait_for(active=1000, accepted=1000)
        assert len(worker.descriptors()) == baseline + 2000, "an idle connection holds two sockets"
        check_tcp_counters(worker)
        for client in clients:
            client.close()
        assert at_rest(worker) == baseline
    worker.wait_for(closed=1000, reset=0)
    check_tcp_counters(worker)


def test_more_bulk_streams_than_pooled_pipes(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariant 4: many stuck bulk streams hold pipes with bytes; afterwards a bounded pool is left."""
    server = peers.bound()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    server.listen(200)
    # Pipes so small that a worker's account (64 MB, for it is not root) has room for all.
    worker = start_tcp(destination(server), pipe_bytes=1 << 18)
    baseline = len(worker.descriptors())
    pairs = [peers.pair(worker, server) for _ in range(80)]
    with ThreadPoolExecutor(8) as threads:
        sent = list(threads.map(lambda pair: fill(pair[0], bytes(1 << 16)), pairs))
    stuck = worker.counter("pipes_open")
    assert stuck > 64, "too few streams were bulk to tell anything"
    check_tcp_counters(worker)
    for number, (client, backend) in enumerate(pairs):
        if number % 3:
            client.shutdown(socket.SHUT_WR)
            assert len(read_to_end(backend)) == sent[number]
        else:
            reset(backend)
        client.close()
        backend.close()
    assert at_rest(worker) == baseline
    assert worker.counter("pipes_open") <= 64
    check_tcp_counters(worker)


def test_a_dead_stream_leaves_no_byte_to_the_next(start_tcp: StartWorker, peers: Peers) -> None:
    """T17, invariant 2: streams are reset with bytes in their pipes: no later stream gets those bytes."""
    server = peers.server()
    worker = start_tcp(destination(server))
    dying = [peers.pair(worker, server) for _ in range(4)]
    for client, _ in dying:
        fill(client, b"dead" * 100_000)
    assert worker.counter("pipes_open") > 0, "nothing is in a pipe"
    for client, backend in dying:
        reset(client)
        reset(backend)
    worker.wait_for(reset=4, active=0)
    for _ in range(4):
        exchange(*peers.pair(worker, server), 32 << 20)
    check_tcp_counters(worker)


def test_descriptors_reused_inside_one_batch(start_tcp: StartWorker, peers: Peers) -> None:
    """T17: connections end and begin in one batch of events, so numbers are reused: nothing crosses over."""
    server = peers.server()
    worker = start_tcp(destination(server))
    choose = random.Random(17)
    number = 0
    open_now: dict[int, socket.socket] = {}
    with Server(server, record=RECORD) as echo:
        for _ in range(40):
            with worker.stopped():  # everything in here is one batch when it goes on
                for old in choose.sample(sorted(open_now), len(open_now) * 2 // 3):
                    client = open_now.pop(old)
                    client.sendall(tag(old) * choose.randrange(1, 2000))
                    if choose.random() < 0.5:
                        reset(client)
                    else:
                        client.close()
                for old, client in open_now.items():
                    client.sendall(tag(old))
                fresh = {}
                for _ in range(30):
                    number += 1
                    fresh[number] = peers.connect(worker)
                    fresh[number].sendall(tag(number))
                open_now |= fresh
            for ours, client in open_now.items():
                assert read_exactly(client, RECORD) == tag(ours)
        for client in open_now.values():
            client.close()
        worker.wait_for(active=0, accepted=number)
        wait_until(lambda: echo.accepted >= number, "a connection never reached the backend")
    check_tcp_counters(worker)


def test_late_events_of_a_connection_that_has_ended(start_tcp: StartWorker, peers: Peers) -> None:
    """T17: in one batch a client resets, its numbers go to newcomers, and only then its backend speaks."""
    server = peers.server()
    worker = start_tcp(destination(server))
    old = [peers.pair(worker, server) for _ in range(20)]
    with worker.stopped():
        for client, _ in old:
            reset(client)
        fresh = [peers.connect(worker) for _ in range(4)]  # as many as a turn accepts
        for number, client in enumerate(fresh):
            client.sendall(tag(number))
        for _, backend in old:
            backend.sendall(b"stranger")
    told = set()
    for _ in fresh:
        backend = peers.accept(server)
        told.add(said := read_exactly(backend, RECORD))
        backend.sendall(said)
    assert told == {tag(number) for number in range(len(fresh))}
    for number, client in enumerate(fresh):
        assert read_exactly(client, RECORD) == tag(number)
    worker.wait_for(active=len(fresh), reset=len(old))
    check_tcp_counters(worker)


def more_ended(worker: Worker, jobs: list[Future[bool]], count: int) -> bool:
    ended = worker.counter("accepted") - worker.counter("active")
    return ended >= count or all(job.done() for job in jobs)


def test_backends_come_and_go_under_load(start_tcp: StartWorker, peers: Peers) -> None:
    """C13, T17, invariant 5: repoints between three servers under load; nobody gets another's bytes."""
    servers = [peers.server() for _ in range(3)]
    worker = start_tcp(destination(servers[0], 1))
    baseline = len(worker.descriptors())
    done = 0

    def client_life(number: int) -> bool:
        try:
            talk(worker, number, "talk")
        except OSError as error:
            if error.errno not in {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}:
                raise
            return False  # its backend went, and it was reset: that is what it should see
        return True

    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(Server(server, record=RECORD))
        with ThreadPoolExecutor(8) as threads:
            jobs = [threads.submit(client_life, n) for n in range(400)]
            for generation in range(2, 60):
                worker.repoint(destination(servers[generation % 3], generation))
                ended = worker.counter("accepted") - worker.counter("active")
                wait_until(partial(more_ended, worker, jobs, ended + 5), "nobody gets through")
            done = sum(job.result() for job in jobs)
        assert done > 40, "hardly anybody got through"
        assert at_rest(worker) == baseline
    now = worker.counters()
    assert now["closed"] >= done
    assert now["rejected"] == 0
    check_tcp_counters(worker)
