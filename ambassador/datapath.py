"""The interface of a data path: one way to carry one listener's traffic. An object per listener and path.

Only the supervisor's thread calls it, and no method waits: later results arrive at a descriptor or in a Job.
No method raises for lack of a port, descriptors, memory or processes: that is `state()` and a retry.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ambassador.model import ListenerSpec


class Condition(enum.Enum):
    """What a path does now."""

    FORWARDING = "forwarding"
    HOLDING = "holding"  # no backend may get anything new
    DRAINING = "draining"  # closed; what was open may finish
    DEGRADED = "degraded"  # workers keep exiting
    CANNOT_LISTEN = "cannot listen"


@dataclass(frozen=True, slots=True)
class PathState:
    """`error` is the last one, one line, and `error_at` its time (time.monotonic); "" and 0.0 if none."""

    condition: Condition
    error: str = ""
    error_at: float = 0.0


class DataPath(Protocol):
    """One way to carry one listener."""

    def refuses(self, spec: ListenerSpec) -> str:
        """Why this path cannot carry `spec`, one line; "" if it can."""

    def open(self, spec: ListenerSpec) -> None:
        """From here on the port answers or holds. Also after `close`."""

    def update(self, spec: ListenerSpec) -> None:
        """The whole state from now on; the same again changes nothing."""

    def close(self, deadline_ms: int) -> None:
        """Nothing new at once. What is open may finish until the deadline."""

    def counters(self) -> Mapping[str, int]:
        """Totals since `open`. They never fall, also if a worker dies; gauges say what is so now."""

    def state(self) -> PathState:
        """What the path does, and what went wrong last."""
