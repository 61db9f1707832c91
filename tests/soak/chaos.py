"""What the soak does to the ambassador, its target and the daemon, in an order that a seed decides."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from pathlib import Path

from tests.soak.clients import Tally
from tests.support.engine import DEMO, Box, Stage
from tests.support.own_engine import OwnEngine
from tests.support.processes import is_gone, workers_of
from tests.support.program import Program
from tests.support.wait import wait_until

SERVER = (Path(__file__).parent / "server.py").read_text()
SETTLE_S = 3.0
"""How long after a disturbance it still explains a reset."""

KILLED_S = 13.0
INTRUDERS = 3
RECOVER_S = 20.0


def create_server(stage: Stage, short: str, name: str, port: int) -> Box:
    """Create a container with server.py; it is not started."""
    flags = [f"--expose={port}/tcp", f"--expose={port}/udp"]
    return stage.create(short, DEMO, "python3", "-c", SERVER, name, str(port), flags=flags)


class Chaos:
    """One disturbance after another; `step` does one. Runs in a thread of its own."""

    def __init__(
        self, stage: Stage, own: OwnEngine, ambassador: Program, target: Box, *, port: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.stage, self.own, self.ambassador, self.target = stage, own, ambassador, target
        self.port, self.tally, self.dice = port, Tally(), random.Random(seed)
        self.restarts: list[float] = []
        self.returns: list[float] = []
        self._intruders: list[Box] = []
        self._number = 0

    def step(self) -> None:
        kinds = (self.restart_elsewhere, self.kill_worker, self.restart_in_place, self.kill_daemon)
        (act,) = self.dice.choices(kinds, weights=(45, 30, 10, 15))
        window = [time.monotonic(), math.inf]
        self.tally.disturbances.append(window)
        try:
            act()
            self._wait_answer()
        finally:
            window[1] = time.monotonic() + SETTLE_S

    # The target

    def restart_elsewhere(self) -> None:
        """Give its old address to an intruder that serves the same port."""
        before = self.target.address()
        self._number += 1
        name = f"intruder{self._number}"
        intruder = create_server(self.stage, name, name, self.port)
        self._end_target()
        intruder.start()
        self._intruders.append(intruder)
        self._start_target()
        self.tally.counts["moves"] += self.target.address() != before
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
        wait_until(lambda: not self.target.is_running(), "the target runs on")

    def _start_target(self) -> None:
        self.target.start()
        started = time.monotonic()
        self.tally.counts["restarts"] += 1
        self._wait_answer()
        self.restarts.append(self.tally.answered_at - started)

    def _wait_answer(self) -> None:
        """Wait until a client gets an answer."""
        now = time.monotonic()
        try:
            wait_until(lambda: self.tally.answered_at > now, "no answer", RECOVER_S)
        except AssertionError:
            self.tally.find("stuck", f"no client was answered for {RECOVER_S:g} s")

    # Workers

    def kill_worker(self) -> None:
        """Kill one, or stop it: then the ambassador kills it."""
        victim = self.dice.choice(workers_of(self.ambassador.pid))
        os.kill(victim.pid, signal.SIGSTOP if self.dice.random() < 0.3 else signal.SIGKILL)
        self.tally.counts["workers killed"] += 1
        wait_until(lambda: is_gone(victim), "the worker runs on", KILLED_S)

    # The daemon

    def kill_daemon(self) -> None:
        """Kill it and start it again; every other time the target dies meanwhile."""
        dies = self.dice.random() < 0.5
        pid = int(self.target.inspect()["State"]["Pid"])
        said = len(self.ambassador.lines)
        self.own.kill()
        time.sleep(self.dice.uniform(0.5, 3))
        if dies:
            os.kill(pid, signal.SIGKILL)
        self.own.start()
        back = time.monotonic()
        self.tally.counts["daemons killed"] += 1
        self.ambassador.wait_for_line("connected to Docker again", since=said)
        self.returns.append(time.monotonic() - back)
        if dies:
            wait_until(lambda: not self.target.is_running(), "the target runs on")
            self._start_target()
