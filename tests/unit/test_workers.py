"""All workers and their fork server: every one that was asked for is reported as exited once."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import cast

import pytest

from ambassador import _sandbox
from ambassador._worker import EXIT_NO_SANDBOX, HEARTBEAT_WORD, SANDBOX_WORD
from ambassador.control import Start, Update
from ambassador.options import Sandbox
from ambassador.supervise.forkserver import Exited, Forked, ForkServer, ForkServerGone
from ambassador.supervise.page import CountersPage
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker import WorkerProcess
from ambassador.supervise.workers import Workers
from ambassador.values import Protocol

TIMINGS = Timings(restart_first=50, start_retry=30, kill_grace=7)


class FakeForkServer:
    """Answers what a test puts into `messages`. An exception in it is raised."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.closed = False
        self.messages: deque[Forked | Exited | Exception] = deque()
        self.requests = 0
        self._ours, self.theirs = os.pipe()

    def fileno(self) -> int:
        return self._ours

    def request(self, descriptors: list[int]) -> None:
        assert descriptors
        self.requests += 1

    def receive(self) -> Forked | Exited | None:
        message = self.messages.popleft() if self.messages else None
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        self.closed = True
        os.close(self._ours)
        os.close(self.theirs)


class Stage:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.selector = selectors.DefaultSelector()
        self.servers = [FakeForkServer(1)]
        self.launch_error: Exception | None = None
        self.no_sandbox: list[WorkerProcess] = []
        self.exits: list[tuple[WorkerProcess, str]] = []
        self.page = CountersPage(Protocol.TCP)
        self.made: list[WorkerProcess] = []
        self.sleepers: list[int] = []
        monkeypatch.setattr(ForkServer, "launch", self._launch)
        self.workers = Workers(
            cast("ForkServer", self.servers[0]), self.selector, TIMINGS, self.no_sandbox.append
        )

    def _launch(self) -> FakeForkServer:
        if self.launch_error is not None:
            raise self.launch_error
        self.servers.append(FakeForkServer(len(self.servers) + 1))
        return self.servers[-1]

    def fork(self, sandbox: Sandbox = Sandbox.AUTO) -> WorkerProcess:
        process = WorkerProcess(Start(Protocol.TCP, sandbox=sandbox), Update(1), self.page)
        self.made.append(process)
        self.workers.fork(process, [0], partial(self._exited, process))
        return process

    def _exited(self, process: WorkerProcess, how: str) -> None:
        self.exits.append((process, how))
        process.close()

    def hear(self, *messages: Forked | Exited | Exception) -> None:
        """The fork server says this."""
        self.servers[-1].messages.extend(messages)
        os.write(self.servers[-1].theirs, b"x")
        self.turn()

    def turn(self) -> None:
        for key, _ in self.selector.select(0):
            key.data()

    def sleeper(self) -> tuple[int, int]:
        """A process of ours and its pidfd, as a worker's."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        self.sleepers.append(pid)
        return pid, os.pidfd_open(pid)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(monkeypatch)
    yield stage
    for pid in stage.sleepers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for process in stage.made:
        process.close()
    stage.workers.close()
    stage.page.close()
    stage.selector.close()


def test_from_request_to_exit(stage: Stage) -> None:
    one, other = stage.fork(), stage.fork()
    stage.hear(Forked(*stage.sleeper()), Forked(*stage.sleeper()))
    assert set(stage.workers.processes()) == {one, other}
    stage.hear(Exited(other.pid, signal.SIGKILL), Exited(12345678, 0))
    assert stage.exits == [(other, "killed by SIGKILL")]
    assert stage.workers.processes() == [one]


@pytest.mark.parametrize(
    ("status", "how"),
    [
        (0, "exit code 0"),
        (70 << 8, "exit code 70"),
        (9, "killed by SIGKILL"),
        (40, "killed by signal 40"),
    ],
)
def test_how_it_exited(stage: Stage, status: int, how: str) -> None:
    process = stage.fork()
    stage.hear(Forked(*stage.sleeper()))
    stage.hear(Exited(process.pid, status))
    assert stage.exits == [(process, how)]


def test_no_process_to_fork(stage: Stage) -> None:
    process = stage.fork()
    stage.hear(Forked(-errno.EAGAIN, -1))
    assert stage.exits == [(process, "could not be forked: Resource temporarily unavailable")]


def test_no_descriptor_for_the_pidfd(stage: Stage) -> None:
    """The worker that nobody can watch loses its control pipe, and exits by itself."""
    process = stage.fork()
    stage.hear(Forked(999_999_999, -1))
    assert stage.exits == [(process, "could not be watched: no descriptor for its pidfd")]
    stage.hear(Exited(999_999_999, 0))
    assert len(stage.exits) == 1


MISSING = 1 << 16 | 1 << _sandbox.MISSING


@pytest.mark.parametrize(
    ("wanted", "word", "heartbeat", "ends"),
    [
        (Sandbox.REQUIRED, MISSING, 0, True),
        (Sandbox.REQUIRED, 1 << 16, 0, False),  # nothing is missing
        (Sandbox.REQUIRED, 0, 0, False),
        (Sandbox.REQUIRED, MISSING, 1, False),  # its loop ran
        (Sandbox.AUTO, MISSING, 0, False),
        (Sandbox.OFF, MISSING, 0, False),
    ],
)
def test_no_sandbox(stage: Stage, wanted: Sandbox, word: int, heartbeat: int, ends: bool) -> None:
    """S8: the exit code alone ends nothing but the worker."""
    process = stage.fork(wanted)
    stage.hear(Forked(*stage.sleeper()))
    stage.page._words[SANDBOX_WORD], stage.page._words[HEARTBEAT_WORD] = word, heartbeat
    stage.hear(Exited(process.pid, EXIT_NO_SANDBOX << 8))
    assert stage.no_sandbox == ([process] if ends else [])
    assert stage.exits == [(process, "exit code 77")]


def test_a_worker_that_has_run_cannot_say_that_there_is_no_sandbox(stage: Stage) -> None:
    """S8: it may write what it likes into its page, but the parent has seen it run."""
    process = stage.fork(Sandbox.REQUIRED)
    stage.hear(Forked(*stage.sleeper()))
    stage.page._words[HEARTBEAT_WORD] = 1
    assert process.last_heartbeat  # the watchdog's look
    stage.page._words[SANDBOX_WORD], stage.page._words[HEARTBEAT_WORD] = MISSING, 0
    stage.hear(Exited(process.pid, EXIT_NO_SANDBOX << 8))
    assert stage.no_sandbox == []


def test_a_handler_that_fails_is_not_called_for_a_while(stage: Stage) -> None:
    """R6: the loop does not spin on a descriptor that stays ready."""
    stage.servers[-1].messages.append(ZeroDivisionError())
    os.write(stage.servers[-1].theirs, b"x")
    ((key, _),) = stage.selector.select(0)
    with pytest.raises(ZeroDivisionError):
        key.data()
    stage.workers.pause(key)
    assert not stage.selector.select(0)
    assert stage.workers.repair_at is not None
    stage.workers.repair(stage.workers.repair_at)
    assert stage.selector.select(0)


def test_the_fork_server_exits(stage: Stage) -> None:
    """W1: another is started; who was owed is reported, and pidfds report the rest."""
    living = stage.fork()
    stage.hear(Forked(*stage.sleeper()))
    owed = stage.fork()
    stage.hear(ForkServerGone())
    assert stage.servers[0].closed
    assert stage.exits == [(owed, "never started, its fork server exited")]
    stage.fork()
    assert stage.servers[1].requests == 1
    living.kill()
    deadline = time.monotonic() + 10
    while len(stage.exits) < 2 and time.monotonic() < deadline:
        stage.turn()
    assert stage.exits[1] == (living, "exited after its fork server")


def test_a_fork_server_that_keeps_exiting_is_slowed_down(stage: Stage) -> None:
    stage.hear(ForkServerGone())
    assert (len(stage.servers), stage.workers.repair_at) == (2, None)
    stage.hear(ForkServerGone())
    assert len(stage.servers) == 2, "the second exit in a row waits"
    with pytest.raises(ForkServerGone):
        stage.fork()
    assert stage.workers.repair_at is not None
    stage.workers.repair(stage.workers.repair_at)
    assert len(stage.servers) == 3


def test_no_process_for_a_fork_server(stage: Stage) -> None:
    """R3: a state and a retry, not an exception in the parent's loop."""
    stage.launch_error = OSError(errno.EAGAIN, "Resource temporarily unavailable")
    stage.hear(ForkServerGone())
    assert stage.workers.fork_server is None
    assert stage.workers.repair_at is not None
    stage.launch_error = None
    stage.workers.repair(stage.workers.repair_at)
    stage.fork()


def test_no_memory_to_watch_a_descriptor(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is watched as soon as that is possible."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as short:
        short.setattr(stage.selector, "register", fail)
        stage.hear(ForkServerGone())
    assert len(stage.servers) == 2
    assert stage.workers.repair_at is not None
    stage.workers.repair(stage.workers.repair_at)
    process = stage.fork()
    stage.hear(Forked(-errno.ENOMEM, -1))
    assert stage.exits == [(process, "could not be forked: Cannot allocate memory")]


def test_a_full_pipe_is_waited_for(stage: Stage) -> None:
    """W6: nothing blocks, and of what waits the newest goes."""
    process = stage.fork()
    read = os.dup(process.passed_fds(-1)[1]) if process.passed_fds(-1)[1] >= 0 else -1
    assert read < 0, "the read end was closed after the request"
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    os.dup2(write, process._control_write)
    os.close(write)
    os.set_blocking(process._control_write, False)
    for generation in range(2, 1000):
        process.update(Update(generation, title="x" * 1000))
        stage.workers.flush(process)
    assert process.blocked_on >= 0
    got = b""
    deadline = time.monotonic() + 10
    while process.blocked_on >= 0 and time.monotonic() < deadline:
        got += os.read(read, 1 << 20)
        stage.turn()
    assert process.blocked_on < 0
    os.close(read)
    assert stage.selector.get_map()[stage.servers[0].fileno()]
    assert process._control_write not in stage.selector.get_map()


def test_stopping_workers_are_killed_after_the_deadline(stage: Stage) -> None:
    process = stage.fork()
    stage.hear(Forked(*stage.sleeper()))
    before = time.monotonic()
    stage.workers.stop(process, 1000)
    (stopping,) = stage.workers.stopping
    assert before + 8 <= stopping.kill_at <= time.monotonic() + 8
    stage.workers.kill_overdue(before)
    stage.workers.stop_now()
    stage.workers.kill_overdue(before)
    assert stopping.kill_at == before + 7
    assert os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOWAIT) is not None
    stage.hear(Exited(process.pid, signal.SIGKILL))
    assert stage.workers.stopping == []
