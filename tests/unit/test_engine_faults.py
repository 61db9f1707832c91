"""What a real Engine does not do on demand: lost and garbled events, clocks that differ, odd answers.

Fault rows D5, D7, D9, D11. Those that a real one can be brought to are in tests/docker.
"""

from __future__ import annotations

import json
import random
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from ambassador.discovery.docker_source import DockerSource
from ambassador.discovery.events import MAX_RECORD
from ambassador.engine.client import connect_engine
from tests.unit.fake_engine import (
    ON_HOST,
    Log,
    Start,
    World,
    address_of,
    container,
    event,
    settle,
    until,
)
from tests.unit.test_engine import Handler, Server, says, server, usual_answers

__all__ = ["server"]  # the fixture

DAY_NS = 86_400 * 10**9
STARTED = "2026-01-01T00:00:00.5Z"
STARTED_NS = 1_767_225_600_500_000_000


def happened(action: str, ident: str, at: int) -> bytes:
    value = json.loads(event("web", ident))
    return json.dumps({**value, "Action": action, "timeNano": at}).encode() + b"\n"


def test_300_events_while_disconnected(world: World, start: Start) -> None:
    """D5: the Engine replays 256 of them at most; one inspect gives the state."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    changes: list[None] = []
    source = start("web", on_change=lambda: changes.append(None))
    changes.clear()
    connect, go_on = world.connect, threading.Event()

    def connect_later() -> Any:
        go_on.wait(5)
        return connect()

    source._connect = connect_later
    world.streams[-1].close()
    until(lambda: len(world.streams) == 1)
    # 150 times it dies and starts; what the replay still has of that ends with a death.
    world.containers["web"] = container(
        "web", "10.0.0.99", StartedAt="2026-01-01T00:10:00Z", Pid=99
    )
    replay = []
    for number in range(150):
        at = STARTED_NS + number * 10**9
        replay += [happened("start", document["Id"], at), happened("die", document["Id"], at + 1)]
    world.calls.clear()
    go_on.set()
    until(lambda: len(world.streams) == 2)
    until(lambda: address_of(source) == "10.0.0.99")
    assert world.inspects("web") == 1
    for piece in replay[-256:]:
        world.send(piece)
    settle(world)
    assert len(changes) == 1, "an old death was taken for news"
    assert address_of(source) == "10.0.0.99"


def test_duplicate_reordered_and_future_events(world: World, start: Start) -> None:
    """D11: whatever the order, the number and the dates: in the end it is as inspect says."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    source = start("web", debounce=0.0)
    ident, dice = document["Id"], random.Random(11)
    for number in range(2, 12):
        address = f"10.0.0.{number}"
        world.containers["web"] = container("web", address, StartedAt=STARTED, Pid=number)
        pieces = [
            happened(action, ident, STARTED_NS + offset)
            for action in ("die", "stop", "start", "restart")
            for offset in (-DAY_NS, 0, 1, DAY_NS)
        ] * 2
        dice.shuffle(pieces)
        for piece in pieces:
            world.send(piece)
        until(lambda address=address: address_of(source) == address)  # type: ignore[misc]
        settle(world)
        assert address_of(source) == address


def test_a_late_stream(world: World, start: Start) -> None:
    """D11: an old run's death, told late and twice, does not touch the new run's connections."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    changes: list[None] = []
    source = start("web", on_change=lambda: changes.append(None))
    world.containers["web"] = container("web", "10.0.0.9", StartedAt="2026-01-01T00:00:09Z")
    changes.clear()
    world.send(happened("start", document["Id"], STARTED_NS + 4 * 10**9))
    until(lambda: address_of(source) == "10.0.0.9")
    for _ in range(2):
        world.send(happened("die", document["Id"], STARTED_NS + 5 * 10**9))
        settle(world)
    assert len(changes) == 1
    world.send(happened("start", document["Id"], STARTED_NS + 9 * 10**9))
    settle(world)
    assert len(changes) == 1
    assert address_of(source) == "10.0.0.9"


# --- garbled streams over a real socket ----------------------------------------------------------


def source_of(server: Server, log: Log) -> DockerSource:
    return DockerSource(
        lambda: connect_engine(f"unix://{server.server_address!s}"),
        ["web"],
        on_change=lambda: None,
        log=log.logger(),
        debounce=0.0,
        place=ON_HOST,
    )


def chunked(handler: Handler, pieces: Callable[[], Any]) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        for piece in pieces():
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    except OSError:
        pass  # it was closed from there
    handler.close_connection = True


GARBAGE = {
    "split": [bytes([byte]) for byte in event("other")],
    "merged": [event("other") * 50],
    "truncated": [event("other")[:-20] + b"\n"],
    "no-json": [b"\x00\x01}{][\n", b"null\n", b"[1,2]\n", b'"Type"\n', b"1e999\n"],
    "odd-types": [
        b'{"Type":"container","Actor":[]}\n',
        b'{"Type":"container","Actor":{"ID":7,"Attributes":{"name":[]}},"Action":{}}\n',
        b'{"Type":{},"timeNano":"now"}\n',
    ],
    "no-utf-8": [event("web").replace(b"web", b"\xff\xfe\xc3")],
    "deep": [b"[" * 100_000 + b"]\n"],
    "long": [b'{"x":"' + b"y" * 65_000] * (8 * MAX_RECORD // 65_000),
    "no-end": [b"}" * 60_000] * 20,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbled_events(server: Server, kind: str) -> None:
    """D7: no crash, bounded memory, and the next event is understood."""
    log, more, done = Log(), threading.Event(), threading.Event()
    address = ["10.0.0.2"]

    def pieces() -> Any:
        yield event("web")
        more.wait(5)
        yield from GARBAGE[kind]
        address[0] = "10.0.0.7"
        yield b"\n" + event("web")
        done.wait(5)

    server.answers["/events"] = lambda handler: chunked(handler, pieces)
    server.answers["/web/json"] = lambda handler: handler.send(
        200, json.dumps(container("web", address[0])).encode()
    )
    source = source_of(server, log)
    source.start()
    try:
        until(lambda: address_of(source) == "10.0.0.2")
        tracemalloc.start()
        more.set()
        until(lambda: address_of(source) == "10.0.0.7")
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 16 * MAX_RECORD
        assert sum("/events" in line for line in server.asked) == 1, "the stream was given up"
        assert log.having("unexpected") == []
    finally:
        tracemalloc.stop()
        done.set()
        source.stop()


# --- answers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/events", 403, "forbids GET /events (403): allow it there (in a docker-socket-proxy: "),
        ("/web/json", 403, "forbids GET /containers/web/json (403): allow it there"),
        ("/web/json", 500, "answers GET /containers/web/json with 500: out of order"),
        ("/web/json", 404, "GET /containers/web/json with 404: page not found: check that -sock"),
        ("/_ping", 500, "answers GET /_ping with 500: out of order"),
        ("/events", 500, "answers GET /events with 500: out of order"),
    ],
)
def test_an_answer_that_is_none(server: Server, path: str, status: int, words: str) -> None:
    """D9: one line says which endpoint it is and what to do, and the source goes on trying."""
    said = "page not found" if status == 404 else "out of order"
    server.answers = usual_answers() | {
        "/events": lambda handler: chunked(handler, lambda: iter([event("x")])),
        "/web/json": says(200, json.dumps(container("web")).encode()),
        path: says(status, json.dumps({"message": said}).encode()),
    }
    log = Log()
    source = source_of(server, log)
    source.start()
    try:
        until(lambda: log.having("WARNING"))
        (line,) = log.having("WARNING")
        assert words in line
        assert str(server.server_address) in line
        before = len(server.asked)
        until(lambda: len(server.asked) > before + 1)
        assert len(log.having(words)) == 1, "logged twice"
    finally:
        source.stop()
