"""Parses the Engine's event stream and tells which containers an event is about. Pure, no I/O.

Invariants:

- An event is a hint: it decides which targets are inspected, never their state. The one exception is a death,
  which counts until the inspect that it requests has an answer (`death`).
- An event that cannot be read concerns every target. A needless inspect costs a millisecond; a missing one
  leaves a target lost until the next reconcile.
- Memory is bounded: a record longer than MAX_RECORD is dropped.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_RECORD = 256 * 1024
"""Characters. An event has its container's labels, which take some kilobytes at most."""

FILTERS: Mapping[str, list[str]] = {
    "type": ["container", "network"],
    # Left out: exec_* (every HEALTHCHECK makes three), kill (each signal makes one, and few of them end the
    # container), pause (the kernel still answers), top, attach, resize. `died` and `remove` are Podman's.
    "event": [
        "create", "start", "restart", "die", "died", "stop", "destroy", "remove", "rename",
        "connect", "disconnect", "health_status",
    ],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """The containers that an event is about: the IDs and the names in it."""

    ids: frozenset[str]
    names: frozenset[str]


class EventParser:
    """Turns bytes, split anywhere, into JSON values; a record that is not JSON becomes None.

    Bytes that are not UTF-8 become replacement characters: they can only be inside a name.
    """

    def __init__(self, max_record: int = MAX_RECORD) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._json = json.JSONDecoder()
        self._buffer = ""
        self._max_record = max_record

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yields the values that `data` completes."""
        self._buffer += self._decoder.decode(data)
        # A record ends with a brace, and a real Engine adds a newline. Data without either completes no
        # record, and an attempt at every byte would cost the square of the length.
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
    """The containers that `event` is about; None if it can be about any."""
    if not isinstance(event, Mapping) or event.get("Type") not in ("container", "network"):
        return None
    actor = event.get("Actor")
    attributes = actor.get("Attributes") if isinstance(actor, Mapping) else None
    if not isinstance(actor, Mapping) or not isinstance(attributes, Mapping):
        return None
    actor_id = actor.get("ID")
    if event["Type"] == "network":
        # Docker has the network in ID and the container in the attributes; Podman has the container in ID
        # and the network in the attributes. Without a container, a network was created or removed.
        ident = attributes.get("container") or (actor_id if attributes.get("network") else None)
        if not isinstance(ident, str) or not ident:
            return None
        return Subject(frozenset({ident}), frozenset())
    names = (attributes.get("name"), attributes.get("oldName"))
    known = frozenset(name.removeprefix("/") for name in names if isinstance(name, str) and name)
    if not isinstance(actor_id, str) or not actor_id or not known:
        return None
    return Subject(frozenset({actor_id}), known)


def death(event: Any) -> tuple[str, int] | None:
    """The container that died and when, in nanoseconds since the epoch by the daemon's clock; None if none.

    Docker says `die`, Podman `died`. `kill` is no death: each signal makes one.
    """
    if subject(event) is None or event["Type"] != "container":
        return None
    at = event.get("timeNano")
    if event.get("Action") not in ("die", "died") or not isinstance(at, int):
        return None
    return event["Actor"]["ID"], at
