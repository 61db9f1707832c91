"""Takes control records apart (compiled from _wire.pyx)."""

from typing import Final

VERSION: Final[int]
START: Final[int]
REPOINT: Final[int]
DRAIN: Final[int]
MAX_PAYLOAD: Final[int]
MAX_BACKENDS: Final[int]
MAX_SLOTS: Final[int]
TCP: Final[int]
UDP: Final[int]
GSO: Final[int]
SANDBOX: Final[int]
SANDBOX_REQUIRED: Final[int]

StartNumbers = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int]
Backends = list[tuple[bytes, int, int, int]]

def take(
    stream: bytearray,
) -> tuple[int, int, StartNumbers | tuple[Backends, str] | int] | None: ...
