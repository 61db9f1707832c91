"""Measures what the death of a worker costs its clients: SIGKILL under load, and SIGSTOP.

    .venv/bin/python scripts/kills.py [-n KILLS] [-s STOPS]

An ambassador on this machine relays PORTS TCP and PORTS UDP ports to servers in this process; no Engine is
needed. Clients of every port talk all the time and check every byte. Each conversation tells its length
first, so that an end that looks clean and comes too early is found, at either side. Workers are killed one
after the other, each port's often enough apart that none counts as a crash loop.

It prints how long it took from the signal to the first answer of the next worker, and what must be zero:
refused connections, silently truncated or altered streams, connections cut without a kill, descriptors
that the parent or the nursery kept, processes left over, ports without their one worker.

Invariants: only processes started here are signalled, each by its number; nothing is left running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import psutil

REPO = Path(__file__).resolve().parent.parent
PORTS = 12  # of each protocol; with KILL_EVERY_S a port's worker lives for over 10 s
KILL_EVERY_S = 0.45
GIVE_UP_S = 15.0
VISIT_EVERY_S = 0.05
VISIT_BYTES = 4_000
STREAM_BYTES = 4 << 20
PIECE_BYTES = 1 << 16
PIECE_EVERY_S = 0.05  # pauses, so that the ambassador is what dies and not this machine
DATAGRAM_EVERY_S = 0.05

_HEAD = struct.Struct("!II")  # seed, bytes each way
_BLOCK = random.Random(1).randbytes(1 << 20) * 2  # noqa: S311 - not for secrets


def content(seed: int, start: int, count: int) -> bytes:
    """What a conversation says from `start` on, `count` bytes (a piece at most)."""
    at = (seed * 7919 + start) % (1 << 20)
    return _BLOCK[at : at + count]


@dataclass
class Tally:
    """What happened, on both sides of the ambassador."""

    outcomes: Counter[str] = field(default_factory=Counter)
    signalled: dict[int, list[float]] = field(default_factory=dict)
    """By port, when its worker was killed or stopped."""

    def cut(self, port: int, begun: float) -> None:
        """A conversation ended in a reset: right where its worker was killed meanwhile, and only there."""
        killed = any(at >= begun for at in self.signalled.get(port, ()))
        self.outcomes["cut by a kill" if killed else "cut without a kill"] += 1


class Altered(Exception):
    """Bytes that nobody sent."""


async def receive(reader: asyncio.StreamReader, seed: int, count: int) -> bool:
    """Read to the end of the stream: whether all of it came."""
    got = 0
    while data := await reader.read(PIECE_BYTES):
        if data != content(seed, got, len(data)):
            raise Altered
        got += len(data)
    return got == count


async def send(writer: asyncio.StreamWriter, seed: int, count: int) -> None:
    for start in range(0, count, PIECE_BYTES):
        writer.write(content(seed, start, min(PIECE_BYTES, count - start)))
        await writer.drain()
        if count > PIECE_BYTES:
            await asyncio.sleep(PIECE_EVERY_S)
    writer.write_eof()


async def both_ways(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seed: int, count: int
) -> bool:
    sending = asyncio.create_task(send(writer, seed, count))
    try:
        complete = await receive(reader, seed, count)
        await sending
        return complete
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


class TcpServer:
    """Says what it hears, as it hears how much of what that will be."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            try:
                seed, count = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                if not await both_ways(reader, writer, seed, count):
                    self.tally.outcomes["truncated, at the server"] += 1
            except asyncio.IncompleteReadError:
                self.tally.outcomes["truncated, at the server"] += 1
            except Altered:
                self.tally.outcomes["altered, at the server"] += 1
            except ConnectionError:
                pass  # the client's side counts it


_seeds = itertools.count(1)


async def converse(tally: Tally, port: int, count: int) -> bool:
    """One conversation; whether it went well."""
    begun, seed = time.monotonic(), next(_seeds)
    try:
        async with asyncio.timeout(GIVE_UP_S + count / PIECE_BYTES * PIECE_EVERY_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(_HEAD.pack(seed, count))
                if await both_ways(reader, writer, seed, count):
                    tally.outcomes["complete"] += 1
                    return True
                tally.outcomes["truncated, at the client"] += 1
    except TimeoutError:
        tally.outcomes["timed out"] += 1
    except ConnectionRefusedError:
        tally.outcomes["refused"] += 1
    except ConnectionError:
        tally.cut(port, begun)
    except Altered:
        tally.outcomes["altered, at the client"] += 1
    return False


async def visit(tally: Tally, port: int, count: int, every_s: float, stop: asyncio.Event) -> None:
    """Conversations until `stop`, which lets the last one finish."""
    while not stop.is_set():
        await converse(tally, port, count)
        await asyncio.sleep(every_s)


class UdpServer(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.transport.sendto(data, address)


class UdpClient(asyncio.DatagramProtocol):
    """Sends numbered datagrams and knows which were answered, and when the newest answered one left."""

    def __init__(self, tally: Tally, seed: int) -> None:
        self.tally, self.seed, self.number = tally, seed, 0
        self.waiting: dict[int, float] = {}
        self.answered_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def ask(self) -> None:
        self.number += 1
        self.waiting[self.number] = time.monotonic()
        size = 20 + self.number % 1000
        self.transport.sendto(_HEAD.pack(self.seed, self.number) + content(self.number, 0, size))
        self.tally.outcomes["datagrams sent"] += 1

    def datagram_received(self, data: bytes, _: tuple[str, int]) -> None:
        seed, number = _HEAD.unpack_from(data)
        asked = self.waiting.pop(number, None)
        wanted = content(number, 0, 20 + number % 1000)
        if seed != self.seed or asked is None or data[_HEAD.size :] != wanted:
            self.tally.outcomes["datagrams altered, duplicated or of somebody else"] += 1
            return
        self.tally.outcomes["datagrams answered"] += 1
        self.answered_since = max(self.answered_since, asked)

    async def talk(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self.ask()
            await asyncio.sleep(DATAGRAM_EVERY_S)

    async def first_answer(self, since: float) -> None:
        """Until a datagram that was sent after `since` has been answered."""
        while self.answered_since < since:
            self.ask()
            await asyncio.sleep(0.005)


class Ambassador:
    """`grand-ambassador relay`, its processes, and everybody who ever was one."""

    def __init__(self, routes: Iterable[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.parent = psutil.Popen(
                [sys.executable, "-m", "ambassador", "relay", *routes], cwd=REPO, stderr=stderr
            )
        self.seen: set[psutil.Process] = set()
        self.doubles = 0

    def workers(self) -> dict[str, psutil.Process]:
        """By listener; where one has two, that is counted."""
        found: dict[str, psutil.Process] = {}
        for process in self.parent.children(recursive=True):
            self.seen.add(process)
            with contextlib.suppress(psutil.Error, IndexError):  # a zombie has no title
                words = process.cmdline()[0].split()
                if "/" in words[1]:
                    if words[1] in found and found[words[1]].is_running():
                        self.doubles += 1
                    found[words[1]] = process
        return found

    def descriptors(self) -> int:
        """Of the parent and the nursery."""
        (nursery,) = self.parent.children()
        return self.parent.num_fds() + nursery.num_fds()

    def said(self, words: str) -> int:
        return self.log.read_text().count(words)

    def stop(self) -> list[psutil.Process]:
        """End it; who of it is left."""
        self.workers()
        self.parent.terminate()
        self.parent.wait(GIVE_UP_S)
        time.sleep(1)
        return [process for process in self.seen if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    """Zombies do not: whoever inherited them may take its time."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@dataclass
class Stage:
    """The ambassador between its clients and servers."""

    tally: Tally
    ambassador: Ambassador
    ports: list[tuple[str, int]]
    udp: dict[int, UdpClient] = field(default_factory=dict)
    turns: Iterator[tuple[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.turns = itertools.cycle(self.ports)

    async def until_complete(self) -> None:
        deadline = time.monotonic() + GIVE_UP_S
        while len(self.ambassador.workers()) < len(self.ports):
            if time.monotonic() > deadline:
                raise SystemExit(f"not all workers run: {self.ambassador.log.read_text()}")
            await asyncio.sleep(0.1)

    async def strike(self, protocol: str, port: int, number: signal.Signals) -> float:
        """Signal the worker of a port: seconds until its successor has answered."""
        (victim,) = (
            p for name, p in self.ambassador.workers().items() if name == f"{port}/{protocol}"
        )
        begin = time.monotonic()
        self.tally.signalled.setdefault(port, []).append(begin)
        victim.send_signal(number)
        if protocol == "udp":
            async with asyncio.timeout(GIVE_UP_S):
                await self.udp[port].first_answer(time.monotonic())
        else:
            while not await converse(self.tally, port, VISIT_BYTES):  # the dying one may take it
                pass
        self.tally.signalled[port].append(time.monotonic())
        return time.monotonic() - begin

    async def strikes(
        self, count: int, number: signal.Signals, every_s: float
    ) -> dict[str, list[float]]:
        took: dict[str, list[float]] = {"tcp": [], "udp": []}
        due = time.monotonic()
        for turn, (protocol, port) in zip(range(count), self.turns, strict=False):
            due = max(due, time.monotonic() - every_s) + every_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            took[protocol].append(await self.strike(protocol, port, number))
            print(f"\r  {number.name} {turn + 1}/{count} ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return took


def free_ports(count: int) -> list[int]:
    """Below the range of connecting sockets, so that nobody is given one meanwhile."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 30_000), 200):
        with (
            contextlib.suppress(OSError),
            socket.socket() as tcp,
            socket.socket(type=socket.SOCK_DGRAM) as udp,
        ):
            tcp.bind(("", port))
            udp.bind(("", port))
            found.append(port)
            if len(found) == count:
                return found
    raise SystemExit("no free ports")


async def measure(kills: int, stops: int, log: Path) -> bool:
    loop, tally = asyncio.get_running_loop(), Tally()
    server = await asyncio.start_server(TcpServer(tally).answer, "127.0.0.1", 0)
    echo, _ = await loop.create_datagram_endpoint(UdpServer, local_addr=("127.0.0.1", 0))
    to = {
        "tcp": server.sockets[0].getsockname()[1],
        "udp": echo.get_extra_info("sockname")[1],
    }
    ports = list(zip(itertools.cycle(("tcp", "udp")), free_ports(2 * PORTS), strict=False))
    routes = [f"{port}/{protocol}=127.0.0.1:{to[protocol]}" for protocol, port in ports]
    stage = Stage(tally, Ambassador(routes, log), ports)
    try:
        await stage.until_complete()
        await asyncio.sleep(1)
        before = stage.ambassador.descriptors()
        clients, stop = [], asyncio.Event()
        for seed, (protocol, port) in enumerate(ports):
            if protocol == "udp":
                _, client = await loop.create_datagram_endpoint(
                    partial(UdpClient, tally, seed), remote_addr=("127.0.0.1", port)
                )
                stage.udp[port] = client
                clients.append(asyncio.create_task(client.talk(stop)))
            else:
                clients.append(
                    asyncio.create_task(visit(tally, port, VISIT_BYTES, VISIT_EVERY_S, stop))
                )
                clients.append(asyncio.create_task(visit(tally, port, STREAM_BYTES, 0, stop)))
        killed = await stage.strikes(kills, signal.SIGKILL, KILL_EVERY_S)
        stopped = await stage.strikes(stops, signal.SIGSTOP, 0.5)
        stop.set()
        await asyncio.gather(*clients)
        await asyncio.sleep(1)
        await stage.until_complete()
        kept = stage.ambassador.descriptors() - before
    finally:
        left = stage.ambassador.stop()
        for process in left:
            process.kill()
        server.close()
        echo.close()
        await asyncio.sleep(0.1)  # servers hear of the end
    ended = stage.ambassador.said("worker ended, replacing it")
    zeros = {
        "connections refused or timed out": tally.outcomes["refused"] + tally.outcomes["timed out"],
        "streams silently truncated": sum(
            count for what, count in tally.outcomes.items() if "truncated" in what
        ),
        "streams or datagrams altered": sum(
            count for what, count in tally.outcomes.items() if "altered" in what
        ),
        "connections cut without a kill": tally.outcomes["cut without a kill"],
        "descriptors that parent and nursery kept": kept,
        "processes left over": len(left),
        "deaths not in the log, or more than there were": ended - kills - stops,
        "ports with two workers": stage.ambassador.doubles,
        "ports called degraded": stage.ambassador.said("is degraded"),
    }
    report(killed, stopped, tally, zeros)
    return not any(zeros.values())


def report(
    killed: dict[str, list[float]],
    stopped: dict[str, list[float]],
    tally: Tally,
    zeros: dict[str, int],
) -> None:
    print("From the signal to the first answer of the next worker, ms:\n")
    print("| | times | p50 | p99 | slowest |\n|---|---|---|---|---|")
    for signal_name, took in (("SIGKILL", killed), ("SIGSTOP", stopped)):
        for protocol, seconds in took.items():
            if seconds:
                row = (statistics.median(seconds), quantile(seconds, 0.99), max(seconds))
                cells = " | ".join(f"{1000 * value:.0f}" for value in row)
                print(f"| {signal_name}, {protocol.upper()} | {len(seconds)} | {cells} |")
    print("\n| what must not happen | times |\n|---|---|")
    for what, count in zeros.items():
        print(f"| {what} | {count} |")
    done = tally.outcomes
    print(
        f"\nMeanwhile {done['complete']} TCP conversations were complete, checked byte by byte, and "
        f"{done['cut by a kill']} were reset with their worker; of {done['datagrams sent']} datagrams "
        f"{done['datagrams answered']} were answered (the others were in a worker that died, or found no "
        f"room in the socket's queue while one was stopped)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", "--kills", type=int, default=200)
    parser.add_argument("-s", "--stops", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        held = asyncio.run(measure(options.kills, options.stops, Path(folder, "log")))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
