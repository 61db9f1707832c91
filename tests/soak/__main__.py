"""`python -m tests.soak MINUTES [--seed N] [--write FOLDER]`: an ambassador under clients and under chaos.

The ambassador runs on this machine beside a daemon of its own (which may be killed); the target and the
intruders that take its old addresses are containers of that daemon. Exit code 1 where an invariant
failed: a connection refused, cut without a reset, reset without a reason, stuck, or given a stranger's
or altered bytes; descriptors left open at rest; memory that grew.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.soak import clients, picture, samples
from tests.soak.chaos import Chaos, create_server
from tests.soak.clients import FATAL, NAME, Tally
from tests.soak.samples import KINDS, Sample
from tests.support.engine import Engine, Stage, make_images, start_engine
from tests.support.net import free_port
from tests.support.own_engine import OwnEngine
from tests.support.program import Program
from tests.support.wait import wait_until

SAMPLE_S = 1.0
SAY_S = 5.0
REST_S = 110.0
"""UDP sessions live 90 s after their last datagram; then the ambassador is at rest."""

POOLED_PIPES = 64
"""Descriptors that a TCP worker may keep for its next bulk streams."""

PARENT_SPARE = 6
"""Connections to the daemon that the parent keeps for its next questions, one to a thread at most."""


class Soak:
    """One run: what it looks at and what it says."""

    def __init__(self, minutes: float, seed: int) -> None:
        self.minutes, self.seed = minutes, seed
        self.tally = Tally()
        self.samples: list[Sample] = []
        self.failures: list[str] = []
        self.begun = 0.0

    def run(self, stage: Stage, own: OwnEngine) -> None:
        port = free_port()
        target = create_server(stage, "db", NAME.decode(), port)
        target.start()
        ambassador = stage.run_ambassador_on_host("-name", target.name)
        ambassador.wait_for_line("listening.*udp|listening.*tcp", 20)
        chaos = Chaos(stage, own, ambassador, target, port=port, tally=self.tally, seed=self.seed)
        chaos.probe_watchdog()
        time.sleep(1)
        self.begun = chaos.begun = time.monotonic()
        rest = samples.look(ambassador.pid, 0.0)
        stopping = threading.Event()
        threads = [
            threading.Thread(target=self._do, args=(chaos, stopping)),
            threading.Thread(target=self._watch, args=(ambassador, stopping)),
        ]
        for thread in threads:
            thread.start()
        try:
            asyncio.run(self._serve_clients(port, stopping))
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        self._rest(ambassador, rest)
        self._judge(rest)
        self.chaos = chaos
        self.log = list(ambassador.lines)

    async def _serve_clients(self, port: int, stopping: threading.Event) -> None:
        stop = asyncio.Event()
        tasks = clients.start(port, self.tally, stop, self.seed)
        end = time.monotonic() + 60 * self.minutes
        while time.monotonic() < end and not stopping.is_set():
            await asyncio.sleep(0.2)
            for task in tasks:
                if task.done():
                    task.result()  # a client that ended was broken: say how
        stopping.set()  # no more chaos; conversations that are open come to their end
        await asyncio.sleep(clients.GIVE_UP_S / 10)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*tasks), clients.GIVE_UP_S * 2)

    def _do(self, chaos: Chaos, stopping: threading.Event) -> None:
        dice = random.Random(self.seed + 1)
        try:
            while not stopping.wait(dice.uniform(1, 5)):
                chaos.step()
        except Exception:  # noqa: BLE001 - chaos that cannot go on is a failed run
            self.failures.append(f"chaos: {traceback.format_exc()}")
            stopping.set()

    def _watch(self, ambassador: Program, stopping: threading.Event) -> None:
        say_at = 0.0
        while not stopping.wait(SAMPLE_S):
            sample = samples.look(ambassador.pid, time.monotonic() - self.begun)
            self.samples.append(sample)
            if sample.at >= say_at:
                say_at = sample.at + SAY_S
                counts = self.tally.counts
                bad = {kind: counts[kind] for kind in FATAL if counts[kind]}
                print(
                    f"{sample.at:5.0f} s  {counts['connections']} connections,"
                    f" {counts['bytes'] / 1e6:.0f} MB, {counts['datagrams answered']} datagrams,"
                    f" {counts['restarts']} restarts, {counts['worker killed']} workers killed,"
                    f" {counts['daemon bounced']} bounces,"
                    f" {sum(sample.values[f'{k} PSS'] for k in KINDS) / 1e6:.1f} MB PSS"
                    f"  {bad or 'no finding'}",
                    flush=True,
                )

    def _rest(self, ambassador: Program, rest: Sample) -> None:
        """Until the workers' descriptors are what they were, for as long as sessions may live."""
        most = rest.values["workers descriptors"] + POOLED_PIPES

        def at_rest() -> bool:
            self.last = samples.look(ambassador.pid, time.monotonic() - self.begun)
            return self.last.values["workers descriptors"] <= most

        try:
            wait_until(at_rest, "the workers' descriptors", REST_S, 1.0)
        except AssertionError:
            pass  # judged below

    def _judge(self, rest: Sample) -> None:
        for kind in FATAL:
            if self.tally.counts[kind]:
                self.failures.append(f"{kind}: {self.tally.counts[kind]}")
        for kind in KINDS:
            allowed = {"parent": PARENT_SPARE, "fork server": 0, "workers": POOLED_PIPES}[kind]
            left = self.last.values[f"{kind} descriptors"] - rest.values[f"{kind} descriptors"]
            self.tally.counts[f"{kind} descriptors left"] = left
            if left > allowed:
                self.failures.append(f"{left} descriptors more than at first: {kind}")
            before, after = samples.drift(self.samples, kind)
            if samples.has_grown(before, after):
                self.failures.append(f"{kind} grew from {before / 1e6:.1f} to {after / 1e6:.1f} MB")

    # The end

    def table(self) -> str:
        counts, chaos = self.tally.counts, self.chaos
        rows = [
            ("minutes, seed", f"{self.minutes:g}, {self.seed}"),
            ("connections", f"{counts['connections']:,}"),
            ("of these complete, every byte checked", f"{counts['complete']:,}"),
            ("of these reset, each during a restart or a kill", f"{counts['reset']:,}"),
            ("bytes checked", f"{counts['bytes']:,}"),
            ("datagrams sent", f"{counts['datagrams sent']:,}"),
            ("datagrams answered", f"{counts['datagrams answered']:,}"),
            ("restarts of the target", f"{counts['restarts']:,}"),
            ("of these to another address, an intruder on the old one", f"{chaos.moved:,}"),
            ("workers killed", f"{counts['worker killed']:,}"),
            (
                "workers stopped too",
                "yes" if chaos.has_watchdog else "no: nothing notices that yet",
            ),
            ("daemon killed and started", f"{counts['daemon bounced']:,}"),
            ("from the daemon's return to `connected to Docker again`", _times(chaos, "daemon")),
            ("from a start of the target to the first answer", _times(chaos, "restart")),
            *((kind, f"{counts[kind]:,}") for kind in FATAL),
        ]
        for kind in KINDS:
            before, after = samples.drift(self.samples, kind)
            left = counts[f"{kind} descriptors left"]
            rows.append(
                (f"{kind}: PSS early, at the end", f"{before / 1e6:.2f}, {after / 1e6:.2f} MB")
            )
            rows.append((f"{kind}: descriptors more at rest than before", f"{left}"))
        return "\n".join(["| what | value |", "|---|---:|", *(f"| {a} | {b} |" for a, b in rows)])

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{self.minutes:g} minutes under restarts, kills and daemon bounces"
        (folder / "soak.svg").write_text(picture.draw(self.samples, self.chaos.marks, title))
        (folder / "soak-table.md").write_text(self.table() + "\n")
        (folder / "soak.log").write_text("\n".join(self.log) + "\n")


def _times(chaos: Chaos, kind: str) -> str:
    values = sorted(chaos.recoveries[kind])
    if not values:
        return "none"
    p50, p99 = (values[min(int(share * len(values)), len(values) - 1)] for share in (0.5, 0.99))
    return f"p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms"


def with_engine(work: Callable[[Stage, OwnEngine], None]) -> None:
    """On a daemon of its own that has the demo image; nothing is left behind."""
    host = start_engine()
    make_images()
    own = OwnEngine()
    try:
        own.start()
        own.load_image(Engine(host))
        with Stage(own.engine) as stage:
            work(stage, own)
    finally:
        own.remove()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="see the module")
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--write", type=Path, default=Path("build/soak"))
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    soak = Soak(options.minutes, options.seed)
    with_engine(soak.run)
    soak.write(options.write)
    print(f"\n{soak.table()}\n\npicture and log in {options.write}")
    print(*soak.tally.findings, *soak.failures, sep="\n")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
