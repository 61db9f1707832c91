"""What the death of a worker costs its clients: SIGKILL under load, now and then SIGSTOP."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak import clients, samples
from tests.soak.clients import FATAL, NAME, Asker, Tally
from tests.soak.report import milliseconds, say, table
from tests.support.engine import wait_until_accepts
from tests.support.net import free_port
from tests.support.processes import descendants, is_gone
from tests.support.program import Program
from tests.support.wait import wait_until

SERVER = Path(__file__).with_name("server.py")
PORTS = 12  # of each protocol: with KILL_EVERY_S the worker of a port lives for over 10 s
KILL_EVERY_S = 0.45
STOP_EACH = 21
GIVE_UP_S = 15.0


Port = tuple[int, str]


@pytest.fixture
def server() -> Iterator[int]:
    """A server on this machine, TCP and UDP: its port. It fails the test if an upload was cut."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(SERVER), NAME.decode(), str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until_accepts("127.0.0.1", port)
        yield port
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=10)
    assert "truncated" not in said


def test_kills(server: int, minutes: float) -> None:
    """W1, W2: another worker answers soon, and a clean end is the whole truth."""
    ports = [(free_port(), protocol) for _ in range(PORTS) for protocol in ("tcp", "udp")]
    routes = [f"{port}/{protocol}=127.0.0.1:{server}" for port, protocol in ports]
    ambassador = Program("relay", *routes)
    try:
        wait_until(lambda: len(ambassador.workers()) == len(ports), "a worker is missing")
        time.sleep(1)
        before = samples.look(ambassador.pid)
        tallies, took = asyncio.run(_kill_under_load(ambassador, ports, minutes))
        wait_until(lambda: len(ambassador.workers()) == len(ports), "a worker is missing")
        after = samples.look(ambassador.pid)
    finally:
        processes = descendants(ambassador.pid)
        ambassador.stop()
    wait_until(lambda: all(map(is_gone, processes)), "a process runs on")

    names = ((number.name, protocol.upper()) for number, protocol in took)
    rows = (
        (", ".join(name), *milliseconds(seconds))
        for name, seconds in zip(names, took.values(), strict=True)
    )
    title = "From the signal to the first answer of the next worker, ms"
    table(title, ("signal", "times", "p50", "p99", "slowest"), *rows)
    counts = sum((tally.counts for tally in tallies), Counter[str]())
    shown = ("connections", "complete", "reset", "datagrams sent", "datagrams answered", *FATAL)
    table(
        "Clients of these workers meanwhile",
        ("what", "times"),
        *((what, counts[what]) for what in shown),
    )
    findings = [finding for tally in tallies for finding in tally.findings]
    assert not findings
    for (number, protocol), seconds in took.items():
        assert number != signal.SIGKILL or statistics.median(seconds) < 1, protocol
    assert not [line for line in ambassador.lines if "degraded" in line]
    for kind in ("parent", "fork server"):
        assert after[kind].descriptors <= before[kind].descriptors, kind


async def _kill_under_load(
    ambassador: Program, ports: list[Port], minutes: float
) -> tuple[list[Tally], dict[tuple[signal.Signals, str], list[float]]]:
    stop, dice = asyncio.Event(), random.Random(1)
    short = lambda: (4_000, 1_000, 0.02)  # noqa: E731
    # With pauses: the worker is to die, not the machine.
    stream = lambda: (4 << 20, 1 << 16, 0.05)  # noqa: E731
    tallies = {name: Tally() for name in ports}
    tasks = []
    for (port, protocol), tally in tallies.items():
        if protocol == "udp":
            tasks.append(clients.keep_asking(port, tally, stop, dice))
        else:
            tasks.append(clients.keep_conversing(port, tally, stop, short))
            tasks.append(clients.keep_conversing(port, tally, stop, stream))
    running = asyncio.gather(*tasks)
    signals = (signal.SIGKILL, signal.SIGSTOP)
    took = {(number, protocol): list[float]() for number in signals for protocol in ("tcp", "udp")}
    due, end = time.monotonic() + 1, time.monotonic() + 60 * minutes
    for turn, (port, protocol) in zip(itertools.count(1), itertools.cycle(ports), strict=False):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if time.monotonic() > end or running.done():
            break
        due = time.monotonic() + KILL_EVERY_S
        number = signals[turn % STOP_EACH == 0]
        seconds = await _strike(ambassador, port, protocol, number, tallies[port, protocol])
        took[number, protocol].append(seconds)
        if turn % 20 == 0:
            say(f"{turn} workers killed or stopped")
    stop.set()
    await running
    return list(tallies.values()), took


async def _strike(
    ambassador: Program, port: int, protocol: str, number: signal.Signals, tally: Tally
) -> float:
    """Signal the worker of a port; return the seconds until its successor has answered."""
    (victim,) = ambassador.workers(f"{port}/{protocol}")
    begin = time.monotonic()
    window = [begin, math.inf]
    tally.disturbances.append(window)
    os.kill(victim, number)
    async with asyncio.timeout(GIVE_UP_S):
        await (_first_datagram(port) if protocol == "udp" else _first_conversation(port))
    window[1] = time.monotonic()
    return window[1] - begin


async def _first_conversation(port: int) -> None:
    while True:
        try:
            return await clients.converse(port, b"hello", Tally(), 1000, 0)
        except ConnectionError:  # the dying worker had taken it
            pass


async def _first_datagram(port: int) -> None:
    tally = Tally()
    transport, asker = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Asker(tally), remote_addr=("127.0.0.1", port)
    )
    while not asker.done:
        question = random.randbytes(16)
        asker.open.add(question)
        transport.sendto(question)
        await asyncio.sleep(0.005)
    transport.close()
