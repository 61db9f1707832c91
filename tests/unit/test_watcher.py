"""One target's thread: inspects, retries and log lines."""

from __future__ import annotations

import copy
import json
import threading
import time
from typing import Any

import pytest

from ambassador.discovery.docker_source import DockerSource
from ambassador.discovery.watcher import LOUD_CHANGES, RETRIES
from ambassador.engine.api import EngineError
from ambassador.model import TargetState
from tests.unit.fake_engine import (
    DOCUMENTS,
    GONE,
    REDIS,
    Log,
    Start,
    World,
    address_of,
    container,
    event,
    settle,
    until,
)

# --- inspects ----------------------------------------------------------------------------------


def test_states_come_in_the_order_of_the_targets(world: World, start: Start) -> None:
    world.containers = {"web": container("web"), "db": container("db", "10.0.0.3")}
    source = start("web", "nope", "db")
    web, nope, db = source.targets()
    assert (web.target, web.replicas[0].address) == ("web", "10.0.0.2")
    assert nope == TargetState("nope")
    assert (db.target, db.replicas[0].address) == ("db", "10.0.0.3")
    assert db.ports == REDIS


def test_subscribed_before_the_first_inspect(world: World, start: Start) -> None:
    start("web")
    assert world.calls.index("events") < world.calls.index("inspect web")


def test_one_request_for_an_inspect(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    start("web")
    assert world.inspects("web") == 1
    world.send(event("web"))
    settle(world)
    assert sorted(world.calls) == ["events", "info", "inspect web", "inspect web"]


def test_on_change_comes_after_the_state_and_only_then(world: World, start: Start) -> None:
    seen: list[tuple[TargetState, ...]] = []
    made: list[DockerSource] = []
    world.containers["web"] = container("web")
    world.failure = GONE
    made.append(start("web", wait=False, on_change=lambda: seen.append(made[0].targets())))
    world.failure = None
    until(lambda: seen)
    assert seen[0][0].replicas[0].address == "10.0.0.2"
    for _ in range(5):
        world.send(event("web"))
        settle(world)
    assert len(seen) == 1
    world.containers["web"] = container("web", "10.0.0.9")
    world.send(event("web"))
    until(lambda: len(seen) == 2)
    assert seen[1][0].replicas[0].address == "10.0.0.9"


def test_a_restart_that_keeps_the_address_is_a_change(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    source = start("web")
    world.containers["web"] = container("web", StartedAt="2027-01-01T00:00:00Z")
    world.send(event("web"))
    until(lambda: source.targets()[0].replicas[0].run == "2027-01-01T00:00:00Z")


def test_another_containers_answer_is_not_taken(world: World, start: Start) -> None:
    world.containers["db"] = container("other", ident="db" * 32)
    source = start("db")
    assert source.targets() == (TargetState("db"),)


def test_gone_keeps_the_ports_and_drops_the_address(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    source = start("web")
    del world.containers["web"]
    world.send(event("web"))
    gone = TargetState("web", REDIS, container=container("web")["Id"])
    until(lambda: source.targets()[0] == gone)


def test_a_blocked_inspect_delays_its_own_target_only(world: World, start: Start) -> None:
    release = threading.Event()

    def blocked() -> Any:
        release.wait(5)
        return container("stuck")

    world.containers = {"stuck": blocked, "web": container("web")}
    source = start("stuck", "web", wait=False)
    until(lambda: address_of(source, 1) == "10.0.0.2")
    assert address_of(source) is None
    world.containers["web"] = container("web", "10.0.0.7")
    world.send(event("web"))
    until(lambda: address_of(source, 1) == "10.0.0.7")
    release.set()
    until(lambda: address_of(source) == "10.0.0.2")


def test_a_joined_container_is_asked_too_and_its_events_count(world: World, start: Start) -> None:
    owner = copy.deepcopy(DOCUMENTS["user-network"])
    world.containers = {"sidecar": DOCUMENTS["joined"], owner["Id"]: owner}
    source = start("sidecar")
    assert address_of(source) == "172.30.0.2"
    world.containers[owner["Id"]] = DOCUMENTS["user-network-stopped"]
    world.send(event("web", ident=owner["Id"]))
    until(lambda: address_of(source) is None)
    assert "web, which is not running" in source.targets()[0].problem


def test_a_network_is_asked_for_once_and_only_if_it_decides(world: World, start: Start) -> None:
    two = copy.deepcopy(DOCUMENTS["two-networks"])
    world.containers = {"two": two, "web": container("web")}
    ident = two["NetworkSettings"]["Networks"]["back"]["NetworkID"]
    other = two["NetworkSettings"]["Networks"]["front"]["NetworkID"]
    world.network_list = [
        {"Id": ident, "Name": "back", "Driver": "overlay"},
        {"Id": other, "Name": "front", "Driver": "bridge"},
    ]
    source = start("two", "web")
    assert world.calls.count("networks") == 1
    assert address_of(source) == "172.30.5.2"
    world.network_list = EngineError("forbidden", status=403)
    for _ in range(3):
        world.send(event("two"))
        settle(world)
    assert world.calls.count("networks") == 1
    assert address_of(source) == "172.30.5.2"


def test_a_forbidden_list_of_networks_counts_as_unknown(world: World, start: Start) -> None:
    two = copy.deepcopy(DOCUMENTS["two-networks"])
    world.containers = {"two": two}
    world.network_list = EngineError("forbidden", status=403)
    assert address_of(start("two")) == "172.30.0.3"


def test_the_address_in_use_stays_as_networks_are_connected(world: World, start: Start) -> None:
    two = copy.deepcopy(DOCUMENTS["two-networks"])
    back = two["NetworkSettings"]["Networks"].pop("back")
    world.containers = {"two": two}
    source = start("two")
    assert address_of(source) == "172.30.5.2"
    before = source.targets()
    two["NetworkSettings"]["Networks"]["back"] = back
    world.send(event("two"))
    settle(world)
    assert source.targets() == before
    two["State"]["StartedAt"] = "2027-01-01T00:00:00Z"  # a new run chooses anew
    world.send(event("two"))
    until(lambda: address_of(source) == "172.30.0.3")


def test_who_joined_which_run_is_remembered(world: World, start: Start) -> None:
    """The clock was set back between the two starts: a restart of the member settles it, whatever it says."""
    owner = copy.deepcopy(DOCUMENTS["user-network-restarted"])
    sidecar = copy.deepcopy(DOCUMENTS["joined"]) | {"Name": "/sidecar"}
    world.containers = {"sidecar": sidecar, owner["Id"]: owner}
    source = start("sidecar")
    assert "before its restart" in source.targets()[0].problem
    sidecar = copy.deepcopy(sidecar)
    sidecar["State"]["StartedAt"] = "2026-11-01T00:00:00Z"
    world.containers["sidecar"] = sidecar
    world.send(event("sidecar"))
    until(lambda: address_of(source) == "172.30.0.2")
    owner = copy.deepcopy(owner)
    owner["State"]["StartedAt"] = "2026-10-01T00:00:00Z"
    world.containers[owner["Id"]] = owner
    world.send(event("web", ident=owner["Id"]))
    until(lambda: "before its restart" in source.targets()[0].problem)


def test_a_chain_of_joined_containers_is_followed(world: World, start: Start) -> None:
    owner = copy.deepcopy(DOCUMENTS["user-network"])
    middle = copy.deepcopy(DOCUMENTS["joined"]) | {"Id": "c" * 64, "Name": "/middle"}
    sidecar = copy.deepcopy(DOCUMENTS["joined"]) | {"Name": "/sidecar"}
    sidecar["HostConfig"]["NetworkMode"] = "container:" + "c" * 64
    world.containers = {"sidecar": sidecar, "c" * 64: middle, owner["Id"]: owner}
    source = start("sidecar")
    assert address_of(source) == "172.30.0.2"
    world.containers[owner["Id"]] = DOCUMENTS["user-network-stopped"]
    world.send(event("web", ident=owner["Id"]))
    until(lambda: address_of(source) is None)


@pytest.mark.parametrize("address", ["fe80::1%eth0", "fe80::1%9999999999999", "127.0.0.1"])
def test_an_address_that_no_container_has_is_none(world: World, start: Start, address: str) -> None:
    world.containers["web"] = container("web", address)
    source = start("web")
    assert (address_of(source), source.targets()[0].problem) == (None, "")


def test_a_name_is_one_target_with_and_without_its_slash(world: World, start: Start) -> None:
    world.containers["web"] = container("web")
    source = start("/web", "web", wait=False)
    until(lambda: address_of(source) == "10.0.0.2")
    (state,) = source.targets()
    assert (state.target, state.container) == ("web", world.containers["web"]["Id"])


# --- an address that is not there yet ----------------------------------------------------------


def test_an_empty_address_is_asked_for_again_without_an_event(world: World, start: Start) -> None:
    answers = iter([container("web", "")] * 3)
    world.containers["web"] = lambda: next(answers, container("web"))
    began = time.monotonic()
    source = start("web", wait=False)
    until(lambda: address_of(source) == "10.0.0.2")
    assert world.inspects("web") == 4
    assert time.monotonic() - began < 1.0
    settle(world)
    assert world.inspects("web") == 4


def test_the_retries_end_with_a_problem(
    world: World, start: Start, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ambassador.discovery.watcher.RETRY_CAP_S", 0.01)
    monkeypatch.setattr("ambassador.discovery.watcher.RETRY_FIRST_S", 0.01)
    world.containers["web"] = container("web", "")
    source = start("web", wait=False)
    until(lambda: source.targets()[0].problem)
    assert "no address" in source.targets()[0].problem
    settle(world)
    assert world.inspects("web") == RETRIES + 1
    assert len(log.having("no address")) == 1
    world.containers["web"] = container("web")
    world.send(event("web"))
    until(lambda: address_of(source) == "10.0.0.2")
    assert source.targets()[0].problem == ""


# --- errors of one target ----------------------------------------------------------------------


def test_an_error_keeps_the_address_and_is_logged_once(
    world: World, start: Start, log: Log
) -> None:
    world.containers["web"] = container("web")
    source = start("web")
    world.containers["web"] = EngineError("answers with 500: broken", status=500)
    world.calls.clear()
    world.send(event("web"))
    until(lambda: world.inspects("web") >= 3)  # without further events
    assert address_of(source) == "10.0.0.2"
    assert source.targets()[0].problem == "answers with 500: broken"
    assert len(log.having("500: broken")) == 1
    world.containers["web"] = container("web")
    until(lambda: source.targets()[0].problem == "")
    assert len(log.having("inspect works again")) == 1


def test_one_broken_connection_is_not_worth_a_line(world: World, start: Start, log: Log) -> None:
    answers = iter([EngineError("connection reset")])
    world.containers["web"] = lambda: next(answers, container("web"))
    source = start("web", wait=False)
    until(lambda: address_of(source) == "10.0.0.2")
    assert not log.having("connection reset")


def test_a_bug_does_not_end_the_thread(world: World, start: Start, log: Log) -> None:
    def bug() -> Any:
        raise RuntimeError("oops")

    world.containers["web"] = bug
    source = start("web", wait=False)
    until(lambda: log.having("unexpected RuntimeError: oops"))
    world.containers["web"] = container("web")
    until(lambda: address_of(source) == "10.0.0.2")


# --- log lines ---------------------------------------------------------------------------------


def test_each_change_is_logged_once(world: World, start: Start, log: Log) -> None:
    source = start("web")

    def become(document: Any, words: str) -> None:
        if document is None:
            world.containers.pop("web", None)
        else:
            world.containers["web"] = document
        for _ in range(2):
            world.send(event("web"))
            settle(world)
        assert len(log.having(words)) == 1, log.lines
        log.lines.clear()

    become(None, "no such container, waiting")
    become(container("web"), "target is running")
    become(container("web", "", Running=False), "target is not running, waiting")
    become(container("web", Running=True), "target is running")
    become(DOCUMENTS["exposes-nothing"] | {"Name": "/web"}, "exposes no port")
    become(None, "no such container")
    assert source.connected


def test_ports_that_are_not_relayed_are_logged_once(world: World, start: Start, log: Log) -> None:
    world.containers["web"] = DOCUMENTS["user-network"]
    start("web")
    world.send(event("web"))
    settle(world)
    (line,) = log.having("ports left out, only TCP and UDP")
    assert "3868/sctp" in line


def test_a_crash_loop_does_not_fill_the_log(world: World, start: Start, log: Log) -> None:
    runs = iter(range(10_000))
    world.containers["web"] = lambda: container("web", StartedAt=f"run {next(runs)}")
    source = start("web", debounce=0.0)
    for _ in range(3 * LOUD_CHANGES):
        before = source.targets()[0]
        world.send(event("web"))
        until(lambda before=before: source.targets()[0] != before)  # type: ignore[misc]
    assert len(log.having("target is running")) == LOUD_CHANGES
    assert len(log.having("changes often")) == 1
    assert len([line for line in log.every if "target is running" in line]) > 2 * LOUD_CHANGES


def test_changes_are_logged_again_after_a_minute(world: World, start: Start, log: Log) -> None:
    now = [0.0]
    runs = iter(range(10_000))
    world.containers["web"] = lambda: container("web", StartedAt=f"run {next(runs)}")
    source = start("web", debounce=0.0, clock=lambda: now[0])
    for _ in range(2 * LOUD_CHANGES):
        before = source.targets()[0]
        world.send(event("web"))
        until(lambda before=before: source.targets()[0] != before)  # type: ignore[misc]
    before_that = len(log.having("target is running"))
    now[0] = 61.0
    world.send(event("web"))
    until(lambda: len(log.having("target is running")) == before_that + 1)


def test_the_last_line_is_the_present_state(world: World, start: Start, log: Log) -> None:
    now = [0.0]
    runs = iter(range(10_000))
    world.containers["web"] = lambda: container("web", StartedAt=f"run {next(runs)}")
    source = start("web", debounce=0.0, clock=lambda: now[0])
    for _ in range(LOUD_CHANGES + 5):
        before = source.targets()[0]
        world.send(event("web"))
        until(lambda before=before: source.targets()[0] != before)  # type: ignore[misc]
    world.containers["web"] = last = container("web", "10.0.0.9", StartedAt="last")
    now[0] = 59.95
    world.send(event("web"))
    until(lambda: address_of(source) == "10.0.0.9")
    settle(world)
    assert not log.having("10.0.0.9")
    now[0] = 60.5
    until(lambda: log.having("10.0.0.9"))  # without an event
    settle(world)
    (line,) = log.having("10.0.0.9")
    assert "'changes_left_out'" in line and last["Id"][:12] in line


def test_an_inspect_that_takes_long_is_one_line(world: World, start: Start, log: Log) -> None:
    """D13: it is waited for, and the user knows."""
    now, go_on = [0.0], threading.Event()

    def slow() -> Any:
        go_on.wait(5)
        return container("web")

    world.containers["web"] = slow
    source = start("web", wait=False, ping_every=0.01, clock=lambda: now[0])
    until(lambda: world.inspects("web") == 1 and world.calls.count("ping") > 3)
    assert not log.having("takes long")
    now[0] = 11.0
    until(lambda: log.having("inspect takes long: check the daemon"))
    count = world.calls.count("ping")
    until(lambda: world.calls.count("ping") > count + 3)
    assert len(log.having("takes long")) == 1
    go_on.set()
    until(lambda: address_of(source) == "10.0.0.2")


# --- a death -----------------------------------------------------------------------------------

STARTED = "2026-01-01T00:00:00.5Z"
STARTED_NS = 1_767_225_600_500_000_000


def told(action: str, ident: str, at: int, name: str = "web") -> bytes:
    value = json.loads(event(name, ident))
    return json.dumps({**value, "Action": action, "timeNano": at}).encode() + b"\n"


def died(ident: str, at: int) -> bytes:
    return told("die", ident, at)


def test_a_death_drops_the_address_before_inspect_answers(world: World, start: Start) -> None:
    """C4: Docker answers inspect only when it has cleaned up behind the container."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    source = start("web")
    assert address_of(source) is not None
    cleaned = threading.Event()

    def slow() -> Any:
        cleaned.wait(5)
        return {**document, "State": {**document["State"], "Running": False}}

    world.containers["web"] = slow
    world.send(died(document["Id"], STARTED_NS + 1000))
    until(lambda: address_of(source) is None, 1.0)
    assert not cleaned.is_set(), "known while inspect still waits"
    assert source.targets()[0].ports == REDIS
    cleaned.set()
    settle(world)
    assert address_of(source) is None


def test_an_inspect_from_before_the_death_is_discarded(world: World, start: Start) -> None:
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    source = start("web")
    asked, answer = threading.Event(), threading.Event()

    def slow() -> Any:
        asked.set()
        answer.wait(5)
        world.containers["web"] = {**document, "State": {**document["State"], "Running": False}}
        return document

    world.containers["web"] = slow
    world.send(event("web"))
    assert asked.wait(5)
    world.send(died(document["Id"], STARTED_NS + 1000))
    until(lambda: address_of(source) is None)
    addresses = set()
    answer.set()
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        addresses.add(address_of(source))
    assert addresses == {None}


@pytest.mark.parametrize("at", [STARTED_NS - 1000, STARTED_NS])
def test_an_old_death_changes_nothing(world: World, start: Start, at: int) -> None:
    """D11: the stream is late: it has told the start of an older run, so the death is that run's."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    changes: list[None] = []
    source = start("web", on_change=lambda: changes.append(None))
    settle(world)
    before = len(changes)
    world.send(told("start", document["Id"], STARTED_NS - 2_000_000))
    world.send(told("die", document["Id"], at))
    settle(world)
    assert len(changes) == before
    assert address_of(source) is not None


@pytest.mark.parametrize("start_is_told", [False, True])
def test_a_death_after_the_clock_was_set_back(
    world: World, start: Start, start_is_told: bool
) -> None:
    """D11: the order of the stream decides, not the time: the address may be a stranger's."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    source = start("web")
    if start_is_told:
        world.send(told("start", document["Id"], STARTED_NS + 1000))
        settle(world)
    hold = threading.Event()
    world.containers["web"] = lambda: hold.wait(5) and document
    world.send(told("die", document["Id"], STARTED_NS - 3600 * 10**9))
    until(lambda: address_of(source) is None, 1.0)
    hold.set()


def test_a_start_of_the_former_stream_proves_nothing(world: World, start: Start) -> None:
    """C4: what was missed between two streams may be the start of the run that is known."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    source = start("web")
    world.send(told("start", document["Id"], STARTED_NS - 2_000_000))
    settle(world)
    world.streams[-1].close()
    until(lambda: len(world.streams) == 2)
    settle(world)
    hold = threading.Event()
    world.containers["web"] = lambda: hold.wait(5) and document
    world.send(told("die", document["Id"], STARTED_NS - 1_000_000))
    until(lambda: address_of(source) is None, 1.0)
    hold.set()


@pytest.mark.parametrize("role", ["same container", "first run of a new one", "network's owner"])
def test_a_death_during_the_inspect_of_the_start(world: World, start: Start, role: str) -> None:
    """C4: the answer from before the death is void, whatever the address was: it may be a stranger's."""
    if role == "network's owner":
        name, document, dying = "sidecar", DOCUMENTS["joined"], DOCUMENTS["user-network"]
        world.containers[dying["Id"]] = dying
    else:
        name, document = "web", container("web", StartedAt=STARTED)
        dying = document
    if role == "same container":
        world.containers[name] = {**document, "State": {**document["State"], "Running": False}}
    source = start(name)
    assert address_of(source) is None
    seen: set[str | None] = set()
    asked, answer, hold = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Any:
        world.containers[name] = again
        asked.set()
        answer.wait(5)
        return document

    def again() -> Any:
        hold.wait(5)
        return None

    world.containers[name] = slow
    world.send(told("start", document["Id"], STARTED_NS + 1, name))
    assert asked.wait(5)
    world.send(told("die", dying["Id"], STARTED_NS + 2, "dying"))
    time.sleep(0.05)
    answer.set()
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        seen.add(address_of(source))
    assert seen == {None}
    until(lambda: world.inspects(name) >= 3)  # it is asked again, though no event names it
    hold.set()


NETWORK = DOCUMENTS["default-bridge"]["NetworkSettings"]["Networks"]["bridge"]["NetworkID"]


def left(network: str, name: str, ident: str, *, podman: bool = False) -> bytes:
    actor = {"ID": network, "Attributes": {"container": ident, "name": name}}
    if podman:
        actor = {"ID": ident, "Attributes": {"network": name}}
    value = {"Type": "network", "Action": "disconnect", "Actor": actor}
    return json.dumps(value).encode() + b"\n"


def renamed(ident: str, old: str, new: str) -> bytes:
    value = json.loads(event(new, ident, oldName=f"/{old}"))
    return json.dumps({**value, "Action": "rename"}).encode() + b"\n"


WEB = container("web")["Id"]


@pytest.mark.parametrize(
    ("loss", "is_hit"),
    [
        (left(NETWORK, "bridge", WEB), True),
        (left(NETWORK, "bridge", WEB, podman=True), True),
        (left("0" * 64, "other", WEB), False),
        (left(NETWORK, "bridge", "e" * 64), False),
        (renamed(WEB, "web", "old"), True),
        (renamed(WEB, "other", "web"), False),
        (renamed("e" * 64, "web", "old"), False),
        (told("destroy", WEB, 0), True),
        (told("stop", WEB, 0), False),
    ],
)
def test_a_loss_is_believed_before_inspect_answers(
    world: World, start: Start, loss: bytes, is_hit: bool
) -> None:
    """C4: an inspect may be slow or fail; whoever gets the address meanwhile is a stranger."""
    document = container("web")
    world.containers["web"] = document
    source = start("web")
    hold, asked = threading.Event(), threading.Event()

    def slow() -> Any:
        asked.set()
        hold.wait(5)
        return EngineError("out of order", status=500)

    world.containers["web"] = slow
    world.send(loss + event("web"))
    assert asked.wait(5)
    time.sleep(0.02)
    assert address_of(source) == (None if is_hit else "10.0.0.2")
    hold.set()
    settle(world)
    assert address_of(source) == (None if is_hit else "10.0.0.2")


def test_a_target_given_by_id_keeps_its_address_when_it_is_renamed(
    world: World, start: Start
) -> None:
    short = WEB[:12]
    world.containers[short] = world.containers[WEB] = container("web")
    changes: list[None] = []
    source = start(short, on_change=lambda: changes.append(None))
    changes.clear()
    world.send(renamed(WEB, "web", "old") + renamed(WEB, short, "old"))
    settle(world)
    assert address_of(source) == "10.0.0.2" and not changes


# --- a target that is given by its ID ------------------------------------------------------------


def test_a_container_named_like_the_id_is_not_the_target(
    world: World, start: Start, log: Log
) -> None:
    """I1: Docker's inspect prefers names to beginnings of IDs."""
    short = WEB[:12]
    world.containers[short] = world.containers[WEB] = container("web")
    source = start(short)
    stranger = container(short, "10.0.0.66", ident="e" * 64)
    world.containers[short] = stranger
    for _ in range(2):
        world.send(told("start", stranger["Id"], 0, short))
        settle(world)
    world.streams[-1].close()  # all are inspected
    until(lambda: len(world.streams) == 2)
    settle(world)
    assert address_of(source) == "10.0.0.2"
    assert len(log.having("another container is named like this id: rename it")) == 1
    del world.containers[WEB]
    world.send(told("destroy", WEB, 0))
    until(lambda: address_of(source) is None)
    settle(world)
    assert address_of(source) is None


def test_another_containers_death_changes_nothing(world: World, start: Start) -> None:
    world.containers["web"] = container("web", StartedAt=STARTED)
    source = start("web")
    world.send(died("e" * 64, STARTED_NS + 1000))
    settle(world)
    assert address_of(source) is not None


def test_an_inspect_that_denies_a_death_restores_the_address(world: World, start: Start) -> None:
    """Level-triggered: the inspect decides."""
    document = container("web", StartedAt=STARTED)
    world.containers["web"] = document
    source = start("web")
    world.send(died(document["Id"], STARTED_NS + 1000))
    settle(world)
    assert address_of(source) is not None
