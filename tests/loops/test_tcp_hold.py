"""While the target is down: connections wait, within bounds, and nobody is relayed to a stranger."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambassador.values import Protocol
from tests.support.endpoints import Peers, read_exactly, read_to_end, read_to_reset, reset
from tests.support.net import Namespace, enter_namespace, linked, new_namespace
from tests.support.wait import wait_until
from tests.support.worker import (
    Destination,
    StartWorker,
    Worker,
    Yard,
    check_tcp_counters,
    destination,
)


def test_held_until_there_is_a_backend(start_tcp: StartWorker, peers: Peers, loopback: str) -> None:
    """C4: with no backend a connection waits; the first repoint that names one releases it."""
    worker = start_tcp()
    client = peers.connect(worker, loopback)
    client.sendall(b"first words")
    worker.wait_for(held=1, held_total=1)
    server = peers.server(loopback)
    worker.repoint(destination(server))
    backend = peers.accept(server)
    assert read_exactly(backend, 11) == b"first words"
    backend.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"
    worker.wait_for(held=0, held_total=1, active=1)


def test_sent_and_closed_before_there_is_a_backend(start_tcp: StartWorker, peers: Peers) -> None:
    """T7: the client sends and closes while it is held: the bytes are delivered, then the end."""
    worker = start_tcp()
    for number in range(5):
        client = peers.connect(worker)
        client.sendall(b"%d" % number)
        client.close()
    worker.wait_for(held=5)
    server = peers.server()
    worker.repoint(destination(server))
    got = []
    for _ in range(5):
        backend = peers.accept(server)
        got.append(read_to_end(backend))
        backend.close()
    assert sorted(got) == [b"0", b"1", b"2", b"3", b"4"]
    worker.wait_for(closed=5, active=0, held=0)
    check_tcp_counters(worker)


def full_backlog(peers: Peers) -> socket.socket:
    """A server whose backlog is full: the kernel drops every SYN until it accepts."""
    server = peers.server(backlog=0)
    for _ in range(16):
        sock = peers.keep(socket.socket())
        sock.setblocking(False)
        sock.connect_ex(server.getsockname())
        if not select.select([], [sock], [], 0.2)[1]:
            sock.close()
            return server
    raise AssertionError("the backlog does not fill")


def test_sent_and_closed_while_the_connect_is_slow(start_tcp: StartWorker, peers: Peers) -> None:
    """T7: the backend's backlog is full, its kernel drops the SYN: the bytes arrive with the next."""
    server = full_backlog(peers)
    worker = start_tcp(destination(server))
    client = peers.connect(worker)
    client.sendall(b"in no hurry")
    client.close()
    worker.wait_for(accepted=1)
    assert first_words(peers, server) == b"in no hurry"
    peers.close()
    worker.wait_for(closed=1, dial_failed=0)


@pytest.mark.alone
def test_a_refusing_backend_is_tried_until_it_listens(
    start_tcp: StartWorker, peers: Peers, loopback: str
) -> None:
    """C11: a refused connect is tried again inside the window, and soon."""
    server = peers.bound(loopback)
    worker = start_tcp(destination(server))
    clients = [peers.connect(worker, loopback) for _ in range(8)]
    worker.wait_for(held_total=8)
    wait_until(lambda: worker.counter("dial_failed") >= 3, "it does not try again")
    tried = worker.counter("dial_failed")
    begin = time.monotonic()
    server.listen()
    for _ in clients:
        peers.accept(server).sendall(b"here")
    for client in clients:
        assert read_exactly(client, 4) == b"here"
    assert time.monotonic() - begin < 1.0
    assert worker.counter("dial_failed") - tried < 50, "everybody tries, not one for all"


@pytest.mark.alone
@pytest.mark.parametrize("refusing", [False, True], ids=["no-backend", "refusing"])
def test_no_hold_refuses_at_once(start_tcp: StartWorker, peers: Peers, refusing: bool) -> None:
    """C11: `-hold 0` is a reset at once, as the Go original does."""
    server = peers.bound()
    worker = start_tcp(*([destination(server)] if refusing else []), hold=0)
    for number in range(1, 6):
        begin = time.monotonic()
        assert peers.is_refused(worker)
        assert time.monotonic() - begin < 1.0
        worker.wait_for(rejected=number, active=0, held=0)
    check_tcp_counters(worker)


@pytest.mark.alone
@pytest.mark.parametrize("refusing", [False, True], ids=["no-backend", "refusing"])
def test_the_window_ends(start_tcp: StartWorker, peers: Peers, refusing: bool) -> None:
    """C4, C11: a held connection is reset when its window ends, not before."""
    server = peers.bound()
    worker = start_tcp(*([destination(server)] if refusing else []), hold=500)
    begin = time.monotonic()
    client = peers.connect(worker)
    client.sendall(b"anybody?")
    assert read_to_reset(client) == b""
    assert 0.45 < time.monotonic() - begin < 1.5
    worker.wait_for(rejected=1, active=0, held=0)
    check_tcp_counters(worker)


@pytest.mark.alone
def test_reset_when_the_backend_is_gone(
    start_tcp: StartWorker, peers: Peers, loopback: str
) -> None:
    """C4: an open connection to a container that is no longer there is reset at once, both ends."""
    server = peers.server(loopback)
    worker = start_tcp(destination(server, identity=1))
    client, backend = peers.pair(worker, server, loopback)
    client.sendall(b"x")
    assert read_exactly(backend, 1) == b"x"
    begin = time.monotonic()
    worker.repoint()
    assert read_to_reset(client) == b""
    assert read_to_reset(backend) == b""
    assert time.monotonic() - begin < 1.0
    worker.wait_for(reset=1, active=0)
    check_tcp_counters(worker)


def test_the_same_address_is_another_container(start_tcp: StartWorker, peers: Peers) -> None:
    """C2: another identity at the same address: the old connection is reset, a new one goes there."""
    server = peers.server()
    worker = start_tcp(destination(server, identity=1))
    client, backend = peers.pair(worker, server)
    worker.repoint(destination(server, identity=2))
    assert read_to_reset(client) == b""
    assert read_to_reset(backend) == b""
    peers.pair(worker, server)
    worker.wait_for(reset=1, active=1)


def test_survives_a_repoint_that_keeps_its_backend(start_tcp: StartWorker, peers: Peers) -> None:
    """C13: a connection whose backend is still listed does not notice the repoint."""
    one, two = peers.server(), peers.server()
    worker = start_tcp(destination(one, identity=1))
    client, backend = peers.pair(worker, one)
    for listed in (
        [destination(two, 2), destination(one, 1)],
        [destination(one, 1)],
        [destination(two, 3), destination(one, 1)],
    ):
        worker.repoint(*listed)
        client.sendall(b"still")
        assert read_exactly(backend, 5) == b"still"
        backend.sendall(b"here")
        assert read_exactly(client, 4) == b"here"
    worker.wait_for(active=1, reset=0)


def test_several_backends_take_turns(start_tcp: StartWorker, peers: Peers) -> None:
    """C8: with a list of backends every one of them gets connections."""
    servers = [peers.server() for _ in range(3)]
    worker = start_tcp(*(destination(server, n) for n, server in enumerate(servers, 1)))
    clients = [peers.connect(worker) for _ in range(9)]
    for server in servers:
        for _ in range(3):
            peers.accept(server)
    worker.wait_for(active=len(clients))


def test_held_connections_of_clients_that_gave_up(start_tcp: StartWorker, peers: Peers) -> None:
    """C4: a held client that resets is dropped, and never dialled for."""
    worker = start_tcp()
    leaving, staying = peers.connect(worker), peers.connect(worker)
    worker.wait_for(held=2)
    reset(leaving)
    worker.wait_for(held=1, reset=1, active=1)
    server = peers.server()
    worker.repoint(destination(server))
    peers.accept(server).sendall(b"welcome")
    assert read_exactly(staying, 7) == b"welcome"
    server.settimeout(0.2)
    with pytest.raises(TimeoutError):
        server.accept()
    check_tcp_counters(worker)


def test_the_prober_gives_up(start_tcp: StartWorker, peers: Peers) -> None:
    """C11: the client whose connection tries the backend for all resets: another one takes over."""
    server = full_backlog(peers)
    worker = start_tcp(destination(server), connect_timeout=300, hold=60_000)
    first = peers.connect(worker)
    worker.wait_for(held_total=1)  # its own attempt is over: from now on it tries for all
    second = peers.connect(worker)
    second.sendall(b"me too")
    worker.wait_for(active=2, held=1)  # the other one is trying
    reset(first)
    worker.wait_for(reset=1, active=1)
    assert first_words(peers, server) == b"me too"


def first_words(peers: Peers, server: socket.socket) -> bytes:
    """Of the first connection that says any: before it come those that filled the backlog."""
    while True:
        backend = peers.accept(server)
        backend.settimeout(0.05)
        try:
            if data := backend.recv(100):
                return data
        except TimeoutError:
            pass


def test_no_more_than_so_many_are_held(start_tcp: StartWorker, peers: Peers) -> None:
    """T8: the number of held connections is bounded; those over it are refused at once."""
    worker = start_tcp(max_held=5)
    clients = [peers.connect(worker) for _ in range(5)]
    worker.wait_for(held=5)
    for _ in range(3):
        assert peers.is_refused(worker)
    worker.wait_for(held=5, rejected=3, active=5)
    server = peers.server()
    worker.repoint(destination(server))
    for _ in range(5):
        peers.accept(server).sendall(b"ok")
    for client in clients:
        assert read_exactly(client, 2) == b"ok"
    check_tcp_counters(worker)


@pytest.mark.alone
def test_held_again_when_its_backend_goes_while_connecting(
    start_tcp: StartWorker, peers: Peers
) -> None:
    """C1, C2: repointed in the middle of a slow connect: it starts anew, at the new address."""
    old = full_backlog(peers)
    worker = start_tcp(destination(old, 1))
    clients = [peers.connect(worker) for _ in range(3)]
    worker.wait_for(active=3, held=0)
    worker.repoint()
    worker.wait_for(active=3, held=3)
    new = peers.server()
    begin = time.monotonic()
    worker.repoint(destination(new, 2))
    for _ in clients:
        peers.accept(new).sendall(b"new")
    for client in clients:
        assert read_exactly(client, 3) == b"new"
    assert time.monotonic() - begin < 1.0
    check_tcp_counters(worker)


# ------------------------------------------------------------------------------------------- black hole


@pytest.fixture(params=["ipv4", "ipv6"])
def black_hole(request: pytest.FixtureRequest) -> Iterator[Destination]:
    """An address that swallows every packet."""
    with linked() as namespace:
        yield destination((hole(namespace, request.param), 80))


def hole(namespace: Namespace, family: str) -> str:
    return namespace.black_hole6() if family == "ipv6" else namespace.black_hole4()


@pytest.mark.alone
def test_connecting_to_a_black_hole_is_limited(
    start_tcp: StartWorker, peers: Peers, black_hole: Destination
) -> None:
    """C12: each attempt ends after the connect limit; the window's end resets the client."""
    worker = start_tcp(black_hole, connect_timeout=200, hold=900)
    begin = time.monotonic()
    client = peers.connect(worker)
    assert read_to_reset(client) == b""
    took = time.monotonic() - begin
    assert 0.8 < took < 0.9 + 0.2 + 1.0
    assert 3 <= worker.counter("dial_failed") <= 6
    worker.wait_for(rejected=1, active=0, held=0)
    check_tcp_counters(worker)


@pytest.mark.alone
def test_no_hold_still_waits_for_the_connect(
    start_tcp: StartWorker, peers: Peers, black_hole: Destination
) -> None:
    """C12: `-hold 0` and a black hole: reset when the connect limit is over."""
    worker = start_tcp(black_hole, connect_timeout=300, hold=0)
    begin = time.monotonic()
    client = peers.connect(worker)
    assert read_to_reset(client) == b""
    assert 0.25 < time.monotonic() - begin < 1.3
    worker.wait_for(rejected=1, dial_failed=1, active=0)


@pytest.mark.alone
def test_out_of_the_black_hole(
    start_tcp: StartWorker, peers: Peers, black_hole: Destination
) -> None:
    """C1, C12: a repoint releases what is lost in a black hole at once, not after the limit."""
    worker = start_tcp(black_hole, connect_timeout=60_000, hold=60_000)
    clients = [peers.connect(worker) for _ in range(20)]
    worker.wait_for(accepted=20)
    server = peers.server()
    begin = time.monotonic()
    worker.repoint(destination(server, 2))
    for _ in clients:
        peers.accept(server).sendall(b"out")
    for client in clients:
        assert read_exactly(client, 3) == b"out"
    assert time.monotonic() - begin < 1.0
    check_tcp_counters(worker)


# ---------------------------------------------------------------------------- several, and oneself


def test_a_backend_that_refuses_leads_to_the_next(start_tcp: StartWorker, peers: Peers) -> None:
    """C11: nobody is held or rejected while another backend of the list takes connections."""
    refusing, silent, server = peers.bound(), peers.bound(), peers.server()
    worker = start_tcp(
        destination(refusing, 1), destination(silent, 2), destination(server, 3), hold=0
    )
    for number in range(1, 7):
        client = peers.connect(worker)
        peers.accept(server).sendall(b"here")
        assert read_exactly(client, 4) == b"here"
        worker.wait_for(accepted=number, rejected=0, held_total=0)
    assert worker.counter("dial_failed") >= 4
    server.close()
    assert peers.is_refused(worker), "each has had its turn"
    worker.wait_for(rejected=1, rejected_refused=1)
    check_tcp_counters(worker)


@pytest.mark.alone
def test_the_loop_does_not_take_itself_for_the_backend(peers: Peers) -> None:
    """C11: nobody listens at a local port of the kernel's range: a dial may meet its own socket.

    The kernel prefers ports of the parity of the first one.
    """
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    inside = new_namespace()
    enter_namespace(inside)
    try:
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40009")
        yard = Yard()
        worker = Worker(yard, Protocol.TCP, destination(("127.0.0.1", 40002)), hold=30_000)
        client = peers.keep(socket.socket())
        client.bind(("127.0.0.1", 30_001))
        client.connect(("127.0.0.1", worker.port))
        client.sendall(b"my secret")
        wait_until(
            lambda: worker.counter("dial_failed") >= 30 or worker.counter("sent_to_backend"),
            "it does not try",
        )
        assert worker.counter("sent_to_backend") == 0
        server = peers.keep(socket.create_server(("127.0.0.1", 40002)))
        backend = peers.accept(server)
        assert read_exactly(backend, 9) == b"my secret"
        worker.close()
        yard.close()
    finally:
        enter_namespace(here)
        os.close(here)
        os.close(inside)
