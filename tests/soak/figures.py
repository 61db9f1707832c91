"""`python -m tests.soak.figures [--idle-minutes M]`: how many at once, how many in a row, what is left after.

Three figures of a relay to an echo server on this machine: 9,000 idle connections held while others work,
10,000 UDP sessions, and 100,000 connections one after another. Every byte is compared; exit code 1 where
one is missing or wrong, or where something is left.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from bench.measure import cpu_seconds
from tests.soak import samples
from tests.soak.samples import KINDS, Sample
from tests.support.endpoints import Server, accepts
from tests.support.net import free_port
from tests.support.program import REPO
from tests.support.wait import wait_until

IDLE = 9_000
SESSIONS = 10_000
ROW = 100_000
BURST = 64
HERE = "127.0.0.1"


class Wrong(Exception):
    """A figure cannot be had because something was lost, altered or left."""


@contextlib.contextmanager
def relay(kind: socket.SocketKind) -> Iterator[tuple[int, int]]:
    """An echo server behind an ambassador: (its port, the ambassador's process)."""
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    server = socket.socket(socket.AF_INET, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    server.bind((HERE, 0))
    if kind == socket.SOCK_STREAM:
        server.listen(4096)
    port = free_port()
    route = f"{port}/{protocol}={HERE}:{server.getsockname()[1]}"
    with server, Server(server):
        process = subprocess.Popen(
            [sys.executable, "-m", "ambassador", "relay", "-log-level", "warn", route], cwd=REPO
        )
        try:
            if kind == socket.SOCK_STREAM:
                wait_until(lambda: accepts(HERE, port), "a listener")
            else:
                time.sleep(1)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(10)


def ask(sock: socket.socket, word: bytes) -> None:
    sock.sendall(word)
    got = b""
    while len(got) < len(word):
        more = sock.recv(len(word) - len(got))
        if not more:
            raise Wrong(f"the end after {got!r}")
        got += more
    if got != word:
        raise Wrong(f"{got!r} for {word!r}")


def connect(port: int) -> socket.socket:
    return socket.create_connection((HERE, port), 30)


def idle(minutes: float) -> list[str]:
    """Open many, let them be while others come and go, and ask each of them again."""
    with relay(socket.SOCK_STREAM) as (port, pid), contextlib.ExitStack() as stack:
        before = samples.look(pid, 0)
        held = [stack.enter_context(connect(port)) for _ in range(IDLE)]
        for number, sock in enumerate(held):
            ask(sock, b"%06d" % number)
        opened, work, begun = samples.look(pid, 0), cpu_seconds([pid]), time.monotonic()
        times: list[float] = []
        while time.monotonic() - begun < 60 * minutes:
            at = time.monotonic()
            try:
                with connect(port) as sock:
                    ask(sock, b"hello")
            except OSError as error:
                raise Wrong(f"one of the others, after {len(times):,}: {error}") from error
            times.append(time.monotonic() - at)
            time.sleep(0.01)
        seconds, used = time.monotonic() - begun, cpu_seconds([pid]) - work
        for number, sock in enumerate(held):
            ask(sock, b"%06d" % (IDLE - number))
        stack.close()
        after = at_rest(pid, before)
        each = (opened.values["workers PSS"] - before.values["workers PSS"]) / IDLE
        times.sort()
        return [
            f"| {IDLE:,} idle connections | held {seconds:.0f} s, every one answered before and after |",
            f"| their memory in the worker | {each:.0f} bytes each |",
            f"| others meanwhile | {len(times):,} connections, connect to echo p50"
            f" {statistics.median(times) * 1000:.2f} ms,"
            f" p99 {times[int(0.99 * len(times))] * 1000:.2f} ms |",
            f"| processor time of the ambassador meanwhile | {100 * used / seconds:.2f} % of a core |",
            *left("after they closed", before, after),
        ]


def sessions() -> list[str]:
    """So many UDP clients, each with a socket of its own, each asked twice."""
    with relay(socket.SOCK_DGRAM) as (port, pid), contextlib.ExitStack() as stack:
        before = samples.look(pid, 0)
        clients = []
        for _ in range(SESSIONS):
            client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            client.connect((HERE, port))
            client.settimeout(5)
            clients.append(client)
        begun = time.monotonic()
        for turn in (b"first", b"second"):
            for at in range(0, SESSIONS, BURST):
                some = list(enumerate(clients[at : at + BURST], at))
                for number, client in some:
                    client.send(turn + b" %06d" % number)
                for number, client in some:
                    if client.recv(100) != turn + b" %06d" % number:
                        raise Wrong(f"another's answer for client {number}")
        seconds, full = time.monotonic() - begun, samples.look(pid, 0)
        open_now = full.values["workers descriptors"] - before.values["workers descriptors"]
        if open_now != SESSIONS:
            raise Wrong(f"{open_now} sockets for {SESSIONS} sessions")
        each = (full.values["workers PSS"] - before.values["workers PSS"]) / SESSIONS
        return [
            f"| {SESSIONS:,} UDP sessions at once | {2 * SESSIONS:,} datagrams, all answered, none to"
            f" another client, {seconds:.1f} s |",
            f"| their memory in the worker | {each:.0f} bytes each |",
        ]


def row() -> list[str]:
    """One connection after another."""
    with relay(socket.SOCK_STREAM) as (port, pid):
        begun = time.monotonic()
        early = before = samples.look(pid, 0)
        for number in range(ROW):
            with connect(port) as sock:
                ask(sock, b"%06d" % number)
            if number == ROW // 10:
                early = samples.look(pid, 0)
        seconds = time.monotonic() - begun
        after = at_rest(pid, before)
        grown = {k: after.values[f"{k} PSS"] - early.values[f"{k} PSS"] for k in KINDS}
        return [
            f"| {ROW:,} connections in a row | all answered, {seconds:.0f} s |",
            f"| memory, from the {ROW // 10:,}th to the last |"
            f" {', '.join(f'{kind} {size / 1000:+.0f} kB' for kind, size in grown.items())} |",
            *left("after the last", before, after),
        ]


def at_rest(pid: int, before: Sample) -> Sample:
    """When the workers' descriptors are what they were, or after 10 s."""
    key = "workers descriptors"
    with contextlib.suppress(AssertionError):
        wait_until(
            lambda: samples.look(pid, 0).values[key] <= before.values[key], "rest", poll_s=0.2
        )
    return samples.look(pid, 0)


def left(when: str, before: Sample, after: Sample) -> list[str]:
    more = {
        kind: after.values[f"{kind} descriptors"] - before.values[f"{kind} descriptors"]
        for kind in KINDS
    }
    if any(count > 0 for count in more.values()):
        raise Wrong(f"descriptors left {when}: {more}")
    return [f"| descriptors more than before, {when} | {max(more.values())} |"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.figures")
    parser.add_argument("--idle-minutes", type=float, default=10)
    options = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    failed = False
    print("| what | value |\n|---|---|", flush=True)
    for figure in (row, sessions, lambda: idle(options.idle_minutes)):
        try:
            print(*figure(), sep="\n", flush=True)
        except (Wrong, OSError, AssertionError) as error:
            failed = True
            print(f"| FAILED | {type(error).__name__}: {error} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
