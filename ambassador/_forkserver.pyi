"""The fork server's loop (compiled from _forker.pyx, which has its messages)."""

from typing import Final

FORKED_MESSAGE: Final[int]
EXITED_MESSAGE: Final[int]

def serve(fd: int) -> tuple[int, ...] | None: ...
