"""`python -m bench.calls`: what a relay asks of the kernel for each unit of work, and where its time goes.

Times on a shared machine swing; counts do not. Needs root and Linux's perf: calls are counted at the
kernel's tracepoints, time is sampled by the clock, so that no counter of the processor is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import ground, measure
from bench.install import build, install
from bench.loads import Aim, Result
from bench.peers import PEERS, Peer, Relay, Route
from bench.places import LOOPBACK, Place
from bench.processes import Failed
from bench.rows import ROWS, Row

PORT = 17_900
SECONDS = 3.0
SETTLE_S = (
    0.5  # a port is open before the processes behind it are, and perf starts before it counts
)
SAMPLES_A_SECOND = 4000
RARE = 0.01  # calls a unit, or a share of the time: what is less is summed up
CALLS = (
    "accept", "accept4", "close", "connect", "epoll_ctl", "epoll_pwait", "epoll_wait", "fcntl", "futex",
    "getpeername", "getsockname", "getsockopt", "ioctl", "nanosleep", "pipe2", "poll", "ppoll", "pselect6",
    "read", "readv", "recvfrom", "recvmmsg", "recvmsg", "sched_yield", "select", "sendmmsg", "sendmsg",
    "sendto", "setsockopt", "shutdown", "socket", "splice", "timerfd_settime", "write", "writev",
)  # fmt: skip
ALL = "raw_syscalls:sys_enter"


@dataclass(frozen=True)
class Counted:
    """One relay in one row: calls by name, and each call's share of the time."""

    units: float
    calls: dict[str, float]
    shares: dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.calls", description=__doc__)
    parser.add_argument("--rows", default="redis1 http bulk1 bulk8 udp64")
    parser.add_argument("--peers", default="ambassador haproxy nginx docker-proxy")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each of two loads")
    parser.add_argument("--no-install", action="store_true", help="use what is installed and built")
    parser.add_argument(
        "--congestion", default=ground.CONGESTION, help="the TCP congestion control"
    )
    options = parser.parse_args()
    names = [text.replace(",", " ").split() for text in (options.rows, options.peers)]
    for given, known in zip(names, (ROWS, PEERS), strict=True):
        for name in given:
            if name not in known:  # type: ignore[operator]
                parser.error(f"no such row or peer: {name}")
    if not (options.no_install or ground.inside()):
        build()
        install()
    ground.stand(options.congestion)
    print("A unit is a request, a round trip, a datagram there and back; of bulk rows a MB.")
    for name in names[0]:
        row = ROWS[name]
        print(f"\n## {row.title}\n")
        table = {
            peer: counted
            for peer in names[1]
            if row.takes(PEERS[peer]) and (counted := _count(row, PEERS[peer], options.seconds))
        }
        print("\n".join(_lines(table)), flush=True)
    return 0


def _count(row: Row, peer: Peer, seconds: float) -> Counted | None:
    """None, and a line that says why, where the relay or perf fails."""
    try:
        with tempfile.TemporaryDirectory() as name, _running(row, peer, Path(name)) as aim:
            assert row.load is not None
            pids = ",".join(map(str, measure.tree(aim.pids)))
            with _perf("stat", "-x", ";", "-p", pids, "-e", _events()) as counter:
                result = row.load(aim, seconds)
            calls = _counts(counter())
            record = Path(name) / "perf.data"
            options = ["-q", "-g", "-F", str(SAMPLES_A_SECOND), "-e", "cpu-clock", "-p", pids]
            with _perf("record", *options, "-o", str(record)):
                row.load(aim, seconds)
            return Counted(_units(row, result), calls, _shares(record))
    except Failed as error:
        print(f"{peer.name}: {error}", file=sys.stderr)
        return None


def _units(row: Row, result: Result) -> float:
    return result["units"] / 1e6 if row.per == 1e9 else result["units"]  # bytes: MB


@contextlib.contextmanager
def _running(row: Row, peer: Peer, directory: Path) -> Iterator[Aim]:
    place: Place = LOOPBACK
    service = row.service.start(place, directory)
    try:
        route = Route(row.service.protocol, PORT, place.server_address, row.service.port)
        relay = Relay(peer, place, [route], directory / peer.name)
        relay.wait()
        time.sleep(SETTLE_S)
        try:
            yield Aim(place, place.relay_address, PORT, relay.pids)
        finally:
            relay.stop()
    finally:
        service.stop()


def _events() -> str:
    return ",".join([ALL, *(f"syscalls:sys_enter_{call}" for call in CALLS)])


class _Perf:
    """One run of perf; called when it is over, it gives what perf said."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._text = ""

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)  # perf writes what it has
        self._text = self._process.communicate(timeout=30)[1]

    def __call__(self) -> str:
        return self._text


@contextlib.contextmanager
def _perf(*arguments: str) -> Iterator[_Perf]:
    try:
        run = _Perf(["perf", *arguments])
    except FileNotFoundError as error:
        raise Failed("perf is missing: apt-get install linux-perf") from error
    time.sleep(SETTLE_S)
    try:
        yield run
    finally:
        run.end()


def _counts(text: str) -> dict[str, float]:
    calls = {}
    for line in text.splitlines():
        fields = line.split(";")
        if len(fields) > 2 and fields[0].isdigit():
            calls[fields[2].removeprefix("syscalls:sys_enter_")] = float(fields[0])
    if ALL not in calls:
        raise Failed(f"perf stat counts no system calls: {text.strip()[:200]}")
    calls["others"] = calls[ALL] - sum(calls[call] for call in CALLS if call in calls)
    return calls


def _shares(record: Path) -> dict[str, float]:
    """Of the samples, by the system call that they were taken in."""
    command = ["perf", "report", "-i", str(record), "--children", "-g", "none"]
    text = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    ).stdout
    found = re.findall(r"^ +([\d.]+)% .*\[k\] __(?:x64|arm64)_sys_(\w+)$", text, re.MULTILINE)
    return {call: float(share) / 100 for share, call in found}


def _lines(table: dict[str, Counted]) -> list[str]:
    if not table:
        return ["(nothing was counted)"]
    called = {
        call: max(one.calls.get(call, 0) / one.units for one in table.values())
        for call in [*CALLS, "others"]
    }
    shown = sorted(
        (call for call in called if called[call] >= RARE), key=lambda call: -called[call]
    )
    lines = [
        f"| calls a unit (share of the relay's time) | {' | '.join(table)} |",
        f"|---|{'---:|' * len(table)}",
    ]
    for call in shown:
        cells = []
        for one in table.values():
            share = one.shares.get(call, 0)
            text = f"{one.calls.get(call, 0) / one.units:.2f}"
            cells.append(f"{text} ({share:.0%})" if share >= RARE else text)
        lines.append(f"| {call} | {' | '.join(cells)} |")
    total = (f"{one.calls[ALL] / one.units:.2f}" for one in table.values())
    return [*lines, f"| all | {' | '.join(total)} |"]


if __name__ == "__main__":
    sys.exit(main())
