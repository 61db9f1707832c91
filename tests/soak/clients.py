"""The soak's clients. They check every byte and keep count; what they see decides the run.

A TCP conversation sends bytes of its own and reads its echo. It ends cleanly with all of them, or in a
reset; anything else is a finding. A UDP client knows what it has asked and takes nothing else for an
answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

GIVE_UP_S = 30.0
NAME = b"db"
FATAL = (
    "refused", "truncated", "strangers", "altered", "stuck", "unexplained resets",
    "datagrams of strangers", "datagrams altered", "datagrams twice",
)  # fmt: skip
"""What must be zero."""


@dataclass
class Tally:
    """What has happened. `disturbances` are the times (monotonic, seconds) in which a reset is meant."""

    counts: Counter[str] = field(default_factory=Counter)
    disturbances: list[list[float]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    answered_at: float = 0.0
    """The last time a conversation got its greeting."""

    def find(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        if len(self.findings) < 50:
            self.findings.append(f"{kind}: {text}")

    def disturbed(self, begin: float, end: float) -> bool:
        return any(first <= end and begin <= last for first, last in self.disturbances)


class Finding(Exception):
    """What a client must never see: (kind, what it saw)."""


async def converse(port: int, data: bytes, tally: Tally, piece: int, pause: float) -> None:
    """Hold one conversation; raises ConnectionError for a reset, Finding for what must not be."""
    loop = asyncio.get_running_loop()
    data = struct.pack("!Q", len(data)) + data  # so that the server knows its end
    with socket.socket() as sock:
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
        except ConnectionRefusedError as error:
            raise Finding("refused", repr(error)) from None

        broken: list[ConnectionError] = []

        async def send() -> None:
            try:
                for at in range(0, len(data), piece):
                    await loop.sock_sendall(sock, data[at : at + piece])
                    if pause:
                        await asyncio.sleep(pause)
                sock.shutdown(socket.SHUT_WR)
            except ConnectionError as error:
                broken.append(error)

        sending = asyncio.create_task(send())
        try:
            await _read_echo(sock, data, tally)
        except Finding as finding:
            # The kernel tells of a reset once. Where it told the sender, whose task may not have
            # heard yet, the reader sees an end.
            await asyncio.sleep(0.01)
            if broken:
                raise broken[0] from None
            kind, text = finding.args
            sent = "all was sent" if sending.done() else "sending went on"
            raise Finding(kind, f"{text}, {sent}, {_tcp_state(sock)}") from None
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending


def _tcp_state(sock: socket.socket) -> str:
    """Of the kernel: after a reset it is 7 (closed), after an end that came first 8 (close-wait)."""
    return f"TCP state {sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]}"


async def _read_echo(sock: socket.socket, data: bytes, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    expected = memoryview(NAME + b"\n" + data)
    got = 0
    while more := await loop.sock_recv(sock, 1 << 16):
        if not got:
            tally.answered_at = time.monotonic()
        greeting = more[: max(0, len(NAME) + 1 - got)]
        if greeting != expected[got : got + len(greeting)]:
            raise Finding("strangers", repr(more[:40]))
        if more != expected[got : got + len(more)]:
            raise Finding("altered", f"after {got} of {len(expected)} bytes")
        got += len(more)
        tally.counts["bytes"] += len(more)
    if got != len(expected):
        raise Finding("truncated", f"a clean end after {got} of {len(expected)} bytes")


async def keep_conversing(
    port: int, tally: Tally, stop: asyncio.Event, make: Callable[[], tuple[int, int, float]]
) -> None:
    """One conversation after another. `make` gives its bytes, a piece's size and the pause after it."""
    while not stop.is_set():
        size, piece, pause = make()
        begin = time.monotonic()
        tally.counts["connections"] += 1
        try:
            limit = GIVE_UP_S + size / piece * pause * 1.5
            async with asyncio.timeout(limit):
                await converse(port, random.randbytes(size), tally, piece, pause)
            tally.counts["complete"] += 1
        except Finding as finding:
            kind, text = finding.args
            tally.find(kind, text)
        except TimeoutError:
            tally.find("stuck", f"a conversation of {size} bytes, {limit:.0f} s")
        except ConnectionError:
            tally.counts["reset"] += 1
            if not tally.disturbed(begin, time.monotonic()):
                tally.find(
                    "unexplained resets", f"{size} bytes, after {time.monotonic() - begin:.2f} s"
                )
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.01)


class Asker(asyncio.DatagramProtocol):
    """One UDP client: a socket that asks and remembers what."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.open: set[bytes] = set()
        self.done: set[bytes] = set()

    def datagram_received(self, data: bytes, _addr: object) -> None:
        name, _, question = data.partition(b" ")
        counts = self.tally.counts
        if name != NAME:
            self.tally.find("datagrams of strangers", repr(data[:40]))
        elif question in self.open:
            self.open.remove(question)
            self.done.add(question)
            counts["datagrams answered"] += 1
        elif question in self.done:
            self.tally.find("datagrams twice", repr(data[:40]))
        else:
            self.tally.find("datagrams altered", repr(data[:40]))

    def error_received(self, _exc: Exception) -> None:
        self.tally.counts["datagram errors"] += 1


async def keep_asking(port: int, tally: Tally, stop: asyncio.Event, dice: random.Random) -> None:
    """Datagrams of all sizes from one socket for 5 to 20 s, then from another."""
    loop = asyncio.get_running_loop()
    while not stop.is_set():
        transport, asker = await loop.create_datagram_endpoint(
            lambda: Asker(tally), remote_addr=("127.0.0.1", port)
        )
        end = time.monotonic() + dice.uniform(5, 20)
        while time.monotonic() < end and not stop.is_set():
            question = dice.randbytes(dice.choice((16, 64, 512, 1400, 9000)))
            asker.open.add(question)
            transport.sendto(question)
            tally.counts["datagrams sent"] += 1
            await asyncio.sleep(0.03)
        await asyncio.sleep(1.0)  # for answers on their way
        tally.counts["datagrams unanswered"] += len(asker.open)
        transport.close()


def start(port: int, tally: Tally, stop: asyncio.Event, seed: int) -> list[asyncio.Task[None]]:
    """Every client: short conversations, long ones that talk slowly, bulk, and UDP."""
    dice = random.Random(seed)
    short = lambda: (dice.randrange(0, 20_000), 8_000, 0.0)  # noqa: E731
    slow = lambda: (dice.randrange(20_000, 60_000), 1_000, 0.1)  # noqa: E731
    bulk = lambda: (dice.randrange(1 << 20, 16 << 20), 1 << 18, 0.02)  # noqa: E731
    makers = [short] * 12 + [slow] * 8 + [bulk] * 2
    tasks = [keep_conversing(port, tally, stop, make) for make in makers]
    tasks += [keep_asking(port, tally, stop, dice) for _ in range(8)]
    return [asyncio.create_task(task) for task in tasks]
