"""The Engine's event stream as far as it matters: whom an event makes look again. Pure, no I/O.

Invariants:

- An event is a hint. Its content decides who looks again, never what is so; with one exception, on the
  safe side: a container's death is believed until the look that it causes has an answer (`death`).
- What cannot be understood concerns everybody: a look too many costs a millisecond, a look too few
  leaves a target lost until the next reconcile.
- Memory is bounded whatever the stream says: a record longer than MAX_RECORD is given up.
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_RECORD = 256 * 1024
"""Characters. An event carries its container's labels, which are some kilobytes at most."""

FILTERS: Mapping[str, list[str]] = {
    "type": ["container", "network"],
    # Not here: exec_* (every HEALTHCHECK makes three), kill (any signal makes one, and it is not
    # death), pause (the kernel holds), top, attach, resize. `died` and `remove` are Podman's words.
    "event": [
        "create", "start", "restart", "die", "died", "stop", "destroy", "remove", "rename",
        "connect", "disconnect", "health_status",
    ],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom an event is about: the container IDs and names that it mentions."""

    ids: frozenset[str]
    names: frozenset[str]


class EventParser:
    """Bytes in, JSON values out, however the bytes are split or merged; None for what is no JSON.

    Bytes that are no UTF-8 become replacement characters: they can only be inside a name.
    """

    def __init__(self, max_record: int = MAX_RECORD) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._json = json.JSONDecoder()
        self._buffer = ""
        self._max_record = max_record

    def feed(self, data: bytes) -> Iterator[Any]:
        self._buffer += self._decoder.decode(data)
        # A record ends with a brace and, from a real Engine, a newline. Without either there is
        # nothing new to find, and trying at every byte would cost the square of the length.
        while (b"}" in data or b"\n" in data) and self._buffer:
            self._buffer = self._buffer.lstrip()
            try:
                value, end = self._json.raw_decode(self._buffer)
            except (ValueError, RecursionError):
                line, newline, rest = self._buffer.partition("\n")
                if not newline:
                    break  # more may come
                self._buffer = rest
                if line.strip():
                    yield None
                continue
            self._buffer = self._buffer[end:]
            yield value
        if len(self._buffer) > self._max_record:
            self._buffer = ""
            yield None


def subject(event: Any) -> Subject | None:
    """Whom `event` is about, or None: it might be about anybody."""
    if not isinstance(event, Mapping) or event.get("Type") not in ("container", "network"):
        return None
    actor = event.get("Actor")
    attributes = actor.get("Attributes") if isinstance(actor, Mapping) else None
    if not isinstance(actor, Mapping) or not isinstance(attributes, Mapping):
        return None
    actor_id = actor.get("ID")
    if event["Type"] == "network":
        # Docker names the network in ID and the container in the attributes; Podman names the
        # container in ID and the network in the attributes. Neither: a network came or went.
        who = attributes.get("container") or (actor_id if attributes.get("network") else None)
        return Subject(frozenset({who}), frozenset()) if isinstance(who, str) and who else None
    names = (attributes.get("name"), attributes.get("oldName"))
    known = frozenset(name.removeprefix("/") for name in names if isinstance(name, str) and name)
    if not isinstance(actor_id, str) or not actor_id or not known:
        return None
    return Subject(frozenset({actor_id}), known)


def death(event: Any) -> tuple[str, int] | None:
    """The container that `event` says has died, and when: nanoseconds since the epoch, by the daemon's clock.

    `die` is Docker's word, `died` Podman's. Not `kill`: every signal makes one.
    """
    if subject(event) is None or event["Type"] != "container":
        return None
    at = event.get("timeNano")
    if event.get("Action") not in ("die", "died") or not isinstance(at, int):
        return None
    return event["Actor"]["ID"], at


class Backoff:
    """Delays that double from `first` to `cap`, each shortened by a random part of up to a half.

    The randomness keeps many ambassadors from asking a restarted daemon in step.
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
        delay = min(self._delay, self._cap if cap is None else min(cap, self._cap))
        self._delay = min(self._delay * 2, self._cap)
        return delay * (1 - self._fraction() / 2)

    def reset(self) -> None:
        self._delay = self._first
