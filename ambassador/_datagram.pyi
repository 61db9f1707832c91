"""The UDP relay loop (compiled from _datagram.pyx)."""

from typing import Final

CONTROL: Final[int]
"""`run` returned because the control pipe has data or its end."""
DRAINED: Final[int]
"""`run` returned because draining is over."""

class UdpLoop:
    def __init__(self, listener: int, control: int, counters: int) -> None: ...
    def update(self, generation: int, payload: bytes) -> None: ...
    def drain(self, deadline_ms: int) -> None: ...
    def run(self) -> int: ...
