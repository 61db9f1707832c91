"""What a restart of the target costs a client that connects every 10 ms: redis in a container."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

from tests.docker.test_limits import restart_often
from tests.soak import samples
from tests.soak.report import milliseconds, say, table
from tests.soak.samples import has_grown
from tests.support.engine import Stage, started_at, wait_until_accepts
from tests.support.program import REPO

CLIENT = REPO / "scripts/demo_client.py"
PORT = 6379
EVERY_S = 0.01
MOVES = 20
PARENT_SPARE = 6
"""Connections to the Engine that the parent may keep for its next requests."""


def test_restarts(stage: Stage, minutes: float) -> None:
    """C1, C13: nobody is refused, the first reply comes soon, and nothing leaks."""
    redis = stage.run_target()
    ambassador = stage.run_ambassador_on_host("-name", redis.name)
    ambassador.wait_for_line("listening")
    wait_until_accepts("127.0.0.1", PORT)
    client = subprocess.Popen(
        [sys.executable, str(CLIENT), "redis", "127.0.0.1", str(PORT), str(EVERY_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    try:
        assert json.loads(client.stdout.readline()) == {"ready": True}
        starts: list[float] = []
        for _ in range(MOVES):
            stage.restart_elsewhere(redis, timeout=0)
            starts.append(started_at(redis))
            time.sleep(0.5)
        say(f"moved {MOVES} times")
        early = samples.look(ambassador.pid)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            redis.restart(0)
            starts.append(started_at(redis))
            time.sleep(0.5)
        say(f"restarted {len(starts) - MOVES} times")
        late = samples.look(ambassador.pid)
        outcomes = json.loads(client.communicate(timeout=30)[0])["samples"]
    finally:
        client.kill()
        client.wait()

    ends = sorted(begin + took for begin, took, outcome in outcomes if outcome == "ok")
    replies = [next(end for end in ends if end >= start) - start for start in starts]
    counts = Counter(outcome for *_, outcome in outcomes)
    title = "From StartedAt to the first reply through the ambassador, ms"
    table(title, ("restarts", "p50", "p99", "slowest"), milliseconds(replies))
    table(
        f"A client that connects every {EVERY_S * 1000:.0f} ms meanwhile; the first {MOVES} restarts "
        "gave redis another address",
        ("connections", "answered", "refused", "timed out", "wrong", "cut", "longest"),
        (
            *(len(outcomes), counts["ok"], counts["refused"], counts["timeout"], counts["wrong"]),
            *(counts["cut"], f"{max(took for _, took, _ in outcomes) * 1000:.0f} ms"),
        ),
    )
    assert set(counts) <= {"ok", "cut"}
    for kind in samples.KINDS:
        assert late[kind].descriptors <= early[kind].descriptors + PARENT_SPARE
        assert not has_grown(early[kind].pss, late[kind].pss), kind


def test_a_hundred_restarts(stage: Stage) -> None:
    """C13: the address is the newest after each, and nothing leaks."""
    restart_often(stage, 100)
