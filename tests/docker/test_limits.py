"""Little memory, few processes, low ports, strange names, and a target that never stops restarting.

Fault rows C13, I2, I3, R3, R5, S6.
"""

from __future__ import annotations

import re
import stat
import time
from pathlib import Path

import psutil
import pytest

from tests.support.endpoints import PORT, Caller, Conversation, greet, is_greeted_by
from tests.support.engine import Stage, lines_with, run_ambassador, run_server, wait_until_accepts
from tests.support.net import free_port
from tests.support.processes import descendants, workers_of
from tests.support.wait import wait_until

HERE = "127.0.0.1"
TCP = f"{PORT}/tcp"


def needs(stage: Stage, limit: str) -> None:
    if not stage.engine.client.info()[limit]:
        pytest.skip(f"this Engine has no {limit}: no such controller in its cgroups")


# --- R3 ------------------------------------------------------------------------------------------


def test_memory_limit(stage: Stage) -> None:
    """R3: in 64 MB it serves a thousand connections and sessions, and nothing of it is killed."""
    needs(stage, "MemoryLimit")
    db = run_server(stage, "db", TCP, f"{PORT}/udp")
    ambassador, host = run_ambassador(
        stage, "-name", db.name, flags="--memory=64m --memory-swap=64m"
    )
    wait_until(lambda: Caller(host).ask(b"x"), "an answer")
    conversations = [Conversation(host) for _ in range(500)]
    callers = [Caller(host) for _ in range(500)]
    for conversation in conversations:
        assert conversation.greeting()[0] == "db"
    for caller in callers:
        caller.send(b"hello")
    for conversation in conversations:
        assert conversation.ask(b"hello") == b"hello"
    for sock in [*(c.socket for c in conversations), *(c.socket for c in callers)]:
        sock.close()
    assert greet(host) == "db"
    assert not ambassador.inspect()["State"]["OOMKilled"]
    assert lines_with(ambassador, "worker exited") == []


def test_pids_limit(stage: Stage) -> None:
    """R3: a worker that cannot be forked is said, and is tried again until there is room."""
    needs(stage, "PidsLimit")
    ports = [7000, 7001, 7002, 7003, 7004, 7005]
    db = run_server(stage, "db", *(f"{port}/tcp" for port in ports))
    # The parent's threads count as well.
    ambassador = stage.run_ambassador("-name", db.name, flags="--pids-limit=9")
    ambassador.wait_for_log("could not be forked: Resource temporarily unavailable")
    assert ambassador.is_running()
    host = ambassador.address()

    def served() -> int:
        return len(re.findall("-> ", str(ambassador.container.top(ps_args="-efww")["Processes"])))

    wait_until(served, "a worker's title")
    assert served() < len(ports)
    stage.docker("update", "--pids-limit=100", ambassador.name)
    for port in ports:
        wait_until(lambda port=port: is_greeted_by("db", host, port), "an answer")  # type: ignore[misc]


# --- R5 ------------------------------------------------------------------------------------------


def test_privileged_port(stage: Stage) -> None:
    """R5: not root, and the kernel wants a capability: it says which, and the other ports are served."""
    socket = Path(stage.engine.socket).stat()
    if not socket.st_mode & stat.S_IWGRP:
        pytest.skip(f"{stage.engine.socket} is not open to its group")
    db = run_server(stage, "db", TCP, "53/tcp", "53/udp")
    flags = f"--user=65534:65534 --group-add={socket.st_gid}"
    ambassador, host = run_ambassador(
        stage, "-name", db.name, flags=f"{flags} --sysctl=net.ipv4.ip_unprivileged_port_start=1024"
    )
    for kind in ("TCP", "UDP"):
        ambassador.wait_for_log(
            f"cannot listen.*{kind} ports below 1024 need the capability NET_BIND_SERVICE"
            ".*--cap-add NET_BIND_SERVICE.*--sysctl"
        )
    assert greet(host) == "db"


# --- I2, I3, S6 ----------------------------------------------------------------------------------

STRANGE = [
    "two\nlines level=error",
    "\x1b[31mred\x1b[0m",
    "naïve-☃",
    "\u202egnp.exe",
    "../json?x=1#y",
    "a" * 5_000,
    "%n%s%x",
    '"quoted" \\ name',
]


def test_strange_names(stage: Stage) -> None:
    """I2, I3, S6: names that nothing has: waited for, each one line, with nothing in it that acts."""
    port = free_port()
    db = run_server(stage, "db", f"{port}/tcp")
    names = [word for name in STRANGE for word in ("-name", name)]
    ambassador = stage.run_ambassador_on_host(*names, "-name", db.name)
    wait_until_accepts(HERE, port)
    assert greet(HERE, port) == "db", "the others do not hinder it"

    def waiting() -> list[str]:
        return [line for line in ambassador.lines if "no such container, waiting" in line]

    wait_until(lambda: len(waiting()) >= len(STRANGE), "a line for each")
    assert len(waiting()) == len(STRANGE)
    for line in ambassador.lines:
        assert line.startswith('time="'), line
        assert line.isprintable(), line
    for process in (psutil.Process(ambassador.pid), *map_processes(ambassador.pid)):
        assert "".join(process.cmdline()).isprintable()


def map_processes(root: int) -> list[psutil.Process]:
    return [psutil.Process(process.pid) for process in descendants(root)]


# --- C13 -----------------------------------------------------------------------------------------


def test_many_restarts(stage: Stage) -> None:
    """C13: 6 in a row: the address is the newest after each, and nothing leaks. (More: tests/soak.)"""
    restart_often(stage, 6)


def restart_often(stage: Stage, count: int) -> None:
    port = free_port()
    db = run_server(stage, "db", f"{port}/tcp", f"{port}/udp")
    ambassador = stage.run_ambassador_on_host("-name", db.name)
    wait_until_accepts(HERE, port)

    def holds() -> tuple[int, int, int]:
        """Processes, threads, descriptors."""
        everybody = [psutil.Process(ambassador.pid), *map_processes(ambassador.pid)]
        threads = sum(process.num_threads() for process in everybody)
        return len(everybody), threads, sum(process.num_fds() for process in everybody)

    def restart() -> None:
        db.restart(0)
        with Conversation(HERE, port) as conversation:
            assert conversation.greeting() == ("db", db.address())

    for _ in range(2):  # until caches and pools are warm
        restart()
    workers = [process.pid for process in workers_of(ambassador.pid)]
    wait_until(lambda: at_rest(ambassador.pid), "rest")
    before = holds()
    memory = psutil.Process(ambassador.pid).memory_full_info().uss
    for _ in range(count):
        restart()
    wait_until(lambda: at_rest(ambassador.pid), "rest")
    print("processes, threads, descriptors:", before, holds())
    processes, threads, descriptors = holds()
    assert (processes, threads) == before[:2]
    assert descriptors <= before[2] + 2, "more than another connection to Docker"
    assert [process.pid for process in workers_of(ambassador.pid)] == workers
    assert psutil.Process(ambassador.pid).memory_full_info().uss - memory < 3 << 20
    (title,) = [p.title for p in workers_of(ambassador.pid) if f"{port}/tcp" in p.title]
    assert f"-> {db.address()}:{port}" in title


def at_rest(pid: int) -> bool:
    before = psutil.Process(pid).cpu_times().user
    time.sleep(0.3)
    return psutil.Process(pid).cpu_times().user - before < 0.05
