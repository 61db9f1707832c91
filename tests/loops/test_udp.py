"""Datagrams: whole, in order, to the right one; sessions, their bounds and their end."""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.support.endpoints import (
    SMALLEST,
    Address,
    Peers,
    Server,
    datagram,
    is_silent,
    number_of,
    numbers,
    receive,
    send_run,
    talk,
)
from tests.support.strace import injected, injections, traced
from tests.support.wait import wait_until
from tests.support.worker import (
    StartWorker,
    Worker,
    check_udp_counters,
    destination,
    sockets,
)

LARGEST = 65_507

GSO = pytest.mark.parametrize("gso", [True, False], ids=["gso", "no-gso"])

# ------------------------------------------------------------------------------------------ boundaries


@GSO
def test_every_size_there_and_back(
    start_udp: StartWorker, peers: Peers, loopback: str, gso: bool
) -> None:
    """U1, U2: from 0 to 65,507 bytes, whole, both ways."""
    server, client = peers.udp(loopback), peers.udp(loopback)
    worker = start_udp(destination(server), gso=gso, gro=gso)
    sizes = [0, 1, 2, 8, 511, 512, 1231, 1232, 1472, 1473, 4096, 9000, 32_768, 65_000, 65_001]
    for size in [*sizes, 65_506, LARGEST, 0, LARGEST, 1]:
        there, back = datagram(1, size, size), datagram(2, size, size)
        client.sendto(there, (loopback, worker.port))
        got, session = server.recvfrom(1 << 17)
        assert got == there
        server.sendto(back, session)
        got, source = client.recvfrom(1 << 17)
        assert got == back
        assert source[:2] == (loopback, worker.port)
    worker.wait_for(sessions_created=1, sessions_active=1)
    check_udp_counters(worker)


@GSO
def test_zero_length_among_others(start_udp: StartWorker, peers: Peers, gso: bool) -> None:
    """U1, U8: empty datagrams in a batch with others of equal size: none is lost, none is merged."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server), gso=gso, gro=gso)
    session = talk(client, ("127.0.0.1", worker.port), server)
    batch = [b"", b"", b"a", b"b", b"", b"cc", b"", b"d", b"", b""] * 3
    to = ("127.0.0.1", worker.port)
    for sender, at, receiver in ((client, to, server), (server, session, client)):
        with worker.stopped():
            for data in batch:
                sender.sendto(data, at)
        assert receive(receiver, len(batch)) == batch
    check_udp_counters(worker)


def test_one_at_a_time_and_then_many(start_udp: StartWorker, peers: Peers) -> None:
    """U8: a read for each datagram that comes alone, none that finds nothing; then a burst in few reads."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    to = ("127.0.0.1", worker.port)
    for _ in range(10):
        session = talk(client, to, server)
    calls: list[str] = []
    with traced(worker.pid, calls):
        for _ in range(5):
            talk(client, to, server)
    reads = [call for call in calls if call.startswith("recvmmsg")]
    assert len(reads) == 10 and all(
        re.search(r"\], 1, MSG_DONTWAIT, .*= 1$", call) for call in reads
    )
    burst = [datagram(0, number, 100) for number in range(100)]
    for sender, at, receiver in ((client, to, server), (server, session, client)):
        with traced(worker.pid, calls := []):
            with worker.stopped():
                for data in burst:
                    sender.sendto(data, at)
            assert receive(receiver, len(burst)) == burst
        reads = [call for call in calls if call.startswith("recvmmsg")]
        assert len(reads) <= 2 + 100 / 32, "not read in batches"
    check_udp_counters(worker)


def test_many_more_than_a_turn_is_told_of(start_udp: StartWorker, peers: Peers) -> None:
    """U8: the second look is only for a turn that has room for all: with 600 sockets ready all is read."""
    server = peers.udp()
    worker = start_udp(destination(server))
    sessions = establish(peers, server, ("127.0.0.1", worker.port), 600)
    for _ in range(4):  # after these their reads do not ask for a second
        for client, session in sessions.items():
            server.sendto(b"alone", session)
            assert client.recv(100) == b"alone"
    calls: list[str] = []
    with traced(worker.pid, calls):
        with worker.stopped():
            for session in sessions.values():
                for number in range(4):
                    server.sendto(b"%d" % number, session)
        for client in sessions:
            assert receive(client, 4) == [b"0", b"1", b"2", b"3"]
    reads = [call for call in calls if call.startswith("recvmmsg")]
    assert len(reads) < 2 * len(sessions), "one by one"
    check_udp_counters(worker)


# Each is one send: sizes of its datagrams, the last one maybe shorter.
RUNS = [
    [1200] * 10,
    [1200] * 10 + [7 + SMALLEST],
    [100] * 64,
    [SMALLEST] * 50,
    [1400] * 40 + [1399],
    [1400],
    [700] * 3 + [20],
    [701] * 3 + [700],
    [700] * 3,
    [1472] * 44,
    [LARGEST],
    [32_000, 32_000],
    [9000] * 7,
    [500] * 2,
    [500] * 2 + [499],
    [500] * 2,
]


def check_runs(
    sender: socket.socket, to: Address, receiver: socket.socket, sizes: list[int]
) -> None:
    run = [datagram(3, number, size) for number, size in enumerate(sizes)]
    send_run(sender, to, run)
    assert receive(receiver, len(run)) == run


@GSO
def test_runs_keep_their_boundaries(
    start_udp: StartWorker, peers: Peers, loopback: str, gso: bool
) -> None:
    """U8: runs that arrive as one message leave with the same boundaries, both ways."""
    server, client = peers.udp(loopback), peers.udp(loopback)
    worker = start_udp(destination(server), gso=gso)
    to = (loopback, worker.port)
    session = talk(client, to, server)
    for sizes in RUNS:
        check_runs(client, to, server, sizes)
        check_runs(server, session, client, sizes)
    datagrams = 1 + sum(map(len, RUNS))
    worker.wait_for(sent_to_backend=datagrams, sent_to_client=datagrams)
    check_udp_counters(worker)
    for way in ("backend", "client"):
        messages = worker.counter(f"messages_to_{way}")
        if gso:
            assert messages < datagrams / 5, "runs do not leave as one"
        else:
            assert messages == datagrams


@GSO
def test_mixed_sizes_in_one_batch(
    start_udp: StartWorker, peers: Peers, loopback: str, gso: bool
) -> None:
    """U8: plain datagrams and runs of alternating sizes, read in one batch: order and boundaries stay."""
    server, client = peers.udp(loopback), peers.udp(loopback)
    worker = start_udp(destination(server), gso=gso)
    to = (loopback, worker.port)
    session = talk(client, to, server)
    sizes = [100, 100, 200, 100, 100, 100, 50, 50, 49, 50, 300, 300, 12, 300, 10, 10, 10, 20] * 2
    for sender, at, receiver in ((client, to, server), (server, session, client)):
        sent: list[bytes] = []
        with worker.stopped():
            for size in sizes:
                sent.append(datagram(4, len(sent), size))
                sender.sendto(sent[-1], at)
                if len(sent) % 5 == 0:
                    run = [datagram(4, len(sent) + place, size) for place in range(3)]
                    run.append(datagram(4, len(sent) + 3, SMALLEST))
                    send_run(sender, at, run)
                    sent += run
        assert receive(receiver, len(sent)) == sent
    check_udp_counters(worker)


@GSO
def test_many_clients_with_many_datagrams(start_udp: StartWorker, peers: Peers, gso: bool) -> None:
    """U8, invariant 2: 50 clients with datagrams of all sizes: each gets its own, in order, all of them."""
    server = peers.udp()
    worker = start_udp(destination(server), gso=gso, gro=gso)
    rounds, window = 60, 4

    def client_life(who: int) -> None:
        client = peers.udp("::1" if who % 2 else "127.0.0.1")
        to = ("::1" if who % 2 else "127.0.0.1", worker.port)
        expected = 0
        for turn in range(rounds):
            for place in range(window):
                number = turn * window + place
                size = SMALLEST + (who * 31 + number * number * 17) % 1200 if turn % 2 else 200
                client.sendto(datagram(who, number, size), to)
            for data in receive(client, window):
                assert number_of(data) == (who, expected)
                expected += 1

    with Server(server), ThreadPoolExecutor(50) as threads:
        for job in [threads.submit(client_life, who) for who in range(50)]:
            job.result()
    worker.wait_for(
        sessions_created=50,
        sessions_active=50,
        sent_to_backend=50 * rounds * window,
        sent_to_client=50 * rounds * window,
    )
    check_udp_counters(worker)


# ------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "127.77.0.9"])
def test_the_reply_comes_from_where_it_was_sent_to(
    start_udp: StartWorker, peers: Peers, address: str
) -> None:
    """U4: the reply's source is the address that the client wrote to."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    client.sendto(b"ping", (address, worker.port))
    data, session = server.recvfrom(100)
    server.sendto(data, session)
    data, source = client.recvfrom(100)
    assert (data, source) == (b"ping", (address, worker.port))


def test_a_source_that_the_kernel_refuses(
    start_udp: StartWorker, peers: Peers, loopback: str
) -> None:
    """U4: if a reply cannot leave from where the client wrote to, the kernel chooses, from then on."""
    server, client = peers.udp(loopback), peers.udp(loopback)
    worker = start_udp(destination(server))
    to = (loopback, worker.port)
    with injected(worker.pid, "sendmmsg:error=EINVAL:when=1") as log:
        session = talk(client, to, server)
        assert injections(log, "sendmmsg") == 1
    assert talk(client, to, server) == session
    worker.wait_for(sent_to_client=2, dropped_send_to_client=0)
    check_udp_counters(worker)


def test_one_client_at_several_addresses(start_udp: StartWorker, peers: Peers) -> None:
    """U4: one client socket that writes to several of our addresses: each reply from its own."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    addresses = [f"127.0.0.{number}" for number in range(1, 10)]
    with worker.stopped():  # so that all are in one batch
        for address in addresses:
            client.sendto(address.encode(), (address, worker.port))
    for _ in addresses:
        data, session = server.recvfrom(100)
        server.sendto(data, session)
    for _ in addresses:
        data, source = client.recvfrom(100)
        assert source == (data.decode(), worker.port)


# --------------------------------------------------------------------------------------------- refusal


@GSO
def test_the_target_is_away_for_a_while(
    start_udp: StartWorker, peers: Peers, loopback: str, gso: bool
) -> None:
    """U3: while nobody listens datagrams are refused and counted; the session heals, its client stays."""
    server, client = peers.udp(loopback), peers.udp(loopback)
    worker = start_udp(destination(server), gso=gso, gro=gso)
    to = (loopback, worker.port)
    session = talk(client, to, server)
    at = server.getsockname()
    server.close()
    for number in range(1, 11):
        client.sendto(b"anybody?", to)
        worker.wait_for(received_from_client=1 + number)
    wait_until(lambda: worker.counter("refused") > 0, "nobody noticed")
    server = peers.keep(socket.socket(client.family, socket.SOCK_DGRAM))
    server.bind(at)
    client.sendto(b"again", to)  # its send finds the answer to the one before, and is retried
    data, same = server.recvfrom(100)
    assert data == b"again"
    assert same[:2] == session, "the session got another socket"
    server.sendto(b"welcome", same)
    assert client.recv(100) == b"welcome"
    worker.wait_for(sessions_created=1, sessions_active=1)
    check_udp_counters(worker)


@GSO
def test_a_batch_after_a_refusal(start_udp: StartWorker, peers: Peers, gso: bool) -> None:
    """U3: the first batch after the return is whole, though its first send meets the old refusal."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server), gso=gso, gro=gso)
    to = ("127.0.0.1", worker.port)
    talk(client, to, server)
    at = server.getsockname()
    with worker.stopped():
        server.close()
    client.sendto(b"lost", to)
    worker.wait_for(received_from_client=2)
    server = peers.keep(socket.socket(client.family, socket.SOCK_DGRAM))
    server.bind(at)
    sent = [datagram(5, number, 300 if number < 10 else 100 + number) for number in range(20)]
    with worker.stopped():
        for data in sent:
            client.sendto(data, to)
    assert receive(server, len(sent)) == sent
    check_udp_counters(worker)


# ------------------------------------------------------------------------------------- session's length


@pytest.mark.parametrize("assured", [True, False], ids=["assured", "unassured"])
def test_an_idle_session_expires(start_udp: StartWorker, peers: Peers, assured: bool) -> None:
    """U6, invariant 4: a session without traffic ends after the idle time; its socket is closed.

    U14: after a third of it, if its client never sent again after a reply.
    """
    server = peers.udp()
    worker = start_udp(destination(server), udp_timeout=900)
    baseline = len(worker.descriptors())
    clients = [peers.udp() for _ in range(10)]
    begin = time.monotonic()
    for client in clients:
        for _ in range(1 + assured):
            talk(client, ("127.0.0.1", worker.port), server)
    assert len(worker.descriptors()) == baseline + 10
    worker.wait_for(sessions_active=0, sessions_expired=10, timeout_s=4)
    lasted = time.monotonic() - begin
    assert lasted > 0.85 if assured else 0.25 < lasted < 0.85
    assert len(worker.descriptors()) == baseline
    talk(clients[0], ("127.0.0.1", worker.port), server)
    worker.wait_for(sessions_created=11, sessions_active=1)


@pytest.mark.parametrize("way", ["to-backend", "to-client"])
def test_a_one_way_session_survives(start_udp: StartWorker, peers: Peers, way: str) -> None:
    """U6: traffic in one direction alone keeps a session for many idle times."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server), udp_timeout=400)
    to = ("127.0.0.1", worker.port)
    session = talk(client, to, server)
    for number in range(20):
        if way == "to-backend":
            client.sendto(b"%d" % number, to)
            data, source = server.recvfrom(100)
            assert (data, source) == (b"%d" % number, session)
        else:
            server.sendto(b"%d" % number, session)
            assert client.recv(100) == b"%d" % number
        time.sleep(0.08)  # the time is what is tested: 1.6 s in all
    worker.wait_for(sessions_created=1, sessions_active=1, sessions_expired=0)
    worker.wait_for(sessions_expired=1, sessions_active=0, timeout_s=3)


# ----------------------------------------------------------------------------------------------- floods


def establish(
    peers: Peers, server: socket.socket, to: Address, count: int
) -> dict[socket.socket, Address]:
    """So many sessions that are proven: the client went on after an answer."""
    established = {}
    for _ in range(count):
        client = peers.udp()
        talk(client, to, server)
        established[client] = talk(client, to, server)
    return established


def test_a_flood_of_new_clients(start_udp: StartWorker, peers: Peers) -> None:
    """U5: the table is bounded; the newcomers of a flood replace each other, not those established."""
    server = peers.udp()
    worker = start_udp(destination(server), max_sessions=64)
    to = ("127.0.0.1", worker.port)
    baseline = len(worker.descriptors())
    established = establish(peers, server, to, 20)
    for number in range(1, 501):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forged:
            forged.sendto(b"forged", to)
        if number % 50 == 0:
            worker.wait_for(received_from_client=40 + number)
    now = worker.counters()
    assert now["sessions_active"] <= 64
    assert now["sessions_evicted"] > 300
    assert len(worker.descriptors()) <= baseline + 64
    while not is_silent(server, 0.02):
        pass
    for client, session in established.items():
        assert talk(client, to, server) == session, "an established session was lost"
    check_udp_counters(worker)


def test_a_burst_of_new_clients(start_udp: StartWorker, peers: Peers) -> None:
    """U5: more newcomers in one batch than there is room for: those established stay."""
    server = peers.udp()
    worker = start_udp(destination(server), max_sessions=24)
    to = ("127.0.0.1", worker.port)
    established = establish(peers, server, to, 20)
    with worker.stopped():
        for _ in range(150):
            peers.udp().sendto(b"forged", to)
    worker.wait_for(received_from_client=190)
    assert worker.counter("sessions_active") <= 24
    while not is_silent(server, 0.02):
        pass
    for client, session in established.items():
        assert talk(client, to, server) == session, "an established session was lost"
    check_udp_counters(worker)


def test_the_longest_idle_goes_first(start_udp: StartWorker, peers: Peers) -> None:
    """U5: where all are established the longest idle one makes room for a newcomer."""
    server = peers.udp()
    worker = start_udp(destination(server), max_sessions=4)
    to = ("127.0.0.1", worker.port)
    sessions = list(establish(peers, server, to, 4).items())
    assert talk(sessions[0][0], to, server) == sessions[0][1]  # no longer the longest idle
    talk(peers.udp(), to, server)
    worker.wait_for(sessions_active=4, sessions_evicted=1)
    for place in (0, 2, 3):
        client, session = sessions[place]
        assert talk(client, to, server) == session


def test_no_descriptor_for_a_newcomer(start_udp: StartWorker, peers: Peers) -> None:
    """R1, U5: with no descriptor left a newcomer's datagram is counted as lost, or somebody makes room."""
    server = peers.udp()
    worker = start_udp(destination(server))
    to = ("127.0.0.1", worker.port)
    established = establish(peers, server, to, 3)
    with injected(worker.pid, "socket:error=EMFILE") as log:
        newcomer = peers.udp()
        newcomer.sendto(b"too many", to)
        worker.wait_for(dropped_no_session=1)
        assert injections(log, "socket") > 0
    talk(newcomer, to, server)
    for client in established:
        talk(client, to, server)
    check_udp_counters(worker)


def test_no_local_port_for_a_newcomer(start_udp: StartWorker, peers: Peers) -> None:
    """U14: with no local port left the longest idle unassured session makes room; assured ones stay."""
    server = peers.udp()
    worker = start_udp(destination(server))
    to = ("127.0.0.1", worker.port)
    established = establish(peers, server, to, 2)
    once = [peers.udp() for _ in range(2)]
    for client in once:
        talk(client, to, server)
    with injected(worker.pid, "connect:error=EAGAIN:when=1"):
        talk(peers.udp(), to, server)
    worker.wait_for(sessions_evicted=1, sessions_active=4)
    with injected(worker.pid, "connect:error=EAGAIN"):
        peers.udp().sendto(b"too many", to)
        worker.wait_for(dropped_no_local_port=1)
    worker.wait_for(sessions_evicted=3, sessions_active=3)
    for client, session in established.items():
        assert talk(client, to, server) == session, "an established session was lost"
    assert worker.losses()["dropped_no_local_port"] == 1
    check_udp_counters(worker)


# ----------------------------------------------------------------------------------------------- loops


def echoes(server: socket.socket, rounds: int = 50) -> int:
    """Answer whatever comes, as an echo does, until nothing comes: how often."""
    server.settimeout(0.3)
    for count in range(rounds):
        try:
            data, source = server.recvfrom(100)
        except TimeoutError:
            return count
        server.sendto(data, source)
    return rounds


def test_a_backend_is_no_client(start_udp: StartWorker, peers: Peers, loopback: str) -> None:
    """U13: one datagram whose source is the backend starts no loop; the backend's other ports may ask."""
    server, neighbour = peers.udp(loopback), peers.udp(loopback)
    worker = start_udp(destination(server))
    to = (loopback, worker.port)
    server.sendto(b"forged", to)
    worker.wait_for(dropped_looped=1, sessions_created=0)
    assert echoes(server) == 0
    neighbour.sendto(b"question", to)
    assert echoes(server) == 1
    assert neighbour.recv(100) == b"question"
    check_udp_counters(worker)


def test_a_client_that_becomes_a_backend(start_udp: StartWorker, peers: Peers) -> None:
    """U13: its session ends with the update that names it."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    to = ("127.0.0.1", worker.port)
    talk(client, to, server)
    worker.repoint(destination(client, 2))
    worker.wait_for(sessions_active=0)
    client.sendto(b"forged", to)
    worker.wait_for(dropped_looped=1)
    assert echoes(client) == 0
    check_udp_counters(worker)


def test_the_listener_is_no_client(start_udp: StartWorker, peers: Peers) -> None:
    """U13: a datagram that names the listener as its source."""
    server = peers.udp()
    worker = start_udp(destination(server))
    forger = peers.keep(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))
    forger.sendto(struct.pack("!HHHH", worker.port, worker.port, 9, 0) + b"x", ("127.0.0.1", 0))
    worker.wait_for(dropped_looped=1, sessions_created=0)


def hop_limit_of(server: socket.socket) -> int:
    """The hop limit that the next datagram comes with."""
    _, ancillary, _, _ = server.recvmsg(100, 100)
    ((_, _, value),) = ancillary
    return int.from_bytes(value, sys.byteorder)


def test_a_low_hop_limit_is_no_sign_of_a_loop(
    start_udp: StartWorker, peers: Peers, loopback: str
) -> None:
    """U12: a client's datagram is meant for us, however low its hop limit; only relays count down."""
    server, client, relay = (peers.udp(loopback) for _ in range(3))
    if server.family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    else:
        server.setsockopt(socket.IPPROTO_IP, sockets.IP_RECVTTL, 1)
    worker = start_udp(destination(server))

    def send(sender: socket.socket, hop_limit: int) -> None:
        if sender.family == socket.AF_INET6:
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hop_limit)
        else:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hop_limit)
        sender.sendto(b"on and on", (loopback, worker.port))

    for arrives in (1, 64, 128, 255):
        send(client, arrives)
        assert hop_limit_of(server) == 224
    # A relay's: one less than it came with, more as soon as more comes, and none that came down to 160.
    for arrives, leaves in [(161, 160), (170, 169), (224, 223), (180, 223)]:
        send(relay, arrives)
        assert hop_limit_of(server) == leaves
    for ended in (160, 129):
        send(relay, ended)
    worker.wait_for(dropped_looped=2)
    check_udp_counters(worker)


# ----------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "fault",
    [
        "recvmmsg:error=EINTR:when=1+2",
        "recvmmsg:error=EAGAIN:when=1+2",
        "recvmmsg:error=ECONNREFUSED:when=1+2",
        "recvmmsg:error=ENOMEM:when=1+3",
        "sendmmsg:error=EINTR:when=1+2",
        "sendmmsg:error=ECONNREFUSED:when=1+2",
        "epoll_wait:error=EINTR:when=1+2",
    ],
)
@GSO
def test_calls_that_fail_in_passing(
    start_udp: StartWorker, peers: Peers, fault: str, gso: bool
) -> None:
    """T2, U9: interrupted calls, and errors that belong to the past: nothing is lost."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server), gso=gso, gro=gso)
    with injected(worker.pid, fault) as log, Server(server):
        for turn in range(30):
            sent = [datagram(6, turn * 10 + place, 100 + place // 3) for place in range(10)]
            for data in sent:
                client.sendto(data, ("127.0.0.1", worker.port))
            assert receive(client, len(sent)) == sent
        assert injections(log, fault.partition(":")[0]) > 5
    check_udp_counters(worker)


@pytest.mark.parametrize("error", ["ENOBUFS", "EPERM", "ENETUNREACH"])
@pytest.mark.parametrize("way", ["backend", "client"])
def test_sends_that_fail_are_counted(
    start_udp: StartWorker, peers: Peers, way: str, error: str
) -> None:
    """U9, U10: a datagram that the kernel does not take is counted; those after it are sent."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server), gso=False, gro=False)
    to = ("127.0.0.1", worker.port)
    session = talk(client, to, server)
    sender, at, receiver = (client, to, server) if way == "backend" else (server, session, client)
    sent = [datagram(7, number, 200) for number in range(10)]
    with injected(worker.pid, f"sendmmsg:error={error}:when=1..3+1") as log:
        with worker.stopped():  # one that comes alone goes by another call
            for data in sent:
                sender.sendto(data, at)
        # A route that is gone: the socket is connected anew once, and the datagram sent again.
        lost = 2 if way == "backend" and error == "ENETUNREACH" else 3
        assert receive(receiver, 10 - lost) == sent[lost:]
        assert injections(log, "sendmmsg") == 3
    worker.wait_for(**{f"dropped_send_to_{way}": lost})
    check_udp_counters(worker)


@pytest.mark.parametrize("error", ["ENOBUFS", "EPERM", "EMSGSIZE", "ECONNREFUSED", "EINTR"])
def test_lone_sends_that_fail(start_udp: StartWorker, peers: Peers, error: str) -> None:
    """U9, U10: as above, for a datagram that comes alone. What belongs to the past is tried again."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    to = ("127.0.0.1", worker.port)
    talk(client, to, server)
    again = error in ("EMSGSIZE", "ECONNREFUSED", "EINTR")
    sent = [datagram(7, number, 200) for number in range(6)]
    with injected(worker.pid, f"sendto:error={error}:when=1+2") as log:
        for number, data in enumerate(sent, 2):
            client.sendto(data, to)
            worker.wait_for(received_from_client=number)
        assert receive(server, 6 if again else 3) == (sent if again else sent[1::2])
        assert injections(log, "sendto") >= 3
    worker.wait_for(dropped_send_to_backend=0 if again else 3)
    check_udp_counters(worker)


@pytest.mark.parametrize("error", ["EINVAL", "EIO", "EMSGSIZE"])
def test_segments_are_refused(start_udp: StartWorker, peers: Peers, error: str) -> None:
    """U8: a send of a run is refused: it goes datagram by datagram, whole and in order."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    to = ("127.0.0.1", worker.port)
    session = talk(client, to, server)
    for sender, at, receiver in ((client, to, server), (server, session, client)):
        run = [datagram(8, number, 500) for number in range(20)] + [datagram(8, 20, 33)]
        with injected(worker.pid, f"sendmmsg:error={error}:when=1"):
            send_run(sender, at, run)
            assert receive(receiver, len(run)) == run
        send_run(sender, at, run)
        assert receive(receiver, len(run)) == run
    assert worker.counter("gso_refused") == 2
    check_udp_counters(worker)


# --------------------------------------------------------------------------------------- repoint, drain


@GSO
def test_sessions_move_and_keep_their_client(
    start_udp: StartWorker, peers: Peers, loopback: str, gso: bool
) -> None:
    """U7: after a repoint the next datagram goes to the new backend; the client keeps its socket."""
    old, new = peers.udp(loopback), peers.udp(loopback)
    worker = start_udp(destination(old, 1), gso=gso, gro=gso)
    to = (loopback, worker.port)
    clients = [peers.udp(loopback) for _ in range(20)]
    sessions = [talk(client, to, old) for client in clients]
    worker.repoint(destination(new, 2))
    for session in sessions:  # late words from the old address
        old.sendto(b"late", session)
    moved = [talk(client, to, new) for client in clients]
    for session in moved + sessions:  # and words to the sessions' new sockets, from a stranger
        old.sendto(b"stranger", session)
    for client in clients:
        talk(client, to, new)
    assert all(is_silent(client, 0.01) for client in clients)
    assert is_silent(old)
    worker.wait_for(sessions_created=20, sessions_active=20)
    check_udp_counters(worker)


def test_an_address_that_is_another_container_now(start_udp: StartWorker, peers: Peers) -> None:
    """C2, U7: another identity at the same address: the session gets another socket."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server, 1))
    to = ("127.0.0.1", worker.port)
    before = talk(client, to, server)
    worker.repoint(destination(server, 2))
    server.sendto(b"to the former session", before)
    after = talk(client, to, server)
    assert after != before
    assert is_silent(client)


def test_a_repoint_that_keeps_the_backend(start_udp: StartWorker, peers: Peers) -> None:
    """U7: a session whose backend is still listed keeps its socket."""
    server, other, client = peers.udp(), peers.udp(), peers.udp()
    worker = start_udp(destination(server, 1))
    to = ("127.0.0.1", worker.port)
    session = talk(client, to, server)
    worker.repoint(destination(other, 2), destination(server, 1))
    server.sendto(b"unasked", session)
    assert client.recv(100) == b"unasked"
    assert talk(client, to, server) == session


def went_on(worker: Worker, sent: int) -> bool:
    return worker.counter("sent_to_client") > sent


def test_moving_under_load(start_udp: StartWorker, peers: Peers) -> None:
    """U7, invariant 2: repoints between two servers under load: no datagram goes astray or is doubled."""
    servers = [peers.udp(), peers.udp()]
    worker = start_udp(destination(servers[0], 1))
    over = threading.Event()

    def client_life(who: int) -> int:
        client = peers.udp()
        client.settimeout(0.2)
        number = replies = 0
        last = -1
        while not over.is_set():
            client.sendto(datagram(who, number, 64), ("127.0.0.1", worker.port))
            number += 1
            try:
                data = client.recv(1 << 17)
            except TimeoutError:  # this one was with the server that went
                continue
            sender, reply = number_of(data)
            assert sender == who
            assert reply > last
            last = reply
            replies += 1
        return replies

    with Server(servers[0]), Server(servers[1]), ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(client_life, who) for who in range(8)]
        try:
            for generation in range(2, 42):
                worker.repoint(destination(servers[generation % 2], generation))
                had = worker.counter("sent_to_client")
                wait_until(partial(went_on, worker, had + 8), "no traffic after a repoint")
        finally:
            over.set()
        assert all(job.result() > 10 for job in jobs)
    worker.wait_for(sessions_created=8, sessions_active=8)
    check_udp_counters(worker)


@pytest.mark.parametrize("recent", [True, False], ids=["recent", "idle"])
def test_drain(start_udp: StartWorker, peers: Peers, recent: bool) -> None:
    """P2: a drained worker lets replies that are on their way pass, and exits with 0 at once."""
    server, client = peers.udp(), peers.udp()
    worker = start_udp(destination(server))
    if recent:
        client.sendto(b"ping", ("127.0.0.1", worker.port))
        _, session = server.recvfrom(100)
        with worker.stopped():
            worker.drain(10_000)
            server.sendto(b"pong", session)
        assert client.recv(100) == b"pong"
    else:
        worker.drain(10_000)
    assert worker.exit_code(timeout_s=3) == 0


# ------------------------------------------------------------------------------------------------- hold


def test_queued_until_there_is_a_backend(
    start_udp: StartWorker, peers: Peers, loopback: str
) -> None:
    """U7: without a backend datagrams wait, at most 64 a session; the repoint sends them in order."""
    clients = [peers.udp(loopback) for _ in range(3)]
    worker = start_udp()
    for number in range(70):
        for who, client in enumerate(clients):
            client.sendto(datagram(who, number, 40 + number % 3), (loopback, worker.port))
        worker.wait_for(received_from_client=3 * (number + 1))
    worker.wait_for(queued=3 * 64, dropped_no_backend=3 * 6)
    server = peers.udp(loopback)
    worker.repoint(destination(server))
    got: dict[int, list[int]] = {}
    for data in receive(server, 3 * 64):
        who, number = number_of(data)
        got.setdefault(who, []).append(number)
    assert got == {who: list(range(64)) for who in range(3)}
    worker.wait_for(queued=0, sent_to_backend=3 * 64)
    for client in clients:
        talk(client, (loopback, worker.port), server)
    worker.wait_for(sessions_created=3)
    check_udp_counters(worker)


def test_runs_are_queued_datagram_by_datagram(start_udp: StartWorker, peers: Peers) -> None:
    """U8: a run that arrives while held is queued with its boundaries, empty datagrams too."""
    client = peers.udp()
    worker = start_udp()
    run = [datagram(9, number, 1000) for number in range(30)] + [datagram(9, 30, 77)]
    send_run(client, ("127.0.0.1", worker.port), run)
    client.sendto(b"", ("127.0.0.1", worker.port))
    client.sendto(b"last", ("127.0.0.1", worker.port))
    worker.wait_for(queued=33)
    server = peers.udp()
    worker.repoint(destination(server))
    assert receive(server, 33) == [*run, b"", b"last"]
    check_udp_counters(worker)


def test_the_queue_comes_before_what_is_new(start_udp: StartWorker, peers: Peers) -> None:
    """U7: what waited is sent before what arrives with the repoint."""
    client, server = peers.udp(), peers.udp()
    worker = start_udp()
    to = ("127.0.0.1", worker.port)
    for number in range(10):
        client.sendto(datagram(1, number, 50), to)
    worker.wait_for(queued=10)
    with worker.stopped():
        worker.tell(destination(server))
        for number in range(10, 20):
            client.sendto(datagram(1, number, 50), to)
    assert numbers(receive(server, 20)) == list(range(20))


def test_no_hold_drops(start_udp: StartWorker, peers: Peers) -> None:
    """U7: `-hold 0`: without a backend datagrams are dropped and counted, and none comes late."""
    client, server = peers.udp(), peers.udp()
    worker = start_udp(hold=0)
    for _ in range(5):
        client.sendto(b"x", ("127.0.0.1", worker.port))
    worker.wait_for(dropped_no_backend=5, queued=0)
    worker.repoint(destination(server))
    talk(client, ("127.0.0.1", worker.port), server)
    check_udp_counters(worker)


@pytest.mark.parametrize(("old", "new"), [(5, 3), (64, 10)], ids=["few", "a-full-queue"])
def test_what_waited_too_long_is_dropped(
    start_udp: StartWorker, peers: Peers, old: int, new: int
) -> None:
    """U7: datagrams older than the window are dropped and counted; later ones are sent in their place."""
    client, server = peers.udp(), peers.udp()
    worker = start_udp(hold=300)
    to = ("127.0.0.1", worker.port)
    for number in range(old):
        client.sendto(datagram(1, number, 50), to)
    worker.wait_for(queued=old)
    time.sleep(0.4)  # the time is what is tested
    for number in range(old, old + new):
        client.sendto(datagram(1, number, 50), to)
    worker.wait_for(received_from_client=old + new)
    worker.repoint(destination(server))
    assert numbers(receive(server, new)) == list(range(old, old + new))
    worker.wait_for(dropped_no_backend=old, queued=0)
    check_udp_counters(worker)


def test_all_queues_together_are_bounded(start_udp: StartWorker, peers: Peers) -> None:
    """U5: what is queued is bounded in bytes, whatever the number of sessions."""
    worker = start_udp()
    clients = [peers.udp() for _ in range(4)]
    for number in range(1, 60):
        for client in clients:
            client.sendto(bytes(60_000), ("127.0.0.1", worker.port))
        worker.wait_for(received_from_client=4 * number)
    now = worker.counters()
    assert 100 < now["queued"] <= (8 << 20) // 60_000
    assert now["dropped_no_backend"] > 50
    check_udp_counters(worker)
    for client in clients:
        client.sendto(b"", ("127.0.0.1", worker.port))  # an empty one still has room
    worker.wait_for(queued=now["queued"] + 4)
