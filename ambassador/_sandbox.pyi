"""What a worker gives up (compiled from _sandbox.pyx, which has the steps and the filter)."""

from typing import Final

STEPS: Final[tuple[str, ...]]
MISSING: Final[int]

def enter(counters: int) -> int: ...
