"""What every relay test needs: a fork server, workers around the compiled loops, and waiting with a limit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
import random
import select
import signal
import socket
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ambassador import _worker
from ambassador.control import Drain, Start, Update, pack
from ambassador.counters import COUNTERS
from ambassador.model import Backend, ListenAddress
from ambassador.options import ListenerOptions, Sandbox
from ambassador.supervise import sockets
from ambassador.supervise.forkserver import Exited, Forked, ForkServer
from ambassador.values import Protocol

TIMEOUT_S = 20.0
"""No single step takes longer than this, however busy the machine is."""

SANITIZED = bool(os.environ.get("SANITIZED"))
"""Whether the loops are built with sanitizers (scripts/sanitize.py), which no sandbox lets work."""

native = pytest.mark.skipif(
    SANITIZED, reason="measures, or confines, what the sanitizers have too much of"
)

# Below the range that the kernel gives to connecting sockets, and elsewhere in every run.
_ports = itertools.count(random.SystemRandom().randrange(12_000, 30_000))


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Poll until it holds. Fails with `what` when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s} s: {what}"
        time.sleep(0.002)


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat: R, S, T, Z ..., or "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_gone(pid: int) -> bool:
    return process_state(pid) in {"", "Z", "X"}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While in here, the process is stopped (SIGSTOP)."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: process_state(pid) in "Tt", f"process {pid} does not stop")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def bind_free(protocol: Protocol, *, gro: bool = True) -> tuple[ListenAddress, socket.socket]:
    """A listening socket as the parent makes it, on a port that nobody has."""
    for _ in range(100):
        listener = ListenAddress(protocol, 12_000 + next(_ports) % 20_000)
        with contextlib.suppress(OSError):
            return listener, sockets.bind(listener, gro=gro)
    raise AssertionError("no free port in a hundred")


class Yard:
    """The fork server and the exits it told of."""

    def __init__(self, fork_server: ForkServer) -> None:
        self.fork_server = fork_server
        self._forked: list[Forked] = []
        self._exits: dict[int, int] = {}

    def fork(self, descriptors: typing.Sequence[int]) -> Forked:
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
        wait_until(lambda: is_gone(self.fork_server.pid), "the fork server does not end")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.fork_server.pid, 0)

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
        deadline = time.monotonic() + timeout_s
        self._take()
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"after {timeout_s} s: {what}"
            select.select([self.fork_server], [], [], left)
            self._take()


Destination = tuple[int, Backend]
"""A backend with the id that the listener has given it."""


class Handle:
    """The parent's end of a worker: its control pipe and its counters page. The smallest that works."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.counters_fd = os.memfd_create("counters")
        os.ftruncate(self.counters_fd, _worker.COUNTERS_BYTES)
        self._page = mmap.mmap(self.counters_fd, _worker.COUNTERS_BYTES)
        self._words = memoryview(self._page).cast("Q")
        self.control_read, self.control_write = os.pipe()

    def send(self, *records: Start | Update | Drain) -> None:
        os.write(self.control_write, b"".join(map(pack, records)))

    def counters(self) -> Mapping[str, int]:
        words = self._words
        values = {
            "generation": words[_worker.GENERATION_WORD],
            "backends": words[_worker.BACKENDS_WORD],
        }
        for place, counter in enumerate(COUNTERS[self.protocol], _worker.FIRST_COUNTER):
            values[counter.name] = words[place]
        return values

    @property
    def sandbox(self) -> int:
        return self._words[_worker.SANDBOX_WORD]

    def close(self) -> None:
        self._words.release()
        self._page.close()
        for fd in (self.control_write, self.control_read, self.counters_fd):
            with contextlib.suppress(OSError):
                os.close(fd)


class Worker:
    """A running worker, from outside: its port, its counters, its handle."""

    def __init__(
        self,
        yard: Yard,
        protocol: Protocol,
        *destinations: Destination,
        gro: bool = True,
        takes_over: Worker | None = None,
        sandbox: Sandbox = Sandbox.AUTO,
        **options: Any,  # of ListenerOptions
    ) -> None:
        """`takes_over` is a dead worker whose listening socket this one gets."""
        if SANITIZED:
            sandbox = Sandbox.OFF
        self.yard = yard
        self.protocol = protocol
        self.generation = 1
        self.options = ListenerOptions(**options)
        self.destinations = destinations
        if takes_over is None:
            self.listen, self.listener = bind_free(protocol, gro=gro)
        else:
            self.listen, self.listener = takes_over.listen, takes_over.listener.dup()
        self.port = self.listen.first_port
        self.handle = Handle(protocol)
        self.handle.send(Start(protocol, sandbox=sandbox), self._update())
        passed = (self.listener.fileno(), self.handle.control_read, self.handle.counters_fd)
        forked = yard.fork(passed)
        os.close(self.handle.control_read)
        self.pid, self.pidfd = forked.pid, forked.pidfd
        self.wait_for(generation=1)

    def _update(self) -> Update:
        return Update(self.generation, self.options, self.destinations, title="test")

    def repoint(self, *destinations: Destination) -> None:
        """Tell it the new list, and wait until it is in force."""
        self.tell(*destinations)
        self.wait_for(generation=self.generation)

    def tell(self, *destinations: Destination) -> None:
        self.generation += 1
        self.destinations = destinations
        self.handle.send(self._update())

    def change(self, **options: Any) -> None:
        """Give it new values of some options, and wait until they are in force."""
        self.options = dataclasses.replace(self.options, **options)
        self.generation += 1
        self.handle.send(self._update())
        self.wait_for(generation=self.generation)

    def drain(self, deadline_ms: int) -> None:
        self.handle.send(Drain(deadline_ms))

    def counters(self) -> Mapping[str, int]:
        return self.handle.counters()

    def counter(self, name: str) -> int:
        return self.handle.counters()[name]

    def wait_for(self, timeout_s: float = TIMEOUT_S, **wanted: int) -> None:
        """Until the counters have these values."""

        def reached() -> bool:
            counters = self.counters()
            return all(counters[name] == value for name, value in wanted.items())

        try:
            wait_until(reached, "", timeout_s)
        except AssertionError:
            state = "has ended" if self.yard.has_exited(self.pid) else process_state(self.pid)
            counters = {name: value for name, value in self.counters().items() if value}
            raise AssertionError(f"worker ({state}) never had {wanted}: {counters}") from None

    def descriptors(self) -> dict[int, str]:
        """What it has open, by number: the targets of /proc/PID/fd."""
        found = {}
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                found[int(entry.name)] = str(entry.readlink())
        return found

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return stopped(self.pid)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.yard.exit_code(self.pid)

    def close(self) -> None:
        """End it. Fails if it had ended by itself in a way that no test asks for."""
        if not self.yard.has_exited(self.pid):
            self.kill()
        self.handle.close()
        os.close(self.pidfd)
        self.listener.close()


class Counted(typing.Protocol):
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
