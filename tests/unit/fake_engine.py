"""An Engine made of plain objects, for the tests of the threads that watch it."""

from __future__ import annotations

import copy
import json
import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ambassador.discovery.docker_source import DockerSource
from ambassador.discovery.own_networks import OwnPlace
from ambassador.engine.api import EngineError, NoSuchContainer
from ambassador.model import ListenAddress
from ambassador.values import Protocol

DOCUMENTS = json.loads((Path(__file__).parent / "documents" / "engine-20.10.json").read_text())
REDIS = {ListenAddress(Protocol.TCP, 6379): 6379}
GATEWAYS = frozenset({"172.29.0.1", "172.30.0.1", "172.30.5.1", "fd00:5::1"})
"""The bridges' addresses in DOCUMENTS: whoever has them is on their host."""

ON_HOST = OwnPlace(
    container_id=lambda: None,
    short_id=lambda: "",
    in_container=lambda: False,
    addresses=lambda: GATEWAYS,
)

GONE = EngineError("nobody listens on /x.sock", retry_is_cheap=True)


def container(name: str, address: str = "10.0.0.2", ident: str = "", **state: Any) -> Any:
    document = copy.deepcopy(DOCUMENTS["default-bridge"])
    document["Name"], document["Id"] = f"/{name}", ident or (name.encode().hex() * 64)[:64]
    document["NetworkSettings"]["Networks"]["bridge"]["IPAddress"] = address
    document["State"].update(state)
    return document


def event(name: str, ident: str = "", kind: str = "container", **attributes: str) -> bytes:
    actor = {"ID": ident or "f" * 64, "Attributes": {"name": name, **attributes}}
    return json.dumps({"Type": kind, "Action": "start", "Actor": actor}).encode() + b"\n"


class FakeStream:
    def __init__(self) -> None:
        self.pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.pieces.get, None)

    def close(self) -> None:
        self.pieces.put(None)


class World:
    """An Engine and its containers; `connect` gives a connection to it, as often as asked."""

    def __init__(self) -> None:
        self.containers: dict[str, Any] = {}
        self.failure: EngineError | None = None  # of connecting
        self.ping_failure: EngineError | None = None
        self.network_list: Any = []
        self.info: Any = {}
        self.calls: list[str] = []
        self.connects: list[float] = []
        self.streams: list[FakeStream] = []
        self.closed = 0

    def connect(self) -> FakeEngine:
        self.connects.append(time.monotonic())
        if self.failure is not None:
            raise self.failure
        return FakeEngine(self)

    def inspects(self, name: str) -> int:
        return self.calls.count(f"inspect {name}")

    def send(self, data: bytes) -> None:
        self.streams[-1].pieces.put(data)


class FakeEngine:
    def __init__(self, world: World) -> None:
        self.world = world

    def inspect_container(self, name: str) -> Any:
        self.world.calls.append(f"inspect {name}")
        document = self.world.containers.get(name)
        if callable(document):
            document = document()
        if isinstance(document, EngineError):
            raise document
        if document is None:
            raise NoSuchContainer(f"No such container: {name}", status=404)
        return document

    def events(self, filters: Mapping[str, list[str]]) -> FakeStream:
        assert filters["type"] == ["container", "network"]
        self.world.calls.append("events")
        self.world.streams.append(FakeStream())
        return self.world.streams[-1]

    def ping(self) -> None:
        self.world.calls.append("ping")
        if self.world.ping_failure is not None:
            raise self.world.ping_failure

    def networks(self) -> Any:
        self.world.calls.append("networks")
        if isinstance(self.world.network_list, EngineError):
            raise self.world.network_list
        return self.world.network_list

    def info(self) -> Any:
        self.world.calls.append("info")
        if isinstance(self.world.info, EngineError):
            raise self.world.info
        return self.world.info

    def close(self) -> None:
        self.world.closed += 1


class Log(logging.Handler):
    """Lines of `info` and above, as text; `every` has the debug ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.every: list[str] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.getMessage()} {getattr(record, 'fields', '')}"
        self.every.append(text)
        if record.levelno >= logging.INFO:
            self.lines.append(text)

    def logger(self) -> logging.Logger:
        logger = logging.Logger("test", logging.DEBUG)
        logger.addHandler(self)
        return logger

    def having(self, words: str) -> list[str]:
        return [line for line in self.lines if words in line]


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.001)


def settle(world: World) -> None:
    """Wait until the Engine gets no request for ten debounces."""
    while True:
        before = len(world.calls)
        time.sleep(0.02)
        if len(world.calls) == before:
            return


def address_of(source: DockerSource, index: int = 0) -> str | None:
    """Where the target is reached; None: nowhere."""
    replicas = source.targets()[index].replicas
    return replicas[0].address if replicas else None


Start = Callable[..., DockerSource]
