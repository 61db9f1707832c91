"""The worker as a process: its end, its parent's end, its control pipe, its descriptors, its rest."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ambassador.values import Protocol
from tests.support.endpoints import Peers, fill, read_exactly, read_to_end, read_to_reset
from tests.support.net import free_port, is_free
from tests.support.processes import is_gone, limit_descriptors, stopped
from tests.support.strace import traced
from tests.support.wait import wait_until
from tests.support.worker import (
    EXIT_BAD_CONTROL,
    EXIT_DRAINED,
    EXIT_PARENT_GONE,
    VERSION,
    Bare,
    StartWorker,
    Worker,
    Yard,
    destination,
    drain_record,
    parent_of_workers,
    title_of,
    update_record,
)

# ------------------------------------------------------------------------------------------------ death


def test_killed_under_load(start_tcp: StartWorker, peers: Peers, loopback: str) -> None:
    """W1: SIGKILL with bytes in flight both ways: a reset for both sides, never a clean end."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server, loopback)
    sent = fill(client), fill(backend)
    worker.kill()
    assert len(read_to_reset(backend)) < sent[0]
    assert len(read_to_reset(client)) < sent[1]


def test_killed_at_rest(start_tcp: StartWorker, peers: Peers, loopback: str) -> None:
    """W1: SIGKILL while nothing moves, after a message or before any: a reset for both sides."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    pairs = [peers.pair(worker, server, loopback) for _ in range(3)]
    for client, backend in pairs[1:]:
        client.sendall(b"x")
        assert read_exactly(backend, 1) == b"x"
    worker.kill()
    for client, backend in pairs:
        assert read_to_reset(client) == b""
        assert read_to_reset(backend) == b""


@pytest.mark.parametrize("ended", ["client", "backend"])
def test_killed_when_half_closed(
    start_tcp: StartWorker, peers: Peers, loopback: str, ended: str
) -> None:
    """W1: SIGKILL after one side's end of file: the side that still reads sees a reset."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server, loopback)
    reading, sending = (client, backend) if ended == "client" else (backend, client)
    reading.shutdown(socket.SHUT_WR)
    assert read_to_end(sending) == b""
    sent = fill(sending)
    worker.kill()
    assert len(read_to_reset(reading)) < sent


def test_killed_while_holding(start_tcp: StartWorker, peers: Peers) -> None:
    """W1: SIGKILL with held connections: resets. The backlog survives, the port is never refused."""
    server = peers.server()
    worker = start_tcp()
    held = peers.connect(worker)
    worker.wait_for(held=1)
    worker.kill()
    assert read_to_reset(held) == b""
    queued = peers.connect(worker)  # nobody accepts it now, and nobody refuses it
    queued.sendall(b"for the next worker")
    replacement = Worker(worker.yard, Protocol.TCP, destination(server), takes_over=worker)
    backend = peers.accept(server)
    assert read_exactly(backend, 19) == b"for the next worker"
    replacement.close()


def test_descriptors_are_exactly_those_allowed(start: StartWorker, peers: Peers) -> None:
    """W7: standard streams, listener, control pipe, epoll (the counters are mapped): nothing else."""
    server = peers.server()
    for protocol in Protocol:
        workers = [start(protocol, destination(server)) for _ in range(3)]
        for worker in workers:
            found = worker.descriptors()
            assert len(found) == 6, found
            assert found[0] == found[1] == os.devnull
            assert found[2] == os.devnull, "a worker has no log"
            assert found[3].startswith("socket:")
            assert found[3] == str(Path(f"/proc/self/fd/{worker.listener.fileno()}").readlink())
            assert found[4].startswith("pipe:")
            assert found[max(found)] == "anon_inode:[eventpoll]"


def test_the_fork_server_keeps_no_descriptor_of_a_worker(
    yard: Yard,
) -> None:
    """W7, C13: fifty workers come and go; the fork server has as many descriptors as before."""

    def count() -> int:
        return len(list(Path(f"/proc/{yard.pid}/fd").iterdir()))

    before = count()
    for _ in range(50):
        Worker(yard, Protocol.TCP).close()
    wait_until(lambda: count() == before, "the fork server keeps descriptors")


# --------------------------------------------------------------------------------------------- control


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize(
    "said",
    [
        lambda _: b"",
        lambda start: start[:7],
        lambda start: start,
        lambda start: start + update_record(1, destination(("127.0.0.1", 1)), title="x"),
        lambda start: start + update_record(1)[:-1],
    ],
    ids=["nothing", "half-a-start", "start", "repoint", "half-a-repoint"],
)
def test_end_of_file_on_the_control_pipe(
    yard: Yard, protocol: Protocol, said: Callable[[bytes], bytes]
) -> None:
    """W4: the end of the control pipe is the parent's end, wherever it comes: exit at once, code 0."""
    worker = Bare(yard, protocol)
    worker.write(said(worker.start))
    worker.close()
    assert worker.exit_code() == EXIT_PARENT_GONE


GARBAGE = {
    "another-version": bytes([VERSION + 1]) + bytes(15),
    "unknown-type": bytes([VERSION, 99]) + bytes(14),
    "reserved-set": bytes([VERSION, 2, 1, 0]) + bytes(12),
    "far-too-long": bytes([VERSION, 2, 0, 0, 255, 255, 255, 255]) + bytes(8),
    "empty-repoint": bytes([VERSION, 2]) + bytes(14),
    "count-without-backends": update_record(1)[:18] + b"\xff\x03" + update_record(1)[20:],
    "noise": random.Random(4).randbytes(4096),
}


@pytest.mark.parametrize("serving", [False, True], ids=["first", "serving"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_on_the_control_pipe(yard: Yard, garbage: str, serving: bool) -> None:
    """W4: what is no control record ends the worker with its own exit code, and is no crash."""
    worker = Bare(yard)
    if serving:
        worker.write(worker.start)
        wait_until(worker.serves, "the worker does not serve")
    worker.write(GARBAGE[garbage])
    assert worker.exit_code() == EXIT_BAD_CONTROL
    worker.close()


def test_a_repoint_before_the_start(yard: Yard) -> None:
    """W4: a record out of turn is refused as well."""
    worker = Bare(yard)
    worker.write(update_record(1))
    assert worker.exit_code() == EXIT_BAD_CONTROL
    worker.close()


def test_a_second_start(yard: Yard) -> None:
    """W4: a worker serves one listener for life."""
    worker = Bare(yard)
    worker.write(worker.start)
    wait_until(worker.serves, "the worker does not serve")
    worker.write(worker.start)
    assert worker.exit_code() == EXIT_BAD_CONTROL
    worker.close()


def test_records_byte_by_byte(yard: Yard) -> None:
    """W4: a record may arrive in any pieces."""
    worker = Bare(yard)
    for byte in worker.start + update_record(7, title="slowly") + drain_record(0):
        worker.write(bytes([byte]))
    assert worker.exit_code() == EXIT_DRAINED
    assert worker.generation == 7
    worker.close()


@pytest.mark.alone
def test_a_full_control_pipe(start_tcp: StartWorker, peers: Peers) -> None:
    """W6: thousands of repoints for a stopped worker: the parent never blocks; the newest one wins."""
    server, last = peers.server(), peers.server()
    worker = start_tcp(destination(server))
    many = tuple(destination(("192.0.2.1", 80), number) for number in range(100, 150))
    with worker.stopped():
        slowest = 0.0
        for _ in range(5000):
            begin = time.monotonic()
            worker.tell(*many)
            slowest = max(slowest, time.monotonic() - begin)
        worker.tell(destination(last, 99))
        assert slowest < 0.5, "the parent was blocked"
        assert worker.blocked_on >= 0, "the control pipe was never full"
    while (blocked := worker.blocked_on) >= 0:
        assert select.select([], [blocked], [], 10)[1], "the worker does not read"
        worker.flush()
    worker.wait_for(generation=worker.generation, backends=1)
    client = peers.connect(worker)
    client.sendall(b"x")
    assert read_exactly(peers.accept(last), 1) == b"x"


def test_repointing_a_dead_worker(start_tcp: StartWorker) -> None:
    """W5, W6: a worker that is gone takes every record: its end is told by other ways."""
    worker = start_tcp()
    worker.kill()
    for _ in range(1000):
        worker.tell(destination(("192.0.2.1", 80)))
    assert worker.blocked_on == -1


def test_an_older_generation_is_ignored(start_tcp: StartWorker, peers: Peers) -> None:
    """W5: the newest generation wins, in whatever order they arrive."""
    server, stranger = peers.server(), peers.server()
    worker = start_tcp()
    worker.tell(destination(server, 1), generation=9)
    worker.wait_for(generation=9)
    worker.tell(destination(stranger, 2), generation=8)
    worker.tell(destination(stranger, 2), generation=9)
    client, backend = peers.pair(worker, server)
    client.sendall(b"x")
    assert read_exactly(backend, 1) == b"x"
    assert worker.counters()["generation"] == 9


def test_the_title_says_who_it_is(start_tcp: StartWorker) -> None:
    """S6: the process title names listener and target, and carries nothing a terminal would obey."""
    worker = start_tcp()
    title = title_of(f"{worker.port}/tcp web \x1b[31m\n-> 10.0.0.1")
    worker.tell(title=title)
    worker.wait_for(generation=2)
    expected = f"grand-ambassador: {worker.port}/tcp web ?[31m?-> 10.0.0.1".encode()
    command = Path(f"/proc/{worker.pid}/cmdline")
    wait_until(lambda: command.read_bytes().rstrip(b"\0") == expected, "no such title")


# ---------------------------------------------------------------------------------------------- parent


@pytest.mark.alone
@pytest.mark.parametrize("made", ["fork", "launch"])
def test_the_parent_is_killed(tools: None, made: str) -> None:
    """P1: SIGKILL of the parent: fork server and workers are gone within a second, even a stopped one."""
    ports = [(protocol, free_port()) for protocol in (*Protocol, *Protocol)]
    with parent_of_workers(made, ports) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(1 + len(ports))]
        with stopped(pids[1]), stopped(pids[2]):
            parent.kill()
            begin = time.monotonic()
            wait_until(lambda: all(map(is_gone, pids)), "orphans", 5)
            assert time.monotonic() - begin < 1.0
            assert all(is_free(port) for _, port in ports)


def test_the_fork_server_is_let_go(peers: Peers) -> None:
    """P1: when its parent closes the socket the fork server ends, and takes its workers with it."""
    yard = Yard()
    worker = Worker(yard, Protocol.TCP)
    with worker.stopped():
        yard.close()
        wait_until(lambda: is_gone(worker.pid), "an orphan", 5)
    worker.let_go()


def test_the_fork_server_is_killed(peers: Peers) -> None:
    """W1: the fork server's death costs nothing: its workers go on, and end with their parent's pipe."""
    yard = Yard()
    server = peers.server()
    worker = Worker(yard, Protocol.TCP, destination(server))
    client, backend = peers.pair(worker, server)
    os.kill(yard.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(yard.pid), "the fork server does not die")
    client.sendall(b"x")
    assert read_exactly(backend, 1) == b"x"
    peers.pair(worker, server)
    worker.let_go()
    wait_until(lambda: is_gone(worker.pid), "an orphan", 5)
    yard.close()


# ------------------------------------------------------------------------------------------------- rest


def test_an_idle_worker_only_beats(start: StartWorker, peers: Peers) -> None:
    """Invariant 6: with open connections and sessions, one wait every two seconds and no other call."""
    server, held = peers.server(), peers.server()
    udp_server, udp_client = peers.udp(), peers.udp()
    tcp = start(Protocol.TCP, destination(server))
    udp = start(Protocol.UDP, destination(udp_server))
    holding = start(Protocol.TCP, hold=600_000)
    peers.connect(holding)
    holding.wait_for(held=1)
    for number in range(12):
        client, backend = peers.pair(tcp, server)
        if number % 6 == 0:
            fill(client)  # stuck: its reader does not read
        elif number % 2:
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(backend) == b""
    udp_client.sendto(b"ping", ("127.0.0.1", udp.port))
    data, session = udp_server.recvfrom(100)
    udp_server.sendto(data, session)
    assert udp_client.recv(100) == b"ping"
    time.sleep(2.5)  # past the first beat without work, at which buffers go back
    seen: dict[int, list[str]] = {worker.pid: [] for worker in (tcp, udp, holding)}
    with contextlib.ExitStack() as tracers:
        for pid, calls in seen.items():
            tracers.enter_context(traced(pid, calls))
        time.sleep(5)  # the time is what is tested
    for calls in seen.values():
        assert 2 <= len(calls) <= 4, calls  # with the wait that was under way at first
        assert all("epoll_" in call or "restart_syscall" in call for call in calls), calls
    held.close()


def test_starting_many(yard: Yard, peers: Peers) -> None:
    """C13, invariant 7: thirty listeners, each with its one worker, all at once."""
    server = peers.server()
    workers = [Worker(yard, Protocol.TCP, destination(server, n)) for n in range(1, 31)]
    try:
        assert len({worker.pid for worker in workers}) == 30
        for worker in workers:
            peers.pair(worker, server)
    finally:
        for worker in workers:
            worker.close()


def test_a_fork_server_without_descriptors(peers: Peers) -> None:
    """R1: it reports that no worker could be made, goes on, and makes one once there is room."""
    yard = Yard()
    served = peers.server()
    try:
        first = Worker(yard, Protocol.TCP, destination(served))
        limit_descriptors(yard.pid, 5)
        with pytest.raises(AssertionError, match="Too many open files"):
            Worker(yard, Protocol.TCP)
        limit_descriptors(yard.pid, 1 << 20)
        second = Worker(yard, Protocol.TCP, destination(served))
        for worker in (first, second):
            peers.pair(worker, served)
            worker.close()
    finally:
        yard.close()
