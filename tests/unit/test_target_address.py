"""The state of a target, over documents of every shape of Engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ambassador.discovery.documents import Attachment
from ambassador.discovery.own_networks import OwnNetworks, own_networks_of
from ambassador.discovery.target_address import (
    absent_state,
    awaits_address,
    keep_ports,
    needs_drivers,
    no_address_problem,
    target_state,
)
from ambassador.model import ListenAddress, Replica, TargetState
from ambassador.values import Protocol

DOCUMENTS = Path(__file__).parent / "documents"
DOCKERS = ("engine-20.10", "engine-26", "engine-29")
ENGINES = (*DOCKERS, "podman-5")
REDIS = {ListenAddress(Protocol.TCP, 6379): 6379}
HOST = OwnNetworks()

Documents = dict[str, Any]


def address_of(state: TargetState) -> str:
    (replica,) = state.replicas
    return replica.address


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def documents(engine: str) -> Documents:
    loaded: Documents = json.loads((DOCUMENTS / f"{engine}.json").read_text())
    return loaded


def here(engine: str, address: str) -> str:
    """The address in Podman's documents, where the networks have Podman's ranges."""
    if engine.startswith("podman"):
        for docker, podman in (("172.29.0", "10.88.0"), ("172.30.0", "10.89.0")):
            address = address.replace(docker, podman)
        address = address.replace("172.30.5", "10.89.1")
    return address


# --- from the host -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("situation", "address"),
    [
        ("default-bridge", "172.29.0.2"),
        ("user-network", "172.30.0.2"),
        ("two-networks", "172.30.0.3"),
        ("paused", "172.29.0.3"),
        ("ipv6-only", "fd00:5::2"),
    ],
)
def test_relayable_from_the_host(
    engine: str, documents: Documents, situation: str, address: str
) -> None:
    document = documents[situation]
    state = target_state("it", document, HOST)
    assert (address_of(state), state.problem) == (here(engine, address), "")
    assert state.ports.items() >= REDIS.items()
    (replica,) = state.replicas
    assert (replica.container, replica.run) == (document["Id"], document["State"]["StartedAt"])


@pytest.mark.parametrize("situation", ["restarting", "created", "stopped", "user-network-stopped"])
def test_not_running_is_no_problem(documents: Documents, situation: str) -> None:
    state = target_state("it", documents[situation], HOST)
    assert (state.replicas, state.problem) == ((), "")
    assert state.ports.items() >= REDIS.items()
    assert not awaits_address(documents[situation], state)


def test_a_restarting_container_that_still_has_an_address_is_not_relayed_to(
    documents: Documents,
) -> None:
    document = copy.deepcopy(documents["default-bridge"])
    document["State"]["Restarting"] = True
    assert target_state("it", document, HOST).replicas == ()


def test_an_empty_address_is_awaited(documents: Documents) -> None:
    document = documents["no-address"]
    state = target_state("it", document, HOST)
    assert (state.replicas, state.problem) == ((), "")
    assert awaits_address(document, state)
    assert not awaits_address(
        document, TargetState("it", replicas=(Replica("id", "then", "10.0.0.1"),))
    )
    assert "docker restart it" in no_address_problem("it")


def test_host_mode_from_the_host(documents: Documents) -> None:
    for own_networks in (HOST, own_networks_of(documents["ambassador-host"])):
        state = target_state("it", documents["host"], own_networks)
        assert not state.replicas
        assert "own host network" in state.problem


@pytest.mark.parametrize("situation", ["none", "unplugged"])
def test_on_no_network(documents: Documents, situation: str) -> None:
    for own_networks in (HOST, own_networks_of(documents["ambassador-user"])):
        state = target_state("it", documents[situation], own_networks)
        assert not state.replicas
        assert "on no network" in state.problem
        assert "docker network connect NETWORK it" in state.problem
        assert not awaits_address(documents[situation], state)


def test_the_mode_none_is_named(documents: Documents) -> None:
    assert "network mode none" in target_state("it", documents["none"], HOST).problem


def test_exposing_nothing_is_a_problem_with_an_address(documents: Documents) -> None:
    state = target_state("mute", documents["exposes-nothing"], HOST)
    assert state.replicas
    assert state.ports == {}
    assert "--expose" in state.problem and "EXPOSE" in state.problem


NETWORKS = {
    "zoo": {"NetworkID": "1" * 64, "IPAddress": "10.1.0.1"},
    "bridge": {"NetworkID": "2" * 64, "IPAddress": "10.2.0.1"},
    "alpha": {"NetworkID": "3" * 64, "IPAddress": "10.3.0.1"},
}


def on_networks(networks: dict[str, Any]) -> Documents:
    return {
        "Id": "a" * 64,
        "Name": "/it",
        "State": {"Running": True},
        "Config": {"ExposedPorts": {"6379/tcp": {}}},
        "NetworkSettings": {"Networks": networks},
    }


@pytest.mark.parametrize(
    ("drivers", "address"),
    [
        ({}, "10.2.0.1"),  # nothing known: the default bridge first
        ({"2" * 64: "overlay"}, "10.3.0.1"),  # then by name
        ({"2" * 64: "overlay", "3" * 64: "macvlan"}, "10.1.0.1"),
        ({"bridge": "overlay", "alpha": "ipvlan"}, "10.1.0.1"),  # known by name only
    ],
)
def test_from_the_host_a_bridge_is_chosen(drivers: dict[str, str], address: str) -> None:
    state = target_state("it", on_networks(NETWORKS), HOST, drivers=drivers)
    assert address_of(state) == address


def test_from_the_host_no_bridge_is_a_problem() -> None:
    drivers = dict.fromkeys(NETWORKS, "overlay")
    state = target_state("it", on_networks(NETWORKS), HOST, drivers=drivers)
    assert not state.replicas
    assert "alpha, zoo, bridge" in state.problem


# --- from a container --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ambassador", "situation", "address"),
    [
        ("ambassador-default", "default-bridge", "172.29.0.2"),
        ("ambassador-default", "paused", "172.29.0.3"),
        ("ambassador-user", "user-network", "172.30.0.2"),
        ("ambassador-user", "two-networks", "172.30.0.3"),
        ("ambassador-default", "host", "172.29.0.1"),
        ("ambassador-user", "host", "172.30.0.1"),
    ],
)
def test_relayable_from_a_container(
    engine: str, documents: Documents, ambassador: str, situation: str, address: str
) -> None:
    state = target_state("it", documents[situation], own_networks_of(documents[ambassador]))
    assert (address_of(state), state.problem) == (here(engine, address), "")


def test_no_shared_network_names_both_sides(engine: str, documents: Documents) -> None:
    state = target_state(
        "it", documents["two-networks"], own_networks_of(documents["ambassador-default"])
    )
    default = "podman" if engine.startswith("podman") else "bridge"
    assert not state.replicas
    assert "it is on back, front" in state.problem
    assert f"the ambassador on {default}:" in state.problem
    assert "docker network connect NETWORK it" in state.problem


def test_a_network_of_the_same_name_and_another_id_is_not_shared() -> None:
    own_networks = OwnNetworks("b" * 64, "b" * 64, False, (Attachment("alpha", "9" * 64),))
    assert not target_state("it", on_networks(NETWORKS), own_networks).replicas


def test_a_network_without_an_id_is_shared_by_name() -> None:
    own_networks = OwnNetworks("b" * 64, "b" * 64, False, (Attachment("alpha"),))
    assert address_of(target_state("it", on_networks(NETWORKS), own_networks)) == "10.3.0.1"


def test_of_several_shared_networks_the_users_own_come_first_by_name() -> None:
    own = tuple(Attachment(name, entry["NetworkID"]) for name, entry in NETWORKS.items())
    own_networks = OwnNetworks("b" * 64, "b" * 64, False, own)
    assert address_of(target_state("it", on_networks(NETWORKS), own_networks)) == "10.3.0.1"
    reverse = dict(reversed(NETWORKS.items()))
    assert address_of(target_state("it", on_networks(reverse), own_networks)) == "10.3.0.1"
    without = {name: entry for name, entry in NETWORKS.items() if name != "alpha"}
    assert address_of(target_state("it", on_networks(without), own_networks)) == "10.1.0.1"


def test_host_mode_where_no_network_has_a_gateway(documents: Documents) -> None:
    own_networks = OwnNetworks("b" * 64, "b" * 64, False, (Attachment("internal", "1"),))
    state = target_state("it", documents["host"], own_networks)
    assert not state.replicas
    assert "internal" in state.problem


def test_the_ambassador_itself_is_no_target(documents: Documents) -> None:
    for ambassador in ("ambassador-default", "ambassador-user", "ambassador-host"):
        own = documents[ambassador]
        state = target_state("me", own, own_networks_of(own))
        assert not state.replicas
        assert "the ambassador itself" in state.problem


# --- -network ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "address"), [("back", "172.30.0.3"), ("front", "172.30.5.2")])
def test_network_decides(engine: str, documents: Documents, network: str, address: str) -> None:
    state = target_state("it", documents["two-networks"], HOST, network=network)
    assert (address_of(state), state.problem) == (here(engine, address), "")


def test_network_by_id(documents: Documents) -> None:
    ident = documents["two-networks"]["NetworkSettings"]["Networks"]["front"]["NetworkID"]
    state = target_state("it", documents["two-networks"], HOST, network=ident)
    assert state.replicas and state.problem == ""


def test_network_that_the_target_is_not_on(documents: Documents) -> None:
    state = target_state("it", documents["two-networks"], HOST, network="fron")
    assert not state.replicas
    assert "not on network fron" in state.problem
    assert "back, front" in state.problem
    assert "docker network connect fron it" in state.problem


def test_network_that_the_ambassador_is_not_on_is_used_with_a_problem(documents: Documents) -> None:
    own_networks = own_networks_of(documents["ambassador-user"])
    state = target_state("it", documents["two-networks"], own_networks, network="front")
    assert state.replicas
    assert "docker network connect front AMBASSADOR" in state.problem


# --- container:X -------------------------------------------------------------------------------


def test_joined(engine: str, documents: Documents) -> None:
    joined, owner = documents["joined"], documents["user-network"]
    for own_networks in (HOST, own_networks_of(documents["ambassador-user"])):
        state = target_state("sidecar", joined, own_networks, network_owner=owner)
        assert (address_of(state), state.problem) == (here(engine, "172.30.0.2"), "")
        assert state.ports == REDIS  # its own, not the owner's
        assert state.replicas[0].container == joined["Id"]


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (None, "is gone"),
        ("default-bridge", "is gone"),  # another container than the one it joined
        ("user-network-stopped", "web, which is not running"),
        ("user-network-restarted", "restart this one too"),
    ],
)
def test_joined_to_a_network_that_is_not_there(
    documents: Documents, owner: str | None, words: str
) -> None:
    document = documents[owner] if owner else None
    state = target_state("sidecar", documents["joined"], HOST, network_owner=document)
    assert not state.replicas
    assert words in state.problem and state.problem.startswith("sidecar ")


def test_joined_to_one_that_is_joined_itself(documents: Documents) -> None:
    owner = copy.deepcopy(documents["user-network"])
    owner["HostConfig"]["NetworkMode"] = "container:" + "c" * 64
    state = target_state("sidecar", documents["joined"], HOST, network_owner=owner)
    assert not state.replicas and "in turn" in state.problem


@pytest.mark.parametrize(("mode", "words"), [("host", "own host network"), ("none", "none")])
def test_joined_to_a_special_network(documents: Documents, mode: str, words: str) -> None:
    owner = copy.deepcopy(documents["user-network"])
    owner["HostConfig"]["NetworkMode"] = mode
    owner["NetworkSettings"]["Networks"] = {}
    state = target_state("sidecar", documents["joined"], HOST, network_owner=owner)
    assert not state.replicas and words in state.problem


def test_a_target_on_the_ambassadors_own_network_is_never_dialled(documents: Documents) -> None:
    own_networks = own_networks_of(documents["user-network"])
    state = target_state(
        "sidecar", documents["joined"], own_networks, network_owner=documents["user-network"]
    )
    assert not state.replicas
    assert "shares the ambassador's own network" in state.problem


# --- untrusted names ---------------------------------------------------------------------------


def test_a_problem_is_one_printable_line() -> None:
    networks = {"evil\n\x1b[31m\u202e": {"IPAddress": "10.0.0.1"}}
    own_networks = OwnNetworks("b" * 64, "b" * 64, False, (Attachment("own\r\n"),))
    for network in ("", "which\x00\n"):
        state = target_state("it\n", on_networks(networks), own_networks, network=network)
        assert state.problem and state.problem.isprintable()


def test_a_problem_is_short_however_many_networks_there_are() -> None:
    networks = {f"net{i:03}{'x' * 500}": {"IPAddress": "10.0.0.1"} for i in range(200)}
    state = target_state("it", on_networks(networks), HOST, network="none-of-them")
    assert "and 192 more" in state.problem
    assert len(state.problem) < 2000


# --- from one state to the next ----------------------------------------------------------------


def test_a_stopped_container_keeps_the_ports_of_its_last_run() -> None:
    udp = {ListenAddress(Protocol.UDP, 53): 53}
    reached = (Replica("id", "then", "10.0.0.1"),)
    before = TargetState("it", udp | REDIS, reached)
    assert keep_ports(before, TargetState("it", REDIS)).ports == udp | REDIS
    # The same container running again says for itself.
    assert keep_ports(before, TargetState("it", REDIS, reached)).ports == REDIS


def test_an_absent_container_keeps_its_ports_and_nothing_else() -> None:
    before = TargetState("it", REDIS, (Replica("id", "then", "10.0.0.1"),), problem="a problem")
    assert absent_state(before) == TargetState("it", REDIS)


def test_drivers_are_needed_only_if_they_decide() -> None:
    documents = json.loads((DOCUMENTS / "engine-20.10.json").read_text())
    inside = own_networks_of(documents["ambassador-user"])
    assert needs_drivers(documents["two-networks"], HOST, "")
    assert not needs_drivers(documents["two-networks"], HOST, "back")
    assert not needs_drivers(documents["default-bridge"], HOST, "")
    assert not needs_drivers(documents["two-networks"], inside, "")
