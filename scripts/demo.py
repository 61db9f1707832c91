"""Shows the ambassador at work: redis over TCP, then a DNS server over UDP (`make demo`).

In each act a client asks through the ambassador without a pause. Meanwhile the target is stopped,
another container takes its address, and the target starts again with a new one. Each line with a
sign is a check.

- Exit code 0: every check held. 1: one did not. 2: the demo cannot be shown here.
- The names of the demo's containers begin with ga_demo_. They are removed at the end, and at the
  beginning if an earlier run was killed.
- A command that is shown was run as it is shown.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import engine
import images
from debian import UnavailableError

PREFIX = "ga_demo_"
CLIENT = Path(__file__).with_name("demo_client.py")
SOCKET = "/var/run/docker.sock"
RECORD = "embassy.example"
TEXT_COLUMNS = 76
STRIP_COLUMNS = 70
BARS = "▁▂▃▄▅▆▇█"
PAUSE_S = 0.8  # the client asks this long before the restart, and after it
LISTENING_S = 10.0
# A question on its way in the moment in question belongs to neither side of it.
MOMENT_S = 0.05
COLOURED = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

failed_checks = 0


# What is printed


def paint(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if COLOURED else text


def show(text: str = "", code: str = "0", indent: str = "", end: str = "") -> None:
    """Print a paragraph; `end` stands behind each line but the last."""
    lines = textwrap.wrap(
        text, TEXT_COLUMNS, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    for number, line in enumerate(lines or [""], 1):
        more = end if number < len(lines) else ""
        print(f"  {paint(code, line + more)}" if line else "", flush=True)


def check(held: bool, text: str) -> None:
    global failed_checks  # noqa: PLW0603 - one program, one count
    failed_checks += not held
    show(f"{'✓' if held else '✗'} {text}", "32" if held else "1;31", indent="  ")


# The containers


class Docker(images.Docker):
    """The docker command as the demo uses it."""

    def output(self, *args: str) -> str:
        """Run it and return what it printed; raises UnavailableError if it fails."""
        done = self.run(*args)
        if done.returncode != 0:
            raise UnavailableError(f"docker {shlex.join(args)}\n{done.stderr.strip()}")
        return done.stdout.strip()

    def shown(self, command: str) -> str:
        show(f"$ docker {command}", "36", indent="    ", end=" \\")
        return self.output(*command.split())

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output("inspect", name))[0]
        return found

    def address(self, name: str) -> str:
        return str(self.inspect(name)["NetworkSettings"]["Networks"]["bridge"]["IPAddress"])

    def when(self, name: str, what: str) -> float:
        """Return StartedAt or FinishedAt of a container, on the wall clock."""
        return instant(self.inspect(name)["State"][what])

    def log(self, name: str) -> str:
        done = self.run("logs", "-t", name)
        return done.stdout + done.stderr

    def clear(self) -> None:
        if names := self.output("ps", "-aq", "--filter", f"name=^/{PREFIX}").split():
            self.output("rm", "-f", "-v", *names)

    def start(self, title: str, target: str, flags: str) -> None:
        """Begin an act: start a target and its ambassador, which listens when this returns."""
        show()
        show(title, "1")
        show()
        socket = self.host.removeprefix("unix://") if self.host.startswith("unix:") else SOCKET
        ambassador = f"{target}_ambassador"
        self.shown(f"run -d --name {target} {flags}")
        self.shown(
            f"run -d -v {socket}:{SOCKET} --name {ambassador} {images.AMBASSADOR} -name {target}"
        )
        deadline = time.monotonic() + LISTENING_S
        while "listening" not in (log := self.log(ambassador)):
            if time.monotonic() > deadline:
                raise UnavailableError(f"{ambassador} does not listen. It said:\n{log}")
            time.sleep(0.02)


def instant(text: str) -> float:
    """Docker's time stamps have up to nine digits of a second, and a Z."""
    return datetime.fromisoformat(text).timestamp()


# A restart under a client


class Sample(NamedTuple):
    """One question of the client."""

    begin: float
    seconds: float
    outcome: str

    @property
    def end(self) -> float:
        return self.begin + self.seconds


class Restart(NamedTuple):
    """When it happened, on the wall clock, and what the client saw."""

    stopped: float
    held: float
    started: float
    samples: list[Sample]
    port: int

    def begins(self, *outcomes: str) -> list[float]:
        return [sample.begin for sample in self.samples if sample.outcome in outcomes]


def restart(docker: Docker, target: str, kind: str, *args: str) -> Restart:
    """Restart a target at another address under a client; print what happened when."""
    ambassador = f"{target}_ambassador"
    run = ["run", "--rm", "-i", "--name", f"{target}_client", "--link", f"{ambassador}:target"]
    python = ["python3", "-c", CLIENT.read_text(), kind, "target", *args]
    client = subprocess.Popen(
        ["docker", *run, images.DEMO, *python],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **docker.environment},
    )
    assert client.stdout is not None  # noqa: S101 - it is a pipe
    client.stdout.readline()  # the first answer has come
    time.sleep(PAUSE_S)
    before, taken = docker.address(target), ""
    began = docker.when(ambassador, "StartedAt")
    places = [f"{target}_place{number}" for number in range(1, 5)]
    for place in places:
        docker.output("create", "--init", "--name", place, images.DEMO, "sleep", "infinity")
    docker.output("stop", "-t", "5", target)
    for place in places:
        # Engines differ in which free address they give: the lowest, or the next one.
        if taken != before:
            docker.output("start", place)
            taken, taken_at = docker.address(place), docker.when(place, "StartedAt")
    docker.output("start", target)
    time.sleep(PAUSE_S)
    report = json.loads(client.communicate(timeout=20)[0] or "{}")
    log = docker.log(ambassador)
    held = [instant(line.split()[0]) for line in log.splitlines() if "holding" in line]
    if not held or not report:
        raise UnavailableError(f"{ambassador} held nothing, or its client failed. Its log:\n{log}")
    stopped, started = docker.when(target, "FinishedAt"), docker.when(target, "StartedAt")
    samples = [Sample(*sample) for sample in report["samples"]]
    answered = [sample for sample in samples if sample.outcome == "ok"]
    first = min((s.end for s in answered if s.end > started), default=started)
    after = docker.address(target)
    show()
    for at, what, note in (
        (stopped, f"{target} stops", before),
        (held[-1], "the ambassador holds what comes", ""),
        (taken_at, "another container starts", taken + ", the same" * (taken == before)),
        (started, f"{target} starts again", after),
        (first, "first answer to the client", f"{(first - started) * 1000:.0f} ms later"),
    ):
        print(f"  {at - stopped:+8.2f} s  {what:<34}{paint('33', note)}".rstrip())
    show()
    strip(samples)
    show()
    check(before != after, f"{target} has moved: {before} -> {after}")
    same = docker.when(ambassador, "StartedAt") == began
    check(same, "the same ambassador, never restarted")
    waits = [s.seconds for s in answered if stopped < s.begin < started < s.end]
    longest = max(waits, default=0) * 1000
    check(
        bool(waits),
        f"{len(waits)} came meanwhile: held for {longest:.0f} ms at most, then answered",
    )
    return Restart(stopped, held[-1], started, samples, int(report["port"]))


def strip(samples: list[Sample]) -> None:
    """Print a strip of bars: how long what began in each moment waited for its answer."""
    number = max(1, min(STRIP_COLUMNS, len(samples) * 2 // 3))  # more would leave gaps
    begin = samples[0].begin
    top = max((sample.seconds for sample in samples if sample.outcome == "ok"), default=1.0)
    width = (samples[-1].begin - begin) / number or 1.0
    columns: list[list[Sample]] = [[] for _ in range(number)]
    for sample in samples:
        columns[min(number - 1, int((sample.begin - begin) / width))].append(sample)
    bars = ""
    for column in columns:
        longest = max((sample.seconds for sample in column), default=0.0)
        bar = BARS[min(len(BARS) - 1, int(longest / top * len(BARS)))] if column else " "
        bars += bar if all(sample.outcome == "ok" for sample in column) else "x"
    print(f"    {paint('34', bars)}")
    lost = ", x: no answer" if "x" in bars else ""
    width_ms, top_ms = width * 1000, top * 1000
    show(f"waits for answers; a column: {width_ms:.0f} ms, the tallest: {top_ms:.0f} ms{lost}", "2")


# The acts


def act_redis(docker: Docker) -> None:
    target = f"{PREFIX}redis"
    redis_cli = f"run --rm --link {target}_ambassador:db {images.DEMO}:redis-cli -h db"
    docker.start("1. redis, over TCP", target, f"--expose 6379 {images.DEMO}:redis")
    show(pong := docker.shown(f"{redis_cli} ping"))
    show()
    check(pong == "PONG", "a linked client reaches redis through its ambassador")
    docker.output(*redis_cli.split(), "set", "envoy", "Gaius")
    show()
    show("A client connects every 10 ms and asks PING, while redis is restarted:")
    seen = restart(docker, target, "redis", "6379", "0.01")
    refused, late = len(seen.begins("refused")), len(seen.begins("timeout"))
    check(
        refused + late + len(seen.begins("wrong")) == 0,
        f"{len(seen.samples)} connects: {refused} refused, {late} timed out",
    )
    cut = seen.begins("cut")
    cut_later = sum(begin > seen.stopped + MOMENT_S for begin in cut)
    check(cut_later == 0, f"cut: {len(cut) - cut_later} as redis died, {cut_later} later")
    value = docker.output(*redis_cli.split(), "get", "envoy")
    check(value == "Gaius", "the key that was written before is still there")


def act_dns(docker: Docker) -> None:
    target = f"{PREFIX}dns"
    flags = f"--expose 53/udp {images.DEMO}:dnsmasq --host-record={RECORD},203.0.113.53"
    docker.start("2. dnsmasq, over UDP", target, flags)
    show()
    show(f"A client asks for {RECORD} every 50 ms, from one socket, while dnsmasq is restarted:")
    seen = restart(docker, target, "dns", "53", "0.05", RECORD)
    lost = seen.begins("lost")
    lost_later = sum(begin > seen.held + MOMENT_S for begin in lost)
    check(
        lost_later == 0 and not seen.begins("wrong"),
        f"{len(seen.samples)} queries; lost: {len(lost) - lost_later} until the ambassador knew "
        f"of the death, {lost_later} later",
    )
    answered = sum(begin > seen.started for begin in seen.begins("ok"))
    check(answered > 0, f"the client kept its socket (port {seen.port}): {answered} answers since")


def perform(docker: Docker) -> None:
    begin = time.monotonic()
    version = docker.output("version", "--format", "{{.Server.Version}}")
    show()
    show(f"The Grand Ambassador, on Docker Engine {version}", "1")
    show()
    show(
        "Clients talk to an ambassador. It follows its target through restarts, so that they need "
        "not know when the target gets a new address."
    )
    act_redis(docker)
    act_dns(docker)
    if failed_checks:
        for target in ("redis", "dns"):
            print(docker.log(f"{PREFIX}{target}_ambassador"))
    result = f"{failed_checks} checks failed" if failed_checks else "Everything held"
    show()
    show(f"{result}, in {time.monotonic() - begin:.1f} s", "1;31" if failed_checks else "1;32")
    show()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        docker = Docker(engine.up())
        images.make(docker)
        docker.clear()
        try:
            perform(docker)
        finally:
            docker.clear()
    except (UnavailableError, OSError, subprocess.TimeoutExpired) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 1 if failed_checks else 0


if __name__ == "__main__":
    sys.exit(main())
