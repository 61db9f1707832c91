"""The two ends around an ambassador: servers in containers, clients in the test's own process.

Clients connect from this machine straight to a container's address, so the Engine must run on it.
"""

from __future__ import annotations

import shlex
import socket
import struct
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Self

from tests.docker.engine import DEMO, Box, HostAmbassador, Stage, wait_for

PATIENCE_S = 15.0
"""For what is expected to happen; the machine may be busy."""

PORT = 7000
_SERVER = (Path(__file__).parent / "server.py").read_text()


# Servers


def server_command(name: str, ports: Sequence[str]) -> list[str]:
    return ["python3", "-c", _SERVER, name, *ports]


def run_server(
    stage: Stage, short: str, *ports: str, flags: str | Sequence[str] = (), wait: bool = True
) -> Box:
    """A container with tests/docker/server.py that says `short`; it listens when this returns."""
    box = create_server(stage, short, *ports, flags=flags)
    box.start()
    if wait:
        listening_since(box)
    return box


def create_server(
    stage: Stage, short: str, *ports: str, flags: str | Sequence[str] = (), says: str = ""
) -> Box:
    """The same, not started."""
    words = shlex.split(flags) if isinstance(flags, str) else flags
    return stage.create(
        short,
        DEMO,
        *server_command(says or short, ports),
        flags=[*(f"--expose={port}" for port in ports), *words],
    )


def finished_at(box: Box) -> float:
    """When the container's last run ended."""
    return datetime.fromisoformat(box.inspect()["State"]["FinishedAt"]).timestamp()


def listening_since(box: Box, run: int = 1) -> float:
    """When the server's n-th run began to listen, by its own clock. Waits until it does.

    A run is known by its line: Docker may stamp a run's start after the server has begun to listen.
    """

    def find() -> float | None:
        lines = [line.split() for line in box.logs().splitlines() if line.startswith("listening ")]
        return float(lines[run - 1][1]) if len(lines) >= run else None

    return wait_for(f"{box.name} to listen in its run {run}", find, PATIENCE_S)


def visitors(box: Box) -> list[str]:
    """The connections and datagrams that a server got."""
    return [line for line in box.logs().splitlines() if line.startswith(("connection", "datagram"))]


# TCP clients


class Conversation:
    """A TCP connection; a context manager that closes it."""

    def __init__(self, host: str, port: int = PORT, timeout: float = PATIENCE_S) -> None:
        self.socket = socket.create_connection((host, port), timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            data = self.socket.recv(count - len(got))
            assert data, f"the end after {len(got)} of {count} bytes"
            got += data
        return bytes(got)

    def greeting(self) -> tuple[str, str]:
        """What the server says first: its name, and the address that it was reached at."""
        line = bytearray()
        while not line.endswith(b"\n"):
            line += self.read(1)
        name, _, address = line.decode().strip().partition(" ")
        return name, address

    def ask(self, data: bytes) -> bytes:
        """Send, and read as much of the echo."""
        self.send(data)
        return self.read(len(data))

    def ending(self, timeout: float = PATIENCE_S) -> str:
        """`reset` or `end`, after whatever comes before it. TimeoutError where it goes on."""
        deadline = time.monotonic() + timeout
        while True:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                if not self.socket.recv(1 << 16):
                    return "end"
            except ConnectionResetError:
                return "reset"

    def is_held(self, seconds: float) -> bool:
        """Whether it stays open for so long without a word, no end and no reset."""
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        except ConnectionResetError:
            return False
        finally:
            self.socket.settimeout(PATIENCE_S)
        return False


def greet(host: str, port: int = PORT) -> str:
    """Connect once; the name of the server that answers."""
    with Conversation(host, port) as conversation:
        return conversation.greeting()[0]


def is_greeted_by(name: str, host: str, port: int = PORT) -> bool:
    """Whether that server answers now. While another is being left, a reset is no answer."""
    try:
        return greet(host, port) == name
    except ConnectionError:
        return False


def accepts(host: str, port: int = PORT) -> bool:
    """Whether a connection is taken, held or not; False where it is refused."""
    try:
        Conversation(host, port).socket.close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True


def wait_until_accepts(host: str, port: int = PORT) -> None:
    wait_for(f"a listener on {host}:{port}", lambda: accepts(host, port), PATIENCE_S)


def wait_until_refuses(host: str, port: int = PORT) -> None:
    wait_for(f"no listener on {host}:{port}", lambda: not accepts(host, port), PATIENCE_S)


def fixed_network(stage: Stage, short: str) -> str:
    """A network in which a container may be given an address of the test's choice."""
    name = stage.network(short)  # Docker chooses a range that is free, but then allows no --ip
    (config,) = stage.engine.client.networks.get(name).attrs["IPAM"]["Config"]
    stage.docker("network", "rm", name)
    return stage.network(short, f"--subnet={config['Subnet']}")


def run_ambassador(
    stage: Stage,
    *args: str,
    port: int = PORT,
    short: str = "ambassador",
    network: str | None = None,
    flags: str | Sequence[str] = (),
) -> tuple[Box, str]:
    """An ambassador in a container, and its address once it takes connections on the port."""
    words = shlex.split(flags) if isinstance(flags, str) else list(flags)
    if network is not None:
        words += [f"--network={network}"]
    ambassador = stage.run_ambassador(*args, short=short, flags=words)
    address = wait_for("an address of the ambassador", lambda: ambassador.address(network))
    try:
        wait_until_accepts(address, port)
    except AssertionError as error:
        raise AssertionError(f"{error}; the ambassador said:\n{ambassador.logs()}") from None
    return ambassador, address


def free_port() -> int:
    """A port of this machine that nobody has, neither for TCP nor for UDP."""
    while True:
        with (
            socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp,
        ):
            tcp.bind(("::", 0))
            port = int(tcp.getsockname()[1])
            try:
                udp.bind(("::", port))
            except OSError:
                continue
            return port


def lines_with(ambassador: Box | HostAmbassador, *words: str) -> list[str]:
    """Its log lines that contain all of the words."""
    lines = ambassador.logs().splitlines() if isinstance(ambassador, Box) else ambassador.lines
    return [line for line in lines if all(word in line for word in words)]


# UDP clients


class Answer(NamedTuple):
    data: bytes
    source: str
    """The address that it came from."""


class Caller:
    """One UDP socket, kept open and unconnected: it sees where answers come from."""

    def __init__(self, host: str, port: int = PORT) -> None:
        self.host, self.port = host, port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendto(data, (self.host, self.port))

    def receive(self, timeout: float) -> Answer | None:
        """The next datagram from anywhere, or None where none comes in time."""
        self.socket.settimeout(max(timeout, 0.001))
        try:
            data, source = self.socket.recvfrom(1 << 16)
        except TimeoutError:
            return None
        return Answer(data, source[0])

    def ask(self, data: bytes, timeout: float = 1.0) -> Answer | None:
        """Send, and wait for the answer to it: late ones to earlier questions are passed over."""
        self.send(data)
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            answer = self.receive(left)
            if answer is not None and answer.data.endswith(data):
                return answer
        return None


# DNS


def dns_query(name: str, ident: int = 7) -> bytes:
    """A question for the A records of a name."""
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!6H", ident, 0x0100, 1, 0, 0, 0) + question + b"\0\0\1\0\1"


def dns_answer(reply: bytes) -> str:
    """The address in the last record of an answer."""
    answers = struct.unpack("!H", reply[6:8])[0]
    assert answers == 1, reply
    return socket.inet_ntoa(reply[-4:])
