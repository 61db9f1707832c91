"""A supervisor in a process of its own that is told its routes line by line, and the test's handle on it.

The real parent learns routes from Docker. This one reads them on standard input, as JSON, and so lets a test
repoint, expose and withdraw ports at will; fork server, supervisor and workers are the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ambassador.model import Backend, DesiredState, Listener, Route
from ambassador.options import Sandbox
from ambassador.supervise.forkserver import ForkServer
from ambassador.supervise.supervisor import Limits, Supervisor
from ambassador.values import Protocol

from .harness import SANITIZED, TIMEOUT_S, wait_until
from .watched import Watched, children, title

Address = tuple[str, int, str]  # address, port, run


class Parent:
    """The handle. The process ends when it is closed, or with the test."""

    def __init__(self, log: Path, hold_ms: int) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.relay.parent", str(hold_ms)],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.pid = self._process.pid
        wait_until(lambda: children(self.pid), "the parent has a fork server")
        self.tell({})

    def tell(self, routes: Mapping[Listener, Sequence[Address]]) -> None:
        """These from now on; whoever is not named is withdrawn."""
        assert self._process.stdin is not None
        lines = [
            (listener.port, listener.protocol, list(addresses))
            for listener, addresses in routes.items()
        ]
        print(json.dumps(lines), file=self._process.stdin, flush=True)

    @property
    def fork_server(self) -> int:
        (pid,) = children(self.pid)
        return pid

    def workers(self) -> list[int]:
        return children(self.fork_server)

    def worker(self, listener: Listener, generation: int, timeout_s: float = TIMEOUT_S) -> Watched:
        """The one live worker of the listener, once it has this generation of backends in force."""
        deadline = time.monotonic() + timeout_s
        prefix = f"grand-ambassador: {listener} "
        while True:
            pids = [pid for pid in self.workers() if title(pid).startswith(prefix)]
            assert len(pids) < 2, f"{listener} has the workers {pids}"
            try:
                for pid in pids:
                    worker = Watched(pid, listener.protocol)
                    if worker.counters()["generation"] == generation:
                        return worker
            except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                pass
            assert time.monotonic() < deadline, (
                f"no worker of {listener} with generation {generation}: {self.log.read_text()}"
            )
            time.sleep(0.002)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(TIMEOUT_S) == 0, self.log.read_text()


def routes(lines: Sequence[tuple[int, str, Sequence[Address]]]) -> dict[Listener, Route]:
    found = {}
    for port, protocol, addresses in lines:
        listener = Listener(port, Protocol(protocol))
        backends = tuple(
            Backend(host, number, "machine", started_at=run) for host, number, run in addresses
        )
        found[listener] = Route(listener, "machine", backends)
    return found


def main(hold_ms: int, lines: IO[str]) -> int:
    wanted = DesiredState()
    # The fork server first: it is forked, which is safe only while there is no thread.
    limits = Limits(hold=hold_ms, sandbox=Sandbox.OFF if SANITIZED else Sandbox.AUTO)
    supervisor = Supervisor(ForkServer.fork(), lambda: wanted, limits)

    def listen() -> None:
        nonlocal wanted
        for line in lines:
            wanted = DesiredState(routes(json.loads(line)))
            supervisor.wake()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.stdin))
