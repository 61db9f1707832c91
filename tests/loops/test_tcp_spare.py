"""Backend sockets are used again: nothing of one connection is in the next, and nothing is lost for it."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.endpoints import (
    Peers,
    Server,
    exchange,
    fill,
    read_exactly,
    read_to_end,
    read_to_reset,
    reset,
)
from tests.support.net import linked
from tests.support.processes import borrowed
from tests.support.wait import wait_until
from tests.support.worker import StartWorker, Watched, Worker, check_tcp_counters, destination

PARKED_MOST = 64
MIB = 1 << 20


def visit(peers: Peers, worker: Worker, server: socket.socket, first: str, data: bytes) -> None:
    """One whole connection, `data` each way; the side that ends first half-closes."""
    client, backend = peers.pair(worker, server)
    ends = (client, backend) if first == "client" else (backend, client)
    for one, other in (ends, ends[::-1]):
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(one.sendall, data)
            assert read_exactly(other, len(data)) == data
            sending.result()
    for one, other in (ends, ends[::-1]):
        one.shutdown(socket.SHUT_WR)
        assert read_to_end(other) == b""
    for end in ends:
        end.close()


def until_spare(worker: Worker, live: Callable[[], object]) -> None:
    """Lead connection after connection until one leaves a spare socket.

    Not each does: while the last acknowledgement is on its way, as where both sides end at the same moment,
    the socket is left to the kernel (backend_rests in _splice.pyx). On a busy machine that is seen often.
    """

    def spare() -> bool:
        live()
        worker.wait_for(active=0)
        return worker.counter("spare") > 0

    wait_until(spare, "no socket is spare")


def until_reused(worker: Worker, live: Callable[[], object], times: int) -> None:
    """Lead connection after connection until so many had a spare socket; each that could, had one."""
    reused = 0

    def enough() -> bool:
        nonlocal reused
        reused += worker.counter("spare")
        live()
        worker.wait_for(active=0, reused=reused)
        assert worker.counter("spare") <= 1
        return reused == times

    wait_until(enough, f"no {times} sockets are used again")


@pytest.fixture(params=["client", "backend"])
def first(request: pytest.FixtureRequest) -> str:
    """Which side ends first."""
    return str(request.param)


def test_one_socket_serves_one_connection_after_the_other(
    start_tcp: StartWorker, peers: Peers, first: str
) -> None:
    """Whoever ends first: the second connection takes the first one's socket, and a third the second's."""
    server = peers.server()
    worker = start_tcp(destination(server))
    baseline = len(worker.descriptors())
    numbers = itertools.count()
    until_reused(worker, lambda: visit(peers, worker, server, first, b"%4d" % next(numbers)), 20)
    assert len(worker.descriptors()) == baseline + worker.counter("spare")
    worker.wait_for(closed=next(numbers))
    check_tcp_counters(worker)


def test_what_one_connection_was_the_next_is_not(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariants 1 and 2: urgent data, TCP_NODELAY and ends leave no trace in what is bulk next."""
    server = peers.server()
    worker = start_tcp(destination(server))

    def be_urgent() -> None:
        client, backend = peers.pair(worker, server)
        backend.send(b"!", socket.MSG_OOB)
        backend.sendall(b"after the urgent byte")
        assert read_exactly(client, 21) == b"after the urgent byte"
        for end in (client, backend):
            end.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == read_to_end(backend) == b""

    until_spare(worker, be_urgent)
    worker.wait_for(spare=1, reused=0)
    client, backend = peers.pair(worker, server)
    exchange(client, backend, 8 * MIB)
    worker.wait_for(active=0, reused=1, reset=0)
    check_tcp_counters(worker)


def test_what_was_bulk_is_not_used_again(start_tcp: StartWorker, peers: Peers) -> None:
    """T8: the kernel never takes back what a socket's buffers have grown to; the next one has small ones."""
    server = peers.server()
    worker = start_tcp(destination(server))
    visit(peers, worker, server, "client", random.Random(2).randbytes(8 * MIB))
    assert worker.counter("pipes_open") > 0, "nothing was spliced"
    worker.wait_for(closed=1, active=0, spare=0)
    until_spare(worker, lambda: visit(peers, worker, server, "client", b"next"))
    worker.wait_for(spare=1, reused=0)


@pytest.mark.parametrize("timestamps", [0, 1])
def test_a_socket_that_has_no_timestamps(
    start_tcp: StartWorker, peers: Peers, timestamps: int
) -> None:
    """A backend that still remembers the port takes a connection that goes on in the numbers of another one
    for a stray segment, unless a timestamp says that it is newer (RFC 6191).
    """
    with linked() as namespace:
        namespace.run("sysctl", "-qw", f"net.ipv4.tcp_timestamps={timestamps}")
        server = peers.keep(namespace.socket(socket.AF_INET, socket.SOCK_STREAM))
        server.bind((namespace.theirs4, 0))
        server.listen()
        worker = start_tcp(destination(server))

        def live() -> None:
            visit(peers, worker, server, "client", b"to another host")

        if timestamps:
            until_reused(worker, live, 4)
        else:
            for _ in range(5):
                live()
            worker.wait_for(closed=5, active=0, reused=0, spare=0)
        assert worker.counter("reset") == 0


def test_a_refused_socket_leaves_nothing_to_its_successor(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """TCP_NODELAY was set on the one that was used again in vain; the one made instead needs it too."""
    server = peers.keep(socket.create_server(("127.0.0.1", 0)))
    worker = start_tcp(destination(server))

    def write_twice() -> None:
        client, backend = peers.pair(worker, server)
        _two_writes(client, backend)
        for end in (client, backend):
            end.close()

    until_spare(worker, write_twice)
    address = server.getsockname()
    server.close()
    client = peers.connect(worker)
    worker.wait_for(reused=1, held=1)
    server = peers.keep(socket.create_server(address))
    backend = peers.accept(server)
    _two_writes(client, backend)
    with borrowed(worker.pid, address) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _two_writes(client: socket.socket, backend: socket.socket) -> None:
    for byte in (b"1", b"2"):
        client.sendall(byte)
        assert read_exactly(backend, 1) == byte


def test_many_at_once(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariants 2 and 4: bursts of more than may be spare; each byte is its own connection's."""
    server = peers.server()
    worker = start_tcp(destination(server))
    baseline = len(worker.descriptors())

    def talk(number: int) -> None:
        with socket.create_connection(("127.0.0.1", worker.port), 10) as client:
            data = number.to_bytes(16, "big") * random.Random(number).randrange(1, 4000)
            client.sendall(data)
            assert read_exactly(client, len(data)) == data
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b""

    with Server(server, record=16) as echo:
        for burst in range(5):
            clients = [peers.connect(worker) for _ in range(100)]
            for client in clients:
                client.close()
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(talk, range(500 * burst, 500 * burst + 500)))
            worker.wait_for(active=0, accepted=600 * (burst + 1))
            assert 0 < worker.counter("spare") <= PARKED_MOST
        assert len(worker.descriptors()) <= baseline + PARKED_MOST
        assert echo.accepted == 3000
    assert worker.counter("reused") > 2000, "hardly any socket was used again"
    worker.wait_for(closed=3000, reset=0, dial_failed=0, held_total=0)
    worker.wait_for(spare=0)
    assert len(worker.descriptors()) == baseline, "after a quiet heartbeat none is kept"
    check_tcp_counters(worker)


def test_no_event_of_a_former_life(start_tcp: StartWorker, peers: Peers) -> None:
    """T17: one wait tells of new clients first, then that a socket has ended which has been spare since."""
    server = peers.server()
    worker = start_tcp(destination(server))

    def reused() -> bool:
        before = worker.counter("accepted")
        client, backend = peers.pair(worker, server)
        backend.close()
        assert read_to_end(client) == b""
        with (
            worker.stopped()
        ):  # so that the first batch has both, and leaves clients for the second
            client.close()
            clients = [peers.connect(worker) for _ in range(12)]
        backends = [peers.accept(server) for _ in clients]
        worker.wait_for(accepted=before + 13, active=12, dial_failed=0, held_total=0, reset=0)
        for number, end in enumerate(clients):
            end.sendall(bytes([number]))
        assert sorted(read_exactly(end, 1) for end in backends) == [bytes([n]) for n in range(12)]
        done = worker.counter("reused") > 0
        worker.repoint()  # the next try, if there is one, finds nothing spare
        for end in (*clients, *backends):
            end.close()
        worker.repoint(destination(server, 1 + worker.generation))
        worker.wait_for(active=0)
        return done

    wait_until(reused, "the socket was not used again")


def test_what_is_not_acknowledged_yet_is_not_given_up(start_tcp: StartWorker, peers: Peers) -> None:
    """T5: both ends are there, but the backend has not taken all: its socket is left to the kernel."""
    server = peers.bound()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    server.listen()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    backend.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == b""
    data = random.Random(1).randbytes(90_000)  # more than a window, less than a bulk stream
    client.sendall(data)
    client.close()
    worker.wait_for(closed=1, active=0, spare=0)
    again, other = peers.pair(worker, server)
    again.sendall(b"another")
    assert read_exactly(other, 7) == b"another"
    assert worker.counter("reused") == 0
    assert read_to_end(backend) == data


@pytest.mark.parametrize("whose", ["client", "backend"])
def test_a_reset_is_the_end_of_the_socket(start_tcp: StartWorker, peers: Peers, whose: str) -> None:
    """T6: only what ended cleanly is used again."""
    server = peers.server()
    worker = start_tcp(destination(server))
    for count in range(1, 4):
        client, backend = peers.pair(worker, server)
        one, other = (client, backend) if whose == "client" else (backend, client)
        one.sendall(b"x")
        assert read_exactly(other, 1) == b"x"
        reset(one)
        assert read_to_reset(other) == b""
        worker.wait_for(reset=count, active=0, spare=0, reused=0)


def test_a_repoint_takes_none_along(start_tcp: StartWorker, peers: Peers) -> None:
    """C2: what was spare under the old list is closed with it."""
    server, other = peers.server(), peers.server("::1")
    worker = start_tcp(destination(server))
    baseline = len(worker.descriptors())
    until_spare(worker, lambda: visit(peers, worker, server, "backend", b"old"))
    worker.repoint(destination(other, 2))
    assert worker.counter("spare") == 0  # and not only after a quiet heartbeat
    assert len(worker.descriptors()) == baseline
    visit(peers, worker, other, "backend", b"new")
    worker.wait_for(active=0, reused=0)


def test_backends_of_two_families(start_tcp: StartWorker, peers: Peers) -> None:
    """A socket of the wrong family is not forced on a backend."""
    servers = [peers.server(), peers.server("::1")]
    worker = start_tcp(*(destination(server, 1 + n) for n, server in enumerate(servers)))
    numbers = itertools.count()

    def live() -> None:
        number = next(numbers)
        visit(peers, worker, servers[number % 2], "backend", b"%d" % number)
        worker.wait_for(closed=number + 1)

    for _ in range(10):
        live()
    until_spare(worker, live)
    worker.wait_for(dial_failed=0, held_total=0, reset=0, rejected=0, reused=0, spare=1)


@pytest.fixture
def narrow(start_tcp: StartWorker, peers: Peers) -> tuple[Worker, socket.socket, int]:
    """A worker with ten spare sockets, its server, and how many descriptors it may have besides."""
    server = peers.server()
    worker = start_tcp(destination(server))
    watched = Watched(worker.pid, worker.protocol)
    first = watched.next_descriptor()

    def ten_are_spare() -> bool:
        worker.repoint(destination(server))  # closes what is spare: each try finds the same room
        pairs = [peers.pair(worker, server) for _ in range(10)]
        for client, backend in pairs:
            client.close()
            assert read_to_end(backend) == b""  # or the two ends cross: see until_spare
            backend.close()
        worker.wait_for(active=0)
        return worker.counter("spare") == 10

    wait_until(ten_are_spare, "ten sockets are never spare at once")
    limit = first + 6  # about three of the clients', which are free, and three that are spare
    watched.descriptor_limit(limit)
    return worker, server, limit - sum(fd < limit for fd in worker.descriptors())


def test_spare_sockets_make_room(narrow: tuple[Worker, socket.socket, int], peers: Peers) -> None:
    """R1: before descriptors count as gone, what is spare is closed; no client waits for that."""
    worker, server, free = narrow
    for number in range(free + 1):
        client, backend = peers.pair(worker, server)
        client.sendall(b"%d" % number)
        assert read_exactly(backend, 1) == b"%d" % number
    assert worker.counter("no_descriptor") == 0
    assert worker.counter("reused") == free
    assert worker.counter("spare") == 0


def test_held_clients_get_the_descriptors(
    narrow: tuple[Worker, socket.socket, int], peers: Peers
) -> None:
    """R1: while there is no backend nothing is kept for it."""
    worker, _, free = narrow
    worker.repoint()
    assert worker.counter("spare") == 0
    clients = [peers.connect(worker) for _ in range(free + 2)]
    wait_until(lambda: worker.counter("held") == len(clients), "they are not accepted")
    assert worker.counter("no_descriptor") == 0


def test_a_full_backend_keeps_its_bytes(start_tcp: StartWorker, peers: Peers) -> None:
    """Invariant 1: a connection that is cut while bytes are stuck leaves nothing to the next one."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    sent = fill(client)
    reset(backend)
    assert sent > 0
    worker.wait_for(reset=1, active=0, spare=0)
    visit(peers, worker, server, "client", b"next")
    check_tcp_counters(worker)
