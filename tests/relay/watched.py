"""A worker as the operating system shows it, for tests in which somebody else holds its handle."""

from __future__ import annotations

import mmap
import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path

from ambassador._worker import BACKENDS_WORD, COUNTERS_BYTES, FIRST_COUNTER, GENERATION_WORD
from ambassador.counters import COUNTERS
from ambassador.values import Protocol

_COMMON = {"generation": GENERATION_WORD, "backends": BACKENDS_WORD}


def children(pid: int) -> list[int]:
    """The processes that it has forked and not buried, zombies among them."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descriptors(pid: int) -> list[str]:
    """What it has open: the targets of /proc/PID/fd."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:  # closed since
            pass
    return found


def private_kb(pid: int) -> int:
    """The memory that is its own: 5 % of what is shared with the fork server would hide any leak."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def turns(pid: int) -> int:
    """How often it was given a processor. A process that sleeps and has had no turn made no system call."""
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(count) for count in re.findall(r"voluntary_ctxt_switches:\s+(\d+)", text))


class Watched:
    """A worker by its number. Its counters page is mapped, so it can be read after the worker's end."""

    def __init__(self, pid: int, protocol: Protocol) -> None:
        self.pid = pid
        self.protocol = protocol
        self._words = memoryview(_counters_page(pid)).cast("Q")

    def counters(self) -> Mapping[str, int]:
        values = {name: self._words[place] for name, place in _COMMON.items()}
        for place, counter in enumerate(COUNTERS[self.protocol], FIRST_COUNTER):
            values[counter.name] = self._words[place]
        return values

    def descriptor_limit(self, soft: int) -> None:
        """Change RLIMIT_NOFILE of the running process."""
        # Allowed to whoever has its real user and group (prlimit(2)), or CAP_SYS_RESOURCE, which a
        # container's root lacks.
        status = Path(f"/proc/{self.pid}/status").read_text()
        user, group = (int(word) for word in re.findall(r"^[UG]id:\s+(\d+)", status, re.MULTILINE))
        os.setresgid(group, -1, -1)
        os.setresuid(user, -1, -1)
        try:
            _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (min(soft, hard), hard))
        finally:
            os.setresuid(0, -1, -1)
            os.setresgid(0, -1, -1)

    def next_descriptor(self) -> int:
        """One more than the highest that is open: as a limit, it leaves only gaps."""
        return 1 + max(int(entry.name) for entry in Path(f"/proc/{self.pid}/fd").iterdir())


def _counters_page(pid: int) -> mmap.mmap:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:counters" in line:
            fd = os.open(f"/proc/{pid}/map_files/{line.split()[0]}", os.O_RDONLY)
            try:
                return mmap.mmap(fd, COUNTERS_BYTES, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
    raise ProcessLookupError(f"{pid} has no counters page (yet)")
