"""`python -m bench.run`: run rows against peers, print the table. See README.md."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import places, report
from bench.peers import PEERS, ROOT
from bench.places import LOOPBACK, Place
from bench.processes import Failed, Program
from bench.report import Cell
from bench.rows import FIRST_PORT, ROWS, Job, Row

PAUSE_S = 0.1
OVERHEAD_S = 0.4  # of a sample: starting the load tool, reading /proc, the pause


def main() -> int:
    options = _options()
    os.chdir(ROOT)  # every program that is started can import bench
    build()
    if options.build_only:
        return 0
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})  # every program that is started inherits it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that every program is stopped
    cells: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, places.own_namespace():
        try:
            _run(options, cells, Path(directory))
        except KeyboardInterrupt:
            _say("stopped; the table has what there is\n")
        text = report.tables(cells, options.rounds)
    print(text)
    if options.output:
        options.output.write_text(text)
    return 0


def build() -> None:
    """Compile bench/_load.pyx in place, if it has changed."""
    from Cython.Build import cythonize  # noqa: PLC0415 - only to build
    from setuptools import Extension, setup  # type: ignore[import-untyped]  # noqa: PLC0415

    source = "bench/_load.pyx"
    extension = Extension("bench._load", [source], extra_compile_args=["-O2", "-D_GNU_SOURCE"])
    with Path(source).open() as lock:  # test processes may build at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        modules = cythonize([extension], language_level=3, quiet=True)  # type: ignore[no-untyped-call]
        arguments = ["-q", "build_ext", "--inplace"]
        setup(name="bench", packages=[], script_args=arguments, ext_modules=modules)


def _run(options: argparse.Namespace, cells: dict[str, dict[str, Cell]], directory: Path) -> None:
    rows, peers = [ROWS[name] for name in options.rows], [PEERS[name] for name in options.peers]
    if os.geteuid() != 0:
        rows = [row for row in rows if row.place != "veth"]
    samples = sum((options.rounds + 1) * sum(map(row.takes, peers)) for row in rows)
    minutes = samples * (options.seconds + OVERHEAD_S) / 60
    _say(f"{len(rows)} rows, {options.rounds} rounds: about {minutes:.0f} minutes\n")
    with contextlib.ExitStack() as stack:
        where: dict[str, Place] = {"loopback": LOOPBACK}
        if any(row.place == "veth" for row in rows):
            where["veth"] = stack.enter_context(places.veth())
        start = time.monotonic()
        for number, row in enumerate(rows, 1):
            passed, folder = time.monotonic() - start, directory / row.name
            _say(f"[{passed:5.0f} s] {number}/{len(rows)} {row.title}\n")
            folder.mkdir()
            jobs = [
                Job(row, peer, where[row.place], folder, options.seconds)
                for peer in peers
                if row.takes(peer)
            ]
            cells[row.name] = {job.peer.name: Cell() for job in jobs}
            try:
                _run_row(row, jobs, cells[row.name], options.rounds)
            except Failed as error:
                _say(f"    left out: {error}\n")


def _run_row(row: Row, jobs: Sequence[Job], cells: dict[str, Cell], rounds: int) -> None:
    """Sample all peers, interleaved round by round. The first round is thrown away."""
    with contextlib.ExitStack() as stack:
        services: list[Program] = []
        for service in row.services if jobs else ():
            services.append(service.start(jobs[0].place, jobs[0].directory))
            stack.callback(services[-1].stop)
        ready = []
        for number, job in enumerate(jobs):
            try:
                # The relays of a load run all at once, and idle but for one.
                relay = job.start([FIRST_PORT + number], row.services) if row.load else None
            except Failed as error:
                cells[job.peer.name].fault(str(error))
                continue
            if relay:
                stack.callback(relay.stop)
            ready.append(replace(job, relay=relay, services=services))
        for number in range(rounds + 1):
            # Each is first once: the one that follows an idle pause has a cooler machine.
            turn = number % max(len(ready), 1)
            for job in (*ready[turn:], *ready[:turn]):
                try:
                    sample = row.sample(job)
                except Failed as error:
                    cells[job.peer.name].fault(str(error))
                    continue
                cells[job.peer.name].add(sample | {"round": number})
                figures = "  ".join(
                    f"{sample[metric.key]:.{metric.digits}f} {metric.unit}"
                    for metric in row.metrics
                    if metric.key in sample
                )
                _say(f"    {number + 1}/{rounds + 1} {job.peer.name:14} {figures}\n")
                time.sleep(PAUSE_S)
    for name, cell in cells.items():
        cell.samples = [sample for sample in cell.samples if sample["round"]]
        for text in cell.faults:
            _say(f"    {name}: {text}\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    add = parser.add_argument
    add("--rows", default="", help=f"some of: {' '.join(ROWS)}")
    add("--peers", default="", help=f"some of: {' '.join(PEERS)}")
    add("--rounds", type=int, default=3, help="measured rounds (3); one more is thrown away")
    add("--seconds", type=float, default=1.0, help="length of a sample (1)")
    add("--core", type=int, help="keep everything on this core, where samples differ least")
    add("--output", type=Path, help="write the table into this file too")
    add("--build-only", action="store_true", help="compile the load tool, and exit")
    options = parser.parse_args()
    options.rows = options.rows.replace(",", " ").split() or list(ROWS)
    options.peers = options.peers.replace(",", " ").split() or list(PEERS)
    for unknown in [*({*options.rows} - {*ROWS}), *({*options.peers} - {*PEERS})]:
        parser.error(f"no such row or peer: {unknown}")
    if options.core not in {None, *os.sched_getaffinity(0)}:
        parser.error(f"no core {options.core} here")
    options.output = options.output and options.output.resolve()
    return options


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
