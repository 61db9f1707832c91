"""What is asked of a Docker Engine, and how it fails. Interfaces only: `client.py` is the one that asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

Document = Mapping[str, Any]
"""A JSON object as the Engine sends it; nothing in it is checked."""


class EngineError(Exception):
    """The Engine did not give what was asked for. The text is one line that says what to do.

    `status` is the HTTP status where the Engine, or what stands in front of it, did answer;
    `retry_is_cheap` says that asking again costs nothing (nobody listens on a local socket).
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
    """Pieces of the event stream as they come; ends when the stream does, and on `close`."""

    def __iter__(self) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """What is asked of a Docker Engine. Every method may raise EngineError, and nothing else."""

    def inspect_container(self, name: str) -> Document: ...
    def events(self, filters: Mapping[str, list[str]]) -> EventStream: ...
    def ping(self) -> None: ...
    def networks(self) -> list[Any]: ...
    def close(self) -> None: ...
