"""The interface of a Docker Engine, and its errors. `client.py` implements it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

Document = Mapping[str, Any]
"""A JSON object as the Engine sends it; nothing in it is checked."""


class EngineError(Exception):
    """A request to the Engine failed. The text is one line that ends with what to do.

    `status` is the HTTP status, if the Engine or a proxy in front of it answered. `retry_is_cheap`: another
    attempt costs one system call, since the socket is local and has no listener.
    """

    def __init__(
        self, message: str, *, status: int | None = None, retry_is_cheap: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_is_cheap = retry_is_cheap


class NoSuchContainer(EngineError):
    """The Engine knows no container of that name or ID."""


class EventStream(Protocol):
    """An open event stream. The caller closes it."""

    def __iter__(self) -> Iterator[bytes]:
        """Yields the bytes as they come. Ends with the stream or after `close`; never raises."""

    def close(self) -> None:
        """End the stream, and the iteration of another thread. A second call has no effect."""


class Engine(Protocol):
    """A Docker Engine. Each method but `close` raises EngineError and no other exception."""

    def inspect_container(self, name: str) -> Document:
        """The inspect document of the container with this name or ID. Raises NoSuchContainer too."""

    def events(self, filters: Mapping[str, list[str]]) -> EventStream:
        """Subscribe to the events that pass `filters`."""

    def ping(self) -> None:
        """Return if the Engine answers."""

    def networks(self) -> list[Any]:
        """The documents of all networks."""

    def info(self) -> Document:
        """What the Engine says of itself (GET /info), which a proxy may forbid."""

    def close(self) -> None:
        """Close the connections that are not in use."""
