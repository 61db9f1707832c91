"""Workers behind the data path interface: failures, replacement, totals.

Sockets, pages and pipes are real; there is no process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from ambassador._worker import COUNTERS_BYTES, FIRST_COUNTER
from ambassador.control import Drain, Update, pack
from ambassador.counters import COUNTERS
from ambassador.datapath import Condition, DataPath
from ambassador.model import Backend, ListenAddress, ListenerSpec
from ambassador.options import ListenerOptions, Sandbox
from ambassador.supervise import sockets
from ambassador.supervise.listener import RunningListener
from ambassador.supervise.port_limits import PortLimits
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker import WorkerProcess
from ambassador.supervise.worker_path import WorkerPath
from ambassador.system import processes
from ambassador.system.processes import PortOwners
from ambassador.values import Protocol
from tests.unit.fake_workers import GONE, FakeWorkers, descriptors

TIMINGS = Timings()
A, B = Backend("10.0.0.1", 80, "a", "1"), Backend("10.0.0.2", 80, "b", "1")
_ports = itertools.count(random.SystemRandom().randrange(33_000, 45_000))


class Stage:
    """A listener with one WorkerPath, its fake workers and its clock."""

    def __init__(self, protocol: Protocol) -> None:
        self.now = 1000.0
        self.fake = FakeWorkers()
        listen = ListenAddress(protocol, next(_ports), address="127.0.0.1")
        self.spec = ListenerSpec(listen, "web", backends=(A,))
        self.listener = RunningListener(self.spec)
        self.path = WorkerPath(
            self.listener,
            workers=self.fake.workers,
            limits=PortLimits(20_000),
            owners=PortOwners(lambda: self.now),
            sandbox=Sandbox.OFF,
            timings=TIMINGS,
            clock=lambda: self.now,
        )

    def open(self, **options: Any) -> None:
        self.listener.spec = replace(self.spec, options=ListenerOptions(**options))
        self.listener.open([self.path])

    def change(self, **options: Any) -> None:
        self.listener.update(replace(self.listener.spec, options=ListenerOptions(**options)))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = self.path.due()
        if due is not None and due <= self.now:
            self.path.run(self.now)

    def condition(self) -> Condition:
        return self.path.state().condition


@pytest.fixture(params=list(Protocol))
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    yield from _stage(request.param)


@pytest.fixture
def tcp() -> Iterator[Stage]:
    yield from _stage(Protocol.TCP)


@pytest.fixture
def udp() -> Iterator[Stage]:
    yield from _stage(Protocol.UDP)


def _stage(protocol: Protocol) -> Iterator[Stage]:
    before = descriptors()
    stage = Stage(protocol)
    yield stage
    stage.listener.close(0)
    stage.fake.exit_all()
    assert descriptors() == before, "every descriptor that was made is closed"


def sent(process: WorkerProcess) -> bytes:
    """What waits in its control pipe. The fake has not passed the read end on."""
    _, control, *_ = process.passed_fds(-1)
    return os.read(control, 1 << 16)


def count(process: WorkerProcess, protocol: Protocol, **counters: int) -> None:
    """As the worker does."""
    with mmap.mmap(process.page.fd, COUNTERS_BYTES) as page, memoryview(page).cast("Q") as words:
        for place, row in enumerate(COUNTERS[protocol], FIRST_COUNTER):
            words[place] = counters.get(row.name, words[place])


def is_bound(stage: Stage) -> bool:
    try:
        sockets.bind(stage.spec.listen).close()
    except OSError as error:
        assert error.errno == errno.EADDRINUSE
        return True
    return False


def test_it_is_a_data_path(stage: Stage) -> None:
    path: DataPath = stage.path
    assert path.refuses(stage.spec) == ""


# ------------------------------------------------------------------------------------------ open, close


def test_open_binds_and_starts(stage: Stage) -> None:
    stage.open(workers=3)
    assert is_bound(stage)
    assert len(stage.fake.forked) == 3
    assert stage.fake.passed == [5, 5, 5], "listener, pipe, own page, two siblings"
    assert stage.condition() is Condition.FORWARDING
    assert stage.path.due() is None


def test_close_lets_workers_drain(stage: Stage) -> None:
    stage.open()
    (worker,) = stage.fake.forked
    stage.listener.close(250)
    assert stage.fake.stopped == [(worker, 250)]
    assert stage.condition() is Condition.DRAINING
    stage.fake.exit(worker, "exit code 0")
    assert stage.path.due() is None
    assert not is_bound(stage)


def test_no_backend_is_holding(tcp: Stage) -> None:
    tcp.open()
    tcp.listener.update(replace(tcp.spec, backends=()))
    assert tcp.condition() is Condition.HOLDING
    tcp.listener.update(replace(tcp.spec, backends=(replace(A, weight=0),)))
    assert tcp.condition() is Condition.HOLDING


def test_a_range_is_refused(tcp: Stage) -> None:
    """Not half-working: one line says that it is not relayed."""
    ports = ListenAddress(Protocol.TCP, 8000, 8010)
    assert "8000-8010/tcp is a range" in tcp.path.refuses(replace(tcp.spec, listen=ports))


def test_too_many_backends_are_refused(tcp: Stage) -> None:
    backends = tuple(replace(A, port=port) for port in range(1, 1100))
    assert "1099 backends are over" in tcp.path.refuses(replace(tcp.spec, backends=backends))


# --------------------------------------------------------------------------------------------- updates


def test_a_running_worker_gets_one_update(stage: Stage) -> None:
    """No new process for a backend or a LIVE option."""
    stage.open()
    (worker,) = stage.fake.forked
    sent(worker)
    stage.listener.update(replace(stage.spec, backends=(A, B), options=ListenerOptions(hold=77)))
    assert stage.fake.forked == [worker]
    limits = PortLimits(20_000).resolve(ListenerOptions(hold=77))
    title = f"grand-ambassador: {stage.spec.listen} web -> 10.0.0.1:80, 10.0.0.2:80"
    assert sent(worker) == pack(Update(2, limits, ((1, A), (2, B)), title=title))


def test_a_new_worker_knows_the_newest_state(stage: Stage) -> None:
    stage.open()
    (worker,) = stage.fake.forked
    stage.listener.update(replace(stage.spec, backends=(B,)))
    stage.fake.exit(worker)
    stage.wait(0)
    _, successor = stage.fake.forked
    assert b"-> 10.0.0.2:80" in sent(successor)


def test_no_name_gives_a_worker_its_title(tcp: Stage) -> None:
    """I3, S6: a worker shows what it is told as it is, so what it is told must be one printable line."""
    tcp.spec = replace(tcp.spec, target="web\x1b[31m\n\u202e\udc80 -> 6.6.6.6:1", backends=())
    tcp.open()
    shown = "web?[31m??? -> 6.6.6.6:1 -> hold"
    assert sent(tcp.fake.forked[0]).endswith(f"{tcp.spec.listen} {shown}".encode())


# --------------------------------------------------------------------------------------------- replace


def test_another_number_of_workers(stage: Stage) -> None:
    """New workers take the port over; the former ones drain for as long as `drain` says."""
    stage.open()
    (former,) = stage.fake.forked
    stage.change(workers=2, drain=1234)
    assert stage.fake.stopped == [(former, 1234)]
    assert len(stage.fake.forked) == 3
    assert is_bound(stage)
    assert stage.condition() is Condition.FORWARDING
    assert sent(former).endswith(pack(Drain(1234)))
    stage.fake.exit(former, "exit code 0")
    assert len(stage.path.processes()) == 2
    assert stage.path.due() is None


def test_tcp_workers_are_replaced_on_the_same_socket(tcp: Stage) -> None:
    tcp.open()
    with socket.create_connection(("127.0.0.1", tcp.spec.listen.first_port)) as waiting:
        tcp.change(workers=2)
        tcp.change(workers=1)
        waiting.sendall(b"still in the backlog")


def test_a_replaced_worker_hears_of_a_backend_that_goes(stage: Stage) -> None:
    stage.open()
    (former,) = stage.fake.forked
    stage.change(workers=2)
    sent(former)
    stage.listener.update(replace(stage.listener.spec, backends=(B,)))
    assert b"-> 10.0.0.2:80" in sent(former)


# ---------------------------------------------------------------------------------------------- totals


def test_totals_over_deaths(stage: Stage) -> None:
    protocol = stage.spec.listen.protocol
    stage.open(workers=2)
    rises, falls = ("accepted", "active") if protocol is Protocol.TCP else ("refused", "queued")
    one, other = stage.fake.forked
    count(one, protocol, **{rises: 5, falls: 2})
    count(other, protocol, **{rises: 7, falls: 1})
    assert stage.path.counters()[rises] == 12
    stage.fake.exit(one)
    stage.wait(0)
    assert (stage.path.counters()[rises], stage.path.counters()[falls]) == (12, 1)
    count(stage.fake.forked[2], protocol, **{rises: 1})
    assert stage.path.counters()[rises] == 13
    stage.change(workers=1)
    stage.fake.exit(other, "exit code 0")
    assert stage.path.counters()[rises] == 13


def test_losses_of_the_dead_are_reported(tcp: Stage, caplog: pytest.LogCaptureFixture) -> None:
    tcp.open()
    count(tcp.fake.forked[0], Protocol.TCP, rejected=3)
    with caplog.at_level(logging.WARNING, logger="ambassador"):
        tcp.fake.exit(tcp.fake.forked[0])
        tcp.wait(0)
        tcp.path.report_losses()
    lost = [record for record in caplog.records if "rejected" in record.message]
    assert [vars(record)["fields"]["count"] for record in lost] == [3]


def test_what_a_full_queue_dropped_is_said_once(
    udp: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """U17: no worker has read them, so none can count them."""
    with caplog.at_level(logging.WARNING, logger="ambassador"):
        udp.open()
        udp.path.report_losses()
        assert not [record for record in caplog.records if "queue full" in record.message]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            for _ in range(300):
                flood.sendto(bytes(65_000), ("127.0.0.1", udp.spec.listen.first_port))
        udp.path.report_losses()
        udp.path.report_losses()
    (line,) = (record for record in caplog.records if "queue full" in record.message)
    assert 0 < vars(line)["fields"]["count"] < 300


# -------------------------------------------------------------------------------------------- failures


def test_no_port(
    stage: Stage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: said once, with one look for the owner, and tried ever less often until the port is free."""
    look = Mock(return_value={})
    monkeypatch.setattr(processes, "_taken_ports", look)
    squatter = sockets.bind(stage.spec.listen)
    waits = []
    try:
        stage.open(workers=2)
        for _ in range(6):
            due = stage.path.due()
            assert due is not None
            waits.append(due - stage.now)
            stage.wait(waits[-1])
        assert stage.condition() is Condition.CANNOT_LISTEN
        assert "is in use by" in stage.path.state().error
        assert stage.path.state().error_at == stage.now
        assert not stage.fake.forked
    finally:
        squatter.close()
    assert waits == [1, 2, 4, 8, 10, 10]
    assert look.call_count == 1
    assert [record.message for record in caplog.records] == ["cannot listen, trying again"]
    stage.wait(TIMINGS.bind_retry_last)
    assert stage.condition() is Condition.FORWARDING
    assert len(stage.fake.forked) == 2


def test_one_look_for_the_owners_of_all_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: a range that the host uses costs one look in a moment."""
    now = 0.0
    taken = {(Protocol.TCP, 80): [("::", os.getpid())], (Protocol.TCP, 81): [("127.0.0.1", None)]}
    look = Mock(return_value=taken)
    monkeypatch.setattr(processes, "_taken_ports", look)
    owners = PortOwners(lambda: now)
    assert f"(pid {os.getpid()})" in owners.find(ListenAddress(Protocol.TCP, 80))
    for port in (81, 82):
        assert "cannot be seen" in owners.find(ListenAddress(Protocol.TCP, port))
    assert look.call_count == 1
    now = 1.0
    owners.find(ListenAddress(Protocol.TCP, 80))
    assert look.call_count == 2


def test_the_owner_of_a_port_is_found() -> None:
    with sockets.bind(ListenAddress(Protocol.TCP, next(_ports))) as sock:
        listen = ListenAddress(Protocol.TCP, sock.getsockname()[1])
        assert f"(pid {os.getpid()})" in PortOwners().find(listen)


def test_no_such_address(tcp: Stage) -> None:
    listen = replace(tcp.spec.listen, address="192.0.2.1")
    tcp.spec = replace(tcp.spec, listen=listen)
    tcp.open()
    assert "no interface has this address" in tcp.path.state().error


@pytest.mark.parametrize("call", ["memfd_create", "pipe2", "open"])
@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_no_descriptor_and_no_memory(
    stage: Stage,
    call: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever is missing when a worker is made: a line, a state, a retry; the fixture counts descriptors."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    stage.open(workers=2)
    stage.wait(TIMINGS.start_retry)
    monkeypatch.undo()
    assert not stage.fake.forked
    assert stage.path.state().error
    assert [record.message for record in caplog.records] == ["cannot start a worker, trying again"]
    assert stage.path.due() == stage.now + TIMINGS.start_retry
    stage.wait(TIMINGS.start_retry)
    assert len(stage.path.processes()) == 2


@pytest.mark.parametrize("error", [GONE, BlockingIOError(), OSError(errno.ENOBUFS, "No buffer")])
def test_no_fork_server(stage: Stage, error: Exception) -> None:
    """Gone, stopped, or out of memory for messages: asked again."""
    stage.fake.error = error
    stage.open(workers=2)
    stage.wait(0)
    stage.fake.error = None
    stage.wait(TIMINGS.start_retry)
    assert len(stage.path.processes()) == 2


def test_the_next_fork_server_is_waited_for(tcp: Stage) -> None:
    tcp.fake.error, tcp.fake.repair_at = GONE, tcp.now + 3
    tcp.open()
    assert tcp.path.due() == tcp.now + 3


def test_no_process(tcp: Stage) -> None:
    """R3: the fork fails: as an exit, with its delays."""
    tcp.open()
    for _ in range(5):
        tcp.fake.exit(tcp.fake.forked[-1], "could not be forked: Resource temporarily unavailable")
        tcp.wait(TIMINGS.restart_last)
    assert tcp.condition() is Condition.DEGRADED
    assert "could not be forked" in tcp.path.state().error
    tcp.now += TIMINGS.stable
    tcp.path.recover(tcp.now)
    assert tcp.condition() is Condition.FORWARDING


# ------------------------------------------------------------------------------- the listening socket


def shared_socket(stage: Stage) -> socket.socket:
    """The listener as its workers have it."""
    return stage.path._sockets[0].dup()


def test_a_disarmed_listener_is_armed_again(tcp: Stage) -> None:
    """W1: what a worker did to the shared socket ends with the worker."""
    tcp.open()
    with shared_socket(tcp) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        tcp.fake.exit(tcp.fake.forked[0])
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[0] == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_listener_that_was_shut_down_listens_again(tcp: Stage) -> None:
    tcp.open()
    with shared_socket(tcp) as sock:
        sock.shutdown(socket.SHUT_RDWR)
        tcp.fake.exit(tcp.fake.forked[0])
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    socket.create_connection(("127.0.0.1", tcp.spec.listen.first_port)).close()


@pytest.mark.parametrize("how", ["connect", "shutdown"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_udp_socket_that_hears_nobody_is_bound_anew(
    udp: Stage, how: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """W1: what a worker did to its socket ends with the worker."""
    udp.open(workers=workers)
    worker = udp.fake.forked[0]
    udp.fake.exit(worker)
    udp.wait(0)
    assert not caplog.records or "lost" not in caplog.text, "nothing was done to it"
    with shared_socket(udp) as sock:
        if how == "connect":
            sock.connect(("127.0.0.1", 9))
        else:
            with contextlib.suppress(OSError):  # ENOTCONN, and shut down all the same
                sock.shutdown(socket.SHUT_RD)
        udp.fake.exit(udp.fake.forked[-1])
    assert "listening socket lost, binding again" in caplog.text
    udp.wait(TIMINGS.bind_retry)
    assert len(udp.path.processes()) == workers
    assert all(map(sockets.is_intact, udp.path._sockets))


def test_a_listener_beyond_repair_is_bound_anew(tcp: Stage) -> None:
    tcp.open(workers=2)
    with (
        shared_socket(tcp) as sock,
        sockets.bind(ListenAddress(Protocol.TCP, next(_ports))) as peer,
    ):
        sock.shutdown(socket.SHUT_RDWR)
        sock.setblocking(True)
        sock.connect(("127.0.0.1", peer.getsockname()[1]))
        one, other = tcp.fake.forked
        tcp.fake.exit(one)
        assert [process for process, _ in tcp.fake.stopped] == [other]
    tcp.wait(TIMINGS.bind_retry)
    assert len(tcp.path.processes()) == 2
    socket.create_connection(("127.0.0.1", tcp.spec.listen.first_port)).close()
