"""What a process tree uses, read from /proc: CPU time, memory, threads, descriptors.

CPU time is user and system time of every process of the tree, children that have ended included as far as
their parents have waited for them. The kernel gives it in ticks of 10 ms. What the kernel does for a relay
outside its own processes (soft interrupts on another's time, ksoftirqd) is in nobody's figure; `busy_seconds`
has it, with everything else that the machine did.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
KIB = 1024


@dataclass(frozen=True)
class Memory:
    """Bytes: private (USS), and with the share of what is shared (PSS)."""

    uss: int
    pss: int

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.uss + other.uss, self.pss + other.pss)


def tree(roots: Iterable[int]) -> list[int]:
    """These processes and all their descendants that live now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid for pid in roots if Path(f"/proc/{pid}").exists()]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """User and system time of the whole tree so far."""
    ticks = 0
    for pid in tree(roots):
        fields = _stat(pid)
        if fields:
            ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
    return ticks * TICK


def busy_seconds() -> float:
    """Time that all cores together, of those that we may use, have worked so far: for the relay, the load
    tools, the kernel itself.
    """
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in ours:
            user, nice, system, _idle, _wait, irq, soft = (int(field) for field in fields[:7])
            ticks += user + nice + system + irq + soft
    return ticks * TICK


def switches(roots: Iterable[int]) -> int:
    """Voluntary context switches of the whole tree so far: an idle relay has none."""
    total = 0
    for pid in tree(roots):
        for task in Path(f"/proc/{pid}/task").glob("*/status"):
            try:
                text = task.read_text()
            except OSError:
                continue
            total += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


def memory_of(pid: int) -> Memory:
    """Of one process; zero if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return Memory(0, 0)
    values = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    uss = values["Private_Clean"] + values["Private_Dirty"] + values.get("Private_Hugetlb", 0)
    return Memory(uss * KIB, values["Pss"] * KIB)


def memory(roots: Iterable[int]) -> Memory:
    """Of the whole tree."""
    return sum((memory_of(pid) for pid in tree(roots)), Memory(0, 0))


def kernel_memory() -> int:
    """Bytes of the whole machine's kernel objects and socket buffers: only differences mean something."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    names = ("Slab", "KernelStack", "PageTables", "Percpu")
    total = sum(int(fields[name].split()[0]) * KIB for name in names)
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        words = line.split()
        if "mem" in words:
            total += int(words[words.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def bound(pid: int, protocol: str) -> set[int]:
    """The ports that anything listens on, in the network namespace of `pid`."""
    ports = set()
    for name in (protocol, f"{protocol}6"):
        try:
            lines = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split(maxsplit=4)
            if protocol == "udp" or words[3] == "0A":
                ports.add(int(words[1].rpartition(":")[2], 16))
    return ports


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (number 3 in proc(5) is 0 here)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
