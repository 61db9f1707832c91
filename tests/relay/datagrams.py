"""Datagrams whose number and length are part of what they say, and runs of them (UDP_SEGMENT)."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterable, Sequence

from .peers import Peers, family_of

UDP_SEGMENT = 103
"""linux/udp.h; the socket module has no name for it."""

_FILLER = random.Random(8).randbytes(1 << 17)
_HEAD = struct.Struct("<IIH")
SMALLEST = _HEAD.size

Address = tuple[str, int]


def datagram(sender: int, number: int, size: int) -> bytes:
    """What nobody else sends: its bytes tell its sender, its number and its length."""
    head = _HEAD.pack(sender, number, size & 0xFFFF)
    start = (sender * 7919 + number * 104_729) % 1000
    return (head + _FILLER[start : start + size])[:size]


def number_of(data: bytes) -> tuple[int, int]:
    """Sender and number of a datagram, which must be unaltered."""
    sender, number, size = _HEAD.unpack_from(data)
    assert size == len(data) & 0xFFFF, f"{len(data)} bytes instead of {size}"
    assert data == datagram(sender, number, len(data)), "the bytes are altered"
    return sender, number


def send_run(sock: socket.socket, address: Address | None, run: Sequence[bytes]) -> None:
    """One message of equal datagrams, the last one maybe shorter, as one UDP_SEGMENT send."""
    size = len(run[0])
    assert all(len(data) == size for data in run[:-1])
    assert 0 < len(run[-1]) <= size
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
    sock.sendmsg(run, control if len(run) > 1 else [], 0, *([address] if address else []))


def receive(sock: socket.socket, count: int) -> list[bytes]:
    """The next so many datagrams."""
    got: list[bytes] = []
    while len(got) < count:
        try:
            got.append(sock.recv(1 << 17))
        except TimeoutError:
            raise AssertionError(f"only {len(got)} of {count} datagrams came") from None
    return got


def is_silent(sock: socket.socket, for_s: float = 0.1) -> bool:
    """Whether nothing is there, and nothing comes in this time."""
    timeout = sock.gettimeout()
    sock.settimeout(for_s)
    try:
        sock.recv(1 << 17)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(timeout)
    return False


def numbers(got: Iterable[bytes]) -> list[int]:
    return [number_of(data)[1] for data in got]


def talk(client: socket.socket, to: Address, server: socket.socket) -> Address:
    """A datagram there and one back: an established session. Its address as the server sees it."""
    client.sendto(b"ping", to)
    data, session = server.recvfrom(100)
    assert data == b"ping"
    server.sendto(b"pong", session)
    assert client.recv(100) == b"pong"
    host, port = session[:2]
    return host, port


def client_of(peers: Peers, address: str, to: Address) -> socket.socket:
    """A client whose socket is connected, so that it only takes what comes from there."""
    client = peers.udp("::" if family_of(address) == socket.AF_INET6 else "0.0.0.0")
    client.connect(to)
    return client
