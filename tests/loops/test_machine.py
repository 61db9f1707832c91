"""A state machine that does what clients, backends, Docker and the kernel do, in any order, and checks what
must hold: the invariants of docs/design.md, numbered below.

1. What a side receives is a prefix of what the other sent, and all of it if it saw a clean end.
2. No byte crosses connections; no datagram is merged, split, duplicated, altered or another client's.
3. The counters balance.
4. At rest, descriptors, memory, processes, threads, pipes and sessions are back at the baseline.
5. A connection goes only to the generation that was current when it dialled.
6. A worker at rest sleeps.
7. Exactly one live worker per listener, and nobody else.

Supervisor, fork server, workers and sockets are real. `MACHINE_EXAMPLES` and `MACHINE_STEPS` make it longer,
`MACHINE_SHRINK=1` looks for the shortest steps to one. A failure is printed as steps, to make a test of:
of the loop it was in where that can be told apart (test_udp_probe.py has the first), else at the end here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ambassador.values import Protocol
from tests.support.processes import children, descriptors, private_kb, stopped, turns
from tests.support.wait import SANITIZED, wait_until
from tests.support.worker import Parent, Watched, bind_free, check_tcp_counters, check_udp_counters

from .crowd import NARROW_SERVER, Crowd, End

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "6"))
STEPS = int(os.environ.get("MACHINE_STEPS", "40"))
SHRINK = [Phase.shrink] if os.environ.get("MACHINE_SHRINK") else []

HOLD_MS = 500
SERVERS = 3
CLIENTS = 8
MOST_KILLS = 3  # the fourth death in a row waits longer than an example should
SETTLE_S = 20.0
RESET_S = 10.0 if SANITIZED else 2.0  # guarded memory makes everything several times slower
SLEEP_S = 0.25
MEMORY_SLACK = 1.05
ARENA_KB = 1024  # what malloc may keep of megabytes of queues: only the top of its heap goes back

AT_START = 6
"""Standard input, output and error, the listener, the control pipe, and an epoll."""

FATES, SIDES = ("sent", "discarded"), ("client", "backend")

T = TypeVar("T")

SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, *SHRINK],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

PICK = st.integers(0, 999)
SIZES = st.sampled_from([1, 100, 5000, 65_536, 300_000, 2_000_000, 6_000_000])
DATAGRAMS = st.sampled_from([0, 1, 9, 10, 100, 1472, 1473, 9000, 65_507])
ROUTES = st.sampled_from([(), (0,), (1,), (2,), (0, 1), (2, 1)])


class Machine(RuleBasedStateMachine):
    """One pair of listeners, from their first worker to their withdrawal."""

    parent: Parent  # one for all examples: see `machine`
    parent_rest: tuple[int, int] | None  # descriptors of parent and fork server without a worker
    rest_kb: dict[Protocol, int]  # the private memory of a worker that has relayed and rests

    def __init__(self) -> None:
        super().__init__()
        self.crowd = Crowd(SERVERS)
        self.listeners = {}
        for protocol in Protocol:
            listener, sock = bind_free(protocol)
            sock.close()
            self.listeners[protocol] = listener
        self.route: tuple[tuple[int, int], ...] | None = None
        self.generation = 0
        self.squeezed = False
        self.kills = 0
        self.killed: set[Protocol] = set()
        self.workers: dict[Protocol, Watched] = {}

    @property
    def port(self) -> int:
        return self.listeners[Protocol.TCP].first_port

    @property
    def udp_port(self) -> int:
        return self.listeners[Protocol.UDP].first_port

    @initialize(servers=ROUTES)
    def begin(self, servers: tuple[int, ...]) -> None:
        self.repoint(servers, restarted=False)

    # -- TCP

    # What is there depends on the time as well: where there is nothing to act on, a rule does nothing. (A
    # precondition may depend on earlier steps only, or hypothesis could not repeat them.)

    @rule(narrow=st.booleans())
    def open(self, narrow: bool) -> None:
        if len(self.crowd.present) < 2 * CLIENTS:
            self._open(narrow=narrow)
        self.crowd.pump()

    def _open(self, *, narrow: bool = False) -> End:
        end = self.crowd.open(self.port, narrow=narrow)
        end.disturbed = (
            self.squeezed or not self.crowd.allowed
        )  # it may wait longer than the window
        return end

    @rule(pick=PICK, count=SIZES, unread=st.booleans())
    def write(self, pick: int, count: int, unread: bool) -> None:
        """`unread` is what it takes for bytes to be in flight in the worker when the next step comes."""
        for end in self.pick(self.crowd.present, pick):
            if unread and end.peer is not None and not end.peer.gone:
                self.crowd.pause(end.peer, paused=True)
            if not end.ending:
                self.crowd.write(end, count)
        self.crowd.pump()

    @rule(pick=PICK, how=st.sampled_from(["fin", "fin", "close", "reset"]))
    def finish(self, pick: int, how: str) -> None:
        for end in self.pick(self.crowd.present, pick):
            self.crowd.finish(end, how)
        self.crowd.pump()

    @rule(pick=PICK)
    def pause(self, pick: int) -> None:
        for end in self.pick(self.crowd.present, pick):
            self.crowd.pause(end, not end.paused)
        self.crowd.pump()

    # -- UDP

    @rule(pick=PICK, size=DATAGRAMS, count=st.sampled_from([1, 1, 3, 40]))
    def send(self, pick: int, size: int, count: int) -> None:
        udp = self.crowd.udp
        client = pick % CLIENTS
        while len(udp.clients) <= client:
            udp.open(self.udp_port)
        for _ in range(count):
            udp.send(client, size)
            self.crowd.pump()

    @rule(pick=PICK, size=DATAGRAMS, count=st.sampled_from([1, 3, 40]))
    def reply(self, pick: int, size: int, count: int) -> None:
        for server, session in self.pick(sorted(self.crowd.udp.owner), pick):
            for _ in range(count):
                self.crowd.udp.reply(server, session, size)
        self.crowd.pump()

    # -- Docker

    @rule(servers=ROUTES, restarted=st.booleans())
    def repoint(self, servers: tuple[int, ...], restarted: bool) -> None:
        crowd = self.crowd
        crowd.pump()
        runs = list(crowd.runs)
        for server in servers if restarted else ():
            runs[server] += 1
        route = tuple((server, runs[server]) for server in servers)
        if route == self.route:
            return
        self.route = route
        self.generation += 1
        leaving = [
            end
            for end in crowd.ends
            if end.server is not None and (end.server, end.run) not in route
        ]
        crowd.excuse_unpaired()
        crowd.allowed |= set(servers)  # until it is in force
        self.tell(route)
        self.workers = self.find_workers()
        crowd.doom(leaving)
        crowd.drain()  # what was sent on before arrives in no time, and may
        crowd.excuse_unpaired()
        crowd.udp.new_era()
        crowd.allowed = set(servers)
        crowd.runs = runs
        crowd.pump()

    def tell(self, route: tuple[tuple[int, int], ...]) -> None:
        kinds = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
        self.parent.tell(
            {
                self.listeners[protocol]: [
                    (*self.crowd.address(server, kind), str(run)) for server, run in route
                ]
                for protocol, kind in kinds.items()
            }
        )

    def find_workers(self) -> dict[Protocol, Watched]:
        return {
            protocol: self.parent.worker(listener, self.generation)
            for protocol, listener in self.listeners.items()
        }

    # -- the kernel

    @rule(protocol=st.sampled_from(Protocol), waiting=st.sampled_from([0, 2]))
    @precondition(lambda self: self.kills < MOST_KILLS)
    def kill(self, protocol: Protocol, waiting: int) -> None:
        """W1. Who has connected and not been accepted yet is not harmed."""
        self.kills += 1
        self.killed.add(protocol)
        crowd = self.crowd
        crowd.pump()
        victim = self.workers[protocol]
        with stopped(victim.pid):
            crowd.drain()
            if protocol is Protocol.TCP:
                crowd.excuse_unpaired()
                crowd.doom([end for end in crowd.ends if end.server is not None])
                for _ in range(waiting):
                    self._open()
            os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: victim.pid not in self.parent.workers(), "the worker is gone")
        self.workers = self.find_workers()
        if protocol is Protocol.UDP:
            crowd.drain()
            crowd.udp.new_era()
        crowd.pump()

    @rule(left=st.sampled_from([0, 1, 3]))
    @precondition(lambda self: not self.squeezed)
    def squeeze(self, left: int) -> None:
        """R1: no descriptors, or next to none."""
        self.crowd.pump()
        self.crowd.excuse_unpaired()
        self.squeezed = True
        for worker in self.workers.values():
            worker.descriptor_limit(worker.next_descriptor() + left)

    @rule()
    @precondition(lambda self: self.squeezed)
    def release(self) -> None:
        self.squeezed = False
        for worker in self.workers.values():
            if worker.pid in self.parent.workers():
                worker.descriptor_limit(20_000)

    @rule(ms=st.sampled_from([5, 20, 120, HOLD_MS + 50]))
    def wait(self, ms: int) -> None:
        deadline = time.monotonic() + ms / 1000
        while time.monotonic() < deadline:
            self.crowd.pump()
            time.sleep(0.005)

    # -- helpers

    @staticmethod
    def pick(among: Sequence[T], number: int) -> list[T]:
        """One of them, or none where there is none."""
        return [among[number % len(among)]] if among else []

    def until(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        """Pump until it holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"after {timeout_s} s: {what}"
            self.crowd.pump()

    def in_flight(self) -> int:
        now = self.workers[Protocol.TCP].counters()
        received = now["received_from_client"] + now["received_from_backend"]
        return received - sum(now[f"{what}_to_{side}"] for what in FATES for side in SIDES)

    # -- the end

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else a step has failed, and that is what to tell
                self.settle_tcp()
                self.settle_udp()
                self.check_rest()
                self.check_pool()
        finally:
            self.crowd.close()
            self.parent.tell({})
        if sys.exc_info()[0] is None:
            self.check_withdrawn()

    def settle_tcp(self) -> None:
        crowd = self.crowd
        if self.squeezed:
            self.release()
        for end in crowd.present:
            crowd.pause(end, paused=False)
        self.until(
            lambda: not crowd.lingering,
            f"open to what is gone: {'; '.join(map(str, crowd.lingering))}",
            RESET_S,
        )
        if not crowd.allowed:
            self.repoint((0,), restarted=False)

        def finished() -> bool:
            for end in crowd.present:
                if not end.ending:
                    crowd.finish(end, "fin")
            return not crowd.present

        try:
            self.until(finished, "", SETTLE_S)
        except AssertionError:
            stuck = "; ".join(map(str, crowd.present))
            raise AssertionError(f"these do not come to an end: {stuck}") from None
        crowd.check_finished()
        check_tcp_counters(self.workers[Protocol.TCP])

    def settle_udp(self) -> None:
        """Every client is answered; what the counters say is what the two sides saw."""
        udp, worker = self.crowd.udp, self.workers[Protocol.UDP]
        for client in range(len(udp.clients)):
            self.ping(client)
        check_udp_counters(worker)
        if Protocol.UDP not in self.killed:
            counters = worker.counters()
            assert udp.at_servers == counters["sent_to_backend"], counters
            assert udp.at_clients == counters["sent_to_client"], counters

    def ping(self, client: int) -> None:
        """By a new datagram: the sessions that servers remember may have been evicted."""
        udp = self.crowd.udp
        udp.new_era()
        udp.send(client, 100)

        def sessions() -> list[tuple[int, tuple[str, int]]]:
            return [where for where, owner in udp.owner.items() if owner == client]

        self.until(sessions, f"a datagram of UDP client {client}", RESET_S)
        server, session = sessions()[-1]
        before = udp.at_clients
        udp.reply(server, session, 100)
        self.until(lambda: udp.at_clients > before, f"a reply to UDP client {client}", RESET_S)

    # -- at rest

    def check_rest(self) -> None:
        """Invariants 4, 6 and 7."""
        tcp, udp = self.workers[Protocol.TCP], self.workers[Protocol.UDP]
        expected = {tcp.pid, udp.pid}
        assert set(self.parent.workers()) == expected, self.parent.workers()
        assert len(children(self.parent.pid)) == 1
        wait_until(lambda: not tcp.counters()["active"], "no connection is left", RESET_S)
        assert tcp.counters()["held"] == 0
        assert udp.counters()["queued"] == 0
        sessions = udp.counters()["sessions_active"]
        # They expire after 90 s (test_udp.py has that); until then there is one to a client.
        assert sessions <= len(self.crowd.udp.clients)
        self.check_descriptors(
            tcp, lambda: 2 * tcp.counters()["pipes_open"] + tcp.counters()["spare"]
        )
        self.check_descriptors(udp, lambda: sessions)
        for worker in (tcp, udp):
            assert len(list(Path(f"/proc/{worker.pid}/task").iterdir())) == 1
            size, rest = private_kb(worker.pid), self.rest_kb.get(worker.protocol)
            if rest is not None and not SANITIZED:
                assert size <= rest * MEMORY_SLACK + ARENA_KB, (
                    f"{worker.protocol}: {size} kB, and {rest} kB in the beginning"
                )
        before = {pid: turns(pid) for pid in expected}
        time.sleep(SLEEP_S)
        for pid in expected:
            assert turns(pid) - before[pid] <= 1, f"worker {pid} does not sleep"

    def check_descriptors(self, worker: Watched, extra: Callable[[], int]) -> None:
        """Pooled pipes go back at the first quiet wait, which may be between the two looks."""
        try:
            wait_until(lambda: len(descriptors(worker.pid)) == AT_START + extra(), "", RESET_S)
        except AssertionError:
            found = descriptors(worker.pid)
            pytest.fail(f"{worker.protocol}, {extra()} expected: {found}")

    def check_pool(self) -> None:
        """All pipes that are open are in the pool, empty: as many stuck connections need no other."""
        worker = self.workers[Protocol.TCP]
        pipes = worker.counters()["pipes_open"]
        for path in Path(f"/proc/{worker.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the pool goes back when all is quiet
                if str(path.readlink()).startswith("pipe:"):
                    assert _unread(path) == 0, "a pipe with bytes in the pool"
        if not 0 < pipes <= CLIENTS:
            return
        crowd = self.crowd
        crowd.accept_paused = True
        clients = [crowd.open(self.port) for _ in range(pipes)]
        for client in clients:
            crowd.write(client, 12_000_000)
        crowd.pump(0.5)
        assert worker.counters()["pipes_open"] <= pipes, "a pipe has left the pool for ever"
        for end in crowd.present:
            crowd.finish(end, "reset")
        wait_until(lambda: not worker.counters()["active"], "no connection is left", RESET_S)
        check_tcp_counters(worker)

    def check_withdrawn(self) -> None:
        parent = self.parent
        wait_until(lambda: not parent.workers(), "no worker is left")
        if self.parent_rest is None:
            return
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.parent_descriptors() == self.parent_rest, "", RESET_S)
        assert self.parent_descriptors() == self.parent_rest, (
            descriptors(self.parent.pid),
            descriptors(self.parent.fork_server),
        )

    def wait_until_the_parent_rests(self) -> None:
        """It closes a worker's descriptors a moment after that has ended."""
        seen = (0, 0)
        while seen != self.parent_descriptors():
            seen = self.parent_descriptors()
            time.sleep(4 * SLEEP_S)

    def parent_descriptors(self) -> tuple[int, int]:
        return len(descriptors(self.parent.pid)), len(descriptors(self.parent.fork_server))


def _unread(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def machine(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Machine]]:
    """With a parent for all examples, and the memory that a worker has that has worked and rests."""
    parent = Parent(tmp_path_factory.mktemp("machine") / "log", HOLD_MS)
    Machine.parent, Machine.rest_kb, Machine.parent_rest = parent, {}, None
    first = Machine()
    first.begin((0,))
    for number in range(4):
        first.open(narrow=False)
        first.write(number, 2_000_000, unread=False)
        first.send(number, 65_507, 40)
    with stopped(first.workers[Protocol.UDP].pid):  # then a batch fills all of the receive batch
        first.send(0, 65_507, 200)
    first.settle_tcp()
    first.settle_udp()
    Machine.rest_kb = {
        protocol: private_kb(worker.pid) for protocol, worker in first.workers.items()
    }
    first.teardown()
    first.wait_until_the_parent_rests()
    Machine.parent_rest = first.parent_descriptors()
    yield Machine
    parent.close()


@pytest.mark.timeout(120 + 10 * EXAMPLES)
def test_any_order(machine: type[Machine]) -> None:
    """Invariants 1 to 7, whatever happens."""
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.parametrize("steps", ["repoint", "restart", "kill", "reset", "fin", "close"])
@pytest.mark.parametrize("narrow", [False, True], ids=["spliced", "copied"])
@pytest.mark.parametrize("side", ["client", "backend"])
def test_bytes_in_flight(machine: type[Machine], side: str, narrow: bool, steps: str) -> None:
    """T5, C1, W1: what any order seldom makes: each kind of end, with bytes in flight in the worker."""
    state = machine()
    state.begin((NARROW_SERVER if narrow else 0,))
    try:
        state.open(narrow=narrow)
        client = state.crowd.clients[0]
        state.until(lambda: client.peer is not None, "a connection", RESET_S)
        backend = client.peer
        assert backend is not None
        sender, reader = (client, backend) if side == "client" else (backend, client)
        if side == "backend":
            state.crowd.write(backend, 1)
            state.until(lambda: client.got, "its name", RESET_S)
        state.crowd.pause(reader, paused=True)
        # What is unsent is what is left of the second read here; a pipe holds what is bulk.
        state.crowd.write(sender, 125_000 if narrow else 20_000_000)
        state.until(lambda: state.in_flight() > 0, "bytes in flight", RESET_S)
        if steps == "fin":  # the next read finds the end behind its bytes, and little room for them
            state.crowd.write(sender, 60_000)
            state.crowd.finish(sender, "fin")
            state.crowd.pump()
        match steps:
            case "repoint":
                state.repoint((1,), restarted=False)
            case "restart":
                state.repoint((NARROW_SERVER if narrow else 0,), restarted=True)
            case "kill":
                state.kill(Protocol.TCP, 0)
            case "reset" | "close":
                state.crowd.finish(reader, steps)
    finally:
        state.teardown()


@pytest.mark.parametrize("restarted", [False, True])
def test_sessions_move(machine: type[Machine], restarted: bool) -> None:
    """U7: a session that is at work goes to the next backend, and comes back."""
    state = machine()
    state.begin((0,))
    try:
        for servers in ((1,), (), (0,), (0, 1), (2,)):
            state.send(0, 100, 3)
            state.send(1, 65_507, 3)
            state.reply(0, 1472, 3)
            state.repoint(servers, restarted)
    finally:
        state.teardown()
