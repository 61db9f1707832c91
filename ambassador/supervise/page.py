"""A counters page: what the worker of one slot counts, and what the parent reads of it.

The page is a memfd of its own. The slot's worker maps it writable; its siblings get a descriptor that was
reopened read-only. Seals keep every holder from changing its size, which would kill the parent (SIGBUS).
"""

from __future__ import annotations

import fcntl
import mmap
import os

from ambassador._worker import (
    BACKENDS_WORD,
    COUNTERS_BYTES,
    FIRST_COUNTER,
    GENERATION_WORD,
    HEARTBEAT_WORD,
    SANDBOX_WORD,
)
from ambassador.counters import COUNTERS
from ambassador.values import Protocol

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class CountersPage:
    """Owns `fd` and the parent's mapping until `close`. Raises OSError if either cannot be made."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self.fd = os.memfd_create("counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, COUNTERS_BYTES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, COUNTERS_BYTES)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = memoryview(self._map).cast("Q")

    def counters(self) -> dict[str, int]:
        """A copy of the counters by name. Costs the worker nothing, and works if it is stuck."""
        rows = enumerate(COUNTERS[self._protocol], FIRST_COUNTER)
        return {row.name: self._words[place] for place, row in rows}

    @property
    def generation(self) -> int:
        """The generation of the newest Update that the worker obeys."""
        return self._words[GENERATION_WORD]

    @property
    def backends(self) -> int:
        """How many backends that Update has."""
        return self._words[BACKENDS_WORD]

    @property
    def heartbeat(self) -> float:
        """The latest turn of the worker's loop, by time.monotonic; 0 before the first."""
        return self._words[HEARTBEAT_WORD] / 1000

    @property
    def sandbox(self) -> int:
        """The word of sandbox.py; 0 until the worker has entered its sandbox."""
        return self._words[SANDBOX_WORD]

    def reopen_read_only(self) -> int:
        """A descriptor that cannot be mapped writable. The caller closes it. Raises OSError."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def clear(self) -> None:
        """Set every word to 0. For a page whose worker has been reaped."""
        self._map[:] = bytes(COUNTERS_BYTES)

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)
