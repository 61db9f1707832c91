"""Takes control records off a worker's stream (compiled from _control.pyx)."""

from typing import Final

VERSION: Final[int]
START: Final[int]
UPDATE: Final[int]
DRAIN: Final[int]
MAX_PAYLOAD: Final[int]
MAX_BACKENDS: Final[int]
MAX_RULES: Final[int]
MAX_SLOTS: Final[int]
TCP: Final[int]
UDP: Final[int]
SANDBOX: Final[int]
SANDBOX_REQUIRED: Final[int]

def next_record(stream: bytearray) -> tuple[int, int, bytes] | None: ...
