"""The threads together: which targets an event concerns, and what stays while the Engine is away."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from ambassador.engine.api import EngineError
from ambassador.model import TargetState
from tests.unit.fake_engine import (
    GONE,
    FakeEngine,
    Log,
    Start,
    World,
    address_of,
    container,
    event,
    settle,
    until,
)

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
        (event("n", kind="network").replace(b"start", b"destroy"), 0, 0),
        (event("v", kind="volume"), 1, 1),
        (b"junk\n", 1, 1),
        (b"{}\n", 1, 1),
    ],
)
def test_which_targets_an_event_concerns(
    world: World, start: Start, data: bytes, web: int, db: int
) -> None:
    world.containers = {"web": container("web"), "db": container("db")}
    start("web", "db")
    world.calls.clear()
    world.send(data)
    until(lambda: world.inspects("web") >= web and world.inspects("db") >= db)
    settle(world)
    assert (world.inspects("web"), world.inspects("db")) == (web, db)


def test_an_event_concerns_a_target_given_by_id(world: World, start: Start) -> None:
    ident = "ab" * 32
    short = ident[:12]
    start(short)
    world.containers[short] = container("web", ident=ident)
    world.send(event("web", ident=ident))
    until(lambda: world.inspects(short) == 2)


def test_a_burst_is_two_inspects_and_the_first_is_at_once(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    start("web", debounce=0.2)
    time.sleep(0.25)
    world.calls.clear()
    began = time.monotonic()
    world.send(event("web") * 100)
    until(lambda: world.inspects("web") == 1)
    assert time.monotonic() - began < 0.15
    for _ in range(20):
        world.send(event("web"))
        time.sleep(0.002)
    until(lambda: world.inspects("web") == 2)
    time.sleep(0.3)
    assert world.inspects("web") == 2


def test_an_event_during_an_inspect_causes_one_more(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    source = start("web")
    inspecting, go_on = threading.Event(), threading.Event()

    def slow() -> Any:
        world.containers["web"] = container("web", "10.0.0.5")  # the next inspect's answer
        inspecting.set()
        go_on.wait(5)
        return container("web", "10.0.0.4")

    world.containers["web"] = slow
    world.calls.clear()
    world.send(event("web"))
    assert inspecting.wait(5)
    for _ in range(10):
        world.send(event("web"))
    time.sleep(0.02)
    go_on.set()
    until(lambda: address_of(source) == "10.0.0.5")
    settle(world)
    assert world.inspects("web") == 2


def test_reconcile_finds_a_change_without_an_event(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    source = start("web", wait=False, reconcile_every=0.05, ping_every=0.05)
    until(lambda: address_of(source) == "10.0.0.2")
    world.containers["web"] = container("web", "10.0.0.8")
    until(lambda: address_of(source) == "10.0.0.8")


# --- the Engine goes and comes -----------------------------------------------------------------


def test_absent_at_start_is_waited_for(world: World, start: Start, log: Log) -> None:
    world.failure = EngineError("there is no socket /x.sock: mount it", retry_is_cheap=True)
    world.containers["web"] = container("web")
    source = start("web", wait=False)
    until(lambda: len(world.connects) >= 3)
    assert not source.connected and source.targets() == (TargetState("web"),)
    assert len(log.having("no socket /x.sock")) == 1
    world.failure = None
    until(lambda: address_of(source) == "10.0.0.2")
    assert source.connected
    assert len(log.having("connected to Docker again")) == 1


def test_states_stand_while_it_is_away_and_are_refreshed_after(
    world: World, start: Start, log: Log
) -> None:
    world.containers["web"] = container("web")
    source = start("web")
    world.failure = GONE
    world.streams[-1].close()
    until(lambda: not source.connected)
    until(lambda: len(world.connects) >= 4)
    assert address_of(source) == "10.0.0.2"
    assert len(log.having("cannot ask Docker")) == 1
    world.containers["web"] = container("web", "10.0.0.6")  # an event that nobody heard
    world.failure = None
    until(lambda: address_of(source) == "10.0.0.6")
    assert len(log.having("connected to Docker again")) == 1


def test_a_cut_stream_is_opened_again_silently(
    world: World, start: Start, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ambassador.discovery.docker_source.STREAM_LIVED_S", 0.0)
    world.containers["web"] = container("web")
    source = start("web")
    lines = list(log.lines)
    began = time.monotonic()
    world.streams[-1].close()
    until(lambda: len(world.streams) == 2 and world.inspects("web") == 2)
    assert time.monotonic() - began < 0.2
    assert source.connected
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
    until(lambda: len(world.connects) >= 20, 2.0)


def test_a_new_reason_is_logged_but_not_at_once(world: World, start: Start, log: Log) -> None:
    now = [0.0]
    world.failure = GONE
    start("web", wait=False, clock=lambda: now[0], backoff_max=0.01)
    until(lambda: log.having("nobody listens"))
    world.failure = EngineError("permission denied")
    count = len(world.connects)
    until(lambda: len(world.connects) > count + 3)
    assert not log.having("permission denied")
    now[0] = 11.0
    until(lambda: log.having("permission denied"))
    now[0] = 50.0
    count = len(world.connects)
    until(lambda: len(world.connects) > count + 3)
    assert len(log.having("cannot ask Docker")) == 2


def test_an_unanswered_ping_closes_the_stream(world: World, start: Start, log: Log) -> None:
    world.containers["web"] = container("web")
    source = start("web", wait=False, ping_every=0.02)
    until(lambda: address_of(source) == "10.0.0.2")
    world.failure = world.ping_failure = EngineError("does not answer")
    until(lambda: not source.connected)
    assert address_of(source) == "10.0.0.2"
    world.failure = world.ping_failure = None
    until(lambda: source.connected and len(world.streams) == 2)


def test_a_forbidden_ping_is_an_answer(world: World, start: Start) -> None:
    world.ping_failure = EngineError("forbidden", status=403)
    source = start("web", wait=False, ping_every=0.01)
    until(lambda: world.calls.count("ping") >= 5)
    assert source.connected and len(world.streams) == 1


@pytest.mark.parametrize("status", [403, 500])
def test_without_events_all_are_inspected_at_intervals(
    world: World, start: Start, log: Log, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """D9: Podman runs without events, and proxies forbid them; an event is but a hint."""
    monkeypatch.setattr("ambassador.discovery.docker_source.POLL_S", 0.02)
    monkeypatch.setattr("ambassador.discovery.docker_source.POLLS_PER_SECOND", 100)
    subscribe, forbidden = FakeEngine.events, EngineError("no GET /events", status=status)

    def refuse(*_: object) -> None:
        raise forbidden

    monkeypatch.setattr(FakeEngine, "events", refuse)
    world.containers["web"] = container("web")
    source = start("web", wait=False)
    until(lambda: address_of(source) == "10.0.0.2")
    world.containers["web"] = container("web", "10.0.0.9")
    until(lambda: address_of(source) == "10.0.0.9")
    until(lambda: world.inspects("web") > 20)
    (line,) = log.having("WARNING")
    assert "no events, inspecting at intervals" in line and "no GET /events" in line
    assert source.connected and world.closed == 0 and len(world.connects) == 1
    monkeypatch.setattr(FakeEngine, "events", subscribe)
    until(lambda: log.having("Docker tells events again"))
    settle(world)
    world.containers["web"] = container("web", "10.0.0.8")
    world.send(event("web"))
    until(lambda: address_of(source) == "10.0.0.8")


def test_an_engine_that_goes_while_it_is_polled(
    world: World, start: Start, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ambassador.discovery.docker_source.POLL_S", 0.02)

    def refuse(*_: object) -> None:
        raise EngineError("no GET /events", status=500)

    monkeypatch.setattr(FakeEngine, "events", refuse)
    source = start("web", wait=False)
    until(lambda: source.connected)
    world.failure = world.ping_failure = GONE
    until(lambda: not source.connected)
    world.failure = world.ping_failure = None
    until(lambda: source.connected)
    assert len(log.having("connected to Docker again")) == 1


def test_a_deaf_stream_is_given_up(
    world: World, start: Start, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6: a change that only the reconcile found proves that events are missing."""
    monkeypatch.setattr("ambassador.discovery.watcher.GRACE_S", 0.05)
    world.containers["web"] = container("web")
    source = start("web", wait=False, reconcile_every=0.1, ping_every=0.1)
    until(lambda: address_of(source) == "10.0.0.2")
    for _ in range(3):  # what an event tells is no proof, also if the reconcile comes first
        source._refresh_all(fresh=False)
        settle(world)
        world.containers["web"] = container("web", f"10.0.0.{len(world.calls) % 200 + 20}")
        source._refresh_all(fresh=False)
        time.sleep(0.01)
        world.send(event("web"))
        time.sleep(0.2)
    assert len(world.streams) == 1 and not log.having("missing")
    world.containers["web"] = container("web", "10.0.0.8")
    until(lambda: len(world.streams) == 2)
    assert address_of(source) == "10.0.0.8"
    assert len(log.having("an event is missing, subscribing again")) == 1


def test_news_that_may_concern_any_is_bounded(
    world: World, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: 100 targets would be inspected for each event that is not understood."""
    monkeypatch.setattr("ambassador.discovery.docker_source.INSPECT_ALL_GAP_S", 0.2)
    world.containers["web"] = container("web")
    start("web")
    world.calls.clear()
    for _ in range(30):
        world.send(event("v", kind="volume"))
        time.sleep(0.01)
    assert 1 <= world.inspects("web") <= 3
    world.containers["web"] = container("web", "10.0.0.9")
    time.sleep(0.25)
    assert world.inspects("web") <= 4


# --- the end -----------------------------------------------------------------------------------


def test_stop_ends_every_thread_and_calls_nobody(world: World, start: Start) -> None:
    changes: list[int] = []
    before = set(threading.enumerate())
    world.containers["web"] = container("web")
    source = start("web", "db", on_change=lambda: changes.append(1))
    assert len(set(threading.enumerate()) - before) == 6
    began = time.monotonic()
    source.stop()
    assert time.monotonic() - began < 0.5
    until(lambda: not set(threading.enumerate()) - before)
    count = len(changes)
    world.containers["web"] = container("web", "10.0.0.9")
    world.send(event("web"))
    time.sleep(0.02)
    assert len(changes) == count and world.closed >= 1


def test_stop_while_there_is_no_engine(world: World, start: Start) -> None:
    before = set(threading.enumerate())
    world.failure = GONE
    source = start("web", wait=False)
    until(lambda: len(world.connects) >= 2)
    source.stop()
    until(lambda: not set(threading.enumerate()) - before)
