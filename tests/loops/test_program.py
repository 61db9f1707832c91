"""The whole program, `grand-ambassador relay`, under conditions that no worker alone can meet.

Fault rows P4, P5, P6, U12, S5.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.support.endpoints import Peers, port_of, read_exactly, read_to_end, read_to_reset
from tests.support.net import free_port, linked
from tests.support.processes import Process, descendants, workers_of
from tests.support.program import Program, Run
from tests.support.wait import TIMEOUT_S, wait_until

HERE = "127.0.0.1"
DAY_S = 86_400
TIME_WAIT = "06"


@pytest.fixture
def run() -> Iterator[Run]:
    with contextlib.ExitStack() as programs:

        def run_one(
            *routes: str, env: dict[str, str] | None = None, before: Sequence[str] = ()
        ) -> Program:
            program = Program("relay", *routes, env=env, before=before)
            programs.callback(program.stop)
            for route in routes:
                if "/" in route:
                    port, protocol = route.partition("=")[0].split("/")
                    program.wait_for_line(f'msg="?listening"? port={port} protocol={protocol}')
            return program

        yield run_one


def workers(program: int, port: int) -> list[Process]:
    return workers_of(program, f"{port}/tcp") + workers_of(program, f"{port}/udp")


def connect(port: int) -> socket.socket:
    return socket.create_connection((HERE, port), TIMEOUT_S)


# ------------------------------------------------------------------------------------------------ P4


def states_of(port: int) -> set[str]:
    """Of the TCP sockets that have this port here."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return {words[3] for words in lines if words[1].endswith(f":{port:04X}")}


def test_restart_under_time_wait(run: Run, peers: Peers) -> None:
    """P4: the port is had at once while connections of the former run are in TIME_WAIT."""
    server = peers.server()
    route = f"{free_port()}/tcp={HERE}:{port_of(server)}"
    port = int(route.partition("/")[0])
    former = run(route)
    with connect(port) as client:
        backend = peers.accept(server)
        backend.sendall(b"bye")
        backend.close()  # the relay's end is the first on the client's connection
        assert read_to_end(client) == b"bye"
    wait_until(lambda: TIME_WAIT in states_of(port), "no TIME_WAIT on the port")
    former.process.kill()
    former.process.wait()
    wait_until(lambda: "0A" not in states_of(port), "it listens on")
    assert TIME_WAIT in states_of(port)
    again = run(route)
    assert not [line for line in again.lines if "cannot listen" in line]
    with connect(port), peers.accept(server):
        pass


# ------------------------------------------------------------------------------------------------ P5

SHELL = {
    "closed": 'exec "$@" 2>&-',
    "broken": 'exec "$@"',
    "full": 'exec "$@"',
}


@pytest.mark.parametrize("fault", SHELL)
def test_standard_error(peers: Peers, fault: str) -> None:
    """P5: standard error closed, its reader gone, or full: relaying, replacing and ending go on."""
    server = peers.server()
    port = free_port()
    reading, writing = os.pipe()
    if fault == "full":
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
    command = [sys.executable, "-m", "ambassador", "relay", "-log-level=debug"]
    program = subprocess.Popen(
        ["sh", "-c", SHELL[fault], "sh", *command, f"{port}/tcp={HERE}:{port_of(server)}"],
        stderr=writing,
    )
    os.close(writing)
    if fault == "broken":
        os.close(reading)
    try:
        wait_until(lambda: "0A" in states_of(port), "it does not listen")
        for _ in range(3):  # each death is a line
            with connect(port) as client:
                client.sendall(b"x")
                assert read_exactly(peers.accept(server), 1) == b"x"
                (worker,) = workers(program.pid, port)
                os.kill(worker.pid, signal.SIGKILL)
                with contextlib.suppress(ConnectionError):
                    client.recv(1)
            wait_until(
                lambda old=worker.pid: [w for w in workers(program.pid, port) if w.pid != old],  # type: ignore[misc]
                "no other worker",
            )
        program.terminate()
        assert program.wait(5) == 0
    finally:
        program.kill()
        program.wait()
        if fault != "broken":
            os.close(reading)


# ------------------------------------------------------------------------------------------------ P6

SHIM = r"""
// Shifts the wall clock of one process and its children, as a jump of the machine's would.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long *shift;

__attribute__((constructor)) static void map(void) {
    int fd = open(getenv("CLOCK_SHIFT"), O_RDONLY);
    shift = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += *shift;
    return result;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
"""


class WallClock:
    """The wall clock of programs that run with `env`; the machine's own is never touched."""

    def __init__(self, folder: Path) -> None:
        source, library, self._shift = folder / "shim.c", folder / "shim.so", folder / "shift"
        source.write_text(SHIM)
        self.jump(0)
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
        self.env = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(self._shift)}

    def jump(self, seconds: int) -> None:
        with self._shift.open("r+b" if self._shift.exists() else "wb") as file:
            file.write(struct.pack("@l", seconds))


def day_of(line: str) -> int:
    """Of the month, as a log line says."""
    found = re.search(r'time="\d{4}-\d\d-(\d\d)T', line)
    assert found, line
    return int(found[1])


@pytest.mark.native  # its shim and the sanitizers both want to be preloaded
@pytest.mark.parametrize("days", [1, -1])
def test_clock_jumps(run: Run, peers: Peers, tmp_path: Path, days: int) -> None:
    """P6: connections, sessions and every time limit go on as if nothing had happened."""
    clock = WallClock(tmp_path)
    server, datagrams, refusing = peers.server(), peers.udp(), peers.bound()
    tcp, udp, dead = free_port(), free_port(), free_port()
    program = run(
        "-hold=1s",
        f"{tcp}/tcp={HERE}:{port_of(server)}",
        f"{udp}/udp={HERE}:{port_of(datagrams)}",
        f"{dead}/tcp={HERE}:{port_of(refusing)}",
        env=clock.env,
    )
    first_line = len(program.lines)
    with connect(tcp) as client, connect(dead) as held, peers.udp() as caller:
        backend = peers.accept(server)
        caller.sendto(b"before", (HERE, udp))
        data, session = datagrams.recvfrom(100)
        assert data == b"before"
        begin = time.monotonic()
        clock.jump(days * DAY_S)

        client.sendall(b"still")
        assert read_exactly(backend, 5) == b"still"
        caller.sendto(b"after", (HERE, udp))
        assert datagrams.recvfrom(100) == (b"after", session), "the session was ended"
        assert read_to_reset(held) == b""
        assert 0.7 < time.monotonic() - begin < 3, "the hold window is one second"
        with connect(dead) as later:  # whose whole window is after the jump
            begin = time.monotonic()
            assert read_to_reset(later) == b""
            assert 0.7 < time.monotonic() - begin < 3

        program.wait_for_line("connections rejected, backend refused", since=first_line)
        (worker,) = workers(program.pid, dead)
        os.kill(worker.pid, signal.SIGKILL)
        line = program.wait_for_line("worker exited, restarting", since=first_line)
        today = time.gmtime(time.time()).tm_mday
        assert day_of(line) != today, "the shim does not work"
        wait_until(
            lambda: [w for w in workers(program.pid, dead) if w.pid != worker.pid],
            "no other worker",
        )
        client.sendall(b"still")
        assert read_exactly(backend, 5) == b"still"
    begin = time.monotonic()
    assert program.stop() == 0
    assert time.monotonic() - begin < 2


# ----------------------------------------------------------------------------------------------- U12


def test_two_that_point_at_each_other(run: Run) -> None:
    """U12: one connection and one datagram go round: bounded, and the processor comes to rest."""
    a, b, c, d = free_port(), free_port(), free_port(), free_port()
    with linked() as namespace:
        # A small house for both: its own ports, and a limit on descriptors.
        house = ["ip", "netns", "exec", namespace.name, "prlimit", "--nofile=600:600"]
        one = run(f"{a}/tcp={HERE}:{b}", f"{c}/udp={HERE}:{d}", before=house)
        two = run(f"{b}/tcp={HERE}:{a}", f"{d}/udp={HERE}:{c}", before=house)
        with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.sendto(b"round and round", (HERE, c))
        with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.connect((HERE, a))
            client.sendall(b"and round")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            wait_until(
                lambda: any("over -max-connections" in line for line in one.lines + two.lines),
                "nobody says so",
            )
            everybody = [p.pid for program in (one, two) for p in descendants(program.pid)]
            wait_until(lambda: at_rest(everybody), "they never come to rest")
            for pid in everybody:
                assert len(os.listdir(f"/proc/{pid}/fd")) < 100, "the whole chain has ended"  # noqa: PTH208
        assert two.stop() == 0
        assert one.stop() == 0
        said = [line for line in one.lines + two.lines if "forwarding loop" in line]
        assert len(said) == 1, "of the one datagram"


def at_rest(pids: list[int]) -> bool:
    def used() -> float:
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)

    before = used()
    time.sleep(1)
    return used() - before < 0.1


# ------------------------------------------------------------------------------------------------ S5


def test_nothing_else_listens(run: Run, peers: Peers) -> None:
    """S5: of all processes of a running ambassador only the ports that were asked for are open."""
    server = peers.server()
    tcp, udp = free_port(), free_port()
    program = run(f"{tcp}/tcp={HERE}:{port_of(server)}", f"{udp}/udp={HERE}:9")
    open_ports = set()
    for pid in [program.pid, *(p.pid for p in descendants(program.pid))]:
        for entry in psutil.Process(pid).net_connections("all"):
            if entry.family == socket.AF_UNIX:
                assert not entry.laddr, "a Unix socket that has a name"
            else:
                open_ports.add((entry.type, entry.laddr.port))
    assert open_ports == {(socket.SOCK_STREAM, tcp), (socket.SOCK_DGRAM, udp)}


# ------------------------------------------------------------------------------------------------ R1, R6

FEW_PROCESSES = (
    "setpriv", "--reuid", "61234", "--regid", "61234", "--clear-groups",
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    *("--bounding-set=-all,+dac_read_search", "prlimit"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (
            (*FEW_PROCESSES, "--nproc=1"),
            "allow 7, and one more for each port (--pids-limit, ulimit -u)",
        ),
        (
            (*FEW_PROCESSES, "--nproc=2"),
            "allow 7, and one more for each port (--pids-limit, ulimit -u)",
        ),
        (("prlimit", "--nofile=5"), "too few descriptors, raise ulimit -n to 64 or more"),
        (("prlimit", "--nofile=7"), "too few descriptors, raise ulimit -n to 64 or more"),
    ],
)
def test_too_little_to_start(before: Sequence[str], words: str) -> None:
    """R6: one line that says what to do, and exit code 1."""
    program = Program("relay", f"{free_port()}/tcp={HERE}:9", before=before)
    assert program.process.wait(TIMEOUT_S) == 1
    (line,) = program.lines
    assert line.startswith("grand-ambassador: cannot start: ")
    assert words in line


@pytest.mark.parametrize("limit", [10, 12, 16, 64, 256])
def test_more_ports_than_descriptors(limit: int) -> None:
    """R1: what fits is relayed, one line says what is left out, and nothing ends."""
    first = free_port()
    routes = [f"{first + n}/tcp={HERE}:9" for n in range(120)]
    program = Program("relay", *routes, before=("prlimit", f"--nofile={limit}"))
    try:
        program.wait_for_line("ports .* left out, .* raise ulimit -n")
        fits = max((limit - 16 - limit // 8) // 5, 1)
        if limit > 12:
            # Another test may have one of the ports.
            wait_until(lambda: max(fits - 3, 1) <= len(program.workers()) <= fits)
            connect(first).close()
            assert not program.said("cannot start a worker")
        else:
            program.wait_for_line("cannot start a worker, trying again.*raise the limits")
        assert program.said("left out") == 1
        assert "Traceback" not in program.text
    finally:
        program.close()
