"""A client that asks one address at a steady pace for as long as its standard input is open.

    python3 demo_client.py redis HOST PORT INTERVAL       a new TCP connection each time: PING, PONG
    python3 demo_client.py dns HOST PORT INTERVAL NAME    one query each time, always from one socket

It runs in a container of the demo, from `python3 -c`: one file, standard library only. It prints one
line of JSON after the first answer, and one at the end: the port of its socket (dns), and a sample
for each question, [begin on the wall clock, seconds, outcome].

Outcomes: ok; refused, for a connect that failed; timeout; cut, for a conversation that ended too
early; lost, for a query without an answer; wrong.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time

REDIS_LIMIT_S = 15.0
DNS_LIMIT_S = 5.0


async def ask_redis(host: str, port: int) -> str:
    """Hold one conversation; return its outcome."""
    try:
        async with asyncio.timeout(REDIS_LIMIT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"PING\r\n")
                answer = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        return "timeout"
    except (ConnectionResetError, BrokenPipeError):
        return "cut"  # maybe before asyncio knew that it was connected
    except OSError:
        return "refused"
    return {b"+PONG\r\n": "ok", b"": "cut"}.get(answer, "wrong")


class Dns(asyncio.DatagramProtocol):
    """One socket, and the queries on it that have no answer yet."""

    def __init__(self, name: str) -> None:
        labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        self._question = labels + b"\0" + struct.pack("!HH", 1, 1)  # type A, class IN
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:  # noqa: ARG002
        waiting = self._waiting.pop(int.from_bytes(data[:2], "big"), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(data)

    async def ask(self) -> str:
        """Send one query; return its outcome."""
        self._number = number = (self._number + 1) % 65536
        self._waiting[number] = waiting = asyncio.get_running_loop().create_future()
        # Recursion desired, one question.
        header = struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0)
        self._transport.sendto(header + self._question)  # type: ignore[attr-defined]
        try:
            async with asyncio.timeout(DNS_LIMIT_S):
                answer = await waiting
        except TimeoutError:
            return "lost"
        finally:
            self._waiting.pop(number, None)
        return "ok" if int.from_bytes(answer[6:8], "big") == 1 else "wrong"


async def run(kind: str, host: str, port: int, interval_s: float, name: str = "") -> None:
    """Ask until standard input ends, whether earlier questions were answered or not."""
    loop, over, own_port = asyncio.get_running_loop(), asyncio.Event(), 0
    loop.add_reader(sys.stdin.fileno(), over.set)
    samples: list[tuple[float, float, str]] = []
    if kind == "dns":
        transport, dns = await loop.create_datagram_endpoint(
            lambda: Dns(name), remote_addr=(host, port)
        )
        own_port = transport.get_extra_info("sockname")[1]

    async def ask() -> None:
        wall, begin = time.time(), time.monotonic()
        outcome = await (dns.ask() if kind == "dns" else ask_redis(host, port))
        samples.append((wall, time.monotonic() - begin, outcome))
        if len(samples) == 1:
            print(json.dumps({"ready": True}), flush=True)

    asked, due = set(), time.monotonic()
    while not over.is_set():
        task = asyncio.create_task(ask())
        asked.add(task)
        task.add_done_callback(asked.discard)
        due += interval_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    await asyncio.gather(*asked)
    print(json.dumps({"port": own_port, "samples": sorted(samples)}), flush=True)


if __name__ == "__main__":
    _, KIND, HOST, PORT, INTERVAL_S, *NAME = sys.argv
    asyncio.run(run(KIND, HOST, int(PORT), float(INTERVAL_S), *NAME))
