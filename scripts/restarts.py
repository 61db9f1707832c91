"""Measures what a restart of the target costs its clients, on a real Engine.

    .venv/bin/python scripts/restarts.py [-n RESTARTS] [-m MOVES]
    .venv/bin/python scripts/restarts.py --count 1000 --check-leaks

Two figures, each from redis behind an ambassador on the host:

- from the target's `State.StartedAt` to the first reply through the ambassador, over RESTARTS restarts,
  with where the time goes (one connection is always waiting);
- over MOVES restarts that change the target's address, a client that connects every 10 ms: connects that
  were refused or timed out (a lie to the client), and, apart, conversations that were cut because the
  target itself died in the middle of them (no relay can help those).

With --count only so many restarts, one after the other, as fast as Docker does them; --check-leaks then
compares what the ambassador holds with what it held after the first ten, and fails where that has grown.

Invariants: nothing is left running, and the Engine is asked only about containers made here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Address
from pathlib import Path

import engine
import images
import psutil

REPO = engine.REPO
PORT = 6379
INTERVAL_S = 0.010
GIVE_UP_S = 10.0
PREFIX = f"ga-restarts-{os.getpid()}"


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def started_at(name: str) -> float:
    """The target's State.StartedAt, seconds since the epoch."""
    text = docker("inspect", "-f", "{{.State.StartedAt}}", name)
    text = re.sub(r"(\.\d{6})\d*Z$", r"\1+00:00", text)  # nanoseconds, which datetime does not read
    return datetime.fromisoformat(text).timestamp()


@dataclass
class Ambassador:
    """An ambassador on the host, and when it said what."""

    process: asyncio.subprocess.Process
    said: list[tuple[float, str]] = field(default_factory=list)

    @classmethod
    async def start(cls, target: str) -> Ambassador:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ambassador", "-sock", os.environ["DOCKER_HOST"], "-name", target,
            cwd=REPO, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        made = cls(process)
        made.reading = asyncio.create_task(made._read())
        return made

    reading: asyncio.Task[None] = field(init=False)

    async def _read(self) -> None:
        stderr = self.process.stderr or asyncio.StreamReader()
        async for line in stderr:
            self.said.append((time.time(), line.decode()))

    def first(self, words: str, since: float) -> float | None:
        """When it first said `words` after `since`."""
        return next((at for at, line in self.said if at >= since and words in line), None)

    async def stop(self) -> None:
        self.process.terminate()
        await self.process.wait()


@dataclass
class Tally:
    """What happened to a client's connections."""

    outcomes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    replies: list[tuple[float, float]] = field(default_factory=list)
    """(when the connection was begun, when its reply came), seconds since the epoch."""


async def converse(tally: Tally) -> None:
    """One conversation: connect, PING, PONG."""
    begun = time.time()
    try:
        async with asyncio.timeout(GIVE_UP_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.write(b"PING\r\n")
            reply = await reader.readline()
        writer.close()
        if reply == b"+PONG\r\n":
            tally.outcomes["answered"] += 1
            tally.replies.append((begun, time.time()))
        elif (
            not reply
        ):  # redis had read the question: its kernel's end is a clean one, and is passed on
            tally.outcomes["cut"] += 1
        else:
            tally.outcomes[f"answered with {reply!r}"] += 1
    except TimeoutError:
        tally.outcomes["timed out"] += 1
    except ConnectionRefusedError:
        tally.outcomes["refused"] += 1
    except ConnectionError:  # a reset: the handshake was done, whether asyncio has noticed or not
        tally.outcomes["cut"] += 1
    tally.longest_s = max(tally.longest_s, time.time() - begun)


async def keep_connecting(tally: Tally, stop: asyncio.Event) -> None:
    """A new conversation every 10 ms, whatever becomes of the earlier ones."""
    running: set[asyncio.Task[None]] = set()
    due = time.monotonic()
    while not stop.is_set():
        task = asyncio.create_task(converse(tally))
        running.add(task)
        task.add_done_callback(running.discard)
        due += INTERVAL_S
        await asyncio.sleep(max(due - time.monotonic(), 0))
    if running:
        await asyncio.wait(running)


async def wait_until_served() -> None:
    for _ in range(200):
        probe = Tally()
        await converse(probe)
        if probe.outcomes["answered"]:
            return
        await asyncio.sleep(0.05)
    raise SystemExit("redis does not answer through the ambassador")


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def latency(target: str, ambassador: Ambassador, restarts: int) -> None:
    """The first figure."""
    to_repoint, to_reply = [], []
    for number in range(restarts):
        tally, stop = Tally(), asyncio.Event()
        client = asyncio.create_task(keep_connecting(tally, stop))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(docker, "restart", "-t", "0", target)
        started = started_at(target)
        await asyncio.sleep(0.5)
        stop.set()
        await client
        first = min(reply for _, reply in tally.replies if reply >= started)
        repointed = ambassador.first('msg="repointed"', started)
        to_reply.append((first - started) * 1000)
        to_repoint.append(((repointed or first) - started) * 1000)
        print(f"\r  restart {number + 1}/{restarts}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rest = [reply - repoint for reply, repoint in zip(to_reply, to_repoint, strict=True)]
    print(f"From StartedAt, ms, over {restarts} restarts:\n")
    print("| until | p50 | p99 | fastest | slowest |\n|---|---|---|---|---|")
    for name, values in (
        ("the ambassador says `repointed`", to_repoint),
        ("the first reply to a client", to_reply),
        ("from the one to the other (redis begins to listen, the probe finds it)", rest),
    ):
        print(
            f"| {name} | {statistics.median(values):.0f} | {quantile(values, 0.99):.0f} "
            f"| {min(values):.0f} | {max(values):.0f} |"
        )


def address(name: str) -> str:
    return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)


def squatter() -> str:
    """Starts a container that only has an address; its name."""
    name = f"{PREFIX}-squatter-{time.monotonic_ns()}"
    docker("run", "-d", "--name", name, images.DEMO, "sleep", "1000")
    return name


def take_lower_addresses(than: str) -> None:
    """Docker gives out the lowest free address: with all below `than` taken, that one is next once freed."""
    while IPv4Address(address(squatter())) < IPv4Address(than):
        pass


async def moves(target: str, count: int) -> None:
    """The second figure."""
    tally, stop = Tally(), asyncio.Event()
    client = asyncio.create_task(keep_connecting(tally, stop))
    changed = taken = 0
    for number in range(count):
        before = address(target)
        await asyncio.to_thread(take_lower_addresses, before)
        await asyncio.to_thread(docker, "stop", "-t", "0", target)
        stranger = await asyncio.to_thread(squatter)
        taken += address(stranger) == before
        await asyncio.to_thread(docker, "start", target)
        changed += before != address(target)
        await asyncio.sleep(0.3)
        print(f"\r  move {number + 1}/{count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    stop.set()
    await client
    outcomes = tally.outcomes
    failed = {what: n for what, n in outcomes.items() if what not in ("answered", "cut")}
    print(
        f"\nA client that connects every 10 ms through {count} restarts; {changed} times redis came"
        f" back with another address, {taken} times a stranger had the old one:\n"
    )
    print("| connections | answered | refused, timed out or otherwise failed | cut | longest |")
    print("|---|---|---|---|---|")
    print(
        f"| {outcomes.total()} | {outcomes['answered']} | {failed or 0} | {outcomes['cut']} "
        f"| {tally.longest_s * 1000:.0f} ms |"
    )


@dataclass(frozen=True)
class Holdings:
    """What an ambassador has of everything that could leak."""

    processes: int
    threads: int
    descriptors: int
    memory: int
    """Private to its processes, bytes."""

    @classmethod
    def of(cls, pid: int) -> Holdings:
        parent = psutil.Process(pid)
        everybody = [parent, *parent.children(recursive=True)]
        return cls(
            len(everybody),
            sum(process.num_threads() for process in everybody),
            sum(process.num_fds() for process in everybody),
            sum(process.memory_full_info().uss for process in everybody),
        )

    def outgrows(self, other: Holdings) -> bool:
        """Beyond two more connections in the pool to Docker, and 5 % of memory."""
        return (
            self.processes > other.processes
            or self.threads > other.threads
            or self.descriptors > other.descriptors + 2
            or self.memory > 1.05 * other.memory
        )


async def endure(target: str, ambassador: Ambassador, count: int, *, check_leaks: bool) -> None:
    """So many restarts; the end of the program (SystemExit) where one is not followed, or something leaks."""
    warm, began = None, time.monotonic()
    for number in range(count):
        await asyncio.to_thread(docker, "restart", "-t", "0", target)
        await wait_until_served()
        if number == min(9, count - 1):
            await asyncio.sleep(1)  # until those that were held have gone
            warm = Holdings.of(ambassador.process.pid)
        print(f"\r  restart {number + 1}/{count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    await asyncio.sleep(1)
    now = Holdings.of(ambassador.process.pid)
    backend = f"{address(target)}:{PORT}"
    titles = [
        child.cmdline() for child in psutil.Process(ambassador.process.pid).children(recursive=True)
    ]
    if not any(backend in title for words in titles for title in words):
        raise SystemExit(f"no worker leads to {backend}, as inspect says")
    print(
        f"{count} restarts in {time.monotonic() - began:.0f} s; the last at {backend}, as inspect says\n"
    )
    print("| | processes | threads | descriptors | private memory |\n|---|---|---|---|---|")
    for when, holdings in (("after ten", warm or now), ("at the end", now)):
        print(
            f"| {when} | {holdings.processes} | {holdings.threads} | {holdings.descriptors} "
            f"| {holdings.memory / 1e6:.1f} MB |"
        )
    if check_leaks and warm is not None and now.outgrows(warm):
        raise SystemExit("something leaks")


async def measure(options: argparse.Namespace) -> None:
    target = f"{PREFIX}-redis"
    redis = ("redis-server", "--protected-mode", "no", "--save", "")
    docker("run", "-d", "--name", target, "--expose", str(PORT), f"{images.DEMO}:redis", *redis)
    ambassador = await Ambassador.start(target)
    try:
        await wait_until_served()
        if options.count:
            await endure(target, ambassador, options.count, check_leaks=options.check_leaks)
            return
        await latency(target, ambassador, options.restarts)
        await moves(target, options.moves)
    finally:
        await ambassador.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", "--restarts", type=int, default=50)
    parser.add_argument("-m", "--moves", type=int, default=20)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--check-leaks", action="store_true")
    options = parser.parse_args()
    out = subprocess.run(
        [sys.executable, str(Path(engine.__file__)), "up"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.environ["DOCKER_HOST"] = out.stdout.strip().rpartition("DOCKER_HOST=")[2]
    subprocess.run([sys.executable, str(Path(images.__file__)), "demo"], check=True)
    try:
        asyncio.run(measure(options))
    finally:
        ours = docker("ps", "-aq", "--filter", f"name={PREFIX}").split()
        if ours:
            docker("rm", "-f", *ours)


if __name__ == "__main__":
    main()
