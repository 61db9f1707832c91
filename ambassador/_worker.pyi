"""A worker's life in the child (compiled from _worker.pyx)."""

from typing import Final

COUNTERS_BYTES: Final[int]
GENERATION_WORD: Final[int]
BACKENDS_WORD: Final[int]
HEARTBEAT_WORD: Final[int]
SANDBOX_WORD: Final[int]
FIRST_COUNTER: Final[int]

EXIT_DRAINED: Final[int]
EXIT_PARENT_GONE: Final[int]
EXIT_BAD_CONTROL: Final[int]
"""A record makes no sense (EX_DATAERR of sysexits.h)."""
EXIT_BROKEN: Final[int]
"""The loop could not be made, or failed (EX_SOFTWARE)."""
EXIT_NO_SANDBOX: Final[int]
"""The sandbox is required and a step of it is missing (EX_NOPERM)."""

def main(listener: int, control: int, counters: int, *siblings: int) -> int: ...
