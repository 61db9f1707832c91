"""Delays that double, with jitter."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Delays in seconds that double from `first` to `cap`, each shortened by a random part of up to a half.

    The random part keeps many ambassadors from asking a restarted daemon in step.
    """

    def __init__(
        self,
        first: float,
        cap: float,
        *,
        fraction: Callable[[], float] = random.random,
    ) -> None:
        self._first = first
        self._cap = cap
        self._fraction = fraction
        self._delay = first

    def next(self, cap: float | None = None) -> float:
        """The next delay; `cap` bounds this one only."""
        delay = min(self._delay, self._cap if cap is None else min(cap, self._cap))
        self._delay = min(self._delay * 2, self._cap)
        return delay * (1 - self._fraction() / 2)

    def reset(self) -> None:
        """Start at `first` again."""
        self._delay = self._first
