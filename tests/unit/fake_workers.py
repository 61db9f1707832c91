"""Workers without processes, for what the supervising side does with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

from ambassador.supervise.forkserver import ForkServerGone
from ambassador.supervise.worker import WorkerProcess
from ambassador.supervise.workers import Workers


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


class FakeWorkers:
    """Takes requests to fork, and lets a test say how each went on. In place of Workers."""

    def __init__(self) -> None:
        self.repair_at: float | None = None
        self.error: Exception | None = None
        self.forked: list[WorkerProcess] = []
        self.passed: list[int] = []  # how many descriptors each got
        self.stopped: list[tuple[WorkerProcess, int]] = []
        self._exited: dict[WorkerProcess, Callable[[str], None]] = {}

    @property
    def workers(self) -> Workers:
        return cast("Workers", self)

    def fork(
        self, process: WorkerProcess, descriptors: list[int], exited: Callable[[str], None]
    ) -> None:
        if self.error is not None:
            raise self.error
        assert all(os.fstat(fd) for fd in descriptors)
        self.forked.append(process)
        self.passed.append(len(descriptors))
        self._exited[process] = exited
        process.pid = 1000 + len(self.forked)

    def flush(self, process: WorkerProcess) -> None:
        process.flush()

    def stop(self, process: WorkerProcess, deadline_ms: int) -> None:
        process.drain(deadline_ms)
        self.stopped.append((process, deadline_ms))

    def exit(self, process: WorkerProcess, how: str = "killed by SIGKILL") -> None:
        self._exited.pop(process)(how)

    def exit_all(self) -> None:
        for process in list(self._exited):
            self.exit(process)


GONE = ForkServerGone()
