"""The ambassador's own container and networks: how they are read, and what a hung inspect delays."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambassador.discovery.documents import container_id
from ambassador.discovery.own_networks import own_container_id, own_networks_of, own_short_id
from ambassador.engine.api import EngineError
from tests.unit.fake_engine import (
    DOCUMENTS,
    GONE,
    Log,
    Start,
    World,
    address_of,
    container,
    event,
    settle,
    until,
)

ENGINES = ("engine-20.10", "engine-26", "engine-29", "podman-5")
ID = "3f4c" * 16
OTHER_ID = "7a9b" * 16
OWN = copy.deepcopy(DOCUMENTS["ambassador-default"])
OWN_EVENT = event("n", kind="network", container=OWN["Id"])


def load(engine: str) -> dict[str, Any]:
    path = Path(__file__).parent / "documents" / f"{engine}.json"
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


class Hang:
    """An inspect that hangs until `end`, then answers with `document`."""

    def __init__(self, document: Any) -> None:
        self.document = document
        self.asked = threading.Event()
        self._end = threading.Event()

    def __call__(self) -> Any:
        self.asked.set()
        self._end.wait(10)
        return self.document

    def end(self) -> None:
        self._end.set()


@pytest.fixture
def hang() -> Iterator[Hang]:
    made = Hang(OWN)
    yield made
    made.end()


# --- reading -----------------------------------------------------------------------------------


MOUNT = "424 407 254:0 {root} {point} rw,relatime - ext4 /dev/vda rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "expected"),
    [
        (
            "".join(
                MOUNT.format(root=f"/var/lib/docker/containers/{ID}/{name}", point=f"/etc/{name}")
                for name in ("resolv.conf", "hostname", "hosts")
            ),
            "0::/\n",
            ID,
        ),
        (MOUNT.format(root=f"/containers/{ID}/hosts", point="/etc/hosts"), "", ID),
        # The directory of the containers is a file system of its own.
        (MOUNT.format(root=f"/{ID}/hostname", point="/etc/hostname"), "0::/\n", ID),
        (MOUNT.format(root=f"/volumes/{ID}/hostname", point="/etc/hostname"), "0::/\n", None),
        (
            MOUNT.format(
                root=f"/containers/storage/overlay-containers/{ID}/userdata/hostname",
                point="/etc/hostname",
            ),
            "0::/\n",
            ID,
        ),
        # The mounts are surer than the cgroup, and /etc/hostname is surest: hosts may be shared.
        (
            MOUNT.format(root=f"/containers/{OTHER_ID}/hosts", point="/etc/hosts")
            + MOUNT.format(root=f"/containers/{ID}/hostname", point="/etc/hostname"),
            f"3:cpu:/docker/{OTHER_ID}\n",
            ID,
        ),
        ("", f"12:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n", ID),
        ("", f"1:name=systemd:/system.slice/docker-{ID}.scope\n", ID),
        ("", f"1:cpu:/machine.slice/libpod-{ID}.scope/container\n", ID),
        # A host: its containers' directories, mounted elsewhere, say nothing about itself.
        (
            MOUNT.format(root=f"/containers/{ID}/mounts/shm", point="/var/lib/docker/shm"),
            "0::/",
            None,
        ),
        (MOUNT.format(root=f"/containers/{ID}/hostname", point="/mnt/hostname"), "", None),
        ("30 1 8:1 / / rw - ext4 /dev/sda1 rw\n", "0::/user.slice/user-0.slice\n", None),
        ("junk\n\n1 2\n", "junk", None),
        ("", "", None),
    ],
)
def test_own_container_id(mountinfo: str, cgroup: str, expected: str | None) -> None:
    assert own_container_id(mountinfo, cgroup) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_own_networks(engine: str) -> None:
    documents = load(engine)
    default = own_networks_of(documents["ambassador-default"])
    assert not default.host and len(default.attachments) == 1
    assert (
        default.network_owner
        == default.container_id
        == container_id(documents["ambassador-default"])
    )
    host = own_networks_of(documents["ambassador-host"])
    assert host.host and host.container_id == container_id(documents["ambassador-host"])
    joined = own_networks_of(documents["joined"], documents["user-network"])
    assert joined.container_id == container_id(documents["joined"])
    assert joined.network_owner == container_id(documents["user-network"])
    assert [a.network for a in joined.attachments] == ["back"]
    nowhere = own_networks_of(None)
    assert nowhere.host and nowhere.container_id == ""


# --- with the targets ---------------------------------------------------------------------------


def test_own_networks_decide_and_own_events_refresh_them(world: World, start: Start) -> None:
    own = copy.deepcopy(DOCUMENTS["ambassador-user"])
    world.containers = {own["Id"]: own, "redis": DOCUMENTS["default-bridge"]}
    source = start("redis", own_id=lambda: own["Id"])
    assert "shares no network" in source.targets()[0].problem
    assert world.inspects(own["Id"]) == 1  # once, not for each inspect of a target
    moved = copy.deepcopy(DOCUMENTS["ambassador-default"]) | {"Id": own["Id"]}
    world.containers[own["Id"]] = moved
    world.send(event("n", kind="network", container=own["Id"]))
    until(lambda: address_of(source) == "172.29.0.2")
    assert world.inspects(own["Id"]) == 2


def test_an_engine_that_does_not_know_the_own_container(
    world: World, start: Start, log: Log
) -> None:
    """It can be that of the host whose network this container uses, or any other."""
    world.containers["web"] = container("web")
    source = start("web", own_id=lambda: "9" * 64)
    until(lambda: address_of(source) == "10.0.0.2")
    (line,) = log.having("own container not found")
    assert line.startswith("WARNING") and "-sock" in line
    source = start("web", own_id=lambda: "9" * 64, addresses=lambda: frozenset({"172.17.0.3"}))
    until(lambda: "does not know the ambassador's container" in source.targets()[0].problem)
    assert address_of(source) is None


def test_a_gateway_that_comes_later_counts(world: World, start: Start) -> None:
    """A bridge gets its address with its network: no event of the own container tells."""
    world.containers["web"] = container("web")
    addresses = {"127.0.0.1"}
    source = start("web", addresses=lambda: frozenset(addresses))
    until(lambda: "where the host has no address" in source.targets()[0].problem)
    addresses.add("172.29.0.1")
    world.send(event("web"))
    until(lambda: address_of(source) == "10.0.0.2")


ROOTLESS = {"SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless"]}
ON_HOST = copy.deepcopy(DOCUMENTS["ambassador-host"])


@pytest.mark.parametrize(
    ("info", "own", "reached"),
    [
        ({}, None, True),
        (EngineError("a proxy forbids it", status=403), None, True),
        (EngineError("no answer in time"), None, True),
        (ROOTLESS, None, False),
        # In a container on the host network of a rootless Docker: that is where its bridges are.
        (ROOTLESS, ON_HOST, True),
        (ROOTLESS | {"BuildahVersion": "1.42.0"}, ON_HOST, False),
    ],
)
def test_a_rootless_engine(world: World, start: Start, info: Any, own: Any, reached: bool) -> None:
    world.containers["web"] = container("web")
    world.info = info
    if own is not None:
        world.containers[own["Id"]] = own
    source = start("web", own_id=lambda: own and own["Id"])
    until(lambda: source.targets()[0].replicas or source.targets()[0].problem)
    assert address_of(source) == ("10.0.0.2" if reached else None)
    assert ("rootless" in source.targets()[0].problem) is not reached
    assert world.calls.count("info") == 1


def test_from_a_container_the_engine_is_not_asked_what_it_is(world: World, start: Start) -> None:
    world.containers = {"web": on_bridge("web", "10.0.0.2"), OWN["Id"]: OWN}
    world.info = ROOTLESS
    assert address_of(start("web", own_id=lambda: OWN["Id"])) == "10.0.0.2"
    assert world.calls.count("info") == 0


# --- a container that does not say which it is ----------------------------------------------------


def test_the_hostname_is_the_last_try(world: World, start: Start, log: Log) -> None:
    world.containers = {"web": on_bridge("web", "10.0.0.2"), OWN["Id"][:12]: OWN, OWN["Id"]: OWN}
    (place,) = own_networks_of(OWN).attachments
    source = start(
        "web",
        short_id=lambda: OWN["Id"][:12],
        in_container=lambda: True,
        addresses=lambda: frozenset({place.address}),
    )
    until(lambda: address_of(source) == "10.0.0.2")
    assert log.having("not found") == []
    assert "'bridge'" in log.having("own networks")[0]
    world.send(OWN_EVENT)
    until(lambda: world.inspects(OWN["Id"]) == 1)


def test_a_hostname_alone_proves_nothing(world: World, start: Start, log: Log) -> None:
    """Another container's ID: its address is not here."""
    world.containers = {"web": on_bridge("web", "10.0.0.2"), OWN["Id"][:12]: OWN}
    source = start(
        "web",
        short_id=lambda: OWN["Id"][:12],
        in_container=lambda: True,
        addresses=lambda: frozenset({"192.168.0.9"}),
    )
    until(lambda: "has no address" in source.targets()[0].problem)
    (line,) = log.having("own container not found")
    assert line.startswith("WARNING") and "/etc/hostname" in line


def test_on_the_host_there_is_no_warning(world: World, start: Start, log: Log) -> None:
    world.containers["web"] = container("web")
    start("web")
    assert log.having("not found") == []
    assert "'host'" in log.having("own networks")[0]


def test_a_short_id_is_a_hostname_of_twelve_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("0123456789ab", "0123456789ab"), ("web", ""), ("0123456789abc", "")):
        monkeypatch.setattr("socket.gethostname", lambda name=name: name)
        assert own_short_id() == expected


def test_own_networks_stand_while_they_cannot_be_refreshed(
    world: World, start: Start, log: Log
) -> None:
    own = copy.deepcopy(DOCUMENTS["ambassador-default"])
    world.containers = {own["Id"]: own, "web": DOCUMENTS["default-bridge"] | {"Name": "/web"}}
    source = start("web", own_id=lambda: own["Id"])
    world.containers[own["Id"]] = EngineError("500", status=500)
    before = world.inspects("web")
    world.send(b"junk\n")
    until(lambda: world.inspects("web") > before)
    settle(world)
    assert (address_of(source), source.targets()[0].problem) == ("172.29.0.2", "")
    until(lambda: world.inspects(own["Id"]) > 3)
    assert len(log.having("own networks not refreshed, keeping them")) == 1


# --- a hung inspect of the own container ---------------------------------------------------------


def on_bridge(name: str, at: str) -> Any:
    """A container on the network of OWN."""
    document = copy.deepcopy(DOCUMENTS["default-bridge"])
    document["Name"], document["Id"] = f"/{name}", (name.encode().hex() * 64)[:64]
    document["NetworkSettings"]["Networks"]["bridge"]["IPAddress"] = at
    return document


def test_it_delays_no_known_target(world: World, start: Start, hang: Hang) -> None:
    """Each target has news while the own container's inspect hangs; each is known at once."""
    names = ("web", "db", "cache")
    world.containers = {name: on_bridge(name, "10.0.0.2") for name in names} | {OWN["Id"]: OWN}
    source = start(*names, own_id=lambda: OWN["Id"])
    assert [address_of(source, index) for index in range(3)] == ["10.0.0.2"] * 3
    world.containers[OWN["Id"]] = hang
    world.send(OWN_EVENT)
    assert hang.asked.wait(5)
    began = time.monotonic()
    for round_ in range(3, 6):
        for index, name in enumerate(names):
            world.containers[name] = on_bridge(name, f"10.0.{index}.{round_}")
            world.send(event(name))
        for index in range(3):
            expected = f"10.0.{index}.{round_}"
            until(lambda i=index, e=expected: address_of(source, i) == e)  # type: ignore[misc]
    assert time.monotonic() - began < 2.0
    assert world.inspects(OWN["Id"]) == 2, "one request hangs, and no other waits behind it"


def test_its_late_answer_counts(world: World, start: Start, hang: Hang) -> None:
    world.containers = {"web": on_bridge("web", "10.0.0.2"), OWN["Id"]: OWN}
    source = start("web", own_id=lambda: OWN["Id"])
    hang.document = copy.deepcopy(DOCUMENTS["ambassador-user"]) | {"Id": OWN["Id"]}
    world.containers[OWN["Id"]] = hang
    world.send(OWN_EVENT)
    assert hang.asked.wait(5)
    settle(world)
    assert address_of(source) == "10.0.0.2"
    hang.end()
    until(lambda: "shares no network" in source.targets()[0].problem)


def test_at_the_start_all_targets_wait_for_it(world: World, start: Start, hang: Hang) -> None:
    """Without the own networks no address can be chosen: the first answer serves every target."""
    world.containers = {"web": on_bridge("web", "10.0.0.2"), "db": on_bridge("db", "10.0.0.3")}
    world.containers[OWN["Id"]] = hang
    source = start("web", "db", own_id=lambda: OWN["Id"])
    assert (address_of(source), address_of(source, 1)) == (None, None)
    assert [state.problem for state in source.targets()] == ["", ""]
    hang.end()
    until(lambda: (address_of(source), address_of(source, 1)) == ("10.0.0.2", "10.0.0.3"))
    settle(world)
    assert [world.inspects(name) for name in (OWN["Id"], "web", "db")] == [1, 1, 1]


def test_the_wait_at_the_start_has_a_bound(
    world: World, start: Start, hang: Hang, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ambassador.discovery.own_networks.FIRST_ANSWER_S", 0.02)
    world.containers = {"web": on_bridge("web", "10.0.0.2"), OWN["Id"]: hang}
    source = start("web", wait=False, own_id=lambda: OWN["Id"])
    until(lambda: "own container not inspected in time" in source.targets()[0].problem)
    until(lambda: log.having("inspect failed"))
    hang.end()
    until(lambda: address_of(source) == "10.0.0.2")
    assert source.targets()[0].problem == ""
    assert len(log.having("inspect failed")) == 1


def test_an_error_at_the_start_is_the_targets_problem(world: World, start: Start) -> None:
    world.containers = {"web": on_bridge("web", "10.0.0.2")}
    world.containers[OWN["Id"]] = EngineError("forbidden: allow it", status=403)
    source = start("web", wait=False, own_id=lambda: OWN["Id"])
    until(lambda: source.targets()[0].problem == "forbidden: allow it")
    assert address_of(source) is None
    world.containers[OWN["Id"]] = OWN
    until(lambda: address_of(source) == "10.0.0.2")  # without an event
    assert source.targets()[0].problem == ""


def test_stop_does_not_wait_for_it(world: World, start: Start, hang: Hang) -> None:
    before = set(threading.enumerate())
    world.containers = {"web": on_bridge("web", "10.0.0.2"), OWN["Id"]: hang}
    source = start("web", own_id=lambda: OWN["Id"])
    began = time.monotonic()
    source.stop()
    assert time.monotonic() - began < 1.0
    until(lambda: len(set(threading.enumerate()) - before) <= 1)  # the one inside the request
    hang.end()
    until(lambda: not set(threading.enumerate()) - before)


def test_an_engine_that_comes_late_is_asked(world: World, start: Start) -> None:
    world.failure = GONE
    world.containers = {"web": on_bridge("web", "10.0.0.2"), OWN["Id"]: OWN}
    source = start("web", wait=False, own_id=lambda: OWN["Id"])
    until(lambda: len(world.connects) >= 3)
    world.failure = None
    until(lambda: address_of(source) == "10.0.0.2")
    assert world.inspects(OWN["Id"]) == 1


def test_own_networks_are_logged_once(world: World, start: Start, log: Log) -> None:
    world.containers = {OWN["Id"]: OWN}
    start("web", own_id=lambda: OWN["Id"])
    for _ in range(3):
        world.send(OWN_EVENT)
        settle(world)
    (line,) = log.having("own networks")
    assert "bridge" in line
