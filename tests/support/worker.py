"""All that tests know of how a worker, a record, a fork server and a supervisor are made.

Where the product's own interfaces change, this file changes with them, and the tests do not.

Run as a program it is one of two parents, for tests that need one in a process of its own:

    python -m tests.support.worker supervise HOLD_MS      a supervisor; reads routes, a line of JSON each
    python -m tests.support.worker fork|launch tcp:80 ... workers without a backend; prints their numbers
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from ambassador._worker import (
    COUNTERS_BYTES,
    EXIT_BAD_CONTROL,
    EXIT_DRAINED,
    EXIT_PARENT_GONE,
    FIRST_COUNTER,
    GENERATION_WORD,
)
from ambassador.control import VERSION, Drain, Start, Update, pack
from ambassador.counters import COUNTERS
from ambassador.model import Backend, DesiredState, ListenAddress, ListenerSpec
from ambassador.options import ListenerOptions, Sandbox
from ambassador.supervise import sockets
from ambassador.supervise.forkserver import Exited, Forked, ForkServer
from ambassador.supervise.losses import Losses
from ambassador.supervise.page import CountersPage
from ambassador.supervise.supervisor import Supervisor
from ambassador.supervise.worker import WorkerProcess
from ambassador.system.titles import title_of
from ambassador.values import Protocol as Kind
from tests.support.net import free_port
from tests.support.processes import (
    children,
    descriptors,
    is_gone,
    limit_descriptors,
    read_process,
    stopped,
    title,
)
from tests.support.wait import SANITIZED, TIMEOUT_S, wait_until

__all__ = [
    "EXIT_BAD_CONTROL",
    "EXIT_DRAINED",
    "EXIT_PARENT_GONE",
    "VERSION",
    "Destination",
    "sockets",
    "title_of",
]

Destination = tuple[int, Backend]
"""A backend with the id that the listener has given it."""

Target = tuple[str, int, str]
"""Of a supervisor's route: address, port, run."""


# ------------------------------------------------------------------------------------ listeners, records


def bind_free(protocol: Kind, *, gro: bool = True) -> tuple[ListenAddress, socket.socket]:
    """A listening socket as the parent makes it, on a port that nobody has."""
    for _ in range(100):
        listener = ListenAddress(protocol, free_port())
        with contextlib.suppress(OSError):
            return listener, sockets.bind(listener, gro=gro)
    raise AssertionError("no free port in a hundred")


def destination(where: socket.socket | tuple[str, int], identity: int = 1) -> Destination:
    """A server, or an address, as a backend."""
    host, port = where[:2] if isinstance(where, tuple) else where.getsockname()[:2]
    return identity, Backend(host, port)


def start_record(protocol: Kind) -> bytes:
    return pack(Start(protocol))


def update_record(generation: int, *destinations: Destination, title: str = "") -> bytes:
    return pack(Update(generation, backends=destinations, title=title))


def drain_record(deadline_ms: int) -> bytes:
    return pack(Drain(deadline_ms))


# ------------------------------------------------------------------------------------------------ workers


class Yard:
    """The fork server and the exits it told of."""

    def __init__(self) -> None:
        self.fork_server = ForkServer.launch()
        self._forked: list[Forked] = []
        self._exits: dict[int, int] = {}

    @property
    def pid(self) -> int:
        return self.fork_server.pid

    def fork(self, descriptors: Sequence[int]) -> Forked:
        self.fork_server.request(descriptors)
        self._listen(lambda: self._forked, "the fork server forks no worker")
        forked = self._forked.pop()
        assert forked.pid > 0, f"the fork server could not fork: {os.strerror(-forked.pid)}"
        return forked

    def exit_code(self, pid: int, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the worker's end: its exit code, or the negative number of a signal."""
        self._listen(lambda: pid in self._exits, f"worker {pid} does not end", timeout_s)
        return os.waitstatus_to_exitcode(self._exits[pid])

    def has_exited(self, pid: int) -> bool:
        self._take()
        return pid in self._exits

    def close(self) -> None:
        self.fork_server.close()
        wait_until(lambda: is_gone(self.pid), "the fork server does not end")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _take(self) -> None:
        while (message := self.fork_server.receive()) is not None:
            match message:
                case Forked():
                    self._forked.append(message)
                case Exited():
                    self._exits[message.pid] = message.status

    def _listen(
        self, condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S
    ) -> None:
        def told() -> object:
            select.select([self.fork_server], [], [], 0.05)
            self._take()
            return condition()

        self._take()
        if not condition():
            wait_until(told, what, timeout_s)


class Worker:
    """A running worker, from outside: its port, its counters, its handle."""

    def __init__(
        self,
        yard: Yard,
        protocol: Kind,
        *destinations: Destination,
        gro: bool = True,
        takes_over: Worker | None = None,
        sandbox: Sandbox = Sandbox.AUTO,
        **options: Any,  # of ListenerOptions
    ) -> None:
        """`takes_over` is a dead worker whose listening socket this one gets."""
        self.yard = yard
        self.protocol = protocol
        self.generation = 1
        self.options = ListenerOptions(**options)
        self._destinations = destinations
        if takes_over is None:
            self.listen, self.listener = bind_free(protocol, gro=gro)
        else:
            self.listen, self.listener = takes_over.listen, takes_over.listener.dup()
        self.port = self.listen.first_port
        self._losses = Losses(protocol)
        start = Start(protocol, sandbox=Sandbox.OFF if SANITIZED else sandbox)
        self._page = CountersPage(protocol)
        self.handle = WorkerProcess(start, self._update("test"), self._page)
        forked = yard.fork(self.handle.passed_fds(self.listener.fileno()))
        self.handle.started(forked.pid, forked.pidfd)
        self.pid = forked.pid
        self.wait_for(generation=1)

    # What it is told.

    def _update(self, title: str) -> Update:
        return Update(self.generation, self.options, self._destinations, title=title)

    def repoint(self, *destinations: Destination) -> None:
        """Tell it the new list, and wait until it is in force."""
        self.tell(*destinations)
        self.wait_for(generation=self.generation)

    def tell(
        self, *destinations: Destination, generation: int | None = None, title: str = "test"
    ) -> None:
        self.generation = self.generation + 1 if generation is None else generation
        self._destinations = destinations
        self.handle.update(self._update(title))

    def change(self, **options: Any) -> None:
        """Give it new values of some options, and wait until they are in force."""
        self.options = dataclasses.replace(self.options, **options)
        self.tell(*self._destinations)
        self.wait_for(generation=self.generation)

    def drain(self, deadline_ms: int) -> None:
        self.handle.drain(deadline_ms)

    @property
    def blocked_on(self) -> int:
        """The control pipe, where it is full and a record waits; else -1."""
        return self.handle.blocked_on

    def flush(self) -> None:
        self.handle.flush()

    # What it says.

    def counters(self) -> Mapping[str, int]:
        page = self._page
        return page.counters() | {"generation": page.generation, "backends": page.backends}

    def counter(self, name: str) -> int:
        return self.counters()[name]

    def losses(self) -> Mapping[str, int]:
        """What has risen since the last time, of the counters that are losses."""
        return {row.name: rise for row, rise in self._losses.risen(self._page.counters())}

    @property
    def sandbox(self) -> int:
        """The word in which it says what it has given up."""
        return self.handle.sandbox

    def wait_for(self, timeout_s: float = TIMEOUT_S, **wanted: int) -> None:
        """Until the counters have these values."""

        def reached() -> bool:
            counters = self.counters()
            return all(counters[name] == value for name, value in wanted.items())

        try:
            wait_until(reached, "", timeout_s)
        except AssertionError:
            state = "has ended" if self.yard.has_exited(self.pid) else read_process(self.pid)
            counters = {name: value for name, value in self.counters().items() if value}
            raise AssertionError(f"worker ({state}) never had {wanted}: {counters}") from None

    def descriptors(self) -> dict[int, str]:
        return descriptors(self.pid)

    # Its end.

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return stopped(self.pid)

    def kill(self) -> None:
        self.handle.kill()
        self.yard.exit_code(self.pid)

    def exit_code(self, timeout_s: float = TIMEOUT_S) -> int:
        return self.yard.exit_code(self.pid, timeout_s)

    def let_go(self) -> None:
        """Close what the parent has of it: its control pipe and its socket."""
        self.handle.close()
        self.listener.close()

    def close(self) -> None:
        """End it. Fails if it had ended by itself in a way that no test asks for."""
        if not self.yard.has_exited(self.pid):
            self.kill()
        self.let_go()
        self._page.close()


StartWorker = Callable[..., Worker]
"""The fixtures that start workers: `start(protocol, destination, ..., hold=...)`."""


class Bare:
    """A worker whose control pipe the test writes byte by byte."""

    def __init__(self, yard: Yard, protocol: Kind = Kind.TCP) -> None:
        self.yard = yard
        self.listener, listening = bind_free(protocol)
        self.start = start_record(protocol)
        counters = os.memfd_create("counters")
        os.ftruncate(counters, COUNTERS_BYTES)
        read, self.control = os.pipe()
        with listening:
            self.pid = yard.fork((listening.fileno(), read, counters)).pid
        os.close(read)
        self._words = memoryview(mmap.mmap(counters, COUNTERS_BYTES)).cast("Q")
        os.close(counters)

    def write(self, data: bytes) -> None:
        os.write(self.control, data)

    def serves(self) -> bool:
        """Whether its loop has had a turn."""
        return self._words[0] != 0

    @property
    def generation(self) -> int:
        return self._words[GENERATION_WORD]

    def close(self) -> None:
        os.close(self.control)

    def exit_code(self) -> int:
        return self.yard.exit_code(self.pid, 5)


class Watched:
    """Somebody else's worker, by its number. Its counters can be read after its end."""

    def __init__(self, pid: int, protocol: Kind) -> None:
        self.pid = pid
        self.protocol = protocol
        self._words = memoryview(_counters_page(pid)).cast("Q")

    def counters(self) -> Mapping[str, int]:
        values = {"generation": self._words[GENERATION_WORD]}
        for place, row in enumerate(COUNTERS[self.protocol], FIRST_COUNTER):
            values[row.name] = self._words[place]
        return values

    def descriptor_limit(self, soft: int) -> None:
        limit_descriptors(self.pid, soft)

    def next_descriptor(self) -> int:
        """One more than the highest that is open: as a limit, it leaves only gaps."""
        return 1 + max(descriptors(self.pid))


def _counters_page(pid: int) -> mmap.mmap:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:counters" in line:
            fd = os.open(f"/proc/{pid}/map_files/{line.split()[0]}", os.O_RDONLY)
            try:
                return mmap.mmap(fd, COUNTERS_BYTES, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
    raise ProcessLookupError(f"{pid} has no counters page (yet)")


# ----------------------------------------------------------------------------------------------- counters


class Counted(Protocol):
    """Whatever has the counters of a worker."""

    def counters(self) -> Mapping[str, int]: ...


def check_tcp_counters(worker: Counted) -> None:
    """Invariant 3: nothing is lost silently. For a moment when nothing moves."""
    # A peer has the bytes before the loop has counted them: hence the patience.
    _settle(worker, _tcp_balances)


def _tcp_balances(now: Mapping[str, int]) -> bool:
    if now["accepted"] != now["closed"] + now["reset"] + now["rejected"] + now["active"]:
        return False
    for source, destination in (("client", "backend"), ("backend", "client")):
        kept = now[f"received_from_{source}"]
        kept -= now[f"sent_to_{destination}"] + now[f"discarded_to_{destination}"]
        if kept < 0 or (kept and not now["active"]):
            return False
    return True


def check_udp_counters(worker: Counted) -> None:
    """Invariant 3 for datagrams: each that was received was sent, is queued, or is counted as lost."""
    _settle(worker, _udp_balances)


def _udp_balances(now: Mapping[str, int]) -> bool:
    went = sum(count for name, count in now.items() if name.startswith("dropped_"))
    went += now["sent_to_backend"] + now["sent_to_client"] + now["queued"]
    return now["received_from_client"] + now["received_from_backend"] == went


def _settle(worker: Counted, balances: Callable[[Mapping[str, int]], bool]) -> None:
    try:
        wait_until(lambda: balances(worker.counters()), "", 2)
    except AssertionError:
        raise AssertionError(f"the counters do not add up: {worker.counters()}") from None


# ------------------------------------------------------------------------------------------------ parents


def _parent(*arguments: str, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.worker", *arguments]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], text=True, **streams)


class Parent:
    """A supervisor that is told its routes by the test. It ends when it is closed, or with the test.

    The real parent learns routes from Docker. Fork server, supervisor and workers are the real ones.
    """

    def __init__(self, log: Path, hold_ms: int) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self._process = _parent("supervise", str(hold_ms), stdin=subprocess.PIPE, stderr=stderr)
        self.pid = self._process.pid
        wait_until(lambda: children(self.pid), "the parent has a fork server")
        self.tell({})

    def tell(self, routes: Mapping[ListenAddress, Sequence[Target]]) -> None:
        """These from now on; whoever is not named is withdrawn."""
        assert self._process.stdin is not None
        lines = [
            (listener.first_port, listener.protocol, list(targets))
            for listener, targets in routes.items()
        ]
        print(json.dumps(lines), file=self._process.stdin, flush=True)

    @property
    def fork_server(self) -> int:
        (pid,) = children(self.pid)
        return pid

    def workers(self) -> list[int]:
        return children(self.fork_server)

    def worker(self, listener: ListenAddress, generation: int) -> Watched:
        """The one live worker of the listener, once it has this generation of backends in force."""
        prefix = f"grand-ambassador: {listener} "

        def find() -> Watched | None:
            pids = [pid for pid in self.workers() if title(pid).startswith(prefix)]
            assert len(pids) < 2, f"{listener} has the workers {pids}"
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                for pid in pids:
                    worker = Watched(pid, listener.protocol)
                    if worker.counters()["generation"] == generation:
                        return worker
            return None

        try:
            return wait_until(find)
        except AssertionError as error:
            raise AssertionError(
                f"{error}: {listener} with generation {generation}: {self.log.read_text()}"
            ) from None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(TIMEOUT_S) == 0, self.log.read_text()


def parent_of_workers(how: str, ports: Sequence[tuple[Kind, int]]) -> subprocess.Popen[str]:
    """A parent that is made only to be killed. It prints the number of its fork server and of its workers."""
    names = [f"{protocol}:{port}" for protocol, port in ports]
    return _parent(how, *names, stdout=subprocess.PIPE)


def _supervise(hold_ms: int, lines: IO[str]) -> int:
    wanted = DesiredState()
    sandbox = Sandbox.OFF if SANITIZED else Sandbox.AUTO
    # The fork server first: it is forked, which is safe only while there is no thread.
    supervisor = Supervisor(ForkServer.fork(), lambda: wanted, sandbox=sandbox)

    def listen() -> None:
        nonlocal wanted
        for line in lines:
            wanted = DesiredState(_specs(json.loads(line), ListenerOptions(hold=hold_ms)))
            supervisor.wake()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    return supervisor.run()


def _specs(
    lines: Sequence[tuple[int, str, Sequence[Target]]], options: ListenerOptions
) -> dict[ListenAddress, ListenerSpec]:
    found = {}
    for port, protocol, targets in lines:
        listen = ListenAddress(Kind(protocol), port)
        backends = tuple(Backend(host, number, "machine", run) for host, number, run in targets)
        found[listen] = ListenerSpec(listen, "machine", "", backends, options)
    return found


def _raise_workers(how: str, names: Sequence[str]) -> None:
    fork_server = ForkServer.fork() if how == "fork" else ForkServer.launch()
    print(fork_server.pid)
    for name in names:
        protocol, _, port = name.partition(":")
        sock = sockets.bind(ListenAddress(Kind(protocol), int(port)))
        handle = WorkerProcess(Start(Kind(protocol)), Update(1), CountersPage(Kind(protocol)))
        fork_server.request(handle.passed_fds(sock.fileno()))
        select.select([fork_server], [], [])
        forked = fork_server.receive()
        assert isinstance(forked, Forked)
        handle.started(forked.pid, forked.pidfd)
        print(forked.pid)
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        sys.exit(_supervise(int(sys.argv[2]), sys.stdin))
    _raise_workers(sys.argv[1], sys.argv[2:])
