"""Reading inspect documents: ports, identity, state and networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.discovery.documents import (
    Network,
    attachments,
    exposed_ports,
    is_podman,
    is_rootless,
    is_running,
    is_target,
    network_owner_reference,
    networks_of,
    started_after,
)
from ambassador.discovery.own_networks import own_networks_of
from ambassador.discovery.target_address import target_state
from ambassador.model import ListenAddress
from ambassador.values import Protocol

DOCUMENTS = Path(__file__).parent / "documents"
ENGINES = ("engine-20.10", "engine-26", "engine-29", "podman-5")
ID = "3f4c" * 16
OTHER_ID = "7a9b" * 16


def load(engine: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCUMENTS / f"{engine}.json").read_text())
    return loaded


def listeners(*texts: str) -> dict[ListenAddress, int]:
    pairs = (text.split("/") for text in texts)
    return {ListenAddress(Protocol(protocol), int(port)): int(port) for port, protocol in pairs}


def ports(config: object = None, settings: object = None) -> dict[str, Any]:
    return {"Config": {"ExposedPorts": config}, "NetworkSettings": {"Ports": settings}}


# --- ports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_ports_of_a_real_document(engine: str) -> None:
    exposed = exposed_ports(load(engine)["user-network"])
    assert exposed.ports == listeners(
        "53/udp", "80/tcp", "6379/tcp", "8000/tcp", "8001/tcp", "8002/tcp"
    )
    assert exposed.skipped == ("3868/sctp",)
    assert exposed_ports(load(engine)["exposes-nothing"]) == ({}, ())


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (ports({"80/tcp": {}}), listeners("80/tcp")),
        (ports({"80": {}}), listeners("80/tcp")),
        (ports({"53/UDP": {}}), listeners("53/udp")),
        (ports({"8000-8002/tcp": {}}), listeners("8000/tcp", "8001/tcp", "8002/tcp")),
        (ports({"7-7/udp": {}}), listeners("7/udp")),
        (ports({"80/tcp": {}}, {"80/tcp": None, "53/udp": []}), listeners("80/tcp", "53/udp")),
        (ports(None, {"443/tcp": [{"HostPort": "1"}]}), listeners("443/tcp")),
        (ports({"1/tcp": {}, "65535/tcp": {}}), listeners("1/tcp", "65535/tcp")),
        # Junk is left out, and does not take the rest with it.
        (ports({"0/tcp": {}, "65536/tcp": {}, "5/tcp": {}}), listeners("5/tcp")),
        (ports({"": {}, "x/tcp": {}, "-1/tcp": {}, "9-/tcp": {}, "5/tcp": {}}), listeners("5/tcp")),
        (ports({"9-8/tcp": {}, "5/tcp": {}, "\uff16/tcp": {}, "7/tcp\n": {}}), listeners("5/tcp")),
        (ports([], "x"), {}),
        (ports(), {}),
        ({}, {}),
        ({"Config": None, "NetworkSettings": None}, {}),
        ({"Config": [1], "NetworkSettings": 7}, {}),
    ],
)
def test_exposed_ports(document: dict[str, Any], expected: dict[ListenAddress, int]) -> None:
    assert exposed_ports(document).ports == expected


def test_sctp_is_reported_once_and_not_relayed() -> None:
    exposed = exposed_ports(ports({"9/sctp": {}, "9/tcp": {}}, {"9/sctp": None}))
    assert exposed == (listeners("9/tcp"), ("9/sctp",))


# --- identity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "ident", "accepted"),
    [
        ("web", "/web", ID, True),
        ("web", "web", ID, True),
        ("/web", "/web", ID, True),
        ("web", "/web2", ID, False),
        ("web2", "/web", ID, False),
        ("WEB", "/web", ID, False),
        (ID, "/web", ID, True),
        (ID[:12], "/web", ID, True),
        (ID[:40], "/web", ID, True),
        # Docker answers to these as well; they are names that nobody has.
        (ID[:11], "/web", ID, False),
        ("3f", "/web", ID, False),
        (ID[:12].upper(), "/web", ID, False),
        (OTHER_ID[:12], "/web", ID, False),
        (ID[:12], "/web", "", False),
        ("", "", "", False),
        ("/", "/", ID, False),
    ],
)
def test_is_target(target: str, name: str, ident: str, accepted: bool) -> None:
    assert is_target({"Name": name, "Id": ident}, target) is accepted


@pytest.mark.parametrize("engine", ENGINES)
def test_network_owner_reference_leads_to_its_container(engine: str) -> None:
    documents = load(engine)
    reference = network_owner_reference(documents["joined"])
    assert reference is not None and is_target(documents["user-network"], reference)
    assert network_owner_reference(documents["user-network"]) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_started_after_compares_moments_not_texts(engine: str) -> None:
    documents = load(engine)
    assert started_after(documents["joined"], documents["user-network"])
    assert not started_after(documents["user-network"], documents["joined"])
    assert started_after(documents["user-network-restarted"], documents["joined"])
    assert not started_after(documents["joined"], documents["joined"])


@pytest.mark.parametrize(
    ("first", "second", "after"),
    [
        ("2026-01-01T00:00:00.9Z", "2026-01-01T00:00:00.12Z", True),
        ("2026-01-01T01:00:00+02:00", "2026-01-01T00:00:00Z", False),
        ("2026-01-01T00:00:00Z", "", False),
        ("soon", "2026-01-01T00:00:00Z", False),
        ("2026-01-01T00:00:01", "2026-01-01T00:00:00Z", True),
    ],
)
def test_started_after(first: str, second: str, after: bool) -> None:
    assert started_after({"State": {"StartedAt": first}}, {"State": {"StartedAt": second}}) is after


# --- state and networks ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_is_running(engine: str) -> None:
    running = {name for name, document in load(engine).items() if is_running(document)}
    down = {"restarting", "created", "stopped", "user-network-stopped"}
    assert running == load(engine).keys() - down


@pytest.mark.parametrize("engine", ENGINES)
def test_attachments(engine: str) -> None:
    documents = load(engine)
    assert [a.network for a in attachments(documents["two-networks"])] == ["back", "front"]
    for situation in ("host", "none", "unplugged", "joined"):
        assert attachments(documents[situation]) == ()
    (six,) = attachments(documents["ipv6-only"])
    assert (six.address, six.gateway) == ("fd00:5::2", "fd00:5::1")
    (empty,) = attachments(documents["no-address"])
    assert (empty.address, empty.gateway) == ("", "")


def test_attachments_put_the_default_network_last() -> None:
    networks = {name: {"IPAddress": "10.0.0.1"} for name in ("bridge", "zoo", "alpha", "podman")}
    found = attachments({"NetworkSettings": {"Networks": networks}})
    assert [a.network for a in found] == ["alpha", "zoo", "bridge", "podman"]


@pytest.mark.parametrize(
    "address",
    [
        *("", "10.0.0.1/24", "0.0.0.0", "::", "host", "1.2.3.4\n", None, 7),
        *("fe80::1%eth0", "fe80::1%2", "fe80::1%9999999999999", "fd00::1%eth0", "fe80::1"),
        *("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.1.2.3", "::ffff:0.0.0.0"),
        *("224.0.0.1", "239.255.255.255", "ff02::1", "240.0.0.1", "255.255.255.255"),
        "::ffff:224.0.0.1",
    ],
)
def test_an_address_is_a_literal_or_nothing(address: object) -> None:
    document = {"NetworkSettings": {"Networks": {"net": {"IPAddress": address}}}}
    (place,) = attachments(document)
    assert place.address == ""


def test_old_podman_fills_the_top_level_only() -> None:
    document = {
        "NetworkSettings": {"Networks": {}, "IPAddress": "10.88.0.6", "Gateway": "10.88.0.1"}
    }
    (place,) = attachments(document)
    assert (place.address, place.gateway) == ("10.88.0.6", "10.88.0.1")


def test_networks() -> None:
    listed = json.loads((DOCUMENTS / "networks-20.10.json").read_text())
    found = networks_of(listed)
    back = next(n for n in listed if n["Name"] == "back")
    assert found["back"].driver == found[back["Id"]].driver == "bridge"
    assert found["none"].driver == "null"
    assert networks_of([None, 3, {}, {"Id": 4, "Driver": "x"}]) == {}


INHIBITED = {"com.docker.network.bridge.inhibit_ipv4": "true"}


@pytest.mark.parametrize(
    ("ipam", "options", "gateways", "router"),
    [
        ({"Config": [{"Subnet": "10.0.0.0/24", "Gateway": "10.0.0.1"}]}, {}, {"10.0.0.1"}, False),
        ({"Config": [{"Gateway": "10.0.0.1/24"}]}, {}, {"10.0.0.1"}, False),
        (
            {"Config": [{"Gateway": "10.0.0.1"}, {"Gateway": "FD00::1"}]},
            {},
            {"10.0.0.1", "fd00::1"},
            False,
        ),
        ({"Config": [{"Gateway": "127.0.0.1"}, {"Gateway": 7}, 3, {}]}, {}, set(), False),
        ({"Config": None}, {}, set(), False),
        ([], {}, set(), False),
        # The gateway is another machine on the bridge.
        ({"Config": [{"Gateway": "10.0.0.1"}]}, INHIBITED, set(), True),
        ({"Config": [{"AuxiliaryAddresses": {"DefaultGatewayIPv4": "10.0.0.5"}}]}, {}, set(), True),
        ({"Config": [{"AuxiliaryAddresses": {"printer": "10.0.0.5"}}]}, {}, set(), False),
    ],
)
def test_the_gateways_of_a_network(
    ipam: Any, options: Any, gateways: set[str], router: bool
) -> None:
    listed = [{"Id": "n", "Driver": "bridge", "IPAM": ipam, "Options": options}]
    found = networks_of(listed)["n"]
    assert found == Network("bridge", frozenset(gateways), router, found.subnets)


def test_the_subnets_of_a_network() -> None:
    configs = [
        {"Subnet": "10.5.0.0/24"},
        {"Subnet": "fd00:0::/64"},
        {"Subnet": "everybody"},
        {"Subnet": 7},
    ]
    listed = [{"Id": "n", "Driver": "bridge", "IPAM": {"Config": configs}}]
    assert networks_of(listed)["n"].subnets == {"10.5.0.0/24", "fd00::/64"}


@pytest.mark.parametrize(
    ("info", "rootless", "podman"),
    [
        ({}, False, False),
        ({"SecurityOptions": ["name=seccomp,profile=default", "name=cgroupns"]}, False, False),
        ({"SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless"]}, True, False),
        ({"SecurityOptions": ["name=rootless"], "BuildahVersion": "1.42.0"}, True, True),
        ({"SecurityOptions": "name=rootless"}, False, False),
        ({"SecurityOptions": [None, 3]}, False, False),
    ],
)
def test_info(info: dict[str, Any], rootless: bool, podman: bool) -> None:
    assert (is_rootless(info), is_podman(info)) == (rootless, podman)


# --- any JSON at all ---------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
KEYS = st.sampled_from(
    (
        *("Id", "Name", "State", "Running", "StartedAt", "Config", "ExposedPorts", "x", "80/tcp"),
        *("NetworkSettings", "Ports", "Networks", "IPAddress", "HostConfig", "NetworkMode"),
    )
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5)
)


@given(document=st.dictionaries(KEYS, JSON), own=st.none() | st.dictionaries(KEYS, JSON))
def test_no_document_makes_it_raise(document: dict[str, Any], own: dict[str, Any] | None) -> None:
    own_networks = own_networks_of(own)
    state = target_state("web", document, own_networks, owners=(own,))
    assert state.target == "web"
    assert "\n" not in state.problem
    is_target(document, "web")
    started_after(document, own or {})
