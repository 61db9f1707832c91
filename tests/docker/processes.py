"""Processes as /proc shows them: who descends from whom, and who still lives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

WORKER_TITLE = " -> "
"""In a worker's title between its target and its backend."""


class Process(NamedTuple):
    pid: int
    parent: int
    state: str
    title: str


def read_process(pid: int) -> Process | None:
    """The process, or None where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    # The name, in parentheses, may hold anything.
    state, parent = stat.rpartition(")")[2].split()[:2]
    return Process(pid, int(parent), state, title.replace(b"\0", b" ").decode(errors="replace"))


def started_at(pid: int) -> float:
    """When it was forked, by CLOCK_BOOTTIME. (psutil counts from a boot that is rounded to seconds.)"""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def descendants(root: int) -> list[Process]:
    """The living and the zombies below a process."""
    everybody = [read_process(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()]
    found: list[Process] = []
    pids = {root}
    while True:
        more = [p for p in everybody if p is not None and p.parent in pids and p.pid not in pids]
        if not more:
            return found
        found += more
        pids |= {process.pid for process in more}


def workers_of(root: int) -> list[Process]:
    """Those of an ambassador, by its parent process."""
    return [process for process in descendants(root) if WORKER_TITLE in process.title]


def is_gone(process: Process) -> bool:
    """No longer there, or dead and only not reaped yet (by whoever inherited it)."""
    now = read_process(process.pid)
    return now is None or now.state == "Z" or now.title != process.title
