"""Shows the ambassador at work: redis over TCP, then a DNS server over UDP, each restarted under it.

    python3 scripts/demo.py        (make demo)

In each act a client talks through the ambassador without a pause while the target is stopped, another
container takes its address, and the target starts again with a new one. The client reports what it
saw. Standard library only, and the docker command.

Invariants:

- Exit code 0 means that every line marked as a check held; 1 that one did not; 2 that there was
  nothing to show it with (no Engine, no image).
- Containers of the demo have names that begin with `ga_demo_`. They are removed at the end, and at the
  beginning where an earlier run was killed.
- What is printed as a command is what was run.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
import images
from debian import UnavailableError

PREFIX = "ga_demo_"
CLIENT = Path(__file__).with_name("demo_client.py")
SOCKET_INSIDE = "/var/run/docker.sock"

REDIS_PORT = 6379
DNS_PORT = 53
CONNECT_EVERY_S = 0.01
QUERY_EVERY_S = 0.05
KEYS = {"capital": "Lutetia", "envoy": "Gaius", "treaty": "signed"}
RECORD, RECORD_ADDRESS = "embassy.example", "203.0.113.53"

BEFORE_S = 0.8  # the client talks this long before the restart, and after it
LISTENING_S = 10.0
STRIP_COLUMNS = 72
CLIENT_END_S = 20.0

# What was on its way in the moment in question belongs to neither side of it.
MOMENT_S = 0.05


class FailedError(Exception):
    """The demo cannot go on."""


@dataclass
class Column:
    """What began in one span of time."""

    answered: int = 0
    unanswered: int = 0
    longest: float = 0.0


class Show:
    """Printing: colour only for a person at a terminal, and signs that the terminal can show."""

    def __init__(self) -> None:
        wants_none = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self._colour = sys.stdout.isatty() and not wants_none
        self._unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        self._begin = time.monotonic()
        self.failed = 0

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def line(self, text: str = "") -> None:
        print(f"  {text}" if text else "", flush=True)

    def title(self, text: str) -> None:
        self.line()
        self.line(self._paint("1", text))
        self.line()

    def command(self, words: Sequence[str]) -> None:
        lines = textwrap.wrap(
            "$ " + shlex.join(words), 100, break_long_words=False, break_on_hyphens=False
        )
        for number, line in enumerate(lines):
            more = " \\" if number < len(lines) - 1 else ""
            self.line(self._paint("36", f"{'    ' if number else ''}{line}{more}"))

    def dim(self, text: str) -> None:
        self.line(self._paint("2", text))

    def moment(self, at: float, what: str, address: str = "", note: str = "") -> None:
        """One line of the timeline."""
        line = f"  {at:+6.2f} s  {what:<36}{self._paint('33', f'{address:<14}')} {note}"
        self.line(line.rstrip())

    def check(self, held: bool, text: str) -> None:
        if held:
            self.line(f"{self._paint('32', '✓' if self._unicode else 'ok')} {text}")
        else:
            self.failed += 1
            self.line(f"{self._paint('1;31', '✗' if self._unicode else 'NO')} {text}")

    def waits(self, columns: Sequence[Column], width_s: float, what: str) -> None:
        """A strip of bars: how long what began in each moment had to wait for its answer."""
        bars = "▁▂▃▄▅▆▇█" if self._unicode else "_.-=+*%#"
        top = max((c.longest for c in columns), default=0.0) or 1.0
        strip = ""
        for column in columns:
            if column.unanswered:
                strip += self._paint("31", "x")
            elif column.answered:
                bar = bars[min(len(bars) - 1, int(column.longest / top * len(bars)))]
                strip += self._paint("34", bar)
            else:
                strip += " "
        self.line(f"  {strip}")
        lost = ", x: no answer" if any(c.unanswered for c in columns) else ""
        self.dim(f"  {what}")
        self.dim(f"  one column: {width_s * 1000:.0f} ms, the tallest: {top * 1000:.0f} ms{lost}")

    def end(self) -> int:
        took = time.monotonic() - self._begin
        self.line()
        if self.failed:
            noun = "thing" if self.failed == 1 else "things"
            self.line(
                self._paint("1;31", f"{self.failed} {noun} did not hold.") + f"  {took:.1f} s"
            )
            return 1
        self.line(self._paint("1;32", "Everything held.") + f"  {took:.1f} s")
        self.line()
        return 0


class Cast:
    """The containers of the demo, by the docker command."""

    def __init__(self, docker: images.Docker, show: Show) -> None:
        self._show = show
        self._environment = docker.environment
        self._program = str(docker.program)
        host = docker.host
        self.socket = host.removeprefix("unix://") if host.startswith("unix://") else SOCKET_INSIDE

    def quiet(self, *args: str, check: bool = True) -> str:
        """The docker command, not shown; its output."""
        done = subprocess.run(
            [self._program, *args],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env=self._environment,
        )
        if check and done.returncode != 0:
            raise FailedError(f"docker {shlex.join(args)}\n{done.stderr.strip()}")
        return done.stdout.strip()

    def shown(self, line: str) -> str:
        """The docker command as a person types it; its output."""
        words = line.split()
        self._show.command(words)
        return self.quiet(*words[1:])

    def clear(self) -> None:
        names = self.quiet("ps", "-aq", "--filter", f"name=^/{PREFIX}").split()
        if names:
            self.quiet("rm", "-f", "-v", *names)

    def inspect(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.quiet("inspect", name))[0]
        return document

    def address(self, name: str) -> str:
        networks = self.inspect(name)["NetworkSettings"]["Networks"]
        return str(networks["bridge"]["IPAddress"])

    def when(self, name: str, what: str) -> float:
        """StartedAt or FinishedAt of a container, on the wall clock."""
        return _instant(self.inspect(name)["State"][what])

    def died(self, name: str) -> float:
        """When Docker last told of a container's death, on the wall clock."""
        filters = ("--filter", f"container={name}", "--filter", "event=die")
        # Not `--until 0s`: the CLI cuts that to the whole second, and what happened in this one is left out.
        span = ("--since", "5m", "--until", f"{time.time():.9f}", "--format", "{{.TimeNano}}")
        return int(self.quiet("events", *filters, *span).split()[-1]) / 1e9

    def held(self, ambassador: str) -> float:
        """When an ambassador last said that it holds what comes, on the wall clock."""
        lines = self._both("logs", "-t", ambassador).splitlines()
        held = [line for line in lines if "holding" in line]
        if not held:
            raise FailedError(f"{ambassador} never held anything. It said:\n" + "\n".join(lines))
        return _instant(held[-1].split()[0])

    def wait_for_listening(self, name: str) -> None:
        """The three lines of the example, typed by hand, leave the ambassador the time to start."""
        deadline = time.monotonic() + LISTENING_S
        while "listening" not in self._both("logs", name):
            if time.monotonic() > deadline or not self.inspect(name)["State"]["Running"]:
                raise FailedError(f"{name} does not listen. It said:\n{self._both('logs', name)}")
            time.sleep(0.02)

    def _both(self, *args: str) -> str:
        done = subprocess.run(
            [self._program, *args],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
        )
        return done.stdout

    def logs(self) -> str:
        """What the ambassadors said, for when something did not hold."""
        names = self.quiet("ps", "-a", "--filter", "name=_ambassador$", "--format", "{{.Names}}")
        return "\n".join(
            self._both("logs", name) for name in names.split() if name.startswith(PREFIX)
        )

    def start_client(self, name: str, link: str, *args: str) -> Client:
        return Client(
            [
                *(self._program, "run", "--rm", "-i", "--name", name, "--link", link, images.DEMO),
                *("python3", "-c", CLIENT.read_text(), *args),
            ],
            self._environment,
        )


@dataclass(frozen=True)
class Sample:
    """One question of a client: when it began, how long it took, how it ended."""

    begin: float
    seconds: float
    outcome: str

    @property
    def end(self) -> float:
        return self.begin + self.seconds


class Client:
    """scripts/demo_client.py in a container, until `finish`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()  # the line that says it is ready

    def finish(self) -> tuple[list[Sample], int]:
        """Its samples, and the port of its own socket."""
        assert self._process.stdin is not None  # noqa: S101  (PIPE was asked for)
        self._process.stdin.close()
        report = self._read()
        self._process.wait(CLIENT_END_S)
        return [Sample(*sample) for sample in report["samples"]], int(report["port"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101  (PIPE was asked for)
        line = self._process.stdout.readline()
        if not line:
            raise FailedError(f"the client ended with exit code {self._process.wait()}")
        report: dict[str, Any] = json.loads(line)
        return report


@dataclass(frozen=True)
class Restart:
    """What happened to a target, on the wall clock."""

    stopped: float
    reported: float
    held: float
    taken: float
    started: float
    before: str
    place: str
    after: str


def restart_elsewhere(cast: Cast, target: str) -> Restart:
    """Stop the target, give its address to another container, start the target again."""
    before = cast.address(target)
    places = [f"{target}_place{n}" for n in range(1, 5)]
    for place in places:
        command = ("sleep", "infinity")
        cast.quiet("create", "--init", "--name", place, images.DEMO, *command)
    cast.quiet("stop", "-t", "5", target)
    for place in places:
        # Engines differ in which free address they give next: the lowest, or the one after the last.
        cast.quiet("start", place)
        if cast.address(place) == before:
            break
    taken = cast.when(place, "StartedAt")
    cast.quiet("start", target)
    return Restart(
        stopped=cast.when(target, "FinishedAt"),
        reported=cast.died(target),
        held=cast.held(f"{target}_ambassador"),
        taken=taken,
        started=cast.when(target, "StartedAt"),
        before=before,
        place=cast.address(place),
        after=cast.address(target),
    )


def play(
    show: Show, cast: Cast, target: str, start_client: Callable[[], Client]
) -> tuple[Restart, list[Sample], int]:
    """Run a client, restart the target under it, print the timeline."""
    client = start_client()
    time.sleep(BEFORE_S)
    restart = restart_elsewhere(cast, target)
    time.sleep(BEFORE_S)
    samples, port = client.finish()
    zero = restart.stopped
    ends = [s.end for s in samples if s.outcome == "ok" and s.end > restart.started]
    first = min(ends, default=None)
    show.line()
    show.moment(0, f"{target} stops", restart.before)
    note = "its address has another owner" if restart.place == restart.before else ""
    show.moment(restart.reported - zero, "Docker says so")
    show.moment(restart.held - zero, "the ambassador holds what comes")
    show.moment(restart.taken - zero, "another container starts", restart.place, note)
    show.moment(restart.started - zero, f"{target} starts again", restart.after)
    if first is not None:
        later = (first - restart.started) * 1000
        show.moment(
            first - zero, "first answer through the ambassador", "", f"{later:.0f} ms later"
        )
    show.line()
    return restart, samples, port


def strip(samples: Sequence[Sample]) -> tuple[list[Column], float]:
    """The samples by equal spans of time, and how long a span is."""
    number = max(1, min(STRIP_COLUMNS, len(samples) * 2 // 3))  # more would leave gaps
    begin = samples[0].begin
    width = (samples[-1].begin - begin) / number or 1.0
    columns = [Column() for _ in range(number)]
    for sample in samples:
        column = columns[min(number - 1, int((sample.begin - begin) / width))]
        if sample.outcome == "ok":
            column.answered += 1
            column.longest = max(column.longest, sample.seconds)
        else:
            column.unanswered += 1
    return columns, width


def act_redis(show: Show, cast: Cast) -> None:
    target, ambassador = f"{PREFIX}redis", f"{PREFIX}redis_ambassador"
    link = f"{ambassador}:db"
    ping = f"docker run --rm --link {link} {images.DEMO}:redis-cli -h db ping"
    show.title("1. redis, over TCP")
    cast.shown(f"docker run -d --expose {REDIS_PORT} --name {target} {images.DEMO}:redis")
    cast.shown(
        f"docker run -d -v {cast.socket}:{SOCKET_INSIDE} --name {ambassador} "
        f"{images.AMBASSADOR} -name {target}"
    )
    cast.wait_for_listening(ambassador)
    pong = cast.shown(ping)
    show.line(pong)
    show.line()
    show.check(pong == "PONG", "a linked client reaches redis through its ambassador")

    cli = ("run", "--rm", "--link", link, f"{images.DEMO}:redis-cli", "-h", "db")
    wrote = cast.quiet(*cli, "mset", *(word for pair in KEYS.items() for word in pair))
    show.check(wrote == "OK", f"{len(KEYS)} keys written: {', '.join(KEYS)}")
    show.line()
    show.line(
        f"A client opens a new connection every {CONNECT_EVERY_S * 1000:.0f} ms and asks PING, while "
        "redis is restarted:"
    )
    started = cast.when(ambassador, "StartedAt")
    args = ("redis", "db", str(REDIS_PORT), str(CONNECT_EVERY_S))
    restart, samples, _ = play(
        show, cast, target, lambda: cast.start_client(f"{PREFIX}redis_client", link, *args)
    )
    show.waits(*strip(samples), "how long a connect waited for its PONG")
    show.line()

    count = _counts(samples)
    show.check(restart.before != restart.after, f"redis moved: {restart.before} -> {restart.after}")
    show.check(
        count["refused"] == count["timeout"] == count["wrong"] == 0 and count["ok"] > 0,
        f"{len(samples)} connects: {count['refused']} refused, {count['timeout']} timed out",
    )
    held = [s.seconds for s in samples if s.outcome == "ok" and _spans(s, restart)]
    show.check(
        bool(held),
        f"{len(held)} of them came while redis was away and were held, "
        f"the longest for {max(held, default=0) * 1000:.0f} ms, then answered",
    )
    cut = [s for s in samples if s.outcome == "cut"]
    cut_later = [s for s in cut if s.begin > restart.stopped + MOMENT_S]
    show.check(
        not cut_later,
        f"conversations cut: {len(cut) - len(cut_later)} as redis died in the middle of them, "
        f"{len(cut_later)} later",
    )
    read = cast.quiet(*cli, "mget", *KEYS).split()
    show.check(read == list(KEYS.values()), f"the keys are still there: {', '.join(read)}")
    pong = cast.shown(ping)
    show.line(pong)
    same = cast.when(ambassador, "StartedAt") == started
    show.check(pong == "PONG" and same, "the same ambassador, which was never restarted")


def act_dns(show: Show, cast: Cast) -> None:
    target, ambassador = f"{PREFIX}dns", f"{PREFIX}dns_ambassador"
    show.title("2. dnsmasq, over UDP")
    cast.shown(
        f"docker run -d --expose {DNS_PORT}/udp --name {target} {images.DEMO}:dnsmasq "
        f"--host-record={RECORD},{RECORD_ADDRESS}"
    )
    cast.shown(
        f"docker run -d -v {cast.socket}:{SOCKET_INSIDE} --name {ambassador} "
        f"{images.AMBASSADOR} -name {target}"
    )
    cast.wait_for_listening(ambassador)
    show.line()
    show.line(
        f"A client asks for {RECORD} every {QUERY_EVERY_S * 1000:.0f} ms, always from one socket, while "
        "dnsmasq is restarted:"
    )
    started = cast.when(ambassador, "StartedAt")
    args = ("dns", "ns", str(DNS_PORT), str(QUERY_EVERY_S), RECORD)
    restart, samples, port = play(
        show,
        cast,
        target,
        lambda: cast.start_client(f"{PREFIX}dns_client", f"{ambassador}:ns", *args),
    )
    show.waits(*strip(samples), "how long a query waited for its answer")
    show.line()

    count = _counts(samples)
    lost = [s for s in samples if s.outcome in ("lost", "refused")]
    lost_later = [s for s in lost if s.begin > restart.held + MOMENT_S]
    kept = [s.seconds for s in samples if s.outcome == "ok" and _spans(s, restart)]
    after = [s for s in samples if s.outcome == "ok" and s.begin > restart.started]
    show.check(
        restart.before != restart.after, f"dnsmasq moved: {restart.before} -> {restart.after}"
    )
    show.check(
        bool(after),
        f"the client's socket (port {port}) stayed open: {len(after)} queries answered after the move",
    )
    show.check(
        not lost_later and count["wrong"] == 0,
        f"{len(samples)} queries; lost: {len(lost) - len(lost_later)} until the ambassador knew that "
        f"dnsmasq had died, {len(lost_later)} later",
    )
    show.check(
        bool(kept),
        f"{len(kept)} came while dnsmasq was away and were kept for it, "
        f"the longest for {max(kept, default=0) * 1000:.0f} ms",
    )
    same = cast.when(ambassador, "StartedAt") == started
    show.check(same, "the same ambassador, which was never restarted")


def _spans(sample: Sample, restart: Restart) -> bool:
    """True for what began while the target was away and was answered when it was back."""
    return restart.stopped < sample.begin < restart.started < sample.end


def _counts(samples: Sequence[Sample]) -> dict[str, int]:
    known = ("ok", "refused", "timeout", "cut", "lost", "wrong")
    return {name: sum(s.outcome == name for s in samples) for name in known}


def _instant(text: str) -> float:
    """Docker's time stamps have nanoseconds, and one to nine digits of them."""
    match = re.fullmatch(r"(.*?)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", text)
    if match is None:
        raise FailedError(f"Docker gave a time that is none: {text}")
    whole = datetime.datetime.fromisoformat(match[1] + match[3].replace("Z", "+00:00"))
    return whole.timestamp() + float(f"0.{match[2] or 0}")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        docker = images.Docker(engine.up())
        images.make(docker, ("base", "ambassador", "demo"))
    except (UnavailableError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    show = Show()
    cast = Cast(docker, show)
    try:
        cast.clear()
        version = cast.quiet("version", "--format", "{{.Server.Version}}")
        show.title(f"The Grand Ambassador, on Docker Engine {version}")
        show.line(
            "Clients talk to an ambassador. It follows its target through restarts, so that they"
        )
        show.line("need not know when the target gets a new address.")
        act_redis(show, cast)
        act_dns(show, cast)
        if show.failed:
            show.title("What the ambassadors said")
            print(cast.logs())
        return show.end()
    except (FailedError, subprocess.TimeoutExpired) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        with contextlib.suppress(FailedError, subprocess.TimeoutExpired):
            cast.clear()


if __name__ == "__main__":
    sys.exit(main())
