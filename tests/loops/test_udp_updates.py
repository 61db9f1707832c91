"""What an Update changes in a running UDP worker, and what stays: options, weights, more backends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from tests.support.endpoints import (
    Peers,
    Server,
    datagram,
    is_silent,
    number_of,
    numbers,
    receive,
    talk,
)
from tests.support.wait import TIMEOUT_S, wait_until
from tests.support.worker import Destination, StartWorker, check_udp_counters, destination


def weighing(weight: int, known: Destination) -> Destination:
    """The same backend with another weight."""
    number, backend = known
    return number, replace(backend, weight=weight)


@contextmanager
def ping_pong(peers: Peers, port: int, clients: int) -> Iterator[Callable[[], int]]:
    """Clients that each wait for the reply to one datagram before the next. Fails if one is lost or altered.

    Gives the number of replies so far.
    """
    over = threading.Event()
    replies = [0] * clients
    failures: list[str] = []

    def life(who: int) -> None:
        client = peers.udp()
        client.settimeout(TIMEOUT_S)
        try:
            while not over.is_set():
                client.sendto(datagram(who, replies[who], 200), ("127.0.0.1", port))
                assert number_of(client.recv(1 << 17)) == (who, replies[who])
                replies[who] += 1
        except (AssertionError, OSError) as error:
            failures.append(f"client {who} after {replies[who]} replies: {error!r}")

    threads = [threading.Thread(target=life, args=(who,)) for who in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sum(replies)
    finally:
        over.set()
        for thread in threads:
            thread.join(2 * TIMEOUT_S)
    assert not failures
    assert all(replies)


def more_than(count: int, replies: Callable[[], int]) -> bool:
    return replies() > count


def test_options_change_under_traffic(start_udp: StartWorker, peers: Peers) -> None:
    """An Update that changes only options disturbs no session: no datagram is lost, no socket is new."""
    server = peers.udp()
    worker = start_udp(destination(server))
    changes = (
        {"udp_timeout": 5_000}, {"hold": 0}, {"max_sessions": 8}, {"gso": False}, {"hold": 9_000},
        {"udp_timeout": 60_000, "max_sessions": 16_384, "gso": True}, {"max_sessions": 1},
    )  # fmt: skip
    with Server(server), ping_pong(peers, worker.port, 8) as replies:
        wait_until(lambda: worker.counter("sessions_active") == 8, "eight sessions")
        sockets = worker.descriptors()
        for change in changes:
            worker.change(**change)
            had = replies()
            wait_until(partial(more_than, had + 40, replies), "no traffic after a change")
        assert worker.descriptors() == sockets
    worker.wait_for(sessions_created=8, sessions_active=8, sessions_evicted=0, queued=0)
    check_udp_counters(worker)
    now = worker.counters()
    assert now["sent_to_client"] == now["received_from_client"]


def test_a_shorter_timeout_counts_at_once(start_udp: StartWorker, peers: Peers) -> None:
    """U6: the new timeout also ends sessions that began under the old one."""
    server = peers.udp()
    worker = start_udp(destination(server), udp_timeout=3_600_000)
    talk(peers.udp(), ("127.0.0.1", worker.port), server)
    worker.wait_for(sessions_active=1)
    worker.change(udp_timeout=50)
    worker.wait_for(timeout_s=2, sessions_active=0, sessions_expired=1)


def test_a_smaller_table_evicts_for_newcomers_only(start_udp: StartWorker, peers: Peers) -> None:
    """U5: lowering the bound ends nobody; the next newcomer takes the longest idle one's place."""
    server = peers.udp()
    worker = start_udp(destination(server))
    to = ("127.0.0.1", worker.port)
    for _ in range(4):
        talk(peers.udp(), to, server)
    worker.change(max_sessions=2)
    worker.wait_for(sessions_active=4, sessions_evicted=0)
    talk(peers.udp(), to, server)
    worker.wait_for(sessions_active=4, sessions_evicted=1)


def test_hold_0_gives_up_what_waits_for_a_probe(start_udp: StartWorker, peers: Peers) -> None:
    """Without -hold nothing waits, so a probe under way is over."""
    client = peers.udp()
    worker = start_udp()
    gone = peers.udp()
    nobody = destination(gone)
    gone.close()
    worker.repoint(nobody)
    client.sendto(b"waits", ("127.0.0.1", worker.port))
    worker.wait_for(queued=1)
    wait_until(lambda: worker.counter("refused") > 0, "the probe is not refused")
    worker.change(hold=0)
    client.sendto(b"next", ("127.0.0.1", worker.port))
    worker.wait_for(queued=0, received_from_client=2)


def test_weight_0_keeps_sessions_and_gives_nothing_new(
    start_udp: StartWorker, peers: Peers
) -> None:
    """A backend of weight 0 drains: its sessions go on without a pause, newcomers go to the other one."""
    first, second, known = peers.udp(), peers.udp(), peers.udp()
    worker = start_udp(destination(first, 1))
    to = ("127.0.0.1", worker.port)
    session = talk(known, to, first)
    worker.repoint(weighing(0, destination(first, 1)), destination(second, 2))
    assert talk(known, to, first) == session
    for _ in range(5):
        talk(peers.udp(), to, second)
    assert is_silent(first, 0.05)
    assert talk(known, to, first) == session, "still the same socket"
    check_udp_counters(worker)


def test_weight_0_alone_holds_newcomers(start_udp: StartWorker, peers: Peers) -> None:
    """No backend has weight: known clients go on, a newcomer waits until one has, or another comes."""
    server, known, newcomer = peers.udp(), peers.udp(), peers.udp()
    worker = start_udp(destination(server, 1))
    to = ("127.0.0.1", worker.port)
    session = talk(known, to, server)
    worker.repoint(weighing(0, destination(server, 1)))
    newcomer.sendto(datagram(1, 0, 60), to)
    worker.wait_for(queued=1)
    assert talk(known, to, server) == session
    assert worker.counter("queued") == 1
    worker.repoint(destination(server, 1))
    newcomer.sendto(datagram(1, 1, 60), to)
    assert numbers(receive(server, 2)) == [0, 1]
    worker.wait_for(queued=0, dropped_no_backend=0)
    check_udp_counters(worker)


def test_weights_share_newcomers(start_udp: StartWorker, peers: Peers) -> None:
    """Of eight newcomers, a backend of weight 3 gets three times as many as one of weight 1."""
    first, second = peers.udp(), peers.udp()
    worker = start_udp(weighing(3, destination(first, 1)), weighing(1, destination(second, 2)))
    for number in range(8):
        peers.udp().sendto(datagram(number, 0, 60), ("127.0.0.1", worker.port))
    receive(first, 6)
    receive(second, 2)
    assert is_silent(first, 0.02)
    assert is_silent(second, 0.02)


def test_another_backend_that_is_not_up_yet(start_udp: StartWorker, peers: Peers) -> None:
    """A second backend comes and refuses: sessions with the first one do not wait for it."""
    server, known = peers.udp(), peers.udp()
    worker = start_udp(destination(server, 1))
    to = ("127.0.0.1", worker.port)
    session = talk(known, to, server)
    gone = peers.udp()
    late = destination(gone, 2)
    gone.close()
    worker.repoint(destination(server, 1), late)  # the next turn is the second one's
    peers.udp().sendto(b"for the second", to)
    worker.wait_for(queued=1)
    for _ in range(50):
        assert talk(known, to, server) == session
    assert worker.counter("queued") == 1, "the newcomer still waits"
