"""The TCP relay loop (compiled from _splice.pyx, which has the theory of operation)."""

from typing import Final

COUNTERS: Final[tuple[str, ...]]
"""The names of the words of the counters page, from word 8 on."""

CONTROL: Final[int]
DRAINED: Final[int]

class TcpRelay:
    """The loop of one worker. The listener and the control pipe stay the caller's."""

    def __init__(
        self,
        listener: int,
        control: int,
        *,
        counters: int,
        slot: int,
        slots: int,
        hold_ms: int,
        connect_ms: int,
        max_held: int,
        pipe_bytes: int,
        max_connections: int,
        idle_ms: int,
        half_close_ms: int,
    ) -> None: ...
    def repoint(self, generation: int, backends: list[tuple[bytes, int, int, int]]) -> None: ...
    def drain(self, deadline_ms: int) -> None: ...
    def run(self) -> int: ...
