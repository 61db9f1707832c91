"""What the operating system says of processes, ports and interfaces. The only importer of psutil."""

from __future__ import annotations

import enum
import ipaddress
import os
import socket
import time
from collections.abc import Callable

import psutil

from ambassador.model import ListenAddress
from ambassador.values import Protocol

OWNERS_VALID_S = 1.0
"""How long one look at the owners of ports is good for."""


class ProcessState(enum.Enum):
    """What a process is doing, as far as a watchdog needs to know."""

    WAITING = enum.auto()  # asleep, stopped, or not to be seen
    RUNNING = enum.auto()  # runs, or waits for a processor or a disk
    ENDED = enum.auto()  # has exited and waits to be reaped


_RUNNING = {psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP, psutil.STATUS_WAKING}
_ENDED = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


def process_state(pid: int) -> ProcessState:
    """What it does now. WAITING if it is hidden (hidepid of proc(5)), or reaped since."""
    try:
        state = psutil.Process(pid).status()
    except psutil.Error:
        return ProcessState.WAITING
    if state in _RUNNING:
        return ProcessState.RUNNING
    return ProcessState.ENDED if state in _ENDED else ProcessState.WAITING


def reap_children() -> None:
    """Reap every child that has exited; for PID 1 that is also whatever else was left to it."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


class PortOwners:
    """Which programs have the ports. One look at the system, which is slow, serves all ports of a moment."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._taken: dict[tuple[Protocol, int], list[tuple[str, int | None]]] = {}
        self._until = 0.0

    def find(self, listen: ListenAddress) -> str:
        """The program that has the port: `redis-server (pid 4711)`, or that it cannot be seen."""
        if self._clock() >= self._until:
            self._taken = _taken_ports()
            self._until = self._clock() + OWNERS_VALID_S
        for port in range(listen.first_port, listen.last_port + 1):
            for address, pid in self._taken.get((listen.protocol, port), ()):
                if pid is not None and _overlaps(listen, address):
                    try:
                        return f"{psutil.Process(pid).name()} (pid {pid})"
                    except psutil.Error:
                        pass
        return "a process that cannot be seen from here"


def _taken_ports() -> dict[tuple[Protocol, int], list[tuple[str, int | None]]]:
    """Who listens where: address and pid, None if it is hidden."""
    taken: dict[tuple[Protocol, int], list[tuple[str, int | None]]] = {}
    try:
        for entry in psutil.net_connections(kind="inet"):
            protocol = Protocol.TCP if entry.type == socket.SOCK_STREAM else Protocol.UDP
            listening = protocol is Protocol.UDP or entry.status == psutil.CONN_LISTEN
            if entry.laddr and not entry.raddr and listening:
                taken.setdefault((protocol, entry.laddr.port), []).append(
                    (entry.laddr.ip, entry.pid)
                )
    except (psutil.Error, OSError):
        pass
    return taken


def own_addresses() -> frozenset[str]:
    """The IP addresses of this network namespace's interfaces, in their shortest form, without zones."""
    try:
        entries = [each for listed in psutil.net_if_addrs().values() for each in listed]
    except (psutil.Error, OSError):
        return frozenset()
    families = (socket.AF_INET, socket.AF_INET6)
    texts = (each.address.partition("%")[0] for each in entries if each.family in families)
    return frozenset(str(ipaddress.ip_address(each)) for each in texts)


def _overlaps(listen: ListenAddress, address: str) -> bool:
    """Whether a socket that is bound there keeps another from binding a port of `listen`."""
    bound = ipaddress.ip_address(address.partition("%")[0])
    wanted = ipaddress.ip_address(listen.address.partition("%")[0] or "::")
    return bound.is_unspecified or wanted.is_unspecified or bound == wanted
