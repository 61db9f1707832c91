"""The state of a target, over documents of every shape of Engine."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ambassador.discovery.documents import MAX_OWNERS, Attachment, Network, owners_of
from ambassador.discovery.own_networks import OwnNetworks, own_networks_of
from ambassador.discovery.target_address import (
    absent_state,
    awaits_address,
    keep_ports,
    networks_in_question,
    no_address_problem,
    target_state,
)
from ambassador.model import ListenAddress, Replica, TargetState
from ambassador.values import Protocol

DOCUMENTS = Path(__file__).parent / "documents"
DOCKERS = ("engine-20.10", "engine-26", "engine-29")
ENGINES = (*DOCKERS, "podman-5")
REDIS = {ListenAddress(Protocol.TCP, 6379): 6379}
HOST = OwnNetworks(
    addresses=frozenset(
        (
            *("172.29.0.1", "172.30.0.1", "172.30.5.1", "10.88.0.1", "10.89.0.1", "10.89.1.1"),
            *("127.0.0.1", "fd00:5::1", "10.1.0.254", "10.2.0.254", "10.3.0.254"),
        )
    )
)
"""A host with the bridges of the documents and of NETWORKS."""

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
    for own_networks in (HOST, OwnNetworks(), own_networks_of(documents["ambassador-host"])):
        state = target_state("it", documents["host"], own_networks)
        assert not state.replicas
        assert "own host network" in state.problem


@pytest.mark.parametrize("mode", ["pasta", "slirp4netns", "slirp4netns:mtu=1500"])
def test_podmans_rootless_default_is_told_what_works(documents: Documents, mode: str) -> None:
    document = copy.deepcopy(documents["unplugged"])
    document["HostConfig"]["NetworkMode"] = mode
    problem = target_state("it", document, HOST).problem
    assert f"network mode {mode}" in problem and "podman run --network podman" in problem
    assert "docker network connect" not in problem


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
    "zoo": {"NetworkID": "1" * 64, "IPAddress": "10.1.0.1", "Gateway": "10.1.0.254"},
    "bridge": {"NetworkID": "2" * 64, "IPAddress": "10.2.0.1", "Gateway": "10.2.0.254"},
    "alpha": {"NetworkID": "3" * 64, "IPAddress": "10.3.0.1", "Gateway": "10.3.0.254"},
}


def on_networks(networks: dict[str, Any]) -> Documents:
    return {
        "Id": "a" * 64,
        "Name": "/it",
        "State": {"Running": True},
        "Config": {"ExposedPorts": {"6379/tcp": {}}},
        "NetworkSettings": {"Networks": networks},
    }


ZOO, BRIDGE, ALPHA = (digit * 64 for digit in "123")


@pytest.mark.parametrize(
    ("drivers", "address"),
    [
        ({}, "10.2.0.1"),  # nothing known: the default bridge first
        ({BRIDGE: "overlay"}, "10.3.0.1"),  # then by name
        ({BRIDGE: "overlay", ALPHA: "macvlan"}, "10.1.0.1"),
        ({"bridge": "overlay"}, "10.2.0.1"),  # another network, which had the name before
    ],
)
def test_from_the_host_a_bridge_is_chosen(drivers: dict[str, str], address: str) -> None:
    networks = {key: Network(driver) for key, driver in drivers.items()}
    state = target_state("it", on_networks(NETWORKS), HOST, networks=networks)
    assert address_of(state) == address


def test_from_the_host_no_bridge_is_a_problem() -> None:
    networks = dict.fromkeys((ZOO, BRIDGE, ALPHA), Network("overlay"))
    state = target_state("it", on_networks(NETWORKS), HOST, networks=networks)
    assert not state.replicas
    assert "alpha, zoo, bridge" in state.problem


@pytest.mark.parametrize(
    ("gateway", "networks", "address"),
    [
        ("10.3.0.254", {}, "10.3.0.1"),
        ("", {}, None),  # gateway mode isolated; or the list of networks is forbidden
        ("10.3.0.253", {}, None),  # an Engine elsewhere, or a router
        # The container's gateway is another machine, or none (--internal), and the bridge's own is here.
        ("10.3.0.50", {ALPHA: Network("bridge", frozenset({"10.3.0.254"}))}, "10.3.0.1"),
        ("", {ALPHA: Network("bridge", frozenset({"10.3.0.254"}))}, "10.3.0.1"),
        ("", {ALPHA: Network("bridge", frozenset({"10.3.0.253"}))}, None),
        # Internal, with a subnet of the user's: no gateway is told, but the bridge's own address is in it.
        (
            "",
            {ALPHA: Network("bridge", subnets=frozenset({"10.3.0.0/24", "fd00::/64"}))},
            "10.3.0.1",
        ),
        ("", {ALPHA: Network("bridge", subnets=frozenset({"10.9.0.0/24"}))}, None),
        ("", {ALPHA: Network("bridge", router=True, subnets=frozenset({"10.3.0.0/24"}))}, None),
        # The host is the router of a LAN, and cannot reach its own macvlan.
        ("10.3.0.254", {ALPHA: Network("macvlan", frozenset({"10.3.0.254"}))}, None),
    ],
)
def test_from_the_host_only_a_network_with_the_host_as_gateway(
    gateway: str, networks: dict[str, Network], address: str | None
) -> None:
    document = on_networks({"alpha": NETWORKS["alpha"] | {"Gateway": gateway}})
    state = target_state("it", document, HOST, networks=networks)
    assert [each.address for each in state.replicas] == ([address] if address else [])
    assert bool(state.problem) is (address is None)
    assert address or (state.problem.startswith("it is ") and "alpha" in state.problem)


def test_an_engine_that_does_not_know_the_own_container() -> None:
    """Another Engine's networks have the ranges of this one's, and its addresses are other containers'."""
    elsewhere = OwnNetworks(unknown=True, addresses=frozenset({"172.17.0.3"}))
    state = target_state("it", on_networks(NETWORKS), elsewhere)
    assert not state.replicas
    assert "does not know the ambassador's container" in state.problem
    # In a container on the host's network the addresses hold.
    on_host = OwnNetworks(unknown=True, addresses=HOST.addresses)
    assert address_of(target_state("it", on_networks(NETWORKS), on_host)) == "10.2.0.1"


@pytest.mark.parametrize("network", ["", "bridge"])
def test_a_rootless_engines_networks_are_not_the_hosts(network: str) -> None:
    """A rootful Engine beside it has the same gateway."""
    rootless = OwnNetworks(addresses=HOST.addresses, rootless=True)
    state = target_state("it", on_networks(NETWORKS), rootless, network=network)
    assert not state.replicas
    assert "rootless" in state.problem and "run the ambassador as a container" in state.problem


@pytest.mark.parametrize("network", ["ingress", "docker_gwbridge"])
def test_a_network_of_swarms_own_is_never_chosen(network: str) -> None:
    networks = {network: {"NetworkID": "9" * 64, "IPAddress": "10.0.0.9"}, **NETWORKS}
    own = tuple(Attachment(name, each["NetworkID"]) for name, each in networks.items())
    within = OwnNetworks("b" * 64, "b" * 64, False, own)
    del networks["alpha"]
    assert address_of(target_state("it", on_networks(networks), within)) == "10.1.0.1"


# --- from a container --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ambassador", "situation", "address"),
    [
        ("ambassador-default", "default-bridge", "172.29.0.2"),
        ("ambassador-default", "paused", "172.29.0.3"),
        ("ambassador-user", "user-network", "172.30.0.2"),
        ("ambassador-user", "two-networks", "172.30.0.3"),
        ("ambassador-default", "host", "172.29.0.1"),
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


AT_A = Attachment("a", "a" * 64, "10.78.1.2", "10.78.1.50")
AT_B = Attachment("b", "b" * 64, "10.78.2.2", "10.78.2.1")
AT_BRIDGE = Attachment("bridge", "c" * 64, "172.17.0.3", "172.17.0.1")
A = {AT_A.network_id: Network("bridge", frozenset({"10.78.1.1"}))}
B = {AT_B.network_id: Network("bridge", frozenset({"10.78.2.1"}))}


@pytest.mark.parametrize(
    ("own", "networks", "address"),
    [
        ([AT_A, AT_B], A | B, "10.78.2.1"),  # the gateway of a is another machine
        ([AT_A], A, None),
        ([AT_B], {}, None),  # the list of networks is forbidden
        ([AT_B], {AT_B.network_id: Network("macvlan", frozenset({"10.78.2.1"}))}, None),
        ([AT_B], {AT_B.network_id: Network("bridge", router=True)}, None),
        ([AT_B], {AT_B.network_id: Network("bridge")}, "10.78.2.1"),  # the user gave a subnet only
        ([AT_B, AT_BRIDGE], B, "172.17.0.1"),  # the default one first, a bridge also if not listed
        ([AT_BRIDGE], {AT_BRIDGE.network_id: Network("bridge")}, "172.17.0.1"),
    ],
)
def test_the_host_is_the_gateway_of_a_bridge_of_its_own(
    documents: Documents,
    own: list[Attachment],
    networks: dict[str, Network],
    address: str | None,
) -> None:
    within = OwnNetworks("b" * 64, "b" * 64, False, tuple(own))
    state = target_state("it", documents["host"], within, networks=networks)
    assert [each.address for each in state.replicas] == ([address] if address else [])
    assert address or "docker network connect bridge AMBASSADOR" in state.problem
    assert networks_in_question(documents["host"], within) == tuple(own)


def test_the_address_in_use_stays_while_it_can_be_reached() -> None:
    """Another network comes first by name, for the target or for the ambassador."""
    zoo = {"zoo": NETWORKS["zoo"]}
    both = tuple(Attachment(name, each["NetworkID"]) for name, each in NETWORKS.items())
    within = OwnNetworks("b" * 64, "b" * 64, False, both)
    first = target_state("it", on_networks(zoo), within).replicas
    assert target_state("it", on_networks(NETWORKS), within, previous=first).replicas == first
    # Another run chooses anew, and so does a run that has lost the address.
    other = (replace(first[0], run="later"),)
    assert (
        address_of(target_state("it", on_networks(NETWORKS), within, previous=other)) == "10.3.0.1"
    )
    without = {name: each for name, each in NETWORKS.items() if name != "zoo"}
    assert (
        address_of(target_state("it", on_networks(without), within, previous=first)) == "10.3.0.1"
    )


def test_the_hosts_address_in_use_stays(documents: Documents) -> None:
    within = OwnNetworks("b" * 64, "b" * 64, False, (AT_B,))
    first = target_state("it", documents["host"], within, networks=B).replicas
    more = replace(within, attachments=(AT_BRIDGE, AT_B))
    assert target_state("it", documents["host"], more, networks=B).replicas != first
    state = target_state("it", documents["host"], more, networks=B, previous=first)
    assert state.replicas == first


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
    for name in (ident, ident[:12]):  # docker network ls prints the short one
        state = target_state("it", documents["two-networks"], HOST, network=name)
        assert state.replicas and state.problem == ""
    if len(ident) == 64:  # Podman has the name there
        short = target_state("it", documents["two-networks"], HOST, network=ident[:11])
        assert not short.replicas


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
        state = target_state("sidecar", joined, own_networks, owners=(owner,))
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
    state = target_state("sidecar", documents["joined"], HOST, owners=(document,))
    assert not state.replicas
    assert words in state.problem and state.problem.startswith("sidecar ")


def test_joined_to_one_that_is_joined_itself(engine: str, documents: Documents) -> None:
    middle = copy.deepcopy(documents["joined"]) | {"Id": "c" * 64, "Name": "/middle"}
    document = copy.deepcopy(documents["joined"])
    document["HostConfig"]["NetworkMode"] = "container:" + "c" * 64
    owners = (middle, documents["user-network"])
    state = target_state("it", document, HOST, owners=owners)
    assert (address_of(state), state.problem) == (here(engine, "172.30.0.2"), "")
    # Each link is checked: here the middle one is in the network that was before.
    owners = (middle, documents["user-network-restarted"])
    state = target_state("it", document, HOST, owners=owners)
    assert not state.replicas and state.problem.endswith("before its restart: restart middle too")


def test_a_circle_of_owners_ends(documents: Documents) -> None:
    circle = copy.deepcopy(documents["joined"])
    circle["HostConfig"]["NetworkMode"] = "container:" + circle["Id"]
    asked: list[str] = []

    def inspect(reference: str) -> Documents:
        asked.append(reference)
        found: Documents = circle
        return found

    owners = owners_of(circle, inspect)
    assert len(asked) == len(owners) == MAX_OWNERS
    state = target_state("it", circle, HOST, owners=owners)
    assert not state.replicas and "in turn" in state.problem


@pytest.mark.parametrize(("mode", "words"), [("host", "own host network"), ("none", "none")])
def test_joined_to_a_special_network(documents: Documents, mode: str, words: str) -> None:
    owner = copy.deepcopy(documents["user-network"])
    owner["HostConfig"]["NetworkMode"] = mode
    owner["NetworkSettings"]["Networks"] = {}
    state = target_state("sidecar", documents["joined"], HOST, owners=(owner,))
    assert not state.replicas and words in state.problem


def test_a_target_on_the_ambassadors_own_network_is_never_dialled(documents: Documents) -> None:
    own_networks = own_networks_of(documents["user-network"])
    state = target_state(
        "sidecar", documents["joined"], own_networks, owners=(documents["user-network"],)
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


def test_networks_are_asked_for_only_if_they_decide() -> None:
    documents = json.loads((DOCUMENTS / "engine-20.10.json").read_text())
    inside = own_networks_of(documents["ambassador-user"])

    def names(situation: str, own_networks: OwnNetworks) -> list[str]:
        return [a.network for a in networks_in_question(documents[situation], own_networks)]

    assert names("two-networks", HOST) == ["back", "front"]
    assert names("user-network", HOST) == ["back"]  # it could be an overlay
    assert names("default-bridge", HOST) == []
    assert names("default-bridge", OwnNetworks()) == ["bridge"]
    assert names("two-networks", inside) == []
