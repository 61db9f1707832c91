"""Fixtures of the long tests: those of the loops and of Docker."""

from __future__ import annotations

from tests.docker.conftest import engine, own, stage
from tests.loops.conftest import loopback, peers, run, start, start_tcp, start_udp, tools, yard

__all__ = [
    "engine", "loopback", "own", "peers", "run", "stage", "start", "start_tcp", "start_udp", "tools", "yard",
]  # fmt: skip
