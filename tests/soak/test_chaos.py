"""An ambassador under clients and under chaos: restarts, kills, and a daemon that is killed too.

The ambassador runs on this machine beside a daemon of its own. The target, and the intruders that
take its old addresses, are containers of that daemon. What must not happen: a connection refused,
cut without a reset, reset without a reason, stuck, or given a stranger's or altered bytes;
descriptors left open at rest; memory that grew.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import traceback

from tests.soak import clients, report, samples
from tests.soak.chaos import Chaos, create_server
from tests.soak.clients import FATAL, NAME
from tests.soak.report import milliseconds, say, table
from tests.soak.samples import KINDS, Use
from tests.support.engine import Stage
from tests.support.net import free_port
from tests.support.own_engine import OwnEngine
from tests.support.program import Program
from tests.support.wait import wait_until

SAMPLE_S = 1.0
SAY_EACH = 10
REST_S = 110.0
"""UDP sessions live 90 s after their last datagram; then the ambassador is at rest."""

SHOWN = (
    "connections", "complete", "reset", "bytes", "datagrams sent", "datagrams answered",
    "restarts", "moves", "workers killed", "daemons killed", *FATAL,
)  # fmt: skip

ALLOWED = {"parent": 6, "fork server": 0, "workers": 64}
"""Descriptors that each may keep: connections to the Engine, and pipes for the next streams."""


def test_chaos(own: OwnEngine, minutes: float, seed: int) -> None:
    say(f"SEED={seed}")
    with Stage(own.engine) as stage:
        port = free_port()
        target = create_server(stage, "db", NAME.decode(), port)
        target.start()
        ambassador = stage.run_ambassador_on_host("-name", target.name)
        ambassador.wait_for_line("listening", 20)
        time.sleep(1)
        soak = Soak(ambassador, Chaos(stage, own, ambassador, target, port=port, seed=seed))
        soak.run(minutes, seed)
        soak.wait_for_rest()
        if "truncated" in target.logs():
            soak.failures.append("the target saw a clean end too early")
        report.FOLDER.mkdir(parents=True, exist_ok=True)
        (report.FOLDER / "chaos.log").write_text("\n".join(ambassador.lines) + "\n")
    soak.show(minutes, seed)
    assert not [*soak.chaos.tally.findings, *soak.failures]


class Soak:
    """One run: clients in this thread, chaos and samples in two others."""

    def __init__(self, ambassador: Program, chaos: Chaos) -> None:
        self.ambassador, self.chaos = ambassador, chaos
        self.samples: list[dict[str, Use]] = [samples.look(ambassador.pid)]
        self.failures: list[str] = []

    def run(self, minutes: float, seed: int) -> None:
        stopping = threading.Event()
        threads = [
            threading.Thread(target=self._do, args=(stopping, random.Random(seed + 1))),
            threading.Thread(target=self._watch, args=(stopping,)),
        ]
        for thread in threads:
            thread.start()
        try:
            asyncio.run(self._serve_clients(minutes, seed, stopping))
        finally:
            stopping.set()
            for thread in threads:
                thread.join()

    async def _serve_clients(self, minutes: float, seed: int, stopping: threading.Event) -> None:
        stop = asyncio.Event()
        tasks = clients.start(self.chaos.port, self.chaos.tally, stop, seed)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end and not stopping.is_set():
            await asyncio.sleep(0.2)
            for task in tasks:
                if task.done():
                    task.result()  # a client failed: raise why
        stopping.set()  # no more chaos; conversations that are open come to their end
        await asyncio.sleep(clients.GIVE_UP_S / 10)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*tasks), clients.GIVE_UP_S * 2)

    def _do(self, stopping: threading.Event, dice: random.Random) -> None:
        try:
            while not stopping.wait(dice.uniform(1, 5)):
                self.chaos.step()
        except Exception:  # noqa: BLE001 - chaos that cannot go on is a failed run
            self.failures.append(f"chaos: {traceback.format_exc()}")
            stopping.set()

    def _watch(self, stopping: threading.Event) -> None:
        while not stopping.wait(SAMPLE_S):
            self.samples.append(samples.look(self.ambassador.pid))
            counts = self.chaos.tally.counts
            if len(self.samples) % SAY_EACH == 0:
                say(
                    f"{counts['connections']:,} connections, {counts['restarts']} restarts, "
                    f"{counts['workers killed']} workers killed, "
                    f"{counts['daemons killed']} daemons killed, "
                    f"{sum(counts[kind] for kind in FATAL)} findings"
                )

    def wait_for_rest(self) -> None:
        """Wait until the workers have the descriptors that they had, and note what is left."""
        first = self.samples[0]
        most = first["workers"].descriptors + ALLOWED["workers"]
        pid = self.ambassador.pid
        say("waiting for UDP sessions to expire")
        try:
            wait_until(
                lambda: samples.look(pid)["workers"].descriptors <= most, "no rest", REST_S, 1.0
            )
        except AssertionError:
            pass  # judged below
        last = samples.look(pid)
        self.left = {kind: last[kind].descriptors - first[kind].descriptors for kind in KINDS}
        for kind in KINDS:
            if self.left[kind] > ALLOWED[kind]:
                self.failures.append(f"{kind}: {self.left[kind]} descriptors more than at first")
            before, after = samples.drift(self.samples, kind)
            if samples.has_grown(before, after):
                self.failures.append(f"{kind} grew from {before / 1e6:.1f} to {after / 1e6:.1f} MB")

    def show(self, minutes: float, seed: int) -> None:
        chaos, counts = self.chaos, self.chaos.tally.counts
        title = f"Chaos for {minutes:g} minutes, seed {seed}; every byte checked"
        table(title, ("what", "times"), *((what, f"{counts[what]:,}") for what in SHOWN))
        table(
            "Recovery under this load, ms",
            ("from", "times", "p50", "p99", "slowest"),
            ("a start of the target to the first answer", *milliseconds(chaos.restarts)),
            ("the daemon's return to `connected to Docker again`", *milliseconds(chaos.returns)),
        )
        rows = []
        for kind in KINDS:
            before, after = samples.drift(self.samples, kind)
            rows.append((kind, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", self.left[kind]))
        head = ("process", "MB PSS early", "MB at the end", "descriptors more at rest")
        table("What it used", head, *rows)
