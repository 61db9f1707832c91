"""The UDP relay loop (compiled from _datagram.pyx, which has the theory of operation)."""

from typing import Final

COUNTERS: Final[tuple[str, ...]]
"""The names of the words of the counters page, from word 8 on."""

CONTROL: Final[int]
DRAINED: Final[int]

class UdpRelay:
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
        session_idle_ms: int,
        max_sessions: int,
        gso: bool,
    ) -> None: ...
    def repoint(self, generation: int, backends: list[tuple[bytes, int, int, int]]) -> None: ...
    def drain(self, deadline_ms: int) -> None: ...
    def run(self) -> int: ...
