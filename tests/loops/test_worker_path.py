"""Workers behind the data path interface, with real processes: changed options, replaced workers,
totals over deaths, and a parent that runs out of descriptors.

As a program it is a supervisor of one pair of listeners (TCP and UDP): each line on its standard input is the
listeners' options as JSON, and each is answered, once it has been obeyed, by the totals of both.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from ambassador.model import Backend, DesiredState, ListenAddress, ListenerSpec
from ambassador.options import ListenerOptions, Sandbox
from ambassador.supervise.forkserver import ForkServer
from ambassador.supervise.supervisor import Supervisor
from ambassador.supervise.timings import Timings
from ambassador.values import Protocol
from tests.support.endpoints import Peers, Server, read_exactly, read_to_reset
from tests.support.net import free_port
from tests.support.processes import children, is_gone, title
from tests.support.wait import SANITIZED, TIMEOUT_S, wait_until

ROOT = Path(__file__).parents[2]
TIMINGS = Timings(restart_last=0.2, start_retry=0.1, report=0.1)


class Parent:
    """The handle on the supervisor."""

    def __init__(self, log: Path, port: int, backend: int) -> None:
        self.log = log
        self.port = port
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.loops.test_worker_path", str(port), str(backend)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def tell(self, **options: Any) -> dict[str, dict[str, int]]:
        """These options from now on; the totals by protocol."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(options), file=self.process.stdin, flush=True)
        totals: dict[str, dict[str, int]] = json.loads(self.process.stdout.readline())
        return totals

    def workers(self, protocol: str, count: int) -> list[int]:
        """The pids, once there are so many."""
        prefix = f"grand-ambassador: {self.port}/{protocol} "

        def find() -> list[int] | None:
            below = [pid for server in children(self.process.pid) for pid in children(server)]
            found = [pid for pid in below if title(pid).startswith(prefix)]
            return found if len(found) == count else None

        return wait_until(find, f"{count} workers of {prefix}")

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)
        self.talk(client)
        return client

    def talk(self, client: socket.socket) -> None:
        client.sendall(b"ping")
        assert read_exactly(client, 4) == b"ping"

    def said(self, words: str) -> bool:
        return words in self.log.read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(TIMEOUT_S) == 0, self.log.read_text()


@pytest.fixture
def parent(tmp_path: Path, peers: Peers) -> Iterator[Parent]:
    with Server(peers.server()) as server:
        parent = Parent(tmp_path / "log", free_port(), server.port)
        try:
            parent.tell()
            yield parent
        finally:
            parent.close()


def test_options_reach_a_running_worker(parent: Parent, peers: Peers) -> None:
    """Limit, idle timeout and hold change under traffic: same process, and no connection is lost."""
    (worker,) = parent.workers("tcp", 1)
    with parent.connect() as client, parent.connect() as idle:
        for options in ({"hold": 50}, {"max_connections": 2}, {"idle_timeout": 400}):
            parent.tell(**options)
            parent.talk(client)
        parent.tell(max_connections=2)
        assert peers.is_refused(parent), "over the limit"
        parent.talk(idle)
        parent.tell(idle_timeout=400)
        for _ in range(20):
            parent.talk(client)
            time.sleep(0.05)
        assert read_to_reset(idle) == b""
        parent.talk(client)
    assert parent.workers("tcp", 1) == [worker]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_another_number_of_workers(parent: Parent, protocol: str) -> None:
    """New workers on the same port; the former one finishes what is open, and exits."""
    (former,) = parent.workers(protocol, 1)
    with parent.connect() as client:
        totals = parent.tell(workers=3, drain=60_000)
        if protocol == "tcp":
            assert former in parent.workers(protocol, 4), "it has a connection"
        else:
            wait_until(lambda: is_gone(former), "it reads no more")
            parent.workers(protocol, 3)
        for _ in range(20):
            parent.talk(client)
            parent.connect().close()
    wait_until(lambda: is_gone(former), "the former worker does not exit")
    parent.tell(workers=1, drain=60_000)
    parent.workers(protocol, 1)
    parent.connect().close()
    wait_until(lambda: parent.tell(workers=1, drain=60_000)["tcp"]["accepted"] >= 22)
    assert totals["tcp"]["accepted"] == 1
    assert not parent.said("level=error")


def test_totals_never_fall_when_a_worker_dies(parent: Parent) -> None:
    with parent.connect(), parent.connect():
        wait_until(lambda: parent.tell()["tcp"]["accepted"] == 2)
        (victim,) = parent.workers("tcp", 1)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: parent.said("killed by SIGKILL"), "the exit is not reported")
        totals = parent.tell()["tcp"]
        assert (totals["accepted"], totals["active"]) == (2, 0)
    parent.connect().close()
    wait_until(lambda: parent.tell()["tcp"]["accepted"] == 3)


@pytest.mark.parametrize("fork_server_too", [False, True])
def test_a_parent_without_descriptors(parent: Parent, fork_server_too: bool) -> None:
    """R1: no exception in its loop: it says so, goes on, and catches up once there are descriptors."""
    (victim,), (other,) = parent.workers("tcp", 1), parent.workers("udp", 1)
    pid = parent.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    if fork_server_too:
        (fork_server,) = children(pid)
        os.kill(fork_server, signal.SIGKILL)
        wait_until(lambda: parent.said("cannot start a fork server, trying again"))
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: parent.said('msg="worker exited, restarting'))
    if not fork_server_too:
        wait_until(lambda: parent.said("cannot start a worker, trying again"))
    parent.tell(hold=70)
    assert not is_gone(other)
    with socket.create_connection(("127.0.0.1", parent.port), timeout=TIMEOUT_S) as waiting:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        parent.talk(waiting)
    assert not parent.said("Traceback")


# ------------------------------------------------------------------------------------------ the program


def main(port: int, backend: int, lines: IO[str]) -> int:
    fork_server = ForkServer.fork()  # safe only while there is no thread
    from ambassador.system import logs  # noqa: PLC0415

    lines_out = logs.setup("info")
    wanted = DesiredState()
    obeyed = threading.Event()

    def desired() -> DesiredState:
        obeyed.set()
        return wanted

    sandbox = Sandbox.OFF if SANITIZED else Sandbox.AUTO
    supervisor = Supervisor(fork_server, desired, sandbox=sandbox, timings=TIMINGS)

    def listen() -> None:
        nonlocal wanted
        for line in lines:
            wanted = _desired(port, backend, ListenerOptions(**json.loads(line)))
            obeyed.clear()
            supervisor.wake()
            obeyed.wait()
            time.sleep(0.05)  # until the workers have it
            totals = {
                str(listen.protocol): path.counters() for listen, path in supervisor._paths.items()
            }
            print(json.dumps(totals), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    code = supervisor.run()
    lines_out.close(1)
    return code


def _desired(port: int, backend: int, options: ListenerOptions) -> DesiredState:
    backends = (Backend("127.0.0.1", backend),)
    return DesiredState(
        {
            listen: ListenerSpec(listen, "web", backends=backends, options=options)
            for listen in (ListenAddress(protocol, port) for protocol in Protocol)
        }
    )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.stdin))
