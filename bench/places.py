"""Where a row runs: on loopback, or client - relay - server in three network namespaces of our own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench import ground


@dataclass(frozen=True)
class Place:
    """How to start a program at each of the three hosts, and the addresses they have."""

    name: str
    client: tuple[str, ...]
    relay: tuple[str, ...]
    server: tuple[str, ...]
    relay_address: str
    server_address: str


LOOPBACK = Place("loopback", (), (), (), "127.0.0.1", "127.0.0.1")


def _veth() -> Place:
    names = [f"bench-{os.getpid()}-{host}" for host in ("client", "relay", "server")]
    client, relay, server = (("ip", "netns", "exec", name) for name in names)
    return Place("veth", client, relay, server, "10.77.1.1", "10.77.2.2")


@contextmanager
def veth() -> Iterator[Place]:
    """Three namespaces and two veth pairs; the relay's host routes, for the rows without a relay."""
    place = _veth()
    client, relay, server = (prefix[-1] for prefix in (place.client, place.relay, place.server))
    try:
        for name in (client, relay, server):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for other, own, address, peer_address, far in (
            (client, "c", "10.77.1.1/24", "10.77.1.2/24", "10.77.2.0/24 via 10.77.1.1"),
            (server, "s", "10.77.2.1/24", "10.77.2.2/24", "10.77.1.0/24 via 10.77.2.1"),
        ):
            _ip(
                "-n",
                relay,
                "link",
                "add",
                own,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                other,
            )
            _ip("-n", relay, "addr", "add", address, "dev", own)
            _ip("-n", relay, "link", "set", own, "up")
            _ip("-n", other, "addr", "add", peer_address, "dev", "eth0")
            _ip("-n", other, "link", "set", "eth0", "up")
            _ip("-n", other, "route", "add", *far.split())
        for prefix in (place.client, place.relay, place.server):
            ground.share(prefix)
        subprocess.run(
            [*place.relay, "sysctl", "-qw", "net.ipv4.ip_forward=1"],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        yield place
    finally:
        for name in (client, relay, server):
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
