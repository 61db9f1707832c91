"""A worker is killed while clients come and go and one streams: `make soak`.

Fault row W1.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from tests.docker.test_processes import parent_pid, send_to_the_end
from tests.support.endpoints import PORT, Conversation
from tests.support.engine import Stage, run_ambassador, run_server
from tests.support.processes import descendants, workers_of
from tests.support.wait import wait_until

TCP = f"{PORT}/tcp"


class Visitors:
    """Threads that connect, read the greeting and leave, again and again."""

    def __init__(self, host: str, count: int = 4) -> None:
        self.host = host
        self.greeted: list[float] = []
        """When the visits began that went well."""
        self.cut: list[float] = []
        """When those began that were cut in the middle of the conversation."""
        self.failed: list[str] = []
        """Connections that were refused or timed out."""
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._visit) for _ in range(count)]

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _visit(self) -> None:
        while not self._done.wait(0.002):
            begin = time.monotonic()
            try:
                conversation = Conversation(self.host)
            except OSError as error:
                self.failed.append(repr(error))
                continue
            with conversation:
                try:
                    conversation.greeting()
                    self.greeted.append(begin)
                except (ConnectionResetError, AssertionError):
                    self.cut.append(begin)
                except OSError as error:
                    self.failed.append(repr(error))


def test_worker_killed_under_load(stage: Stage) -> None:
    """W1: replaced within a second, nobody is refused, its own connections end in a reset."""
    db = run_server(stage, "db", TCP)
    ambassador, host = run_ambassador(stage, "-name", db.name)
    parent = parent_pid(ambassador)
    for _ in range(3):
        (worker,) = wait_until(lambda: workers_of(parent), "one worker")
        kill_under_load(worker.pid, host)
    ambassador.wait_for_log("worker exited, restarting.*killed by SIGKILL")
    assert len(workers_of(parent)) == 1
    assert [process for process in descendants(parent) if process.state == "Z"] == []


def kill_under_load(worker: int, host: str) -> None:
    with Conversation(host) as idle, Conversation(host) as stream, Visitors(host) as visitors:
        idle.greeting()
        stream.greeting()
        endings: list[str] = []
        writer = threading.Thread(target=lambda: endings.append(send_to_the_end(stream)))
        writer.start()
        stream.read(1 << 20)
        wait_until(lambda: len(visitors.greeted) > 20, "visits")
        os.kill(worker, signal.SIGKILL)
        killed = time.monotonic()
        endings.append(stream.ending())
        writer.join()
        count = len(visitors.greeted)
        wait_until(lambda: len(visitors.greeted) > count + 20, "more visits")
        # Neither would end by itself: a clean end is bytes lost in silence. The kernel tells of a
        # reset only once, the writer or the reader.
        assert "reset" in endings
        assert idle.ending() == "reset"
    assert visitors.failed == []
    assert min(begin for begin in visitors.greeted if begin > killed) - killed < 1
    assert all(begin < killed + 0.1 for begin in visitors.cut), "cut, but not by the kill"
