"""Waiting for what is expected, with a limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

TIMEOUT_S = 20.0
"""No single step takes longer than this, however busy the machine is."""

SANITIZED = bool(os.environ.get("SANITIZED"))
"""Whether the loops are built with sanitizers, which no sandbox lets work."""

FIRST_POLL_S, LAST_POLL_S = 0.001, 0.02

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T | None],
    what: str = "it is not so",
    timeout_s: float = TIMEOUT_S,
    poll_s: float = LAST_POLL_S,
) -> T:
    """Poll until the condition gives something true; return that. Fails with `what` in the end.

    The pauses grow to `poll_s`.
    """
    deadline = time.monotonic() + timeout_s
    pause = FIRST_POLL_S
    while not (result := condition()):
        assert time.monotonic() < deadline, f"after {timeout_s:g} s: {what}"
        time.sleep(pause)
        pause = min(1.2 * pause, poll_s)
    return result
