"""Free ports, network namespaces with real links between them, and sockets that live in one."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_dice = random.SystemRandom()
_numbers = itertools.count(_dice.randrange(1, 60_000))

# Below the range that the kernel gives to connecting sockets, and elsewhere in every run.
_ports = itertools.count(_dice.randrange(20_000))
_FIRST_PORT, _PORTS = 12_000, 20_000


def free_port() -> int:
    """A port that nobody has at any address, neither for TCP nor for UDP. Never the same twice."""
    for number in _ports:
        port = _FIRST_PORT + number % _PORTS
        if is_free(port):
            return port
    raise AssertionError


def is_free(port: int) -> bool:
    """Whether somebody can listen there, over TCP and UDP. What is in TIME_WAIT does not listen."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET6, kind) as sock:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("::", port))
            except OSError:
                return False
    return True


def new_namespace() -> int:
    """A network namespace with nothing but a loopback interface, as a descriptor. Ours stays what it is."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if _libc.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        ip("link", "set", "lo", "up")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    finally:
        enter_namespace(here)
        os.close(here)


def enter_namespace(fd: int) -> None:
    """For this thread, and the threads and processes that it starts from now on."""
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def ip(*arguments: str) -> str:
    """Run ip(8); what it says on standard error is the failure. Its output."""
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


class Namespace:
    """A namespace that is linked to ours by a pair of virtual interfaces.

    `ours4` and `ours6` are addresses on this end of the link, `theirs4` and `theirs6` on the other.
    """

    def __init__(self, number: int, mtu: int) -> None:
        self.name = f"ga-{os.getpid()}-{number}"
        self.ours, self.theirs = f"gao{number}", f"gat{number}"
        # 198.18.0.0/15 is set aside for such tests (RFC 2544): nobody's real network.
        self.net4 = f"198.{18 + number // 256 % 2}.{number % 256}"
        self.net6 = f"fd6a:{number // 65536:x}:{number % 65536:x}:1:"
        self.ours4, self.theirs4 = f"{self.net4}.1", f"{self.net4}.2"
        self.ours6, self.theirs6 = f"{self.net6}:1", f"{self.net6}:2"
        self.mtu = mtu

    def make(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self.ours, "type", "veth", "peer", self.theirs, "netns", self.name)
        self._raise([], self.ours, self.ours4, self.ours6)
        self._raise(["-n", self.name], self.theirs, self.theirs4, self.theirs6)
        ip("-n", self.name, "link", "set", "lo", "up")

    def _raise(self, where: list[str], link: str, *addresses: str) -> None:
        ip(*where, "link", "set", link, "mtu", str(self.mtu), "up")
        for address in addresses:
            self._add(where, link, address)

    def _add(self, where: list[str], link: str, address: str) -> None:
        if ":" in address:  # nodad: usable at once, not after a second of looking for duplicates
            ip(*where, "address", "add", f"{address}/64", "dev", link, "nodad")
        else:
            ip(*where, "address", "add", f"{address}/24", "dev", link)

    def run(self, *command: str) -> str:
        """Run a command in there; its output."""
        return ip("netns", "exec", self.name, *command)

    def drop(self, *match: str) -> None:
        """From now on whatever comes or goes there vanishes, or what iptables(8) matches of it."""
        for chain in ("INPUT", "OUTPUT"):
            self.run("iptables", "-A", chain, *match, "-j", "DROP")

    def dropped(self) -> list[int]:
        """The packets that vanished: on their way in, and on their way out."""
        words = [self.run("iptables", "-L", c, "-vnx").split() for c in ("INPUT", "OUTPUT")]
        return [int(line[line.index("DROP") - 2]) for line in words]

    def restore(self) -> None:
        """Nothing vanishes any more."""
        self.run("iptables", "-F")

    def add_ours(self, address: str) -> str:
        """One more address on our end."""
        self._add([], self.ours, address)
        return address

    def remove(self) -> None:
        ip("netns", "delete", self.name)
        with contextlib.suppress(AssertionError):  # gone with its peer, usually
            ip("link", "delete", self.ours)

    def socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A socket in there: it belongs to the namespace of the thread that makes it."""

        def make() -> socket.socket:
            with Path("/run/netns", self.name).open() as namespace:
                enter_namespace(namespace.fileno())
            return socket.socket(family, kind)

        with ThreadPoolExecutor(1) as thread:  # which ends with its namespace
            return thread.submit(make).result()

    def black_hole4(self) -> str:
        return self._black_hole(f"{self.net4}.66")

    def black_hole6(self) -> str:
        return self._black_hole(f"{self.net6}:66")

    def _black_hole(self, address: str) -> str:
        """An address behind the link whose hardware address nobody has: packets just vanish."""
        neighbour = ("lladdr", "02:00:00:00:00:66", "nud", "permanent", "dev", self.ours)
        ip("neighbour", "add", address, *neighbour)
        return address


@contextlib.contextmanager
def linked(mtu: int = 1500) -> Iterator[Namespace]:
    """A namespace with a link to ours; both are gone afterwards."""
    namespace = Namespace(next(_numbers), mtu)
    try:
        namespace.make()
        yield namespace
    finally:
        namespace.remove()
