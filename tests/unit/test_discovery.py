"""The threads together: whom an event wakes, and what stands while the Engine goes and comes."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest

from ambassador.engine.api import EngineError
from ambassador.model import TargetState
from tests.support.fake_engine import (
    DOCUMENTS,
    GONE,
    FakeEngine,
    Log,
    Start,
    World,
    container,
    event,
    settle,
)
from tests.support.wait import wait_until

# --- events ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "web", "db"),
    [
        (event("web"), 1, 0),
        (event("new-name", oldName="/web"), 1, 0),
        (event("x", ident=container("web")["Id"]), 1, 0),
        (event("n", kind="network", container=container("web")["Id"]), 1, 0),
        (event("n", kind="network", container="0" * 64), 0, 0),
        (event("web2"), 0, 0),
        (event("we"), 0, 0),
        (event("stranger"), 0, 0),
        (event("n", kind="network"), 1, 1),
        (event("v", kind="volume"), 1, 1),
        (b"junk\n", 1, 1),
        (b"{}\n", 1, 1),
    ],
)
def test_whom_an_event_makes_look(
    world: World, start: Start, data: bytes, web: int, db: int
) -> None:
    world.containers = {"web": container("web"), "db": container("db")}
    start("web", "db")
    world.calls.clear()
    world.send(data)
    settle(world)
    assert (world.looks("web"), world.looks("db")) == (web, db)


def test_a_target_given_by_id_hears_of_it(world: World, start: Start) -> None:
    ident = "ab" * 32
    short = ident[:12]
    start(short)
    world.containers[short] = container("web", ident=ident)
    world.send(event("web", ident=ident))
    wait_until(lambda: world.looks(short) == 2)


@pytest.mark.alone
def test_a_burst_is_few_looks_and_the_first_is_at_once(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    start("web", debounce=0.2)
    time.sleep(0.25)
    world.calls.clear()
    began = time.monotonic()
    world.send(event("web") * 100)
    wait_until(lambda: world.looks("web") == 1)
    assert time.monotonic() - began < 0.15
    for _ in range(20):
        world.send(event("web"))
        time.sleep(0.002)
    wait_until(lambda: world.looks("web") == 2)
    time.sleep(0.3)
    assert world.looks("web") == 2


def test_an_event_during_a_look_causes_one_more(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    discovery = start("web")
    looking, go_on = threading.Event(), threading.Event()

    def slow() -> Any:
        world.containers["web"] = container("web", "10.0.0.5")  # what the next look finds
        looking.set()
        go_on.wait(5)
        return container("web", "10.0.0.4")

    world.containers["web"] = slow
    world.calls.clear()
    world.send(event("web"))
    assert looking.wait(5)
    for _ in range(10):
        world.send(event("web"))
    time.sleep(0.02)
    go_on.set()
    wait_until(lambda: discovery.states()[0].address == "10.0.0.5")
    settle(world)
    assert world.looks("web") == 2


def test_reconcile_finds_what_no_event_told(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    discovery = start("web", wait=False, reconcile_every=0.05, ping_every=0.05)
    wait_until(lambda: discovery.states()[0].address == "10.0.0.2")
    world.containers["web"] = container("web", "10.0.0.8")
    wait_until(lambda: discovery.states()[0].address == "10.0.0.8")


# --- the ambassador's own place ----------------------------------------------------------------


def test_its_own_container_decides_and_its_own_events_count(world: World, start: Start) -> None:
    own = copy.deepcopy(DOCUMENTS["ambassador-user"])
    world.containers = {own["Id"]: own, "redis": DOCUMENTS["default-bridge"]}
    discovery = start("redis", own_id=lambda: own["Id"])
    assert "shares no network" in discovery.states()[0].problem
    assert world.looks(own["Id"]) == 1  # once, not at each look
    moved = copy.deepcopy(DOCUMENTS["ambassador-default"]) | {"Id": own["Id"]}
    world.containers[own["Id"]] = moved
    world.send(event("n", kind="network", container=own["Id"]))
    wait_until(lambda: discovery.states()[0].address == "172.29.0.2")
    assert world.looks(own["Id"]) == 2


def test_an_engine_that_does_not_know_it_is_seen_from_the_host(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    assert start("web", own_id=lambda: "9" * 64).states()[0].address == "10.0.0.2"


def test_its_own_place_stands_while_it_cannot_be_asked(world: World, start: Start) -> None:
    own = copy.deepcopy(DOCUMENTS["ambassador-default"])
    world.containers = {own["Id"]: own, "web": DOCUMENTS["default-bridge"] | {"Name": "/web"}}
    discovery = start("web", own_id=lambda: own["Id"])
    world.containers[own["Id"]] = EngineError("500", status=500)
    before = world.looks("web")
    world.send(b"junk\n")
    wait_until(lambda: world.looks("web") > before)
    settle(world)
    assert (discovery.states()[0].address, discovery.states()[0].problem) == ("172.29.0.2", "")


# --- the Engine goes and comes -----------------------------------------------------------------


def test_absent_at_start_is_waited_for(world: World, start: Start, log: Log) -> None:
    world.failure = EngineError("there is no socket /x.sock: mount it", retry_is_cheap=True)
    world.containers["web"] = container("web")
    discovery = start("web", wait=False)
    wait_until(lambda: len(world.connects) >= 3)
    assert not discovery.connected and discovery.states() == (TargetState("web"),)
    assert len(log.having("no socket /x.sock")) == 1
    world.failure = None
    wait_until(lambda: discovery.states()[0].address == "10.0.0.2")
    assert discovery.connected
    assert len(log.having("connected to Docker again")) == 1


def test_states_stand_while_it_is_away_and_are_refreshed_after(
    world: World, start: Start, log: Log
) -> None:
    world.containers["web"] = container("web")
    discovery = start("web")
    world.failure = GONE
    world.streams[-1].close()
    wait_until(lambda: not discovery.connected)
    wait_until(lambda: len(world.connects) >= 4)
    assert discovery.states()[0].address == "10.0.0.2"
    assert len(log.having("cannot ask Docker")) == 1
    world.containers["web"] = container("web", "10.0.0.6")  # an event that nobody heard
    world.failure = None
    wait_until(lambda: discovery.states()[0].address == "10.0.0.6")
    assert len(log.having("connected to Docker again")) == 1


@pytest.mark.alone
def test_a_cut_stream_is_opened_again_silently(
    world: World, start: Start, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ambassador.discovery.docker_source.STREAM_LIVED_S", 0.0)
    world.containers["web"] = container("web")
    discovery = start("web")
    lines = list(log.lines)
    began = time.monotonic()
    world.streams[-1].close()
    wait_until(lambda: len(world.streams) == 2 and world.looks("web") == 2)
    assert time.monotonic() - began < 0.2
    assert discovery.connected
    assert log.lines == lines
    assert world.closed == 1  # the former connection


def test_a_stream_that_is_cut_at_once_is_no_storm(world: World, start: Start, log: Log) -> None:
    start("web")

    def cut() -> None:
        for stream in list(world.streams):
            stream.close()

    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        cut()
        time.sleep(0.001)
    assert 2 <= len(world.streams) <= 10
    assert len(log.having("Docker")) == 0


def test_reconnecting_backs_off(world: World, start: Start) -> None:
    world.failure = EngineError("no route to host")
    start("web", wait=False)
    time.sleep(0.7)
    assert 3 <= len(world.connects) <= 9
    gaps = [b - a for a, b in zip(world.connects, world.connects[1:], strict=False)]
    assert gaps[-1] > gaps[0]


def test_a_local_socket_is_tried_every_second_at_most_after(
    world: World, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ambassador.discovery.docker_source.LOCAL_CAP_S", 0.02)
    world.failure = GONE
    start("web", wait=False)
    wait_until(lambda: len(world.connects) >= 20, timeout_s=2.0)


def test_a_new_reason_is_said_but_not_at_once(world: World, start: Start, log: Log) -> None:
    now = [0.0]
    world.failure = GONE
    start("web", wait=False, clock=lambda: now[0], backoff_max=0.01)
    wait_until(lambda: log.having("nobody listens"))
    world.failure = EngineError("permission denied")
    count = len(world.connects)
    wait_until(lambda: len(world.connects) > count + 3)
    assert not log.having("permission denied")
    now[0] = 11.0
    wait_until(lambda: log.having("permission denied"))
    now[0] = 50.0
    count = len(world.connects)
    wait_until(lambda: len(world.connects) > count + 3)
    assert len(log.having("cannot ask Docker")) == 2


def test_an_unanswered_ping_closes_the_stream(world: World, start: Start, log: Log) -> None:
    world.containers["web"] = container("web")
    discovery = start("web", wait=False, ping_every=0.02)
    wait_until(lambda: discovery.states()[0].address == "10.0.0.2")
    world.failure = world.ping_failure = EngineError("does not answer")
    wait_until(lambda: not discovery.connected)
    assert discovery.states()[0].address == "10.0.0.2"
    world.failure = world.ping_failure = None
    wait_until(lambda: discovery.connected and len(world.streams) == 2)


def test_a_forbidden_ping_is_an_answer(world: World, start: Start) -> None:
    world.ping_failure = EngineError("forbidden", status=403)
    discovery = start("web", wait=False, ping_every=0.01)
    wait_until(lambda: world.calls.count("ping") >= 5)
    assert discovery.connected and len(world.streams) == 1


def test_a_connection_without_events_is_closed_again(
    world: World, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise EngineError("forbids GET /events (403)", status=403)

    monkeypatch.setattr(FakeEngine, "events", forbidden)
    discovery = start("web", wait=False)
    wait_until(lambda: len(world.connects) >= 3)
    assert world.closed >= 2 and not discovery.connected


# --- the end -----------------------------------------------------------------------------------


@pytest.mark.alone
def test_stop_ends_every_thread_and_calls_nobody(world: World, start: Start) -> None:
    changes: list[int] = []
    before = set(threading.enumerate())
    world.containers["web"] = container("web")
    discovery = start("web", "db", on_change=lambda: changes.append(1))
    assert len(set(threading.enumerate()) - before) == 4
    began = time.monotonic()
    discovery.stop()
    assert time.monotonic() - began < 0.5
    wait_until(lambda: not set(threading.enumerate()) - before)
    count = len(changes)
    world.containers["web"] = container("web", "10.0.0.9")
    world.send(event("web"))
    time.sleep(0.02)
    assert len(changes) == count and world.closed >= 1


def test_stop_while_there_is_no_engine(world: World, start: Start) -> None:
    before = set(threading.enumerate())
    world.failure = GONE
    discovery = start("web", wait=False)
    wait_until(lambda: len(world.connects) >= 2)
    discovery.stop()
    wait_until(lambda: not set(threading.enumerate()) - before)
