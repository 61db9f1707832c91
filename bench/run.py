"""Runs the rows: peers interleaved round by round, the first round thrown away."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import measure, specials
from bench.loads import Aim, Result
from bench.peers import Peer, Relay, Route
from bench.places import LOOPBACK, Place, veth
from bench.processes import Failed, NotMeant
from bench.rows import Job, Row

FIRST_PORT = 17_200
PAUSE_S = 0.1
PATIENCE = 2.0  # times its estimate: what a row may take
GRACE_S = 20.0  # on top of that


@dataclass
class Cell:
    """One peer in one row: its samples, and what went wrong."""

    samples: list[Result] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # no fault of the peer's

    def fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    def remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)


@dataclass
class Run:
    rows: Sequence[Row]
    peers: Sequence[Peer]
    rounds: int
    directory: Path
    scale: float = 1.0
    minutes: float = 25.0
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)  # what it ran on, once it is written

    def estimate(self) -> float:
        """Seconds that all of it takes, about."""
        return sum(row.estimate(self.peers, self.rounds, self.scale) for row in self.rows)

    def all(self) -> None:
        start = time.monotonic()
        end = start + 60 * self.minutes
        minutes = min(self.minutes, self.estimate() / 60)
        _say(f"{len(self.rows)} rows, {self.rounds} rounds: about {minutes:.0f} minutes\n")
        try:
            with contextlib.ExitStack() as stack:
                places: dict[str, Place] = {"loopback": LOOPBACK}
                if any(row.place == "veth" for row in self.rows):
                    if os.geteuid() == 0:
                        places["veth"] = stack.enter_context(veth())
                    else:
                        _say("the veth rows need root: left out\n")
                for number, row in enumerate(self.rows, 1):
                    begun = time.monotonic()
                    if row.place not in places:
                        continue
                    _say(f"[{begun - start:5.0f} s] {number}/{len(self.rows)} {row.title}\n")
                    if begun > end:
                        _say(f"    left out: {self.minutes:g} minutes are over\n")
                        continue
                    estimate = row.estimate(self.peers, self.rounds, self.scale)
                    self._row(
                        row, places[row.place], min(end, begun + PATIENCE * estimate + GRACE_S)
                    )
        finally:
            self.seconds = time.monotonic() - start

    def _row(self, row: Row, place: Place, end: float) -> None:
        peers = [peer for peer in self.peers if row.takes(peer)]
        if not peers:
            return
        cells = self.cells[row.name] = {peer.name: Cell() for peer in peers}
        directory = self.directory / row.name
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            services = []
            for service in (row.service, row.second):
                if service:
                    services.append(service.start(place, directory))
                    stack.callback(services[-1].stop)
            running: dict[str, Relay] = {}
            if not row.special and not row.alone:
                running = _start_all(row, place, peers, cells, directory, stack=stack)
            rounds = (row.rounds or self.rounds) + row.discard
            for number in range(rounds):
                # Everyone is once first: whoever follows an idle pause has a cooler machine.
                turn = number % len(peers)
                seconds = row.sample_seconds(self.scale, discard=row.discard and number == 0)
                for peer in (*peers[turn:], *peers[:turn]):
                    cell = cells[peer.name]
                    if (cell.faults or cell.remarks) and not cell.samples:
                        continue
                    if time.monotonic() > end:
                        cell.remark("out of time: fewer samples")
                        continue
                    relay = running.get(peer.name)
                    _take(
                        cell,
                        Job(row, peer, place, relay, directory, seconds, services),
                        number,
                        rounds,
                    )
        if row.discard:
            for cell in cells.values():
                cell.samples = [sample for sample in cell.samples if sample["round"] > 0]
        for name, cell in cells.items():
            for text in (*cell.faults, *cell.remarks):
                _say(f"    {name}: {text}\n")


def _start_all(
    row: Row,
    place: Place,
    peers: Sequence[Peer],
    cells: dict[str, Cell],
    directory: Path,
    *,
    stack: contextlib.ExitStack,
) -> dict[str, Relay]:
    """A relay for each peer, each at a port of its own; those that do not start have a fault."""
    running = {}
    for index, peer in enumerate(peers):
        route = Route(
            row.service.protocol, FIRST_PORT + index, place.server_address, row.service.port
        )
        try:
            relay = Relay(peer, place, [route], directory / peer.name)
            relay.wait()
        except Failed as error:
            cells[peer.name].fault(str(error))
            continue
        stack.callback(relay.stop)
        running[peer.name] = relay
    return running


def _take(cell: Cell, job: Job, number: int, rounds: int) -> None:
    """One sample into its cell."""
    row = job.row
    sampler = specials.SAMPLERS[row.special] if row.special else _alone if row.alone else _sample
    try:
        sample = sampler(job)
    except NotMeant as reason:
        cell.remark(f"n/a: {reason}")
        return
    except Failed as error:
        cell.fault(str(error))
        return
    finally:
        time.sleep(PAUSE_S)
    _check(cell, sample)
    cell.samples.append(sample | {"round": number})
    _progress(row, job.peer, number, rounds, sample)


def _sample(job: Job) -> Result:
    """One load through a relay that runs already; the relay's CPU time per unit of work."""
    row, place, relay = job.row, job.place, job.relay
    assert row.load is not None
    pids = relay.pids if relay else []
    aim = Aim(place, place.relay_address, relay.routes[0].port, pids) if pids and relay else None
    aim = aim or Aim(place, place.server_address, row.service.port)
    before, busy = measure.cpu_seconds(pids), measure.busy_seconds()
    result = row.load(aim, job.seconds)
    used = result.pop("cpu_seconds", measure.cpu_seconds(pids) - before)
    busy = result.pop("machine_seconds", measure.busy_seconds() - busy)
    if result["units"]:
        result["cpu"] = used / result["units"] * row.per
        result["machine"] = busy / result["units"] * row.per
    result["cpu_seconds"] = used
    return result


def _alone(job: Job) -> Result:
    """As _sample, through a relay that is started for it."""
    route = Route(
        job.row.service.protocol, FIRST_PORT, job.place.server_address, job.row.service.port
    )
    relay = Relay(job.peer, job.place, [route], job.directory / job.peer.name)
    try:
        relay.wait()
        return _sample(replace(job, relay=relay))
    finally:
        relay.stop()


def _check(cell: Cell, sample: Result) -> None:
    if sample.get("opened", specials.IDLE_CONNECTIONS) < specials.IDLE_CONNECTIONS:
        cell.fault(f"opened only {sample['opened']:,.0f} connections")
    words = {
        "corrupt": "corrupts datagrams",
        "wrong": "answers reach the wrong client",
        "twice": "delivers twice",
    }
    for key, text in words.items():
        if sample.get(key) and not any(fault.startswith(text) for fault in cell.faults):
            cell.fault(f"{text} ({sample[key]:.0f} of {sample['units']:.0f})")


def _progress(row: Row, peer: Peer, number: int, rounds: int, sample: Result) -> None:
    figures = "  ".join(
        f"{sample[metric.key]:.{metric.digits}f} {metric.unit}"
        for metric in row.all_metrics
        if metric.key in sample
    )
    _say(f"    {number + 1}/{rounds} {peer.name:14} {figures}\n")


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
