"""`python -m bench`: runs rows against peers and writes what came of it. See README.md."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

from bench import ground
from bench.install import build, install
from bench.peers import PEERS
from bench.rows import ROWS

QUICK_PEERS = ("direct", "ambassador", "haproxy", "haproxy-auto", "nginx", "docker-proxy")

QUICK_WITHOUT = (
    "bulk1r",
    "ping16k",
    "veth-redis1",
    "veth-ping64",
)  # beside slow rows: their likes remain


def main() -> int:
    options = _options()
    if not (options.no_install or options.redraw or ground.inside()):
        build()
        install()
    if options.core is not None:
        try:
            os.sched_setaffinity(0, {options.core})  # which everything that is started inherits
        except (OSError, ValueError):
            print(f"no core {options.core} here", file=sys.stderr)
            return 2
    if not options.redraw:
        ground.stand(options.congestion)
    # After the build: these import the load generator.
    from bench.report import redraw, write  # noqa: PLC0415
    from bench.run import Run  # noqa: PLC0415

    if options.redraw:
        print(*redraw(Path(options.output)), sep="\n")
        return 0
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        run = Run(
            rows=[ROWS[name] for name in options.rows],
            peers=[PEERS[name] for name in options.peers],
            rounds=options.rounds,
            directory=Path(directory),
            scale=options.scale,
            minutes=options.minutes,
        )
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # so that what was started is ended
        try:
            run.all()
        except KeyboardInterrupt:
            print("stopped; writing what there is", file=sys.stderr)
    for path in write(run, Path(options.output)):
        print(path)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rows", default="", help=f"some of: {' '.join(ROWS)}")
    parser.add_argument("--peers", default="", help=f"some of: {' '.join(PEERS)}")
    parser.add_argument(
        "--rounds", type=int, default=0, help="measured rounds (3); one more is thrown away"
    )
    parser.add_argument(
        "--minutes", type=float, default=0, help="what has not started by then is left out (25)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the length of every sample"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rows, peers and rounds: about 4 minutes"
    )
    parser.add_argument("--no-install", action="store_true", help="use what is installed and built")
    parser.add_argument(
        "--congestion", default=ground.CONGESTION, help="the TCP congestion control (cubic)"
    )
    parser.add_argument(
        "--core", type=int, help="keep everything on this core, where samples differ least"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="table and picture of the last record"
    )
    parser.add_argument("--output", default="docs/performance", help="the folder to write into")
    options = parser.parse_args()
    rows = [
        row.name
        for row in ROWS.values()
        if not (options.quick and (row.slow or row.name in QUICK_WITHOUT))
    ]
    peers = QUICK_PEERS if options.quick else tuple(PEERS)
    options.rows = _chosen(parser, options.rows, ROWS) or rows
    options.peers = _chosen(parser, options.peers, PEERS) or peers
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.minutes = options.minutes or (4 if options.quick else 25)
    if options.quick and options.scale == 1.0:
        options.scale = 0.6
    return options


def _chosen(parser: argparse.ArgumentParser, text: str, known: object) -> list[str]:
    names = text.replace(",", " ").split()
    for name in names:
        if name not in known:  # type: ignore[operator]
            parser.error(f"no such row or peer: {name}")
    return names


if __name__ == "__main__":
    sys.exit(main())
