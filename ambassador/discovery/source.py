"""The interface of a source of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ambassador.model import TargetState


class Source(Protocol):
    """Keeps the states of the targets current, from `start` to `stop`.

    Its constructor takes `on_change`, which it calls after `targets()` has changed. The call can come from
    any thread, so `on_change` must not block and must not call the source.
    """

    def start(self) -> None:
        """Start to watch. Returns at once: the states become current later."""

    def stop(self) -> None:
        """Stop to watch and free what the source opened. Then `on_change` is not called again."""

    def targets(self) -> Sequence[TargetState]:
        """The last known state of each target, in the order of the command line. Never blocks."""
