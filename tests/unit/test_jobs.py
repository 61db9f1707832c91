"""The supervisor's duties: when they are due, and what they do then."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ambassador import _sandbox
from ambassador.options import Sandbox
from ambassador.supervise import jobs
from ambassador.supervise.guard import Guard
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker_path import WorkerPath
from ambassador.supervise.workers import Workers

TIMINGS = Timings()
NOW = 1000.0


class Process(SimpleNamespace):
    """A worker that was last heard of at NOW."""

    def __init__(self, **changes: Any) -> None:
        fields = {"pid": os.getpid(), "kill_sent": False, "last_heartbeat": NOW, "sandbox": 0}
        super().__init__(**fields | {"killed": 0} | changes)

    def kill(self) -> None:
        self.killed += 1


class Path:
    def __init__(self, due: float | None = None, process: Process | None = None) -> None:
        self.moment = due
        self.process = process
        self.done: list[tuple[object, ...]] = []
        self.error: Exception | None = None

    def due(self) -> float | None:
        return self.moment

    def run(self, now: float) -> None:
        if self.error is not None:
            raise self.error
        self.done.append(("run", now))

    def report_losses(self) -> None:
        self.done.append(("losses",))

    def recover(self, now: float) -> None:
        self.done.append(("recover", now))

    def processes(self) -> list[Process]:
        return [self.process] if self.process else []

    def fields(self) -> dict[str, object]:
        return {"port": "80"}


def paths(*given: Path) -> jobs.Paths:
    return lambda: cast("list[WorkerPath]", list(given))


def workers(**fields: Any) -> Workers:
    given = {"stopping": [], "repair_at": None, "fork_server": None} | fields
    return cast("Workers", SimpleNamespace(**given))


def test_the_first_start_is_due_first() -> None:
    given = Path(NOW), Path(), Path(5.0), Path(NOW + 1)
    job = jobs.StartWorkers(paths(*given), Guard(1.0))
    assert job.due() == 5.0
    job.run(NOW)
    assert [path.done for path in given] == [[("run", NOW)], [], [("run", NOW)], []]
    assert jobs.StartWorkers(paths(Path()), Guard(1.0)).due() is None


def test_a_listener_that_raises_waits_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """R6: logged once; the loop does not spin on it."""
    now = NOW
    guard = Guard(1.0, lambda: now)
    broken, good = Path(5.0), Path(5.0)
    broken.error = ZeroDivisionError("nobody thought of it")
    job = jobs.StartWorkers(paths(broken, good), guard)
    job.run(now)
    assert good.done == [("run", NOW)]
    good.moment = None
    assert job.due() == NOW + 1
    now += 1
    job.run(now)
    assert job.due() == NOW + 2
    (record,) = caplog.records
    assert record.message == "internal error, trying again"
    assert record.exc_info
    assert "ZeroDivisionError" in vars(record)["fields"]["reason"]
    broken.error = None
    now += 1
    job.run(now)
    assert broken.done == [("run", now)]
    assert job.due() == 5.0


def test_what_was_not_carried_out_is_tried_again() -> None:
    answers = iter([False, True])
    job = jobs.Reconcile(lambda: next(answers), TIMINGS)
    assert job.due() == 0.0
    job.run(NOW)
    assert job.due() == NOW + TIMINGS.start_retry
    job.run(NOW + 1)
    assert job.due() is None
    with pytest.raises(StopIteration):
        job.run(NOW + 2)
    assert job.due() == NOW + 2 + TIMINGS.start_retry


def test_stop_deadlines() -> None:
    assert jobs.StopDeadlines(workers()).due() is None
    stopping = [SimpleNamespace(kill_at=9.0), SimpleNamespace(kill_at=8.0)]
    assert jobs.StopDeadlines(workers(stopping=stopping)).due() == 8.0


def test_a_silent_worker_is_killed_once(caplog: pytest.LogCaptureFixture) -> None:
    """W2."""
    process = Process(pid=1 << 22)  # no such process: nobody can say that it runs
    job = jobs.WatchWorkers(paths(Path(process=process)), Guard(1.0), TIMINGS)
    now = NOW
    while now < NOW + 20:
        job.run(now)
        due = job.due()
        assert due is not None
        now = due
    assert process.killed == 1
    (record,) = caplog.records
    assert record.message == "worker not responding, killing it"
    assert jobs.WatchWorkers(paths(), Guard(1.0), TIMINGS).due() is None, "nobody to watch"


def test_losses_are_looked_for_in_intervals() -> None:
    path = Path()
    job = jobs.ReportLosses(paths(path), Guard(1.0), TIMINGS)
    job.run(NOW)
    job.run(NOW + 1)
    assert path.done == [("losses",), ("recover", NOW)]
    assert job.due() == NOW + TIMINGS.report


def test_the_sandbox_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    process = Process()
    job = jobs.ReportSandbox(workers(processes=lambda: [process]), Sandbox.AUTO, TIMINGS)
    assert job.due() == 0.0
    job.run(NOW)
    assert job.due() == NOW + TIMINGS.sandbox_first
    process.sandbox = 1 << _sandbox.MISSING
    job.run(NOW + 1)
    job.run(NOW + 2)
    assert job.due() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert vars(record)["fields"]["missing"] == _sandbox.STEPS[0]


@pytest.mark.parametrize("wanted", [Sandbox.REQUIRED, Sandbox.OFF])
def test_no_report_of_a_sandbox_that_is_required_or_off(wanted: Sandbox) -> None:
    assert jobs.ReportSandbox(workers(processes=lambda: [Process()]), wanted, TIMINGS).due() is None


def test_a_stopped_fork_server_is_killed() -> None:
    """W2. Not one that goes on in time."""
    server = Process(stopped=True)
    crew = workers(fork_server=server, repair=lambda _: None)
    job = jobs.CheckForkServer(crew, TIMINGS)
    assert job.due() is None
    job.child_changed(NOW)
    job.run(NOW)
    job.run(NOW + 1)
    server.stopped = False
    job.child_changed(NOW)
    assert (job.due(), server.killed) == (None, 0)
    server.stopped = True
    job.child_changed(NOW)
    while not server.killed:
        due = job.due()
        assert due is not None and due < NOW + 20
        job.run(max(due, NOW))
    assert job.due() is None


def test_a_missing_fork_server_does_not_spin() -> None:
    server = Process(stopped=True)
    crew = workers(fork_server=server, repair=lambda _: None, repair_at=NOW + 5)
    job = jobs.CheckForkServer(crew, TIMINGS)
    job.child_changed(NOW)
    crew.fork_server = None
    job.run(NOW)
    assert job.due() == NOW + 5
