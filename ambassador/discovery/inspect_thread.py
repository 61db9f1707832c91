"""A thread that inspects on request. Each watcher of discovery has one.

Invariants:

- A turn starts after the request that asked for it: a request during a turn causes exactly one more.
- The first request after a pause runs at once. Requests within `debounce` of a turn share the next one.
- No exception ends the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ambassador.engine.api import EngineError


class InspectThread:
    """Calls `turn` after each request, until `stop`.

    `turn` returns the seconds until it runs again without a request, or None for never. An exception of
    `turn` goes to `failed`, which returns the same. `request` and `stop` may be called by any thread.
    """

    def __init__(
        self,
        name: str,
        *,
        turn: Callable[[], float | None],
        failed: Callable[[EngineError], float],
        debounce: float,
    ) -> None:
        self._turn = turn
        self._failed = failed
        self._debounce = debounce
        self._requested = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request(self) -> None:
        self._requested.set()

    def stop(self) -> None:
        """Tell the thread to end; it ends after the turn that it is in."""
        self._stopping.set()
        self._requested.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        delay: float | None = None
        while not self._stopping.is_set():
            self._requested.wait(delay)
            if self._stopping.is_set():
                return
            # Clear the flag first, so that a request during the turn is not lost.
            self._requested.clear()
            try:
                delay = self._turn()
            except EngineError as error:
                delay = self._failed(error)
            except Exception as error:  # noqa: BLE001 - a thread that ends would freeze what it watches
                text = f"unexpected {type(error).__name__}: {error}: report this as a bug"
                delay = self._failed(EngineError(text))
            self._stopping.wait(self._debounce)
