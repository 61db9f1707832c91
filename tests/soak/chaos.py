"""What the soak does to the ambassador, its target and the daemon, in an order that a seed decides."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from tests.soak.clients import Tally
from tests.support.engine import DEMO, Box, Stage
from tests.support.own_engine import OwnEngine
from tests.support.processes import read_process, workers_of
from tests.support.program import Program
from tests.support.wait import wait_until

SERVER = (Path(__file__).parent / "server.py").read_text()
SETTLE_S = 3.0
"""After a disturbance, while resets are still explained by it."""

WATCHDOG_S = 8.0
INTRUDERS = 3
RECOVER_S = 20.0


def create_server(stage: Stage, short: str, name: str, port: int) -> Box:
    """A container with server.py, not started."""
    flags = [f"--expose={port}/tcp", f"--expose={port}/udp"]
    return stage.create(short, DEMO, "python3", "-c", SERVER, name, str(port), flags=flags)


class Chaos:
    """One disturbance after another; `step` does one. Runs in a thread of its own."""

    def __init__(
        self, stage: Stage, own: OwnEngine, ambassador: Program, target: Box, *, port: int,
        tally: Tally, seed: int,
    ) -> None:  # fmt: skip
        self.stage, self.own, self.ambassador, self.target = stage, own, ambassador, target
        self.port, self.tally = port, tally
        self.dice = random.Random(seed)
        self.begun = time.monotonic()
        self.marks: list[tuple[float, str]] = []
        self.recoveries: dict[str, list[float]] = {"restart": [], "daemon": []}
        self.moved = 0
        self.has_watchdog = False
        self._intruders: list[Box] = []
        self._number = 0

    def step(self) -> None:
        kinds = (self.restart_elsewhere, self.kill_worker, self.restart_in_place, self.bounce)
        (act,) = self.dice.choices(kinds, weights=(45, 30, 10, 15))
        window = [time.monotonic(), float("inf")]
        self.tally.disturbances.append(window)
        try:
            act()
            self._wait_answer()
        finally:
            window[1] = time.monotonic() + SETTLE_S

    # The target

    def restart_elsewhere(self) -> None:
        """It comes back with another address, and an intruder serves the same port on the old one."""
        before = self.target.address()
        self._number += 1
        intruder = create_server(
            self.stage, f"intruder{self._number}", f"intruder{self._number}", self.port
        )
        self._end_target()
        intruder.start()
        self._intruders.append(intruder)
        self._start_target()
        self.moved += self.target.address() != before
        while len(self._intruders) > INTRUDERS:
            self._intruders.pop(0).remove()

    def restart_in_place(self) -> None:
        self._end_target()
        self._start_target()

    def _end_target(self) -> None:
        if self.dice.random() < 0.5:
            self.target.kill()
        else:
            self.target.stop(2)
        wait_until(lambda: not self.target.is_running(), "the target's end")

    def _start_target(self) -> None:
        self.target.start()
        started = time.monotonic()
        self._mark("restart")
        self._wait_answer()
        self.recoveries["restart"].append(self.tally.answered_at - started)

    def _wait_answer(self) -> None:
        """Until a client has had an answer again that it asked for from now on."""
        now = time.monotonic()
        try:
            wait_until(lambda: self.tally.answered_at > now, "an answer", RECOVER_S)
        except AssertionError:
            self.tally.find("stuck", f"no client was answered for {RECOVER_S:g} s")

    # Workers

    def kill_worker(self) -> None:
        victim = self.dice.choice(workers_of(self.ambassador.pid))
        stop = self.has_watchdog and self.dice.random() < 0.3
        os.kill(victim.pid, signal.SIGSTOP if stop else signal.SIGKILL)
        self._mark("worker killed")
        wait_until(
            lambda: (now := read_process(victim.pid)) is None or now.state == "Z",
            "the worker's end",
            WATCHDOG_S + 5,
        )

    def probe_watchdog(self) -> None:
        """Whether a worker that is stopped gets replaced; one that is not is let go on."""
        victim = workers_of(self.ambassador.pid)[0]
        os.kill(victim.pid, signal.SIGSTOP)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: read_process(victim.pid) is None, "it", WATCHDOG_S)
            self.has_watchdog = True
            return
        os.kill(victim.pid, signal.SIGCONT)

    # The daemon

    def bounce(self) -> None:
        """Killed and started again; every other time the target dies meanwhile."""
        dies = self.dice.random() < 0.5
        pid = int(self.target.inspect()["State"]["Pid"])
        said = len(self.ambassador.lines)
        self.own.kill()
        time.sleep(self.dice.uniform(0.5, 3))
        if dies:
            os.kill(pid, signal.SIGKILL)
        self.own.start()
        back = time.monotonic()
        self._mark("daemon bounced")
        self.ambassador.wait_for_line("connected to Docker again", since=said)
        self.recoveries["daemon"].append(time.monotonic() - back)
        if dies:
            wait_until(lambda: not self.target.is_running(), "the target's end")
            self._start_target()

    def _mark(self, what: str) -> None:
        self.marks.append((time.monotonic() - self.begun, what))
        self.tally.counts[f"{what}s" if what == "restart" else what] += 1
