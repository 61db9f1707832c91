"""Parses the Engine's event stream and tells which containers an event is about. Pure, no I/O.

Invariants:

- An event is a hint: it decides which targets are inspected, never their state. The one exception is a loss
  (`loss`), which counts until the inspect that it requests has an answer.
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


_ENDS = ("die", "died", "destroy", "remove")
_OF_A_NETWORK_ALONE = ("create", "destroy", "remove", "update", "prune")

NOBODY = Subject(frozenset(), frozenset())


@dataclass(frozen=True, slots=True)
class Loss:
    """A container has lost its address or its name.

    `at` is the moment by the daemon's clock, in nanoseconds since the epoch, 0 if unknown. `network`: the ID
    or the name of the only network that it left; `old_name`: the name that it no longer has. Without either,
    its run has ended.
    """

    container: str
    at: int = 0
    network: str = ""
    old_name: str = ""


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
        ident = _network_member(actor_id, attributes)[0]
        if ident:
            return Subject(frozenset({ident}), frozenset())
        # It was made or removed, so no container is on it. Builds do so all day.
        return NOBODY if event.get("Action") in _OF_A_NETWORK_ALONE else None
    names = (attributes.get("name"), attributes.get("oldName"))
    known = frozenset(name.removeprefix("/") for name in names if isinstance(name, str) and name)
    if not isinstance(actor_id, str) or not actor_id or not known:
        return None
    return Subject(frozenset({actor_id}), known)


def loss(event: Any) -> Loss | None:
    """What the container of `event` has lost; None if nothing.

    Docker says `die` and `destroy`, Podman `died` and `remove`. `kill` is no death: each signal makes one.
    """
    if subject(event) is None:
        return None
    actor, action = event["Actor"], event.get("Action")
    if event["Type"] == "network":
        ident, network = _network_member(actor.get("ID"), actor["Attributes"])
        if action != "disconnect" or not ident or not network:
            return None
        return Loss(ident, _moment(event), network=network)
    if action == "rename":
        old_name = actor["Attributes"].get("oldName")
        if not isinstance(old_name, str) or not old_name:
            return None
        return Loss(actor["ID"], _moment(event), old_name=old_name.removeprefix("/"))
    return Loss(actor["ID"], _moment(event)) if action in _ENDS else None


def start(event: Any) -> tuple[str, int] | None:
    """The container that began a run and when, as `Loss.at`; None if none did."""
    if subject(event) is None or event["Type"] != "container" or event.get("Action") != "start":
        return None
    return event["Actor"]["ID"], _moment(event)


def _moment(event: Mapping[str, Any]) -> int:
    at = event.get("timeNano")
    return at if isinstance(at, int) else 0


def _network_member(actor_id: object, attributes: Mapping[str, Any]) -> tuple[str, str]:
    """The container and the network of a network event; "" for what it does not name.

    Docker has the network in ID and the container in the attributes; Podman has the container in ID and the
    network in the attributes.
    """
    member, network = attributes.get("container"), actor_id
    if not member and attributes.get("network"):
        member, network = actor_id, attributes["network"]
    return (
        member if isinstance(member, str) else "",
        network if isinstance(network, str) else "",
    )
