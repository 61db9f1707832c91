"""`python -m tests.fuzz MINUTES [DOOR ...]`: a long random run; saves what it finds into the corpus.

Ends with 1 where it found something. A finding is the smallest input that hypothesis could make of it.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from tests.fuzz.doors import CORPUS, DOORS
from tests.fuzz.mutate import nonsense

BATCH = 2000


def run(door: str, number: int) -> tuple[int, bytes | None]:
    """One batch: how many inputs, and the smallest that broke something."""
    tried, last = 0, b""

    @seed(number)
    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(nonsense(door))
    def feed(data: bytes) -> None:
        nonlocal tried, last
        tried, last = tried + 1, data
        DOORS[door](data)

    try:
        feed()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"{door}: {type(error).__name__}: {error}\n  {last[:300]!r}", flush=True)
        return tried, last
    return tried, None


def save(door: str, data: bytes) -> None:
    path = CORPUS / door / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(f"  saved as {path}", flush=True)


def main(minutes: float, doors: list[str]) -> int:
    first = random.randrange(1 << 32)
    print(f"seed {first}, {minutes:g} minutes: {' '.join(doors)}", flush=True)
    end, number = time.monotonic() + 60 * minutes, 0
    tried, found = dict.fromkeys(doors, 0), 0
    while time.monotonic() < end:
        for door in doors:
            count, data = run(door, first + number)
            tried[door] += count
            if data is not None:
                found += 1
                save(door, data)
        number += 1
    print("\n| door | inputs |\n|---|---:|")
    print(*(f"| {door} | {count:,} |" for door, count in tried.items()), sep="\n")
    print(f"\n{found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:] or list(DOORS)))
