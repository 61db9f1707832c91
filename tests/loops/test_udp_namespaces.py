"""Datagrams over real links: several addresses, an MTU of 1500, segments that do not fit it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambassador.model import Backend
from tests.support.endpoints import (
    SMALLEST,
    Address,
    Peers,
    datagram,
    is_silent,
    receive,
    send_run,
    talk,
)
from tests.support.net import Namespace, free_port, ip, linked
from tests.support.worker import Destination, StartWorker, Worker, check_udp_counters, destination

FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> socket.AddressFamily:
    return FAMILIES[request.param]


@pytest.fixture
def near() -> Iterator[Namespace]:
    """Where the clients live."""
    with linked() as namespace:
        yield namespace


@pytest.fixture
def far() -> Iterator[Namespace]:
    """Where the backends live."""
    with linked() as namespace:
        yield namespace


def udp_in(peers: Peers, namespace: Namespace, family: socket.AddressFamily) -> socket.socket:
    sock = peers.keep(namespace.socket(family, socket.SOCK_DGRAM))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind((namespace.theirs6 if family == socket.AF_INET6 else namespace.theirs4, 0))
    return sock


def backend_at(sock: socket.socket) -> Destination:
    host, port = sock.getsockname()[:2]
    return 1, Backend(host, port)


@pytest.fixture(params=[True, False], ids=["gso", "no-gso"])
def gso(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


Conversation = tuple[Worker, socket.socket, socket.socket, Address]


@pytest.fixture
def conversation(
    start_udp: StartWorker, peers: Peers, family: socket.AddressFamily, gso: bool
) -> Iterator[Conversation]:
    """A worker between two links, a client, a server, and the address of the client's session."""
    with linked() as near, linked() as far:
        client, server = udp_in(peers, near, family), udp_in(peers, far, family)
        worker = start_udp(backend_at(server), gso=gso, gro=gso)
        client.connect((ours(near, family), worker.port))
        client.send(b"first")
        _, session = server.recvfrom(100)
        yield worker, client, server, session


def ours(namespace: Namespace, family: socket.AddressFamily) -> str:
    return namespace.ours6 if family == socket.AF_INET6 else namespace.ours4


def test_several_addresses_on_a_link(
    start_udp: StartWorker, peers: Peers, near: Namespace, family: socket.AddressFamily
) -> None:
    """U4: whichever of our addresses the client writes to, the reply comes from there."""
    more = [
        near.add_ours(
            f"{near.net6}:{number}" if family == socket.AF_INET6 else f"{near.net4}.{number}"
        )
        for number in (10, 20, 30)
    ]
    server = peers.udp("::1" if family == socket.AF_INET6 else "127.0.0.1")
    worker = start_udp(backend_at(server))
    for address in [*more, ours(near, family)]:
        client = udp_in(peers, near, family)
        client.connect((address, worker.port))  # so that it takes nothing from anywhere else
        client.send(address.encode())
        data, session = server.recvfrom(100)
        server.sendto(data, session)
        assert client.recv(100) == address.encode()
    worker.wait_for(sessions_created=4, sent_to_client=4)


@pytest.mark.parametrize("group", ["broadcast", "limited", "multicast"])
def test_an_answer_to_a_broadcast(
    start_udp: StartWorker, peers: Peers, near: Namespace, group: str
) -> None:
    """U4: nobody can answer from such an address: the answer comes from ours on that link."""
    v6 = group == "multicast"
    server = peers.udp()
    worker = start_udp(destination(server))
    client = udp_in(peers, near, socket.AF_INET6 if v6 else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    to = {
        "broadcast": f"{near.net4}.255",
        "limited": "255.255.255.255",
        "multicast": f"ff02::1%{near.theirs}",
    }
    if v6:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index_in(near))
    for _ in range(2):
        client.sendto(b"who serves?", (to[group].partition("%")[0], worker.port))
        data, session = server.recvfrom(100)
        server.sendto(data, session)
        data, source = client.recvfrom(100)
        assert (data, source[:2]) == (b"who serves?", (ours(near, client.family), worker.port))
    worker.wait_for(sessions_created=1, sent_to_client=2, dropped_send_to_client=0)


def index_in(namespace: Namespace) -> int:
    return int(namespace.run("cat", f"/sys/class/net/{namespace.theirs}/ifindex"))


def test_our_own_address_changes(
    start_udp: StartWorker, peers: Peers, far: Namespace, gso: bool
) -> None:
    """U15: the source address of a session's socket is gone: it is connected anew, and nothing is lost."""
    server, client = udp_in(peers, far, socket.AF_INET), peers.udp()
    worker = start_udp(backend_at(server), gso=gso, gro=gso)
    to = ("127.0.0.1", worker.port)
    assert talk(client, to, server)[0] == far.ours4
    fresh = far.add_ours(f"{far.net4}.7")
    ip("address", "delete", f"{far.ours4}/24", "dev", far.ours)
    with contextlib.suppress(
        AssertionError
    ):  # unless deleting the first address has not taken it along
        far.add_ours(fresh)
    run = [datagram(6, number, 500) for number in range(20)]
    send_run(client, to, run)
    assert receive(server, len(run)) == run
    assert talk(client, to, server)[0] == fresh
    worker.wait_for(dropped_send_to_backend=0, sessions_created=1)
    check_udp_counters(worker)


def test_a_socket_that_meets_itself(start_udp: StartWorker, peers: Peers) -> None:
    """U16: the kernel gives a session's socket the backend's own port: nobody listens there."""
    client, port = peers.udp(), free_port()
    worker = start_udp(destination(("127.0.0.1", port)))
    to = ("127.0.0.1", worker.port)
    local_ports = Path("/proc/sys/net/ipv4/ip_local_port_range")
    usual = local_ports.read_text()
    local_ports.write_text(f"{port} {port}")
    try:
        client.sendto(b"my secret", to)
        worker.wait_for(dropped_send_to_backend=1)
    finally:
        local_ports.write_text(usual)
    assert is_silent(client), "answered with its own bytes"
    server = peers.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.bind(("127.0.0.1", port))  # the port is the backend's to take
    talk(client, to, server)
    check_udp_counters(worker)


def test_from_one_family_to_the_other(
    start_udp: StartWorker,
    peers: Peers,
    near: Namespace,
    far: Namespace,
    family: socket.AddressFamily,
) -> None:
    """U4, C10: an IPv4 client of an IPv6 backend, and the other way round."""
    other = socket.AF_INET if family == socket.AF_INET6 else socket.AF_INET6
    client, server = udp_in(peers, near, family), udp_in(peers, far, other)
    worker = start_udp(backend_at(server))
    client.connect((ours(near, family), worker.port))
    for size in (0, 1, 1452, 1472, 9000, 65_507):
        client.send(datagram(1, 1, size))
        data, session = server.recvfrom(1 << 17)
        assert data == datagram(1, 1, size)
        server.sendto(datagram(2, 2, size), session)
        assert client.recv(1 << 17) == datagram(2, 2, size)


def test_runs_over_links(conversation: Conversation) -> None:
    """U8: runs of datagrams that fit the MTU, through two links and back: boundaries and order stay."""
    worker, client, server, session = conversation
    for sizes in (
        [1400] * 40,
        [1400] * 40 + [SMALLEST],
        [1452] * 20,
        [64] * 60,
        [300] * 5 + [299],
        [SMALLEST] * 2,
    ):
        run = [datagram(3, number, size) for number, size in enumerate(sizes)]
        send_run(client, None, run)
        assert receive(server, len(run)) == run
        send_run(server, session, run)
        assert receive(client, len(run)) == run
    assert worker.counter("gso_refused") == 0
    check_udp_counters(worker)


def test_datagrams_larger_than_the_mtu(conversation: Conversation, gso: bool) -> None:
    """U2, U8: datagrams that no frame holds, in runs too: they are fragmented, and arrive whole, in order."""
    worker, client, server, session = conversation
    for sizes in ([1473, 1473, 4000], [4000] * 8, [65_507], [1400, 4000, 4000, 4000, 1400, 1400]):
        sent = [datagram(4, number, size) for number, size in enumerate(sizes)]
        with worker.stopped():  # so that the relay sees them as one batch
            for data in sent:
                client.send(data)
        assert receive(server, len(sent)) == sent
        with worker.stopped():
            for data in sent:
                server.sendto(data, session)
        assert receive(client, len(sent)) == sent
    assert (worker.counter("gso_refused") > 0) == gso
    check_udp_counters(worker)


def test_runs_from_loopback_that_no_link_takes(
    start_udp: StartWorker, peers: Peers, far: Namespace, family: socket.AddressFamily
) -> None:
    """U8: segments of 4,000 bytes arrive as one over loopback, and leave one by one over the link."""
    loopback = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    client, server = peers.udp(loopback), udp_in(peers, far, family)
    worker = start_udp(backend_at(server))
    to = (loopback, worker.port)
    for turn in range(3):
        for sizes in ([4000] * 10, [4000] * 10 + [50], [1300] * 20, [2000] * 20):
            run = [datagram(turn, number, size) for number, size in enumerate(sizes)]
            send_run(client, to, run)
            assert receive(server, len(run)) == run
    # The size that was refused is remembered, so the refusals do not go on.
    assert 1 <= worker.counter("gso_refused") <= 3
    assert worker.counter("messages_to_backend") < worker.counter("sent_to_backend")
    check_udp_counters(worker)


def test_runs_to_a_client_behind_a_link(
    start_udp: StartWorker, peers: Peers, near: Namespace, family: socket.AddressFamily
) -> None:
    """U8: the same for replies: segments larger than the client's link takes."""
    server = peers.udp("::1" if family == socket.AF_INET6 else "127.0.0.1")
    client = udp_in(peers, near, family)
    worker = start_udp(backend_at(server))
    client.connect((ours(near, family), worker.port))
    client.send(b"first")
    _, session = server.recvfrom(100)
    for sizes in ([4000] * 10, [4000] * 10 + [50], [1300] * 20, [1300] * 20 + [1]):
        run = [datagram(5, number, max(size, SMALLEST)) for number, size in enumerate(sizes)]
        send_run(server, session, run)
        assert receive(client, len(run)) == run
    assert 1 <= worker.counter("gso_refused") <= 2
    check_udp_counters(worker)
