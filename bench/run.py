"""Runs the rows: peers interleaved round by round, the first round thrown away."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import measure, specials
from bench.loads import Aim, Result
from bench.peers import Peer, Relay, Route
from bench.places import LOOPBACK, Place, veth
from bench.processes import Failed
from bench.rows import Job, Row

FIRST_PORT = 17_200
PAUSE_S = 0.1


@dataclass
class Cell:
    """One peer in one row: its samples, and what went wrong."""

    samples: list[Result] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)


@dataclass
class Run:
    rows: Sequence[Row]
    peers: Sequence[Peer]
    rounds: int
    directory: Path
    scale: float = 1.0
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    seconds: float = 0.0

    def all(self) -> None:
        start = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                places: dict[str, Place] = {"loopback": LOOPBACK}
                if any(row.place == "veth" for row in self.rows):
                    if os.geteuid() == 0:
                        places["veth"] = stack.enter_context(veth())
                    else:
                        _say("the veth rows need root: left out\n")
                for number, row in enumerate(self.rows, 1):
                    if row.place in places:
                        _say(
                            f"[{time.monotonic() - start:5.0f} s] {number}/{len(self.rows)} {row.title}\n"
                        )
                        self._row(row, places[row.place])
        finally:
            self.seconds = time.monotonic() - start

    def _row(self, row: Row, place: Place) -> None:
        cells = self.cells[row.name] = {}
        directory = self.directory / row.name
        directory.mkdir(parents=True, exist_ok=True)
        peers = [peer for peer in self.peers if row.service.protocol in peer.protocols]
        with contextlib.ExitStack() as stack:
            service = row.service.start(place, directory)
            stack.callback(service.stop)
            sampler = (
                specials.SAMPLERS[row.special] if row.special else _alone if row.alone else _sample
            )
            running: dict[str, Relay | None] = {}
            for index, peer in enumerate(peers):
                cells[peer.name] = Cell()
                if not row.special and not row.alone:
                    port = FIRST_PORT + index
                    route = Route(
                        row.service.protocol, port, place.server_address, row.service.port
                    )
                    try:
                        relay = Relay(peer, place, [route], directory / peer.name)
                        relay.wait()
                    except Failed as error:
                        cells[peer.name].fault(str(error))
                        continue
                    stack.callback(relay.stop)
                    running[peer.name] = relay
            rounds = (row.rounds or self.rounds) + row.discard
            for number in range(rounds):
                # Everyone is once first: whoever follows an idle pause has a cooler machine.
                turn = number % len(peers)
                for peer in (*peers[turn:], *peers[:turn]):
                    cell = cells[peer.name]
                    if cell.faults and not cell.samples:
                        continue
                    try:
                        sample = sampler(
                            Job(row, peer, place, running.get(peer.name), directory, self.scale)
                        )
                    except Failed as error:
                        cell.fault(str(error))
                        continue
                    finally:
                        time.sleep(PAUSE_S)
                    _check(cell, sample)
                    cell.samples.append(sample | {"round": number})
                    _progress(row, peer, number, rounds, sample)
            if row.discard:
                for cell in cells.values():
                    cell.samples = [sample for sample in cell.samples if sample["round"] > 0]
        for peer in peers:
            for fault in cells[peer.name].faults:
                _say(f"    {peer.name}: {fault}\n")


def _sample(job: Job) -> Result:
    """One load through a relay that runs already; the relay's CPU time per unit of work."""
    row, place, relay = job.row, job.place, job.relay
    assert row.load is not None
    pids = relay.pids if relay else []
    aim = Aim(place, place.relay_address, relay.routes[0].port) if pids and relay else None
    aim = aim or Aim(place, place.server_address, row.service.port)
    seconds = max(1.0, row.seconds * job.scale)
    before = measure.cpu_seconds(pids)
    result = row.load(aim, seconds)
    used = measure.cpu_seconds(pids) - before
    if result["units"]:
        result["cpu"] = used / result["units"] * row.per
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
    for fault in ("corrupt", "wrong", "twice"):
        if sample.get(fault):
            words = {"corrupt": "corrupts datagrams", "wrong": "answers reach the wrong client"}
            cell.fault(
                f"{words.get(fault, 'delivers twice')} ({sample[fault]:.0f} of {sample['units']:.0f})"
            )


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
