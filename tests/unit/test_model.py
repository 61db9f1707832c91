"""The nouns: what cannot be said, what equals what, and how they are written."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.model import (
    AccessRule,
    Backend,
    DesiredState,
    ListenAddress,
    ListenerSpec,
    TargetState,
)
from ambassador.values import Protocol

LISTEN = ListenAddress(Protocol.TCP, 6379)
BACKEND = Backend("172.17.0.3", 6379, "c1", "2026-11-22T23:00:00Z")


@pytest.mark.parametrize("port", [1, 65535])
def test_the_ends_of_the_range_of_ports(port: int) -> None:
    assert ListenAddress(Protocol.UDP, port).first_port == port
    assert Backend("10.0.0.5", port).port == port


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_other_ports_cannot_be_said(port: int) -> None:
    with pytest.raises(ValueError, match="not between 1 and 65535"):
        ListenAddress(Protocol.TCP, port)
    with pytest.raises(ValueError, match="not between 1 and 65535"):
        Backend("10.0.0.5", port)


@pytest.mark.parametrize(
    "address",
    ["", " ", "redis", "10.0.0.256", "10.0.0", "010.0.0.5", "[::1]", "10.0.0.5:1", "1\u0661.0.0.1"],
)
def test_only_an_ip_literal_is_an_address(address: str) -> None:
    """Docker reports "" for a container without a network; dialling that is dialling oneself."""
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        Backend(address, 1)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_any_ip_address_is_one(address: object, port: int) -> None:
    backend = Backend(str(address), port)
    host, _, text = str(backend).rpartition(":")
    assert (host.strip("[]"), int(text)) == (str(address), port)
    assert host.startswith("[") == (":" in str(address))


def test_how_they_are_written() -> None:
    assert str(LISTEN) == "6379/tcp"
    assert str(ListenAddress(Protocol.UDP, 30000, 30010)) == "30000-30010/udp"
    assert str(ListenAddress(Protocol.TCP, 80, address="127.0.0.1")) == "127.0.0.1:80/tcp"
    assert str(ListenAddress(Protocol.UDP, 53, 54, "::1")) == "[::1]:53-54/udp"
    assert str(BACKEND) == "172.17.0.3:6379"
    assert str(Backend("fe80::1%2", 53)) == "[fe80::1%2]:53"


def test_a_range_does_not_run_backwards() -> None:
    assert ListenAddress(Protocol.UDP, 53) == ListenAddress(Protocol.UDP, 53, 53)
    with pytest.raises(ValueError, match="run backwards"):
        ListenAddress(Protocol.UDP, 54, 53)


def test_only_an_ip_literal_is_listened_on() -> None:
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        ListenAddress(Protocol.TCP, 80, address="localhost")


@pytest.mark.parametrize("weight", [-1, 65536])
def test_weights_have_bounds(weight: int) -> None:
    with pytest.raises(ValueError, match="not between 0 and 65535"):
        Backend("10.0.0.5", 1, weight=weight)


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "everybody"])
def test_a_rule_is_of_a_network(network: str) -> None:
    with pytest.raises(ValueError, match=r"network|host bits"):
        AccessRule(network, allow=True)


@pytest.mark.parametrize(
    "change",
    [
        {"run": "2026-11-22T23:00:01Z"},
        {"container": "c2"},
        {"address": "172.17.0.4"},
        {"port": 6380},
    ],
)
def test_a_backend_is_one_run_of_one_container(change: dict[str, str]) -> None:
    assert dataclasses.replace(BACKEND) == BACKEND
    assert dataclasses.replace(BACKEND, **change) != BACKEND  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [LISTEN, BACKEND, ListenerSpec(LISTEN, "redis"), TargetState("redis"), DesiredState()],
    ids=lambda value: type(value).__name__,
)
def test_nothing_changes(value: object) -> None:
    assert dataclasses.is_dataclass(value)
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


def test_an_empty_desired_state_cannot_be_filled() -> None:
    with pytest.raises(TypeError):
        DesiredState().listeners[LISTEN] = ListenerSpec(LISTEN, "redis")  # type: ignore[index]
