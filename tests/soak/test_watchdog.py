"""What the watchdog and restarts take long to show. Fault rows W2, W3."""

from __future__ import annotations

import os
import signal
import time

from tests.loops.test_watchdog import ask
from tests.support.endpoints import Peers, Server
from tests.support.net import free_port
from tests.support.processes import stopped
from tests.support.program import Run
from tests.support.wait import wait_until


def test_a_stopped_parent_accuses_nobody(run: Run, peers: Peers) -> None:
    """W2: after 8 s in which the parent saw nothing, workers have an interval to show that they live."""
    with Server(peers.server()) as echo:
        port = free_port()
        listener = f"{port}/tcp"
        program = run("-workers", "2", f"{port}/tcp=127.0.0.1:{echo.port}")
        program.has(listener, 2)
        before = program.workers(listener)
        first, second = before
        # One worker goes on, the other is as silent as in a frozen container that is thawed parent first.
        with stopped(program.process.pid), stopped(second):
            time.sleep(8)
            os.kill(program.process.pid, signal.SIGCONT)
            time.sleep(0.5)
        time.sleep(4)
        assert sorted(program.workers(listener)) == sorted([first, second])
        assert program.said("not responding") == 0


def test_a_crash_loop(run: Run, peers: Peers) -> None:
    """W3: slowed down, said once, and the other port does not notice; the first that lives serves all."""
    with Server(peers.server()) as echo:
        dying, healthy = free_port(), free_port()
        to = f"127.0.0.1:{echo.port}"
        program = run(f"{dying}/tcp={to}", f"{healthy}/tcp={to}")
        program.has(f"{healthy}/tcp", 1)
        (bystander,) = program.workers(f"{healthy}/tcp")
        deaths = 0
        until = time.monotonic() + 6
        while time.monotonic() < until:
            for pid in program.workers(f"{dying}/tcp"):
                os.kill(pid, signal.SIGKILL)
            assert ask(healthy) == b"ping"
            deaths = program.said("worker exited, restarting")
        # 0, 0.1, 0.2, 0.4, 0.8, 1.6 and 3.2 s apart: no more than eight fit into the time.
        assert 5 <= deaths <= 8
        assert program.said("the port is degraded") == 1
        assert ask(dying) == b"ping"
        assert program.workers(f"{healthy}/tcp") == [bystander]
        wait_until(lambda: program.said("the port is not degraded"), "it does not recover")
        assert program.said("the port is degraded") == 1
