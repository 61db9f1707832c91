"""The TCP loop (compiled from _splice.pyx)."""

from typing import Final

CONTROL: Final[int]
"""`run` returned because the control pipe has something to read."""
DRAINED: Final[int]
"""`run` returned because draining is over."""

CONNECTION_BYTES: Final[int]
"""Of one connection's struct."""

def ready_functions(
    bits: int, destination: int, events: int
) -> tuple[int, bool, bool, bool, bool, int]:
    """For tests: what the pure functions of _ready.pxd return, in their order there."""

class TcpLoop:
    def __init__(
        self, listener: int, control: int, counters: int, siblings: tuple[int, ...] = ()
    ) -> None: ...
    def update(self, generation: int, payload: bytes) -> None: ...
    def drain(self, deadline_ms: int) -> None: ...
    def run(self) -> int: ...
