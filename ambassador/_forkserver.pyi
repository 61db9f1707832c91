"""The fork server's loop (compiled from _forkserver.pyx, which documents its messages)."""

from typing import Final

FORKED_MESSAGE: Final[int]
EXITED_MESSAGE: Final[int]

def serve(fd: int) -> tuple[int, ...] | None: ...
