"""Programs that the benchmark starts, and what a process tree uses: processor time and memory.

Processor time is user and system time, with that of children that exited and were waited for. The kernel
counts ticks of 10 ms. Its work outside the relay's processes (soft interrupts) is only in `busy_seconds`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

STOP_S = 3.0


class Failed(Exception):
    """A program did not start, or gave no result."""


class Memory(NamedTuple):
    """Bytes: private (USS), and with the share of shared pages (PSS)."""

    uss: int
    pss: int


class Program:
    """One program in the background, with its output in the file `log`. The owner calls `stop`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = command, log
        with log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )  # fmt: skip
            except OSError as error:
                raise Failed(str(error)) from error
        self.pid = self._process.pid

    def wait_for(self, ready: Callable[[], bool], seconds: float = 10.0) -> None:
        """Raise Failed with the last line of its log if it exits, or if it is not ready in time."""
        deadline = time.monotonic() + seconds
        while not ready():
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                state = "did not get ready" if status is None else f"exited with {status}"
                last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise Failed(f"{Path(self.command[0]).name} {state}: {last[:200]}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Stop it, and kill its children that it leaves behind."""
        children = tree([self.pid])[1:]
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def tree(roots: Iterable[int]) -> list[psutil.Process]:
    """These processes and their descendants that run now."""
    found: list[psutil.Process] = []
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """Processor time of the whole tree so far."""
    total = 0.0
    for process in tree(roots):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, its own and its children's
    return total


def busy_seconds() -> float:
    """Time that the cores we may use have worked so far, for anybody."""
    cores = psutil.cpu_times(percpu=True)
    used = [cores[number] for number in os.sched_getaffinity(0)]
    return sum(one.user + one.nice + one.system + one.irq + one.softirq for one in used)


def memory_of(pid: int) -> Memory:
    """Of one process; zero if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        used = psutil.Process(pid).memory_full_info()
        return Memory(used.uss, used.pss)
    return Memory(0, 0)


def bound(pid: int, protocol: str) -> set[int]:
    """The ports that anything listens on, in the network namespace of `pid`."""
    ports = set()
    for name in (protocol, f"{protocol}6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                words = line.split(maxsplit=4)
                if protocol == "udp" or words[3] == "0A":
                    ports.add(int(words[1].rpartition(":")[2], 16))
    return ports
