"""Where a row runs: in a network namespace of the benchmark, or client - relay - server in three.

The namespace keeps other traffic out and its ports free. TCP uses cubic, which is Linux's default. Under BBR
timers pace each stream: bulk streams lose a third of their rate, and samples differ twice as much.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_SETTINGS = Path("/proc/sys/net/ipv4")
_CONGESTION = _SETTINGS / "tcp_congestion_control"
_ALLOWED = _SETTINGS / "tcp_allowed_congestion_control"


@dataclass(frozen=True)
class Place:
    """How to start a program at each of the three hosts, and the addresses they have."""

    client: tuple[str, ...]
    relay: tuple[str, ...]
    server: tuple[str, ...]
    relay_address: str
    server_address: str


LOOPBACK = Place((), (), (), "127.0.0.1", "127.0.0.1")


def congestion() -> str:
    """The congestion control of new TCP sockets."""
    return _CONGESTION.read_text().strip()


@contextlib.contextmanager
def own_namespace() -> Iterator[None]:
    """Enter a network namespace with cubic. Without root: say so and stay."""
    if os.geteuid() != 0:
        print(
            f"not root: on the machine's own loopback, with {congestion()}; no veth",
            file=sys.stderr,
        )
        yield
        return
    with _cubic_allowed():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) < 0:
            raise OSError(ctypes.get_errno(), "unshare")
        _ip("link", "set", "lo", "up")
        _set((), _CONGESTION, "cubic")
        yield


@contextlib.contextmanager
def veth() -> Iterator[Place]:
    """Three namespaces and two veth pairs; the relay's host routes, for the rows without a relay."""
    names = client, relay, server = [f"bench-{os.getpid()}-{host}" for host in "crs"]
    at_client, at_relay, at_server = (("ip", "netns", "exec", name) for name in names)
    try:
        for name, prefix in zip(names, (at_client, at_relay, at_server), strict=True):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _set(prefix, _CONGESTION, congestion())
        for host, network, other in ((client, "1", "2"), (server, "2", "1")):
            link = f"bench{network}"
            _ip("-n", relay, *f"link add {link} type veth peer name eth0 netns {host}".split())
            for name, device, number in ((relay, link, "1"), (host, "eth0", "2")):
                _ip("-n", name, "addr", "add", f"10.77.{network}.{number}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
            _ip("-n", host, "route", "add", f"10.77.{other}.0/24", "via", f"10.77.{network}.1")
        _set(at_relay, _SETTINGS / "ip_forward", "1")
        yield Place(at_client, at_relay, at_server, "10.77.1.1", "10.77.2.2")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def _cubic_allowed() -> Iterator[None]:
    """A namespace can only use what the machine's own namespace allows (net/ipv4/tcp_cong.c)."""
    if not _ALLOWED.exists():  # this is not the machine's own namespace
        yield
        return
    # The open file stays that of the machine after unshare().
    with _ALLOWED.open("r+") as allowed:
        before = allowed.read().strip()
        try:
            with contextlib.suppress(OSError):  # a kernel without cubic
                os.pwrite(allowed.fileno(), f"{before} cubic".encode(), 0)
            yield
        finally:
            os.pwrite(allowed.fileno(), before.encode(), 0)


def _set(prefix: Sequence[str], setting: Path, value: str) -> None:
    """If the kernel refuses, the shell says so; the report names what was used."""
    command = [*prefix, "sh", "-c", f"echo {value} > {setting}"]
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
