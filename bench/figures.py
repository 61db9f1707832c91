"""`python -m bench.figures`: the memory of each part of the ambassador, beside docker-proxy's."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from bench.loads import ECHO
from bench.measure import Memory, memory, memory_of, tree
from bench.peers import PEERS, Relay, Route
from bench.places import LOOPBACK
from bench.processes import Failed

PORTS = (1, 10, 100)
FIRST_PORT = 18_700
SETTLE_S = 1.0
KB = 1000


def main() -> None:
    print("| what | USS kB | PSS kB |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        for ports in PORTS:
            for name in ("ambassador", "docker-proxy"):
                try:
                    _measure(name, ports, Path(directory) / f"{name}{ports}")
                except Failed as error:
                    print(f"| {name}, {ports} ports: {error} | | |")


def _measure(name: str, ports: int, directory: Path) -> None:
    host = LOOPBACK.server_address
    routes = [Route("tcp", FIRST_PORT + number, host, ECHO.port) for number in range(ports)]
    relay = Relay(PEERS[name], LOOPBACK, routes, directory)
    relay.wait()
    try:
        time.sleep(SETTLE_S)
        if name == "ambassador":
            parent, nursery, *workers = sorted(tree(relay.pids))
            if ports == PORTS[0]:
                _line("ambassador: parent", memory_of(parent))
                _line("ambassador: nursery", memory_of(nursery))
            used = sorted((memory_of(pid) for pid in workers), key=lambda one: one.uss)
            _line(f"ambassador: an idle worker, the middle of {ports}", used[len(used) // 2])
        _line(f"{name}: {ports} port{'s' * (ports > 1)}, all processes", memory(relay.pids))
    finally:
        relay.stop()


def _line(what: str, used: Memory) -> None:
    print(f"| {what} | {used.uss // KB:,} | {used.pss // KB:,} |", flush=True)


if __name__ == "__main__":
    main()
