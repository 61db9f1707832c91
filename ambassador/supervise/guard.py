"""Keeps an exception inside the duty that raised it, so that the parent's loop and all other duties go on.

What is missing (a port, descriptors, memory) is handled where it is asked for. This is for what nobody
thought of: it is logged once, and the duty waits before it is tried again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Guard:
    """Runs duties. A duty that raises waits `retry` seconds; `clock` is that of the moments here."""

    def __init__(self, retry: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry = retry
        self._clock = clock
        self._failed: dict[object, tuple[str, float]] = {}  # the error, and the end of the wait

    def run(self, duty: object, call: Callable[[], object], /, **fields: object) -> bool:
        """Whether it returned. Its exception is logged unless it is this duty's last one."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest must go on
            self._note(duty, error, fields)
            return False
        self._failed.pop(duty, None)
        return True

    def due(self, duty: object, call: Callable[[], float | None]) -> float | None:
        """When the duty is due, but not while it waits."""
        try:
            moment = call()
        except Exception as error:  # noqa: BLE001
            self._note(duty, error, {})
            moment = 0.0
        wait = self._failed.get(duty)
        return moment if wait is None or moment is None else max(moment, wait[1])

    def _note(self, duty: object, error: Exception, fields: dict[str, object]) -> None:
        reason = repr(error)
        last = self._failed.get(duty, ("", 0.0))[0]
        self._failed[duty] = reason, self._clock() + self._retry
        if reason != last:
            fields = fields | {
                "reason": reason,
                "advice": "please report it, with -log-level debug",
            }
            log.error("internal error, trying again", exc_info=error, extra={"fields": fields})
