"""The client of the demo and of tests: talks to one address for as long as its standard input is open.

    python3 demo_client.py redis HOST PORT INTERVAL      a new TCP connection each time, PING, PONG
    python3 demo_client.py dns HOST PORT INTERVAL NAME   one UDP socket kept open, one query each time

It runs inside a container, from `python3 -c`: this one file, standard library only. It prints one JSON
line when the first answer has come, `{"ready": true}`, and one at the end: a list of samples, each
[begin, seconds, outcome] with `begin` on the wall clock, and for dns `port`, its own, which shows that
it kept its socket.

Outcomes: `ok`; `refused` and `timeout`, of a connect; `cut`, a conversation that ended in the middle;
`lost`, a datagram without an answer; `wrong`, an answer that is not one.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time

CONNECT_LIMIT_S = 15.0
ANSWER_LIMIT_S = 5.0

Sample = tuple[float, float, str]


async def ask_redis(host: str, port: int) -> str:
    """One conversation from connect to PONG; its outcome."""
    try:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(host, port), CONNECT_LIMIT_S
        )
    except TimeoutError:
        return "timeout"
    except OSError:
        return "refused"
    try:
        writer.write(b"PING\r\n")
        answer = await asyncio.wait_for(reader.readline(), CONNECT_LIMIT_S)
    except TimeoutError:
        return "timeout"
    except OSError:
        return "cut"
    finally:
        writer.close()
    if not answer:
        return "cut"
    return "ok" if answer == b"+PONG\r\n" else "wrong"


class DnsClient(asyncio.DatagramProtocol):
    """One socket, and the queries on it that have no answer yet."""

    def __init__(self, name: str) -> None:
        self._labels = b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\0"
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self.transport: asyncio.DatagramTransport | None = None
        self.refusals = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)  # noqa: S101  (what asyncio gives)
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:  # noqa: ARG002
        number = int.from_bytes(data[:2], "big")
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(data)

    def error_received(self, exc: Exception) -> None:  # noqa: ARG002
        self.refusals += 1  # an ICMP error: the port was closed when the last query came

    async def ask(self) -> str:
        """One query and its answer; its outcome."""
        self._next = (self._next + 1) % 65536
        number = self._next
        # Header: recursion desired, one question; then type A, class IN.
        query = struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + self._labels
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        refusals = self.refusals
        assert self.transport is not None  # noqa: S101  (made before the first query)
        self.transport.sendto(query + struct.pack("!HH", 1, 1))
        try:
            answer = await asyncio.wait_for(waiting, ANSWER_LIMIT_S)
        except TimeoutError:
            return "refused" if self.refusals > refusals else "lost"
        finally:
            self._waiting.pop(number, None)
        answers = int.from_bytes(answer[6:8], "big")
        return "ok" if answers == 1 else "wrong"


async def run(kind: str, host: str, port: int, interval: float, name: str) -> None:
    """Ask at a steady pace, whether earlier questions were answered or not, until stdin ends."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    dns: DnsClient | None = None
    if kind == "dns":
        _, dns = await loop.create_datagram_endpoint(
            lambda: DnsClient(name), remote_addr=(host, port)
        )
    samples: list[Sample] = []

    async def ask() -> None:
        wall, begin = time.time(), time.monotonic()
        outcome = await (dns.ask() if dns else ask_redis(host, port))
        samples.append((wall, time.monotonic() - begin, outcome))
        if len(samples) == 1:
            print(json.dumps({"ready": True}), flush=True)

    asked = set()
    due = time.monotonic()
    while not over.is_set():
        asked.add(asyncio.create_task(ask()))
        due += interval
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    await asyncio.gather(*asked)
    own = dns.transport.get_extra_info("sockname")[1] if dns and dns.transport else 0
    print(json.dumps({"port": own, "samples": sorted(samples)}), flush=True)


if __name__ == "__main__":
    asyncio.run(
        run(
            sys.argv[1],
            sys.argv[2],
            int(sys.argv[3]),
            float(sys.argv[4]),
            sys.argv[5] if len(sys.argv) > 5 else "",
        )
    )
